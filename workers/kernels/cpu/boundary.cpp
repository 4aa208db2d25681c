#include "boundary.h"

#if defined(ANABRANCH_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <stdexcept>

namespace anabranch {

void refuse(const std::string& reason) { throw std::invalid_argument(reason); }

CacheType type_named(const std::string& name) {
  if (name == "float32") return CacheType::float32;
  if (name == "float16") return CacheType::float16;
  if (name == "bfloat16") return CacheType::bfloat16;
  if (name == "int8") return CacheType::int8;
  refuse("no cache of type " + name + "; there are 4");
}

namespace {
#if defined(ANABRANCH_AMX)
// Whether the processor has matrix tiles, and Linux lets this process use them: their state is eight KiB a thread, so it
// asks to be asked, and refuses where a thread's stack for signals has no room for it.
bool may_use_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned wanted = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & wanted) != wanted) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

bool supports(const Level& level) {
#if defined(ANABRANCH_X86)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (&level == &avx2_level)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (&level == &avx512_level) return avx512;
  if (&level == &avx512_bf16_level)
    return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#endif
#if defined(ANABRANCH_AMX)
  static const bool has_tiles = may_use_tiles();
  if (&level == &amx_level) return supports(avx512_bf16_level) && has_tiles;
#endif
  return &level == &portable_level;
}

std::vector<const Level*> find_levels() {
  std::vector<const Level*> found;
#if defined(ANABRANCH_AMX)
  if (supports(amx_level)) found.push_back(&amx_level);
#endif
#if defined(ANABRANCH_X86)
  for (const Level* level : {&avx512_bf16_level, &avx512_level, &avx2_level})
    if (supports(*level)) found.push_back(level);
#endif
  found.push_back(&portable_level);
  return found;
}

}  // namespace

const std::vector<const Level*>& levels() {
  static const std::vector<const Level*> found = find_levels();
  return found;
}

const Level& level_named(const std::string& name) {
  for (const Level* level : levels())
    if (name == level->name) return *level;
  refuse("no instruction set " + name + " among the " + std::to_string(levels().size()) + " of this machine");
}

}  // namespace anabranch
