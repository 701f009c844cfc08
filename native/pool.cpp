#include "pool.h"

#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace millicent {
namespace {

constexpr int kTaskBits = 20;
constexpr uint64_t kTaskMask = (1ULL << kTaskBits) - 1;
constexpr int kSpins = 1000;  // about 20 to 40 microseconds

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");  // about as long as x86's pause; yield is a no-op on most cores
#endif
}

// Spins for a moment, then parks until the value is no longer old.
uint32_t wait_for_change(const std::atomic<uint32_t>& value, uint32_t old) {
  for (int spin = 0; spin < kSpins; spin++) {
    const uint32_t now = value.load(std::memory_order_acquire);
    if (now != old) return now;
    pause();
  }
  value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

}  // namespace

Pool::~Pool() { stop(); }

void Pool::stop() {
  stopping_.store(true, std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
  stopping_.store(false, std::memory_order_relaxed);
}

int Pool::resize(int threads) {
  if (threads != this->threads()) {
    stop();
    try {
      while (this->threads() < threads) workers_.emplace_back(&Pool::work, this);
    } catch (const std::system_error&) {
      // The system has no more threads to give: the answer tells how many there are.
    }
  }
  return this->threads();
}

// Takes one task of the current round and does it; false when none is left.
bool Pool::take_task() {
  const uint64_t seen = ticket_.load(std::memory_order_acquire);
  if ((seen & kTaskMask) >= ((seen >> kTaskBits) & kTaskMask)) return false;
  const uint64_t ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
  const uint64_t task = ticket & kTaskMask;
  const uint64_t tasks = (ticket >> kTaskBits) & kTaskMask;
  if (task >= tasks) return false;
  call_(context_, static_cast<int64_t>(task));
  if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == tasks) done_.notify_one();
  return true;
}

void Pool::work() {
  uint32_t round = round_.load(std::memory_order_acquire);
  while (!stopping_.load(std::memory_order_relaxed)) {
    while (take_task()) {
    }
    round = wait_for_change(round_, round);
  }
}

void Pool::run_tasks(int64_t tasks, Call call, const void* context) {
  call_ = call;
  context_ = context;
  done_.store(0, std::memory_order_relaxed);
  const uint64_t next_round = (ticket_.load(std::memory_order_relaxed) >> (2 * kTaskBits)) + 1;
  ticket_.store(next_round << (2 * kTaskBits) | static_cast<uint64_t>(tasks) << kTaskBits, std::memory_order_release);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  while (take_task()) {
  }
  for (uint32_t done = done_.load(std::memory_order_acquire); done != static_cast<uint32_t>(tasks);) {
    done = wait_for_change(done_, done);
  }
}

}  // namespace millicent
