// What Python sees of the operators. Tensors come as addresses, for an exchange by DLPack takes longer than most
// operators over a few rows: kernel.py's neighbour operators.py is the only caller and checks every tensor.
#include "operators.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "boundary.h"
#include "pool.h"

namespace nb = nanobind;

namespace anabranch {
namespace {

// So many rows are a thread's own in a product, which then reads all weights rather than a part of them for all rows:
// those that it worked on before lie in its cache. Of blocks that matrix tiles take whole. A thread that has done its
// own takes what others have left, in so many shares of the weights: cores are seldom equally fast.
constexpr int64_t own_rows = 128, row_block = 32, shares = 8;

class RowOperators {
 public:
  RowOperators(const std::string& type, const std::string& level)
      : type_(type_named(type)), code_(level_named(level).operators) {
    if (type_ == CacheType::int8) refuse("no operators over int8");
  }

  void norm(uintptr_t input, uintptr_t update, uintptr_t weight, uintptr_t out, int64_t rows, int64_t heads,
            int64_t size, int64_t stride, float epsilon, int threads) const {
    const Norm work{vectors(input, rows, heads, size, stride), at(update), at(weight), at(out), epsilon};
    run(code_.norm, work, rows, heads * size, threads);
  }

  void rotate(uintptr_t input, uintptr_t cos, uintptr_t sin, int64_t rows, int64_t heads, int64_t size,
              int64_t stride, int threads) const {
    if (size % 2 != 0) refuse("heads of " + std::to_string(size) + " have no halves");
    const Rotation work{vectors(input, rows, heads, size, stride), at(cos), at(sin)};
    run(code_.rotate, work, rows, heads * size, threads);
  }

  void gate(uintptr_t gate_up, uintptr_t out, int64_t rows, int64_t size, int threads) const {
    run(code_.gate, Gating{at(gate_up), at(out), rows, size}, rows, size, threads);
  }

  void own(uintptr_t query, int64_t query_heads, int64_t query_stride, uintptr_t key, int64_t key_stride,
           uintptr_t value, int64_t value_stride, int64_t kv_heads, uintptr_t out, uintptr_t lse, int64_t parts,
           float scale, uintptr_t merged, int64_t rows, int64_t size, int threads) const {
    if (kv_heads < 1 || query_heads % kv_heads != 0 || parts < 0)
      refuse(std::to_string(query_heads) + " query heads over " + std::to_string(kv_heads) + " KV heads, " +
             std::to_string(parts) + " parts");
    const OwnRows work{vectors(query, rows, query_heads, size, query_stride),
                       vectors(key, rows, kv_heads, size, key_stride),
                       vectors(value, rows, kv_heads, size, value_stride),
                       parts_at(out, lse, parts),
                       scale,
                       at(merged)};
    run(code_.own, work, rows, query_heads * size * (parts + 1), threads);
  }

  void merge(uintptr_t own_out, uintptr_t own_lse, uintptr_t out, uintptr_t lse, int64_t parts, uintptr_t merged,
             int64_t rows, int64_t heads, int64_t size, int threads) const {
    if (heads < 1 || parts < 0) refuse(std::to_string(heads) + " heads, " + std::to_string(parts) + " parts");
    const MergedRows work{parts_at(own_out, own_lse, 1), parts_at(out, lse, parts), rows, heads, size, at(merged)};
    run(code_.merge, work, rows, heads * size * (parts + 1), threads);
  }

  void best(uintptr_t numbers, uintptr_t place, uintptr_t best, uintptr_t second, int64_t rows, int64_t size,
            int threads) const {
    if (size < 2) refuse("no second of " + std::to_string(size) + " numbers");
    const BestTwo work{at(numbers), rows, size, static_cast<int64_t*>(at(place)), static_cast<float*>(at(best)),
                       static_cast<float*>(at(second))};
    run(code_.best, work, rows, size, threads);
  }

