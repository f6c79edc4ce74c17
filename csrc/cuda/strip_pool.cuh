// The shortcut of a unit of stride 2 by strips in channels_last: avg_pool2d(x, 3, 2, 1), with or without a ReLU, of
// what is in shared memory of x.
//
// A warp sums 16 pixels of the result on tensor cores, 16 channels at a time. Each tap is multiplied by ones, which
// stand where they put four neighbouring channels into each lane, and by zeros. Taps outside of the image are those of
// the pixel of zeros behind the strip's last one.
#pragma once

#include "strip_products.cuh"
#include "strip_staging.cuh"

namespace shufflenet::cuda {

template <class T>
struct StripPool {
  SHUFFLENET_DEVICE explicit StripPool(const StripStaging& block)
      : block(block), s(block.s), layout(block.layout), lane(block.lane), pixels(block.out_rows * block.s.out_width) {
    // Column n of tile j is channel 4 * (n / 2) + 2 * j + n % 2. Word i of an operand has channels 8 * i + 2 * (lane %
    // 4) and the one behind, of column lane / 4.
    T one;
    narrow(1.f, one);
    const int column = lane / 4;
    SHUFFLENET_UNROLL
    for (int tile = 0; tile < 2; ++tile) {
      const int channel = column / 2 * 4 + tile * 2 + column % 2;
      SHUFFLENET_UNROLL
      for (int i = 0; i < 2; ++i) {
        const bool is_here = channel / 2 == 4 * i + lane % 4;
        ones[tile][i] = is_here ? uint32_t{one.bits} << 16 * (column % 2) : 0;
      }
    }
  }

  SHUFFLENET_DEVICE void run() const {
    const int tiles = ceil_div(pixels, kTilePixels), parts = block.constants.parts, warps = block.t.warps;
    const int pairs = ceil_div(layout.own_blocks, 2);  // of blocks: 16 channels
    const int begin = pairs * block.part / parts, end = pairs * (block.part + 1) / parts;
    // Where there are fewer tiles than warps, these share the channels as well.
    const int shares = most(1, least(warps / tiles, end - begin)), share_pairs = ceil_div(end - begin, shares);
    SHUFFLENET_NO_UNROLL
    for (int item = block.warp; item < tiles * shares; item += warps) {
      const int share = item / tiles, first = begin + share * share_pairs;
      pool((item - share * tiles) * kTilePixels, first, least(first + share_pairs, end));
    }
  }

 private:
  using TileSums = float[2][4];  // of the two tiles that 16 channels are

  // Pools 16 pixels, of the channels from 16 * pair to 16 * end.
  SHUFFLENET_DEVICE void pool(int first_pixel, int pair, int end) const {
    const int column = 4 * (lane % 4);  // the lane's four channels
    uint32_t taps[9];
    const TapPlace place(*this, first_pixel + lane % 16);
    SHUFFLENET_UNROLL
    for (int tap = 0; tap < 9; ++tap) taps[tap] = place.address(tap, pair * 2 * kBlockBytes + lane / 16 * kBlockBytes);
    const int64_t pixel_bytes = s.result_channels * kElementBytes;
    char* to[2];
    float scale[2];
    SHUFFLENET_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int pixel = first_pixel + half * 8 + lane / 4;
      scale[half] = 1.f / 9;
      if (!s.pool_count_include_pad) scale[half] = TapPlace(*this, pixel).scale();
      to[half] = block.result_of_image() + int64_t{block.out_row * s.out_width + pixel} * pixel_bytes +
                 (s.first_pooled_channel + pair * 2 * kColumns + column) * kElementBytes;
    }
    SHUFFLENET_NO_UNROLL
    for (; pair < end; ++pair) {
      TileSums sums;
      SHUFFLENET_UNROLL
      for (int tap = 0; tap < 9; ++tap) {
        uint32_t a[4];
        load_matrices<0>(a, taps[tap]);
        taps[tap] += 2 * kBlockBytes;
        SHUFFLENET_UNROLL
        for (int tile = 0; tile < 2; ++tile) {
          if (tap == 0) {
            set_to_product(sums[tile], a, ones[tile], T{});
          } else {
            multiply_matrices(sums[tile], a, ones[tile], T{});
          }
        }
      }
      // 0 times Inf carries NaN from one channel into others: each of a pixel's four lanes has a column that shows it.
      const float any = sums[0][0] + sums[0][2];
      if (warp_any(any != any)) sum_by_channels(sums, first_pixel, (pair * 2 * kColumns + column) * kElementBytes);
      SHUFFLENET_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int left = pixels - (first_pixel + half * 8 + lane / 4);
        uint32_t pairs[2];
        SHUFFLENET_UNROLL
        for (int tile = 0; tile < 2; ++tile) {
          const float low = sums[tile][2 * half] * scale[half], high = sums[tile][2 * half + 1] * scale[half];
          pairs[tile] = s.pool_relu ? pack<true>(low, high, T{}) : pack<false>(low, high, T{});
        }
        if (left > 0 && pair * 2 * kColumns + column < s.in_channels) store_pairs<0>(to[half], pairs[0], pairs[1]);
        to[half] += 2 * kColumns * kElementBytes;
      }
    }
  }

  // Sums the lane's channels, of which the first is byte `at` of a pixel, one by one.
  SHUFFLENET_DEVICE void sum_by_channels(TileSums& sums, int first_pixel, int at) const {
    SHUFFLENET_UNROLL
    for (int half = 0; half < 2; ++half) {
      const TapPlace place(*this, first_pixel + half * 8 + lane / 4);
      float sum[4] = {};
      SHUFFLENET_NO_UNROLL
      for (int tap = 0; tap < 9; ++tap) {
        const uint32_t from = place.address(tap, at);
        SHUFFLENET_UNROLL
        for (int i = 0; i < 4; ++i) sum[i] += number_of<T>(load_pair(from + i / 2 * 4), i % 2);
      }
      SHUFFLENET_UNROLL
      for (int i = 0; i < 4; ++i) sums[i / 2][2 * half + i % 2] = sum[i];
    }
  }

  // Where the taps of a pixel are: its first tap's row and column in the rows of x that are in shared memory.
  struct TapPlace {
    SHUFFLENET_DEVICE TapPlace(const StripPool& pool, int pixel) : block(pool.block) {
      const int inside = least(pixel, pool.pixels - 1), out_row = block.constants.by_out_width.quotient(inside);
      row = 2 * out_row + block.in_row - block.image_row;
      column = 2 * (inside - out_row * block.s.out_width) - 1;
    }
    SHUFFLENET_DEVICE uint32_t address(int tap, int at) const {
      const int tap_row = row + tap / 3, tap_column = column + tap % 3, width = block.s.width;
      const bool is_inside = static_cast<uint32_t>(tap_row) < static_cast<uint32_t>(block.image_rows) &&
                             static_cast<uint32_t>(tap_column) < static_cast<uint32_t>(width);
      const int pixel = is_inside ? tap_row * width + tap_column : block.image_rows * width;
      return block.base + block.layout.x_offset(pixel, at);
    }
    // Returns 1 over the number of taps inside of the image.
    SHUFFLENET_DEVICE float scale() const {
      const auto taps = [](int first, int size) { return least(first + 3, size) - most(first, 0); };
      return inverse(taps(row, block.image_rows)) * inverse(taps(column, block.s.width));
    }
    const StripStaging& block;
    int row, column;
  };

  const StripStaging& block;
  const Sizes& s;
  const StripLayout& layout;
  const int lane, pixels;
  uint32_t ones[2][2];  // each tile's operand
};

}  // namespace shufflenet::cuda
