// Rows of keys and values into a packed cache and out of it, in the logical layout.
#pragma once
#include <cstdint>

#include "cache.h"

namespace anabranch {

// [count, kv_heads, head_size], contiguous within a row.
struct Rows {
  const uint8_t* first;
  int64_t stride_bytes;
};

// key, value: [count, kv_heads, head_size]; slots: block x block_tokens + offset, checked by the caller.
// Of the cache's type, or float32 for int8, where each token and head is quantised by its largest number.
// Slots are distinct: threads write them in no order.
void write_rows(const Cache& cache, const int64_t* slots, int64_t count, const Rows& key, const Rows& value,
                int threads);
void read_rows(const Cache& cache, const int64_t* slots, int64_t count, void* key, void* value);

}  // namespace anabranch
