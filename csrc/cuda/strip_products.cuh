// What a warp of strip_kernel.cuh multiplies: 32 pixels by some tiles of conv1 or of conv3. Operands of pixels come
// from shared memory, by ldmatrix, for which a lane gives the address of one pixel, or as the lane has stored them;
// operands of weights come from the packed fragments.
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

inline constexpr int kWordBytes = 4;  // of a register: one or two channels of an operand

// Whether a lane's operands and results are 32 bits wide. Two neighbouring ones of the latter are a pair.
template <class T>
inline constexpr bool kIsWide = sizeof(T) == 4;
template <class T>
using Pair = std::conditional_t<kIsWide<T>, FloatPair, uint32_t>;

template <int kTiles>
using Sums = float[kTilesOfItem][kTiles][4];

// The channels of x that a group reads, of the blocks that are loaded: `depth` of them behind `skipped` ones.
struct ChannelMask {
  // Clears what a lane holds of other channels, in the half (32 bytes of channels) `half` of a tile's operand. They are
  // multiplied by weights that are 0; but 0 times Inf is NaN.
  template <class T>
  SHUFFLENET_DEVICE void apply(uint32_t (&a)[4], int half) const {
    constexpr int kInWord = kWordBytes / sizeof(T);
    SHUFFLENET_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int channel = kInWord * (8 * half + 4 * i + lane_index() % 4) - skipped;
      const uint32_t mask = static_cast<uint32_t>(channel) < static_cast<uint32_t>(depth) ? 0xffffffffu : 0;
      a[2 * i] &= mask;
      a[2 * i + 1] &= mask;
    }
  }
  int skipped, depth;
};

// Where operands of pixels lie if a pixel's channels lie side by side, in blocks of 16 bytes: row[m] is the address of
// the lane's pixel of tile m, lanes 16 to 31 having that of the next block. Each half lies kToNext bytes behind the
// last.
template <class T, int kToNext>
struct PixelOperand {
  template <int kHalf>
  SHUFFLENET_DEVICE void load(uint32_t (&a)[4], int m) const {
    load_matrices<kHalf * kToNext>(a, row[m]);
    round_operands<T>(a);
  }
  SHUFFLENET_DEVICE void advance() {
    SHUFFLENET_UNROLL
    for (int m = 0; m < kTilesOfItem; ++m) row[m] += 2 * kToNext;
  }
  uint32_t row[kTilesOfItem];
};

// The same if each lane has stored what it holds of an operand: at[m] is the address of that.
template <int kToNext>
struct StoredOperand {
  template <int kHalf>
  SHUFFLENET_DEVICE void load(uint32_t (&a)[4], int m) const {
    load_fragment<kHalf * kToNext>(a, at[m]);
  }
  SHUFFLENET_DEVICE void advance() {
    SHUFFLENET_UNROLL
    for (int m = 0; m < kTilesOfItem; ++m) at[m] += 2 * kToNext;
  }
  uint32_t at[kTilesOfItem];
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

// The same in 32 bits, which are loaded one by one: row[m] is the address of the lane's pixel, of number lane / 4, and
// channel, of number lane % 4. The last eight pixels lie eight_bytes[m] behind: none where there are no more.
template <class T>
struct WidePlaneOperand {
  template <int kHalf>
  SHUFFLENET_DEVICE void load(uint32_t (&a)[4], int m) const {
    const uint32_t first = row[m] + kHalf * half_bytes, last = first + eight_bytes[m];
    a[0] = load_pair(first);
    a[1] = load_pair(last);
    a[2] = load_pair(first + half_bytes / 2);
    a[3] = load_pair(last + half_bytes / 2);
    round_operands<T>(a);
  }
  SHUFFLENET_DEVICE void advance() {
    SHUFFLENET_UNROLL
    for (int m = 0; m < kTilesOfItem; ++m) row[m] += 2 * half_bytes;
  }
  uint32_t row[kTilesOfItem], eight_bytes[kTilesOfItem];
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

// Multiplies half kHalf of a step for kTiles tiles: the first half of all sets the sums.
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

// Multiplies 32 pixels by kTiles tiles, over so many halves of channels.
template <class T, bool kMasked, bool kTransposed, int kTiles, class Operand>
SHUFFLENET_DEVICE void multiply(Sums<kTiles>& sums, Operand& pixels, const Fragment* weights, int halves,
                                ChannelMask mask) {
  const auto load_half = [&](uint32_t (&a)[kTilesOfItem][4], int half, auto odd) {
    SHUFFLENET_UNROLL
    for (int m = 0; m < kTilesOfItem; ++m) {
      pixels.template load<decltype(odd)::value>(a[m], m);
      if constexpr (kMasked) mask.apply<T>(a[m], half);
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
SHUFFLENET_DEVICE void finish(const float (&sum)[4], const Vector4& affine, Pair<T> (&pairs)[2]) {
  const float (&v)[4] = affine.values;
  SHUFFLENET_UNROLL
  for (int row = 0; row < 2; ++row) {
    pairs[row] = pack<kRelu>(multiply_add(sum[2 * row], v[0], v[2]), multiply_add(sum[2 * row + 1], v[1], v[3]), T{});
  }
}

// The same for a tile of the transposed product: the constants are of the lane's rows, and a pair is of pixels.
template <class T, bool kRelu>
SHUFFLENET_DEVICE void finish_transposed(const float (&sum)[4], const Vector4& affine, Pair<T> (&pairs)[2]) {
  SHUFFLENET_UNROLL
  for (int row = 0; row < 2; ++row) {
    const float scale = affine.values[row], bias = affine.values[2 + row];
    pairs[row] = pack<kRelu>(multiply_add(sum[2 * row], scale, bias), multiply_add(sum[2 * row + 1], scale, bias), T{});
  }
}

// Return a number of a pair: as it is stored, and as a float.
template <class T>
SHUFFLENET_DEVICE auto element_of(Pair<T> pair, int i) {
  if constexpr (kIsWide<T>) {
    return i == 0 ? pair.low : pair.high;
  } else {
    return static_cast<uint16_t>(pair >> 16 * i);
  }
}
template <class T>
SHUFFLENET_DEVICE float number_of(uint32_t pair, int i) {
  return widen(T{element_of<T>(pair, i)});
}

}  // namespace shufflenet::cuda
