// CRC32C, as frames of lanes carry it.
#pragma once
#include <cstdint>

namespace anabranch {

// Of `count` bytes.
uint32_t crc32c(const uint8_t* bytes, int64_t count);

}  // namespace anabranch
