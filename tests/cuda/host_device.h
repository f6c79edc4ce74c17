// The names of csrc/cuda/device.cuh for the CPU: a block's threads run as fibers, one at a time, in an order drawn anew
// between barriers. Any of these ends the program with a message:
//
//   - a barrier or a warp-wide instruction that not all threads (lanes) reach, or not at the same place;
//   - a read of a byte of shared memory that was never written, or that an asynchronous copy is still filling;
//   - an access outside of the block's shared memory, or not aligned to its size;
//   - two threads that touch a byte of shared memory between the same two barriers (of the block, or of the warp that
//   both
//     belong to), one of them to write it.
//
// Global memory is the program's own: AddressSanitizer guards it, where compiled in.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#ifndef __SANITIZE_ADDRESS__  // whose runtime has these, which tell it that the stack is another one
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#else
#include <sanitizer/common_interface_defs.h>
#endif

#define SHUFFLENET_DEVICE inline
#define SHUFFLENET_UNROLL
#define SHUFFLENET_NO_UNROLL

namespace shufflenet::cuda {

// ---- The machine ----------------------------------------------------------------------------------------------------

class Machine {
 public:
  static Machine*& current() {
    static Machine* machine = nullptr;
    return machine;
  }

  Machine(int threads, int64_t shared_bytes, uint64_t seed)
      : shared(shared_bytes), shadow_(shared_bytes), fibers_(threads), warps_(threads / 32), random_(seed) {
    for (Fiber& fiber : fibers_) fiber.stack.reset(new char[kStackBytes]);
  }

  // Runs `kernel` for every thread of each block of a grid.
  void launch(int64_t blocks, const std::function<void()>& kernel) {
    current() = this;
    kernel_ = kernel;
    block_count = blocks;
    for (block_index = 0; block_index < blocks; ++block_index) run_block();
    current() = nullptr;
  }

  template <class... Parts>
  [[noreturn]] static void fail(const char* format, Parts... parts) {
    std::fprintf(stderr, "host_device: ");
    std::fprintf(stderr, format, parts...);
    std::fprintf(stderr, "\n");
    std::fflush(nullptr);
    std::_Exit(3);
  }

  int thread() const { return running_; }

  void barrier(int line) {
    fibers_[running_].state = State::at_barrier;
    fibers_[running_].line = line;
    to_scheduler();
  }

  // The last lane of the warp to arrive runs `complete` for all of them; `arguments` are each lane's own.
  void warp_wide(int line, void* arguments, const std::function<void(void** lanes)>& complete) {
    Warp& warp = warps_[running_ / 32];
    if (warp.arrived == 0) warp.line = line;
    if (warp.line != line)
      fail("lanes of a warp at different warp-wide instructions, lines %d and %d", warp.line, line);
    warp.arguments[running_ % 32] = arguments;
    if (++warp.arrived < 32) {
      fibers_[running_].state = State::in_warp;
      fibers_[running_].line = line;
      to_scheduler();
      return;
    }
    complete(warp.arguments);
    warp.arrived = 0;
    const int first = running_ / 32 * 32;
    for (int i = first; i < first + 32; ++i) fibers_[i].state = State::ready;
  }

  void warp_barrier(int line) {
    warp_wide(line, nullptr, [this](void**) { ++warps_[running_ / 32].epoch; });
  }

