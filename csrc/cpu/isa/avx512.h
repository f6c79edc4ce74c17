// AVX-512 (F, BW, DQ, VL): 32 registers, masked loads and stores that never touch a masked-out lane.
// Included inside a region compiled for it or for an ISA that has it too; see avx512.cpp.
#pragma once

namespace shufflenet::cpu::SHUFFLENET_ISA {

inline constexpr int kVectorBytes = 64;
inline constexpr int kRegisters = 32;
inline constexpr bool kMasksHalves = true;  // loads and stores of 16-bit elements

template <class A>
struct Intrinsics;

template <>
struct Intrinsics<float> {
  using V = __m512;
  using Mask = __mmask16;
  static Mask mask(uint32_t bits) { return static_cast<Mask>(bits); }
  static V load(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
  static void store(float* p, V v, Mask m) { _mm512_mask_storeu_ps(p, m, v); }
  typedef uint16_t Halves __attribute__((vector_size(32)));
  static Halves load_halves(const void* p, Mask m) { return reinterpret_cast<Halves>(_mm256_maskz_loadu_epi16(m, p)); }
  static void store_halves(void* p, Halves v, Mask m) { _mm256_mask_storeu_epi16(p, m, reinterpret_cast<__m256i>(v)); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  // Masked though every lane is kept: the plain intrinsic sets off a false -Wuninitialized in GCC 12.
  static V max(V a, V b) { return _mm512_maskz_max_ps(0xffff, a, b); }
  static V keep(V v, Mask m) { return _mm512_maskz_mov_ps(m, v); }
};

template <>
struct Intrinsics<double> {
  using V = __m512d;
  using Mask = __mmask8;
  static Mask mask(uint32_t bits) { return static_cast<Mask>(bits); }
  static V load(const double* p, Mask m) { return _mm512_maskz_loadu_pd(m, p); }
  static void store(double* p, V v, Mask m) { _mm512_mask_storeu_pd(p, m, v); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
  static V max(V a, V b) { return _mm512_maskz_max_pd(0xff, a, b); }
  static V keep(V v, Mask m) { return _mm512_maskz_mov_pd(m, v); }
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
