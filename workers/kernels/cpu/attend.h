// Attention of some query vectors over a packed cache, chunk by chunk of 64 tokens, with a running maximum
// (online softmax, Milakov & Gimelshein, arXiv 1805.02867). Included by each level's file.
//
// Memory is read once and in order: while a chunk is computed, each line of the next chunk is prefetched,
// one for one, across the ends of blocks and of pieces.

// What a compute loop keeps in registers: row tiles of four vectors, and as many groups of scores or
// sixteens of sums beside each other as the level's registers hold.
constexpr int tile = 4;
constexpr int tile_most = 8;  // of matrix tiles, where the level has them: half their rows
constexpr int wide = lanes == 16 ? 4 : 1;
#if defined(__AVX512VNNI__)
constexpr bool dot_bytes = true;
#else
constexpr bool dot_bytes = false;
#endif
#if defined(__AVX512BF16__)
constexpr bool dot_pairs = true;
#else
constexpr bool dot_pairs = false;
#endif
constexpr float minus_infinity = -__builtin_inff();
constexpr int chunk_tokens = group_tokens * chunk_groups;

struct Chunk {
  int count;  // groups
  const uint8_t* key[chunk_groups];
  const uint8_t* value[chunk_groups];
  int64_t slot[chunk_groups];     // of the group's first token
  uint32_t seen[chunk_groups];    // a bit for each token some row sees
};

// The query vectors of a piece and what is known of each so far. One line of 64-byte aligned scratch each.
struct State {
  int64_t vectors, size;  // padded head size
  int64_t key_stride;     // bytes between lines of a key group
  uint32_t* query;        // [vectors][size] 32-bit words: floats, pairs of bfloat16, or bytes high and low
  float* sums;            // [vectors][size], of weighted values
  float* most;            // [vectors] about the largest score, see `measure`
  float* total;           // [vectors][16] sums of weights
  float* step;            // [vectors] int8: value of the low byte's unit
  float* shift;           // [vectors][2] int8: what 128 added to every key adds to a sum of bytes
  int64_t* oldest;        // [vectors] first slot the vector sees
  int64_t* newest;        // [vectors] one past the last
  uint8_t* edge;          // value groups with unseen tokens zeroed
  float* scores;          // [tile_most][chunk_tokens]
  uint32_t* bytes;        // [tile_most][2][chunk_tokens / 4] int8: weights, high and low; or halves for tiles
  float* products;        // [2 tile_most][chunk_tokens] what matrix tiles return, or whole numbers
};

INLINE uint8_t* take(uint8_t*& scratch, int64_t bytes) {
  uint8_t* taken = scratch;
  scratch += (bytes + 63) / 64 * 64;
  return taken;
}

INLINE State lay_out(uint8_t* scratch, int64_t vectors, const Shape& shape) {
  const int64_t size = shape.padded_size();
  State state;
  state.vectors = vectors;
  state.size = size;
  state.key_stride = shape.key_stride();
  state.query = (uint32_t*)take(scratch, vectors * size * 4);
  state.sums = (float*)take(scratch, vectors * size * 4);
  state.most = (float*)take(scratch, vectors * 4);
  state.total = (float*)take(scratch, vectors * 64);
  state.step = (float*)take(scratch, vectors * 4);
  state.shift = (float*)take(scratch, vectors * 8);
  state.oldest = (int64_t*)take(scratch, vectors * 8);
  state.newest = (int64_t*)take(scratch, vectors * 8);
  state.edge = take(scratch, chunk_groups * (group_tokens * size * 4 + 64));
  state.scores = (float*)take(scratch, tile_most * chunk_tokens * 4);
  state.bytes = (uint32_t*)take(scratch, tile_most * 8 * chunk_tokens);
  state.products = (float*)take(scratch, tile_most * 2 * chunk_tokens * 4);
  return state;
}

static float read_number(const void* from, CacheType type, int64_t index) {
  if (type == CacheType::float32) return ((const float*)from)[index];
  const uint16_t bits = ((const uint16_t*)from)[index];
  if (type == CacheType::float16) return half_to_float(bits);
  const uint32_t word = (uint32_t)bits << 16;
  float number;
  __builtin_memcpy(&number, &word, 4);
  return number;
}

