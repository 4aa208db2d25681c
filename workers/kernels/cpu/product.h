// Products of rows of activations with packed weights: bfloat16 in and out, sums in single precision. Included by each
// level's file.
//
// Weights lie in panels of sixteen outputs; a panel's line holds two consecutive inputs of all of them, and sixteen
// lines are a matrix tile's second factor as they lie. A step of few rows reads each weight once, in the order of
// addresses, at the speed of memory; of many rows a panel stays in the cache for all of them.

constexpr int64_t panel_outputs = 16, line_bytes = 64, block_inputs = 32, block_bytes = 1024;

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
  for (int64_t i = 0; i < count; i++) {
    finish_row(work, row + i, panel, sums[i]);
    finish_row(work, row + i, panel + 1, sums[i] + panel_outputs);
  }
}

static void product(const Product& work, int64_t first, int64_t end) {
  Tiles tiles;
  const int64_t whole = work.count / (2 * tile_rows) * 2 * tile_rows;
  for (int64_t panel = 2 * first; panel < 2 * end; panel += 2) {
    int64_t row = 0;
    for (; row < whole; row += 2 * tile_rows) {
      tiles.shape_product(tile_rows);
      multiply_panels<2, false>(work, row, 2 * tile_rows, panel);
    }
    for (; row < work.count; row += tile_rows) {
      const int64_t count = work.count - row < tile_rows ? work.count - row : tile_rows;
      tiles.shape_product((int)count);
      if (row == 0)
        multiply_panels<1, true>(work, row, count, panel);
      else
        multiply_panels<1, false>(work, row, count, panel);
    }
  }
}

#else

constexpr int64_t lines_ahead = 48;

// `Rows` rows with one panel.
template <int Rows>
static void multiply_panel(const Product& work, int64_t row, int64_t panel) {
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
  for (int m = 0; m < Rows; m++) {
    float kept[16];
    store(kept, sums[m]);
    finish_row(work, row + m, panel, kept);
  }
}

static void product(const Product& work, int64_t first, int64_t end) {
  for (int64_t panel = 2 * first; panel < 2 * end; panel++) {
    int64_t row = 0;
    for (; row + 8 <= work.count; row += 8) multiply_panel<8>(work, row, panel);
    for (; row + 2 <= work.count; row += 2) multiply_panel<2>(work, row, panel);
    for (; row < work.count; row++) multiply_panel<1>(work, row, panel);
  }
}

#endif
