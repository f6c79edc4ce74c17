// The shortcut of a unit of stride 2 by strips in the contiguous layout: avg_pool2d(x, 3, 2, 1), with or without a
// ReLU, of what is in shared memory of x. It goes to global memory as it is made.
#pragma once

#include "strip_products.cuh"
#include "strip_staging.cuh"

namespace shufflenet::cuda {

// The three columns of x that a column of the pooled result is made of. If kPaired, as rows have an even number, the
// middle one and the right one are a word.
template <class T, bool kPaired>
struct PoolColumn {
  SHUFFLENET_DEVICE PoolColumn(int column, int width)
      : has_left(column > 0),
        has_right(kPaired || 2 * column + 1 < width),
        left_bytes(has_left ? -kElementBytes : 0),
        right_bytes(has_right ? kElementBytes : 0) {}
  SHUFFLENET_DEVICE int count() const { return 1 + has_left + has_right; }
  // Returns the sum of a row, of which `at` is the middle one.
  SHUFFLENET_DEVICE float sum(uint32_t at) const {
    const float loaded = widen(T{load_element(at + left_bytes)}), left = has_left ? loaded : 0;
    if constexpr (kPaired) {
      const uint32_t pair = load_pair(at);
      return left + number_of<T>(pair, 0) + number_of<T>(pair, 1);
    } else {
      const float middle = widen(T{load_element(at)}), last = widen(T{load_element(at + right_bytes)});
      return left + middle + (has_right ? last : 0);
    }
  }
  bool has_left, has_right;
  int left_bytes, right_bytes;  // from the middle column to where the others are loaded
};

template <class T>
struct PlanePool {
  SHUFFLENET_DEVICE explicit PlanePool(const StripStaging& block)
      : block(block), s(block.s), t(block.t), layout(block.layout) {}

  // Pools the part's share of x's channels: a lane a column of a channel at a time, from row to row, of which two
  // neighbouring ones share a row of taps.
  SHUFFLENET_DEVICE void run() const {
    if (s.width % 2 == 0) {
      pool<true>();
    } else {
      pool<false>();
    }
  }

 private:
  template <bool kPaired>
  SHUFFLENET_DEVICE void pool() const {
    if (s.pool_relu) {
      pool_columns<kPaired, true>();
    } else {
      pool_columns<kPaired, false>();
    }
  }

  template <bool kPaired, bool kRelu>
  SHUFFLENET_DEVICE void pool_columns() const {
    const int parts = block.constants.parts, begin = s.in_channels * block.part / parts,
              end = s.in_channels * (block.part + 1) / parts;
    const int64_t row_bytes = s.out_width * kElementBytes;
    const uint32_t in_row_bytes = s.width * kElementBytes, plane_bytes = block.image_rows * in_row_bytes;
    SHUFFLENET_NO_UNROLL
    for (int item = block.warp * 32 + block.lane; item < (end - begin) * s.out_width; item += t.warps * 32) {
      const int before = item / s.out_width, channel = begin + before, column = item - before * s.out_width;
      const PoolColumn<T, kPaired> taps(column, s.width);
      const float of_columns = s.pool_count_include_pad ? 1.f / 3 : inverse(taps.count());
      const float whole = of_columns * (1.f / 3);
      // The image's first row, and a last one that has none below, are made of two rows, where the image has two.
      const float at_edge = s.pool_count_include_pad ? whole : of_columns * inverse(s.height > 1 ? 2 : 1);
      char* to = block.in_result(s.first_pooled_channel + channel, block.out_row * s.out_width + column);
      // The row above the image and the one below count as zeros.
      const uint32_t plane = block.base + channel * layout.x_pitch + 2 * column * kElementBytes;
      uint32_t at = plane;
      float above = 0, scale = block.out_row == 0 ? at_edge : whole;
      if (block.in_row >= 0) {
        above = taps.sum(at);
        at += in_row_bytes;
      }
      SHUFFLENET_NO_UNROLL
      for (int rows = block.out_rows; rows > 0; --rows) {
        const uint32_t next = at + in_row_bytes;
        const float middle = taps.sum(at);
        float below = 0;
        if (next < plane + plane_bytes) {
          below = taps.sum(next);
        } else {
          scale = at_edge;
        }
        const float mean = (above + middle + below) * scale;
        *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(pack<kRelu>(mean, mean, T{}));
        above = below;
        scale = whole;
        at = next + in_row_bytes;
        to += row_bytes;
      }
    }
  }

  const StripStaging& block;
  const Sizes& s;
  const StripTiling& t;
  const StripLayout& layout;
};

}  // namespace shufflenet::cuda
