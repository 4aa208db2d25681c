// Products of rows of activations with packed weights: bfloat16 in and out, sums in single precision. Included by each
// level's file.
//
// Weights lie in panels of sixteen outputs; a panel's line holds two consecutive inputs of all of them, and sixteen
// lines are a matrix tile's second factor as they lie. Of a gated product a pair of panels is one of the gate and one
// of what it lets through. A step of few rows reads each weight once, in the order of addresses; of many rows, blocks
// of them stay in the cache while the panels pass by.

constexpr int64_t panel_outputs = 16, line_bytes = 64, block_inputs = 32, block_bytes = 1024;

INLINE void finish_row(const Product& work, int64_t row, int64_t panel, const float* sums) {
  const int64_t output = panel * panel_outputs, left = work.outputs - output;
  if (left <= 0) return;  // the second panel of a pair may hold nothing
  Floats numbers = load(sums);
  if (work.bias != nullptr) numbers = numbers + read_left<Bfloat16>((const uint16_t*)work.bias + output, left);
  write_left<Bfloat16>((uint16_t*)work.out + row * work.outputs + output, numbers, left);
}

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

#if defined(__AMX_BF16__)

// The next panels' weights are fetched so far ahead: some microseconds of memory.
constexpr int64_t ahead_bytes = 6 * block_bytes;

// Both panels of some rows, sums [count][32]. Numbers below the smallest normal one become zero.
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

template <int RowTiles>
INLINE void multiply_block(const uint8_t* rows, int64_t row_bytes, const uint8_t* left, const uint8_t* right) {
  load_tile<4>(rows, row_bytes);
  if constexpr (RowTiles == 2) load_tile<5>(rows + tile_rows * row_bytes, row_bytes);
  load_tile<6>(left, line_bytes);
  load_tile<7>(right, line_bytes);
  multiply_tiles<CacheType::bfloat16, true, 0, 4, 6>();
  multiply_tiles<CacheType::bfloat16, true, 1, 4, 7>();
  if constexpr (RowTiles == 2) {
    multiply_tiles<CacheType::bfloat16, true, 2, 5, 6>();
    multiply_tiles<CacheType::bfloat16, true, 3, 5, 7>();
  }
}

// `count` rows, at most sixteen, or twice sixteen, with two panels.
template <int RowTiles, bool Ahead>
static void multiply_panels(const Product& work, int64_t row, int64_t count, int64_t panel) {
  const int64_t row_bytes = work.inputs * 2, panel_bytes = work.inputs * 32;
  const uint8_t* rows = (const uint8_t*)work.rows + row * row_bytes;
  const uint8_t* left = (const uint8_t*)work.weights + panel * panel_bytes;
  const uint8_t* right = left + panel_bytes;
  zero_tile<0>();
  zero_tile<1>();
  if constexpr (RowTiles == 2) {
    zero_tile<2>();
    zero_tile<3>();
  }
  for (int64_t block = 0; block < work.inputs / block_inputs; block++) {
    const int64_t place = block * block_bytes;
    if constexpr (Ahead)
      for (int64_t line = 0; line < block_bytes; line += line_bytes) {
        fetch_ahead(left + place + ahead_bytes + line);
        fetch_ahead(right + place + ahead_bytes + line);
      }
    multiply_block<RowTiles>(rows + block * line_bytes, row_bytes, left + place, right + place);
  }
  alignas(64) float sums[2 * tile_rows][2 * panel_outputs];
  store_tile<0>(sums[0], sizeof sums[0]);
  store_tile<1>(sums[0] + panel_outputs, sizeof sums[0]);
  if constexpr (RowTiles == 2) {
    store_tile<2>(sums[tile_rows], sizeof sums[0]);
    store_tile<3>(sums[tile_rows] + panel_outputs, sizeof sums[0]);
  }
  finish_rows(work, row, count, panel, sums[0]);
}