  // Panels and rows are computed each by itself, so that results do not depend on the number of threads.
  void product(uintptr_t rows, uintptr_t weights, uintptr_t bias, uintptr_t out, int64_t count, int64_t inputs,
               int64_t outputs, bool gated, int threads) const {
    if (type_ != CacheType::bfloat16 || inputs < 32 || inputs % 32 != 0 || outputs < 1 || count < 0 || threads < 1)
      refuse("no product of " + std::to_string(count) + " rows of " + std::to_string(inputs) + " with " +
             std::to_string(outputs) + " outputs over " + std::to_string(threads) + " threads");
    const Product work{at(rows), at(weights), at(bias), at(out), count, inputs, outputs, gated};
    const int64_t pairs = work.pairs();
    if (count >= own_rows * threads) {
      const int64_t blocks = (count + row_block - 1) / row_block;
      std::vector<std::atomic<int64_t>> taken(threads);
      return Pool::get().run(threads, [&](int part) {
        for (int turn = 0; turn < threads; turn++) {
          const int owner = (part + turn) % threads;
          const int64_t begin = blocks * owner / threads * row_block;
          const Product rows = rows_of(work, begin, std::min(count, blocks * (owner + 1) / threads * row_block));
          for (int64_t share; (share = taken[owner]++) < shares;)
            code_.product(rows, pairs * share / shares, pairs * (share + 1) / shares);
        }
      });
    }
    const int64_t parts = std::min<int64_t>({threads, pairs, pairs * inputs * 32 / part_numbers + 1});
    Pool::get().run(static_cast<int>(parts), [&](int part) {
      code_.product(work, pairs * part / parts, pairs * (part + 1) / parts);
    });
  }

 private:
  static void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

  // Some rows of a product.
  static Product rows_of(Product work, int64_t begin, int64_t end) {
    work.rows = static_cast<const uint16_t*>(work.rows) + begin * work.inputs;
    work.out = static_cast<uint16_t*>(work.out) + begin * work.outputs;
    work.count = end - begin;
    return work;
  }

  static Parts parts_at(uintptr_t out, uintptr_t lse, int64_t count) {
    return {static_cast<const float*>(at(out)), static_cast<const float*>(at(lse)), count};
  }

  static Vectors vectors(uintptr_t first, int64_t rows, int64_t heads, int64_t size, int64_t stride) {
    return {at(first), rows, heads, size, stride};
  }

  // Rows are computed each by itself, so that results do not depend on the number of threads.
  template <class Work>
  void run(void (*operate)(CacheType, const Work&, int64_t, int64_t), const Work& work, int64_t rows, int64_t row,
           int threads) const {
    if (rows < 0 || row < 1 || threads < 1 || threads > 1024)
      refuse(std::to_string(rows) + " rows of " + std::to_string(row) + " over " + std::to_string(threads) + " threads");
    const int64_t parts = std::min<int64_t>({threads, rows, rows * row / part_numbers});
    if (parts < 2) return operate(type_, work, 0, rows);
    Pool::get().run(static_cast<int>(parts), [&](int part) {
      operate(type_, work, rows * part / parts, rows * (part + 1) / parts);
    });
  }

  CacheType type_;
  Operators code_;
};

// Weights of a product: addresses of weights and bias, inputs, outputs, whether it is gated.
using PackedWeights = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, bool>;

// A decoder's layer between two attentions, over packed weights: what RowOperators do one after the other, in one call.
// Between two calls from Python most of what it needs has left the caches, and threads fall asleep.
class DecoderLayer {
 public:
  // Norms are addresses of their weights; 0 where heads have none.
  DecoderLayer(const std::string& level, PackedWeights query, PackedWeights key_value, PackedWeights output,
               PackedWeights gated, PackedWeights down, uintptr_t query_norm, uintptr_t key_norm,
               uintptr_t attended_norm, int64_t head_size, float epsilon)
      : operators_("bfloat16", level), query_(query), key_value_(key_value), output_(output), gated_(gated),
        down_(down), query_norm_(query_norm), key_norm_(key_norm), attended_norm_(attended_norm),
        head_size_(head_size), epsilon_(epsilon) {
    if (head_size < 1 || std::get<3>(query) % head_size != 0 || std::get<3>(key_value) % (2 * head_size) != 0)
      refuse("no heads of " + std::to_string(head_size));
  }

