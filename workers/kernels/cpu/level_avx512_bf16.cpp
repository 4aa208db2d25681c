// The code of one instruction set; CMakeLists.txt gives the flags.
#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cache.h"

namespace anabranch::level_avx512_bf16 {
#include "vectors.h"
#include "attend.h"
#include "operate.h"
}  // namespace anabranch::level_avx512_bf16

namespace anabranch {
const Level avx512_bf16_level = {"avx512_bf16", level_avx512_bf16::attend, level_avx512_bf16::read, level_avx512_bf16::operators};
}
