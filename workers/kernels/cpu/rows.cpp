#include "rows.h"

#include <algorithm>
#include <cmath>

namespace anabranch {

namespace {


// Where number d of a token lies: start + d / inner * outer_stride + d % inner, in elements.
struct Stride {
  int64_t start, inner, outer;
};

Stride key_stride(const Shape& shape, int64_t token) {
  const int64_t n = interleaved(shape.type);
  return {token * n, n, group_tokens * n};
}

Stride value_stride(const Shape& shape, int64_t token) {
  const int64_t n = interleaved(shape.type);
  return {token / n * shape.padded_size() * n + token % n, 1, n};
}

template <class Number>
void scatter(uint8_t* group, const Stride& stride, const Number* from, int64_t count) {
  Number* to = reinterpret_cast<Number*>(group) + stride.start;
  for (int64_t d = 0; d < count; d += stride.inner)
    for (int64_t n = 0; n < stride.inner && d + n < count; n++) to[d / stride.inner * stride.outer + n] = from[d + n];
}

template <class Number>
void gather(const uint8_t* group, const Stride& stride, Number* to, int64_t count) {
  const Number* from = reinterpret_cast<const Number*>(group) + stride.start;
  for (int64_t d = 0; d < count; d += stride.inner)
    for (int64_t n = 0; n < stride.inner && d + n < count; n++) to[d + n] = from[d / stride.inner * stride.outer + n];
}

// Symmetric, a scale for each token and head; keys are stored with 128 added.
void quantise(const Shape& shape, uint8_t* group, const Stride& stride, const float* from, int64_t token, int bias) {
  float most = 0;
  for (int64_t d = 0; d < shape.head_size; d++) most = std::max(most, std::fabs(from[d]));
  const float inverse = most > 0 ? 127 / most : 0;
  for (int64_t d = 0; d < shape.head_size; d++) {
    const int number = static_cast<int>(std::lrintf(from[d] * inverse));
    group[stride.start + d / stride.inner * stride.outer + d % stride.inner] = static_cast<uint8_t>(number + bias);
  }
  reinterpret_cast<float*>(group + shape.data_bytes())[token] = most / 127;
}

void restore(const Shape& shape, const uint8_t* group, const Stride& stride, float* to, int64_t token, int bias) {
  const float scale = reinterpret_cast<const float*>(group + shape.data_bytes())[token];
  for (int64_t d = 0; d < shape.head_size; d++) {
    const uint8_t byte = group[stride.start + d / stride.inner * stride.outer + d % stride.inner];
    to[d] = static_cast<float>(static_cast<int8_t>(byte - bias)) * scale;
  }
}

void write_row(const Shape& shape, uint8_t* group, const Stride& stride, const void* from, int64_t token, int bias) {
  switch (shape.type) {
    case CacheType::float32: return scatter(group, stride, static_cast<const uint32_t*>(from), shape.head_size);
    case CacheType::int8: return quantise(shape, group, stride, static_cast<const float*>(from), token, bias);
    default: return scatter(group, stride, static_cast<const uint16_t*>(from), shape.head_size);
  }
}

void read_row(const Shape& shape, const uint8_t* group, const Stride& stride, void* to, int64_t token, int bias) {
  switch (shape.type) {
    case CacheType::float32: return gather(group, stride, static_cast<uint32_t*>(to), shape.head_size);
    case CacheType::int8: return restore(shape, group, stride, static_cast<float*>(to), token, bias);
    default: return gather(group, stride, static_cast<uint16_t*>(to), shape.head_size);
  }
}

// Call each(key group, value group, token within the group, byte offset of the row in the logical layout).
template <class Each>
void each_row(const Cache& cache, const int64_t* slots, int64_t count, Each each) {
  const Shape& shape = cache.shape;
  const int64_t row_bytes = shape.head_size * (shape.type == CacheType::int8 ? 4 : element_bytes(shape.type));
  for (int64_t row = 0; row < count; row++) {
    const int64_t block = slots[row] / shape.block_tokens, offset = slots[row] % shape.block_tokens;
    const int64_t group = offset / group_tokens;
    for (int64_t head = 0; head < shape.kv_heads; head++)
      each(cache.key_group(block, head, group), cache.value_group(block, head, group), offset % group_tokens,
           (row * shape.kv_heads + head) * row_bytes);
  }
}

}  // namespace

void write_rows(const Cache& cache, const int64_t* slots, int64_t count, const void* key, const void* value) {
  const Shape& shape = cache.shape;
  each_row(cache, slots, count, [&](uint8_t* keys, uint8_t* values, int64_t token, int64_t offset) {
    write_row(shape, keys, key_stride(shape, token), static_cast<const uint8_t*>(key) + offset, token, 128);
    write_row(shape, values, value_stride(shape, token), static_cast<const uint8_t*>(value) + offset, token, 0);
  });
}

void read_rows(const Cache& cache, const int64_t* slots, int64_t count, void* key, void* value) {
  const Shape& shape = cache.shape;
  each_row(cache, slots, count, [&](uint8_t* keys, uint8_t* values, int64_t token, int64_t offset) {
    read_row(shape, keys, key_stride(shape, token), static_cast<uint8_t*>(key) + offset, token, 128);
    read_row(shape, values, value_stride(shape, token), static_cast<uint8_t*>(value) + offset, token, 0);
  });
}

}  // namespace anabranch
