// Where a block of strip_kernel.cuh works, and what it keeps in shared memory in either layout of x.
#pragma once

#include "common.cuh"
#ifndef SHUFFLENET_TEST_DEVICE
#include "matrices.cuh"
#endif
#include "strip_shares.h"

namespace shufflenet::cuda {

// Returns 1 over the number of a pool's taps that are inside of the image in a row or a column: 1, 2 or 3.
SHUFFLENET_DEVICE float inverse(int taps) { return taps == 3 ? 1.f / 3 : taps == 2 ? 1.f / 2 : 1.f; }

struct StripStaging {
  SHUFFLENET_DEVICE explicit StripStaging(const StripArguments& arguments)
      : arguments(arguments),
        s(arguments.sizes),
        t(arguments.tiling),
        layout(arguments.layout),
        packed(arguments.layout.packed),
        base(shared_base()),
        warp(warp_index()),
        lane(lane_index()),
        constants(arguments.constants) {
    const int index = static_cast<int>(block_index()), strip = constants.by_parts.quotient(index);
    image = constants.by_strips.quotient(strip);
    part = index - strip * constants.parts;
    out_row = (strip - image * constants.strips) * t.rows;
    out_rows = least(t.rows, s.out_height - out_row);
    in_row = t.first_in_row(s, out_row);
    in_rows = t.in_rows(s, out_rows);
    image_row = most(in_row, 0);
    image_rows = least(in_row + in_rows, s.height) - image_row;
    fragments = static_cast<const Fragment*>(arguments.fragments) + int64_t{part} * packed.part;
  }

  // Zeroes the pixels of y1, of kPixelBytes in a block, around the image, as padding is zero behind conv1's bias and
  // ReLU. A lane goes through the blocks with a pixel of each.
  template <int kPixelBytes>
  SHUFFLENET_DEVICE void clear_frame_of_y1() const {
    const int right = y1_offset(s.width);
    SHUFFLENET_NO_UNROLL
    for (int row = lane; row < in_rows; row += 32) {
      const int left = row * layout.y1_row;
      clear_in_all_blocks<kPixelBytes>(left);
      // With a gap of one pixel a row ends with the next one's first. With stride 2 nothing reads behind an even row.
      if (row == in_rows - 1 || constants.clears_right) clear_in_all_blocks<kPixelBytes>(left + right);
    }
    if (in_row < 0) clear_row<kPixelBytes>(0);
    if (in_row + in_rows > s.height) clear_row<kPixelBytes>((in_rows - 1) * layout.y1_row);
  }

  // Writes where pixels lie in a block of y1: `threads` threads share them, of which this is number `thread`.
  SHUFFLENET_DEVICE void write_places(int thread, int threads) const {
    SHUFFLENET_NO_UNROLL
    for (int pixel = thread; pixel < image_rows * s.width; pixel += threads) {
      const int row = constants.by_width.quotient(pixel);
      store_pair<0>(base + layout.places + pixel * kPlaceBytes, row * layout.y1_row + y1_offset(pixel - row * s.width));
    }
    if (s.stride == 1) return;
    SHUFFLENET_NO_UNROLL
    for (int pixel = thread; pixel < out_rows * s.out_width; pixel += threads) {
      const int row = constants.by_out_width.quotient(pixel);
      const int at = 2 * row * layout.y1_row + (pixel - row * s.out_width) * layout.y1_pixel;
      store_pair<0>(base + layout.corners + pixel * kPlaceBytes, at);
    }
  }

  // Zeroes the pixels of a row of y1.
  template <int kPixelBytes>
  SHUFFLENET_DEVICE void clear_row(int row) const {
    SHUFFLENET_NO_UNROLL
    for (int column = lane; column < s.width; column += 32) clear_in_all_blocks<kPixelBytes>(row + y1_offset(column));
  }
  // Zeroes a pixel of each block of y1; the warps that do so share the blocks.
  template <int kPixelBytes>
  SHUFFLENET_DEVICE void clear_in_all_blocks(int in_block) const {
    const int step = constants.framing_warps * layout.y1_block;
    const uint32_t end = base + constants.y1_end;
    SHUFFLENET_NO_UNROLL
    for (uint32_t to = base + layout.y1 + warp * layout.y1_block + in_block; to < end; to += step) {
      SHUFFLENET_UNROLL
      for (int i = 0; i < kPixelBytes; i += kBlockBytes) clear_block(to + i);
    }
  }

  // Returns where a pixel of a row lies in y1, in bytes from the row's beginning.
  SHUFFLENET_DEVICE int y1_offset(int column) const {
    const uint32_t place = column + 1;
    return s.stride == 1 ? place * layout.y1_pixel : place / 2 * layout.y1_pixel + (place % 2 == 0 ? 0 : layout.y1_odd);
  }
  // Returns the address, in the first block of y1 that a slice has, of the top left tap of a pixel.
  SHUFFLENET_DEVICE uint32_t y1_corner(int pixel, int slice) const {
    const int inside = most(0, least(pixel, out_rows * s.out_width - 1));
    return base + constants.y1_corner + slice * packed.blocks * layout.y1_block +
           load_pair(base + layout.corners + inside * kPlaceBytes);
  }
  SHUFFLENET_DEVICE uint32_t my_y2() const { return base + layout.y2 + warp * layout.y2_bytes; }

  // Returns, of stride 1, how many rows of x in shared memory lie above the result's first one.
  SHUFFLENET_DEVICE int rows_above_result() const { return least(out_row, 1); }
  // Return where in memory x and the result begin of the block's image.
  SHUFFLENET_DEVICE const char* x_of_image() const {
    return static_cast<const char*>(arguments.x) + static_cast<uint32_t>(image) * uint64_t{constants.image_bytes};
  }
  SHUFFLENET_DEVICE char* result_of_image() const {
    return static_cast<char*>(arguments.result) + static_cast<uint32_t>(image) * uint64_t{constants.result_bytes};
  }

  const StripArguments& arguments;
  const Sizes& s;
  const StripTiling& t;
  const StripLayout& layout;
  const PackedLayout& packed;
  const uint32_t base;
  const int warp, lane;
  const StripConstants& constants;
  // Where the block works: the slices of a part, rows of the result, the rows of y1 that these are made of, and those
  // of them that are inside the image.
  const Fragment* fragments;
  int image, part, out_row, out_rows, in_row, in_rows, image_row, image_rows;
};

}  // namespace shufflenet::cuda
