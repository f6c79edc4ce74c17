// The depthwise convolution of a strip: y2 of 32 pixels of a slice, which the warp keeps in shared memory of its own,
// from where conv3's operands come. In 16 bits it is made on tensor cores.
#pragma once

#include "strip_products.cuh"
#include "strip_staging.cuh"

namespace shufflenet::cuda {

// How far in y1 a pixel's right taps lie behind its left ones: with stride 2 no odd places are between them.
template <class T, int kStride>
inline constexpr int kRightBytes = (kStride == 1 ? 2 : 1) * kColumns * static_cast<int>(sizeof(T));
// Whether a scale is that of an empty slot.
SHUFFLENET_DEVICE bool is_empty(float scale) { return bits_of(scale) == 0x80000000u; }  // -0

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
    load_matrices<kRightBytes<T, kStride>>(a, corner[m]);
    multiply_matrices(sums[m][0], a, {second.words[0], second.words[1]}, T{});
    load_matrices<0>(a, bottom[m]);
    multiply_matrices(sums[m][0], a, {second.words[2], second.words[3]}, T{});
    load_matrices<kRightBytes<T, kStride>>(last, bottom[m]);
    multiply_matrices(sums[m][0], last, third.words[0], T{});
  }
}

// The same, slot by slot, where y1 is not finite: 0 times Inf would carry NaN from one slot into the others.
// corner[m][row] is the address of the top left tap of the lane's pixel in a row of a tile.
template <class T, int kStride>
SHUFFLENET_DEVICE void depthwise_by_slots(Sums<1>& sums, const uint32_t (&corner)[kTilesOfItem][2], uint32_t row_bytes,
                                          uint32_t middle_bytes, const Fragment* taps, int lane) {
  // The lanes that hold what is on the diagonal in the lane's two columns; `taps` is the lane's own.
  const int column = lane % 4 * 2;
  const int lanes[2] = {column * 4 + column / 2, (column + 1) * 4 + column / 2};
  SHUFFLENET_UNROLL
  for (int m = 0; m < kTilesOfItem; ++m) {
    SHUFFLENET_UNROLL
    for (int i = 0; i < 4; ++i) sums[m][0][i] = 0;
  }
  SHUFFLENET_NO_UNROLL
  for (int tap = 0; tap < 9; ++tap) {
    const int word = tap < 3 ? 2 * tap : tap < 6 ? 2 * (tap - 3) + 1 : tap;
    const uint32_t in_row = tap % 3 == 1 ? middle_bytes : tap % 3 == 2 ? kRightBytes<T, kStride> : 0;
    float weight[2];
    SHUFFLENET_UNROLL
    for (int odd = 0; odd < 2; ++odd) {
      const Fragment f = load_constant(taps + (word / 4 * 32 + lanes[odd] - lane));
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

// What a block keeps where y2 is made.
struct DepthwisePlace {
  SHUFFLENET_DEVICE DepthwisePlace(const StripStaging& block, int lane)
      : block(block), layout(block.layout), packed(block.packed), lane(lane) {}
  const StripStaging& block;
  const StripLayout& layout;
  const PackedLayout& packed;
  const int lane;
};

// Makes y2 of 16 bits.
template <class T>
struct MatrixDepthwise : DepthwisePlace {
  static constexpr bool kIsExact = false;  // whether no slot depends on another
  static constexpr int kPixelBytes = kColumns * static_cast<int>(sizeof(T));

  SHUFFLENET_DEVICE MatrixDepthwise(const StripStaging& block, int lane) : DepthwisePlace(block, lane) {}

  // Makes the warp's y2 of 32 pixels. Where kFinite, all of y1 should be finite: 0 times Inf carries NaN from one slot
  // into others. If not, each slot is computed by itself, and the ReLU is decided at run time.
  template <int kStride, bool kFinite, bool kRelu>
  SHUFFLENET_DEVICE void make(int first_pixel, int slice) const {
    const uint32_t row_bytes = layout.y1_row, middle_bytes = kStride == 1 ? kPixelBytes : layout.y1_odd;
    uint32_t corner[kTilesOfItem], bottom[kTilesOfItem], rows[kTilesOfItem][2];
    SHUFFLENET_UNROLL
    for (int m = 0; m < kTilesOfItem; ++m) {
      const uint32_t at = block.y1_corner(first_pixel + m * kTilePixels + lane % 16, slice);
      corner[m] = at + lane / 16 * row_bytes;
      bottom[m] = at + 2 * row_bytes + lane / 16 * middle_bytes;
      if constexpr (!kFinite) {
        SHUFFLENET_UNROLL
        for (int half = 0; half < 2; ++half) {
          rows[m][half] = block.y1_corner(first_pixel + m * kTilePixels + half * 8 + lane / 4, slice);
        }
      }
    }
    const Fragment* taps =
        block.fragments + unsigned(packed.taps + slice * packed.blocks * tap_fragments(sizeof(T)) + lane);
    const Fragment* affine = block.fragments + unsigned(packed.affine2 + slice * packed.blocks * 4 + lane % 4);
    uint32_t to = block.my_y2() + lane * kBlockBytes;
    const uint32_t end = to + packed.blocks * (kItemPixels * kBlockBytes);
    warp_barrier();  // all lanes have finished reading what y2 was
    SHUFFLENET_NO_UNROLL
    for (; to != end; to += kItemPixels * kBlockBytes) {
      Sums<1> sums;
      const Vector4 scales = load_floats<0>(affine);
      if constexpr (kFinite) {
        depthwise<T, kStride>(sums, corner, bottom, middle_bytes, taps);
      } else {
        depthwise_by_slots<T, kStride>(sums, rows, row_bytes, middle_bytes, taps, lane);
      }
      uint32_t pairs[kTilesOfItem][2];
      SHUFFLENET_UNROLL
      for (int m = 0; m < kTilesOfItem; ++m) {
        finish<T, kRelu>(sums[m][0], scales, pairs[m]);
        if constexpr (!kFinite) {
          if (block.s.conv2_relu) finish<T, true>(sums[m][0], scales, pairs[m]);
          clear_empty_slots(pairs[m], scales);
        }
      }
      store_matrices<4>(to, {pairs[0][0], pairs[0][1], pairs[1][0], pairs[1][1]});
      taps += tap_fragments(sizeof(T));
      affine += 4;
      SHUFFLENET_UNROLL
      for (int m = 0; m < kTilesOfItem; ++m) {
        corner[m] += layout.y1_block;
        bottom[m] += layout.y1_block;
        if constexpr (!kFinite) {
          rows[m][0] += layout.y1_block;
          rows[m][1] += layout.y1_block;
        }
      }
    }
    // conv3 multiplies two blocks at a time.
    if (packed.blocks % 2 != 0) clear_block(end);
    warp_barrier();
  }

  SHUFFLENET_DEVICE PixelOperand<T, 2 * kItemPixels * kBlockBytes> operand() const {
    const uint32_t at = block.my_y2() + (lane / 16 * kItemPixels + lane % 16) * kBlockBytes;
    return {{at, at + kTilePixels * kBlockBytes}};
  }

 private:
  // Zeroes the slots that no channel has: 0 times Inf may have made them NaN.
  SHUFFLENET_DEVICE static void clear_empty_slots(uint32_t (&pairs)[2], const Vector4& scales) {
    const uint32_t mask = (is_empty(scales.values[0]) ? 0 : 0xffffu) | (is_empty(scales.values[1]) ? 0 : 0xffff0000u);
    pairs[0] &= mask;
    pairs[1] &= mask;
  }
};

// Makes y2 of 32 bits, one slot by itself as all others: as PyTorch computes a depthwise convolution in float32 also
// where tensor cores may round. A lane stores what it holds as conv3's operand: row i of a half is slot 2 * i, or from
// row 4 on slot 2 * i - 7, as that is a lane's second column.
template <class T>
struct ExactDepthwise : DepthwisePlace {
  static constexpr bool kIsExact = true;
  static constexpr int kPixelBytes = kColumns * static_cast<int>(sizeof(T));
  static constexpr int kTapFragments = tap_fragments(sizeof(T)) / 4;  // of a lane

  SHUFFLENET_DEVICE ExactDepthwise(const StripStaging& block, int lane) : DepthwisePlace(block, lane) {}

  // Makes the warp's y2 of 32 pixels, be y1 finite or not.
  template <int kStride, bool kFinite, bool kRelu>
  SHUFFLENET_DEVICE void make(int first_pixel, int slice) const {
    uint32_t corner[kTilesOfItem][2];
    SHUFFLENET_UNROLL
    for (int i = 0; i < 2 * kTilesOfItem; ++i) {
      corner[i / 2][i % 2] = block.y1_corner(first_pixel + i * 8 + lane / 4, slice) + lane % 4 * kPairBytes;
    }
    const Fragment* taps =
        block.fragments + unsigned(packed.taps + slice * packed.blocks * tap_fragments(sizeof(T)) + lane % 4);
    const Fragment* affine = block.fragments + unsigned(packed.affine2 + slice * packed.blocks * 4 + lane % 4);
    uint32_t to = block.my_y2() + lane * kBlockBytes;
    const uint32_t end = to + packed.blocks * (kItemPixels * kHalfBytes);
    SHUFFLENET_NO_UNROLL
    for (; to != end; to += kItemPixels * kHalfBytes) {
      Fragment weights[kTapFragments];
      for_each<0, kTapFragments>([&](auto i) {
        weights[decltype(i)::value] = load_constant<decltype(i)::value * 4>(taps);
      });
      const Vector4 scales = load_floats<0>(affine);
      for_each<0, kTilesOfItem>([&](auto tile) {
        constexpr int m = decltype(tile)::value;
        FloatPair pairs[2];
        SHUFFLENET_UNROLL
        for (int half = 0; half < 2; ++half) {
          pairs[half] = sum<kStride>(corner[m][half], weights);
          corner[m][half] += layout.y1_block;
        }
        const float sums[4] = {pairs[0].low, pairs[0].high, pairs[1].low, pairs[1].high};
        finish<T, kRelu>(sums, scales, pairs);
        // What x had beside a group may have made an empty slot NaN.
        SHUFFLENET_UNROLL
        for (FloatPair& pair : pairs) {
          if (is_empty(scales.values[0])) pair.low = 0;
          if (is_empty(scales.values[1])) pair.high = 0;
        }
        Fragment a = {{bits_of(pairs[0].low), bits_of(pairs[1].low), bits_of(pairs[0].high), bits_of(pairs[1].high)}};
        round_operands<T>(a.words);
        store_fragment<m * kTileBytes>(to, a);
      });
      taps += tap_fragments(sizeof(T));
      affine += 4;
    }
  }

  SHUFFLENET_DEVICE StoredOperand<kItemPixels * kHalfBytes> operand() const {
    const uint32_t at = block.my_y2() + lane * kBlockBytes;
    return {{at, at + kTileBytes}};
  }

 private:
  static constexpr int kPairBytes = static_cast<int>(sizeof(FloatPair)), kTileBytes = kTilePixels * kHalfBytes;

  // Returns the sums of the lane's two columns in a pixel, whose top left tap lies at `corner`.
  template <int kStride>
  SHUFFLENET_DEVICE FloatPair sum(uint32_t corner, const Fragment (&weights)[kTapFragments]) const {
    FloatPair sum = {0, 0};
    for_each<0, 9>([&](auto index) {
      constexpr int kTap = decltype(index)::value, kColumn = kTap % 3;
      const uint32_t row = corner + kTap / 3 * layout.y1_row;
      const uint32_t (&words)[4] = weights[kTap / 2].words;
      FloatPair y1;
      if constexpr (kColumn == 1) {
        y1 = load_float_pair<0>(row + (kStride == 1 ? kPixelBytes : layout.y1_odd));
      } else {
        y1 = load_float_pair<kColumn == 0 ? 0 : kRightBytes<T, kStride>>(row);
      }
      sum.low = multiply_add(y1.low, float_of(words[kTap % 2 * 2]), sum.low);
      sum.high = multiply_add(y1.high, float_of(words[kTap % 2 * 2 + 1]), sum.high);
    });
    return sum;
  }
};

template <class T>
using StripDepthwise = std::conditional_t<kIsWide<T>, ExactDepthwise<T>, MatrixDepthwise<T>>;

}  // namespace shufflenet::cuda
