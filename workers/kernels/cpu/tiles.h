// Attention in matrix tiles (AMX) over the same packed cache: a group's keys, and its values, lie as a tile's second
// factor does already, so they are loaded where they are. Included by attend.h where the level has tiles.
//
//   scores    [rows][16 tokens]  = query [rows][numbers]  x key group [numbers][16 tokens]
//   weighted  [rows][16 sizes]   = weights [rows][tokens] x value group [tokens][16 sizes]
//
// A tile's row takes 64 bytes of numbers at once, or a group of 16 numbers where no more lie in one stride. Where a
// vector's numbers are split into a high and a low part, both are rows of the same tile (row 2 v and 2 v + 1), for a
// product of eight rows takes no longer than one of four: int8 queries and weights are two bytes each, bfloat16 weights
// a number and what its rounding lost. More than eight bfloat16 vectors, those of chunks, are not memory's to hurry but
// ours: sixteen rows are sixteen vectors, weights are rounded, and sums grow in the tiles; but for small heads.

constexpr int tile_rows = 16;

constexpr bool has_tiles(CacheType type) { return type == CacheType::bfloat16 || type == CacheType::int8; }

// Tiles by number: two results, then both factors, whole and of 16 numbers. No more than four are used at a time: where
// its neighbour thread is at work too, a core has so few more that with six or eight each load waits until those that
// read the tile before are done, and takes longer than it saves.
constexpr int result_tiles = 2, whole_left = 2, whole_right = 3, short_left = 4, short_right = 5;

// The shapes of this thread's tiles, given back with the object: tiles in use make switching threads dear.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() {
    if (rows_) asm volatile("tilerelease");
  }

  // For product.h: two results and a first factor of so many rows, and a second factor, all whole.
  void shape_product(int rows) {
    if (rows == rows_) return;
    rows_ = rows;
    Config config{};
    config.palette = 1;
    for (int tile = 0; tile <= whole_left; tile++) config.set(tile, rows, 64);
    config.set(whole_right, tile_rows, 64);
    asm volatile("ldtilecfg %0" ::"m"(config));
  }

  // Results and first factors of so many rows; a hundred cycles where that changes.
  void shape(CacheType type, int rows) {
    if (rows == rows_) return;
    rows_ = rows;
    Config config{};
    config.palette = 1;
    for (int tile = 0; tile <= whole_left; tile++) config.set(tile, rows, 64);
    config.set(whole_right, 16, 64);
    const int bytes = (int)element_bytes(type);
    config.set(short_left, rows, 16 * bytes);
    config.set(short_right, 4 * bytes, 64);
    asm volatile("ldtilecfg %0" ::"m"(config));
  }

 private:
  struct alignas(64) Config {
    uint8_t palette, start_row, unused[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];

    void set(int tile, int count, int bytes) {
      rows[tile] = (uint8_t)count;
      row_bytes[tile] = (uint16_t)bytes;
    }
  };

  int rows_ = 0;
};

template <int Tile>
INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
template <int Tile>
INLINE void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Tile) : "memory");
}
template <int Tile>
INLINE void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(Tile) : "memory");
}
// Result += left x right. int8 keys are unsigned bytes, int8 values signed, and what multiplies them is the reverse.
template <CacheType Type, bool Keys, int Result, int Left, int Right>
INLINE void multiply_tiles() {
  if constexpr (Type == CacheType::bfloat16)
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Result), "i"(Left), "i"(Right));
  else if constexpr (Keys)
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Result), "i"(Left), "i"(Right));
  else
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Result), "i"(Left), "i"(Right));
}

