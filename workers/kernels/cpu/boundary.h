// What both files that Python sees share: refusals, and what names stand for.
#pragma once
#include <nanobind/nanobind.h>

#include <string>
#include <vector>

#include "cache.h"

namespace anabranch {

// Throws std::invalid_argument, which is Python's ValueError.
[[noreturn]] void refuse(const std::string& reason);

CacheType type_named(const std::string& name);

// The instruction sets of this machine, best first.
const std::vector<const Level*>& levels();
const Level& level_named(const std::string& name);

// RowOperators, in operators.cpp.
void bind_operators(nanobind::module_& module);

}  // namespace anabranch