  void check_access(int64_t offset, int64_t bytes, int64_t alignment) const {
    if (offset < 0 || offset + bytes > static_cast<int64_t>(shared.size())) {
      fail("thread %d: shared memory [%ld, %ld) is outside of the block's %zu bytes", running_, offset, offset + bytes,
           shared.size());
    }
    if (offset % alignment != 0)
      fail("thread %d: shared memory at %ld, not aligned to %ld", running_, offset, alignment);
  }
  void note_read(int64_t offset, int64_t bytes) {
    for (int64_t i = offset; i < offset + bytes; ++i) {
      Shadow& byte = shadow_[i];
      if (byte.filling) fail("thread %d: read of shared byte %ld, which an asynchronous copy is filling", running_, i);
      if (byte.writer < 0) fail("thread %d: read of shared byte %ld, which was never written", running_, i);
      if (byte.write_epoch == epoch_ && byte.writer != running_ && !ordered(byte.writer / 32, byte.write_warp_epoch)) {
        fail("thread %d: race: read of shared byte %ld, written by thread %d since the last barrier", running_, i,
             byte.writer);
      }
      const int warp = running_ / 32;
      byte.reader = byte.read_epoch != epoch_ || byte.reader == running_ ? running_ : kSeveral;
      byte.reader_warp = byte.read_epoch != epoch_ || byte.reader_warp == warp ? warp : kSeveral;
      byte.read_warp_epoch = warps_[warp].epoch;
      byte.read_epoch = epoch_;
    }
  }
  void note_write(int64_t offset, int64_t bytes) {
    for (int64_t i = offset; i < offset + bytes; ++i) {
      Shadow& byte = shadow_[i];
      if (byte.write_epoch == epoch_ && byte.writer != running_ && !ordered(byte.writer / 32, byte.write_warp_epoch)) {
        fail("thread %d: race: write of shared byte %ld, written by thread %d since the last barrier", running_, i,
             byte.writer);
      }
      if (byte.read_epoch == epoch_ && byte.reader != running_ && !ordered(byte.reader_warp, byte.read_warp_epoch)) {
        fail("thread %d: race: write of shared byte %ld, read by another thread since the last barrier", running_, i);
      }
      byte.writer = running_;
      byte.write_epoch = epoch_;
      byte.write_warp_epoch = warps_[running_ / 32].epoch;
      byte.filling = false;
    }
  }

  // Asynchronous copies land when they are waited for, not before; until then their target may not be read.
  void start_copy(int64_t to, const void* from, int valid, int bytes) {
    Copy copy = {to, std::vector<char>(bytes)};
    std::memcpy(copy.data.data(), from, valid);
    note_write(to, bytes);
    for (int64_t i = to; i < to + bytes; ++i) shadow_[i].filling = true;
    fibers_[running_].open.push_back(std::move(copy));
  }
  void commit_copies() {
    Fiber& fiber = fibers_[running_];
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
  }
  void wait_copies(size_t pending) {
    Fiber& fiber = fibers_[running_];
    while (fiber.groups.size() > pending) {
      for (const Copy& copy : fiber.groups.front()) {
        std::memcpy(shared.data() + copy.to, copy.data.data(), copy.data.size());
        note_write(copy.to, static_cast<int64_t>(copy.data.size()));
      }
      fiber.groups.erase(fiber.groups.begin());
    }
  }

  std::vector<char> shared;
  int64_t block_index = 0, block_count = 0;

 private:
  static constexpr size_t kStackBytes = 256 * 1024;  // AddressSanitizer's frames are large
  static constexpr int kSeveral = -2;
  enum class State { ready, at_barrier, in_warp, done };
  struct Copy {
    int64_t to;
    std::vector<char> data;
  };
  struct Fiber {
    std::unique_ptr<char[]> stack;
    ucontext_t context;
    void* fake_stack = nullptr;
    State state = State::ready;
    int line = 0;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
  };
  struct Warp {
    int arrived = 0, line = 0;
    int64_t epoch = 0;  // counts the warp's own barriers
    void* arguments[32];
  };
  struct Shadow {
    int writer = -1, reader = -1, reader_warp = -1;
    int64_t write_epoch = -1, read_epoch = -1, write_warp_epoch = -1, read_warp_epoch = -1;
    bool filling = false;
  };

  // Whether the running thread's own warp did it, before a barrier of the warp.
  bool ordered(int warp, int64_t warp_epoch) const { return warp == running_ / 32 && warp_epoch < warps_[warp].epoch; }

  void run_block() {
    ++epoch_;
    std::fill(shadow_.begin(), shadow_.end(), Shadow{});
    std::memset(shared.data(), 0xff, shared.size());  // a NaN in every dtype
    for (Fiber& fiber : fibers_) {
      fiber.state = State::ready;
      getcontext(&fiber.context);
      fiber.context.uc_stack = {fiber.stack.get(), 0, kStackBytes};
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Machine::start_fiber, 0);
    }
    std::vector<int> order(fibers_.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
    while (true) {
      std::shuffle(order.begin(), order.end(), random_);
      bool ran = false;
      for (int thread : order) {
        if (fibers_[thread].state != State::ready) continue;
        ran = true;
        to_fiber(thread);
      }
      if (!ran && !release_barrier()) return;
    }
  }

