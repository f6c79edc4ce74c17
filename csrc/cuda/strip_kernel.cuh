// A unit of stride 1 as one fused pass over a strip of rows (strip.h), in 16 bits and channels_last, on tensor cores from
// sm_80 on. x is copied to shared memory once and serves conv1 and the residual.
//
//   conv1      32 pixels by some tiles of a group; the results are stored as blocks of y1, which the shuffle has sorted
//   depthwise  and conv3: 32 pixels of a slice. The warp keeps their y2 in shared memory of its own, from where conv3's
//              operands come; the sums go to the result in accesses of 8 bytes, which fill its sectors.
//
// As in PyTorch, y1, y2 and y3 are rounded to x's dtype, and y3 before the residual is added.
#pragma once

#include "strip_products.cuh"

namespace shufflenet::cuda {

template <class T>
struct StripBlock {
  SHUFFLENET_DEVICE explicit StripBlock(const StripArguments& arguments)
      : arguments(arguments),
        s(arguments.sizes),
        t(arguments.tiling),
        layout(arguments.layout),
        packed(arguments.layout.packed),
        base(shared_base()),
        warp(warp_index()),
        lane(lane_index()),
        by_width(arguments.sizes.width) {}

  SHUFFLENET_DEVICE void run() {
    const int64_t blocks = t.blocks(s);
    for (int64_t index = block_index(); index < blocks; index += block_count()) {
      const int parts = t.parts(s), strips = t.strips(s);
      part = static_cast<int>(index % parts);
      image = index / parts / strips;
      out_row = static_cast<int>(index / parts % strips) * t.rows;
      out_rows = least(t.rows, s.height - out_row);
      image_row = most(out_row - 1, 0);
      image_rows = least(out_row + out_rows + 1, s.height) - image_row;
      fragments = static_cast<const Fragment*>(arguments.fragments) + int64_t{part} * packed.part;
      barrier();  // all threads have finished reading what is overwritten now
      copy_x();
      clear_y1_outside_the_image();
      clear_unused();
      wait_copies<0>();
      barrier();
      const bool is_finite = !barrier_or(conv1());
      depthwise_and_conv3(is_finite);
    }
  }

 private:
  // Starts to copy the strip's rows of x. A warp copies four neighbouring pixels at a time, a lane a block of each.
  SHUFFLENET_DEVICE void copy_x() {
    const int pixels = image_rows * s.width, pixel_bytes = s.in_channels * static_cast<int>(sizeof(T));
    const char* const strip = x_pixel(image_row);
    for (int block = lane; block < s.in_channels / kColumns; block += 32) {
      SHUFFLENET_NO_UNROLL
      for (int pixel = warp * 4; pixel < pixels; pixel += t.warps * 4) {
        const char* from = strip + int64_t{pixel} * pixel_bytes + block * kBlockBytes;
        uint32_t to = base + layout.x_offset(pixel, block * kBlockBytes);
        SHUFFLENET_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (i > 0 && pixel + i >= pixels) break;
          copy_block_async(to, from);
          to += layout.x_pitch;
          from += pixel_bytes;
        }
      }
    }
    commit_copies();
  }

  SHUFFLENET_DEVICE const char* x_pixel(int row) const {
    return static_cast<const char*>(arguments.x) +
           (image * s.height + row) * s.width * (s.in_channels * static_cast<int64_t>(sizeof(T)));
  }

