// A unit as one fused pass over a strip of rows (strip.h), on tensor cores from sm_80 on, in 16 bits or TF32. x is
// copied to shared memory once and serves conv1 and the shortcut: the residual, or with stride 2 the pool. What depends
// on x's layout is in strip_pixels.cuh and strip_planes.cuh.
//
//   conv1      multiplies 32 pixels by some tiles of a group. The results are stored as blocks of y1, which the shuffle
//              has sorted.
//   depthwise  and conv3 make 32 pixels of a slice (strip_depthwise.cuh).
//
// A warp stays with its group or slice and goes on to further pixels, so that all addresses but few are computed once.
// As in PyTorch, y1, y2 and y3 are rounded to x's dtype, and y3 before the residual is added.
#pragma once

#include <type_traits>

#include "strip_depthwise.cuh"
#include "strip_pixels.cuh"
#include "strip_planes.cuh"

namespace shufflenet::cuda {

template <class T, Layout kLayout>
using StripIn = std::conditional_t<kLayout == Layout::channels_last, StripPixels<T>, StripPlanes<T>>;

template <class T, Layout kLayout>
struct StripBlock : StripIn<T, kLayout> {
  using Strip = StripIn<T, kLayout>;
  using Strip::base, Strip::constants, Strip::fragments, Strip::lane, Strip::layout, Strip::packed, Strip::s, Strip::t,
      Strip::warp;
  using Share = WarpShares::Share;
  using Depthwise = StripDepthwise<T>;
  template <int kPairs>
  using Results = typename Strip::template Results<kPairs>;

  SHUFFLENET_DEVICE explicit StripBlock(const StripArguments& arguments) : Strip(arguments) {}

  SHUFFLENET_DEVICE void run() {
    this->copy_x();
    prepare();
    wait_copies<0>();
    barrier();
    conv1();
    barrier();
    this->before_results();
    depthwise_and_conv3();
    this->after_results();
  }

 private:
  // Does what is done once while x is on its way. A few warps clear y1's frame and the others write tables: what takes
  // each warp of many more instructions to start than to do.
  SHUFFLENET_DEVICE void prepare() const {
    const int threads = t.warps * 32, framing = constants.framing_warps * 32, thread = warp * 32 + lane;
    if (thread < framing) {
      this->template clear_frame_of_y1<kColumns * sizeof(T)>();
    } else {
      this->write_places(thread - framing, threads - framing);
      this->clear_unused_x(thread - framing, threads - framing);
    }
  }

  // Returns what the warp does of a phase. Its number is asked for anew, so as not to be kept in a register until then.
  SHUFFLENET_DEVICE Share share_of(const WarpShares& shares) const { return shares.of[unknown(warp)]; }

  // ---- conv1 --------------------------------------------------------------------------------------------------------

  SHUFFLENET_DEVICE void conv1() {
    switch (packed.conv1_chunk) {
      case 1: conv1_of<1>(); break;
      case 2: conv1_of<2>(); break;
      case 3: conv1_of<3>(); break;
      case 4: conv1_of<4>(); break;
      case 5: conv1_of<5>(); break;
      default: conv1_of<6>();
    }
  }
  template <int kTiles>
  SHUFFLENET_DEVICE void conv1_of() {
    const Share share = share_of(constants.conv1);
    SHUFFLENET_NO_UNROLL
    for (int piece = share.first; piece < constants.conv1.pieces; piece += constants.conv1.step) {
      if (packed.is_masked) {
        conv1_tiles<kTiles, true>(piece, share);
      } else {
        conv1_tiles<kTiles, false>(piece, share);
      }
    }
  }

