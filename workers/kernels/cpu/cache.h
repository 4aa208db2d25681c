// How one layer of a packed cache lies in memory, and the work a plan makes over it.
//
// A block's keys and values of one KV head are one record; a record is a row of groups of 16 tokens, all
// key groups, then all value groups. Within a group, with d the head size padded to 16 and n the numbers
// that one 32-bit lane holds (1 float32, 2 bfloat16, 4 int8):
//
//   keys    [d / n][16 tokens][n]    scores of 16 tokens are vertical sums, without a horizontal one;
//                                    two or four groups of a block take turns line by line of 64 bytes
//   values  [16 / n tokens][d][n]    n tokens of a size lie together and are weighed together
//   int8    then 16 float32 scales, one a token; keys are stored with 128 added (for VPDPBUSD)
//
// float16 lies as float32 does (n = 1), for its conversion takes consecutive numbers.
#pragma once
#include <cstdint>

#include "operators.h"

namespace anabranch {

constexpr int group_tokens = 16;
constexpr int chunk_groups = 4;

constexpr int64_t element_bytes(CacheType type) {
  return type == CacheType::float32 ? 4 : type == CacheType::int8 ? 1 : 2;
}

// Numbers of one token (keys) or one size (values) that lie side by side.
constexpr int64_t interleaved(CacheType type) {
  return type == CacheType::bfloat16 ? 2 : type == CacheType::int8 ? 4 : 1;
}

struct Shape {
  CacheType type;
  int64_t blocks, block_tokens, kv_heads, head_size;

  int64_t padded_size() const { return (head_size + 15) / 16 * 16; }
  int64_t block_groups() const { return (block_tokens + group_tokens - 1) / group_tokens; }
  int64_t data_bytes() const { return group_tokens * padded_size() * element_bytes(type); }
  int64_t group_bytes() const { return data_bytes() + (type == CacheType::int8 ? group_tokens * 4 : 0); }
  int64_t record_bytes() const { return 2 * block_groups() * group_bytes(); }
  // Key groups that take turns, so that a chunk is read in the order of addresses.
  int64_t turns() const { return block_groups() % 4 == 0 ? 4 : block_groups() % 2 == 0 ? 2 : 1; }
  int64_t key_stride() const { return turns() * 64; }
};

// One layer: block b of head h begins at base + b * block_stride + h * record_bytes.
struct Cache {
  Shape shape;
  uint8_t* base;
  int64_t block_stride;

  uint8_t* record(int64_t block, int64_t head) const {
    return base + block * block_stride + head * shape.record_bytes();
  }
  // The group's first line; the next is key_stride further on.
  uint8_t* key_group(int64_t block, int64_t head, int64_t group) const {
    const int64_t turns = shape.turns();
    return record(block, head) + group / turns * turns * shape.group_bytes() + group % turns * 64;
  }
  uint8_t* value_group(int64_t block, int64_t head, int64_t group) const {
    return record(block, head) + (shape.block_groups() + group) * shape.group_bytes();
  }
};

// Some query rows of one span and some KV heads over the groups first..end of the span's blocks. Its vectors
// are [heads][rows][query heads of a KV head].
struct Piece {
  const int64_t* blocks;    // the span's table
  float* partial;           // [vectors][padded size + 2], or null where the piece is all there is
  int64_t head, heads;      // KV heads
  int64_t row_start, rows;  // query rows
  int64_t row_position;     // position of the first row minus the position of slot 0
  int64_t visible_start, visible_end;
  int64_t first, end;       // groups
};

struct Attention {
  Cache cache;
  const void* query;        // [rows, query_heads, head_size]
  float* out;               // [rows, query_heads, head_size]
  float* lse;               // [rows, query_heads]
  CacheType query_type;     // never int8
  int64_t query_heads;
  int64_t window;           // 0: none
  float scale;
  bool causal;              // rows see nothing behind themselves

  int64_t heads_per_kv() const { return query_heads / cache.shape.kv_heads; }
  int64_t head_vectors(const Piece& piece) const { return piece.rows * heads_per_kv(); }
  int64_t vectors(const Piece& piece) const { return piece.heads * head_vectors(piece); }
  // Where a piece's vector lies, in vectors of the whole query.
  int64_t place(const Piece& piece, int64_t vector) const {
    const int64_t of_head = head_vectors(piece), row = vector % of_head / heads_per_kv();
    const int64_t head = (piece.head + vector / of_head) * heads_per_kv() + vector % heads_per_kv();
    return (piece.row_start + row) * query_heads + head;
  }
};

// Most query vectors of one piece, unless one row of one KV head has more.
constexpr int64_t piece_vectors = 256;

// One instruction set's code.
struct Level {
  const char* name;
  // Attend pieces in order. scratch: scratch_bytes(shape, vectors), 64-byte aligned.
  void (*attend)(const Attention&, const Piece* pieces, int64_t count, uint8_t* scratch);
  // Read every byte once, as fast as it goes.
  float (*read)(const uint8_t* bytes, int64_t count);
  Operators operators;
};

constexpr int64_t scratch_bytes(int64_t vectors, int64_t padded_size) {
  // queries, quantised or not, and sums: 4 bytes each; per vector some numbers; value groups at the edge.
  return vectors * (padded_size * 8 + 64 * 8) + chunk_groups * (group_tokens * padded_size * 4 + 128) + 65536;
}

extern const Level portable_level;
#if defined(ANABRANCH_X86)
extern const Level avx2_level, avx512_level, avx512_bf16_level;
#endif
#if defined(ANABRANCH_AMX)
extern const Level amx_level;
#endif

}  // namespace anabranch