  // False where the block is done.
  bool release_barrier() {
    const Fiber& first = fibers_[0];
    for (const Fiber& fiber : fibers_) {
      if (fiber.state == State::in_warp) fail("a warp-wide instruction, line %d, that not all lanes reach", fiber.line);
      if (fiber.state != first.state || (fiber.state == State::at_barrier && fiber.line != first.line)) {
        fail("a barrier, line %d, that not all threads reach", std::max(fiber.line, first.line));
      }
    }
    if (first.state == State::done) {
      for (const Fiber& fiber : fibers_) {
        if (!fiber.open.empty()) fail("a thread ended with copies that it never committed");
      }
      for (Fiber& fiber : fibers_) fiber.groups.clear();
      return false;
    }
    for (Fiber& fiber : fibers_) fiber.state = State::ready;
    ++epoch_;
    return true;
  }

  void to_fiber(int thread) {
    running_ = thread;
    Fiber& fiber = fibers_[thread];
    __sanitizer_start_switch_fiber(&scheduler_fake_stack_, fiber.stack.get(), kStackBytes);
    swapcontext(&scheduler_, &fiber.context);
    __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
  }
  void to_scheduler(bool ends = false) {
    Fiber& fiber = fibers_[running_];
    __sanitizer_start_switch_fiber(ends ? nullptr : &fiber.fake_stack, scheduler_stack_, scheduler_stack_bytes_);
    swapcontext(&fiber.context, &scheduler_);
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
  }
  static void start_fiber() {
    Machine& machine = *current();
    __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack_, &machine.scheduler_stack_bytes_);
    machine.kernel_();
    machine.fibers_[machine.running_].state = State::done;
    machine.to_scheduler(/*ends=*/true);
  }

  std::vector<Shadow> shadow_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::mt19937_64 random_;
  std::function<void()> kernel_;
  ucontext_t scheduler_;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  int running_ = 0;
  int64_t epoch_ = 0;
};