// Two bytes a number, value = step x (256 high + low): high bytes of four dimensions in one word, and from the middle
// of the vector's words on low bytes.
static void quantise_query(const float* query, State& state, int64_t vector) {
  float most = 0;
  for (int64_t d = 0; d < state.size; d++) {
    const float size = __builtin_fabsf(query[d]);
    most = size > most ? size : most;
  }
  const float step = most / 32512, inverse = most > 0 ? 32512 / most : 0;
  int8_t* high = (int8_t*)(state.query + vector * state.size);
  int8_t* low = high + 2 * state.size;
  int32_t high_sum = 0, low_sum = 0;
  for (int64_t d = 0; d < state.size; d++) {
    const int32_t number = (int32_t)__builtin_rintf(query[d] * inverse);
    low[d] = (int8_t)number;
    high[d] = (int8_t)((number - low[d]) >> 8);
    high_sum += high[d];
    low_sum += low[d];
  }
  state.step[vector] = step;
  state.shift[2 * vector] = (float)(128 * high_sum);
  state.shift[2 * vector + 1] = (float)(128 * low_sum);
}

static void take_query(const Attention& work, const Piece& piece, State& state) {
  const CacheType type = work.cache.shape.type;
  const int64_t head_size = work.cache.shape.head_size;
  for (int64_t vector = 0; vector < state.vectors; vector++) {
    const int64_t row = vector % work.head_vectors(piece) / work.heads_per_kv();
    const int64_t from = work.place(piece, vector) * head_size;
    uint32_t* words = state.query + vector * state.size;
    float* numbers = state.sums + vector * state.size;  // not in use yet
    const bool as_it_lies = type == CacheType::bfloat16 && dot_pairs && work.query_type == type;
    for (int64_t d = 0; d < state.size && !as_it_lies; d++)
      numbers[d] = d < head_size ? read_number(work.query, work.query_type, from + d) : 0.0f;
    if (as_it_lies) {
      __builtin_memcpy(words, (const uint16_t*)work.query + from, head_size * 2);
      for (int64_t d = head_size; d < state.size; d++) ((uint16_t*)words)[d] = 0;
    } else if (type == CacheType::int8 && dot_bytes) {
      quantise_query(numbers, state, vector);
    } else if (type == CacheType::bfloat16 && dot_pairs) {
      uint32_t bits;
      for (int64_t d = 0; d < state.size; d += 2) {
        __builtin_memcpy(&bits, numbers + d, 4);
        const uint32_t first = bits >> 16;
        __builtin_memcpy(&bits, numbers + d + 1, 4);
        words[d / 2] = first | (bits & 0xffff0000u);
      }
    } else {
      __builtin_memcpy(words, numbers, state.size * 4);
    }
    for (int64_t d = 0; d < state.size; d++) numbers[d] = 0;
    state.most[vector] = minus_infinity;
    store(state.total + vector * 16, all(0));
    const int64_t oldest = work.window ? piece.row_position + row - work.window + 1 : 0;
    state.oldest[vector] = oldest > piece.visible_start ? oldest : piece.visible_start;
    state.newest[vector] = work.causal ? piece.row_position + row + 1 : piece.visible_end;
  }
}

static Chunk find_chunk(const Attention& work, const Piece& piece, int64_t head, int64_t first) {
  const Shape& shape = work.cache.shape;
  const int64_t per_block = shape.block_groups();
  Chunk chunk;
  chunk.count = (int)(piece.end - first < chunk_groups ? piece.end - first : chunk_groups);
  for (int index = 0; index < chunk.count; index++) {
    const int64_t place = (first + index) / per_block, group = (first + index) % per_block;
    const int64_t block = piece.blocks[place];
    const int64_t slot = place * shape.block_tokens + group * group_tokens;
    chunk.key[index] = work.cache.key_group(block, head, group);
    chunk.value[index] = work.cache.value_group(block, head, group);
    chunk.slot[index] = slot;
    const int64_t block_end = (place + 1) * shape.block_tokens;
    const int64_t end = piece.visible_end < block_end ? piece.visible_end : block_end;
    const int64_t low = piece.visible_start - slot, high = end - slot;
    uint32_t seen = high >= 16 ? 0xffffu : high > 0 ? (1u << high) - 1 : 0;
    if (low > 0) seen &= low >= 16 ? 0 : 0xffffu << low;
    chunk.seen[index] = seen & 0xffffu;
  }
  return chunk;
}

