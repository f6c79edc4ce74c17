// The shortcut of a unit of stride 2 by strips in the contiguous layout: avg_pool2d(x, 3, 2, 1), with or without a
// ReLU, of what is in shared memory of x. The result goes to shared memory too, so that it is copied as conv3's is.
//
// A warp sums 8 pixels of a row of the result on tensor cores, 16 channels at a time: it multiplies their pixels of x
// by ones, where a pixel is a tap of the result's, and by zeros.
#pragma once

#include "strip_products.cuh"
#include "strip_staging.cuh"

namespace shufflenet::cuda {

template <class T>
struct PlanePool {
  // `to` is where the result is put: planes of layout.result_pitch bytes, from channel 16 * begin on.
  SHUFFLENET_DEVICE PlanePool(const StripStaging& block, uint32_t to)
      : block(block), s(block.s), layout(block.layout), lane(block.lane), to(to) {}

  // Pools the channels from 16 * begin to 16 * end.
  SHUFFLENET_DEVICE void run(int begin, int end) const {
    const int row_tiles = ceil_div(s.out_width, kColumns), tiles = block.out_rows * row_tiles, warps = block.t.warps;
    // Where there are fewer tiles than warps, these share the channels as well.
    const int shares = most(1, least(warps / tiles, end - begin)), share_pairs = ceil_div(end - begin, shares);
    SHUFFLENET_NO_UNROLL
    for (int item = block.warp; item < tiles * shares; item += warps) {
      const int share = item / tiles, tile = item - share * tiles, row = tile / row_tiles;
      const int first = share * share_pairs, last = least(first + share_pairs, end - begin);
      const Tile of(*this, row, (tile - row * row_tiles) * kColumns);
      if (s.out_width % 2 == 0) {
        pool<true>(of, begin, first, last);
      } else {
        pool<false>(of, begin, first, last);
      }
    }
  }

 private:
  // The taps of 8 pixels in a row of x lie in three blocks of 8 of its pixels, wherever the first of these begins.
  static constexpr int kRowEights = 3, kEights = 3 * kRowEights, kSteps = kEights / 2;

  // Eight pixels of the result, from `column` of a row on: the operands that pick their taps out of nine blocks of 8
  // pixels of x, and the addresses that the lane loads the blocks of its channel from, two by two and the last one.
  struct Tile {
    SHUFFLENET_DEVICE Tile(const PlanePool& pool, int row, int column) : row(row), column(column) {
      const StripStaging& block = pool.block;
      const Sizes& s = pool.s;
      T one;
      narrow(1.f, one);
      const int mine = column + pool.lane / 4;  // that the lane's operands are of; may be behind the last one
      const int first = pool.first_tap(mine), taps = most(0, pool.column_taps(mine));
      const int end_eight = (block.image_rows * s.width - 1) / kColumns;
      const uint32_t channel = block.base + pool.lane % 16 * pool.layout.x_pitch;
      uint32_t eights[kEights];
      SHUFFLENET_UNROLL
      for (int tap_row = 0; tap_row < 3; ++tap_row) {
        const int x_row = pool.first_row(row) + tap_row;
        const bool is_inside = static_cast<uint32_t>(x_row) < static_cast<uint32_t>(block.image_rows);
        const int count = is_inside ? taps : 0, begin = x_row * s.width + 2 * column - 1;
        const int eight = begin >> 3;  // rounded down also if it is -1
        const int away = eight * kColumns + pool.lane % 4 * 2 - (x_row * s.width + first);
        SHUFFLENET_UNROLL
        for (int i = 0; i < kRowEights; ++i) {
          const int k = tap_row * kRowEights + i;
          // What is outside of the strip is multiplied by zeros, and replaced by what is inside.
          eights[k] = channel + most(0, least(eight + i, end_eight)) * kBlockBytes;
          const uint32_t tap = away + i * kColumns;
          const bool is_low = tap < static_cast<uint32_t>(count), is_high = tap + 1 < static_cast<uint32_t>(count);
          ones[k] = (is_low ? one.bits : 0u) | (is_high ? uint32_t{one.bits} << 16 : 0u);
        }
      }
      SHUFFLENET_UNROLL
      for (int step = 0; step < kSteps; ++step) x[step] = pool.lane < 16 ? eights[2 * step] : eights[2 * step + 1];
      x[kSteps] = eights[kEights - 1];
      pixel = column + pool.lane % 4 * 2;
      SHUFFLENET_UNROLL
      for (int i = 0; i < 2; ++i) scale[i] = pool.scale(row, pixel + i);
    }
    int row, column;
    int pixel;  // of the row, the lane's first of two
    uint32_t ones[kEights];
    uint32_t x[kSteps + 1];
    float scale[2];
  };