// Rows row..end with some pairs of panels; the first rows of a pair fetch what follows it.
static void multiply_rows(const Product& work, Tiles& tiles, int64_t begin, int64_t end, int64_t first, int64_t last) {
  for (int64_t panel = 2 * first; panel < 2 * last; panel += 2)
    for (int64_t row = begin; row < end;) {
      const int64_t left = end - row;
      const bool is_first = row == begin;
      if (left >= 2 * tile_rows) {
        tiles.shape_product(tile_rows);
        is_first ? multiply_panels<2, true>(work, row, 2 * tile_rows, panel)
                 : multiply_panels<2, false>(work, row, 2 * tile_rows, panel);
        row += 2 * tile_rows;
        continue;
      }
      const int64_t count = left < tile_rows ? left : tile_rows;
      tiles.shape_product((int)count);
      is_first ? multiply_panels<1, true>(work, row, count, panel)
               : multiply_panels<1, false>(work, row, count, panel);
      row += count;
    }
}

// Rows that a cache of the second level holds beside the weights, and whose results lie in few pages.
constexpr int64_t rows_bytes = 512 * 1024, rows_most = 256;

static void product(const Product& work, int64_t first, int64_t end) {
  Tiles tiles;
  int64_t rows = rows_bytes / (2 * work.inputs) / (2 * tile_rows) * 2 * tile_rows;
  rows = rows < 2 * tile_rows ? 2 * tile_rows : rows > rows_most ? rows_most : rows;
  for (int64_t row = 0; row < work.count; row += rows)
    multiply_rows(work, tiles, row, row + rows < work.count ? row + rows : work.count, first, end);
}

#else

constexpr int64_t lines_ahead = 48;

// `Rows` rows with one panel, into sums [Rows][32].
template <int Rows>
INLINE void multiply_panel(const Product& work, int64_t row, int64_t panel, float* to) {
  const int64_t lines = work.inputs / 2;
  const uint32_t* rows = (const uint32_t*)work.rows + row * lines;
  const uint8_t* weights = (const uint8_t*)work.weights + panel * lines * line_bytes;
  Floats sums[Rows];
  for (int m = 0; m < Rows; m++) sums[m] = all(0);
  for (int64_t line = 0; line < lines; line++) {
    if (row == 0) fetch_ahead(weights + (line + lines_ahead) * line_bytes);
    const Ints pairs = load_ints(weights + line * line_bytes);
    for (int m = 0; m < Rows; m++) {
      const uint32_t two = rows[m * lines + line];
      if constexpr (dot_pairs) {
        sums[m] = dot_two(sums[m], pairs, two);
      } else {
        const Ints both = all_ints((int32_t)two);
        sums[m] = multiply_add(low_half(pairs), low_half(both), sums[m]);
        sums[m] = multiply_add(high_half(pairs), high_half(both), sums[m]);
      }
    }
  }
  for (int m = 0; m < Rows; m++) store(to + m * 2 * panel_outputs, sums[m]);
}

// `Rows` rows with a pair of panels.
template <int Rows>
static void multiply_pair(const Product& work, int64_t row, int64_t pair) {
  float sums[Rows][2 * panel_outputs];
  multiply_panel<Rows>(work, row, 2 * pair, sums[0]);
  multiply_panel<Rows>(work, row, 2 * pair + 1, sums[0] + panel_outputs);
  if (work.gated) return finish_gated(work, row, Rows, pair, sums[0]);
  for (int m = 0; m < Rows; m++) {
    finish_row(work, row + m, 2 * pair, sums[m]);
    finish_row(work, row + m, 2 * pair + 1, sums[m] + panel_outputs);
  }
}

static void product(const Product& work, int64_t first, int64_t end) {
  for (int64_t pair = first; pair < end; pair++) {
    int64_t row = 0;
    for (; row + 8 <= work.count; row += 8) multiply_pair<8>(work, row, pair);
    for (; row + 2 <= work.count; row += 2) multiply_pair<2>(work, row, pair);
    for (; row < work.count; row++) multiply_pair<1>(work, row, pair);
  }
}

#endif
