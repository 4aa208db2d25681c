#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

#include "pool.h"

namespace anabranch {

namespace {

using Bytes = std::unique_ptr<uint8_t, decltype(&std::free)>;

Bytes aligned(int64_t bytes) {
  Bytes memory(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)), &std::free);
  if (!memory) throw std::bad_alloc();
  return memory;
}

[[noreturn]] void refuse(int64_t span, const std::string& reason) {
  throw std::invalid_argument("span " + std::to_string(span) + ": " + reason);
}

void check_span(const Span& span, int64_t index, bool causal) {
  const bool is_range = 0 <= span.visible_start && span.visible_start <= span.visible_end;
  if (span.row_start < 0 || span.row_count < 1) refuse(index, "rows overlap another span's, or are none");
  if (!is_range || span.table_count < 0) refuse(index, "visible slots are no range");
  const int64_t rows_before = causal ? span.row_count : 0;
  if (span.visible_end > span.visible_start &&
      span.first_position + span.visible_end > span.query_position + rows_before)
    refuse(index, causal ? "visible slots lie after the last row" : "visible slots lie after the first row");
}

Piece whole_piece(const Plan& plan, const Span& span, const Attention& work, int64_t row, int64_t rows) {
  const Shape& shape = work.cache.shape;
  Piece piece{};
  piece.row_start = span.row_start + row;
  piece.blocks = plan.table(span);
  piece.rows = rows;
  piece.row_position = span.query_position + row - span.first_position;
  piece.visible_start = span.visible_start;
  piece.visible_end = span.visible_end;
  if (work.causal) piece.visible_end = std::min(piece.visible_end, piece.row_position + rows);
  if (work.window) piece.visible_start = std::max(piece.visible_start, piece.row_position - work.window + 1);
  if (piece.visible_start >= piece.visible_end) return piece;
  const int64_t last = piece.visible_end - 1, per_block = shape.block_groups();
  piece.first = piece.visible_start / shape.block_tokens * per_block +
                piece.visible_start % shape.block_tokens / group_tokens;
  piece.end = last / shape.block_tokens * per_block + last % shape.block_tokens / group_tokens + 1;
  return piece;
}

std::vector<Piece> whole_pieces(const Plan& plan, const Attention& work) {
  const int64_t rows_fit = std::max<int64_t>(1, piece_vectors / work.heads_per_kv());
  std::vector<Piece> pieces;
  for (const Span& span : plan.spans()) {
    // As many rows each: a rest of some rows would walk over all of the cache for little.
    const int64_t parts = (span.row_count + rows_fit - 1) / rows_fit;
    const int64_t rows_most = (span.row_count + parts - 1) / parts;
    for (int64_t row = 0; row < span.row_count; row += rows_most) {
      Piece piece = whole_piece(plan, span, work, row, std::min(rows_most, span.row_count - row));
      if (piece.end == piece.first) continue;
      const int64_t kv_heads = work.cache.shape.kv_heads;
      const int64_t heads_most = std::max<int64_t>(1, piece_vectors / work.head_vectors(piece));
      for (piece.head = 0; piece.head < kv_heads; piece.head += heads_most) {
        piece.heads = std::min(heads_most, kv_heads - piece.head);
        pieces.push_back(piece);
      }
    }
  }
  return pieces;
}

// Work of one group of tokens.
int64_t weight_of(const Piece& piece) { return piece.rows * piece.heads; }

// The pieces of each thread: thread t computes what lies between t / threads and (t + 1) / threads of the
// work, cut at chunks. The parts of a piece that was cut leave partials, merged in their order.
struct Cut {
  std::vector<std::vector<Piece>> parts;
  std::vector<std::pair<Piece, std::vector<float*>>> merges;

  Cut(const std::vector<Piece>& pieces, const Attention& work, int threads) : parts(threads) {
    int64_t weight = 0, done = 0;
    for (const Piece& piece : pieces) weight += (piece.end - piece.first) * weight_of(piece);
    int thread = 0;
    for (const Piece& whole : pieces) {
      for (int64_t first = whole.first; first < whole.end;) {
        const bool is_last = thread == threads - 1;
        const int64_t until = is_last ? weight : weight * (thread + 1) / threads;
        const int64_t chunk_weight = chunk_groups * weight_of(whole);
        const int64_t chunks = std::max<int64_t>(0, (until - done + chunk_weight - 1) / chunk_weight);
        const int64_t end = is_last ? whole.end : std::min(whole.end, first + chunks * chunk_groups);
        if (end > first) add(thread, whole, first, end, work);
        done += (end - first) * weight_of(whole);
        first = end;
        if (done >= until && !is_last) thread++;
      }
    }
  }

 private:
  void add(int thread, const Piece& whole, int64_t first, int64_t end, const Attention& work) {
    Piece piece = whole;
    piece.first = first;
    piece.end = end;
    if (end - first < whole.end - whole.first) {
      if (first == whole.first) merges.emplace_back(whole, std::vector<float*>());
      const int64_t numbers = work.vectors(whole) * (work.cache.shape.padded_size() + 2);
      memory_.push_back(aligned(numbers * static_cast<int64_t>(sizeof(float))));
      piece.partial = reinterpret_cast<float*>(memory_.back().get());
      merges.back().second.push_back(piece.partial);
    }
    parts[thread].push_back(piece);
  }

