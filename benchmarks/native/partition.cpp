// Measures on two cores what csrc/cpu's choose_partition counts by, for ../partition.py: ./partition CORE OTHER_CORE
//
// Prints a line for each quantity: its name, then what each round measured, in seconds or in bytes a second. The units
// that these loops stand for are those of ShuffleNet 1x with three groups at 224 x 224.
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int kRounds = 41;
constexpr int64_t kLineBytes = 64;
// The images of stage 3, whose planes start at a cache line.
constexpr int64_t kPlanes = 480, kPlaneLines = 13;

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Makes the compiler take memory for used and changed, so that it drops no loop and moves none across.
void use_memory() { asm volatile("" ::: "memory"); }
template <class T>
void use(const T& value) {
  asm volatile("" ::"m"(value) : "memory");
}

void pin(int core) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  CPU_SET(core, &cores);
  if (pthread_setaffinity_np(pthread_self(), sizeof cores, &cores) != 0) {
    std::fprintf(stderr, "core: got %d, expected one that this process may run on\n", core);
    std::exit(1);
  }
}

// A point that both threads must reach before either goes on. It can be passed any number of times.
class Meeting {
 public:
  void wait() {
    const int64_t turn = arrivals_.fetch_add(1) / 2;
    while (arrivals_.load(std::memory_order_acquire) / 2 == turn) {
    }
  }

 private:
  alignas(kLineBytes) std::atomic<int64_t> arrivals_{0};
};

// Runs work(0) on the first core and work(1) on the second, at the same time.
template <class Work>
void on_both(const int (&cores)[2], const Work& work) {
  std::thread other([&] {
    pin(cores[1]);
    work(1);
  });
  pin(cores[0]);
  work(0);
  other.join();
}

void print(const std::string& name, const std::vector<double>& samples) {
  std::printf("%s:", name.c_str());
  for (double sample : samples) std::printf(" %.6g", sample);
  std::printf("\n");
}

// A cache line, as integers: their sums take a cycle, so that it is the loads that take time. Where vectors are
// narrower than a line, the compiler makes several of it.
using Line [[gnu::vector_size(kLineBytes)]] = uint32_t;

std::unique_ptr<Line[]> zeros(int64_t lines) { return std::unique_ptr<Line[]>(new Line[lines]()); }

// Returns the seconds that threads take to wait for each other between two phases. As in run_phases, each claims its
// own task, counts it as done, looks whether the other's is claimed and waits until both are done. Here, neither ever
// takes the other's task.
std::vector<double> wait_seconds(const int (&cores)[2]) {
  constexpr int64_t kPhases = 2000;
  struct alignas(kLineBytes) Claim {
    std::atomic<bool> taken{false};
  };
  struct alignas(kLineBytes) Progress {
    std::atomic<int64_t> done{0};
  };
  std::vector<double> samples;
  for (int round = 0; round < kRounds; ++round) {
    const std::unique_ptr<Claim[]> claims(new Claim[2 * kPhases]);
    const std::unique_ptr<Progress[]> progress(new Progress[kPhases]);
    Meeting start;
    on_both(cores, [&](int worker) {
      start.wait();
      const auto begin = Clock::now();
      for (int64_t p = 0; p < kPhases; ++p) {
        claims[2 * p + worker].taken.exchange(true);
        progress[p].done.fetch_add(1, std::memory_order_release);
        use(claims[2 * p + 1 - worker].taken.load(std::memory_order_relaxed));
        while (progress[p].done.load(std::memory_order_acquire) < 2) {
        }
      }
      if (worker == 0) samples.push_back(seconds_since(begin) / kPhases);
    });
  }
  return samples;
}

// Returns the bytes a second at which a thread reads what the other has just written: 480 planes of 14 x 14 floats, a
// line of each plane at a time, as conv1 goes through the channels of a few pixels.
std::vector<double> foreign_rate(const int (&cores)[2]) {
  const auto image = zeros(kPlanes * kPlaneLines);
  std::vector<double> samples;
  Meeting written, read;
  on_both(cores, [&](int worker) {
    Line sum = {};
    for (int round = 0; round < kRounds; ++round) {
      if (worker == 1) {
        for (int64_t i = 0; i < kPlanes * kPlaneLines; ++i) image[i] += 1;
        use_memory();
      }
      written.wait();
      if (worker == 0) {
        const auto begin = Clock::now();
        for (int64_t line = 0; line < kPlaneLines; ++line) {
          for (int64_t plane = 0; plane < kPlanes; ++plane) sum += image[plane * kPlaneLines + line];
        }
        use(sum);
        samples.push_back(kPlanes * kPlaneLines * kLineBytes / seconds_since(begin));
      }
      read.wait();
    }
  });
  return samples;
}

