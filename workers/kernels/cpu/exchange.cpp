#include "exchange.h"

#include <poll.h>
#include <sys/socket.h>
#include <time.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

#include "checksum.h"
#include "rows.h"

#if !defined(MSG_NOSIGNAL)
#define MSG_NOSIGNAL 0  // elsewhere than on Linux: Python ignores SIGPIPE
#endif

namespace anabranch {

namespace {

// frames.py: the header, little-endian, with its own checksum.
struct __attribute__((packed)) Header {
  char magic[4];
  uint16_t wire_version;
  uint8_t kind, flags;
  uint64_t incarnation, step;
  uint16_t micro_batch, layer;
  uint32_t deadline_ms, window;
  uint32_t lengths[4];
  uint32_t zeros_a;
  double compute_s, transfer_s;
  uint32_t zeros_b;
  uint32_t checksum;
};
constexpr int64_t header_bytes = sizeof(Header), trailer_bytes = 4;
static_assert(header_bytes == 80);

constexpr uint8_t kind_step = 1, kind_partial = 2;
constexpr int64_t bytes_at_first = 1 << 16;

uint32_t checksum_of(const Header& header) {
  return crc32c(reinterpret_cast<const uint8_t*>(&header), offsetof(Header, checksum));
}

double now_s() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

// Of queries and rows; the sums of a quantised cache are asked for in float32.
CacheType row_type(const Shape& shape) { return shape.type == CacheType::int8 ? CacheType::float32 : shape.type; }

}  // namespace

FrameMemory::FrameMemory(int64_t bytes)
    : size_(bytes),
      memory_(static_cast<uint8_t*>(std::aligned_alloc(64, (before + bytes + 63) / 64 * 64)), &std::free) {
  if (!memory_) throw std::bad_alloc();
}

Exchange::Exchange(const ExchangeTerms& terms, std::vector<Cache> layers, const Level& level)
    : terms_(terms),
      layers_(std::move(layers)),
      level_(level),
      incoming_(bytes_at_first),
      outgoing_(bytes_at_first) {
  if (layers_.empty()) throw std::invalid_argument("an exchange over no layers");
  const int64_t kv_heads = layers_[0].shape.kv_heads;
  if (terms.query_heads < 1 || terms.query_heads % kv_heads != 0)
    throw std::invalid_argument(std::to_string(terms.query_heads) + " query heads do not divide over " +
                                std::to_string(kv_heads));
}

int64_t Exchange::query_bytes(const Standing& standing) const {
  const Shape& shape = layers_[0].shape;
  return standing.rows * terms_.query_heads * shape.head_size * element_bytes(row_type(shape));
}

int64_t Exchange::rows_bytes(const Standing& standing) const {
  const Shape& shape = layers_[0].shape;
  return static_cast<int64_t>(standing.slots.size()) * shape.kv_heads * shape.head_size *
         element_bytes(row_type(shape));
}

void Exchange::begin(int micro_batch, uint64_t step, const Plan& plan, int64_t rows, std::vector<int64_t> slots) {
  const Shape& shape = layers_[0].shape;
  plan.check(shape, rows);
  for (const int64_t slot : slots)
    if (slot < 0 || slot >= shape.blocks * shape.block_tokens)
      throw std::invalid_argument("slot " + std::to_string(slot) + " of " +
                                  std::to_string(shape.blocks * shape.block_tokens));
  Standing standing{step, plan, rows, std::move(slots)};
  const int64_t incoming = header_bytes + query_bytes(standing) + 2 * rows_bytes(standing) + trailer_bytes;
  const int64_t outgoing = header_bytes + rows * terms_.query_heads * (shape.head_size + 1) * 4 + trailer_bytes;
  if (incoming > incoming_.size()) {
    FrameMemory larger(2 * incoming);  // the next frame may have come with it
    std::memcpy(larger.bytes(), incoming_.bytes(), filled_);
    incoming_ = std::move(larger);
  }
  if (outgoing > outgoing_.size()) outgoing_ = FrameMemory(outgoing);
  standing_.insert_or_assign(micro_batch, std::move(standing));
}

int Exchange::receive(double wait_s) {
  if (filled_ == 0 && !wait(wait_s)) return -1;
  came_s_ = now_s();
  while (true) {
    if (filled_ >= header_bytes) {
      if (!is_plain()) return -1;
      if (filled_ >= frame_bytes_) break;
    }
    if (!read(0)) return -1;
  }
  if (!is_whole()) return -1;
  moving_s_ += now_s() - came_s_;
  compute_s_ = 0;
  return micro_batch_;
}

std::string Exchange::take() {
  std::string bytes(reinterpret_cast<const char*>(incoming_.bytes()), filled_);
  filled_ = 0;
  return bytes;
}

bool Exchange::wait(double wait_s) {
  const double until_s = now_s() + terms_.spin_s;
  do {
    if (read(MSG_DONTWAIT)) return true;
  } while (now_s() < until_s);
  pollfd readable{terms_.socket, POLLIN, 0};
  return poll(&readable, 1, static_cast<int>(wait_s * 1000)) > 0 && read(MSG_DONTWAIT);
}

// Where the other side is gone, whoever reads next finds out.
bool Exchange::read(int flags) {
  const ssize_t count = recv(terms_.socket, incoming_.bytes() + filled_, incoming_.size() - filled_, flags);
  if (count <= 0) return false;
  filled_ += count;
  received_ += count;
  return true;
}

bool Exchange::is_plain() {
  Header header;
  std::memcpy(&header, incoming_.bytes(), sizeof(header));
  const bool is_ours = std::memcmp(header.magic, "ANBR", 4) == 0 && header.wire_version == terms_.wire_version &&
                       header.kind == kind_step && header.incarnation == terms_.incarnation &&
                       header.checksum == checksum_of(header);
  const auto found = standing_.find(header.micro_batch);
  if (!is_ours || found == standing_.end() || found->second.step != header.step) return false;
  of_ = &found->second;
  micro_batch_ = header.micro_batch;
  flags_ = header.flags;
  layer_ = header.layer;
  window_ = header.window;
  if ((flags_ & ~(flag_query | flag_rows)) != 0 || flags_ == 0) return false;
  const int64_t count = static_cast<int64_t>(layers_.size());
  if (has_query() ? layer_ >= count : layer_ > count) return false;
  if (has_rows() && layer_ == 0) return false;
  const int64_t rows = has_rows() ? rows_bytes(*of_) : 0, query = has_query() ? query_bytes(*of_) : 0;
  frame_bytes_ = header_bytes + query + 2 * rows + trailer_bytes;
  return header.lengths[0] == 0 && header.lengths[1] == query && header.lengths[2] == rows &&
         header.lengths[3] == rows;
}

bool Exchange::is_whole() const {
  const int64_t payload = frame_bytes_ - header_bytes - trailer_bytes;
  uint32_t expected;
  std::memcpy(&expected, incoming_.bytes() + header_bytes + payload, 4);
  return crc32c(incoming_.bytes() + header_bytes, payload) == expected;
}

void Exchange::append() {
  const double began_s = now_s();
  const Cache& cache = layers_[layer_ - 1];
  const int64_t count = static_cast<int64_t>(of_->slots.size());
  const int64_t stride = cache.shape.kv_heads * cache.shape.head_size * element_bytes(row_type(cache.shape));
  const uint8_t* key = incoming_.bytes() + header_bytes + (has_query() ? query_bytes(*of_) : 0);
  write_rows(cache, of_->slots.data(), count, {key, stride}, {key + count * stride, stride}, terms_.threads);
  compute_s_ += now_s() - began_s;
}

void Exchange::attend() {
  const double began_s = now_s();
  Attention work{};
  work.cache = layers_[layer_];
  const Shape& shape = work.cache.shape;
  work.query = incoming_.bytes() + header_bytes;
  work.out = reinterpret_cast<float*>(outgoing_.bytes() + header_bytes);
  work.lse = work.out + of_->rows * terms_.query_heads * shape.head_size;
  work.query_type = row_type(shape);
  work.query_heads = terms_.query_heads;
  work.window = window_;
  work.scale = terms_.scale;
  run_plan(of_->plan, work, level_, terms_.threads, of_->rows);
  compute_s_ += now_s() - began_s;
}

std::string Exchange::reply() {
  const double began_s = now_s();
  const int64_t lse = of_->rows * terms_.query_heads * 4, out = lse * layers_[0].shape.head_size;
  Header header{};
  std::memcpy(header.magic, "ANBR", 4);
  header.wire_version = static_cast<uint16_t>(terms_.wire_version);
  header.kind = kind_partial;
  header.incarnation = terms_.incarnation;
  header.step = of_->step;
  header.micro_batch = static_cast<uint16_t>(micro_batch_);
  header.layer = static_cast<uint16_t>(layer_);
  header.lengths[0] = static_cast<uint32_t>(out);
  header.lengths[1] = static_cast<uint32_t>(lse);
  header.compute_s = compute_s_;
  header.transfer_s = moving_s_;
  header.checksum = checksum_of(header);
  uint8_t* frame = outgoing_.bytes();
  std::memcpy(frame, &header, sizeof(header));
  const uint32_t checksum = crc32c(frame + header_bytes, out + lse);
  std::memcpy(frame + header_bytes + out + lse, &checksum, 4);
  const int64_t bytes = header_bytes + out + lse + trailer_bytes;
  const int64_t left = std::max<ssize_t>(0, send(terms_.socket, frame, bytes, MSG_DONTWAIT | MSG_NOSIGNAL));
  sent_ += left;
  finish();
  moving_s_ = now_s() - began_s;
  return std::string(reinterpret_cast<const char*>(frame) + left, bytes - left);
}

void Exchange::finish() {
  filled_ -= frame_bytes_;
  std::memmove(incoming_.bytes(), incoming_.bytes() + frame_bytes_, filled_);
  busy_s_ += compute_s_;
}

double Exchange::take_busy() { return std::exchange(busy_s_, 0.0); }
int64_t Exchange::take_received() { return std::exchange(received_, 0); }
int64_t Exchange::take_sent() { return std::exchange(sent_, 0); }

}  // namespace anabranch
