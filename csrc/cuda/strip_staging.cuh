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
        by_width(arguments.sizes.width) {
    const uint32_t index = static_cast<uint32_t>(block_index()), parts = t.parts(s), strips = t.strips(s);
    const uint32_t strip = index / parts;
    image = strip / strips;
    part = static_cast<int>(index - strip * parts);
    out_row = static_cast<int>(strip - static_cast<uint32_t>(image) * strips) * t.rows;
    out_rows = least(t.rows, s.height - out_row);
    image_row = most(out_row - 1, 0);
    image_rows = least(out_row + out_rows + 1, s.height) - image_row;
    fragments = static_cast<const Fragment*>(arguments.fragments) + int64_t{part} * packed.part;
  }

  // Starts to copy the strip's rows of x. A warp copies four neighbouring pixels at a time, a lane a block of each.
  SHUFFLENET_DEVICE void copy_x() {
    const int pixels = image_rows * s.width, first = warp * 4, step = t.warps * 4;
    const int64_t pixel_bytes = s.in_channels * int64_t{kElementBytes}, step_bytes = step * pixel_bytes;
    const int x_pitch = layout.x_pitch, step_pitch = step * x_pitch;
    const char* const strip = static_cast<const char*>(arguments.x) +
                              ((int64_t{image} * s.height + image_row) * s.width + first) * pixel_bytes;
    SHUFFLENET_NO_UNROLL
    for (int block = lane; block < layout.own_blocks; block += 32) {
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
    const int blocks = s.conv1_groups * packed.conv1_tiles, rows = out_rows + 2;
    const int row_bytes = layout.y1_pitch * kBlockBytes, width_bytes = s.width * kBlockBytes;
    const int block_bytes = layout.y1_pixels * kBlockBytes;
    const bool is_top = out_row == 0, is_bottom = out_row + out_rows == s.height;
    SHUFFLENET_NO_UNROLL
    for (int block = warp; block < blocks; block += t.warps) {
      const uint32_t to = base + layout.y1 + block * block_bytes;
      SHUFFLENET_NO_UNROLL
      for (int row = lane; row < rows; row += 32) {
        clear_block(to + row * row_bytes);
        if (t.gap > 1 || row == rows - 1) clear_block(to + row * row_bytes + width_bytes + kBlockBytes);
      }
      SHUFFLENET_NO_UNROLL
      for (int column = lane; column < s.width; column += 32) {
        const uint32_t at = to + (column + 1) * kBlockBytes;
        if (is_top) clear_block(at);
        if (is_bottom) clear_block(at + (rows - 1) * row_bytes);
      }
    }
  }

  // Zeroes the blocks of x that conv1 loads without using them, and the block of y2 that makes its number even.
  SHUFFLENET_DEVICE void clear_unused() {
    const int blocks = layout.own_blocks, unused = layout.x_blocks - blocks;
    if (unused > 0) {
      const int pixels = image_rows * s.width, in_pitch = layout.x_pitch / kBlockBytes - blocks;
      SHUFFLENET_NO_UNROLL
      for (int pixel = warp * 32 + lane; pixel < pixels; pixel += t.warps * 32) {
        const int count = pixel == pixels - 1 ? most(unused, in_pitch) : in_pitch;
        SHUFFLENET_NO_UNROLL
        for (int i = 0; i < count; ++i) clear_block(base + layout.x_offset(pixel, (blocks + i) * kBlockBytes));
      }
    }
    if (packed.blocks % 2 != 0) clear_block(my_y2() + (packed.blocks * kItemPixels + lane) * kBlockBytes);
  }

  SHUFFLENET_DEVICE uint32_t my_y2() const { return base + layout.y2 + warp * layout.y2_bytes; }

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
  int image, part, out_row, out_rows, image_row, image_rows;
};

}  // namespace shufflenet::cuda
