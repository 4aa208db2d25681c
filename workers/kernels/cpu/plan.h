// The spans of one step, checked once, and how their work is cut over threads.
#pragma once
#include <cstdint>
#include <vector>

#include "cache.h"

namespace anabranch {

struct Span {
  int64_t row_start, row_count, query_position, first_position, visible_start, visible_end;
  int64_t table_start, table_count;  // its blocks within the plan's table
};

class Plan {
 public:
  // spans: [count][7] as of Span, with table_count last. causal: slots are the rows themselves, each of which sees
  // those up to itself; otherwise all lie before the first row. Throws std::invalid_argument on ranges that
  // contradict each other.
  Plan(const int64_t* spans, int64_t count, std::vector<int64_t> table, bool causal);

  // Throws std::invalid_argument unless every span lies within the cache and the rows.
  void check(const Shape& shape, int64_t rows) const;

  bool causal() const { return causal_; }
  const std::vector<Span>& spans() const { return spans_; }
  const int64_t* table(const Span& span) const { return table_.data() + span.table_start; }

 private:
  std::vector<Span> spans_;
  std::vector<int64_t> table_;
  int64_t rows_ = 0;         // one more than the last row named
  int64_t block_most_ = -1;
  bool causal_;
};

// Attend a plan over one layer with `threads` threads, `rows` rows in all. The cut depends on the plan and the
// number of threads only, so results are bit-identical run to run.
void run_plan(const Plan& plan, const Attention& work, const Level& level, int threads, int64_t rows);

}  // namespace anabranch