  std::vector<Bytes> memory_;
};

// Results of the rows that no piece has: nothing seen.
void empty_others(const std::vector<Piece>& pieces, const Attention& work, int64_t rows) {
  const int64_t heads = work.query_heads, numbers = heads * work.cache.shape.head_size;
  std::vector<bool> has_piece(rows);
  for (const Piece& piece : pieces)
    std::fill_n(has_piece.begin() + piece.row_start, piece.rows, true);
  for (int64_t row = 0; row < rows; row++) {
    if (has_piece[row]) continue;
    std::fill_n(work.out + row * numbers, numbers, 0.0f);
    std::fill_n(work.lse + row * heads, heads, -std::numeric_limits<float>::infinity());
  }
}

void merge(const Piece& piece, const std::vector<float*>& partials, const Attention& work) {
  const int64_t size = work.cache.shape.padded_size();
  const int64_t head_size = work.cache.shape.head_size;
  for (int64_t vector = 0; vector < work.vectors(piece); vector++) {
    float most = -std::numeric_limits<float>::infinity(), total = 0;
    for (const float* partial : partials) most = std::max(most, partial[vector * (size + 2)]);
    const int64_t place = work.place(piece, vector);
    float* out = work.out + place * head_size;
    std::fill(out, out + head_size, 0.0f);
    work.lse[place] = most;
    if (std::isinf(most) && most < 0) continue;
    for (const float* partial : partials) {
      const float* of_vector = partial + vector * (size + 2);
      const float factor = std::exp(of_vector[0] - most);
      total += of_vector[1] * factor;
      for (int64_t d = 0; d < head_size; d++) out[d] += of_vector[2 + d] * factor;
    }
    for (int64_t d = 0; d < head_size; d++) out[d] /= total;
    work.lse[place] = most + std::log(total);
  }
}

}  // namespace

Plan::Plan(const int64_t* spans, int64_t count, std::vector<int64_t> table, bool causal)
    : table_(std::move(table)), causal_(causal) {
  int64_t taken = 0;
  std::vector<std::pair<int64_t, int64_t>> rows;
  for (int64_t index = 0; index < count; index++) {
    const int64_t* field = spans + index * 7;
    const Span span{field[0], field[1], field[2], field[3], field[4], field[5], taken, field[6]};
    check_span(span, index, causal);
    taken += span.table_count;
    rows.emplace_back(span.row_start, span.row_start + span.row_count);
    spans_.push_back(span);
  }
  if (taken != static_cast<int64_t>(table_.size()))
    throw std::invalid_argument(std::to_string(table_.size()) + " blocks for spans of " + std::to_string(taken));
  std::sort(rows.begin(), rows.end());
  for (const auto& [start, end] : rows) {
    if (start < rows_) throw std::invalid_argument("row " + std::to_string(start) + ": rows overlap another span's");
    rows_ = end;
  }
  for (const int64_t block : table_) {
    if (block < 0) throw std::invalid_argument("block " + std::to_string(block) + " is none");
    block_most_ = std::max(block_most_, block);
  }
}

void Plan::check(const Shape& shape, int64_t rows) const {
  if (rows_ > rows)
    throw std::invalid_argument("spans name " + std::to_string(rows_) + " rows of " + std::to_string(rows));
  if (block_most_ >= shape.blocks)
    throw std::invalid_argument("block " + std::to_string(block_most_) + " of " + std::to_string(shape.blocks));
  for (size_t index = 0; index < spans_.size(); index++)
    if (spans_[index].visible_end > spans_[index].table_count * shape.block_tokens)
      refuse(index, "visible slots lie outside " + std::to_string(spans_[index].table_count) + " blocks");
}

void run_plan(const Plan& plan, const Attention& work, const Level& level, int threads, int64_t rows) {
  const int64_t size = work.cache.shape.padded_size();
  const std::vector<Piece> pieces = whole_pieces(plan, work);
  empty_others(pieces, work, rows);
  int64_t vectors_most = 0;
  for (const Piece& piece : pieces) vectors_most = std::max(vectors_most, work.vectors(piece));
  const Cut cut(pieces, work, threads);
  std::vector<Bytes> scratch;
  for (int part = 0; part < threads; part++) scratch.push_back(aligned(scratch_bytes(vectors_most, size)));
  const auto compute = [&](int part) {
    const std::vector<Piece>& own = cut.parts[part];
    level.attend(work, own.data(), static_cast<int64_t>(own.size()), scratch[part].get());
  };
  if (threads == 1)
    compute(0);
  else
    Pool::get().run(threads, compute);
  for (const auto& [piece, partials] : cut.merges) merge(piece, partials, work);
}

}  // namespace anabranch
