// The code of one instruction set; CMakeLists.txt gives the flags.
#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cache.h"

namespace anabranch::level_amx {
#include "vectors.h"
#include "attend.h"
#include "operate.h"
}  // namespace anabranch::level_amx

namespace anabranch {
const Level amx_level = {"amx", level_amx::attend, level_amx::read, level_amx::operators};
}
