// Writes of a result what is no product of conv3: y2 where a unit has no conv3, and the pooled shortcut.
#pragma once

#include "common.cuh"
#include "tiling.h"
#include "unit_staging.cuh"
#include "unit_window.cuh"

namespace shufflenet::cuda {

template <class T, Layout kLayout>
struct UnitResult {
  SHUFFLENET_DEVICE UnitResult(const UnitStaging<T>& block, const Window& window)
      : block(block), s(block.s), t(block.t), layout(block.layout), w(window) {}

  // Writes y2 as `channels` channels of the result, from `begin` on.
  SHUFFLENET_DEVICE void write_y2(int begin, int channels) const {
    switch (t.result_vector) {
      case 16: write_vectors<16>(begin, channels); break;
      case 8: write_vectors<8>(begin, channels); break;
      default: write_vectors<sizeof(T)>(begin, channels);
    }
  }

  // Writes a vector to the result, whose first element is channel c of the window's p-th pixel.
  template <int kSize>
  SHUFFLENET_DEVICE void write_vector(const Vector<T, kSize>& vector, int c, int p) const {
    const int at = image_offset<kLayout>(s.result_channels, s.out_plane, c, w.out_index(s, p));
    *reinterpret_cast<Vector<T, kSize>*>(block.result_image(w) + at) = vector;
  }

 private:
  static constexpr bool kPlanes = kLayout == Layout::contiguous;

  // Writes y2 by vectors of kVector bytes: of neighbouring pixels or channels, as the result's memory has them.
  template <int kVector>
  SHUFFLENET_DEVICE void write_vectors(int begin, int channels) const {
    constexpr int kSize = kVector / static_cast<int>(sizeof(T));
    const int lines = kPlanes ? channels : w.out_pixels(), elements = kPlanes ? w.out_pixels() : channels;
    const int vectors = elements / kSize;
    SHUFFLENET_NO_UNROLL
    for (int index = thread_index(); index < lines * vectors; index += kThreads) {
      const int line = index / vectors, element = index % vectors * kSize;
      Vector<T, kSize> vector;
      SHUFFLENET_UNROLL
      for (int i = 0; i < kSize; ++i) {
        const int p = kPlanes ? element + i : line, c = kPlanes ? line : element + i;
        vector.elements[i] = block.y2[p * layout.y2_pitch + c];
      }
      write_vector(vector, begin + (kPlanes ? line : element), kPlanes ? element : line);
    }
  }

  const UnitStaging<T>& block;
  const Sizes& s;
  const Tiling& t;
  const SharedLayout& layout;
  const Window& w;
};

}  // namespace shufflenet::cuda
