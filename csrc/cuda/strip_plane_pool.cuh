// The shortcut of a unit of stride 2 by strips in the contiguous layout: avg_pool2d(x, 3, 2, 1), with or without a
// ReLU, of what is in shared memory of x. The result goes to shared memory too, so that it is copied as conv3's is.
//
// In 16 bits a warp sums 8 pixels of a row of the result on tensor cores, 16 channels at a time: it multiplies their
// pixels of x by ones, where a pixel is a tap of the result's, and by zeros. In 32 bits, which tensor cores would
// round, a lane sums a pixel, a channel at a time.
#pragma once

#include "strip_products.cuh"
#include "strip_staging.cuh"

namespace shufflenet::cuda {

// The taps of the pool, and where its result is put: planes of layout.result_pitch bytes.
struct PlaneTaps {
  SHUFFLENET_DEVICE PlaneTaps(const StripStaging& block, uint32_t to)
      : block(block), s(block.s), layout(block.layout), lane(block.lane), to(to) {}

  // Returns the first row of taps of a row of the result, among the rows of x in shared memory. May be -1.
  SHUFFLENET_DEVICE int first_row(int row) const { return 2 * row + block.in_row - block.image_row; }
  // Return the first column of taps inside of the image, and how many there are.
  SHUFFLENET_DEVICE int first_tap(int column) const { return most(0, 2 * column - 1); }
  SHUFFLENET_DEVICE int column_taps(int column) const { return least(2 * column + 2, s.width) - first_tap(column); }
  // Returns what a sum is multiplied by for the taps that it has in a row or a column of the image.
  SHUFFLENET_DEVICE float scale(int taps) const { return inverse(s.pool_count_include_pad ? 3 : taps); }

  const StripStaging& block;
  const Sizes& s;
  const StripLayout& layout;
  const int lane;
  const uint32_t to;
};

template <class T>
struct MatrixPlanePool : PlaneTaps {
  SHUFFLENET_DEVICE MatrixPlanePool(const StripStaging& block, uint32_t to) : PlaneTaps(block, to) {}

  // Pools the channels from 16 * begin, the first one that is put, to 16 * end.
  SHUFFLENET_DEVICE void run(int begin, int end) const {
    const int warps = block.t.warps;
    const PlanePoolTiles by(s, block.out_rows, warps);
    const int tiles = by.in_row * by.rows.count;
    // Where there are fewer tiles than warps, these share the channels as well.
    const int shares = most(1, least(warps / tiles, end - begin)), share_pairs = ceil_div(end - begin, shares);
    SHUFFLENET_NO_UNROLL
    for (int item = block.warp; item < tiles * shares; item += warps) {
      const int share = item / tiles, tile = item - share * tiles, strip = tile / by.in_row;
      const int first_pair = share * share_pairs, end_pair = least(first_pair + share_pairs, end - begin);
      const int end_row = least((strip + 1) * by.rows.size, block.out_rows);
      SHUFFLENET_NO_UNROLL
      for (Tile of(*this, strip * by.rows.size, (tile - strip * by.in_row) * kColumns); of.row < end_row;
           of.next_row()) {
        if (s.out_width % 2 == 0) {
          pool<true>(of, begin, first_pair, end_pair);
        } else {
          pool<false>(of, begin, first_pair, end_pair);
        }
      }
    }
  }

 private:
  static constexpr int kElement = sizeof(T);
  // The taps of 8 pixels in a row of x lie in three blocks of 8 of its pixels, wherever the first of these begins.
  static constexpr int kRowEights = 3, kEights = 3 * kRowEights, kSteps = kEights / 2;

