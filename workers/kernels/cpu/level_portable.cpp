// The code of one instruction set; CMakeLists.txt gives the flags.
#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cache.h"

namespace anabranch::level_portable {
#include "vectors.h"
#include "attend.h"
#include "operate.h"
}  // namespace anabranch::level_portable

namespace anabranch {
const Level portable_level = {"portable", level_portable::attend, level_portable::read, level_portable::operators};
}