  // Zeroes the pixels of y1 outside of the image, as padding is zero behind conv1's bias and ReLU.
  SHUFFLENET_DEVICE void clear_y1_outside_the_image() {
    const int blocks = s.conv1_groups * packed.conv1_tiles, rows = out_rows + 2, pitch = layout.y1_pitch;
    SHUFFLENET_NO_UNROLL
    for (int block = warp; block < blocks; block += t.warps) {
      const uint32_t to = base + layout.y1 + block * layout.y1_pixels * kBlockBytes;
      SHUFFLENET_NO_UNROLL
      for (int row = lane; row < rows; row += 32) {
        clear_block(to + row * pitch * kBlockBytes);
        if (t.gap > 1 || row == rows - 1) clear_block(to + (row * pitch + s.width + 1) * kBlockBytes);
      }
      if (out_row == 0) clear_row(to + kBlockBytes);
      if (out_row + out_rows == s.height) clear_row(to + ((rows - 1) * pitch + 1) * kBlockBytes);
    }
  }
  SHUFFLENET_DEVICE void clear_row(uint32_t to) {
    SHUFFLENET_NO_UNROLL
    for (int column = lane; column < s.width; column += 32) clear_block(to + column * kBlockBytes);
  }

  // Zeroes the blocks of x that conv1 loads without using them, and the block of y2 that makes its number even.
  SHUFFLENET_DEVICE void clear_unused() {
    const int unused = layout.x_blocks - s.in_channels / kColumns, pixels = image_rows * s.width;
    if (unused > 0) {
      const int in_pitch = layout.x_pitch / kBlockBytes - s.in_channels / kColumns;
      SHUFFLENET_NO_UNROLL
      for (int pixel = warp * 32 + lane; pixel < pixels; pixel += t.warps * 32) {
        const int blocks = pixel == pixels - 1 ? most(unused, in_pitch) : in_pitch;
        for (int i = 0; i < blocks; ++i) clear_block(base + layout.x_offset(pixel, (s.in_channels / kColumns + i) * kBlockBytes));
      }
    }
    if (packed.blocks % 2 != 0) clear_block(my_y2() + (packed.blocks * kItemPixels + lane) * kBlockBytes);
  }

  SHUFFLENET_DEVICE uint32_t my_y2() const { return base + layout.y2 + warp * layout.y2_bytes; }

  // ---- conv1 --------------------------------------------------------------------------------------------------------

  // Computes y1. Returns whether the thread found a result that is not finite.
  SHUFFLENET_DEVICE bool conv1() {
    const int pixels = image_rows * s.width, chunks = packed.conv1_chunks, pieces = s.conv1_groups * chunks;
    const Divisor by_pieces(pieces), by_chunks(chunks);
    const int items = ceil_div(pixels, kItemPixels) * pieces;
    uint32_t greatest = 0;
    SHUFFLENET_NO_UNROLL
    for (int item = warp; item < items; item += t.warps) {
      const int pixel = by_pieces.quotient(item), piece = item - pixel * pieces, group = by_chunks.quotient(piece);
      const int chunk = piece - group * chunks;
      switch (packed.conv1_chunk) {
        case 1: conv1_tiles<1>(pixel * kItemPixels, pixels, group, chunk, greatest); break;
        case 2: conv1_tiles<2>(pixel * kItemPixels, pixels, group, chunk, greatest); break;
        case 3: conv1_tiles<3>(pixel * kItemPixels, pixels, group, chunk, greatest); break;
        case 4: conv1_tiles<4>(pixel * kItemPixels, pixels, group, chunk, greatest); break;
        case 5: conv1_tiles<5>(pixel * kItemPixels, pixels, group, chunk, greatest); break;
        default: conv1_tiles<6>(pixel * kItemPixels, pixels, group, chunk, greatest);
      }
    }
    return is_not_finite<T>(greatest);
  }

