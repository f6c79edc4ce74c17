// A network's head on planes of floats, written once over Simd<A>.
#pragma once

#include "planes.h"
#include "pointwise_tile.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// The linear layer sums some classes for some images at once: a vector of sums for each pair of them, which share what
// is loaded.
inline constexpr int kLinearClasses = kRegisters == 32 ? 4 : 2;
inline constexpr int kLinearImages = 4;
static_assert(kLinearClasses * kLinearImages + kLinearClasses + 1 <= kRegisters, "the sums must fit the registers");

// Adds the products of a vector of channels, the first of which are at `weights` and `means`. The next tile's weights
// lie `ahead` behind them and are brought into the L2 cache: the processor's own prefetching begins anew with each row.
template <class A, bool HasTail, int Images>
inline void add_linear_products(const A* const* weights, const A* const* means, int64_t channel, int64_t ahead,
                                typename Simd<A>::Mask tail, typename Simd<A>::V (&sums)[kLinearClasses][Images]) {
  using S = Simd<A>;
  const auto load = [&](const A* from) { return HasTail ? S::load(from + channel, tail) : S::load(from + channel); };
  typename S::V w[kLinearClasses];
  unrolled<kLinearClasses>([&](int c) {
    w[c] = load(weights[c]);
    __builtin_prefetch(weights[c] + channel + ahead, 0, 2);
  });
  unrolled<Images>([&](int i) {
    const auto x = load(means[i]);
    unrolled<kLinearClasses>([&](int c) { sums[c][i] = S::fma(w[c], x, sums[c][i]); });
  });
}

// Computes classes from the first on for some images. The last class stands in for those behind it.
template <class T, int Images>
void linear_tile(const Head& head, const Convolution& layer, const void* all_means, int64_t image, Range classes,
                 void* all_results) {
  using A = accumulator_t<T>;
  using S = Simd<A>;
  const A* const x = static_cast<const A*>(all_means) + image * head.channels;
  T* const result = static_cast<T*>(all_results) + image * head.classes;
  const A* weights[kLinearClasses];
  const A* means[Images];
  for (int c = 0; c < kLinearClasses; ++c) {
    weights[c] = static_cast<const A*>(layer.weight) + std::min(classes.begin + c, classes.end - 1) * head.channels;
  }
  for (int i = 0; i < Images; ++i) means[i] = x + i * head.channels;
  typename S::V sums[kLinearClasses][Images] = {};
  const int64_t ahead = kLinearClasses * head.channels;
  int64_t channel = 0;
  for (; channel + S::kLanes <= head.channels; channel += S::kLanes) {
    add_linear_products<A, false>(weights, means, channel, ahead, S::first(S::kLanes), sums);
  }
  if (channel < head.channels) {
    add_linear_products<A, true>(weights, means, channel, ahead, S::first(head.channels - channel), sums);
  }
  unrolled<kLinearClasses, Images>([&](int c, int i) {
    const int64_t row = classes.begin + c;
    if (row >= classes.end) return;
    const A value = S::sum(sums[c][i]) + static_cast<const A*>(layer.bias)[row];
    store_first(result + i * head.classes + row, S::broadcast(value), 1);
  });
}

// An image's means follow each other.
template <class T>
class FloatHead final : public HeadKernel {
 public:
  using A = accumulator_t<T>;

  int64_t means_bytes(const Head& head, int64_t images) const override { return images * means_step(head); }
  int64_t means_step(const Head& head) const override { return head.channels * static_cast<int64_t>(sizeof(A)); }

  void means(const Head& head, int64_t, const void* x, Range channels, void* means) const override {
    using S = Simd<A>;
    // The rows of a window that is the whole plane follow each other.
    const bool whole = head.window_height == head.height && head.window_width == head.width;
    const int64_t rows = whole ? 1 : head.window_height;
    const int64_t columns = whole ? head.height * head.width : head.window_width;
    const A pixels = static_cast<A>(head.window_height * head.window_width);
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      const A* const plane = static_cast<const A*>(x) + (head.x_planes ? head.x_planes[c] : c) * head.x_plane;
      typename S::V sum = {};
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t column = 0; column < columns; column += S::kLanes) {
          sum += S::load(plane + row * head.width + column, S::first(columns - column));
        }
      }
      static_cast<A*>(means)[c] = S::sum(sum) / pixels;
    }
  }

  // Weights are the most that it reads: those of a tile are used for every image while they are in the L1 cache.
  void linear(const Head& head, int64_t images, const Convolution& layer, const void* means, Range classes,
              void* result) const override {
    for (; classes.begin < classes.end; classes.begin += kLinearClasses) {
      int64_t image = 0;
      for (; image + kLinearImages <= images; image += kLinearImages) {
        linear_tile<T, kLinearImages>(head, layer, means, image, classes, result);
      }
      for (; image < images; ++image) linear_tile<T, 1>(head, layer, means, image, classes, result);
    }
  }
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
