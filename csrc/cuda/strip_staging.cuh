// Where a block of strip_kernel.cuh works, and what it keeps in shared memory in either layout of x.
#pragma once

#include "common.cuh"
#ifndef SHUFFLENET_TEST_DEVICE
#include "matrices.cuh"
#endif
#include "strip.h"

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
        by_width(arguments.sizes.width),
        by_out_width(arguments.sizes.stride == 1 ? by_width : Divisor(arguments.sizes.out_width)) {
    const uint32_t index = static_cast<uint32_t>(block_index()), parts = t.parts(s), strips = t.strips(s);
    const uint32_t strip = index / parts;
    image = strip / strips;
    part = static_cast<int>(index - strip * parts);
    out_row = static_cast<int>(strip - static_cast<uint32_t>(image) * strips) * t.rows;
    out_rows = least(t.rows, s.out_height - out_row);
    in_row = t.first_in_row(s, out_row);
    in_rows = t.in_rows(s, out_rows);
    image_row = most(in_row, 0);
    image_rows = least(in_row + in_rows, s.height) - image_row;
    fragments = static_cast<const Fragment*>(arguments.fragments) + int64_t{part} * packed.part;
  }

  // Zeroes the pixels of y1 outside of the image, as padding is zero behind conv1's bias and ReLU.
  SHUFFLENET_DEVICE void clear_y1_outside_the_image() {
    const int blocks = s.conv1_groups * packed.conv1_tiles, row_bytes = layout.y1_pitch * kBlockBytes;
    const int block_bytes = layout.y1_pixels * kBlockBytes, end_bytes = y1_offset(s.width);
    const bool is_top = in_row<0, is_bottom = in_row + in_rows> s.height;
    // With a gap of one pixel a row ends with the next one's first. With stride 2 nothing reads behind an even row.
    const bool has_end = s.stride == 1 ? t.gap > 1 : s.width % 2 != 0;
    SHUFFLENET_NO_UNROLL
    for (int block = warp; block < blocks; block += t.warps) {
      const uint32_t to = base + layout.y1 + block * block_bytes;
      SHUFFLENET_NO_UNROLL
      for (int row = lane; row < in_rows; row += 32) {
        clear_block(to + row * row_bytes);
        if (has_end || row == in_rows - 1) clear_block(to + row * row_bytes + end_bytes);
      }
      SHUFFLENET_NO_UNROLL
      for (int column = lane; column < s.width; column += 32) {
        const uint32_t at = to + y1_offset(column);
        if (is_top) clear_block(at);
        if (is_bottom) clear_block(at + (in_rows - 1) * row_bytes);
      }
    }
  }

  // Zeroes the block of the warp's y2 that makes its number even.
  SHUFFLENET_DEVICE void clear_y2_without_channels() {
    if (packed.blocks % 2 != 0) clear_block(my_y2() + (packed.blocks * kItemPixels + lane) * kBlockBytes);
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
  const Divisor by_width, by_out_width;
  // Where the block works: the slices of a part, rows of the result, the rows of y1 that these are made of, and those
  // of them that are inside the image.
  const Fragment* fragments;
  int image, part, out_row, out_rows, in_row, in_rows, image_row, image_rows;
};

}  // namespace shufflenet::cuda
