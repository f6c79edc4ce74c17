// The names of csrc/cuda/matrices.cuh for the CPU, on host_device.h's machine.
#pragma once

#include "host_device.h"

namespace shufflenet::cuda {

inline uint32_t shared_base() { return 0; }

struct alignas(16) Fragment {
  uint32_t words[4];
};
struct Vector4 {
  float values[4];
};
struct alignas(8) FloatPair {
  float low, high;
};
inline uint32_t bits_of(float value) { return bits_as<uint32_t>(value); }
inline float float_of(uint32_t bits) { return bits_as<float>(bits); }
inline int unknown(int number) { return number; }
template <int kAhead = 0>
Fragment load_constant(const Fragment* from) {
  return from[kAhead];
}

template <int kAhead>
uint32_t load_word(const Fragment* from) {
  return from[kAhead].words[0];
}

template <int kAhead>
Vector4 load_floats(const Fragment* from) {
  return bits_as<Vector4>(from[kAhead]);
}

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

template <int kBytes>
void copy_unit_async(uint32_t to, const void* from) {
  copy_async<kBytes>(Shared<uint16_t>(to), static_cast<const uint16_t*>(from), true);
}
template <int kBytes>
void store_unit(void* to, uint32_t from) {
  struct alignas(kBytes) Unit {
    char bytes[kBytes];
  };
  if (reinterpret_cast<uintptr_t>(to) % kBytes) Machine::fail("a global address not aligned to %d", kBytes);
  const Unit unit = detail::load_shared<Unit>(from);
  std::memcpy(to, &unit, kBytes);
}
inline void clear_block(uint32_t at) { detail::store_shared(at, Fragment{}); }
template <int kOffset = 0>
uint32_t load_pair(uint32_t at) {
  return detail::load_shared<uint32_t>(at + kOffset);
}
template <int kOffset>
void store_pair(uint32_t at, uint32_t pair) {
  detail::store_shared(at + kOffset, pair);
}
template <int kOffset = 0>
uint16_t load_element(uint32_t at) {
  return detail::load_shared<uint16_t>(at + kOffset);
}
template <class Element>
void store_element(uint32_t at, Element value) {
  detail::store_shared(at, value);
}
template <int kOffset>
FloatPair load_float_pair(uint32_t at) {
  return detail::load_shared<FloatPair>(at + kOffset);
}
template <int kOffset>
void store_pair(uint32_t at, FloatPair pair) {
  detail::store_shared(at + kOffset, pair);
}
template <int kOffset>
Vector4 load_shared_floats(uint32_t at) {
  return bits_as<Vector4>(detail::load_shared<Fragment>(at + kOffset));
}
template <int kOffset>
void load_fragment(uint32_t (&words)[4], uint32_t at) {
  const Fragment f = detail::load_shared<Fragment>(at + kOffset);
  std::memcpy(words, f.words, sizeof words);
}
template <int kOffset>
void store_fragment(uint32_t at, const Fragment& f) {
  detail::store_shared(at + kOffset, f);
}

template <int kOffset, int kMatrices>
void load_matrices(uint32_t (&to)[kMatrices], uint32_t row, int line = __builtin_LINE()) {
  detail::load_matrices<kMatrices>(to, row + kOffset, false, line);
}

inline void load_transposed(uint32_t (&to)[4], uint32_t row, int line = __builtin_LINE()) {
  detail::load_matrices<4>(to, row, true, line);
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

inline uint32_t from_lane(uint32_t value, int lane, int line = __builtin_LINE()) {
  struct Lane {
    uint32_t value;
    int from;
    uint32_t received;
  } mine = {value, lane, 0};
  Machine::current()->warp_wide(line, &mine, [](void** lanes) {
    for (int i = 0; i < 32; ++i) {
      Lane& to = *static_cast<Lane*>(lanes[i]);
      to.received = static_cast<Lane*>(lanes[to.from])->value;
    }
  });
  return mine.received;
}

inline bool warp_any(bool value, int line = __builtin_LINE()) {
  struct Lane {
    bool value;
  } mine = {value};
  Machine::current()->warp_wide(line, &mine, [](void** lanes) {
    bool any = false;
    for (int i = 0; i < 32; ++i) any = any || static_cast<Lane*>(lanes[i])->value;
    for (int i = 0; i < 32; ++i) static_cast<Lane*>(lanes[i])->value = any;
  });
  return mine.value;
}

template <class T>
void set_to_product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T, int line = __builtin_LINE()) {
  for (float& value : d) value = 0;
  multiply_matrices(d, a, b, T{}, line);
}
inline void multiply_matrices(float (&d)[4], const uint32_t (&a)[2], uint32_t b, BFloat16,
                              int line = __builtin_LINE()) {
  detail::multiply_16_bit<8, BFloat16>(d, a, &b, line);
}

// ---- Pairs of neighbouring numbers ----------------------------------------------------------------------------------------

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
template <bool kRelu>
FloatPair pack(float low, float high, TFloat32) {
  return kRelu ? FloatPair{relu(low), relu(high)} : FloatPair{low, high};
}
template <class Element>
void store_one(void* to, Element value) {
  std::memcpy(to, &value, sizeof value);
}
template <int kOffset, class Pair>
void store_pairs(void* to, Pair low, Pair high) {
  char* const into = static_cast<char*>(to) + kOffset;
  const Pair pairs[2] = {low, high};
  if (reinterpret_cast<uintptr_t>(into) % sizeof pairs) {
    Machine::fail("a global address not aligned to %d", static_cast<int>(sizeof pairs));
  }
  std::memcpy(into, pairs, sizeof pairs);
}
// The sum of two 16-bit numbers is rounded to float first. Only bfloat16's sums may then differ from those that are
// rounded once, and by less than float's rounding.
template <class T>
uint32_t add_relu(uint32_t a, uint32_t b, T) {
  const auto one = [&](int i) { return relu(detail::half_of<T>(a, i) + detail::half_of<T>(b, i)); };
  return detail::pair_of<T>(one(0), one(1));
}
template <int kOffset, class T>
void add_relu_to(uint32_t at, uint32_t& pair, T) {
  pair = add_relu(pair, load_pair<kOffset>(at), T{});
}
template <int kOffset>
void add_relu_to(uint32_t at, FloatPair& pair, TFloat32) {
  const FloatPair x = load_float_pair<kOffset>(at);
  pair = {relu(pair.low + x.low), relu(pair.high + x.high)};
}
template <int kOffset, class T>
void add_relu_to(uint32_t at, uint32_t& low, uint32_t& high, T) {
  const uint64_t x = detail::load_shared<uint64_t>(at + kOffset);
  low = add_relu(low, static_cast<uint32_t>(x), T{});
  high = add_relu(high, static_cast<uint32_t>(x >> 32), T{});
}

template <int kOffset>
void add_relu_to(uint32_t at, FloatPair& low, FloatPair& high, TFloat32) {
  const Vector4 x = load_shared_floats<kOffset>(at);
  low = {relu(low.low + x.values[0]), relu(low.high + x.values[1])};
  high = {relu(high.low + x.values[2]), relu(high.high + x.values[3])};
}

}  // namespace shufflenet::cuda
