// Copies between tensors' images, of any layout and dtype, and planes of the accumulator type.
#pragma once

#include "planes.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// Finds a pixel of a channel in a tensor's image.
template <class T, class Data>
T* pixel_of(const TensorImage& image, Data* data, int64_t pixel, int64_t channel) {
  const bool in_planes = image.layout == Layout::contiguous;
  return static_cast<T*>(data) + (in_planes ? channel * image.pixels + pixel : pixel * image.channels + channel);
}

// Copies some pixels of some channels of a tensor's image to planes, of which channel 0 is that of the first.
template <class T>
void image_to_planes(TensorImage image, const void* data, Range pixels, Range channels,
                     Planes<accumulator_t<T>> planes) {
  using S = Simd<accumulator_t<T>>;
  constexpr int kLanes = S::kLanes;
  const T* const x = pixel_of<const T>(image, data, pixels.begin, channels.begin);
  const int64_t n = pixels.count();
  if (image.layout == Layout::contiguous) {
    for (int64_t c = 0; c < channels.count(); ++c) {
      const T* const from = x + c * image.pixels;
      for (int64_t p = 0; p < n; p += kLanes) S::store(planes.channel(c) + p, load_first(from + p, n - p));
    }
    return;
  }
  for (int64_t p = 0; p < n; p += kLanes) {
    for (int64_t c = 0; c < channels.count(); c += kLanes) {
      const int64_t left = channels.count() - c;
      typename S::V rows[kLanes] = {};
      for (int i = 0; i < kLanes && p + i < n; ++i) rows[i] = load_first(x + (p + i) * image.channels + c, left);
      S::transpose(rows);
      for (int i = 0; i < kLanes && i < left; ++i) S::store(planes.channel(c + i) + p, rows[i]);
    }
  }
}

// Copies the other way. Planes are anything that has the plane of a channel.
template <class T, class PlanesOfChannels>
void planes_to_image(const PlanesOfChannels& planes, TensorImage image, void* data, Range pixels, Range channels) {
  using S = Simd<accumulator_t<T>>;
  constexpr int kLanes = S::kLanes;
  T* const y = pixel_of<T>(image, data, pixels.begin, channels.begin);
  const int64_t n = pixels.count();
  if (image.layout == Layout::contiguous) {
    for (int64_t c = 0; c < channels.count(); ++c) {
      T* const to = y + c * image.pixels;
      for (int64_t p = 0; p < n; p += kLanes) store_first(to + p, S::load(planes.channel(c) + p), n - p);
    }
    return;
  }
  for (int64_t p = 0; p < n; p += kLanes) {
    for (int64_t c = 0; c < channels.count(); c += kLanes) {
      const int64_t left = channels.count() - c;
      typename S::V rows[kLanes] = {};
      for (int i = 0; i < kLanes && i < left; ++i) rows[i] = S::load(planes.channel(c + i) + p);
      S::transpose(rows);
      for (int i = 0; i < kLanes && p + i < n; ++i) store_first(y + (p + i) * image.channels + c, rows[i], left);
    }
  }
}

// Between tensors' images and planes of floats, which are padded to whole vectors.
template <class T>
class FloatImages final : public ImageKernel {
 public:
  using A = accumulator_t<T>;

  int64_t workspace_bytes(const TensorImage&) const override { return 0; }

  void read(const TensorImage& image, const void* from, Range channels, void* to, int64_t plane, void*) const override {
    const Planes<A> planes = {static_cast<A*>(to), plane};
    image_to_planes<T>(image, from, {0, image.pixels}, channels, planes.from(channels.begin));
  }

  void write(const TensorImage& image, const void* from, int64_t plane, const int64_t* planes, Range channels, void* to,
             void*) const override {
    const OrderedPlanes some = {{static_cast<const A*>(from), plane}, planes, channels.begin};
    planes_to_image<T>(some, image, to, {0, image.pixels}, channels);
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