// One group's share of scores: `Lines` lines of its keys from `line` on. A quarter of the next chunk's same lines is
// fetched beside each group, in the order of addresses.
template <CacheType Type, int Result, int Lines, bool Ahead>
INLINE void multiply_group(const State& state, const Chunk& chunk, const Chunk& next, int64_t line, int group) {
  constexpr int left = Lines == 16 ? whole_left : short_left, right = Lines == 16 ? whole_right : short_right;
  if (group < chunk.count) {
    load_tile<right>(chunk.key[group] + line * state.key_stride, state.key_stride);
    multiply_tiles<Type, true, Result, left, right>();
  }
  if (!Ahead) return;
  constexpr int quarter = Lines / chunk_groups;
  for (int ahead = 0; ahead < quarter; ahead++)
    for (int g = 0; g < chunk.count; g++)
      fetch_ahead(next.key[g] + (line + group * quarter + ahead) * state.key_stride);
}

template <CacheType Type, int Lines, bool Ahead>
INLINE void multiply_lines(const State& state, const Chunk& chunk, const Chunk& next, const uint8_t* query,
                           int64_t query_stride, int64_t line, int group) {
  load_tile<Lines == 16 ? whole_left : short_left>(query + line * 4, query_stride);
  multiply_group<Type, 0, Lines, Ahead>(state, chunk, next, line, group);
  multiply_group<Type, 1, Lines, Ahead>(state, chunk, next, line, group + 1);
}

INLINE void zero_results() {
  zero_tile<0>();
  zero_tile<1>();
}

// Into both groups' columns of state.products [rows][chunk_tokens]: sums of products, of each part of a vector.
INLINE void store_results(const State& state, int group) {
  store_tile<0>(state.products + group * 16, chunk_tokens * 4);
  store_tile<1>(state.products + group * 16 + 16, chunk_tokens * 4);
}

template <CacheType Type, int Split, bool Ahead>
INLINE void multiply_keys_in_tiles(const State& state, int64_t vector, const Chunk& chunk, const Chunk& next) {
  constexpr int short_lines = (int)element_bytes(Type) * 4;
  const uint8_t* query = (const uint8_t*)(state.query + vector * state.size);
  const int64_t query_stride = state.size * 4 / Split, lines = state.size * element_bytes(Type) / 4;
  for (int group = 0; group < chunk_groups; group += result_tiles) {
    zero_results();
    int64_t line = 0;
    for (; line + 16 <= lines; line += 16)
      multiply_lines<Type, 16, Ahead>(state, chunk, next, query, query_stride, line, group);
    for (; line < lines; line += short_lines)
      multiply_lines<Type, short_lines, Ahead>(state, chunk, next, query, query_stride, line, group);
    store_results(state, group);
  }
}

// Scores of an int8 vector from the products of its high and low bytes.
INLINE void join_scores(const State& state, int64_t vector, int m, const Chunk& chunk, float* scores) {
  const float* shift = state.shift + 2 * (vector + m);
  const float* high = state.products + 2 * m * chunk_tokens;
  for (int g = 0; g < chunk.count; g++) {
    Floats sum = to_floats(load_ints(high + chunk_tokens + g * 16)) - all(shift[1]);
    sum = multiply_add(to_floats(load_ints(high + g * 16)) - all(shift[0]), all(256), sum);
    const float* scales = (const float*)(chunk.key[g] + state.size / 4 * state.key_stride);
    store(scores + g * 16, sum * all(state.step[vector + m]) * load(scales));
  }
}