  // normed [rows, inputs] -> out [rows, heads, head size], normed where heads are, turned where there are tables.
  void query(uintptr_t normed, uintptr_t cos, uintptr_t sin, uintptr_t out, int64_t rows, int threads) const {
    const int64_t outputs = std::get<3>(query_), heads = outputs / head_size_;
    multiply(query_, normed, out, rows, threads);
    if (query_norm_ != 0) norm_heads(out, query_norm_, out, rows, heads, outputs, threads);
    if (cos != 0) operators_.rotate(out, cos, sin, rows, heads, head_size_, outputs, threads);
  }

  // normed [rows, inputs] -> out [rows, 2, heads, head size], keys and values; the keys as above, and where heads are
  // normed in memory of their own, keys [rows, heads, head size].
  void key_value(uintptr_t normed, uintptr_t cos, uintptr_t sin, uintptr_t out, uintptr_t keys, int64_t rows,
                 int threads) const {
    const int64_t outputs = std::get<3>(key_value_), heads = outputs / (2 * head_size_);
    multiply(key_value_, normed, out, rows, threads);
    if (key_norm_ != 0) norm_heads(out, key_norm_, keys, rows, heads, outputs, threads);
    if (cos == 0) return;
    if (key_norm_ != 0)
      operators_.rotate(keys, cos, sin, rows, heads, head_size_, heads * head_size_, threads);
    else
      operators_.rotate(out, cos, sin, rows, heads, head_size_, outputs, threads);
  }

  // attended [rows, heads x head size], hidden [rows, outputs], which becomes the layer's result -> normed, the same
  // normed for what is next; kept [rows, gated outputs] is memory for what lies between.
  void absorb(uintptr_t hidden, uintptr_t attended, uintptr_t next_norm, uintptr_t kept, uintptr_t normed,
              int64_t rows, int threads) const {
    const int64_t size = std::get<3>(output_);
    multiply(output_, attended, normed, rows, threads);
    operators_.norm(hidden, normed, attended_norm_, normed, rows, 1, size, size, epsilon_, threads);
    multiply(gated_, normed, kept, rows, threads);
    multiply(down_, kept, normed, rows, threads);
    operators_.norm(hidden, normed, next_norm, normed, rows, 1, size, size, epsilon_, threads);
  }

 private:
  void multiply(const PackedWeights& weights, uintptr_t rows, uintptr_t out, int64_t count, int threads) const {
    const auto& [places, bias, inputs, outputs, gated] = weights;
    operators_.product(rows, places, bias, out, count, inputs, outputs, gated, threads);
  }

  void norm_heads(uintptr_t heads, uintptr_t norm, uintptr_t out, int64_t rows, int64_t count, int64_t stride,
                  int threads) const {
    operators_.norm(heads, 0, norm, out, rows, count, head_size_, stride, epsilon_, threads);
  }

  RowOperators operators_;
  PackedWeights query_, key_value_, output_, gated_, down_;
  uintptr_t query_norm_, key_norm_, attended_norm_;
  int64_t head_size_;
  float epsilon_;
};

}  // namespace

void bind_operators(nb::module_& module) {
  const auto released = nb::call_guard<nb::gil_scoped_release>();
  nb::class_<RowOperators>(module, "RowOperators")
      .def(nb::init<const std::string&, const std::string&>(), nb::arg("number_type"), nb::arg("level"))
      .def("norm", &RowOperators::norm, released)
      .def("rotate", &RowOperators::rotate, released)
      .def("gate", &RowOperators::gate, released)
      .def("own", &RowOperators::own, released)
      .def("merge", &RowOperators::merge, released)
      .def("best", &RowOperators::best, released)
      .def("product", &RowOperators::product, released);
  nb::class_<DecoderLayer>(module, "DecoderLayer")
      .def(nb::init<const std::string&, PackedWeights, PackedWeights, PackedWeights, PackedWeights, PackedWeights,
                    uintptr_t, uintptr_t, uintptr_t, int64_t, float>())
      .def("query", &DecoderLayer::query, released)
      .def("key_value", &DecoderLayer::key_value, released)
      .def("absorb", &DecoderLayer::absorb, released);
}

}  // namespace anabranch