// Into the second cache level: sixteen outstanding lines of the first would hold up the loads of this chunk.
INLINE void fetch_ahead(const void* line) { __builtin_prefetch(line, 0, 2); }

INLINE Floats low_half(Ints pairs) { return as_floats(shift_left<16>(pairs)); }
INLINE Floats high_half(Ints pairs) { return as_floats(pairs & all_ints((int32_t)0xffff0000)); }

// Byte `Byte` of each lane as a signed number.
template <int Byte>
INLINE Floats byte_of(Ints lanes_of_four) {
  return to_floats(shift_right<24>(shift_left<24 - 8 * Byte>(lanes_of_four)));
}

INLINE Floats dot_two(Floats sum, Ints keys, uint32_t query) {
#if defined(__AVX512BF16__)
  sum.part[0] = (FloatLanes)_mm512_dpbf16_ps(
      (__m512)sum.part[0], (__m512bh)keys.part[0], (__m512bh)_mm512_set1_epi32((int)query));
#endif
  (void)keys;
  (void)query;
  return sum;
}
// Sum of four products of an unsigned and a signed byte in each lane.
INLINE Ints dot_four(Ints sum, Ints positive, Ints other) {
#if defined(__AVX512VNNI__)
  sum.part[0] = (IntLanes)_mm512_dpbusd_epi32((__m512i)sum.part[0], (__m512i)positive.part[0], (__m512i)other.part[0]);
#endif
  (void)positive;
  (void)other;
  return sum;
}

// Scores of `Rows` vectors from `vector` on over `Groups` groups of a chunk from `first` on, before scaling.
template <CacheType Type, int Rows, int Groups, bool Ahead>
INLINE void multiply_keys(const State& state, int64_t vector, const uint8_t* const* key,
                          const uint8_t* const* next, int first) {
  Floats sum[Rows][Groups];
  for (int m = 0; m < Rows; m++)
    for (int g = 0; g < Groups; g++) sum[m][g] = all(0);
  const uint32_t* query = state.query + vector * state.size;
  const int64_t stride = state.key_stride;
  constexpr int64_t line_sizes = 4 / element_bytes(Type);  // head dimensions of one line of 64 bytes
  for (int64_t line = 0; line < state.size / line_sizes; line++) {
    for (int g = 0; g < Groups; g++)
      if (Ahead) fetch_ahead(next[g] + line * stride);
    if constexpr (Type == CacheType::bfloat16 && dot_pairs) {
      for (int g = 0; g < Groups; g++) {
        const Ints keys = load_ints(key[g] + line * stride);
        for (int m = 0; m < Rows; m++) sum[m][g] = dot_two(sum[m][g], keys, query[m * state.size + line]);
      }
    } else {
      const float* numbers = (const float*)query + line * line_sizes;
#pragma GCC unroll 4
      for (int d = 0; d < line_sizes; d++) {
        Floats keys[Groups];
        for (int g = 0; g < Groups; g++) {
          const uint8_t* at = key[g] + line * stride;
          if constexpr (Type == CacheType::float32) keys[g] = load((const float*)at);
          if constexpr (Type == CacheType::float16) keys[g] = load_halves(at + d * 32);
          if constexpr (Type == CacheType::bfloat16)
            keys[g] = d ? high_half(load_ints(at)) : low_half(load_ints(at));
          if constexpr (Type == CacheType::int8) {
            Ints four = load_ints(at);
            EACH_PART four.part[part] ^= (int32_t)0x80808080;
            keys[g] = d == 0 ? byte_of<0>(four) : d == 1 ? byte_of<1>(four) : d == 2 ? byte_of<2>(four) : byte_of<3>(four);
          }
        }
        for (int m = 0; m < Rows; m++) {
          const Floats factor = all(numbers[m * state.size + d]);
          for (int g = 0; g < Groups; g++) sum[m][g] = multiply_add(keys[g], factor, sum[m][g]);
        }
      }
    }
  }
  for (int m = 0; m < Rows; m++)
    for (int g = 0; g < Groups; g++) {
      if constexpr (Type == CacheType::int8)
        sum[m][g] = sum[m][g] * load((const float*)(key[g] + state.size / 4 * stride));
      store(state.scores + m * chunk_tokens + (first + g) * 16, sum[m][g]);
    }
}

