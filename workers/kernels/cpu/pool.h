// Threads that compute the parts of one call. They sleep between calls, for other processes share the cores; where
// none does, they may ask for the next call for a moment before: to wake one takes as long as a small call.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace anabranch {

// Numbers that are worth a thread: waking one takes as long as some ten thousand.
constexpr int64_t part_numbers = 65536;

class Pool {
 public:
  // The pool of this process; a forked child has one of its own.
  static Pool& get();

  // Run work(0) .. work(parts - 1), the first on the calling thread. A second caller at the same time
  // runs all of its parts itself: the result is the same.
  void run(int parts, const std::function<void(int)>& work);

  // Whether threads ask before they sleep.
  void let_spin(bool may) { may_spin_ = may; }

 private:
  void serve();
  void await_call() const;

  std::mutex one_call_;
  std::mutex mutex_;
  std::condition_variable wake_, finished_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* work_ = nullptr;
  int next_ = 0, parts_ = 0;
  std::atomic<int> running_{0};
  std::atomic<bool> has_parts_{false}, may_spin_{false};
};

}  // namespace anabranch
