// The shortcut of a unit of stride 2 by windows: avg_pool2d(x, 3, 2, 1), with or without a ReLU, for the block's share
// of x's channels.
#pragma once

#include "common.cuh"
#include "tiling.h"
#include "unit_result.cuh"
#include "unit_staging.cuh"
#include "unit_window.cuh"

namespace shufflenet::cuda {

template <class T, Layout kLayout>
struct UnitPool {
  SHUFFLENET_DEVICE UnitPool(const UnitStaging<T>& block, const Window& window)
      : block(block), s(block.s), t(block.t), w(window) {}

  SHUFFLENET_DEVICE void run() const {
    switch (t.pool_vector) {
      case 16: pool_vectors<16>(); break;
      case 8: pool_vectors<8>(); break;
      default: pool_vectors<sizeof(T)>();
    }
  }

 private:
  using A = accumulator_t<T>;
  static constexpr bool kPlanes = kLayout == Layout::contiguous;

  // Pools, in a thread, as many channels at once as a vector holds; one, where channels are contiguous planes.
  template <int kVector>
  SHUFFLENET_DEVICE void pool_vectors() const {
    constexpr int kSize = kPlanes ? 1 : kVector / static_cast<int>(sizeof(T));
    using Channels = Vector<T, kSize>;
    const auto share = [&](int slice) {
      const int channels = static_cast<int>(int64_t{s.in_channels} * slice / s.groups);
      return slice == s.groups ? channels : channels / kPerBlock<T> * kPerBlock<T>;
    };
    const int begin = share(w.slice_begin), pixels = w.out_pixels();
    const int vectors = (share(w.slice_end) - begin) / kSize;
    SHUFFLENET_NO_UNROLL
    for (int i = thread_index(); i < vectors * pixels; i += kThreads) {
      const int c = begin + (kPlanes ? i / pixels : i % vectors * kSize);
      const int pixel = kPlanes ? i % pixels : i / vectors;
      const int row = (w.out_row + pixel / w.out_columns) * 2 - 1,
                column = (w.out_column + pixel % w.out_columns) * 2 - 1;
      A sum[kSize] = {};
      SHUFFLENET_UNROLL
      for (int k = 0; k < 9; ++k) {
        const int at_row = row + k / 3, at_column = column + k % 3;
        if (at_row < 0 || at_row >= s.height || at_column < 0 || at_column >= s.width) continue;
        const Channels channels = *reinterpret_cast<const Channels*>(
            block.x_image(w) + image_offset<kLayout>(s.in_channels, s.in_plane, c, at_row * s.width + at_column));
        SHUFFLENET_UNROLL
        for (int e = 0; e < kSize; ++e) sum[e] += widen(channels.elements[e]);
      }
      const int rows = least(row + 3, s.height) - most(row, 0), columns = least(column + 3, s.width) - most(column, 0);
      const A count = static_cast<A>(s.pool_count_include_pad ? 9 : rows * columns);
      Channels pooled;
      SHUFFLENET_UNROLL
      for (int e = 0; e < kSize; ++e) {
        const A mean = sum[e] / count;
        narrow(s.pool_relu ? relu(mean) : mean, pooled.elements[e]);
      }
      UnitResult<T, kLayout>(block, w).write_vector(pooled, s.first_pooled_channel + c, pixel);
    }
  }

  const UnitStaging<T>& block;
  const Sizes& s;
  const Tiling& t;
  const Window& w;
};

}  // namespace shufflenet::cuda
