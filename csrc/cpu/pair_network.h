// What is around the units of a program in bfloat16, and its table of kernels.
#pragma once

#include "pair_stem.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

inline int64_t image_scratch_bytes(const TensorImage& image) {
  Arena arena(nullptr);
  arena.planes<float>(kImageChannels, image.pixels);
  return arena.bytes();
}

// Pixels of some channels, kImageChannels at most, of a tensor's image, as if it had no others.
template <class T, class Data>
Image<T> some_channels(const TensorImage& image, Data* data, Channels channels) {
  const int64_t step = image.layout == Layout::contiguous ? image.pixels : 1;
  return {static_cast<T*>(data) + channels.begin * step, image.layout, image.channels, image.pixels};
}

template <class T>
void read_image(const TensorImage& image, const void* from, Channels channels, void* pairs, int64_t plane,
                void* scratch) {
  const Planes<float> planes = Arena(scratch).planes<float>(kImageChannels, image.pixels);
  stage_in<T>(some_channels<const T>(image, from, channels), 0, image.pixels, {0, channels.count()}, planes);
  for (int64_t c = 0; c < channels.count(); c += 2) {
    pack(planes.channel(c), planes.channel(c + 1), image.pixels,
         static_cast<Pair*>(pairs) + (channels.begin + c) / 2 * plane);
  }
}

template <class T>
void write_image(const TensorImage& image, const void* pairs, int64_t plane, Channels channels, void* to,
                 void* scratch) {
  const Planes<float> planes = Arena(scratch).planes<float>(kImageChannels, image.pixels);
  for (int64_t c = 0; c < channels.count(); c += 2) {
    unpack(static_cast<const Pair*>(pairs) + (channels.begin + c) / 2 * plane, image.pixels, planes.channel(c),
           planes.channel(c + 1));
  }
  stage_out<T>(some_channels<T>(image, to, channels), 0, image.pixels, {0, channels.count()}, read_only(planes));
}

// As window_means: an image's means, pair by pair, are means_plane apart.
inline void pair_means(const Head& head, const void* x, int64_t x_plane, Channels channels, void* means,
                       int64_t means_plane) {
  using S = Simd<float>;
  const float pixels = static_cast<float>(head.window_height * head.window_width);
  for (int64_t pair = channels.begin / 2; pair < channels.end / 2; ++pair) {
    S::V first = {}, second = {};
    for (int64_t row = 0; row < head.window_height; ++row) {
      const Pair* const from = static_cast<const Pair*>(x) + pair * x_plane + row * head.width;
      for (int64_t column = 0; column < head.window_width; column += S::kLanes) {
        const auto inside = S::first(head.window_width - column);
        const auto pairs = S::keep(Pairs::load(from + column), inside);
        first += Pairs::first(pairs);
        second += Pairs::second(pairs);
      }
    }
    store_pairs(static_cast<Pair*>(means) + pair * means_plane, S::broadcast(S::sum(first) / pixels),
                S::broadcast(S::sum(second) / pixels), 1);
  }
}

// Rows of the linear layer for all images, whose means are the pixels of a product.
template <class T>
struct FinishClasses {
  const float* bias;
  T* result;
  int64_t classes;

  void operator()(const RowRange& range, int64_t first, int64_t rows, const float* sums, int64_t image, int64_t n) {
    for (int64_t row = range.row + first; row < range.row + first + rows; ++row, sums += kProductPixels) {
      for (int64_t i = 0; i < n; ++i) {
        store_first(result + (image + i) * classes + row, Simd<float>::broadcast(sums[i] + bias[row]), 1);
      }
    }
  }
};

template <class T>
void pair_linear(const Head& head, const Convolution& layer, const void* means, int64_t means_plane, int64_t images,
                 Channels classes, void* result) {
  const RowRange range = {classes.begin, classes.count(), 0, 0};
  Products products;
  FinishClasses<T> finish = {static_cast<const float*>(layer.bias), static_cast<T*>(result), head.classes};
  multiply(
      {layer, head.channels / 2, &range, 1, images}, {static_cast<const Pair*>(means), means_plane}, products, finish);
}

template <class T>
constexpr PairKernel pair_kernel_for() {
  return {kPairUnitKernel, pair_stem_kernel<T>(), image_scratch_bytes, read_image<T>, write_image<T>,
          pair_means,      pair_linear<T>};
}

// For tensors of the dtype outside of the steps: bfloat16, or float32.
inline PairKernel pair_kernel(Dtype dtype) {
  return dtype == Dtype::bfloat16 ? pair_kernel_for<BFloat16>() : pair_kernel_for<float>();
}

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
