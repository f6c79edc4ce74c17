// The depthwise convolution of a block of unit_kernel.cuh: y2 from y1, by taps that are in shared memory as well.
#pragma once

#include "common.cuh"
#include "tiling.h"
#include "unit_products.cuh"
#include "unit_staging.cuh"
#include "unit_window.cuh"

namespace shufflenet::cuda {

template <class T, Layout kLayout>
struct UnitDepthwise {
  SHUFFLENET_DEVICE UnitDepthwise(const UnitStaging<T>& block, const Window& window)
      : block(block), s(block.s), layout(block.layout), w(window) {}

  // Computes y2 of a chunk of `channels` channels, of which the first is the block's first-th.
  SHUFFLENET_DEVICE void run(int first, int channels) const {
    if (s.stride == 1) {
      compute<1>(first, channels);
    } else {
      compute<2>(first, channels);
    }
  }

 private:
  using A = accumulator_t<T>;
  using Pair = Vector<T, 2>;
  using Sums = Vector<A, 2>;
  static constexpr bool kPlanes = kLayout == Layout::contiguous;

  // Does so for a stride. A thread goes down a column of a pair of channels, and keeps the nine values that the taps
  // multiply in registers: row i of y1 is in value[i % 3].
  template <int kStride>
  SHUFFLENET_DEVICE void compute(int first, int channels) const {
    // Whether the channels of a pair are side by side in y2 as well.
    const bool together = !s.out_channels || (s.slice_channels % 2 == 0 && first % 2 == 0);
    const int pairs = ceil_div(channels, 2);
    SHUFFLENET_NO_UNROLL
    for (int i = thread_index(); i < pairs * w.out_columns; i += kThreads) {
      const int column = i / pairs;
      const int c = (i - column * pairs) * 2;
      const int c2 = s.out_channels ? y2_column(first + c) : c, next_c2 = y2_column(first + c + 1);
      const auto constant = [&](int k) -> Sums {
        return shared_as<const Sums>(Shared<const A>(block.taps + (k * layout.columns + c)))[0];
      };
      Sums tap[9];
      SHUFFLENET_UNROLL
      for (int k = 0; k < 9; ++k) tap[k] = constant(3 + k);
      const Sums bias = constant(2);
      Sums value[3][3];
      Shared<const T> next = block.y1 + (column * kStride * layout.y1_pitch + c);
      const auto read_row = [&](int into) {
        SHUFFLENET_UNROLL
        for (int k = 0; k < 3; ++k) {
          const Pair pair = shared_as<const Pair>(next + k * layout.y1_pitch)[0];
          value[into][k] = {widen(pair.elements[0]), widen(pair.elements[1])};
        }
        next = next + w.in_columns * layout.y1_pitch;
      };
      SHUFFLENET_UNROLL
      for (int k = 0; k < 3 - kStride; ++k) read_row(k);
      SHUFFLENET_NO_UNROLL
      for (int three = 0; three < w.out_rows; three += 3) {
        SHUFFLENET_UNROLL
        for (int r = 0; r < 3; ++r) {
          const int row = three + r;
          if (row >= w.out_rows) break;
          SHUFFLENET_UNROLL
          for (int k = 3 - kStride; k < 3; ++k) read_row((kStride * r + k) % 3);
          Pair pair;
          SHUFFLENET_UNROLL
          for (int e = 0; e < 2; ++e) {
            A sum = bias.elements[e];
            SHUFFLENET_UNROLL
            for (int k = 0; k < 9; ++k) {
              sum = multiply_add(tap[k].elements[e], value[(kStride * r + k / 3) % 3][k % 3].elements[e], sum);
            }
            narrow(s.conv2_relu ? relu(sum) : sum, pair.elements[e]);
          }
          const Shared<T> to = block.y2 + y2_row(row * w.out_columns + column) * layout.y2_pitch;
          if (together) {
            shared_as<Pair>(to + c2)[0] = pair;
          } else {
            to[c2] = pair.elements[0];
            if (c + 1 < channels) to[next_c2] = pair.elements[1];
          }
        }
      }
    }
  }

  // Returns the column of y2 that holds the block's c-th channel. Each slice starts at a whole step, where conv3
  // begins.
  SHUFFLENET_DEVICE int y2_column(int c) const {
    return c + c / s.slice_channels * (layout.slice_pitch - s.slice_channels);
  }
  // Returns the row of y2 that holds a pixel: where the product of conv3 takes it, see place().
  SHUFFLENET_DEVICE int y2_row(int pixel) const { return kPlanes && s.out_channels ? place(pixel) : pixel; }

  const UnitStaging<T>& block;
  const Sizes& s;
  const SharedLayout& layout;
  const Window& w;
};

}  // namespace shufflenet::cuda