// Weights as bfloat16: where each vector is `Split` rows of a tile.
template <int Split>
INLINE __m256i* row_of_weights(const State& state, int m) {
  return (__m256i*)((uint8_t*)state.bytes + m * Split * chunk_tokens * 2);
}
INLINE __m256i narrow(Floats numbers) { return (__m256i)_mm512_cvtneps_pbh((__m512)numbers.part[0]); }
INLINE Floats widen(__m256i halves) {
  Floats numbers;
  numbers.part[0] = (FloatLanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
  return numbers;
}

// And beside them what their rounding lost.
INLINE void halve_weights(const State& state, int m, const Chunk& chunk, const float* weights) {
  __m256i* row = row_of_weights<2>(state, m);
  for (int g = 0; g < chunk.count; g++) {
    const Floats number = load(weights + g * 16);
    const __m256i high = narrow(number);
    _mm256_store_si256(row + g, high);
    _mm256_store_si256(row + chunk_groups + g, narrow(number - widen(high)));
  }
}

// Numbers of a head from which on weights may be rounded: of fewer some rows nearly cancel, and miss the bound of 4e-3.
constexpr int64_t rounding_size = 64;

// Polynomials for 2^x between -1/2 and 1/2, the factor of the highest power first: the one is right to 2e-7, with 1 for
// zero, the other to 3e-6, for weights that are rounded to bfloat16 and whose sum is not.
constexpr float exact_power[] = {1.32647272e-3f, 9.67151269e-3f, 5.55073374e-2f,
                                 2.40222421e-1f, 6.93146978e-1f, 1.0f};
constexpr float rough_power[] = {9.57010366e-3f, 5.59178659e-2f, 2.40247448e-1f, 6.93121814e-1f, 9.99999261e-1f};

// 2^x, by such a polynomial. NaN stays; of infinities the rest is NaN, but scaled by them it is nothing or infinity.
template <int Count>
INLINE Floats power_of_two(Floats x, const float (&polynomial)[Count]) {
  Floats whole;
  whole.part[0] = (FloatLanes)_mm512_roundscale_ps((__m512)x.part[0], 8);
  const Floats rest = x - whole;
  Floats sum = all(polynomial[0]);
  for (int i = 1; i < Count; i++) sum = multiply_add(sum, rest, all(polynomial[i]));
  sum.part[0] = (FloatLanes)_mm512_scalef_ps((__m512)sum.part[0], (__m512)whole.part[0]);
  return sum;
}

// As `weigh` and the rounding of its weights, for a vector that sees a whole chunk.
INLINE float weigh_whole(const State& state, int64_t vector, const float* scores, float scale, __m256i* row) {
  constexpr float log2_e = 1.44269504f;
  Floats kept[chunk_groups];
  for (int g = 0; g < chunk_groups; g++) kept[g] = load(scores + g * 16);
  const Floats most = larger(larger(kept[0], kept[1]), larger(kept[2], kept[3])) * all(scale);
  const float before = state.most[vector], after = measure(most, before);
  Floats sums = all(0);
  for (int g = 0; g < chunk_groups; g += 2) {
    Floats weights[2];
    for (int i = 0; i < 2; i++) {
      const Floats scaled = multiply_add(kept[g + i], all(scale * log2_e), all(-after * log2_e));
      weights[i] = power_of_two(scaled, rough_power);
      sums = sums + weights[i];
    }
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)weights[1].part[0], (__m512)weights[0].part[0]);
    _mm512_store_si512(row + g, (__m512i)both);
  }
  const float shrink = before == minus_infinity ? 0 : before == after ? 1 : __builtin_expf(before - after);
  state.most[vector] = after;
  store(state.total + vector * 16, multiply_add(load(state.total + vector * 16), all(shrink), sums));
  return shrink;
}

// Sixteen sizes of a value group, or of two that are adjacent.
template <CacheType Type, int Sixteen, bool Whole, bool Ahead>
INLINE void multiply_sixteen(const State& state, const Chunk& chunk, const Chunk& next, int g, int64_t sixteen,
                             int count) {
  if (Sixteen >= count) return;
  constexpr int left = Whole ? whole_left : short_left, right = Whole ? whole_right : short_right;
  load_tile<right>(chunk.value[g] + (sixteen + Sixteen) * 64, state.size * 4);
  multiply_tiles<Type, false, Sixteen, left, right>();
  constexpr int lines = (int)element_bytes(Type) * 4;
  for (int other = g; Ahead && other < g + (Whole ? 2 : 1); other++)
    for (int line = 0; line < lines; line++)
      fetch_ahead(next.value[other] + ((sixteen + Sixteen) * lines + line) * 64);
}