// The same for int8 keys with whole numbers: exact sums of bytes.
template <int Rows, int Groups, bool Ahead>
INLINE void multiply_byte_keys(const State& state, int64_t vector, const uint8_t* const* key,
                               const uint8_t* const* next, int first) {
  Ints high[Rows][Groups], low[Rows][Groups];
  for (int m = 0; m < Rows; m++)
    for (int g = 0; g < Groups; g++) high[m][g] = low[m][g] = all_ints(0);
  const uint32_t* query = state.query + vector * state.size;
  const int64_t stride = state.key_stride;
  const int64_t words = state.size / 4;
  for (int64_t line = 0; line < words; line++) {
    for (int g = 0; g < Groups; g++)
      if (Ahead) fetch_ahead(next[g] + line * stride);
    for (int g = 0; g < Groups; g++) {
      const Ints keys = load_ints(key[g] + line * stride);
      for (int m = 0; m < Rows; m++) {
        const uint32_t* of_row = query + m * state.size + line;
        high[m][g] = dot_four(high[m][g], keys, all_ints((int32_t)of_row[0]));
        low[m][g] = dot_four(low[m][g], keys, all_ints((int32_t)of_row[2 * words]));
      }
    }
  }
  for (int g = 0; g < Groups; g++) {
    const uint8_t* scales = key[g] + state.size / 4 * stride;
    if (Ahead) fetch_ahead(next[g] + state.size / 4 * stride);
    for (int m = 0; m < Rows; m++) {
      const float* shift = state.shift + 2 * (vector + m);
      Floats sum = to_floats(low[m][g]) - all(shift[1]);
      sum = multiply_add(to_floats(high[m][g]) - all(shift[0]), all(256), sum);
      sum = sum * all(state.step[vector + m]) * load((const float*)scales);
      store(state.scores + m * chunk_tokens + (first + g) * 16, sum);
    }
  }
}

template <CacheType Type, int Rows, bool Ahead>
INLINE void score(const State& state, int64_t vector, const Chunk& chunk, const Chunk& next) {
  constexpr bool bytes = Type == CacheType::int8 && dot_bytes;
  constexpr int together = bytes && wide > 2 ? 2 : wide;
  int first = 0;
  for (; first + together <= chunk.count; first += together)
    if constexpr (bytes)
      multiply_byte_keys<Rows, together, Ahead>(state, vector, chunk.key + first, next.key + first, first);
    else
      multiply_keys<Type, Rows, together, Ahead>(state, vector, chunk.key + first, next.key + first, first);
  if constexpr (together > 1) {
    for (; first < chunk.count; first++)
      if constexpr (bytes)
        multiply_byte_keys<Rows, 1, Ahead>(state, vector, chunk.key + first, next.key + first, first);
      else
        multiply_keys<Type, Rows, 1, Ahead>(state, vector, chunk.key + first, next.key + first, first);
  }
}

// Whether a vector sees every token of a chunk that any row sees.
INLINE bool sees_whole(const State& state, int64_t vector, const Chunk& chunk) {
  return state.oldest[vector] <= chunk.slot[0] && state.newest[vector] >= chunk.slot[chunk.count - 1] + 16;
}

// What a vector's weights are measured by: its largest score, or one so near that nothing overflows. Another one costs
// a jump that nobody foresees and all sums anew, and of random scores the largest of a chunk often is the largest yet.
constexpr float slack = 5;
INLINE float measure(Floats most, float before) { return exceeds(most, before + slack) ? largest(most) : before; }

