#include "pool.h"

#include <unistd.h>

namespace anabranch {

namespace {
// A part that ends about when the caller's does is not worth a sleep; some microseconds at most.
constexpr int spins_most = 2000;

// What lies between two products of a step, and a little more.
constexpr std::chrono::microseconds spin_time(300);

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}
}  // namespace

Pool& Pool::get() {
  // Never destroyed: its threads sleep until the process ends, and a fork leaves them behind.
  static std::mutex mutex;
  static Pool* pool = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> guard(mutex);
  if (pool == nullptr || owner != getpid()) {
    pool = new Pool();
    owner = getpid();
  }
  return *pool;
}

void Pool::run(int parts, const std::function<void(int)>& work) {
  std::unique_lock<std::mutex> call(one_call_, std::try_to_lock);
  if (parts < 2 || !call.owns_lock()) {
    for (int part = 0; part < parts; part++) work(part);
    return;
  }
  while ((int)threads_.size() < parts - 1) {
    threads_.emplace_back([this] { serve(); });
    threads_.back().detach();
  }
  {
    std::lock_guard<std::mutex> guard(mutex_);
    work_ = &work;
    next_ = 1;
    parts_ = parts;
    running_ = parts - 1;
    has_parts_.store(true, std::memory_order_release);
  }
  wake_.notify_all();
  work(0);
  for (int spin = 0; spin < spins_most && running_.load(std::memory_order_acquire) > 0; spin++) pause();
  std::unique_lock<std::mutex> guard(mutex_);
  finished_.wait(guard, [this] { return running_ == 0; });
}

void Pool::await_call() const {
  const auto end = std::chrono::steady_clock::now() + spin_time;
  while (may_spin_ && !has_parts_.load(std::memory_order_acquire) && std::chrono::steady_clock::now() < end) pause();
}

void Pool::serve() {
  std::unique_lock<std::mutex> guard(mutex_);
  for (;;) {
    guard.unlock();
    await_call();
    guard.lock();
    wake_.wait(guard, [this] { return next_ < parts_; });
    const int part = next_++;
    if (next_ == parts_) has_parts_.store(false, std::memory_order_release);
    const std::function<void(int)>& work = *work_;
    guard.unlock();
    work(part);
    guard.lock();
    if (--running_ == 0) finished_.notify_one();
  }
}

}  // namespace anabranch