  // Eight pixels of the result, from `column` of a row on: the operands that pick their taps out of nine blocks of 8
  // pixels of x, and the addresses that the lane loads the blocks of its channel from, two by two and the last one.
  struct Tile {
    SHUFFLENET_DEVICE Tile(const MatrixPlanePool& pool, int row, int column)
        : row(row),
          pixel(column + pool.lane % 4 * 2),
          plane(pool.block.base + pool.lane % 16 * pool.layout.x_pitch),
          end(plane + (pool.block.image_rows * pool.s.width - 1) / kColumns * kBlockBytes),
          two_rows(2 * pool.s.width * kElement) {
      const int width = pool.s.width;
      T one;
      narrow(1.f, one);
      const int mine = column + pool.lane / 4;  // that the lane's operands are of; may be behind the last one
      const int first = pool.first_tap(mine);
      const uint32_t count = most(0, pool.column_taps(mine));
      int eights[kEights];
      SHUFFLENET_UNROLL
      for (int tap_row = 0; tap_row < 3; ++tap_row) {
        const int x_row = (pool.first_row(row) + tap_row) * width;
        const int eight = (x_row + 2 * column - 1) >> 3;  // rounded down also if it is negative
        const uint32_t away = eight * kColumns + pool.lane % 4 * 2 - (x_row + first);
        SHUFFLENET_UNROLL
        for (int i = 0; i < kRowEights; ++i) {
          const int k = tap_row * kRowEights + i;
          eights[k] = plane + (eight + i) * kBlockBytes;
          const uint32_t tap = away + i * kColumns;
          ones[k] = (tap < count ? one.bits : 0u) | (tap + 1 < count ? uint32_t{one.bits} << 16 : 0u);
        }
      }
      SHUFFLENET_UNROLL
      for (int step = 0; step < kSteps; ++step) x[step] = pool.lane < 16 ? eights[2 * step] : eights[2 * step + 1];
      x[kSteps] = eights[kEights - 1];
      SHUFFLENET_UNROLL
      for (int i = 0; i < 2; ++i) scale[i] = pool.scale(pool.column_taps(pixel + i)) * (1.f / 3);
    }
    // Goes on to the next row, which must begin at the same place in a block of x.
    SHUFFLENET_DEVICE void next_row() {
      ++row;
      SHUFFLENET_UNROLL
      for (int& at : x) at += two_rows;
    }
    int row;
    const int pixel;                 // of the row, the lane's first of two
    const int plane, end, two_rows;  // the addresses of the channel's first and last block, and bytes
    uint32_t ones[kEights];
    int x[kSteps + 1];
    float scale[2];
  };

  // Pools a tile, of the channels from 16 * (begin + pair) to 16 * (begin + end). If kPaired, as rows have an even
  // number, the lane's two pixels are a word.
  template <bool kPaired>
  SHUFFLENET_DEVICE void pool(const Tile& tile, int begin, int pair, int end) const {
    const uint32_t pair_bytes = 2 * kColumns * layout.x_pitch, half_bytes = kColumns * layout.result_pitch;
    const int pixel = tile.row * s.out_width + tile.pixel, here = s.out_width - tile.pixel;
    // The image has no row above its first one, and may have none below its last one.
    const bool has_top = first_row(tile.row) >= 0, has_bottom = first_row(tile.row) + 2 < block.image_rows;
    float scales[2] = {tile.scale[0], tile.scale[1]};
    if (!has_top || !has_bottom) {
      // They are for three rows.
      const float more = 3 * scale(1 + has_top + has_bottom);
      SHUFFLENET_UNROLL
      for (float& scale : scales) scale *= more;
    }
    uint32_t ones[kEights], x[kSteps + 1];
    // What is outside of the strip is multiplied by zeros, and replaced by what is inside.
    SHUFFLENET_UNROLL
    for (int step = 0; step <= kSteps; ++step) x[step] = most(tile.plane, least(tile.x[step], tile.end));
    SHUFFLENET_UNROLL
    for (int k = 0; k < kEights; ++k) {
      ones[k] = (k >= kRowEights || has_top) && (k < 2 * kRowEights || has_bottom) ? tile.ones[k] : 0;
    }
    uint32_t at = to + (pair * 2 * kColumns + lane / 4) * layout.result_pitch + pixel * kElement;
    uint32_t from = (begin + pair) * pair_bytes;
    const uint32_t end_bytes = (begin + end) * pair_bytes;
    SHUFFLENET_NO_UNROLL
    for (; from < end_bytes; from += pair_bytes, at += 2 * half_bytes) {
      float sums[4];
      for_each<0, kSteps>([&](auto index) {
        constexpr int kStep = decltype(index)::value;
        uint32_t a[4];
        load_matrices<0>(a, x[kStep] + from);
        multiply_tile<T, kStep == 0>(sums, a, {ones[2 * kStep], ones[2 * kStep + 1]});
      });
      uint32_t last[2];
      load_matrices<0>(last, x[kSteps] + from);
      multiply_matrices(sums, last, ones[kEights - 1], T{});
      // 0 times Inf carries NaN from one pixel into others: into all of the eight but the one or two neighbours that
      // have it as a tap, so that some lane's first pixel shows it.
      const float any = sums[0] + sums[2];
      if (warp_any(any != any)) sum_by_pixels(sums, tile, from);
      if (here <= 0) continue;
      SHUFFLENET_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float low = sums[2 * half] * scales[0], high = sums[2 * half + 1] * scales[1];
        const uint32_t both = s.pool_relu ? pack<true>(low, high, T{}) : pack<false>(low, high, T{});
        const uint32_t into = at + half * half_bytes;
        if constexpr (kPaired) {
          store_pair<0>(into, both);
        } else {
          store_element(into, static_cast<uint16_t>(both));
          if (here > 1) store_element(into + kElement, static_cast<uint16_t>(both >> 16));
        }
      }
    }
  }

