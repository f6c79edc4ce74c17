// Runs phases whose tasks read all that the phase before has written, for ThreadSanitizer to watch: a task that starts
// too early is a data race, whatever it happens to read. Run by run_races.sh.
//
// Usage: race_phases [rounds] [seed]
#include <cstdio>
#include <cstdlib>
#include <random>

#include "../../csrc/cpu/schedule/phases.h"

using namespace shufflenet::cpu;

int main(int argc, char** argv) {
  const long rounds = argc > 1 ? std::atol(argv[1]) : 200;
  std::mt19937 generator(argc > 2 ? std::atol(argv[2]) : 0);
  const auto uniform = [&](int64_t lowest, int64_t highest) {
    return std::uniform_int_distribution<int64_t>(lowest, highest)(generator);
  };
  for (long round = 0; round < rounds; ++round) {
    torch::stable::num_threads = static_cast<uint32_t>(uniform(1, 6));
    // Phases go back and forth between two arrays, as steps do between two images.
    std::vector<uint64_t> arrays[2] = {std::vector<uint64_t>(8, 1), std::vector<uint64_t>(8)};
    uint64_t expected = 8;  // the sum of what the last phase wrote
    int64_t tasks = 8;
    CallMemory memory;
    Phases phases(memory);
    for (int64_t p = 0, count = uniform(1, 12); p < count; ++p) {
      const int64_t before = tasks;
      tasks = uniform(1, 8);
      const std::vector<uint64_t>& from = arrays[p % 2];
      std::vector<uint64_t>& to = arrays[1 - p % 2];
      phases.add(p, tasks, [&from, &to, before](int64_t i) {
        std::this_thread::yield();  // lets others go on, who should wait
        uint64_t total = 0;
        for (int64_t j = 0; j < before; ++j) total += from[j];
        to[i] = total + static_cast<uint64_t>(i);
      });
      expected = static_cast<uint64_t>(tasks) * expected + static_cast<uint64_t>(tasks * (tasks - 1) / 2);
    }
    run_phases(phases);
    uint64_t sum = 0;
    for (int64_t i = 0; i < tasks; ++i) sum += arrays[phases.list().size() % 2][i];
    if (sum != expected) {
      std::fprintf(stderr, "round %ld: the last phase wrote %llu in all, expected %llu\n", round,
                   static_cast<unsigned long long>(sum), static_cast<unsigned long long>(expected));
      return 1;
    }
  }
  std::printf("phases: %ld rounds\n", rounds);
  return 0;
}