// Turn the scores of one vector into weights; the factor by which its sums so far shrink.
INLINE float weigh(const State& state, int64_t vector, const Chunk& chunk, float* scores, float scale) {
  Floats most = all(minus_infinity);
  const bool is_whole = sees_whole(state, vector, chunk);
  for (int g = 0; g < chunk.count; g++) {
    Floats scaled = load(scores + g * 16) * all(scale);
    uint32_t seen = chunk.seen[g];
    if (!is_whole) {
      const int64_t hidden = state.oldest[vector] - chunk.slot[g];
      if (hidden > 0) seen &= hidden >= 16 ? 0 : 0xffffu << hidden;
      const int64_t shown = state.newest[vector] - chunk.slot[g];
      if (shown < 16) seen &= shown > 0 ? (1u << shown) - 1 : 0;
    }
    if (seen != 0xffffu) scaled = choose(seen, scaled, all(minus_infinity));
    store(scores + g * 16, scaled);
    most = larger(most, scaled);
  }
  const float before = state.most[vector], after = measure(most, before);
  if (after == minus_infinity) {
    for (int g = 0; g < chunk.count; g++) store(scores + g * 16, all(0));
    return 1;
  }
  Floats sums = all(0);
  for (int g = 0; g < chunk.count; g++) {
    const Floats weights = exponential(load(scores + g * 16) - all(after));
    store(scores + g * 16, weights);
    sums = sums + weights;
  }
  const float shrink = before == minus_infinity ? 0 : before == after ? 1 : __builtin_expf(before - after);
  state.most[vector] = after;
  store(state.total + vector * 16, multiply_add(load(state.total + vector * 16), all(shrink), sums));
  return shrink;
}

// Add a chunk's weighted values to `Sixteens` x 16 sums of `Rows` vectors.
template <CacheType Type, int Rows, int Sixteens, bool Ahead>
INLINE void add_values(const State& state, int64_t vector, const Chunk& chunk, const Chunk& next,
                       int64_t sixteen, const float* shrink) {
  Floats sum[Rows][Sixteens];
  for (int m = 0; m < Rows; m++)
    for (int j = 0; j < Sixteens; j++)
      sum[m][j] = load(state.sums + (vector + m) * state.size + (sixteen + j) * 16) * all(shrink[m]);
  constexpr int tokens = (int)interleaved(Type);  // of one line, or of half a line of float16
  constexpr int bytes = Type == CacheType::float16 ? 32 : 64;
  for (int g = 0; g < chunk.count; g++) {
    const uint8_t* value = chunk.value[g] + sixteen * bytes;
    const uint8_t* later = next.value[g] + sixteen * bytes;
    for (int t = 0; t < group_tokens; t += tokens) {
      const float* weights = state.scores + g * 16 + t;
      for (int j = 0; j < Sixteens; j++) {
        if (Ahead && (bytes == 64 || j % 2 == 0)) fetch_ahead(later + j * bytes);
        const uint8_t* at = value + j * bytes;
        Floats values[tokens];
        if constexpr (Type == CacheType::float32) values[0] = load((const float*)at);
        if constexpr (Type == CacheType::float16) values[0] = load_halves(at);
        if constexpr (Type == CacheType::bfloat16) {
          const Ints pairs = load_ints(at);
          values[0] = low_half(pairs);
          values[1] = high_half(pairs);
        }
        if constexpr (Type == CacheType::int8) {
          const Ints four = load_ints(at);
          values[0] = byte_of<0>(four);
          values[1] = byte_of<1>(four);
          values[2] = byte_of<2>(four);
          values[3] = byte_of<3>(four);
        }
        for (int m = 0; m < Rows; m++)
          for (int n = 0; n < tokens; n++)
            sum[m][j] = multiply_add(values[n], all(weights[m * chunk_tokens + n]), sum[m][j]);
      }
      value += state.size / 16 * bytes;
      later += state.size / 16 * bytes;
    }
  }
  for (int m = 0; m < Rows; m++)
    for (int j = 0; j < Sixteens; j++)
      store(state.sums + (vector + m) * state.size + (sixteen + j) * 16, sum[m][j]);
}

