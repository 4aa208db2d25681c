// What Python sees: packed layers, plans, attention, rows in and out, exchanges, operators, and the read probe.
// Whatever Python hands over is checked here, for a kernel reads memory by the numbers it is given.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <string>

#include "boundary.h"
#include "exchange.h"
#include "plan.h"
#include "pool.h"
#include "rows.h"

namespace nb = nanobind;

namespace anabranch {
namespace {

using Storage = nb::ndarray<uint8_t, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Numbers = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using SpanTable = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

CacheType type_of(const Numbers& array) {
  const nb::dlpack::dtype type = array.dtype();
  if (type.lanes == 1 && type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float)) {
    if (type.bits == 32) return CacheType::float32;
    if (type.bits == 16) return CacheType::float16;
  }
  if (type.lanes == 1 && type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) && type.bits == 16)
    return CacheType::bfloat16;
  refuse("numbers of " + std::to_string(type.bits) + " bits, kind " + std::to_string(type.code));
}

// What rows of a cache are handed over as.
CacheType row_type(CacheType type) { return type == CacheType::int8 ? CacheType::float32 : type; }

std::string shape_of(const Numbers& array) {
  std::string text = "[";
  for (size_t i = 0; i < array.ndim(); i++) text += (i ? ", " : "") + std::to_string(array.shape(i));
  return text + "]";
}

Shape shape_from(const std::string& type, int64_t blocks, int64_t block_tokens, int64_t kv_heads, int64_t head_size) {
  constexpr int64_t most = int64_t(1) << 40;
  const bool fits = block_tokens > 0 && block_tokens <= 65536 && kv_heads > 0 && kv_heads <= 65536 &&
                    head_size > 0 && head_size <= 4096 && blocks > 0 && blocks < most;
  if (!fits)
    refuse("no cache of " + std::to_string(blocks) + " blocks of " + std::to_string(block_tokens) + " tokens, " +
           std::to_string(kv_heads) + " heads of " + std::to_string(head_size));
  return {type_named(type), blocks, block_tokens, kv_heads, head_size};
}

// One layer of a packed arena. Keeps the arena's memory.
class Layer {
 public:
  // storage: [blocks, layers, kv_heads, record bytes], 64-byte aligned.
  Layer(Storage storage, int64_t layer, const std::string& type, int64_t block_tokens, int64_t head_size)
      : storage_(storage) {
    const int64_t blocks = storage.shape(0), layers = storage.shape(1), kv_heads = storage.shape(2);
    const Shape shape = shape_from(type, blocks, block_tokens, kv_heads, head_size);
    if (static_cast<int64_t>(storage.shape(3)) != shape.record_bytes())
      refuse("records of " + std::to_string(storage.shape(3)) + " bytes, not " + std::to_string(shape.record_bytes()));
    if (layer < 0 || layer >= layers) refuse("layer " + std::to_string(layer) + " of " + std::to_string(layers));
    if (reinterpret_cast<uintptr_t>(storage.data()) % 64 != 0) refuse("storage is not aligned to 64 bytes");
    const int64_t layer_bytes = kv_heads * shape.record_bytes();
    cache_ = {shape, storage.data() + layer * layer_bytes, layers * layer_bytes};
  }
  const Cache& cache() const { return cache_; }

 private:
  Storage storage_;
  Cache cache_;
};

void check_slots(const Shape& shape, const int64_t* slots, int64_t count) {
  for (int64_t row = 0; row < count; row++)
    if (slots[row] < 0 || slots[row] >= shape.blocks * shape.block_tokens)
      refuse("slot " + std::to_string(slots[row]) + " of " + std::to_string(shape.blocks * shape.block_tokens));
}

void check_rows(const Cache& cache, const Indices& slots, const Numbers& key, const Numbers& value) {
  const Shape& shape = cache.shape;
  for (const Numbers* rows : {&key, &value}) {
    const bool fits = rows->ndim() == 3 && rows->shape(0) == slots.shape(0) &&
                      static_cast<int64_t>(rows->shape(1)) == shape.kv_heads &&
                      static_cast<int64_t>(rows->shape(2)) == shape.head_size;
    if (!fits || type_of(*rows) != row_type(shape.type))
      refuse("rows " + shape_of(*rows) + " for " + std::to_string(slots.shape(0)) + " slots of " +
             std::to_string(shape.kv_heads) + " heads of " + std::to_string(shape.head_size));
  }
  check_slots(shape, slots.data(), slots.shape(0));
}

