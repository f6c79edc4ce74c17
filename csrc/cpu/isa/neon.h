// NEON: 32 registers. It has no masked access, so a mask is a bit a lane. With all of them set, as most often, that is
// one access; otherwise one for each kept lane, behind branches that a loop over the depth takes alike each time.
// Included inside a region compiled for this ISA; see neon.cpp.
#pragma once

namespace shufflenet::cpu::neon {

inline constexpr int kVectorBytes = 16;
inline constexpr int kRegisters = 32;
inline constexpr bool kMasksHalves = false;  // loads and stores of 16-bit elements

template <class A>
struct Intrinsics;

template <>
struct Intrinsics<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  using Mask = uint32_t;
  static Mask mask(uint32_t bits) { return bits; }
  static V load(const float* p, Mask m) {
    if (__builtin_expect(m == 15, 1)) return vld1q_f32(p);
    V v = vdupq_n_f32(0);
    if (m & 1) v = vld1q_lane_f32(p, v, 0);
    if (m & 2) v = vld1q_lane_f32(p + 1, v, 1);
    if (m & 4) v = vld1q_lane_f32(p + 2, v, 2);
    if (m & 8) v = vld1q_lane_f32(p + 3, v, 3);
    return v;
  }
  static void store(float* p, V v, Mask m) {
    if (__builtin_expect(m == 15, 1)) return vst1q_f32(p, v);
    if (m & 1) vst1q_lane_f32(p, v, 0);
    if (m & 2) vst1q_lane_f32(p + 1, v, 1);
    if (m & 4) vst1q_lane_f32(p + 2, v, 2);
    if (m & 8) vst1q_lane_f32(p + 3, v, 3);
  }
  static V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
  static V max(V a, V b) { return vmaxq_f32(a, b); }
  static V keep(V v, Mask m) {
    const uint32x4_t kept = vtstq_u32(vdupq_n_u32(m), uint32x4_t{1, 2, 4, 8});
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), kept));
  }
};

template <>
struct Intrinsics<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  using Mask = uint32_t;
  static Mask mask(uint32_t bits) { return bits; }
  static V load(const double* p, Mask m) {
    if (__builtin_expect(m == 3, 1)) return vld1q_f64(p);
    V v = vdupq_n_f64(0);
    if (m & 1) v = vld1q_lane_f64(p, v, 0);
    if (m & 2) v = vld1q_lane_f64(p + 1, v, 1);
    return v;
  }
  static void store(double* p, V v, Mask m) {
    if (__builtin_expect(m == 3, 1)) return vst1q_f64(p, v);
    if (m & 1) vst1q_lane_f64(p, v, 0);
    if (m & 2) vst1q_lane_f64(p + 1, v, 1);
  }
  static V fma(V a, V b, V c) { return vfmaq_f64(c, a, b); }
  static V max(V a, V b) { return vmaxq_f64(a, b); }
  static V keep(V v, Mask m) {
    const uint64x2_t kept = vtstq_u64(vdupq_n_u64(m), uint64x2_t{1, 2});
    return vreinterpretq_f64_u64(vandq_u64(vreinterpretq_u64_f64(v), kept));
  }
};

}  // namespace shufflenet::cpu::neon
