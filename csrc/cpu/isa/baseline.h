// The compiler's vector extension at 16 bytes: what every x86-64 has (SSE2), and any other processor but AArch64, whose
// baseline is NEON.
#pragma once

namespace shufflenet::cpu::baseline {

inline constexpr int kVectorBytes = 16;
inline constexpr int kRegisters = 16;
inline constexpr bool kMasksHalves = false;  // loads and stores of 16-bit elements

template <class A>
struct Intrinsics {
  static constexpr int kLanes = kVectorBytes / sizeof(A);
  typedef A V __attribute__((vector_size(kVectorBytes)));
  using Integer = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  typedef Integer Mask __attribute__((vector_size(kVectorBytes)));

  static Mask mask(uint32_t bits) {
    Mask m = {};
    for (int i = 0; i < kLanes; ++i) m[i] = -static_cast<Integer>(bits >> i & 1);
    return m;
  }
  static V load(const A* p, Mask m) {
    V v = {};
    for (int i = 0; i < kLanes; ++i) {
      if (m[i]) v[i] = p[i];
    }
    return v;
  }
  static void store(A* p, V v, Mask m) {
    for (int i = 0; i < kLanes; ++i) {
      if (m[i]) p[i] = v[i];
    }
  }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V max(V a, V b) { return a > b ? a : b; }  // b where either is NaN, as the x86 instruction
  static V keep(V v, Mask m) { return reinterpret_cast<V>(reinterpret_cast<Mask>(v) & m); }
};

}  // namespace shufflenet::cpu::baseline
