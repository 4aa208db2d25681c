// Products of rows of activations with packed weights: bfloat16 in and out, sums in single precision. Included by each
// level's file.
//
// Weights lie in panels of sixteen outputs; a panel's line holds two consecutive inputs of all of them, and sixteen
// lines are a matrix tile's second factor as they lie. Of a gated product a pair of panels is one of the gate and one
// of what it lets through. A step of few rows reads each weight once, in the order of addresses; of many rows, blocks
// of them stay in the cache while the panels pass by.

constexpr int64_t panel_outputs = 16, line_bytes = 64;
constexpr int64_t block_inputs = 32, block_lines = 16, block_bytes = 1024;

INLINE void finish_row(const Product& work, int64_t row, int64_t panel, const float* sums) {
  const int64_t output = panel * panel_outputs, left = work.outputs - output;
  if (left <= 0) return;  // the second panel of a pair may hold nothing
  Floats numbers = load(sums);
  if (work.bias != nullptr) numbers = numbers + read_left<Bfloat16>((const uint16_t*)work.bias + output, left);
  write_left<Bfloat16>((uint16_t*)work.out + row * work.outputs + output, numbers, left);
}

#if defined(__AMX_BF16__)

// The next panels' weights are fetched so far ahead: some microseconds of memory.
constexpr int64_t ahead_bytes = 6 * block_bytes;

// silu(x) x up, rounded between: with `silu` and rounding by integers a gated product takes a twentieth longer.
INLINE __m256i gated(Floats x, Floats up) {
  constexpr float log2_e = 1.44269504f;
  const Floats divisor = power_of_two(x * all(-log2_e), exact_power) + all(1.0f);
  x.part[0] /= divisor.part[0];
  return narrow(widen(narrow(x)) * up);
}

// Rows of sums of both panels of a pair, [count][32]. Numbers below the smallest normal become zero, here and below.
static void finish_gated(const Product& work, int64_t row, int64_t count, int64_t pair, const float* sums) {
  const int64_t output = pair * panel_outputs, left = work.outputs - output;
  const __mmask16 kept = left < panel_outputs ? (__mmask16)((1u << left) - 1) : (__mmask16)0xffff;
  Floats bias[2] = {all(0), all(0)};
  for (int side = 0; side < 2 && work.bias != nullptr; side++)
    bias[side] = read_left<Bfloat16>((const uint16_t*)work.bias + side * work.outputs + output, left);
  uint16_t* out = (uint16_t*)work.out + row * work.outputs + output;
  for (int64_t i = 0; i < count; i++, sums += 2 * panel_outputs, out += work.outputs) {
    const Floats gate = load(sums) + bias[0], up = load(sums + panel_outputs) + bias[1];
    _mm256_mask_storeu_epi16(out, kept, gated(widen(narrow(gate)), widen(narrow(up))));
  }
}

// Both panels of some rows, sums [count][32].
static void finish_rows(const Product& work, int64_t row, int64_t count, int64_t panel, const float* sums) {
  if (work.gated) return finish_gated(work, row, count, panel / 2, sums);
  const int64_t output = panel * panel_outputs;
  if (work.outputs - output < 2 * panel_outputs) {
    for (int64_t i = 0; i < count; i++, sums += 2 * panel_outputs) {
      finish_row(work, row + i, panel, sums);
      finish_row(work, row + i, panel + 1, sums + panel_outputs);
    }
    return;
  }
  Floats bias[2] = {all(0), all(0)};
  for (int side = 0; side < 2 && work.bias != nullptr; side++)
    bias[side] = Bfloat16::read((const uint16_t*)work.bias + output + side * panel_outputs);
  uint16_t* out = (uint16_t*)work.out + row * work.outputs + output;
  for (int64_t i = 0; i < count; i++, sums += 2 * panel_outputs, out += work.outputs) {
    const Floats left = load(sums) + bias[0], right = load(sums + panel_outputs) + bias[1];
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)right.part[0], (__m512)left.part[0]);
    __builtin_memcpy(out, &both, sizeof both);
  }
}

// Blocks of two panels that are multiplied with some tiles of rows one after the other.
struct Slice {
  int64_t panel, first, end;

  int64_t blocks() const { return end - first; }
  const uint8_t* weights(const Product& work) const {
    return (const uint8_t*)work.weights + panel * work.inputs * 32 + first * block_bytes;
  }
};

