// What a warp of strip_kernel.cuh multiplies: 32 pixels by some tiles of conv1, by the taps of a slice, by some tiles
// of conv3. All operands of pixels come from shared memory by ldmatrix, a lane giving the address of one pixel; all
// operands of weights from the packed fragments.
//
// A lane holds the sums of rows (pixels) lane / 4 and lane / 4 + 8 of a tile, in columns 2 * (lane % 4) and the one
// behind: sum[0], sum[1] of the first row, sum[2], sum[3] of the second. The same registers make the transposed product
// if the operands trade places: two tiles of weights then are 16 rows, channels, and a tile of pixels twice 8 columns.
// sums[m][2 * n] and sums[m][2 * n + 1] are pair n of tiles by the first and the last 8 pixels of tile m.
#pragma once

#include <type_traits>

#include "common.cuh"
#ifndef SHUFFLENET_TEST_DEVICE
#include "matrices.cuh"
#endif
#include "strip.h"

namespace shufflenet::cuda {

// Calls f with the integral constants from kFrom to kTo - 1.
template <int kFrom, int kTo, class F>
SHUFFLENET_DEVICE void for_each(const F& f) {
  if constexpr (kFrom < kTo) {
    f(std::integral_constant<int, kFrom>{});
    for_each<kFrom + 1, kTo>(f);
  }
}

template <int kTiles>
using Sums = float[kTilesOfItem][kTiles][4];

// The channels of x that a group reads, of the blocks that are loaded: `depth` of them behind `skipped` ones.
struct ChannelMask {
  // Clears what a lane holds of other channels, in the half (16 channels) `half` of a tile's operand. They are
  // multiplied by weights that are 0; but 0 times Inf is NaN.
  SHUFFLENET_DEVICE void apply(uint32_t (&a)[4], int half) const {
    SHUFFLENET_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int channel = 16 * half + 8 * i + lane_index() % 4 * 2 - skipped;
      const uint32_t mask = static_cast<uint32_t>(channel) < static_cast<uint32_t>(depth) ? 0xffffffffu : 0;
      a[2 * i] &= mask;
      a[2 * i + 1] &= mask;
    }
  }
  int skipped, depth;
};

// Where operands of pixels lie if a pixel's channels lie side by side, in blocks of 8: row[m] is the address of the
// lane's pixel of tile m, lanes 16 to 31 having that of the next 8 channels. Each half lies kHalfBytes behind the last.
template <int kHalfBytes>
struct PixelOperand {
  template <int kHalf>
  SHUFFLENET_DEVICE void load(uint32_t (&a)[4], int m) const {
    load_matrices<kHalf * kHalfBytes>(a, row[m]);
  }
  SHUFFLENET_DEVICE void advance() {
    SHUFFLENET_UNROLL
    for (int m = 0; m < kTilesOfItem; ++m) row[m] += 2 * kHalfBytes;
  }
  uint32_t row[kTilesOfItem];
};

// The same if a channel's pixels do: row[m] is the address of eight pixels of the lane's channel. Lanes 8 to 15 and 24
// to 31 have the last eight of tile m, lanes 16 to 31 the next 8 channels.
struct PlaneOperand {
  template <int kHalf>
  SHUFFLENET_DEVICE void load(uint32_t (&a)[4], int m) const {
    load_transposed(a, row[m] + kHalf * half_bytes);
  }
  SHUFFLENET_DEVICE void advance() {
    SHUFFLENET_UNROLL
    for (int m = 0; m < kTilesOfItem; ++m) row[m] += 2 * half_bytes;
  }
  uint32_t row[kTilesOfItem];
  uint32_t half_bytes;
};

// Multiplies, or if kSets sets.
template <class T, bool kSets>
SHUFFLENET_DEVICE void multiply_tile(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kSets) {
    set_to_product(sum, a, b, T{});
  } else {
    multiply_matrices(sum, a, b, T{});
  }
}