// Rows at addresses, as in operators.cpp: layout.py, the only caller, checks their tensors.
void append_rows(const Layer& layer, uintptr_t slots, int64_t count, uintptr_t key, int64_t key_stride_bytes,
                 uintptr_t value, int64_t value_stride_bytes, int threads) {
  const int64_t* places = reinterpret_cast<const int64_t*>(slots);
  check_slots(layer.cache().shape, places, count);
  nb::gil_scoped_release released;
  write_rows(layer.cache(), places, count, {reinterpret_cast<const uint8_t*>(key), key_stride_bytes},
             {reinterpret_cast<const uint8_t*>(value), value_stride_bytes}, threads);
}

void gather_rows(const Layer& layer, Indices slots, nb::ndarray<nb::c_contig, nb::device::cpu> key,
          nb::ndarray<nb::c_contig, nb::device::cpu> value) {
  check_rows(layer.cache(), slots, Numbers(key), Numbers(value));
  nb::gil_scoped_release released;
  read_rows(layer.cache(), slots.data(), slots.shape(0), key.data(), value.data());
}

// Query, out and lse at addresses, as above: kernel.py, the only caller, checks their tensors.
void attend(const Plan& plan, const Layer& layer, uintptr_t query, const std::string& type, int64_t rows,
            int64_t query_heads, int64_t head_size, uintptr_t out, uintptr_t lse, float scale, int64_t window,
            int threads, const std::string& level) {
  const Cache& cache = layer.cache();
  const Shape& shape = cache.shape;
  if (head_size != shape.head_size)
    refuse("a query of heads of " + std::to_string(head_size) + " for heads of " + std::to_string(shape.head_size));
  if (query_heads == 0 || query_heads % shape.kv_heads != 0)
    refuse(std::to_string(query_heads) + " query heads do not divide over " + std::to_string(shape.kv_heads));
  const CacheType query_type = type_named(type);
  if (query_type == CacheType::int8 || (shape.type != CacheType::int8 && query_type != shape.type))
    refuse("a query of " + type + ", and a cache of another type");
  if (window < 0) refuse("a window of " + std::to_string(window) + " sees nothing");
  if (threads < 1 || threads > 1024) refuse(std::to_string(threads) + " threads");
  plan.check(shape, rows);
  Attention work{};
  work.cache = cache;
  work.query = reinterpret_cast<const void*>(query);
  work.out = reinterpret_cast<float*>(out);
  work.lse = reinterpret_cast<float*>(lse);
  work.query_type = query_type;
  work.query_heads = query_heads;
  work.window = window;
  work.scale = scale;
  work.causal = plan.causal();
  const Level& chosen = level_named(level);
  nb::gil_scoped_release released;
  run_plan(plan, work, chosen, threads, rows);
}

// An exchange and the arena it reads.
struct KeptExchange {
  KeptExchange(const ExchangeTerms& terms, std::vector<Layer> layers, const Level& level)
      : kept(std::move(layers)), exchange(terms, caches(kept), level) {}

  static std::vector<Cache> caches(const std::vector<Layer>& layers) {
    std::vector<Cache> found;
    for (const Layer& layer : layers) found.push_back(layer.cache());
    return found;
  }

  std::vector<Layer> kept;
  Exchange exchange;
};

nb::bytes as_bytes(const std::string& bytes) { return nb::bytes(bytes.data(), bytes.size()); }

