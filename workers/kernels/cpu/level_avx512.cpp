// The code of one instruction set; CMakeLists.txt gives the flags.
#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cache.h"

namespace anabranch::level_avx512 {
#include "vectors.h"
#include "attend.h"
#include "operate.h"
}  // namespace anabranch::level_avx512

namespace anabranch {
const Level avx512_level = {"avx512", level_avx512::attend, level_avx512::read, level_avx512::operators};
}
