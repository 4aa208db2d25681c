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

// One instruction set's code for one type, never int8: rows first..end.
struct Operators {
  void (*norm)(CacheType, const Norm&, int64_t first, int64_t end);
  void (*rotate)(CacheType, const Rotation&, int64_t first, int64_t end);
  void (*gate)(CacheType, const Gating&, int64_t first, int64_t end);
};

}  // namespace anabranch