// Multiplies half kHalf (16 channels) of a step for kTiles tiles: the first half of all sets the sums.
template <class T, int kHalf, bool kSets, bool kTransposed, int kTiles>
SHUFFLENET_DEVICE void multiply_half(Sums<kTiles>& sums, const uint32_t (&a)[kTilesOfItem][4],
                                     const Fragment (&b)[kTiles]) {
  static_assert(!kTransposed || kTiles % 2 == 0);
  SHUFFLENET_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    SHUFFLENET_UNROLL
    for (int m = 0; m < kTilesOfItem; ++m) {
      if constexpr (kTransposed) {
        const Fragment &first = b[n / 2 * 2], &second = b[n / 2 * 2 + 1];
        const uint32_t rows[4] = {
            first.words[2 * kHalf], second.words[2 * kHalf], first.words[2 * kHalf + 1], second.words[2 * kHalf + 1]};
        multiply_tile<T, kSets>(sums[m][n], rows, {a[m][n % 2], a[m][2 + n % 2]});
      } else {
        multiply_tile<T, kSets>(sums[m][n], a[m], {b[n].words[2 * kHalf], b[n].words[2 * kHalf + 1]});
      }
    }
  }
}

// Multiplies 32 pixels by kTiles tiles, over 16 x `halves` channels.
template <class T, bool kMasked, bool kTransposed, int kTiles, class Operand>
SHUFFLENET_DEVICE void multiply(Sums<kTiles>& sums, Operand& pixels, const Fragment* weights, int halves,
                                ChannelMask mask) {
  const auto load_half = [&](uint32_t (&a)[kTilesOfItem][4], int half, auto odd) {
    SHUFFLENET_UNROLL
    for (int m = 0; m < kTilesOfItem; ++m) {
      pixels.template load<decltype(odd)::value>(a[m], m);
      if constexpr (kMasked) mask.apply(a[m], half);
    }
  };
  const auto step = [&](int half, auto sets) {
    Fragment b[kTiles];
    for_each<0, kTiles>([&](auto n) { b[decltype(n)::value] = load_constant<decltype(n)::value * 32>(weights); });
    uint32_t a[kTilesOfItem][4];
    load_half(a, half, std::integral_constant<int, 0>{});
    multiply_half<T, 0, decltype(sets)::value, kTransposed>(sums, a, b);
    if (half + 1 == halves) return;
    load_half(a, half + 1, std::integral_constant<int, 1>{});
    multiply_half<T, 1, false, kTransposed>(sums, a, b);
  };
  step(0, std::true_type{});
  SHUFFLENET_NO_UNROLL
  for (int half = 2; half < halves; half += 2) {
    weights += kTiles * 32;
    pixels.advance();
    step(half, std::false_type{});
  }
}

// Applies scale, scale, bias, bias to a tile's sums, rounds them, and keeps the pairs of both rows.
template <class T, bool kRelu>
SHUFFLENET_DEVICE void finish(const float (&sum)[4], const Vector4& affine, uint32_t (&pairs)[2]) {
  const float (&v)[4] = affine.values;
  SHUFFLENET_UNROLL
  for (int row = 0; row < 2; ++row) {
    pairs[row] = pack<kRelu>(multiply_add(sum[2 * row], v[0], v[2]), multiply_add(sum[2 * row + 1], v[1], v[3]), T{});
  }
}

// The same for a tile of the transposed product: the constants are of the lane's rows, and a pair is of pixels.
template <class T, bool kRelu>
SHUFFLENET_DEVICE void finish_transposed(const float (&sum)[4], const Vector4& affine, uint32_t (&pairs)[2]) {
  SHUFFLENET_UNROLL
  for (int row = 0; row < 2; ++row) {
    const float scale = affine.values[row], bias = affine.values[2 + row];
    pairs[row] = pack<kRelu>(multiply_add(sum[2 * row], scale, bias), multiply_add(sum[2 * row + 1], scale, bias), T{});
  }
}

// The number of a pair, as a float.
template <class T>
SHUFFLENET_DEVICE float number_of(uint32_t pair, int i) {
  return widen(T{static_cast<uint16_t>(pair >> 16 * i)});
}

// How far in y1 a pixel's right taps lie behind its left ones: with stride 2 no odd places are between them.
template <int kStride>
inline constexpr int kRightBytes = (kStride == 1 ? 2 : 1) * kBlockBytes;

