// Work in phases inside one parallel region: a phase starts when all tasks of the one before are done.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <numeric>
#include <thread>
#include <vector>

#include "memory.h"

namespace shufflenet::cpu {

inline constexpr int64_t kTimedInside = -1;  // of a phase whose tasks account for their time themselves

struct Phase {
  int64_t step;  // whose time it is; see Profile
  int64_t tasks;
  const void* work;
  void (*run_task)(const void* work, int64_t task);
};

// Phases with their work, which is in a CallMemory.
class Phases {
 public:
  explicit Phases(CallMemory& memory) : memory_(memory) { phases_.reserve(64); }  // a network's

  // run(task) runs one of so many tasks.
  template <class Run>
  void add(int64_t step, int64_t tasks, const Run& run) {
    const auto run_task = [](const void* work, int64_t task) { (*static_cast<const Run*>(work))(task); };
    phases_.push_back({step, tasks, memory_.make<Run>(run), run_task});
  }

  CallMemory& memory() const { return memory_; }
  const std::vector<Phase>& list() const { return phases_; }

 private:
  CallMemory& memory_;
  std::vector<Phase> phases_;
};

// Seconds by step.
struct Profile {
  std::vector<double> seconds;
  void add(int64_t step, double time) {
    if (static_cast<size_t>(step) >= seconds.size()) seconds.resize(step + 1);
    seconds[step] += time;
  }
  double total() const { return std::accumulate(seconds.begin(), seconds.end(), 0.0); }
};
// Adds up the calls that a thread makes while it has one. A phase takes from the end of the one before to the end of
// its last task. Of a phase timed inside, what the thread measured that worked on it longest is taken.
inline thread_local Profile* current_profile = nullptr;

using Clock = std::chrono::steady_clock;
inline double seconds_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

// Adds the time that has gone by since the last lap to a step. Does nothing without a profile.
class Stopwatch {
 public:
  explicit Stopwatch(Profile* profile) : profile_(profile) {
    if (profile_) last_ = Clock::now();
  }
  void lap(int64_t step) {
    if (!profile_) return;
    const auto now = Clock::now();
    profile_->add(step, seconds_between(last_, now));
    last_ = now;
  }

 private:
  Profile* profile_;
  Clock::time_point last_;
};
// The thread's own, while it runs phases.
inline thread_local Stopwatch* current_stopwatch = nullptr;

// Runs all tasks of each phase in turn, on torch's threads. A thread first claims the tasks that are its share, which
// are the same ones in each phase that has as many (so that it finds its data in its caches), then what others have
// left. It only ever waits for tasks that some running thread has claimed: so this ends even if the pool runs all of it
// on one thread, as it does inside another parallel region. Waiting threads give up their core after a short spin.
inline void run_phases(const Phases& given) {
  const std::vector<Phase>& phases = given.list();
  struct alignas(64) Claim {
    std::atomic<bool> taken{false};
  };
  struct alignas(64) Progress {
    std::atomic<int64_t> done{0};
    Clock::time_point end;  // of the last task, where there is a profile
  };
  constexpr int kSpins = 2000;  // some microseconds: longer than balanced tasks differ, shorter than a time slice
  int64_t tasks = 0, widest = 0;
  for (const Phase& phase : phases) {
    tasks += phase.tasks;
    widest = std::max(widest, phase.tasks);
  }
  Claim* const claims = given.memory().array<Claim>(tasks);
  Progress* const progress = given.memory().array<Progress>(static_cast<int64_t>(phases.size()));
  std::uninitialized_default_construct_n(claims, tasks);
  std::uninitialized_default_construct_n(progress, phases.size());
  const int64_t workers = std::min<int64_t>(widest, torch::stable::get_num_threads());
  Profile* const profile = current_profile;
  struct Done {  // counts the task even if it throws, so that nobody waits for it forever
    Progress& phase;
    int64_t tasks;
    bool timed;
    ~Done() {
      if (phase.done.fetch_add(1, std::memory_order_acq_rel) + 1 == tasks && timed) phase.end = Clock::now();
    }
  };
  Clock::time_point end;  // of the phase before
  if (profile) end = Clock::now();
  Profile longest;
  std::mutex longest_mutex;
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    Profile own;
    Stopwatch stopwatch(profile ? &own : nullptr);
    current_stopwatch = &stopwatch;
    Claim* claim = claims;
    for (size_t p = 0; p < phases.size(); ++p) {
      const Phase& phase = phases[p];
      const int64_t first = phase.tasks * worker / workers;
      for (int64_t j = 0; j < phase.tasks; ++j) {
        const int64_t i = first + j < phase.tasks ? first + j : first + j - phase.tasks;
        if (claim[i].taken.load(std::memory_order_relaxed) || claim[i].taken.exchange(true)) continue;
        const Done done{progress[p], phase.tasks, profile != nullptr};
        phase.run_task(phase.work, i);
      }
      claim += phase.tasks;
      for (int spins = 0; progress[p].done.load(std::memory_order_acquire) < phase.tasks; ++spins) {
        if (spins >= kSpins) std::this_thread::yield();
      }
    }
    if (profile) {
      const std::lock_guard<std::mutex> lock(longest_mutex);
      if (own.total() > longest.total()) longest = std::move(own);
    }
  });
  if (!profile) return;
  for (size_t p = 0; p < phases.size(); ++p) {
    if (phases[p].step != kTimedInside) profile->add(phases[p].step, seconds_between(end, progress[p].end));
    end = progress[p].end;
  }
  for (size_t step = 0; step < longest.seconds.size(); ++step) {
    profile->add(static_cast<int64_t>(step), longest.seconds[step]);
  }
}

}  // namespace shufflenet::cpu
