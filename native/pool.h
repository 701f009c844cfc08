// The library's own threads. They take tasks of one loop at a time and park in the kernel when there is none: between
// two loops of a forward pass they spin for some tens of microseconds, never longer, because the gateway shares the cores.
#ifndef MILLICENT_KERNELS_POOL_H
#define MILLICENT_KERNELS_POOL_H

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace millicent {

class Pool {
 public:
  Pool() = default;
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Answers the number of threads there are now, the caller's included.
  int resize(int threads);
  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(i) for each i below tasks (under 2^20), on any thread and in any order; returns when all are done.
  template <typename Body>
  void run(int64_t tasks, const Body& body) {
    if (tasks <= 1 || workers_.empty()) {
      for (int64_t i = 0; i < tasks; i++) body(i);
      return;
    }
    run_tasks(tasks, [](const void* context, int64_t i) { (*static_cast<const Body*>(context))(i); }, &body);
  }

 private:
  using Call = void (*)(const void* context, int64_t task);

  void run_tasks(int64_t tasks, Call call, const void* context);
  bool take_task();
  void work();
  void stop();

  // Round number, number of tasks and next task in one word: whoever takes a number knows from the word alone whether
  // there was a task behind it, and only then looks at call_ and context_, which stay until that task is done.
  std::atomic<uint64_t> ticket_{0};
  std::atomic<uint32_t> round_{0};
  std::atomic<uint32_t> done_{0};
  std::atomic<bool> stopping_{false};
  Call call_ = nullptr;
  const void* context_ = nullptr;
  std::vector<std::thread> workers_;
};

}  // namespace millicent
#endif
