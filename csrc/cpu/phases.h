// Work in phases inside one parallel region: a phase starts when all tasks of the one before are done.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace shufflenet::cpu {

// Calls task(phase, i) for i in [0, tasks) of each phase in turn, on torch's threads. Threads claim tasks as they come,
// and only ever wait for tasks that some running thread has claimed: so it ends even if the pool runs all of it on one
// thread, as it does inside another parallel region. Waiting threads give up their core after a short spin.
template <class Task>
void run_phases(int64_t tasks, int64_t phases, const Task& task) {
  struct alignas(64) Progress {
    std::atomic<int64_t> claimed{0};
    std::atomic<int64_t> done{0};
  };
  struct Done {  // counts the task even if it throws, so that nobody waits for it forever
    std::atomic<int64_t>& count;
    ~Done() { count.fetch_add(1, std::memory_order_release); }
  };
  constexpr int kSpins = 2000;  // some microseconds: longer than balanced tasks differ, shorter than a time slice
  std::vector<Progress> progress(phases);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t, int64_t) {
    for (int64_t phase = 0; phase < phases; ++phase) {
      Progress& p = progress[phase];
      for (;;) {
        const int64_t i = p.claimed.fetch_add(1, std::memory_order_relaxed);
        if (i >= tasks) break;
        const Done done{p.done};
        task(phase, i);
      }
      for (int spins = 0; p.done.load(std::memory_order_acquire) < tasks; ++spins) {
        if (spins >= kSpins) std::this_thread::yield();
      }
    }
  });
}

}  // namespace shufflenet::cpu
