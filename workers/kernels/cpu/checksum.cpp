#include "checksum.h"

#include <array>
#include <cstring>

#if defined(ANABRANCH_X86)
#include <nmmintrin.h>
#endif

namespace anabranch {

namespace {

constexpr uint32_t polynomial = 0x82f63b78;  // Castagnoli's, bits reversed

constexpr std::array<uint32_t, 256> table() {
  std::array<uint32_t, 256> remainders{};
  for (uint32_t byte = 0; byte < 256; byte++) {
    uint32_t value = byte;
    for (int bit = 0; bit < 8; bit++) value = value & 1 ? value >> 1 ^ polynomial : value >> 1;
    remainders[byte] = value;
  }
  return remainders;
}

uint32_t by_table(uint32_t value, const uint8_t* bytes, int64_t count) {
  static constexpr std::array<uint32_t, 256> remainders = table();
  for (int64_t i = 0; i < count; i++) value = value >> 8 ^ remainders[(value ^ bytes[i]) & 255];
  return value;
}

#if defined(ANABRANCH_X86)
__attribute__((target("sse4.2"))) uint32_t by_instruction(uint32_t value, const uint8_t* bytes, int64_t count) {
  uint64_t wide = value;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + i, 8);
    wide = _mm_crc32_u64(wide, word);
  }
  value = static_cast<uint32_t>(wide);
  for (; i < count; i++) value = _mm_crc32_u8(value, bytes[i]);
  return value;
}
#endif

}  // namespace

uint32_t crc32c(const uint8_t* bytes, int64_t count) {
#if defined(ANABRANCH_X86)
  static const bool has_instruction = __builtin_cpu_supports("sse4.2");
  if (has_instruction) return ~by_instruction(~0u, bytes, count);
#endif
  return ~by_table(~0u, bytes, count);
}

}  // namespace anabranch