  template <int kTiles>
  SHUFFLENET_DEVICE void conv1_tiles(int first_pixel, int pixels, int group, int chunk, uint32_t& greatest) {
    static_assert(kTiles <= kMostConv1Tiles);
    const GroupStart start(s, group);
    uint32_t row[kTilesOfItem];
    SHUFFLENET_UNROLL
    for (int m = 0; m < kTilesOfItem; ++m) {
      const int pixel = least(first_pixel + m * kTilePixels + lane % 16, pixels - 1);
      row[m] = base + layout.x_offset(pixel, (start.block + lane / 16) * kBlockBytes);
    }
    Sums<kTiles> sums;
    clear<kTiles>(sums);
    const int first_tile = group * packed.conv1_tiles + chunk * kTiles;
    const Fragment* const weights = fragments + first_tile * packed.conv1_steps * 32 + lane;
    const ChannelMask mask = {start.skipped, s.conv1_depth};
    multiply<T, kTiles, 32>(sums, row, weights, packed.conv1_halves, packed.is_masked ? &mask : nullptr);

    uint32_t pairs[kTilesOfItem][kTiles][2];
    const Fragment* const affine = fragments + packed.affine1 + first_tile * 4 + lane % 4;
    SHUFFLENET_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      const Fragment constants = load_constant(affine + n * 4);
      SHUFFLENET_UNROLL
      for (int m = 0; m < kTilesOfItem; ++m) finish<T, true>(sums[m][n], constants, pairs[m][n]);
    }
    if (first_pixel + kItemPixels > pixels) {
      // What is behind the last pixel is outside of the image, or nobody reads it.
      SHUFFLENET_UNROLL
      for (int m = 0; m < kTilesOfItem; ++m) {
        SHUFFLENET_UNROLL
        for (int half = 0; half < 2; ++half) {
          const bool inside = first_pixel + m * kTilePixels + half * 8 + lane / 4 < pixels;
          SHUFFLENET_UNROLL
          for (int n = 0; n < kTiles; ++n) pairs[m][n][half] = inside ? pairs[m][n][half] : 0;
        }
      }
    }
    const int block_bytes = layout.y1_pixels * kBlockBytes;
    const int top = image_row - (out_row - 1);  // rows above the image
    SHUFFLENET_UNROLL
    for (int m = 0; m < kTilesOfItem; ++m) {
      const int pixel = first_pixel + m * kTilePixels + lane % 16;
      uint32_t to = base + layout.y1 + first_tile * block_bytes + lane / 16 * block_bytes +
                    (pixel + by_width.quotient(pixel) * t.gap + top * layout.y1_pitch + 1) * kBlockBytes;
      SHUFFLENET_UNROLL
      for (int n = 0; n < kTiles; n += 2) {
        uint32_t(&here)[2] = pairs[m][n];
        greatest = greater(greatest, greater(here[0], here[1], T{}), T{});
        if (n + 1 < kTiles) {
          uint32_t(&next)[2] = pairs[m][n + 1 < kTiles ? n + 1 : n];
          greatest = greater(greatest, greater(next[0], next[1], T{}), T{});
          store_matrices<4>(to, {here[0], here[1], next[0], next[1]});
        } else {
          store_matrices<2>(to, here);
        }
        to += 2 * block_bytes;
      }
    }
  }

  // ---- The depthwise convolution and conv3 --------------------------------------------------------------------------

  SHUFFLENET_DEVICE void depthwise_and_conv3(bool is_finite) {
    const int pixels = out_rows * s.width;
    const Divisor by_slices(t.slices);
    const int items = ceil_div(pixels, kItemPixels) * t.slices;
    SHUFFLENET_NO_UNROLL
    for (int item = warp; item < items; item += t.warps) {
      const int pixel = by_slices.quotient(item), slice = item - pixel * t.slices;
      warp_barrier();  // all lanes have finished reading y2
      make_y2(pixel * kItemPixels, pixels, slice, is_finite);
      warp_barrier();
      SHUFFLENET_NO_UNROLL
      for (int chunk = 0; chunk < packed.conv3_chunks; ++chunk) {
        switch (packed.conv3_chunk) {
          case 1: conv3_pairs<1>(pixel * kItemPixels, pixels, slice, chunk); break;
          case 2: conv3_pairs<2>(pixel * kItemPixels, pixels, slice, chunk); break;
          case 3: conv3_pairs<3>(pixel * kItemPixels, pixels, slice, chunk); break;
          case 4: conv3_pairs<4>(pixel * kItemPixels, pixels, slice, chunk); break;
          default: conv3_pairs<5>(pixel * kItemPixels, pixels, slice, chunk);
        }
      }
    }
  }

  // Returns the address, in the first block of y1, of the top left tap of a pixel.
  SHUFFLENET_DEVICE uint32_t y1_corner(int pixel, int pixels) const {
    const int inside = least(pixel, pixels - 1);
    return base + layout.y1 + (inside + by_width.quotient(inside) * t.gap) * kBlockBytes;
  }

  SHUFFLENET_DEVICE void make_y2(int first_pixel, int pixels, int slice, bool is_finite) {
    const int row_bytes = layout.y1_pitch * kBlockBytes, block_bytes = layout.y1_pixels * kBlockBytes;
    uint32_t corner[kTilesOfItem], bottom[kTilesOfItem], rows[kTilesOfItem][2];
    SHUFFLENET_UNROLL
    for (int m = 0; m < kTilesOfItem; ++m) {
      const int first = first_pixel + m * kTilePixels;
      const uint32_t at = y1_corner(first + lane % 16, pixels) + slice * packed.piece_tiles * block_bytes;
      corner[m] = at + lane / 16 * row_bytes;
      bottom[m] = at + 2 * row_bytes + lane / 16 * kBlockBytes;
    }
    const Fragment* taps = fragments + packed.taps + slice * packed.blocks * 96 + lane;
    const Fragment* affine = fragments + packed.affine2 + slice * packed.blocks * 4 + lane % 4;
    uint32_t to = my_y2() + lane * kBlockBytes;
    int offset = 0;  // of the block of y1 from the slice's first
    SHUFFLENET_NO_UNROLL
    for (int group = 0; group < s.conv1_groups; ++group) {
      SHUFFLENET_NO_UNROLL
      for (int tile = 0; tile < packed.piece_tiles; ++tile) {
        Sums<1> sums;
        clear<1>(sums);
        const Fragment constants = load_constant(affine);
        if (is_finite) {
          depthwise<T>(sums, corner, bottom, taps);
        } else {
          SHUFFLENET_UNROLL
          for (int m = 0; m < kTilesOfItem; ++m) {
            SHUFFLENET_UNROLL
            for (int half = 0; half < 2; ++half) {
              rows[m][half] = y1_corner(first_pixel + m * kTilePixels + half * 8 + lane / 4, pixels) +
                              slice * packed.piece_tiles * block_bytes + offset;
            }
          }
          depthwise_by_slots<T>(sums, rows, row_bytes, taps);
        }
        uint32_t pairs[2 * kTilesOfItem];
        SHUFFLENET_UNROLL
        for (int m = 0; m < kTilesOfItem; ++m) {
          uint32_t mine[2];
          if (s.conv2_relu) {
            finish<T, true>(sums[m][0], constants, mine);
          } else {
            finish<T, false>(sums[m][0], constants, mine);
          }
          SHUFFLENET_UNROLL
          for (int half = 0; half < 2; ++half) {
            pairs[2 * m + half] = is_finite ? mine[half] : without_empty_slots(mine[half], constants);
          }
        }
        store_matrices<4>(to, pairs);
        to += kItemPixels * kBlockBytes;
        taps += 96;
        affine += 4;
        const int next = tile + 1 < packed.piece_tiles ? block_bytes
                                                       : (packed.conv1_tiles - packed.piece_tiles + 1) * block_bytes;
        offset += next;
        SHUFFLENET_UNROLL
        for (int m = 0; m < kTilesOfItem; ++m) {
          corner[m] += next;
          bottom[m] += next;
        }
      }
    }
  }

  // Zeroes the slots that no channel has: 0 times Inf may have made them NaN.
  SHUFFLENET_DEVICE static uint32_t without_empty_slots(uint32_t pair, const Fragment& constants) {
    constexpr uint32_t kEmpty = 0x80000000u;
    return (constants.words[0] == kEmpty ? 0 : pair & 0xffffu) | (constants.words[1] == kEmpty ? 0 : pair & 0xffff0000u);
  }

  template <int kPairs>
  SHUFFLENET_DEVICE void conv3_pairs(int first_pixel, int pixels, int slice, int chunk) {
    static_assert(kPairs <= kMostConv3Pairs);
    constexpr int kTiles = 2 * kPairs;
    uint32_t row[kTilesOfItem];
    SHUFFLENET_UNROLL
    for (int m = 0; m < kTilesOfItem; ++m) {
      row[m] = my_y2() + (lane / 16 * kItemPixels + m * kTilePixels + lane % 16) * kBlockBytes;
    }
    Sums<kTiles> sums;
    clear<kTiles>(sums);
    const int first_tile = (slice * packed.conv3_chunks + chunk) * kTiles;
    multiply<T, kTiles, 2 * kItemPixels * kBlockBytes>(
        sums, row, fragments + packed.conv3 + first_tile * packed.conv3_steps * 32 + lane, packed.conv3_halves, nullptr);

    // The lane's four channels of the first pair of tiles, within the slice's group, and their byte in a pixel.
    const int channel = chunk * kPairs * 2 * kColumns + lane % 4 * 4;
    const int byte = ((part * t.slices + slice) * s.group_rows + channel) * static_cast<int>(sizeof(T));
    const int pixel_bytes = s.in_channels * static_cast<int>(sizeof(T));
    char* const out = static_cast<char*>(arguments.result) +
                      (image * s.height + out_row) * s.width * int64_t{pixel_bytes} + byte;
    uint32_t x[kTilesOfItem][2];
    char* to[kTilesOfItem][2];
    bool inside[kTilesOfItem][2];
    SHUFFLENET_UNROLL
    for (int m = 0; m < kTilesOfItem; ++m) {
      SHUFFLENET_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int pixel = first_pixel + m * kTilePixels + half * 8 + lane / 4;
        inside[m][half] = pixel < pixels;
        to[m][half] = out + int64_t{pixel} * pixel_bytes;
        x[m][half] = base + layout.x_offset(least(pixel, pixels - 1) + (out_row - image_row) * s.width, byte);
      }
    }
    const Fragment* const affine = fragments + packed.affine3 + first_tile * 4 + lane % 4;
    const auto finish_pair = [&](auto index) {
      constexpr int kPair = decltype(index)::value, kBytes = kPair * 2 * kColumns * static_cast<int>(sizeof(T));
      if (channel + kPair * 2 * kColumns >= s.group_rows) return;
      const Fragment first = load_constant(affine + kPair * 8), second = load_constant(affine + kPair * 8 + 4);
      SHUFFLENET_UNROLL
      for (int m = 0; m < kTilesOfItem; ++m) {
        uint32_t low[2], high[2];
        finish<T, false>(sums[m][2 * kPair], first, low);
        finish<T, false>(sums[m][2 * kPair + 1], second, high);
        SHUFFLENET_UNROLL
        for (int half = 0; half < 2; ++half) {
          uint32_t residual[2];
          load_two_pairs<kBytes>(residual, x[m][half]);
          if (inside[m][half]) {
            store_two_pairs(to[m][half] + kBytes,
                            {add_relu(low[half], residual[0], T{}), add_relu(high[half], residual[1], T{})});
          }
        }
      }
    };
    for_each<0, kPairs>(finish_pair);
  }

  const StripArguments& arguments;
  const Sizes& s;
  const StripTiling& t;
  const StripLayout& layout;
  const PackedLayout& packed;
  const uint32_t base;
  const int warp, lane;
  const Divisor by_width;
  // Where the block works: the slices of a part, rows of the result, and the rows of x that these are made of.
  const Fragment* fragments;
  int64_t image;
  int part, out_row, out_rows, image_row, image_rows;
};

}  // namespace shufflenet::cuda