  // Sums the lane's pixels one by one, of its channel of the 16 that lie `from` bytes behind x's first, and of that 8
  // further.
  SHUFFLENET_DEVICE void sum_by_pixels(float (&sums)[4], const Tile& tile, uint32_t from) const {
    SHUFFLENET_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint32_t plane = block.base + from + (lane / 4 + i / 2 * kColumns) * layout.x_pitch;
      const int pixel = tile.pixel + i % 2, first = first_tap(pixel);
      sums[i] = 0;
      SHUFFLENET_NO_UNROLL
      for (int row = most(0, first_row(tile.row)); row < least(first_row(tile.row) + 3, block.image_rows); ++row) {
        SHUFFLENET_NO_UNROLL
        for (int tap = 0; tap < column_taps(pixel); ++tap) {
          sums[i] += widen(T{load_element(plane + (row * s.width + first + tap) * kElement)});
        }
      }
    }
  }
};

template <class T>
struct ExactPlanePool : PlaneTaps {
  SHUFFLENET_DEVICE ExactPlanePool(const StripStaging& block, uint32_t to) : PlaneTaps(block, to) {}

  SHUFFLENET_DEVICE void run(int begin, int end) const {
    const int first = begin * 2 * kColumns, channels = least(end * 2 * kColumns, s.in_channels) - first;
    const int warps = block.t.warps, pixels = block.out_rows * s.out_width, items = ceil_div(pixels, 32);
    // Where there are fewer items than warps, these share the channels as well; and so do lanes where pixels are few.
    const int shares = most(1, least(warps / items, channels)), share_channels = ceil_div(channels, shares);
    const int lanes = least(pixels, 32), side_by_side = 32 / lanes, in_turn = lane / lanes;
    if (in_turn == side_by_side) return;
    SHUFFLENET_NO_UNROLL
    for (int i = block.warp; i < items * shares; i += warps) {
      const int share = i / items, mine = share * share_channels, behind = least(mine + share_channels, channels);
      pool((i - share * items) * 32 + lane - in_turn * lanes, first, mine + in_turn, behind, side_by_side);
    }
  }

 private:
  static constexpr int kElement = sizeof(T);

  // Pools a pixel, of every step-th channel from `channel` to `end`, counted from the first one that is put.
  SHUFFLENET_DEVICE void pool(int pixel, int first, int channel, int end, int step) const {
    const int inside = least(pixel, block.out_rows * s.out_width - 1);
    const int out_row = block.constants.by_out_width.quotient(inside), column = inside - out_row * s.out_width;
    const int row = first_row(out_row);
    // The middle row and column of taps are inside of the image.
    const bool has_top = row >= 0, has_bottom = row + 2 < block.image_rows;
    const bool has_left = column > 0, has_right = 2 * column + 1 < s.width;
    const float factor = scale(1 + has_left + has_right) * scale(1 + has_top + has_bottom);
    const uint32_t row_bytes = s.width * kElement;
    uint32_t from = block.base + (first + channel) * layout.x_pitch + ((row + 1) * s.width + 2 * column) * kElement;
    uint32_t at = to + channel * layout.result_pitch + inside * kElement;
    const auto sum_row = [&](uint32_t middle) {
      float sum = float_of(load_pair(middle));
      if (has_left) sum += float_of(load_pair(middle - kElement));
      if (has_right) sum += float_of(load_pair(middle + kElement));
      return sum;
    };
    SHUFFLENET_NO_UNROLL
    for (; channel < end; channel += step, from += step * layout.x_pitch, at += step * layout.result_pitch) {
      float sum = sum_row(from);
      if (has_top) sum += sum_row(from - row_bytes);
      if (has_bottom) sum += sum_row(from + row_bytes);
      sum *= factor;
      if (s.pool_relu) sum = relu(sum);
      if (pixel == inside) store_element(at, sum);
    }
  }
};

template <class T>
using PlanePool = std::conditional_t<kIsWide<T>, ExactPlanePool<T>, MatrixPlanePool<T>>;

}  // namespace shufflenet::cuda
