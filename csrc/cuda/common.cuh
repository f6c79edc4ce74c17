// What kernels have in common: numbers, where a thread is, and the parameters of a convolution.
#pragma once

#ifdef SHUFFLENET_TEST_DEVICE
#include SHUFFLENET_TEST_DEVICE
#else
#include "device.cuh"
#endif

#include "tiling.h"

namespace shufflenet::cuda {

template <class T>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <class T>
using accumulator_t = typename AccumulatorOf<T>::Type;

template <class T, int kSize>
struct alignas(kSize * sizeof(T)) Vector {
  T elements[kSize];
};

SHUFFLENET_DEVICE int least(int a, int b) { return a < b ? a : b; }
SHUFFLENET_DEVICE int most(int a, int b) { return a > b ? a : b; }
// Return numbers that the compiler knows to be no less than 0: dividing them by a power of two is one shift.
SHUFFLENET_DEVICE int warp_index() { return static_cast<int>(static_cast<uint32_t>(thread_index()) / 32); }
SHUFFLENET_DEVICE int lane_index() { return static_cast<int>(static_cast<uint32_t>(thread_index()) % 32); }

template <class T>
SHUFFLENET_DEVICE accumulator_t<T> read(const Parameter& parameter, int i) {
  if (parameter.is_float32) return static_cast<const float*>(parameter.data)[i];
  return widen(static_cast<const T*>(parameter.data)[i]);
}

template <class A>
struct Affine {
  A scale, bias;
};

template <class T>
SHUFFLENET_DEVICE Affine<accumulator_t<T>> affine(const ConvolutionPointers& conv, int channel) {
  using A = accumulator_t<T>;
  const A bias = conv.bias.data ? read<T>(conv.bias, channel) : A{0};
  if (!conv.norm_mean.data) return {A{1}, bias};
  const A weight = conv.norm_weight.data ? read<T>(conv.norm_weight, channel) : A{1};
  const A scale = weight / square_root(read<T>(conv.norm_var, channel) + static_cast<A>(conv.eps));
  const A norm_bias = conv.norm_bias.data ? read<T>(conv.norm_bias, channel) : A{0};
  return {scale, norm_bias - (read<T>(conv.norm_mean, channel) - bias) * scale};
}

}  // namespace shufflenet::cuda
