// What a decoder does to rows of activations between its matrix products. Each operator goes over a row once or
// twice, in single precision, and rounds to the activations' type wherever a chain of tensor operations would.
#pragma once
#include <cstdint>

namespace anabranch {

enum class CacheType : int { float32, float16, bfloat16, int8 };

// Rows of `heads` vectors of `size` numbers each, one vector after the other; rows `stride` numbers apart.
struct Vectors {
  void* first;
  int64_t rows, heads, size, stride;
};

// out = weight x rounded(sum / sqrt(mean(sum^2) + epsilon)) with sum = rounded(input + update), per vector.
struct Norm {
  Vectors input;       // becomes the sum where there is an update
  const void* update;  // [rows, heads, size], or null for zero
  const void* weight;  // [size]
  void* out;           // [rows, heads, size]; may be `update`
  float epsilon;
};

// Dimension i turns with i + size / 2 by its row's angle, in place.
struct Rotation {
  Vectors heads;
  const void *cos, *sin;  // [rows, size / 2]
};

// out = rounded(silu(gate)) x up.
struct Gating {
  const void* gate_up;  // [rows, 2 x size]: gate, then up
  void* out;            // [rows, size]
  int64_t rows, size;
};

// What rows attended to in parts of a cache: each part's outputs and the logarithms of their weights.
struct Parts {
  const float *out, *lse;  // [count, rows, heads, size] and [count, rows, heads]; -inf: an empty part
  int64_t count;
};

// Rows that see themselves, with their value and the score of their key, and some parts.
// merged = rounded(sum of weights x outputs).
struct OwnRows {
  Vectors query;       // [rows, query heads, size]
  Vectors key, value;  // [rows, KV heads, size]; query heads are a multiple of KV heads
  Parts parts;
  float scale;
  void* merged;  // [rows, query heads, size]
};

// The same where what rows see first, never nothing, was computed as the parts were.
struct MergedRows {
  Parts own, parts;  // own: one part
  int64_t rows, heads, size;
  void* merged;  // [rows, heads, size]
};

// Of each row the largest number, where it stands first, and the largest of all others. NaN wins.
struct BestTwo {
  const void* numbers;  // [rows, size]
  int64_t rows, size;   // size at least 2
  int64_t* place;       // [rows]
  float *best, *second;
};

// out = rounded(rows x weights^T + bias), all bfloat16, sums in single precision. Weights as product.h has them.
// Gated: the same for two halves of weights and bias, gate and up, then rounded(rounded(silu(gate)) x up).
struct Product {
  const void* rows;     // [count, inputs]; inputs are a multiple of 32
  const void* weights;  // [outputs in whole pairs of panels of sixteen, inputs], packed; gated: twice the outputs
  const void* bias;     // [outputs], gated [2 outputs], or null
  void* out;            // [count, outputs]
  int64_t count, inputs, outputs;
  bool gated;

  // Of panels: of consecutive outputs, or one of gate and one of up.
  int64_t pairs() const { return gated ? (outputs + 15) / 16 : (outputs + 31) / 32; }
};

// One instruction set's code for one type, never int8: rows first..end.
struct Operators {
  void (*norm)(CacheType, const Norm&, int64_t first, int64_t end);
  void (*rotate)(CacheType, const Rotation&, int64_t first, int64_t end);
  void (*gate)(CacheType, const Gating&, int64_t first, int64_t end);
  void (*own)(CacheType, const OwnRows&, int64_t first, int64_t end);
  void (*merge)(CacheType, const MergedRows&, int64_t first, int64_t end);
  void (*best)(CacheType, const BestTwo&, int64_t first, int64_t end);
  void (*product)(const Product&, int64_t first, int64_t end);  // pairs of panels, for all rows
};

}  // namespace anabranch