// The same for int8 values with whole numbers: weights are two bytes each, `unit` their last place.
template <int Rows, int Sixteens, bool Ahead>
INLINE void add_byte_values(const State& state, int64_t vector, const Chunk& chunk, const Chunk& next,
                            int64_t sixteen, const float* shrink, const float* unit) {
  Ints high[Rows][Sixteens], low[Rows][Sixteens];
  for (int m = 0; m < Rows; m++)
    for (int j = 0; j < Sixteens; j++) high[m][j] = low[m][j] = all_ints(0);
  for (int g = 0; g < chunk.count; g++) {
    const uint8_t* value = chunk.value[g] + sixteen * 64;
    const uint8_t* later = next.value[g] + sixteen * 64;
    for (int four = 0; four < 4; four++) {
      for (int j = 0; j < Sixteens; j++) {
        if (Ahead) fetch_ahead(later + j * 64);
        const Ints values = load_ints(value + j * 64);
        for (int m = 0; m < Rows; m++) {
          const uint32_t* weights = state.bytes + m * 2 * (chunk_tokens / 4) + g * 4 + four;
          high[m][j] = dot_four(high[m][j], all_ints((int32_t)weights[0]), values);
          low[m][j] = dot_four(low[m][j], all_ints((int32_t)weights[chunk_tokens / 4]), values);
        }
      }
      value += state.size * 4;
      later += state.size * 4;
    }
  }
  for (int m = 0; m < Rows; m++)
    for (int j = 0; j < Sixteens; j++) {
      float* sums = state.sums + (vector + m) * state.size + (sixteen + j) * 16;
      const Floats added = multiply_add(to_floats(high[m][j]), all(256), to_floats(low[m][j]));
      store(sums, multiply_add(added, all(unit[m]), load(sums) * all(shrink[m])));
    }
}

// Multiply a vector's weights by the scales of the int8 values and make bytes of them; the unit.
static float quantise_weights(const State& state, int row, const Chunk& chunk) {
  float* weights = state.scores + row * chunk_tokens;
  Floats most = all(0);
  for (int g = 0; g < chunk.count; g++) {
    const Floats scaled =
        load(weights + g * 16) * load((const float*)(chunk.value[g] + group_tokens * state.size));
    store(weights + g * 16, scaled);
    most = larger(most, scaled);
  }
  const float largest_weight = largest(most);
  const float inverse = largest_weight > 0 ? 65535 / largest_weight : 0;
  uint8_t* high = (uint8_t*)(state.bytes + row * 2 * (chunk_tokens / 4));
#if defined(__AVX512VNNI__)
  for (int g = 0; g < chunk.count; g++) {
    const Floats scaled = load(weights + g * 16) * all(inverse);
    const __m512i number = _mm512_min_epi32(_mm512_cvtps_epi32((__m512)scaled.part[0]), _mm512_set1_epi32(65535));
    _mm_storeu_si128((__m128i*)(high + g * 16), _mm512_cvtepi32_epi8(_mm512_srli_epi32(number, 8)));
    _mm_storeu_si128((__m128i*)(high + chunk_tokens + g * 16), _mm512_cvtepi32_epi8(number));
  }
#endif
  (void)high;
  (void)inverse;
  return largest_weight / 65535;
}

template <CacheType Type, int Rows, int Sixteens, bool Ahead>
INLINE void add_some(const State& state, int64_t vector, const Chunk& chunk, const Chunk& next,
                     int64_t& sixteen, const float* shrink, const float* unit) {
  for (; sixteen + Sixteens <= state.size / 16; sixteen += Sixteens)
    if constexpr (Type == CacheType::int8 && dot_bytes)
      add_byte_values<Rows, Sixteens, Ahead>(state, vector, chunk, next, sixteen, shrink, unit);
    else
      add_values<Type, Rows, Sixteens, Ahead>(state, vector, chunk, next, sixteen, shrink);
}

