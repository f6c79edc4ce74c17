// A network's head on planes of pairs, and the conversion of tensors' images to them and back.
#pragma once

#include "format_pairs.h"
#include "image.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// Finishes rows of the linear layer for all images, whose means are the pixels of a product.
template <class T>
struct FinishClasses {
  const float* bias;
  T* result;
  int64_t classes;

  void operator()(const RowRange& range, int64_t first, int64_t rows, const float* sums, int64_t image, int64_t n) {
    for (int64_t row = range.row + first; row < range.row + first + rows; ++row, sums += kSumsStride) {
      for (int64_t i = 0; i < n; ++i) {
        store_first(result + (image + i) * classes + row, Simd<float>::broadcast(sums[i] + bias[row]), 1);
      }
    }
  }
};

// The means of a batch are planes of pairs, in which each image is a pixel. Planes end with images that are none: their
// means are computed with, and so must be there, but not used.
template <class T>
class PairHead final : public HeadKernel {
 public:
  int64_t means_bytes(const Head& head, int64_t images) const override {
    return head.channels / 2 * padded_plane(images) * means_step(head);
  }
  int64_t means_step(const Head&) const override { return sizeof(Pair); }

  void means(const Head& head, int64_t images, const void* x, Range channels, void* means) const override {
    using S = Simd<float>;
    const float pixels = static_cast<float>(head.window_height * head.window_width);
    for (int64_t pair = channels.begin / 2; pair < channels.end / 2; ++pair) {
      S::V first = {}, second = {};
      const Pair* from = static_cast<const Pair*>(x) + pair * head.x_plane;
      for (int64_t row = 0; row < head.window_height; ++row, from += head.width) {
        for (int64_t column = 0; column < head.window_width; column += S::kLanes) {
          const auto inside = S::first(head.window_width - column);
          const auto pairs = S::keep(Pairs::load(from + column), inside);
          first += Pairs::first(pairs);
          second += Pairs::second(pairs);
        }
      }
      store_pairs(static_cast<Pair*>(means) + pair * padded_plane(images), S::broadcast(S::sum(first) / pixels),
                  S::broadcast(S::sum(second) / pixels), 1);
    }
  }

  void linear(const Head& head, int64_t images, const Convolution& layer, const void* means, Range classes,
              void* result) const override {
    const RowRange range = {classes.begin, classes.count(), 0};
    Products products;
    FinishClasses<T> finish = {static_cast<const float*>(layer.bias), static_cast<T*>(result), head.classes};
    multiply({layer, head.channels / 2, &range, 1, images}, {static_cast<const Pair*>(means), padded_plane(images)},
             products, finish);
  }
};

template <class T>
class PairImages final : public ImageKernel {
 public:
  int64_t workspace_bytes(const TensorImage& image) const override {
    Arena arena(nullptr);
    arena.planes<float>(kImageChannels, image.pixels);
    return arena.bytes();
  }

  void read(const TensorImage& image, const void* from, Range channels, void* to, int64_t plane,
            void* workspace) const override {
    const Planes<float> planes = Arena(workspace).planes<float>(kImageChannels, image.pixels);
    image_to_planes<T>(image, from, {0, image.pixels}, channels, planes);
    for (int64_t c = 0; c < channels.count(); c += 2) {
      Pair* const pairs = static_cast<Pair*>(to) + (channels.begin + c) / 2 * plane;
      pack(planes.channel(c), planes.channel(c + 1), image.pixels, pairs);
    }
  }

  void write(const TensorImage& image, const void* from, int64_t plane, const int64_t*, Range channels, void* to,
             void* workspace) const override {
    const Planes<float> planes = Arena(workspace).planes<float>(kImageChannels, image.pixels);
    for (int64_t c = 0; c < channels.count(); c += 2) {
      const Pair* const pairs = static_cast<const Pair*>(from) + (channels.begin + c) / 2 * plane;
      unpack(pairs, image.pixels, planes.channel(c), planes.channel(c + 1));
    }
    planes_to_image<T>(planes, image, to, {0, image.pixels}, channels);
  }
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
