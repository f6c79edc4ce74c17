// All kernels on planes of floats, and the Isa that has them.
#pragma once

#include "format_floats.h"
#include "head.h"
#include "last_convolution.h"
#include "stem.h"
#include "stem_training.h"
#include "training.h"
#include "unit.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

template <class T>
inline constexpr KernelsOf<UnitOf<FloatFormat<T>>, FloatStem<T>, FloatLastConvolution<T>, FloatHead<T>, FloatImages<T>>
    kFloatKernels{};
template <class T>
inline constexpr TrainingOfFloats<T> kTrainingKernels{};
template <class T>
inline constexpr StemTrainingOf<T> kStemTrainingKernels{};

// Does rounds of multiply-adds: as many independent chains as a tile of a pointwise convolution has, but no loads.
template <class A>
int64_t run_multiply_adds(int64_t rounds) {
  using S = Simd<A>;
  constexpr int kChains = kTileChannels * kTileVectors;
  typename S::V sums[kChains];
  unrolled<kChains>([&](int i) { sums[i] = S::broadcast(static_cast<A>(i)); });
  // Sums stay between 0 and kChains: no denormals, no infinity.
  const typename S::V scale = S::broadcast(A(0.5)), shift = S::broadcast(1);
  for (int64_t round = 0; round < rounds; ++round) {
    unrolled<kChains>([&](int i) { sums[i] = S::fma(sums[i], scale, shift); });
  }
  // Whatever the compiler knows of the sums, it must have them here.
  unrolled<kChains>([&](int i) {
    volatile A sink = S::sum(sums[i]);
    (void)sink;
  });
  return rounds * kChains * S::kLanes;
}

class FloatIsa : public Isa {
 public:
  const Kernels& kernels(Dtype dtype) const override {
    switch (dtype) {
      case Dtype::float64: return kFloatKernels<double>;
      case Dtype::bfloat16: return kFloatKernels<BFloat16>;
      case Dtype::float16: return kFloatKernels<Float16>;
      default: return kFloatKernels<float>;
    }
  }

  const TrainingKernel& training(Dtype dtype) const override {
    switch (dtype) {
      case Dtype::float64: return kTrainingKernels<double>;
      case Dtype::bfloat16: return kTrainingKernels<BFloat16>;
      case Dtype::float16: return kTrainingKernels<Float16>;
      default: return kTrainingKernels<float>;
    }
  }
  const StemTrainingKernel& stem_training(Dtype dtype) const override {
    switch (dtype) {
      case Dtype::float64: return kStemTrainingKernels<double>;
      case Dtype::bfloat16: return kStemTrainingKernels<BFloat16>;
      case Dtype::float16: return kStemTrainingKernels<Float16>;
      default: return kStemTrainingKernels<float>;
    }
  }

  void to_accumulator(Dtype dtype, const void* from, void* to, int64_t n) const override {
    switch (dtype) {
      case Dtype::bfloat16: return widen<BFloat16>(from, to, n);
      case Dtype::float16: return widen<Float16>(from, to, n);
      default: std::memcpy(to, from, n * (dtype == Dtype::float64 ? sizeof(double) : sizeof(float)));
    }
  }

  int64_t multiply_add(Dtype dtype, int64_t rounds) const override {
    return dtype == Dtype::float64 ? run_multiply_adds<double>(rounds) : run_multiply_adds<float>(rounds);
  }
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
