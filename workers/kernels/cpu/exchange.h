// The messages of one lane that nobody has to look at: a layer's keys, values and query of a step whose plan
// stands. They are read from the socket, checked, and answered here, because Python that runs after each walk
// over a cache finds its own memory displaced by it and takes several times as long. Whatever else arrives is handed on as
// it came. Frames are those that workers/lanes/frames.py draws, and mean what it says.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "plan.h"

namespace anabranch {

// The socket blocks, and reads come back after a while without bytes.
struct ExchangeTerms {
  int socket;
  uint64_t incarnation;
  int64_t wire_version, query_heads;
  float scale;
  int threads;
  double spin_s;  // how long to ask for bytes before sleeping
};

// Memory that begins 48 bytes after a line, so that what follows a frame's header of 80 begins with one.
class FrameMemory {
 public:
  explicit FrameMemory(int64_t bytes);
  uint8_t* bytes() const { return memory_.get() + before; }
  int64_t size() const { return size_; }

 private:
  static constexpr int64_t before = 48;
  int64_t size_;
  std::unique_ptr<uint8_t, decltype(&std::free)> memory_;
};

class Exchange {
 public:
  // layers: of one arena.
  Exchange(const ExchangeTerms& terms, std::vector<Cache> layers, const Level& level);

  // Messages of `step` are answered from now on: `rows` queries over the plan's spans; keys and values go to `slots`.
  // Throws std::invalid_argument for what lies outside the arena.
  void begin(int micro_batch, uint64_t step, const Plan& plan, int64_t rows, std::vector<int64_t> slots);
  void end(int micro_batch) { standing_.erase(micro_batch); }

  // The micro-batch of the next message; -1 where something else came, which `take` gives, or nothing for `wait_s`.
  int receive(double wait_s);
  // All bytes that came and are not answered, this message included. They are forgotten here.
  std::string take();

  // Of the message received. Its layer; rows are of the one before.
  int64_t layer() const { return layer_; }
  bool has_rows() const { return flags_ & flag_rows; }
  bool has_query() const { return flags_ & flag_query; }

  // Write its keys and values, then attend its query.
  void append();
  void attend();
  // Send the reply; what the socket would not take at once is returned. The message is done with.
  std::string reply();
  // The message is done with, and has no reply.
  void finish();

  // Seconds spent writing and attending, and bytes moved, since the last time.
  double take_busy();
  int64_t take_received();
  int64_t take_sent();

 private:
  struct Standing {
    uint64_t step;
    Plan plan;
    int64_t rows;
    std::vector<int64_t> slots;
  };

  static constexpr int flag_query = 2, flag_rows = 4;

  int64_t query_bytes(const Standing& standing) const;
  int64_t rows_bytes(const Standing& standing) const;
  bool wait(double wait_s);
  bool read(int flags);
  bool is_plain();
  bool is_whole() const;

  ExchangeTerms terms_;
  std::vector<Cache> layers_;
  const Level& level_;
  std::map<int, Standing> standing_;
  FrameMemory incoming_, outgoing_;
  int64_t filled_ = 0;  // bytes in `incoming_`, of which the first frame is the message
  // The message.
  const Standing* of_ = nullptr;
  int micro_batch_ = 0, flags_ = 0;
  int64_t layer_ = 0, window_ = 0, frame_bytes_ = 0;
  double came_s_ = 0, compute_s_ = 0, moving_s_ = 0, busy_s_ = 0;
  int64_t received_ = 0, sent_ = 0;
};

}  // namespace anabranch
