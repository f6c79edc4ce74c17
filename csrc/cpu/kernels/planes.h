// Planes of pixels, and the memory they are cut from.
#pragma once

#include "simd.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// Channels as planes of pixels: channel c starts at data + c * stride.
template <class A>
struct Planes {
  A* data = nullptr;
  int64_t stride = 0;
  A* channel(int64_t c) const { return data + c * stride; }
  Planes from(int64_t c) const { return {channel(c), stride}; }
  Planes behind(int64_t pixels) const { return {data + pixels, stride}; }
};

template <class A>
Planes<const A> read_only(Planes<A> planes) {
  return {planes.data, planes.stride};
}

// Cuts memory into arrays, one behind the other; only counts where there is none.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class U>
  U* take(int64_t n) {
    U* const array = memory_ ? reinterpret_cast<U*>(memory_ + bytes_) : nullptr;
    bytes_ += ceil_div(n * static_cast<int64_t>(sizeof(U)), kMemoryAlignment) * kMemoryAlignment;
    return array;
  }
  // Each plane ends with a vector of slack: whole vectors are loaded and stored past its last pixel.
  template <class A>
  Planes<A> planes(int64_t channels, int64_t pixels) {
    constexpr int64_t kLineElements = kMemoryAlignment / sizeof(A);
    static_assert(kVectorBytes <= kMemoryAlignment, "a line holds a vector");
    const int64_t stride = plane_lines(ceil_div(pixels, kLineElements) + 1) * kLineElements;
    return {take<A>(channels * stride), stride};
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