// One tile of vectors over one chunk.
template <CacheType Type, int Rows, bool Ahead>
static void attend_tile(const State& state, int64_t vector, const Chunk& chunk, const Chunk& next, float scale) {
  score<Type, Rows, Ahead>(state, vector, chunk, next);
  float shrink[Rows], unit[Rows];
  for (int m = 0; m < Rows; m++) {
    shrink[m] = weigh(state, vector + m, chunk, state.scores + m * chunk_tokens, scale);
    unit[m] = 1;
    if constexpr (Type == CacheType::int8) {
      if (dot_bytes) {
        unit[m] = quantise_weights(state, m, chunk);
      } else {
        for (int g = 0; g < chunk.count; g++) {
          float* weights = state.scores + m * chunk_tokens + g * 16;
          store(weights, load(weights) * load((const float*)(chunk.value[g] + group_tokens * state.size)));
        }
      }
      for (int g = 0; Ahead && g < chunk.count; g++) fetch_ahead(next.value[g] + group_tokens * state.size);
    }
  }
  constexpr int together = Type == CacheType::int8 && dot_bytes ? 2 : wide;
  int64_t sixteen = 0;
  add_some<Type, Rows, together, Ahead>(state, vector, chunk, next, sixteen, shrink, unit);
  if constexpr (together > 2) add_some<Type, Rows, 2, Ahead>(state, vector, chunk, next, sixteen, shrink, unit);
  if constexpr (together > 1) add_some<Type, Rows, 1, Ahead>(state, vector, chunk, next, sixteen, shrink, unit);
}

// Unseen tokens may hold anything, NaN too, and zero times NaN is NaN: give the edges clean copies.
template <CacheType Type>
static void clean_edges(const State& state, Chunk& chunk) {
  constexpr int tokens = (int)interleaved(Type);
  const int64_t row_bytes = state.size * tokens * element_bytes(Type);
  for (int g = 0; g < chunk.count; g++) {
    if (chunk.seen[g] == 0xffffu) continue;
    uint8_t* copy = state.edge + g * (group_tokens * state.size * 4 + 64);
    for (int t = 0; t < group_tokens; t += tokens) {
      const uint32_t seen = chunk.seen[g] >> t;
      uint32_t mask = 0;
      for (int n = 0; n < tokens; n++)
        if (seen >> n & 1) mask |= tokens == 1 ? 0xffffffffu : tokens == 2 ? 0xffffu << 16 * n : 0xffu << 8 * n;
      const uint8_t* from = chunk.value[g] + t / tokens * row_bytes;
      uint32_t* to = (uint32_t*)(copy + t / tokens * row_bytes);
      for (int64_t word = 0; word < row_bytes / 4; word++) {
        uint32_t kept;
        __builtin_memcpy(&kept, from + word * 4, 4);
        to[word] = kept & mask;
      }
    }
    if (Type == CacheType::int8)
      for (int t = 0; t < group_tokens; t++) {
        float* scales = (float*)(copy + group_tokens * state.size);
        scales[t] = chunk.seen[g] >> t & 1 ? ((const float*)(chunk.value[g] + group_tokens * state.size))[t] : 0;
      }
    chunk.value[g] = copy;
  }
}

// Up to a tile of the vectors from `vector` to `end`.
template <CacheType Type, bool Ahead>
static void attend_some(const State& state, int64_t vector, int64_t end, const Chunk& chunk, const Chunk& next,
                        float scale) {
  switch (end - vector) {
    case 3: return attend_tile<Type, 3, Ahead>(state, vector, chunk, next, scale);
    case 2: return attend_tile<Type, 2, Ahead>(state, vector, chunk, next, scale);
    case 1: return attend_tile<Type, 1, Ahead>(state, vector, chunk, next, scale);
    default: return attend_tile<Type, tile, Ahead>(state, vector, chunk, next, scale);
  }
}

static void write_out(const Attention& work, const Piece& piece, const State& state) {
  const int64_t head_size = work.cache.shape.head_size;
  for (int64_t vector = 0; vector < state.vectors; vector++) {
    const float* sums = state.sums + vector * state.size;
    const float total = sum(load(state.total + vector * 16));
    if (piece.partial) {
      float* kept = piece.partial + vector * (state.size + 2);
      kept[0] = state.most[vector];
      kept[1] = total;
      __builtin_memcpy(kept + 2, sums, state.size * 4);
      continue;
    }
    const int64_t place = work.place(piece, vector);
    const float inverse = total == 0 ? 0 : 1 / total;  // nothing where nothing is seen
    for (int64_t d = 0; d < head_size; d++) work.out[place * head_size + d] = sums[d] * inverse;
    work.lse[place] = state.most[vector] + __builtin_logf(total);
  }
}

