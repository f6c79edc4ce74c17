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

  // Zeroes the pixels of y1 left and right of the image, as padding is zero behind conv1's bias and ReLU. A lane goes
  // through the blocks with a pixel of each: those left of all rows come first.
  SHUFFLENET_DEVICE void clear_y1_beside_the_image() const {
    const int rows = t.in_rows(s, t.rows), row_bytes = layout.y1_pitch * kBlockBytes;
    // With a gap of one pixel a row ends with the next one's first. With stride 2 nothing reads behind an even row.
    const int ends = (s.stride == 1 ? t.gap > 1 : s.width % 2 != 0) ? rows : 1;
    SHUFFLENET_NO_UNROLL
    for (int i = lane; i < rows + ends; i += 32) {
      clear_in_all_blocks(i < rows ? i * row_bytes : (i - ends) * row_bytes + y1_offset(s.width));
    }
  }
  // Zeroes the rows of y1 above and below the image, in the same way.
  SHUFFLENET_DEVICE void clear_y1_above_and_below() const {
    const int above = in_row < 0 ? s.width : 0, below = in_row + in_rows > s.height ? s.width : 0;
    SHUFFLENET_NO_UNROLL
    for (int i = lane; i < above + below; i += 32) {
      const int last_row = (in_rows - 1) * layout.y1_pitch * kBlockBytes;
      clear_in_all_blocks(i < above ? y1_offset(i) : last_row + y1_offset(i - above));
    }
  }

  // Writes where pixels lie in a block of y1.
  SHUFFLENET_DEVICE void write_places() const {
    const int thread = warp * 32 + lane, threads = t.warps * 32, row_bytes = layout.y1_pitch * kBlockBytes;
    SHUFFLENET_NO_UNROLL
    for (int pixel = thread; pixel < image_rows * s.width; pixel += threads) {
      const int row = constants.by_width.quotient(pixel);
      store_pair<0>(base + layout.places + pixel * kPlaceBytes, row * row_bytes + y1_offset(pixel - row * s.width));
    }
    if (s.stride == 1) return;
    SHUFFLENET_NO_UNROLL
    for (int pixel = thread; pixel < out_rows * s.out_width; pixel += threads) {
      const int row = constants.by_out_width.quotient(pixel);
      const int at = 2 * row * row_bytes + (pixel - row * s.out_width) * kBlockBytes;
      store_pair<0>(base + layout.corners + pixel * kPlaceBytes, at);
    }
  }

  // Zeroes the block of the warp's y2 that makes its number even.
  SHUFFLENET_DEVICE void clear_y2_without_channels() const {
    if (packed.blocks % 2 != 0) clear_block(my_y2() + (packed.blocks * kItemPixels + lane) * kBlockBytes);
  }

  // Zeroes 16 bytes of each block of y1; the warps share the blocks.
  SHUFFLENET_DEVICE void clear_in_all_blocks(int in_block) const {
    const int blocks = s.conv1_groups * packed.conv1_tiles, block_bytes = layout.y1_pixels * kBlockBytes;
    uint32_t to = base + layout.y1 + warp * block_bytes + in_block;
    SHUFFLENET_NO_UNROLL
    for (int block = warp; block < blocks; block += t.warps, to += t.warps * block_bytes) clear_block(to);
  }

  // Returns where a pixel of a row lies in y1, in bytes from the row's beginning.
  SHUFFLENET_DEVICE int y1_offset(int column) const {
    const uint32_t place = column + 1;
    const uint32_t in_halves = place / 2 + (place % 2 == 0 ? 0 : layout.y1_odd);
    return static_cast<int>(s.stride == 1 ? place : in_halves) * kBlockBytes;
  }
  SHUFFLENET_DEVICE uint32_t my_y2() const { return base + layout.y2 + warp * layout.y2_bytes; }

  // Returns where the image has a pixel of a channel of the result, if that is in planes.
  SHUFFLENET_DEVICE char* in_result(int channel, int pixel) const {
    return static_cast<char*>(arguments.result) +
           ((int64_t{image} * s.result_channels + channel) * s.out_plane + pixel) * kElementBytes;
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
