// The code of one instruction set; CMakeLists.txt gives the flags.
#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cache.h"

namespace anabranch::level_avx2 {
#include "vectors.h"
#include "attend.h"
#include "operate.h"
}  // namespace anabranch::level_avx2

namespace anabranch {
const Level avx2_level = {"avx2", level_avx2::attend, level_avx2::read, level_avx2::operators};
}
