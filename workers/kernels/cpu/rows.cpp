#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "pool.h"

namespace anabranch {

namespace {

// One token's keys or values of one head: the number of head dimension d lies at start + place(d).
struct KeyRow {
  uint8_t* start;
  int64_t line_stride;
  int shift, bytes, bias;  // 2^shift numbers lie side by side, of so many bytes each

  KeyRow(const Cache& cache, int64_t block, int64_t head, int64_t offset)
      : start(cache.key_group(block, head, offset / group_tokens)),
        line_stride(cache.shape.key_stride()),
        shift(static_cast<int>(interleaved(cache.shape.type) / 2)),  // 0, 1, 2 for 1, 2, 4
        bytes(static_cast<int>(element_bytes(cache.shape.type))),
        bias(128),
        token(offset % group_tokens) {}
  uint8_t* at(int64_t d) const {
    const int64_t beside = d & ((1 << shift) - 1);
    const int64_t linear = ((((d >> shift) * group_tokens + token) << shift) + beside) * bytes;
    return start + (linear >> 6) * line_stride + (linear & 63);
  }
  float* scale(const Shape& shape) const {
    return reinterpret_cast<float*>(start + shape.data_bytes() / 64 * line_stride) + token;
  }

 private:
  int64_t token;
};

struct ValueRow {
  uint8_t* start;
  int64_t stride;
  int bias;

  ValueRow(const Cache& cache, int64_t block, int64_t head, int64_t offset)
      : bias(0), group(cache.value_group(block, head, offset / group_tokens)), token(offset % group_tokens) {
    const int64_t n = interleaved(cache.shape.type), bytes = element_bytes(cache.shape.type);
    start = group + (token / n * cache.shape.padded_size() * n + token % n) * bytes;
    stride = n * bytes;
  }
  uint8_t* at(int64_t d) const { return start + d * stride; }
  float* scale(const Shape& shape) const { return reinterpret_cast<float*>(group + shape.data_bytes()) + token; }

