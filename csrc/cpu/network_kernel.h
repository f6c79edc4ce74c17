// A network's head, and its table of kernels, written once over Simd<A>.
#pragma once

#include "stem_kernel.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// ---- Head -----------------------------------------------------------------------------------------------------------

// The means of some channels over the window.
template <class A>
void window_means(const Head& head, const void* x, int64_t x_plane, Channels channels, void* means) {
  using S = Simd<A>;
  // A whole plane is one run of pixels.
  const bool whole = head.window_height == head.height && head.window_width == head.width;
  const int64_t rows = whole ? 1 : head.window_height;
  const int64_t columns = whole ? head.height * head.width : head.window_width;
  const A pixels = static_cast<A>(head.window_height * head.window_width);
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    const A* const plane = static_cast<const A*>(x) + c * x_plane;
    typename S::V sum = {};
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; column += S::kLanes) {
        sum += S::load(plane + row * head.width + column, S::first(columns - column));
      }
    }
    static_cast<A*>(means)[c] = S::sum(sum) / pixels;
  }
}

// Some classes of the linear layer for some images: a vector of sums for each pair of them, which share what is loaded.
inline constexpr int kLinearClasses = kRegisters == 32 ? 4 : 2;
inline constexpr int kLinearImages = 4;
static_assert(kLinearClasses * kLinearImages + kLinearClasses + 1 <= kRegisters, "the sums must fit the registers");

// Adds the products of a vector of channels, the first of which are at `weights` and `means`.
template <class A, bool HasTail, int Images>
inline void add_linear_products(const A* const* weights, const A* const* means, int64_t channel,
                                typename Simd<A>::Mask tail, typename Simd<A>::V (&sums)[kLinearClasses][Images]) {
  using S = Simd<A>;
  typename S::V w[kLinearClasses];
#pragma GCC unroll 4
  for (int c = 0; c < kLinearClasses; ++c) {
    w[c] = HasTail ? S::load(weights[c] + channel, tail) : S::load(weights[c] + channel);
  }
#pragma GCC unroll 4
  for (int i = 0; i < Images; ++i) {
    const auto x = HasTail ? S::load(means[i] + channel, tail) : S::load(means[i] + channel);
#pragma GCC unroll 4
    for (int c = 0; c < kLinearClasses; ++c) sums[c][i] = S::fma(w[c], x, sums[c][i]);
  }
}

// The last class stands in for those behind it.
template <class T, int Images>
void linear_tile(const Head& head, const Convolution& layer, const accumulator_t<T>* x, Channels classes, T* result) {
  using A = accumulator_t<T>;
  using S = Simd<A>;
  const A* weights[kLinearClasses];
  const A* means[Images];
  for (int c = 0; c < kLinearClasses; ++c) {
    weights[c] = static_cast<const A*>(layer.weight) + std::min(classes.begin + c, classes.end - 1) * head.channels;
  }
  for (int i = 0; i < Images; ++i) means[i] = x + i * head.channels;
  typename S::V sums[kLinearClasses][Images] = {};
  int64_t channel = 0;
  for (; channel + S::kLanes <= head.channels; channel += S::kLanes) {
    add_linear_products<A, false>(weights, means, channel, S::first(S::kLanes), sums);
  }
  if (channel < head.channels) {
    add_linear_products<A, true>(weights, means, channel, S::first(head.channels - channel), sums);
  }
#pragma GCC unroll 4
  for (int c = 0; c < kLinearClasses; ++c) {
#pragma GCC unroll 4
    for (int i = 0; i < Images; ++i) {
      const int64_t row = classes.begin + c;
      if (row >= classes.end) continue;
      const A value = S::sum(sums[c][i]) + static_cast<const A*>(layer.bias)[row];
      store_first(result + i * head.classes + row, S::broadcast(value), 1);
    }
  }
}

// Some classes of the linear layer for all images. Weights are the most that it reads: those of a tile are used for
// every image while they are in the L1 cache.
template <class T>
void linear(const Head& head, const Convolution& layer, const void* means, int64_t images, Channels classes,
            void* result) {
  for (; classes.begin < classes.end; classes.begin += kLinearClasses) {
    for (int64_t image = 0; image < images;) {
      const auto* const x = static_cast<const accumulator_t<T>*>(means) + image * head.channels;
      T* const to = static_cast<T*>(result) + image * head.classes;
      if (image + kLinearImages <= images) {
        linear_tile<T, kLinearImages>(head, layer, x, classes, to);
        image += kLinearImages;
      } else {
        linear_tile<T, 1>(head, layer, x, classes, to);
        ++image;
      }
    }
  }
}

// ---- The most that can be had ---------------------------------------------------------------------------------------

// As many independent chains as a tile of a pointwise convolution has, but no loads.
template <class A>
int64_t multiply_add(int64_t rounds) {
  using S = Simd<A>;
  constexpr int kChains = kTileChannels * kTileVectors;
  typename S::V sums[kChains];
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) sums[i] = S::broadcast(static_cast<A>(i));
  // Sums stay between 0 and kChains: no denormals, no infinity.
  const typename S::V scale = S::broadcast(A(0.5)), shift = S::broadcast(1);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) sums[i] = S::fma(sums[i], scale, shift);
  }
  // Whatever the compiler knows of the sums, it must have them here.
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) {
    volatile A sink = S::sum(sums[i]);
    (void)sink;
  }
  return rounds * kChains * S::kLanes;
}

template <class T>
constexpr NetworkKernel network_kernel_for() {
  using A = accumulator_t<T>;
  return {stem_kernel_for<T>(), window_means<A>, linear<T>, multiply_add<A>};
}

inline NetworkKernel network_kernel(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64: return network_kernel_for<double>();
    case Dtype::bfloat16: return network_kernel_for<BFloat16>();
    case Dtype::float16: return network_kernel_for<Float16>();
    default: return network_kernel_for<float>();
  }
}

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
