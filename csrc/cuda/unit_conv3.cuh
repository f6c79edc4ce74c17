// conv3 of a block of unit_kernel.cuh: the result from y2, with the residual added. The weights are copied to shared
// memory part by part, as much as there is room for.
#pragma once

#include "common.cuh"
#include "tiling.h"
#include "unit_products.cuh"
#include "unit_staging.cuh"
#include "unit_window.cuh"

namespace shufflenet::cuda {

template <class T, Layout kLayout>
struct UnitConv3 {
  SHUFFLENET_DEVICE UnitConv3(const UnitStaging<T>& block, const Window& window)
      : block(block), s(block.s), t(block.t), layout(block.layout), w(window) {}

  // Computes conv3's channels of the result. The parts of a slice are `layout.part_rows` rows of its weights.
  SHUFFLENET_DEVICE void run() const {
    const T* const weight = static_cast<const T*>(block.arguments.conv3.weight);
    for (int slice = w.slice_begin; slice < w.slice_end; ++slice) {
      for (int row = 0; row < s.group_rows; row += layout.part_rows) {
        const int rows = least(layout.part_rows, s.group_rows - row);
        barrier();  // y2 is complete, and all threads have finished reading the weights that were here before
        stage_weights<T>(block.weight3, layout.weight3_pitch, ceil_div(rows, layout.weight3_unit) * layout.weight3_unit,
                         weight + static_cast<int64_t>(slice * s.group_rows + row) * s.slice_channels, rows,
                         s.slice_channels, t.conv3_vector, [](int i) { return kPlanes ? i : place(i); });
        commit_copies();
        wait_copies<0>();
        barrier();
        switch (t.result_vector) {
          case 16: multiply_part<16>(slice, row, rows); break;
          case 8: multiply_part<8>(slice, row, rows); break;
          default: multiply_part<sizeof(T)>(slice, row, rows);
        }
      }
    }
  }

 private:
  using A = accumulator_t<T>;
  using Engine = typename EngineOf<T>::Type;
  using Sums = Vector<A, 2>;
  static constexpr bool kPlanes = kLayout == Layout::contiguous;

  // Computes `rows` rows of a slice, from its `first`-th on, for all pixels of the window. Warps share the tiles of
  // lines x elements. The number of elements is a multiple of those that a vector has.
  template <int kVector>
  SHUFFLENET_DEVICE void multiply_part(int slice, int first, int rows) const {
    constexpr int kSize = kVector / static_cast<int>(sizeof(T));
    using V = Vector<T, kSize>;
    const int constants = (slice - w.slice_begin) * s.group_rows + first;
    const int channel = slice * s.group_rows + first;
    const int lines = kPlanes ? rows : w.out_pixels(), elements = kPlanes ? w.out_pixels() : rows;
    const Shared<const T> pixel_data = block.y2 + (slice - w.slice_begin) * layout.slice_pitch;
    const Shared<const T> line_data = kPlanes ? block.weight3 : pixel_data,
                          element_data = kPlanes ? pixel_data : block.weight3;
    const int line_pitch = kPlanes ? layout.weight3_pitch : layout.y2_pitch;
    const int element_pitch = kPlanes ? layout.y2_pitch : layout.weight3_pitch;
    const int line_tiles = ceil_div(lines, kLines), element_tiles = ceil_div(elements, kElements);
    const Divisor by_element_tiles(element_tiles);
    SHUFFLENET_NO_UNROLL
    for (int item = warp_index(); item < line_tiles * element_tiles; item += kWarps) {
      const int line_tile = by_element_tiles.quotient(item);
      const int first_line = line_tile * kLines, first_element = (item - line_tile * element_tiles) * kElements;
      const int element = first_element + lane_index() % 4 * 8;
      int start[2];  // offsets of the lane's first element, in its two lines
      SHUFFLENET_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int at_line = first_line + line(2 * half);
        start[half] = image_offset<kLayout>(
            s.result_channels, s.out_plane, s.first_conv3_channel + channel + (kPlanes ? at_line : element),
            w.out_index(s, kPlanes ? element : at_line));
      }
      V residual[2][8 / kSize] = {};
      SHUFFLENET_UNROLL
      for (int half = 0; half < 2; ++half) {
        if (s.stride != 1 || first_line + line(2 * half) >= lines) continue;
        SHUFFLENET_UNROLL
        for (int e = 0; e < 8; e += kSize) {
          if (element + e >= elements) break;
          residual[half][e / kSize] =
              *reinterpret_cast<const V*>(block.x_image(w) + (start[half] + distance<kVector>(element, e)));
        }
      }
      A sum[kElements / 8][4];
      clear(sum);
      Engine::template multiply<false>(
          sum, {line_data + first_line * line_pitch, line_pitch}, element_data + first_element * element_pitch,
          element_pitch, kElements / 8, s.slice_channels);
      SHUFFLENET_UNROLL
      for (int e = 0; e < 8; e += kSize) {
        if (element + e >= elements) break;
        V vector[2];
        SHUFFLENET_UNROLL
        for (int i = 0; i < kSize; ++i) {
          Sums constant;
          SHUFFLENET_UNROLL
          for (int half = 0; half < 2; ++half) {
            if (kPlanes || half == 0) {
              const int row = constants + (kPlanes ? least(first_line + line(2 * half), lines - 1) : element + e + i);
              constant = shared_as<const Sums>(Shared<const A>(block.affine3 + 2 * row))[0];
            }
            const A value =
                multiply_add(sum[(e + i) / 2][2 * half + (e + i) % 2], constant.elements[0], constant.elements[1]);
            narrow(relu(value + widen(residual[half][e / kSize].elements[i])), vector[half].elements[i]);
          }
        }
        SHUFFLENET_UNROLL
        for (int half = 0; half < 2; ++half) {
          if (first_line + line(2 * half) >= lines) continue;
          *reinterpret_cast<V*>(block.result_image(w) + (start[half] + distance<kVector>(element, e))) = vector[half];
        }
      }
    }
  }

  // Returns the distance in memory from element `first` of a line to the e-th behind it. It is e, except for pixels of
  // a window narrower than the image: these are written one by one, and lie in several rows.
  template <int kVector>
  SHUFFLENET_DEVICE int distance(int first, int e) const {
    if (!kPlanes || kVector > static_cast<int>(sizeof(T)) || w.out_columns == s.out_width) return e;
    const int rows = w.by_out_columns.quotient(first + e) - w.by_out_columns.quotient(first);
    return e + rows * (s.out_width - w.out_columns);
  }

  const UnitStaging<T>& block;
  const Sizes& s;
  const Tiling& t;
  const SharedLayout& layout;
  const Window& w;
};

}  // namespace shufflenet::cuda