#if defined(__AMX_TILE__)
#include "tiles.h"
#else
constexpr bool has_tiles(CacheType) { return false; }
struct Tiles {};
#endif

// One head's vectors over one chunk.
template <CacheType Type>
static void attend_chunk(Tiles& tiles, const State& state, int64_t first, int64_t last, const Chunk& chunk,
                         const Chunk& next, float scale) {
#if defined(__AMX_TILE__)
  if constexpr (has_tiles(Type)) {
    if (last - first > tile) {
      attend_all_in_tiles<Type>(tiles, state, first, last, chunk, next, scale);
      return;
    }
  }
#endif
  (void)tiles;
  attend_some<Type, true>(state, first, last, chunk, next, scale);
  for (int64_t vector = first + tile; vector < last; vector += tile)
    attend_some<Type, false>(state, vector, last, chunk, next, scale);
}

// Which chunk of which head comes: all heads of a chunk before the next chunk, for they lie side by side.
struct Cursor {
  const Piece* piece;
  int64_t head, first;

  void advance() {
    if (++head < piece->heads) return;
    head = 0;
    first += chunk_groups;
    if (first < piece->end) return;
    piece++;
    first = -1;
  }
};

template <CacheType Type>
static void attend_pieces(const Attention& work, const Piece* pieces, int64_t count, uint8_t* scratch) {
  if (count == 0) return;
  const Piece* const end = pieces + count;
  Cursor cursor{pieces, 0, pieces->first};
  Chunk next = find_chunk(work, *pieces, pieces->head, pieces->first);
  State state;
  Tiles tiles;
  while (cursor.piece != end) {
    const Piece& piece = *cursor.piece;
    if (cursor.head == 0 && cursor.first == piece.first) {
      state = lay_out(scratch, work.vectors(piece), work.cache.shape);
      take_query(work, piece, state);
    }
    Chunk chunk = next;
    const int64_t of_head = work.head_vectors(piece);
    const int64_t first = cursor.head * of_head, last = first + of_head;
    cursor.advance();
    if (cursor.piece != end && cursor.first < 0) cursor.first = cursor.piece->first;
    if (cursor.piece != end) next = find_chunk(work, *cursor.piece, cursor.piece->head + cursor.head, cursor.first);
    for (int g = next.count; g < chunk.count; g++) {  // nothing further: what is there already
      next.key[g] = chunk.key[g];
      next.value[g] = chunk.value[g];
    }
    clean_edges<Type>(state, chunk);
    attend_chunk<Type>(tiles, state, first, last, chunk, next, work.scale);
    if (cursor.piece != &piece) write_out(work, piece, state);
  }
}

static void attend(const Attention& work, const Piece* pieces, int64_t count, uint8_t* scratch) {
  switch (work.cache.shape.type) {
    case CacheType::float32: return attend_pieces<CacheType::float32>(work, pieces, count, scratch);
    case CacheType::float16: return attend_pieces<CacheType::float16>(work, pieces, count, scratch);
    case CacheType::bfloat16: return attend_pieces<CacheType::bfloat16>(work, pieces, count, scratch);
    case CacheType::int8: return attend_pieces<CacheType::int8>(work, pieces, count, scratch);
  }
}

// The bandwidth probe: four lines at a time, prefetched 4 KiB ahead.
static float read(const uint8_t* bytes, int64_t count) {
  Floats sums[4] = {all(0), all(0), all(0), all(0)};
  for (int64_t at = 0; at + 256 <= count; at += 256)
    for (int line = 0; line < 4; line++) {
      fetch_ahead(bytes + at + line * 64 + 4096);
      sums[line] = sums[line] + as_floats(load_ints(bytes + at + line * 64) & all_ints(0x3fffffff));
    }
  return sum(sums[0] + sums[1] + sums[2] + sums[3]);
}