// Sixteen rows at most with a slice; sums [count][32] are begun, or those of the slice before. Beside each block some
// lines of both panels of the next slice are fetched, as many as are this tile's of `tiles`; a single tile fetches what
// is near, for nothing else hides memory.
template <bool Single>
static void multiply_slice(const Product& work, int64_t row, const Slice& slice, const Slice& next, int64_t tile,
                           int64_t tiles, float* sums) {
  const int64_t row_bytes = work.inputs * 2, panel_bytes = work.inputs * 32;
  const int64_t sums_bytes = 2 * panel_outputs * sizeof *sums, shared = (block_lines + tiles - 1) / tiles;
  const int64_t lines = tile * shared < block_lines ? shared : 0;
  const uint8_t* rows = (const uint8_t*)work.rows + row * row_bytes + slice.first * line_bytes;
  const uint8_t *left = slice.weights(work), *right = left + panel_bytes;
  const uint8_t* far = next.weights(work) + tile * lines * slice.blocks() * line_bytes;
  if (slice.first == 0) {
    zero_tile<0>();
    zero_tile<1>();
  } else {
    load_tile<0>(sums, sums_bytes);
    load_tile<1>(sums + panel_outputs, sums_bytes);
  }
  for (int64_t block = 0; block < slice.blocks(); block++) {
    const int64_t place = block * block_bytes;
    if constexpr (Single) {
      for (int64_t line = 0; line < block_bytes; line += line_bytes) {
        fetch_ahead(left + place + ahead_bytes + line);
        fetch_ahead(right + place + ahead_bytes + line);
      }
    } else {
      for (int64_t line = 0; line < lines; line++, far += line_bytes) {
        fetch_ahead(far);
        fetch_ahead(far + panel_bytes);
      }
    }
    load_tile<whole_left>(rows + block * line_bytes, row_bytes);
    load_tile<whole_right>(left + place, line_bytes);
    multiply_tiles<CacheType::bfloat16, true, 0, whole_left, whole_right>();
    load_tile<whole_right>(right + place, line_bytes);
    multiply_tiles<CacheType::bfloat16, true, 1, whole_left, whole_right>();
  }
  store_tile<0>(sums, sums_bytes);
  store_tile<1>(sums + panel_outputs, sums_bytes);
}

// Rows that a cache of the second level holds beside the weights, and whose results lie in few pages; and blocks of two
// panels that the first level holds beside a tile of rows.
constexpr int64_t rows_bytes = 1024 * 1024, rows_most = 512, blocks_most = 12;

// Rows begin..end with some pairs of panels.
static void multiply_rows(const Product& work, Tiles& tiles, int64_t begin, int64_t end, int64_t first, int64_t last) {
  alignas(64) float sums[rows_most][2 * panel_outputs];
  const int64_t blocks = work.inputs / block_inputs, row_tiles = (end - begin + tile_rows - 1) / tile_rows;
  const int64_t slices = row_tiles > 1 ? (blocks + blocks_most - 1) / blocks_most : 1;
  const auto slice_at = [&](int64_t number) {
    const int64_t part = number % slices;
    return Slice{2 * (number / slices), blocks * part / slices, blocks * (part + 1) / slices};
  };
  for (int64_t number = slices * first; number < slices * last; number++) {
    const Slice slice = slice_at(number), next = slice_at(number + 1);
    for (int64_t tile = 0; tile < row_tiles; tile++) {
      const int64_t row = begin + tile * tile_rows, count = end - row < tile_rows ? end - row : tile_rows;
      tiles.shape_product((int)count);
      row_tiles == 1 ? multiply_slice<true>(work, row, slice, next, tile, row_tiles, sums[row - begin])
                     : multiply_slice<false>(work, row, slice, next, tile, row_tiles, sums[row - begin]);
      if (slice.end == blocks) finish_rows(work, row, count, slice.panel, sums[row - begin]);
    }
  }
}

static void product(const Product& work, int64_t first, int64_t end) {
  Tiles tiles;
  int64_t rows = rows_bytes / (2 * work.inputs) / (2 * tile_rows) * 2 * tile_rows;
  rows = rows < 2 * tile_rows ? 2 * tile_rows : rows > rows_most ? rows_most : rows;
  for (int64_t row = 0; row < work.count; row += rows)
    multiply_rows(work, tiles, row, row + rows < work.count ? row + rows : work.count, first, end);
}

#else

