// All kernels of inference on planes of pairs. Included behind an ISA's headers of PairIntrinsics and of its Products.
#pragma once

#include "head_pairs.h"
#include "last_convolution_pairs.h"
#include "stem_pairs.h"
#include "unit.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

template <class T>
inline constexpr KernelsOf<UnitOf<PairFormat>, PairStem<T>, PairLastConvolution, PairHead<T>, PairImages<T>>
    kPairKernels{};

inline const Kernels& pair_kernels(Dtype dtype) {
  if (dtype == Dtype::bfloat16) return kPairKernels<BFloat16>;
  return kPairKernels<float>;
}

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