// ---- Types ----------------------------------------------------------------------------------------------------------

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct TFloat32 {
  float value;
};

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(Float16 value) { return static_cast<float>(bits_as<_Float16>(value.bits)); }
inline float widen(BFloat16 value) { return bits_as<float>(uint32_t{value.bits} << 16); }
inline float widen(TFloat32 value) { return value.value; }
inline void narrow(float value, float& to) { to = value; }
inline void narrow(float value, TFloat32& to) { to.value = value; }
inline void narrow(double value, double& to) { to = value; }
inline void narrow(float value, Float16& to) { to.bits = bits_as<uint16_t>(static_cast<_Float16>(value)); }
inline void narrow(float value, BFloat16& to) {
  const uint32_t bits = bits_as<uint32_t>(value);
  to.bits = static_cast<uint16_t>(value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline double multiply_add(double a, double b, double c) { return std::fma(a, b, c); }
inline float relu(float value) { return value < 0 ? 0 : value; }
inline double relu(double value) { return value < 0 ? 0 : value; }
inline float square_root(float value) { return std::sqrt(value); }
inline double square_root(double value) { return std::sqrt(value); }

// ---- Threads and shared memory --------------------------------------------------------------------------------------

inline int thread_index() { return Machine::current()->thread(); }
inline int64_t block_index() { return Machine::current()->block_index; }
inline int64_t block_count() { return Machine::current()->block_count; }
inline void barrier(int line = __builtin_LINE()) { Machine::current()->barrier(line); }
inline void warp_barrier(int line = __builtin_LINE()) { Machine::current()->warp_barrier(line); }

template <class T>
class Shared {
 public:
  using Value = std::remove_const_t<T>;

  class Reference {
   public:
    explicit Reference(int64_t offset) : offset_(offset) {}
    operator Value() const {
      Machine& machine = *Machine::current();
      machine.check_access(offset_, sizeof(T), alignof(T));
      machine.note_read(offset_, sizeof(T));
      Value value;
      std::memcpy(&value, machine.shared.data() + offset_, sizeof(T));
      return value;
    }
    const Reference& operator=(const Value& value) const {
      static_assert(!std::is_const_v<T>);
      Machine& machine = *Machine::current();
      machine.check_access(offset_, sizeof(T), alignof(T));
      machine.note_write(offset_, sizeof(T));
      std::memcpy(machine.shared.data() + offset_, &value, sizeof(T));
      return *this;
    }
    const Reference& operator=(const Reference& other) const { return *this = static_cast<Value>(other); }
    Reference(const Reference&) = default;

   private:
    int64_t offset_;
  };

  explicit Shared(int64_t offset) : offset(offset) {}
  template <class U, class = std::enable_if_t<std::is_same_v<const U, T> && !std::is_same_v<U, T>>>
  Shared(Shared<U> other) : offset(other.offset) {}
  Shared operator+(int64_t n) const { return Shared(offset + n * static_cast<int64_t>(sizeof(T))); }
  Reference operator[](int64_t i) const { return Reference((*this + i).offset); }

  int64_t offset;  // in bytes
};

template <class U, class T>
Shared<U> shared_as(Shared<T> p) {
  return Shared<U>(p.offset);
}

inline Shared<char> shared_memory() { return Shared<char>(0); }
template <class T>
Shared<T> shared_at(Shared<char> memory, int64_t offset) {
  return Shared<T>(memory.offset + offset);
}

template <int kBytes, class T>
void copy_async(Shared<T> to, const T* from, bool valid) {
  static_assert(kBytes == 16 || kBytes == 8 || kBytes == 4);
  Machine& machine = *Machine::current();
  machine.check_access(to.offset, kBytes, kBytes);
  if (valid && reinterpret_cast<uintptr_t>(from) % kBytes) Machine::fail("a global address not aligned to %d", kBytes);
  machine.start_copy(to.offset, from, valid ? kBytes : 0, kBytes);
}
inline void commit_copies() { Machine::current()->commit_copies(); }
template <int kPending>
void wait_copies() {
  Machine::current()->wait_copies(kPending);
}

// ---- Warp-wide matrix instructions ----------------------------------------------------------------------------------

namespace detail {

struct LoadLane {
  uint32_t* to;
  int64_t row;
};

template <int kMatrices>
void load_matrices(uint32_t* to, int64_t row, bool transposed, int line) {
  LoadLane mine = {to, row};
  Machine& machine = *Machine::current();
  machine.warp_wide(line, &mine, [&](void** lanes) {
    const auto lane_of = [&](int i) -> LoadLane& { return *static_cast<LoadLane*>(lanes[i]); };
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      uint16_t elements[8][8];
      for (int i = 0; i < 8; ++i) {
        const int64_t at = lane_of(8 * matrix + i).row;
        machine.check_access(at, 16, 16);
        machine.note_read(at, 16);
        std::memcpy(elements[i], machine.shared.data() + at, 16);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int i = lane / 4, j = lane % 4 * 2;
        const uint32_t low = transposed ? elements[j][i] : elements[i][j];
        const uint32_t high = transposed ? elements[j + 1][i] : elements[i][j + 1];
        lane_of(lane).to[matrix] = low | high << 16;
      }
    }
  });
}

}  // namespace detail

template <bool kTransposed, class T>
void load_matrices(uint32_t (&to)[4], Shared<const T> row, int line = __builtin_LINE()) {
  detail::load_matrices<4>(to, row.offset, kTransposed, line);
}
// The architecture that the kernel is compiled for, as __CUDA_ARCH__ / 10 is in device.cuh.
#ifndef SHUFFLENET_TEST_ARCH
#define SHUFFLENET_TEST_ARCH 90
#endif
template <class T>
inline constexpr bool kHasMma = false;
template <>
inline constexpr bool kHasMma<Float16> = true;
template <>
inline constexpr bool kHasMma<BFloat16> = SHUFFLENET_TEST_ARCH >= 80;
template <>
inline constexpr bool kHasMma<TFloat32> = SHUFFLENET_TEST_ARCH >= 80;
inline constexpr bool kHasMmaK16 = SHUFFLENET_TEST_ARCH >= 80;

inline uint32_t bits_of(TFloat32 value) { return bits_as<uint32_t>(value.value); }

// cvt.rna.tf32.f32: to nearest, halves away from zero.
inline uint32_t round_to_tf32(uint32_t bits) {
  const bool is_finite = (bits >> 23 & 0xff) != 0xff;
  return is_finite ? (bits + 0x1000) & ~uint32_t{0x1fff} : bits;
}
template <class T, int kRegisters>
void round_operands(uint32_t (&registers)[kRegisters]) {
  if constexpr (std::is_same_v<T, TFloat32>) {
    for (uint32_t& bits : registers) bits = round_to_tf32(bits);
  }
}

namespace detail {

// d += a b, of 16 x kDepth and kDepth x 8: place(lane, registers of a, of b, a, b) puts a lane's elements where the
// instruction takes them from.
template <int kDepth, class Place>
void multiply_matrices(float* d, const uint32_t* a, const uint32_t* b, int line, const Place& place) {
  struct Lane {
    float* d;
    const uint32_t *a, *b;
  } mine = {d, a, b};
  Machine::current()->warp_wide(line, &mine, [&](void** lanes) {
    float a[16][kDepth], b[kDepth][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Lane& from = *static_cast<Lane*>(lanes[lane]);
      place(lane, from.a, from.b, a, b);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const Lane& to = *static_cast<Lane*>(lanes[lane]);
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + (i >= 2) * 8, column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
        to.d[i] += sum;
      }
    }
  });
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "... for mma.m16n8k8" (.f16), with groupID
// = lane / 4 and threadID_in_group = lane % 4:
//   a: element i of a lane is row groupID (+ 8 for i = 2, 3, 6, 7), column 2 * threadID_in_group + i % 2 (+ 8 for i >=
//   4); b: row 2 * threadID_in_group + i % 2 (+ 8 for i >= 2), column groupID; c and d (16 x 8): row groupID (+ 8 for i
//   >= 2), column 2 * threadID_in_group + i % 2. k8 has the elements that k16 has in its first eight columns of a.
template <int kDepth, class T>
void multiply_16_bit(float* d, const uint32_t* a, const uint32_t* b, int line) {
  multiply_matrices<kDepth>(
      d, a, b, line, [](int lane, const uint32_t* from_a, const uint32_t* from_b, auto& a, auto& b) {
        const auto element = [](const uint32_t* registers, int i) {
          return widen(T{static_cast<uint16_t>(registers[i / 2] >> (i % 2 * 16))});
        };
        for (int i = 0; i < kDepth / 2; ++i) {
          a[lane / 4 + (i / 2 % 2) * 8][lane % 4 * 2 + i % 2 + (i >= 4) * 8] = element(from_a, i);
        }
        for (int i = 0; i < kDepth / 4; ++i) b[lane % 4 * 2 + i % 2 + (i >= 2) * 8][lane / 4] = element(from_b, i);
      });
}

}  // namespace detail

template <class T>
void multiply_matrices(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T, int line = __builtin_LINE()) {
  static_assert(sizeof(T) == 2 && kHasMmaK16);
  detail::multiply_16_bit<16, T>(d, a, b, line);
}
inline void multiply_matrices(float (&d)[4], const uint32_t (&a)[2], uint32_t b, Float16, int line = __builtin_LINE()) {
  detail::multiply_16_bit<8, Float16>(d, a, &b, line);
}

// PTX ISA, "Matrix Fragments for mma.m16n8k8" (.tf32): a: element i is row groupID (+ 8 for i = 1, 3), column
// threadID_in_group (+ 4 for i >= 2); b: row threadID_in_group (+ 4 for i = 1), column groupID; c and d as above.
inline void multiply_matrices(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], TFloat32,
                              int line = __builtin_LINE()) {
  const auto place = [](int lane, const uint32_t* from_a, const uint32_t* from_b, auto& a, auto& b) {
    const auto element = [](uint32_t bits) {
      if (bits != round_to_tf32(bits)) Machine::fail("an operand that was not rounded to TF32");
      return bits_as<float>(bits);
    };
    for (int i = 0; i < 4; ++i) a[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = element(from_a[i]);
    for (int i = 0; i < 2; ++i) b[lane % 4 + i * 4][lane / 4] = element(from_b[i]);
  };
  detail::multiply_matrices<8>(d, a, b, line, place);
}

}  // namespace shufflenet::cuda
