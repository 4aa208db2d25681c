// Threads that compute the parts of one call. They sleep between calls: other processes share the cores.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace anabranch {

class Pool {
 public:
  // The pool of this process; a forked child has one of its own.
  static Pool& get();

  // Run work(0) .. work(parts - 1), the first on the calling thread. A second caller at the same time
  // runs all of its parts itself: the result is the same.
  void run(int parts, const std::function<void(int)>& work);

 private:
  void serve();

  std::mutex one_call_;
  std::mutex mutex_;
  std::condition_variable wake_, finished_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* work_ = nullptr;
  int next_ = 0, parts_ = 0;
  std::atomic<int> running_{0};
};

}  // namespace anabranch