template <CacheType Type, bool Whole, bool Ahead>
INLINE void multiply_sixteens(const State& state, const uint8_t* weights, const Chunk& chunk, const Chunk& next, int g,
                              int64_t sixteen, int count) {
  const int64_t bytes = element_bytes(Type);
  load_tile<Whole ? whole_left : short_left>(weights + g * 16 * bytes, chunk_tokens * bytes);
  multiply_sixteen<Type, 0, Whole, Ahead>(state, chunk, next, g, sixteen, count);
  multiply_sixteen<Type, 1, Whole, Ahead>(state, chunk, next, g, sixteen, count);
}

// All groups' values of some sixteens, added to the results.
template <CacheType Type, bool Ahead>
INLINE void multiply_values(const State& state, const Chunk& chunk, const Chunk& next, int64_t sixteen, int count) {
  const uint8_t* weights = (const uint8_t*)state.bytes;
  for (int g = 0; g < chunk.count;) {
    const bool adjacent = g + 1 < chunk.count && chunk.value[g + 1] - chunk.value[g] == state.size * 32;
    if (Type == CacheType::bfloat16 && adjacent) {
      multiply_sixteens<Type, true, Ahead>(state, weights, chunk, next, g, sixteen, count);
      g += 2;
    } else {
      multiply_sixteens<Type, false, Ahead>(state, weights, chunk, next, g, sixteen, count);
      g += 1;
    }
  }
}

// Products of some sixteens into the sums, which shrink; `unit`: of the weights' last place.
template <CacheType Type>
INLINE void add_products(const State& state, int64_t vector, int64_t sixteen, int count, const float shrink,
                         const float unit, int m) {
  const float* products = state.products + m * 2 * chunk_tokens;
  float* sums = state.sums + (vector + m) * state.size + sixteen * 16;
  for (int i = 0; i < count; i++) {
    const Floats kept = load(sums + i * 16) * all(shrink);
    const float* high = products + i * 16;
    if constexpr (Type == CacheType::int8) {
      const Floats low = to_floats(load_ints(high + chunk_tokens));
      const Floats added = multiply_add(to_floats(load_ints(high)), all(256), low);
      store(sums + i * 16, multiply_add(added, all(unit), kept));
    } else {
      store(sums + i * 16, kept + (load(high) + load(high + chunk_tokens)));
    }
  }
}

template <CacheType Type, bool Ahead>
INLINE void add_values_in_tiles(const State& state, int64_t vector, int rows, const Chunk& chunk, const Chunk& next,
                                const float* shrink, const float* unit) {
  const int64_t sixteens = state.size / 16;
  for (int64_t sixteen = 0; sixteen < sixteens; sixteen += result_tiles) {
    const int count = (int)(sixteens - sixteen < result_tiles ? sixteens - sixteen : result_tiles);
    zero_results();
    multiply_values<Type, Ahead>(state, chunk, next, sixteen, count);
    store_results(state, 0);
    for (int m = 0; m < rows; m++) add_products<Type>(state, vector, sixteen, count, shrink[m], unit[m], m);
  }
}

// Some sixteens of sixteen vectors' sums, into the results and out of them.
template <int Sixteen>
INLINE void move_sums(float* sums, int64_t stride, int count, bool into) {
  if (Sixteen >= count) return;
  into ? load_tile<Sixteen>(sums + Sixteen * 16, stride) : store_tile<Sixteen>(sums + Sixteen * 16, stride);
}
INLINE void move_all_sums(float* sums, int64_t stride, int count, bool into) {
  move_sums<0>(sums, stride, count, into);
  move_sums<1>(sums, stride, count, into);
}

