// In the place of torch's header, for tests without torch: what run_phases takes of it, on threads of its own.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

inline uint32_t num_threads = 1;
inline uint32_t get_num_threads() { return num_threads; }

// A thread for each index, none of which starts before all are there: short tasks would else be done by the first.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  std::atomic<int64_t> missing{end - begin};
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; ++i) {
    threads.emplace_back([&f, &missing, i] {
      --missing;
      while (missing > 0) std::this_thread::yield();
      f(i, i + 1);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace torch::stable
