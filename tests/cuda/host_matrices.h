// The names of csrc/cuda/matrices.cuh for the CPU, on host_device.h's machine.
#pragma once

#include "host_device.h"

namespace shufflenet::cuda {

inline uint32_t shared_base() { return 0; }

struct alignas(16) Fragment {
  uint32_t words[4];
};
inline float float_of(uint32_t bits) { return bits_as<float>(bits); }
inline uint32_t bits_of(float value) { return bits_as<uint32_t>(value); }
inline Fragment load_constant(const Fragment* from) { return *from; }

inline void copy_block_async(uint32_t to, const void* from) {
  copy_async<16>(Shared<uint16_t>(to), static_cast<const uint16_t*>(from), true);
}

namespace detail {

template <class Value>
Value load_shared(int64_t at) {
  Machine& machine = *Machine::current();
  machine.check_access(at, sizeof(Value), sizeof(Value));
  machine.note_read(at, sizeof(Value));
  Value value;
  std::memcpy(&value, machine.shared.data() + at, sizeof(Value));
  return value;
}
template <class Value>
void store_shared(int64_t at, const Value& value) {
  Machine& machine = *Machine::current();
  machine.check_access(at, sizeof(Value), sizeof(Value));
  machine.note_write(at, sizeof(Value));
  std::memcpy(machine.shared.data() + at, &value, sizeof(Value));
}

}  // namespace detail

inline void clear_block(uint32_t at) { detail::store_shared(at, Fragment{}); }
inline uint32_t load_pair(uint32_t at) { return detail::load_shared<uint32_t>(at); }
template <int kOffset>
void load_two_pairs(uint32_t (&to)[2], uint32_t at) {
  const uint64_t pairs = detail::load_shared<uint64_t>(at + kOffset);
  to[0] = static_cast<uint32_t>(pairs);
  to[1] = static_cast<uint32_t>(pairs >> 32);
}

template <int kOffset, int kMatrices>
void load_matrices(uint32_t (&to)[kMatrices], uint32_t row, int line = __builtin_LINE()) {
  detail::load_matrices<kMatrices>(to, row + kOffset, false, line);
}

template <int kMatrices>
void store_matrices(uint32_t row, const uint32_t (&from)[kMatrices], int line = __builtin_LINE()) {
  struct Lane {
    const uint32_t* from;
    uint32_t row;
  } mine = {from, row};
  Machine::current()->warp_wide(line, &mine, [](void** lanes) {
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      for (int i = 0; i < 8; ++i) {
        Fragment elements;
        for (int j = 0; j < 4; ++j) elements.words[j] = static_cast<Lane*>(lanes[4 * i + j])->from[matrix];
        detail::store_shared(static_cast<Lane*>(lanes[8 * matrix + i])->row, elements);
      }
    }
  });
}

inline void store_two_pairs(void* to, const uint32_t (&from)[2]) {
  if (reinterpret_cast<uintptr_t>(to) % 8) Machine::fail("a global address not aligned to 8");
  std::memcpy(to, from, 8);
}

inline bool barrier_or(bool value, int line = __builtin_LINE()) { return Machine::current()->barrier_or(value, line); }

inline void multiply_matrices(float (&d)[4], const uint32_t (&a)[2], uint32_t b, BFloat16,
                              int line = __builtin_LINE()) {
  detail::multiply_16_bit<8, BFloat16>(d, a, &b, line);
}

// ---- Pairs of 16-bit numbers ----------------------------------------------------------------------------------------

namespace detail {

template <class T>
float half_of(uint32_t pair, int i) {
  return widen(T{static_cast<uint16_t>(pair >> 16 * i)});
}
template <class T>
uint32_t pair_of(float low, float high) {
  T first, second;
  narrow(low, first);
  narrow(high, second);
  return first.bits | uint32_t{second.bits} << 16;
}

}  // namespace detail

template <bool kRelu, class T>
uint32_t pack(float low, float high, T) {
  return kRelu ? detail::pair_of<T>(relu(low), relu(high)) : detail::pair_of<T>(low, high);
}
// The sum of two 16-bit numbers is rounded to float first. Only bfloat16's sums may then differ from those that are
// rounded once, and by less than float's rounding.
template <class T>
uint32_t add_relu(uint32_t a, uint32_t b, T) {
  const auto sum = [&](int i) { return relu(detail::half_of<T>(a, i) + detail::half_of<T>(b, i)); };
  return detail::pair_of<T>(sum(0), sum(1));
}
template <class T>
uint32_t greater(uint32_t a, uint32_t b, T) {
  const auto most = [&](int i) {
    const float x = detail::half_of<T>(a, i), y = detail::half_of<T>(b, i);
    return x != x || x > y ? x : y;
  };
  return detail::pair_of<T>(most(0), most(1));
}

}  // namespace shufflenet::cuda