// The depthwise convolution of a block of 8 slots. The operand of weights is diagonal: slot times slot. The operand of
// pixels is two taps by 8 slots. corner[m] is the address of the top left tap of the lane's pixel in tile m, of that
// below for lanes 16 to 31; bottom[m] that of the bottom left tap, of the one right of it for lanes 16 to 31. A pixel's
// middle taps lie middle_bytes behind its left ones.
template <class T, int kStride>
SHUFFLENET_DEVICE void depthwise(Sums<1>& sums, const uint32_t (&corner)[kTilesOfItem],
                                 const uint32_t (&bottom)[kTilesOfItem], uint32_t middle_bytes, const Fragment* taps) {
  const Fragment first = load_constant<0>(taps), second = load_constant<32>(taps), third = load_constant<64>(taps);
  SHUFFLENET_UNROLL
  for (int m = 0; m < kTilesOfItem; ++m) {
    uint32_t a[4], last[2];
    load_matrices<0>(a, corner[m]);
    set_to_product(sums[m][0], a, {first.words[0], first.words[1]}, T{});
    if constexpr (kStride == 1) {
      load_matrices<kBlockBytes>(a, corner[m]);
    } else {
      load_matrices<0>(a, corner[m] + middle_bytes);
    }
    multiply_matrices(sums[m][0], a, {first.words[2], first.words[3]}, T{});
    load_matrices<kRightBytes<kStride>>(a, corner[m]);
    multiply_matrices(sums[m][0], a, {second.words[0], second.words[1]}, T{});
    load_matrices<0>(a, bottom[m]);
    multiply_matrices(sums[m][0], a, {second.words[2], second.words[3]}, T{});
    load_matrices<kRightBytes<kStride>>(last, bottom[m]);
    multiply_matrices(sums[m][0], last, third.words[0], T{});
  }
}

// The same, slot by slot, where y1 is not finite: 0 times Inf would carry NaN from one slot into the others.
// corner[m][row] is the address of the top left tap of the lane's pixel in a row of a tile.
template <class T, int kStride>
SHUFFLENET_DEVICE void depthwise_by_slots(Sums<1>& sums, const uint32_t (&corner)[kTilesOfItem][2], uint32_t row_bytes,
                                          uint32_t middle_bytes, const Fragment* taps) {
  // The lanes that hold what is on the diagonal in the lane's two columns; `taps` is the lane's own.
  const int column = lane_index() % 4 * 2, here = lane_index();
  const int lanes[2] = {column * 4 + column / 2, (column + 1) * 4 + column / 2};
  SHUFFLENET_UNROLL
  for (int m = 0; m < kTilesOfItem; ++m) {
    SHUFFLENET_UNROLL
    for (int i = 0; i < 4; ++i) sums[m][0][i] = 0;
  }
  SHUFFLENET_NO_UNROLL
  for (int tap = 0; tap < 9; ++tap) {
    const int word = tap < 3 ? 2 * tap : tap < 6 ? 2 * (tap - 3) + 1 : tap;
    const uint32_t in_row = tap % 3 == 1 ? middle_bytes : tap % 3 == 2 ? kRightBytes<kStride> : 0;
    float weight[2];
    SHUFFLENET_UNROLL
    for (int odd = 0; odd < 2; ++odd) {
      const Fragment f = load_constant(taps + (word / 4 * 32 + lanes[odd] - here));
      const uint32_t even_words = word % 2 == 0 ? f.words[0] : f.words[1],
                     odd_words = word % 2 == 0 ? f.words[2] : f.words[3];
      weight[odd] = number_of<T>(word % 4 < 2 ? even_words : odd_words, odd);
    }
    SHUFFLENET_UNROLL
    for (int m = 0; m < kTilesOfItem; ++m) {
      SHUFFLENET_UNROLL
      for (int row = 0; row < 2; ++row) {
        const uint32_t pair = load_pair(corner[m][row] + tap / 3 * row_bytes + in_row + column * 2);
        SHUFFLENET_UNROLL
        for (int odd = 0; odd < 2; ++odd) {
          float& sum = sums[m][0][2 * row + odd];
          sum = multiply_add(number_of<T>(pair, odd), weight[odd], sum);
        }
      }
    }
  }
}

}  // namespace shufflenet::cuda