// Rows of sums of both panels of a pair, [count][32].
static void finish_gated(const Product& work, int64_t row, int64_t count, int64_t pair, const float* sums) {
  const int64_t output = pair * panel_outputs, left = work.outputs - output;
  Floats bias[2] = {all(0), all(0)};
  for (int side = 0; side < 2 && work.bias != nullptr; side++)
    bias[side] = read_left<Bfloat16>((const uint16_t*)work.bias + side * work.outputs + output, left);
  uint16_t* out = (uint16_t*)work.out + row * work.outputs + output;
  for (int64_t i = 0; i < count; i++, sums += 2 * panel_outputs, out += work.outputs) {
    const Floats gate = Bfloat16::rounded(load(sums) + bias[0]);
    const Floats up = Bfloat16::rounded(load(sums + panel_outputs) + bias[1]);
    write_left<Bfloat16>(out, Bfloat16::rounded(silu(gate)) * up, left);
  }
}

constexpr int64_t lines_ahead = 48;

// Registers hold the sums of so many rows with so many panels beside the weights. Each sum waits for its last addition,
// some cycles long, so that what counts is how many there are; and where a line meets more rows, less is loaded.
constexpr int64_t rows_together = lanes == 16 ? 12 : 8;

// `Rows` rows with some panels from `panel` on, into sums [Rows][32].
template <int Rows, int panels_together>
INLINE void multiply_panels(const Product& work, int64_t row, int64_t panel, float* to) {
  const int64_t lines = work.inputs / 2;
  const uint32_t* rows = (const uint32_t*)work.rows + row * lines;
  const uint8_t* weights = (const uint8_t*)work.weights + panel * lines * line_bytes;
  Floats sums[Rows][panels_together];
  for (int m = 0; m < Rows; m++)
    for (int side = 0; side < panels_together; side++) sums[m][side] = all(0);
  for (int64_t line = 0; line < lines; line++) {
    // Behind a panel's last line come the first ones of that which is read next in its place.
    const int64_t ahead = line + lines_ahead < lines ? lines_ahead : lines_ahead + (panels_together - 1) * lines;
    Ints pairs[panels_together];
    for (int side = 0; side < panels_together; side++) {
      const uint8_t* place = weights + (side * lines + line) * line_bytes;
      if (row == 0) fetch_ahead(place + ahead * line_bytes);
      pairs[side] = load_ints(place);
    }
    for (int m = 0; m < Rows; m++) {
      const uint32_t two = rows[m * lines + line];
      for (int side = 0; side < panels_together; side++) {
        Floats& sum = sums[m][side];
        if constexpr (dot_pairs) {
          sum = dot_two(sum, pairs[side], two);
        } else {
          const Ints both = all_ints((int32_t)two);
          sum = multiply_add(low_half(pairs[side]), low_half(both), sum);
          sum = multiply_add(high_half(pairs[side]), high_half(both), sum);
        }
      }
    }
  }
  for (int m = 0; m < Rows; m++)
    for (int side = 0; side < panels_together; side++)
      store(to + (2 * m + side) * panel_outputs, sums[m][side]);
}

// `count` rows, `Rows` at most, with a pair of panels.
template <int Rows>
static void multiply_pair(const Product& work, int64_t row, int64_t count, int64_t pair) {
  if constexpr (Rows > 1) {
    if (count < Rows) return multiply_pair<Rows - 1>(work, row, count, pair);
  }
  constexpr int panels_together = lanes == 16 && Rows > 2 ? 2 : 1;
  float sums[Rows][2 * panel_outputs];
  for (int side = 0; side < 2; side += panels_together)
    multiply_panels<Rows, panels_together>(work, row, 2 * pair + side, sums[0] + side * panel_outputs);
  if (work.gated) return finish_gated(work, row, Rows, pair, sums[0]);
  for (int m = 0; m < Rows; m++) {
    finish_row(work, row + m, 2 * pair, sums[m]);
    finish_row(work, row + m, 2 * pair + 1, sums[m] + panel_outputs);
  }
}

// Rows are shared out evenly, so that none are left that are too few to keep the processor busy.
static void product(const Product& work, int64_t first, int64_t end) {
  const int64_t turns = (work.count + rows_together - 1) / rows_together;
  for (int64_t pair = first; pair < end; pair++)
    for (int64_t turn = 0; turn < turns; turn++) {
      const int64_t row = work.count * turn / turns, count = work.count * (turn + 1) / turns - row;
      multiply_pair<rows_together>(work, row, count, pair);
    }
}

#endif