void bind_exchange(nb::module_& module) {
  const auto without_gil = [](auto method) {
    return [method](KeptExchange& kept) {
      nb::gil_scoped_release released;
      return (kept.exchange.*method)();
    };
  };
  const auto quickly = [](auto method) { return [method](KeptExchange& kept) { return (kept.exchange.*method)(); }; };
  nb::class_<KeptExchange>(module, "Exchange")
      .def("__init__",
           [](KeptExchange* made, const std::vector<Layer>& layers, int socket, uint64_t incarnation,
              int64_t wire_version, int64_t query_heads, float scale, int threads, double spin_s,
              const std::string& level) {
             if (threads < 1 || threads > 1024) refuse(std::to_string(threads) + " threads");
             const ExchangeTerms terms{socket, incarnation, wire_version, query_heads, scale, threads, spin_s};
             new (made) KeptExchange(terms, layers, level_named(level));
           },
           nb::arg("layers"), nb::arg("socket"), nb::arg("incarnation"), nb::arg("wire_version"),
           nb::arg("query_heads"), nb::arg("scale"), nb::arg("threads"), nb::arg("spin_s"), nb::arg("level"))
      .def("begin_plan",
           [](KeptExchange& kept, int micro_batch, uint64_t step, const Plan& plan, int64_t rows, Indices slots) {
             kept.exchange.begin(micro_batch, step, plan, rows,
                                 std::vector<int64_t>(slots.data(), slots.data() + slots.shape(0)));
           })
      .def("end", [](KeptExchange& kept, int micro_batch) { kept.exchange.end(micro_batch); })
      .def("receive",
           [](KeptExchange& kept, double wait_s) {
             nb::gil_scoped_release released;
             return kept.exchange.receive(wait_s);
           })
      .def("take", [](KeptExchange& kept) { return as_bytes(kept.exchange.take()); })
      .def("append", without_gil(&Exchange::append))
      .def("attend", without_gil(&Exchange::attend))
      .def("reply",
           [](KeptExchange& kept) {
             std::string left;
             {
               nb::gil_scoped_release released;
               left = kept.exchange.reply();
             }
             return as_bytes(left);
           })
      .def("finish", quickly(&Exchange::finish))
      .def("take_busy", quickly(&Exchange::take_busy))
      .def("take_received", quickly(&Exchange::take_received))
      .def("take_sent", quickly(&Exchange::take_sent))
      .def_prop_ro("layer", quickly(&Exchange::layer))
      .def_prop_ro("has_rows", quickly(&Exchange::has_rows))
      .def_prop_ro("has_query", quickly(&Exchange::has_query));
}

void read_probe(nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> bytes, int threads,
                const std::string& level) {
  if (threads < 1 || threads > 1024) refuse(std::to_string(threads) + " threads");
  const Level& chosen = level_named(level);
  const int64_t part_bytes = bytes.shape(0) / threads / 64 * 64;
  static std::atomic<float> kept;  // so that the reading is not left out as useless
  nb::gil_scoped_release released;
  Pool::get().run(threads, [&](int part) { kept = chosen.read(bytes.data() + part * part_bytes, part_bytes); });
}

}  // namespace
}  // namespace anabranch

NB_MODULE(_native, module) {
  using namespace anabranch;
  nb::set_leak_warnings(false);  // a kernel may live as long as the process
  nb::class_<Layer>(module, "Layer")
      .def(nb::init<Storage, int64_t, const std::string&, int64_t, int64_t>(), nb::arg("storage"), nb::arg("layer"),
           nb::arg("cache_type"), nb::arg("block_tokens"), nb::arg("head_size"));
  nb::class_<Plan>(module, "Plan")
      .def("__init__",
           [](Plan* plan, SpanTable spans, Indices table, bool causal) {
             if (spans.shape(1) != 7) refuse("spans of " + std::to_string(spans.shape(1)) + " fields, not 7");
             new (plan) Plan(spans.data(), spans.shape(0),
                             std::vector<int64_t>(table.data(), table.data() + table.shape(0)), causal);
           },
           nb::arg("spans"), nb::arg("table"), nb::arg("causal"));
  module.def("attend", &attend);
  bind_operators(module);
  bind_exchange(module);
  module.def("append", &append_rows);
  module.def("read", &gather_rows, nb::arg("layer"), nb::arg("slots"), nb::arg("key"), nb::arg("value"));
  module.def("read_probe", &read_probe, nb::arg("storage"), nb::arg("threads"), nb::arg("level"));
  module.def(
      "record_bytes",
      [](const std::string& type, int64_t block_tokens, int64_t head_size) {
        return shape_from(type, 1, block_tokens, 1, head_size).record_bytes();
      },
      nb::arg("cache_type"), nb::arg("block_tokens"), nb::arg("head_size"));
  module.def("let_threads_spin", [](bool may) { Pool::get().let_spin(may); }, nb::arg("may"));
  module.def("levels", [] {
    std::vector<std::string> names;
    for (const Level* level : levels()) names.push_back(level->name);
    return names;
  });
}
