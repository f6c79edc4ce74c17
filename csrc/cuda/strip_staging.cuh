// Where a block of strip_kernel.cuh works, and how x comes to shared memory.
#pragma once

#include "common.cuh"
#ifndef SHUFFLENET_TEST_DEVICE
#include "matrices.cuh"
#endif
#include "strip.h"

namespace shufflenet::cuda {

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

  // Starts to copy the strip's rows of x. A lane copies a block of four neighbouring pixels at a time, and as many
  // lanes as a pixel has blocks all of these pixels.
  SHUFFLENET_DEVICE void copy_x() {
    const int lanes = least(layout.own_blocks, 32), side_by_side = 32 / lanes, mine = lane / lanes;
    if (mine == side_by_side) return;
    const int pixels = image_rows * s.width, first = (warp * side_by_side + mine) * 4;
    const int step = t.warps * side_by_side * 4;
    const int64_t pixel_bytes = s.in_channels * int64_t{kElementBytes}, step_bytes = step * pixel_bytes;
    const int x_pitch = layout.x_pitch, step_pitch = step * x_pitch;
    const char* const strip = static_cast<const char*>(arguments.x) +
                              ((int64_t{image} * s.height + image_row) * s.width + first) * pixel_bytes;
    SHUFFLENET_NO_UNROLL
    for (int block = lane - mine * lanes; block < layout.own_blocks; block += 32) {
      const char* from = strip + block * kBlockBytes;
      uint32_t to = base + layout.x_offset(first, block * kBlockBytes);
      int left = pixels - first;
      SHUFFLENET_NO_UNROLL
      for (; left >= 4; left -= step) {
        copy_block_async(to, from);
        copy_block_async(to + x_pitch, from + pixel_bytes);
        copy_block_async(to + 2 * x_pitch, from + 2 * pixel_bytes);
        copy_block_async(to + 3 * x_pitch, from + 3 * pixel_bytes);
        from += step_bytes;
        to += step_pitch;
      }
      SHUFFLENET_NO_UNROLL
      for (int i = 0; i < left; ++i) copy_block_async(to + i * x_pitch, from + i * pixel_bytes);
    }
    commit_copies();
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

  // Zeroes the blocks of x that conv1 or the pool loads without using them, the pixel of zeros behind the last one, and
  // the block of y2 that makes its number even.
  SHUFFLENET_DEVICE void clear_unused() {
    const int blocks = layout.own_blocks, unused = layout.x_blocks - blocks, pixels = image_rows * s.width;
    const int pitch_blocks = layout.x_pitch / kBlockBytes;
    if (unused > 0) {
      const int in_pitch = least(unused, pitch_blocks - blocks), behind_last = s.stride == 2 ? in_pitch : unused;
      SHUFFLENET_NO_UNROLL
      for (int pixel = warp * 32 + lane; pixel < pixels; pixel += t.warps * 32) {
        const int count = pixel == pixels - 1 ? behind_last : in_pitch;
        SHUFFLENET_NO_UNROLL
        for (int i = 0; i < count; ++i) clear_block(base + layout.x_offset(pixel, (blocks + i) * kBlockBytes));
      }
    }
    if (s.stride == 2) {
      SHUFFLENET_NO_UNROLL
      for (int block = warp * 32 + lane; block < pitch_blocks; block += t.warps * 32) {
        clear_block(base + pixels * layout.x_pitch + block * kBlockBytes);
      }
    }
    if (packed.blocks % 2 != 0) clear_block(my_y2() + (packed.blocks * kItemPixels + lane) * kBlockBytes);
  }

  // Returns where a pixel of a row lies in y1, in bytes from the row's beginning.
  SHUFFLENET_DEVICE int y1_offset(int column) const {
    const uint32_t place = column + 1;
    const uint32_t in_halves = place / 2 + (place % 2 == 0 ? 0 : layout.y1_odd);
    return static_cast<int>(s.stride == 1 ? place : in_halves) * kBlockBytes;
  }
  SHUFFLENET_DEVICE uint32_t my_y2() const { return base + layout.y2 + warp * layout.y2_bytes; }

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
