// Where a block of unit_kernel.cuh works: on which image and slices, in which window of the result and of y1.
#pragma once

#include "common.cuh"
#include "tiling.h"

namespace shufflenet::cuda {

struct Window {
  SHUFFLENET_DEVICE Window(const Sizes& s, const Tiling& t, int64_t index) : Window(s, t, Place(s, t, index)) {}

  SHUFFLENET_DEVICE int out_pixels() const { return out_rows * out_columns; }
  SHUFFLENET_DEVICE int image_pixels() const { return image_rows * image_columns; }
  // Return where the window's p-th pixel lies in a plane of x (image_index) or of the result (out_index).
  SHUFFLENET_DEVICE int image_index(const Sizes& s, int p) const {
    return image_row * s.width + image_column + p +
           (image_columns == s.width ? 0 : by_image_columns.quotient(p) * (s.width - image_columns));
  }
  SHUFFLENET_DEVICE int out_index(const Sizes& s, int p) const {
    return out_row * s.out_width + out_column + p +
           (out_columns == s.out_width ? 0 : by_out_columns.quotient(p) * (s.out_width - out_columns));
  }

  int64_t image;
  int slice_begin, slice_end;
  int out_row, out_column, out_rows, out_columns;          // the window in the result
  int in_row, in_column, in_rows, in_columns;              // the window in y1, with its halo
  int image_row, image_column, image_rows, image_columns;  // the part of that which is inside the image
  Divisor by_out_columns, by_in_columns, by_image_columns;

 private:
  struct Place {
    SHUFFLENET_DEVICE Place(const Sizes& s, const Tiling& t, int64_t index) {
      // Slices vary fastest: blocks that read the same pixels of x run at about the same time, and meet in the L2
      // cache.
      const int slice_parts = t.slice_parts(s), column_tiles = t.column_tiles(s), row_tiles = t.row_tiles(s);
      slice_part = static_cast<int>(index % slice_parts);
      index /= slice_parts;
      column_tile = static_cast<int>(index % column_tiles);
      index /= column_tiles;
      row_tile = static_cast<int>(index % row_tiles);
      image = index / row_tiles;
    }
    int64_t image;
    int slice_part, column_tile, row_tile;
  };
  SHUFFLENET_DEVICE Window(const Sizes& s, const Tiling& t, const Place& place)
      : image(place.image),
        slice_begin(place.slice_part * t.slices),
        slice_end(least(slice_begin + t.slices, s.groups)),
        out_row(place.row_tile * t.tile_rows),
        out_column(place.column_tile * t.tile_columns),
        out_rows(least(t.tile_rows, s.out_height - out_row)),
        out_columns(least(t.tile_columns, s.out_width - out_column)),
        in_row(out_row * s.stride - 1),
        in_column(out_column * s.stride - 1),
        in_rows((out_rows - 1) * s.stride + 3),
        in_columns((out_columns - 1) * s.stride + 3),
        image_row(most(in_row, 0)),
        image_column(most(in_column, 0)),
        image_rows(least(in_row + in_rows, s.height) - image_row),
        image_columns(least(in_column + in_columns, s.width) - image_column),
        by_out_columns(out_columns),
        by_in_columns(in_columns),
        by_image_columns(image_columns) {}
};

// Returns the offset in an image of channel `c` of a pixel, which is given as its index in a plane of `pixels` pixels.
// The planner has checked that 32 bits hold it.
template <Layout kLayout>
SHUFFLENET_DEVICE int image_offset(int channels, int pixels, int c, int pixel) {
  return kLayout == Layout::channels_last ? pixel * channels + c : c * pixels + pixel;
}

}  // namespace shufflenet::cuda