// Returns the seconds that a thread takes to add to half a line, after the other thread has added to the other half of
// the same line or, if not `shared`, to a line of its own. A unit does so in each plane that it cuts inside a line.
std::vector<double> line_seconds(const int (&cores)[2], bool shared) {
  using Half [[gnu::vector_size(kLineBytes / 2)]] = uint32_t;
  struct Halves {
    alignas(kLineBytes) Half half[2];
  };
  const std::unique_ptr<Halves[]> images(new Halves[2 * kPlanes * kPlaneLines]());
  std::vector<double> samples;
  Meeting others_turn, round_end;
  on_both(cores, [&](int worker) {
    Halves* const image = &images[shared ? 0 : worker * kPlanes * kPlaneLines];
    for (int round = 0; round < kRounds; ++round) {
      if (worker == 0) others_turn.wait();
      const auto begin = Clock::now();
      for (int64_t plane = 0; plane < kPlanes; ++plane) {
        image[plane * kPlaneLines].half[worker] += 1;
        use_memory();
      }
      if (worker == 0) samples.push_back(seconds_since(begin) / kPlanes);
      if (worker == 1) others_turn.wait();
      round_end.wait();
    }
  });
  return samples;
}

// Returns the bytes a second at which a thread reads so many bytes again and again, while the other thread does the
// same to bytes of its own or, where `together`, to the same ones.
std::vector<double> read_rate(const int (&cores)[2], int64_t bytes, bool together) {
  const int64_t lines = bytes / kLineBytes;
  const int64_t times = std::max<int64_t>(1, (16 << 20) / bytes);
  const auto memory = zeros((together ? 1 : 2) * lines);
  std::vector<double> samples;
  Meeting start;
  on_both(cores, [&](int worker) {
    const Line* const own = &memory[together ? 0 : worker * lines];
    Line sum = {};
    for (int round = -1; round < kRounds; ++round) {  // the first one brings the bytes into the caches
      start.wait();
      const auto begin = Clock::now();
      for (int64_t i = 0; i < times; ++i) {
        for (int64_t line = 0; line < lines; ++line) sum += own[line];
        use(sum);
      }
      if (worker == 0 && round >= 0) {
        samples.push_back(static_cast<double>(times * lines * kLineBytes) / seconds_since(begin));
      }
    }
  });
  return samples;
}

// Returns the seconds that the depthwise convolution takes for a float of its result, in planes of 28 x 28 floats: nine
// loads and nine multiply-adds a vector. The kernel's masks at the ends of rows are left out.
std::vector<double> depthwise_seconds() {
  using Floats [[gnu::vector_size(kLineBytes)]] = float;
  constexpr int64_t kLanes = kLineBytes / 4, kWidth = 28, kPixels = kWidth * kWidth, kTimes = 500;
  std::vector<float> x(kPixels + 2 * kWidth + 2, 1.0F), y(kPixels);
  Floats weight[9];
  for (int i = 0; i < 9; ++i) weight[i] = Floats{} + static_cast<float>(i);
  std::vector<double> samples;
  for (int round = 0; round < kRounds; ++round) {
    const auto begin = Clock::now();
    for (int64_t i = 0; i < kTimes; ++i) {
      for (int64_t p = 0; p < kPixels; p += kLanes) {
        Floats sum = {};
        for (int64_t tap = 0; tap < 9; ++tap) {
          Floats from;
          std::memcpy(&from, &x[p + tap / 3 * kWidth + tap % 3], sizeof from);
          sum += weight[tap] * from;
        }
        std::memcpy(&y[p], &sum, sizeof sum);
      }
      use_memory();
    }
    samples.push_back(seconds_since(begin) / (kTimes * kPixels));
  }
  return samples;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: partition CORE OTHER_CORE\n");
    return 1;
  }
  const int cores[2] = {std::atoi(arguments[1]), std::atoi(arguments[2])};
  pin(cores[0]);
  print("depthwise", depthwise_seconds());
  print("wait", wait_seconds(cores));
  print("foreign", foreign_rate(cores));
  print("own line", line_seconds(cores, false));
  print("shared line", line_seconds(cores, true));
  print("weights", read_rate(cores, 8 << 20, true));
  for (int64_t kib = 128; kib <= 4096; kib *= 2) {
    for (int64_t bytes : {kib * 1024, kib * 1536}) {
      print("read " + std::to_string(bytes / 1024), read_rate(cores, bytes, false));
    }
  }
}
