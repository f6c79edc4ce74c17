// The shortcut of a unit of stride 2 by strips in channels_last: avg_pool2d(x, 3, 2, 1), with or without a ReLU, of
// what is in shared memory of x.
//
// A warp sums 16 pixels of the result, 16 channels at a time, of which each lane has four neighbouring ones in the end.
// In 16 bits tensor cores sum, as each tap is multiplied by ones, which stand where they put channels into their lanes,
// and by zeros. Taps outside of the image are those of the pixel of zeros behind the strip's last one.
#pragma once

#include "strip_products.cuh"
#include "strip_staging.cuh"

namespace shufflenet::cuda {

// The bytes of a pixel that 16 channels take.
template <class T>
inline constexpr int kPairBytes = 2 * kColumns * static_cast<int>(sizeof(T));

// How a block's warps share the pool, and where the taps are.
struct PoolItems {
  SHUFFLENET_DEVICE explicit PoolItems(const StripStaging& block)
      : block(block), s(block.s), layout(block.layout), lane(block.lane), pixels(block.out_rows * block.s.out_width) {}

  // Calls pool(first pixel, first channel / 16, end channel / 16) for the warp's share.
  template <class Pool>
  SHUFFLENET_DEVICE void for_each_item(const Pool& pool) const {
    const int tiles = ceil_div(pixels, kTilePixels), parts = block.constants.parts, warps = block.t.warps;
    const int pairs = ceil_div(s.in_channels, 2 * kColumns);
    const int begin = pairs * block.part / parts, end = pairs * (block.part + 1) / parts;
    // Where there are fewer tiles than warps, these share the channels as well.
    const int shares = most(1, least(warps / tiles, end - begin)), share_pairs = ceil_div(end - begin, shares);
    SHUFFLENET_NO_UNROLL
    for (int item = block.warp; item < tiles * shares; item += warps) {
      const int share = item / tiles, first = begin + share * share_pairs;
      pool((item - share * tiles) * kTilePixels, first, least(first + share_pairs, end));
    }
  }

  // Where the taps of a pixel are: its first tap's row and column in the rows of x that are in shared memory.
  struct TapPlace {
    SHUFFLENET_DEVICE TapPlace(const PoolItems& pool, int pixel) : block(pool.block) {
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

  // Finds the addresses of a pixel's taps at byte `at` of theirs.
  SHUFFLENET_DEVICE void find_taps(uint32_t (&taps)[9], int pixel, int at) const {
    const TapPlace place(*this, pixel);
    SHUFFLENET_UNROLL
    for (int tap = 0; tap < 9; ++tap) taps[tap] = place.address(tap, at);
  }
  // Returns what a pixel's sum is multiplied by.
  SHUFFLENET_DEVICE float scale_of(int pixel) const {
    return s.pool_count_include_pad ? 1.f / 9 : TapPlace(*this, pixel).scale();
  }
  // Returns where in memory the result of a pixel's channel goes.
  template <class T>
  SHUFFLENET_DEVICE char* result_at(int pixel, int channel) const {
    const uint32_t number =
        (block.out_row * s.out_width + pixel) * s.result_channels + s.first_pooled_channel + channel;
    return block.result_of_image() + number * static_cast<uint32_t>(sizeof(T));
  }

  const StripStaging& block;
  const Sizes& s;
  const StripLayout& layout;
  const int lane, pixels;
};

// Pools in 16 bits.
template <class T>
struct MatrixPool : PoolItems {
  SHUFFLENET_DEVICE explicit MatrixPool(const StripStaging& block) : PoolItems(block) {
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
    for_each_item([&](int first_pixel, int pair, int end) { pool(first_pixel, pair, end); });
  }

 private:
  using TileSums = float[2][4];  // of the two tiles that 16 channels are

  // Pools 16 pixels, of the channels from 16 * pair to 16 * end.
  SHUFFLENET_DEVICE void pool(int first_pixel, int pair, int end) const {
    const int column = 4 * (lane % 4);  // the lane's four channels
    uint32_t taps[9];
    find_taps(taps, first_pixel + lane % 16, pair * kPairBytes<T> + lane / 16 * kBlockBytes);
    char* to[2];
    float scale[2];
    SHUFFLENET_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int pixel = first_pixel + half * 8 + lane / 4;
      scale[half] = scale_of(pixel);
      to[half] = result_at<T>(pixel, pair * 2 * kColumns + column);
    }
    SHUFFLENET_NO_UNROLL
    for (; pair < end; ++pair) {
      TileSums sums;
      SHUFFLENET_UNROLL
      for (int tap = 0; tap < 9; ++tap) {
        uint32_t a[4];
        load_matrices<0>(a, taps[tap]);
        taps[tap] += kPairBytes<T>;
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
      if (warp_any(any != any))
        sum_by_channels(sums, first_pixel, pair * kPairBytes<T> + column * static_cast<int>(sizeof(T)));
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
        to[half] += kPairBytes<T>;
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

  uint32_t ones[2][2];  // each tile's operand
};

// Pools in 32 bits, which tensor cores would round.
template <class T>
struct ExactPool : PoolItems {
  SHUFFLENET_DEVICE explicit ExactPool(const StripStaging& block) : PoolItems(block) {}

  SHUFFLENET_DEVICE void run() const {
    for_each_item([&](int first_pixel, int pair, int end) {
      SHUFFLENET_NO_UNROLL
      for (int half = 0; half < 2; ++half) pool(first_pixel + half * 8 + lane / 4, pair, end);
    });
  }

 private:
  // Pools the lane's pixel, of every 16 channels from 16 * pair to 16 * end the lane's four.
  SHUFFLENET_DEVICE void pool(int pixel, int pair, int end) const {
    const int column = 4 * (lane % 4);
    uint32_t taps[9];
    find_taps(taps, pixel, pair * kPairBytes<T> + lane % 4 * kBlockBytes);
    const float scale = scale_of(pixel);
    char* to = result_at<T>(pixel, pair * 2 * kColumns + column);
    SHUFFLENET_NO_UNROLL
    for (; pair < end && pixel < pixels && pair * 2 * kColumns + column < s.in_channels; ++pair) {
      float sums[4] = {};
      SHUFFLENET_UNROLL
      for (int tap = 0; tap < 9; ++tap) {
        const Vector4 x = load_shared_floats<0>(taps[tap]);
        taps[tap] += kPairBytes<T>;
        SHUFFLENET_UNROLL
        for (int i = 0; i < 4; ++i) sums[i] += x.values[i];
      }
      SHUFFLENET_UNROLL
      for (int i = 0; i < 4; ++i) {
        sums[i] *= scale;
        if (s.pool_relu) sums[i] = relu(sums[i]);
      }
      store_pairs<0>(to, FloatPair{sums[0], sums[1]}, FloatPair{sums[2], sums[3]});
      to += kPairBytes<T>;
    }
  }
};

template <class T>
using StripPool = std::conditional_t<kIsWide<T>, ExactPool<T>, MatrixPool<T>>;

}  // namespace shufflenet::cuda
