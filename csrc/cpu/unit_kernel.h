// The unit, written once over Simd<A>. Pixels lie along the vectors and weights are broadcast, so any number of
// channels and groups fills the lanes. Three phases on a Part, each of which can be split by channels (kernels.h):
//
//   stage    copies the part's rows of x into planes of the accumulator type; nothing to do where x is that already
//   expand   conv1 from x to y1 (scratch); then the depthwise convolution from y1, with its halo rows, to y2 (or to the
//            result, where the unit ends here), the shuffle being the order in which it writes its channels; with
//            stride 2 also the pooled shortcut, from x to the result
//   project  conv3 from y2, adding the residual, to the result
//
// Where x is contiguous and of the accumulator's type it is read, and the result written, in place. Otherwise the
// result's planes are copied out at the end of a phase.
#pragma once

#include "unit_strips.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

inline int64_t expand_multiple(const Unit&) { return 1; }

template <class T>
constexpr UnitKernel kernel_for() {
  using A = accumulator_t<T>;
  return {
      sizeof(T),
      1,
      expand_multiple,
      1,
      buffer_bytes<T>,
      is_staged<T>,
      stage<T>,
      scratch_bytes<T>,
      expand<T>,
      project<T>,
      strip_bytes<A>,
      lent_bytes<A>,
      strip_scratch_bytes<A>,
      expand_strip<A>,
      project_strip<A>,
      tile<A>,
      to_accumulator<T>};
}

inline UnitKernel unit_kernel(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64: return kernel_for<double>();
    case Dtype::bfloat16: return kernel_for<BFloat16>();
    case Dtype::float16: return kernel_for<Float16>();
    default: return kernel_for<float>();
  }
}

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