// Up to sixteen vectors of bfloat16 over one chunk.
template <bool Ahead>
static void attend_sixteen(const State& state, int64_t vector, int rows, const Chunk& chunk, const Chunk& next,
                           float scale) {
  multiply_keys_in_tiles<CacheType::bfloat16, 1, Ahead>(state, vector, chunk, next);
  bool is_whole = chunk.count == chunk_groups && scale > 0;
  for (int g = 0; g < chunk.count; g++) is_whole &= chunk.seen[g] == 0xffffu;
  for (int m = 0; m < rows; m++) {
    float* scores = state.products + m * chunk_tokens;
    __m256i* row = row_of_weights<1>(state, m);
    float shrink;
    if (is_whole && sees_whole(state, vector + m, chunk)) {
      shrink = weigh_whole(state, vector + m, scores, scale, row);
    } else {
      shrink = weigh(state, vector + m, chunk, scores, scale);
      for (int g = 0; g < chunk.count; g++) _mm256_store_si256(row + g, narrow(load(scores + g * 16)));
    }
    if (shrink == 1) continue;
    float* sums = state.sums + (vector + m) * state.size;
    for (int64_t i = 0; i < state.size; i += 16) store(sums + i, load(sums + i) * all(shrink));
  }
  const int64_t sixteens = state.size / 16, stride = state.size * 4;
  for (int64_t sixteen = 0; sixteen < sixteens; sixteen += result_tiles) {
    const int count = (int)(sixteens - sixteen < result_tiles ? sixteens - sixteen : result_tiles);
    float* sums = state.sums + vector * state.size + sixteen * 16;
    move_all_sums(sums, stride, count, true);
    multiply_values<CacheType::bfloat16, Ahead>(state, chunk, next, sixteen, count);
    move_all_sums(sums, stride, count, false);
  }
}

// Up to eight vectors over one chunk, each as two rows.
template <CacheType Type, bool Ahead>
static void attend_eight(const State& state, int64_t vector, int rows, const Chunk& chunk, const Chunk& next,
                         float scale) {
  multiply_keys_in_tiles<Type, 2, Ahead>(state, vector, chunk, next);
  float shrink[tile_most], unit[tile_most];
  for (int m = 0; m < rows; m++) {
    float* scores = state.products + m * 2 * chunk_tokens;
    if constexpr (Type == CacheType::int8) {
      scores = state.scores + m * chunk_tokens;
      join_scores(state, vector, m, chunk, scores);
    }
    shrink[m] = weigh(state, vector + m, chunk, scores, scale);
    if constexpr (Type == CacheType::int8)
      unit[m] = quantise_weights(state, m, chunk);
    else
      halve_weights(state, m, chunk, scores);
  }
  if constexpr (Type == CacheType::int8)
    for (int g = 0; Ahead && g < chunk.count; g++) {
      fetch_ahead(next.key[g] + state.size / 4 * state.key_stride);
      fetch_ahead(next.value[g] + group_tokens * state.size);
    }
  add_values_in_tiles<Type, Ahead>(state, vector, rows, chunk, next, shrink, unit);
}

template <CacheType Type, bool Ahead>
INLINE int64_t attend_some_in_tiles(Tiles& tiles, const State& state, int64_t vector, int64_t last, const Chunk& chunk,
                                    const Chunk& next, float scale, bool many) {
  const int64_t most = many ? tile_rows : tile_most;
  const int rows = (int)(last - vector < most ? last - vector : most);
  tiles.shape(Type, many ? rows : 2 * rows);
  if constexpr (Type == CacheType::bfloat16)
    if (many) {
      attend_sixteen<Ahead>(state, vector, rows, chunk, next, scale);
      return vector + rows;
    }
  attend_eight<Type, Ahead>(state, vector, rows, chunk, next, scale);
  return vector + rows;
}

template <CacheType Type>
static void attend_all_in_tiles(Tiles& tiles, const State& state, int64_t first, int64_t last, const Chunk& chunk,
                                const Chunk& next, float scale) {
  const bool many = Type == CacheType::bfloat16 && last - first > tile_most && state.size >= rounding_size;
  int64_t vector = attend_some_in_tiles<Type, true>(tiles, state, first, last, chunk, next, scale, many);
  while (vector < last)
    vector = attend_some_in_tiles<Type, false>(tiles, state, vector, last, chunk, next, scale, many);
}