  // Computes kTiles tiles of a group of conv1 for the warp's share of pixels.
  template <int kTiles, bool kMasked>
  SHUFFLENET_DEVICE void conv1_tiles(int piece, const Share& share) {
    static_assert(kTiles <= kMostConv1Tiles);
    const int pixels = this->image_rows * s.width, pixel_step = constants.conv1.pixel_step;
    const int group = constants.by_conv1_chunks.quotient(piece);
    const GroupStart start(s, group, sizeof(T));
    const ChannelMask mask = {start.skipped, s.conv1_depth};
    const Fragment* const weights = fragments + unsigned(piece * packed.conv1_fragments + lane);
    const Fragment* const affine = fragments + unsigned(packed.affine1 + piece * packed.conv1_chunk * 4 + lane % 4);
    const uint32_t y1 = base + layout.y1 + (this->image_row - this->in_row) * layout.y1_row;
    const Fragment* const slots = affine + unsigned(packed.slots - packed.affine1);
    // If scattered, where the slots of the lane's two columns of a tile lie. Otherwise to[i][0] is where a block of y1
    // lies: that of tile i, or where matrices are stored, that of tile 2 * i, or for lanes 16 to 31 of the next one.
    uint32_t to[kTiles][2];
    if (packed.scatters) {
      for_each<0, kTiles>([&](auto index) {
        constexpr int n = decltype(index)::value;
        const Fragment slot = load_constant<n * 4>(slots);
        SHUFFLENET_UNROLL
        for (int odd = 0; odd < 2; ++odd) {
          to[n][odd] = y1 + slot.words[2 * odd] * layout.y1_block + slot.words[2 * odd + 1];
        }
      });
    } else {
      for_each<0, kBlocksOfLane<kTiles>>([&](auto index) {
        constexpr int i = decltype(index)::value;
        const uint32_t block = kIsWide<T> ? load_word<i * 4>(slots) : load_word<i * 8>(slots + lane / 16 * 4);
        to[i][0] = y1 + block * layout.y1_block;
      });
    }
    const uint32_t tile_step = kTilePixels * this->bytes_to_next_pixel();
    const uint32_t x_step = pixel_step * this->bytes_to_next_pixel();
    const int halves = packed.conv1_halves;
    uint32_t x = this->operand_row(share.pixel, start.block, share.pixel + kItemPixels);
    uint32_t places = base + layout.places + (share.pixel + lane % 16) * kPlaceBytes;
    SHUFFLENET_NO_UNROLL
    for (int pixel = share.pixel; pixel < pixels;
         pixel += pixel_step, x += x_step, places += pixel_step * kPlaceBytes) {
      const bool is_tail = pixel + kItemPixels > pixels;
      uint32_t row[kTilesOfItem] = {x, x + tile_step};
      if (is_tail) {
        SHUFFLENET_UNROLL
        for (int m = 0; m < kTilesOfItem; ++m) {
          row[m] = this->operand_row(pixel + m * kTilePixels, start.block, pixels - 1);
        }
      }
      Sums<kTiles> sums;
      auto operand = this->operand(row, pixel);
      multiply<T, kMasked, false>(sums, operand, weights, halves, mask);
      Pair<T> pairs[kTilesOfItem][kTiles][2];
      for_each<0, kTiles>([&](auto index) {
        constexpr int n = decltype(index)::value;
        const Vector4 scales = load_floats<n * 4>(affine);
        SHUFFLENET_UNROLL
        for (int m = 0; m < kTilesOfItem; ++m) finish<T, true>(sums[m][n], scales, pairs[m][n]);
      });
      if (packed.scatters) {
        scatter_tiles<kTiles>(pixel, pixels, to, pairs);
        continue;
      }
      for_each<0, kTilesOfItem>([&](auto index) {
        constexpr int m = decltype(index)::value, kTile = m * kTilePixels;
        if constexpr (kIsWide<T>) {
          store_pixels_inside<kTiles>(pixel + kTile, pixels, to, pairs[m]);
        } else if (is_tail) {
          store_pixels_inside<kTiles>(pixel + kTile, pixels, to, pairs[m]);
        } else {
          store_tiles<kTiles>(load_pair<kTile * kPlaceBytes>(places), to, pairs[m]);
        }
      });
    }
  }

  template <int kTiles>
  static constexpr int kBlocksOfLane = kIsWide<T> ? kTiles : (kTiles + 1) / 2;

  // Stores tiles of 16 pixels as blocks of y1. The lane's pixel lies at `place` in a block.
  template <int kTiles>
  SHUFFLENET_DEVICE static void store_tiles(uint32_t place, const uint32_t (&to)[kTiles][2],
                                            const uint32_t (&pairs)[kTiles][2]) {
    SHUFFLENET_UNROLL
    for (int n = 0; n + 1 < kTiles; n += 2) {
      store_matrices<4>(place + to[n / 2][0], {pairs[n][0], pairs[n][1], pairs[n + 1][0], pairs[n + 1][1]});
    }
    if constexpr (kTiles % 2 != 0) store_matrices<2>(place + to[kTiles / 2][0], pairs[kTiles - 1]);
  }
  // Stores those of 16 pixels, from `first` on, that lie before the last one: a lane its pair of each tile.
  template <int kTiles>
  SHUFFLENET_DEVICE void store_pixels_inside(int first, int pixels, const uint32_t (&to)[kTiles][2],
                                             const Pair<T> (&pairs)[kTiles][2]) const {
    uint32_t block[kTiles];
    SHUFFLENET_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      block[n] = lane % 4 * sizeof(Pair<T>);
      if constexpr (kIsWide<T>) {
        block[n] += to[n][0];
      } else {
        block[n] += from_lane(to[n / 2][0], n % 2 * 16);
      }
    }
    const int pixel = first + lane / 4;
    const uint32_t places = base + layout.places + pixel * kPlaceBytes;
    for_each<0, 2>([&](auto index) {
      constexpr int kHalf = decltype(index)::value;
      if (pixel + kHalf * 8 >= pixels) return;
      const uint32_t place = load_pair<kHalf * 8 * kPlaceBytes>(places);
      SHUFFLENET_UNROLL
      for (int n = 0; n < kTiles; ++n) store_pair<0>(block[n] + place, pairs[n][kHalf]);
    });
  }