 private:
  uint8_t* group;
  int64_t token;
};

// Symmetric, a scale for each token and head; keys are stored with 128 added.
template <class Row>
void quantise(const Shape& shape, const Row& row, const float* from) {
  float most = 0;
  for (int64_t d = 0; d < shape.head_size; d++) most = std::max(most, std::fabs(from[d]));
  const float inverse = most > 0 ? 127 / most : 0;
  for (int64_t d = 0; d < shape.head_size; d++)
    *row.at(d) = static_cast<uint8_t>(static_cast<int>(std::lrintf(from[d] * inverse)) + row.bias);
  *row.scale(shape) = most / 127;
}

// As write_row, of bfloat16, whose lines hold two numbers of each of sixteen tokens.
void write_halves(const Shape& shape, const KeyRow& row, const uint8_t* from) {
  uint8_t* to = row.at(0);
  const int64_t pairs = shape.head_size / 2;
  for (int64_t pair = 0; pair < pairs; pair++) std::memcpy(to + pair * row.line_stride, from + pair * 4, 4);
  if (shape.head_size % 2 != 0) std::memcpy(to + pairs * row.line_stride, from + pairs * 4, 2);
}
void write_halves(const Shape& shape, const ValueRow& row, const uint8_t* from) {
  uint8_t* to = row.at(0);
  for (int64_t d = 0; d < shape.head_size; d++) std::memcpy(to + d * 4, from + d * 2, 2);
}

template <class Row>
void write_row(const Shape& shape, const Row& row, const uint8_t* from) {
  if (shape.type == CacheType::bfloat16) return write_halves(shape, row, from);
  if (shape.type == CacheType::int8) return quantise(shape, row, reinterpret_cast<const float*>(from));
  for (int64_t d = 0; d < shape.head_size; d++)
    if (shape.type == CacheType::float32)
      std::memcpy(row.at(d), from + d * 4, 4);
    else
      std::memcpy(row.at(d), from + d * 2, 2);
}

template <class Row>
void read_row(const Shape& shape, const Row& row, uint8_t* to) {
  for (int64_t d = 0; d < shape.head_size; d++) {
    if (shape.type == CacheType::int8) {
      const float number = static_cast<int8_t>(*row.at(d) - row.bias) * *row.scale(shape);
      std::memcpy(to + d * 4, &number, 4);
    } else if (shape.type == CacheType::float32) {
      std::memcpy(to + d * 4, row.at(d), 4);
    } else {
      std::memcpy(to + d * 2, row.at(d), 2);
    }
  }
}

int64_t row_bytes(const Shape& shape) {
  return shape.head_size * (shape.type == CacheType::int8 ? 4 : element_bytes(shape.type));
}

// All of a group's rows of one head in bfloat16: line by line, where row by row each line is written sixteen times.
void write_group(const Shape& shape, const KeyRow& row, const uint8_t* from, int64_t stride_bytes) {
  for (int64_t pair = 0; pair < shape.head_size / 2; pair++) {
    uint8_t* line = row.at(2 * pair);
    for (int64_t token = 0; token < group_tokens; token++)
      std::memcpy(line + token * 4, from + token * stride_bytes + pair * 4, 4);
  }
}
void write_group(const Shape& shape, const ValueRow& row, const uint8_t* from, int64_t stride_bytes) {
  const int64_t size = shape.head_size, line_bytes = shape.padded_size() * 4;
  for (int64_t token = 0; token < group_tokens; token += 2) {
    uint8_t* __restrict line = row.start + token / 2 * line_bytes;
    const uint8_t *first = from + token * stride_bytes, *second = first + stride_bytes;
    for (int64_t d = 0; d < size; d++) {
      uint16_t low, high;
      std::memcpy(&low, first + d * 2, 2);
      std::memcpy(&high, second + d * 2, 2);
      const uint32_t both = low | static_cast<uint32_t>(high) << 16;
      std::memcpy(line + d * 4, &both, 4);
    }
  }
}

// Whether rows from `row` on fill a group.
bool fills_group(const Shape& shape, const int64_t* slots, int64_t row, int64_t end) {
  const int64_t offset = slots[row] % shape.block_tokens;
  if (end - row < group_tokens || offset % group_tokens != 0 || offset + group_tokens > shape.block_tokens)
    return false;
  for (int64_t token = 1; token < group_tokens; token++)
    if (slots[row + token] != slots[row] + token) return false;
  return true;
}

// Call each(key row, value row, head) of a slot.
template <class Each>
void each_head(const Cache& cache, int64_t slot, Each each) {
  const int64_t block = slot / cache.shape.block_tokens, offset = slot % cache.shape.block_tokens;
  for (int64_t head = 0; head < cache.shape.kv_heads; head++)
    each(KeyRow(cache, block, head, offset), ValueRow(cache, block, head, offset), head);
}

void write_some(const Cache& cache, const int64_t* slots, int64_t begin, int64_t end, const Rows& key,
                const Rows& value) {
  const Shape& shape = cache.shape;
  const int64_t bytes = row_bytes(shape);
  const bool has_groups = shape.type == CacheType::bfloat16 && shape.head_size % 2 == 0;
  for (int64_t row = begin; row < end;) {
    const bool is_group = has_groups && fills_group(shape, slots, row, end);
    each_head(cache, slots[row], [&](const KeyRow& keys, const ValueRow& values, int64_t head) {
      const uint8_t* key_from = key.first + row * key.stride_bytes + head * bytes;
      const uint8_t* value_from = value.first + row * value.stride_bytes + head * bytes;
      if (is_group) {
        write_group(shape, keys, key_from, key.stride_bytes);
        write_group(shape, values, value_from, value.stride_bytes);
      } else {
        write_row(shape, keys, key_from);
        write_row(shape, values, value_from);
      }
    });
    row += is_group ? group_tokens : 1;
  }
}

}  // namespace

void write_rows(const Cache& cache, const int64_t* slots, int64_t count, const Rows& key, const Rows& value,
                int threads) {
  const int64_t numbers = count * cache.shape.kv_heads * cache.shape.head_size;
  const int parts = static_cast<int>(std::clamp<int64_t>(numbers / part_numbers, 1, threads));
  Pool::get().run(parts, [&](int part) {
    write_some(cache, slots, count * part / parts, count * (part + 1) / parts, key, value);
  });
}

void read_rows(const Cache& cache, const int64_t* slots, int64_t count, void* key, void* value) {
  const int64_t bytes = row_bytes(cache.shape);
  for (int64_t row = 0; row < count; row++)
    each_head(cache, slots[row], [&](const KeyRow& keys, const ValueRow& values, int64_t head) {
      const int64_t place = (row * cache.shape.kv_heads + head) * bytes;
      read_row(cache.shape, keys, static_cast<uint8_t*>(key) + place);
      read_row(cache.shape, values, static_cast<uint8_t*>(value) + place);
    });
}

}  // namespace anabranch
