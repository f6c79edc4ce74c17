// Copies between tensors' images, of any layout and dtype, and planes of the accumulator type.
#pragma once

#include "planes.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// How the pixels of an image's channels lie in a tensor of T: contiguous planes, or the channels of a pixel together.
template <class T>
struct Image {
  T* data;
  Layout layout;
  int64_t channels;  // of the tensor
  int64_t plane;     // elements from plane to plane
};

// Copies pixels [begin, begin + pixels) of some channels from an image to planes.
template <class T>
void image_to_planes(const Image<const T>& image, int64_t begin, int64_t pixels, Range range,
                     Planes<accumulator_t<T>> planes) {
  using S = Simd<accumulator_t<T>>;
  constexpr int kLanes = S::kLanes;
  if (image.layout == Layout::contiguous) {
    for (int64_t c = range.begin; c < range.end; ++c) {
      const T* from = image.data + c * image.plane + begin;
      for (int64_t p = 0; p < pixels; p += kLanes) S::store(planes.channel(c) + p, load_first(from + p, pixels - p));
    }
    return;
  }
  for (int64_t p = 0; p < pixels; p += kLanes) {
    for (int64_t c = range.begin; c < range.end; c += kLanes) {
      const int64_t channels = range.end - c;
      typename S::V rows[kLanes] = {};
      for (int i = 0; i < kLanes && p + i < pixels; ++i) {
        rows[i] = load_first(image.data + (begin + p + i) * image.channels + c, channels);
      }
      S::transpose(rows);
      for (int i = 0; i < kLanes && i < channels; ++i) S::store(planes.channel(c + i) + p, rows[i]);
    }
  }
}

// Copies the other way. Planes are anything that has the plane of a channel.
template <class T, class PlanesOfChannels>
void planes_to_image(const Image<T>& image, int64_t begin, int64_t pixels, Range range,
                     const PlanesOfChannels& planes) {
  using S = Simd<accumulator_t<T>>;
  constexpr int kLanes = S::kLanes;
  if (image.layout == Layout::contiguous) {
    for (int64_t c = range.begin; c < range.end; ++c) {
      T* to = image.data + c * image.plane + begin;
      for (int64_t p = 0; p < pixels; p += kLanes) store_first(to + p, S::load(planes.channel(c) + p), pixels - p);
    }
    return;
  }
  for (int64_t p = 0; p < pixels; p += kLanes) {
    for (int64_t c = range.begin; c < range.end; c += kLanes) {
      const int64_t channels = range.end - c;
      typename S::V rows[kLanes] = {};
      for (int i = 0; i < kLanes && i < channels; ++i) rows[i] = S::load(planes.channel(c + i) + p);
      S::transpose(rows);
      for (int i = 0; i < kLanes && p + i < pixels; ++i) {
        store_first(image.data + (begin + p + i) * image.channels + c, rows[i], channels);
      }
    }
  }
}

// Some channels, kImageChannels at most, of a tensor's image, as if it had no others.
template <class U, class Data>
Image<U> some_channels(const TensorImage& image, Data* data, Range channels) {
  const int64_t step = image.layout == Layout::contiguous ? image.pixels : 1;
  return {static_cast<U*>(data) + channels.begin * step, image.layout, image.channels, image.pixels};
}

// Between tensors' images and planes of floats, which are padded to whole vectors.
template <class T>
class FloatImages final : public ImageKernel {
 public:
  using A = accumulator_t<T>;

  int64_t workspace_bytes(const TensorImage&) const override { return 0; }

  void read(const TensorImage& image, const void* from, Range channels, void* to, int64_t plane, void*) const override {
    const Planes<A> planes = Planes<A>{static_cast<A*>(to), plane}.from(channels.begin);
    image_to_planes<T>(some_channels<const T>(image, from, channels), 0, image.pixels, {0, channels.count()}, planes);
  }

  void write(const TensorImage& image, const void* from, int64_t plane, const int64_t* planes, Range channels, void* to,
             void*) const override {
    const OrderedPlanes all = {{static_cast<const A*>(from), plane}, planes, channels.begin};
    planes_to_image<T>(some_channels<T>(image, to, channels), 0, image.pixels, {0, channels.count()}, all);
  }

 private:
  struct OrderedPlanes {
    const A* channel(int64_t c) const { return planes.channel(order ? order[first + c] : first + c); }
    Planes<const A> planes;
    const int64_t* order;  // null: their own
    int64_t first;
  };
};

// Converts an array of a 16-bit dtype to float.
template <class T>
void widen(const void* from, void* to, int64_t n) {
  for (int64_t i = 0; i < n; i += Simd<float>::kLanes) {
    store_first(static_cast<float*>(to) + i, load_first(static_cast<const T*>(from) + i, n - i), n - i);
  }
}

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