  // Stores those of the 32 pixels from `first` on that lie before the last one, each column to its slot.
  template <int kTiles>
  SHUFFLENET_DEVICE void scatter_tiles(int first, int pixels, const uint32_t (&to)[kTiles][2],
                                       const Pair<T> (&pairs)[kTilesOfItem][kTiles][2]) const {
    const int pixel = first + lane / 4;
    const uint32_t places = base + layout.places + pixel * kPlaceBytes;
    for_each<0, 2 * kTilesOfItem>([&](auto index) {
      constexpr int kEight = decltype(index)::value;
      if (pixel + kEight * 8 >= pixels) return;
      const uint32_t place = load_pair<kEight * 8 * kPlaceBytes>(places);
      SHUFFLENET_UNROLL
      for (int n = 0; n < kTiles; ++n) {
        const Pair<T> pair = pairs[kEight / 2][n][kEight % 2];
        store_element(to[n][0] + place, element_of<T>(pair, 0));
        store_element(to[n][1] + place, element_of<T>(pair, 1));
      }
    });
  }

  // ---- The depthwise convolution and conv3 --------------------------------------------------------------------------

  SHUFFLENET_DEVICE void depthwise_and_conv3() {
    switch (packed.conv3_chunk) {
      case 1: slices_of<1>(); break;
      case 2: slices_of<2>(); break;
      case 3: slices_of<3>(); break;
      case 4: slices_of<4>(); break;
      default: slices_of<most_conv3_pairs(sizeof(T))>();
    }
  }
  template <int kPairs>
  SHUFFLENET_DEVICE void slices_of() {
    const Share share = share_of(constants.conv3);
    const int pixel_step = constants.conv3.pixel_step;
    SHUFFLENET_NO_UNROLL
    for (int slice = share.first; slice < t.slices; slice += constants.conv3.step) {
      int pixel = share.pixel + this->first_item();
      Results<kPairs> results(*this, pixel, slice);
      SHUFFLENET_NO_UNROLL
      for (; pixel < this->out_rows * s.out_width; pixel += pixel_step) {
        make_y2<true>(pixel, slice);
        if constexpr (Depthwise::kIsExact) {
          conv3<kPairs>(results, slice, false);
        } else if (!conv3<kPairs>(results, slice, true)) {
          const int same = unknown(slice);  // so that nothing is computed ahead for what seldom happens
          make_y2<false>(pixel, same);
          conv3<kPairs>(results, same, false);
        }
        results.advance(pixel_step);
      }
    }
  }
  template <bool kFinite>
  SHUFFLENET_DEVICE void make_y2(int pixel, int slice) const {
    const Depthwise y2(*this, kFinite ? lane : unknown(lane));
    const bool relu = kFinite && s.conv2_relu;  // otherwise it is decided later
    if (s.stride == 1) {
      if (relu) {
        y2.template make<1, kFinite, true>(pixel, slice);
      } else {
        y2.template make<1, kFinite, false>(pixel, slice);
      }
    } else if (relu) {
      y2.template make<2, kFinite, true>(pixel, slice);
    } else {
      y2.template make<2, kFinite, false>(pixel, slice);
    }
  }

  // Makes the results of 32 pixels of a slice from y2. Where `checks`, it returns false and writes nothing if a sum is
  // NaN. A NaN anywhere in a pixel's y2 makes all of its sums NaN, so that one of them is asked.
  template <int kPairs>
  SHUFFLENET_DEVICE bool conv3(Results<kPairs> results, int slice, bool checks) {
    static_assert(kPairs <= most_conv3_pairs(sizeof(T)));
    constexpr int kTiles = 2 * kPairs;
    const int first_chunk = slice * packed.conv3_chunks, halves = packed.conv3_halves;
    const Fragment* weights = fragments + unsigned(packed.conv3 + first_chunk * packed.conv3_fragments + lane);
    const Fragment* affine =
        fragments + unsigned(packed.affine3 + first_chunk * packed.conv3_chunk * 8 + this->affine3_lane());
    SHUFFLENET_NO_UNROLL
    for (int chunk = 0; chunk < packed.conv3_chunks; ++chunk) {
      auto operand = Depthwise(*this, lane).operand();
      Sums<kTiles> sums;
      multiply<T, false, Strip::kTransposed>(sums, operand, weights, halves, {});
      if (chunk == 0 && checks) {
        const float any = Strip::any_sum(sums);
        if (warp_any(any != any)) return false;
      }
      results.write(sums, affine);
      weights += unsigned(packed.conv3_fragments);
      affine += kTiles * 4;
    }
    return true;
  }
};

}  // namespace shufflenet::cuda