  // Pools a tile, of the channels from 16 * (begin + pair) to 16 * (begin + end). If kPaired, as rows have an even
  // number, the lane's two pixels are a word.
  template <bool kPaired>
  SHUFFLENET_DEVICE void pool(const Tile& tile, int begin, int pair, int end) const {
    const uint32_t pair_bytes = 2 * kColumns * layout.x_pitch, half_bytes = kColumns * layout.result_pitch;
    const int pixel = tile.row * s.out_width + tile.pixel, here = s.out_width - tile.pixel;
    uint32_t at = to + (pair * 2 * kColumns + lane / 4) * layout.result_pitch + pixel * kElementBytes;
    uint32_t from = (begin + pair) * pair_bytes;
    const uint32_t end_bytes = (begin + end) * pair_bytes;
    SHUFFLENET_NO_UNROLL
    for (; from < end_bytes; from += pair_bytes, at += 2 * half_bytes) {
      float sums[4];
      for_each<0, kSteps>([&](auto index) {
        constexpr int kStep = decltype(index)::value;
        uint32_t a[4];
        load_matrices<0>(a, tile.x[kStep] + from);
        multiply_tile<T, kStep == 0>(sums, a, {tile.ones[2 * kStep], tile.ones[2 * kStep + 1]});
      });
      uint32_t last[2];
      load_matrices<0>(last, tile.x[kSteps] + from);
      multiply_matrices(sums, last, tile.ones[kEights - 1], T{});
      // 0 times Inf carries NaN from one pixel into others: into all of the eight but the one or two neighbours that
      // have it as a tap, so that some lane's first pixel shows it.
      const float any = sums[0] + sums[2];
      if (warp_any(any != any)) sum_by_pixels(sums, tile, from);
      if (here <= 0) continue;
      SHUFFLENET_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float low = sums[2 * half] * tile.scale[0], high = sums[2 * half + 1] * tile.scale[1];
        const uint32_t both = s.pool_relu ? pack<true>(low, high, T{}) : pack<false>(low, high, T{});
        const uint32_t into = at + half * half_bytes;
        if constexpr (kPaired) {
          store_pair<0>(into, both);
        } else {
          store_element(into, static_cast<uint16_t>(both));
          if (here > 1) store_element(into + kElementBytes, static_cast<uint16_t>(both >> 16));
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
      for (int row = most(0, first_row(tile.row)); row < end_row(tile.row); ++row) {
        SHUFFLENET_NO_UNROLL
        for (int tap = 0; tap < column_taps(pixel); ++tap) {
          sums[i] += widen(T{load_element(plane + (row * s.width + first + tap) * kElementBytes)});
        }
      }
    }
  }

  // Return the first row of taps of a row of the result, and the row behind the last one inside of the image, among the
  // rows of x in shared memory.
  SHUFFLENET_DEVICE int first_row(int row) const { return 2 * row + block.in_row - block.image_row; }
  SHUFFLENET_DEVICE int end_row(int row) const { return least(first_row(row) + 3, block.image_rows); }
  // Return the first column of taps inside of the image, and how many there are.
  SHUFFLENET_DEVICE int first_tap(int column) const { return most(0, 2 * column - 1); }
  SHUFFLENET_DEVICE int column_taps(int column) const { return least(2 * column + 2, s.width) - first_tap(column); }
  // Returns 1 over the number of taps that count.
  SHUFFLENET_DEVICE float scale(int row, int column) const {
    if (s.pool_count_include_pad) return 1.f / 9;
    return inverse(column_taps(column)) * inverse(end_row(row) - most(0, first_row(row)));
  }

  const StripStaging& block;
  const Sizes& s;
  const StripLayout& layout;
  const int lane;
  const uint32_t to;
};

}  // namespace shufflenet::cuda
