// AVX2 and FMA: 16 registers; a mask is a vector of integers, all ones where a lane is kept.
// Included inside a region compiled for this ISA; see avx2.cpp.
#pragma once

namespace shufflenet::cpu::avx2 {

inline constexpr int kVectorBytes = 32;
inline constexpr int kRegisters = 16;
inline constexpr bool kMasksHalves = false;  // loads and stores of 16-bit elements

template <class A>
struct Intrinsics;

template <>
struct Intrinsics<float> {
  using V = __m256;
  using Mask = __m256i;
  static Mask mask(uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
  }
  static V load(const float* p, Mask m) { return _mm256_maskload_ps(p, m); }
  static void store(float* p, V v, Mask m) { _mm256_maskstore_ps(p, m, v); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static V keep(V v, Mask m) { return _mm256_and_ps(v, _mm256_castsi256_ps(m)); }
};

template <>
struct Intrinsics<double> {
  using V = __m256d;
  using Mask = __m256i;
  static Mask mask(uint32_t bits) {
    const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
    return _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(bits), lane), lane);
  }
  static V load(const double* p, Mask m) { return _mm256_maskload_pd(p, m); }
  static void store(double* p, V v, Mask m) { _mm256_maskstore_pd(p, m, v); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
  static V max(V a, V b) { return _mm256_max_pd(a, b); }
  static V keep(V v, Mask m) { return _mm256_and_pd(v, _mm256_castsi256_pd(m)); }
};

}  // namespace shufflenet::cpu::avx2
