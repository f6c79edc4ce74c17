// conv1 of a block of unit_kernel.cuh: y1 from x, whose tiles each warp copies into buffers of its own, and from
// weights that are in shared memory already.
#pragma once

#include "common.cuh"
#include "tiling.h"
#include "unit_products.cuh"
#include "unit_staging.cuh"
#include "unit_window.cuh"

namespace shufflenet::cuda {

// conv1 of a chunk, whose rows of weights are `run_count` runs.
template <class T, Layout kLayout>
struct UnitConv1 {
  SHUFFLENET_DEVICE UnitConv1(const UnitStaging<T>& block, const Window& window, int run_count)
      : block(block),
        s(block.s),
        t(block.t),
        layout(block.layout),
        w(window),
        run_count(run_count),
        by_runs(run_count) {}

  SHUFFLENET_DEVICE void run() const {
    const Shared<T> tiles =
        shared_at<T>(shared_memory(), layout.tiles + static_cast<int64_t>(warp_index()) * kBuffers * layout.x_bytes);
    const int tile_elements = layout.x_bytes / static_cast<int>(sizeof(T));
    Cursor load = cursor_at(warp_index());
    int buffer = 0;  // holds the tile that is multiplied, while the next one is copied into the other buffer
    const auto stage_next = [&](int to) {
      if (!load.done(w)) {
        stage_x(load, tiles + to * tile_elements);
        load.k += t.tile_depth;
        if (load.k >= s.conv1_depth) load = cursor_at(load.item + kWarps);
      }
      commit_copies();
    };

    stage_next(0);
    SHUFFLENET_NO_UNROLL
    for (Cursor at = cursor_at(warp_index()); !at.done(w); at = cursor_at(at.item + kWarps)) {
      A sum[kTileRows / 8][4];
      clear(sum);
      SHUFFLENET_NO_UNROLL
      for (int k = 0; k < s.conv1_depth; k += t.tile_depth, buffer = 1 - buffer) {
        wait_copies<0>();
        warp_barrier();  // all lanes see the tile, and have finished reading the other buffer
        stage_next(1 - buffer);
        Engine::template multiply<kPlanes>(
            sum, {tiles + buffer * tile_elements, kPlanes ? kPlanePitch : layout.x_pitch},
            block.weight1 + (at.run.position * layout.weight1_pitch + k), layout.weight1_pitch,
            ceil_div(at.run.rows, 8), least(t.tile_depth, s.conv1_depth - k));
      }
      write_y1(at, sum);
    }
  }

 private:
  using A = accumulator_t<T>;
  using Engine = typename EngineOf<T>::Type;
  using Sums = Vector<A, 2>;
  static constexpr bool kPlanes = kLayout == Layout::contiguous;

  // A warp's position in conv1. An item is 16 pixels and a run; a warp takes every kWarps-th item, and goes through its
  // depth in parts, from channel k on.
  struct Cursor {
    SHUFFLENET_DEVICE bool done(const Window& w) const { return pixel >= w.image_pixels(); }
    int item, pixel, k;
    Run run;
  };
  SHUFFLENET_DEVICE Cursor cursor_at(int item) const {
    const int tile = by_runs.quotient(item);
    Cursor cursor = {item, tile * kTilePixels, 0, {}};
    if (!cursor.done(w)) cursor.run = block.runs[item - tile * run_count];
    return cursor;
  }

  // Starts to copy a tile of x. A lane copies 16 bytes of each step of depth: channels of one pixel or, from contiguous
  // planes, neighbouring pixels of one channel.
  SHUFFLENET_DEVICE void stage_x(const Cursor& at, Shared<T> tile) const {
    constexpr int kBlocks = kPlanes ? kTilePixels / kPerBlock<T> : 2;  // blocks a channel has; a pixel, in a step
    const int major = lane_index() / kBlocks, minor = lane_index() % kBlocks * kPerBlock<T>;
    const int pixel = at.pixel + (kPlanes ? minor : major);
    const int pixels = w.image_pixels() - pixel;
    const int depth = least(t.tile_depth, s.conv1_depth - at.k);
    const T* const from =
        block.x_image(w) + image_offset<kLayout>(s.in_channels, s.in_plane, at.run.x_channel + at.k,
                                                 w.image_index(s, most(0, least(pixel, w.image_pixels() - 1))));
    SHUFFLENET_NO_UNROLL
    for (int k = 0; k < depth; k += kStep<T>) {
      if constexpr (kPlanes) {
        copy_block(tile + ((k + major) * kPlanePitch + minor), from + (k + major) * s.in_plane,
                   k + major < depth ? pixels : 0, block.x, t.x_vector,
                   [&](int i) { return w.image_index(s, pixel + i) - w.image_index(s, pixel); });
      } else {
        copy_block(tile + (major * layout.x_pitch + k + minor), from + (k + minor), pixels > 0 ? depth - k - minor : 0,
                   block.x, t.x_vector, [](int i) { return i; });
      }
    }
  }

  // Finishes the sums of an item and writes them to y1, each to the column of the shuffled channel that it belongs to.
  SHUFFLENET_DEVICE void write_y1(const Cursor& at, const A (&sum)[kTileRows / 8][4]) const {
    bool inside[2];
    int pixel_at[2];
    SHUFFLENET_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int pixel = at.pixel + line(2 * half);
      inside[half] = pixel < w.image_pixels();
      const int row = w.by_image_columns.quotient(pixel), column = pixel - row * w.image_columns;
      const int window_row = row + w.image_row - w.in_row, window_column = column + w.image_column - w.in_column;
      pixel_at[half] = (window_row * w.in_columns + window_column) * layout.y1_pitch;
    }
    SHUFFLENET_UNROLL
    for (int j = 0; j < kTileRows / 8; ++j) {
      if (8 * j >= at.run.rows) break;
      SHUFFLENET_UNROLL
      for (int odd = 0; odd < 2; ++odd) {
        const int row = place(j, odd);
        const int c = at.run.channel + least(row, at.run.rows - 1) * s.shuffle_groups;
        const Sums constants = shared_as<const Sums>(Shared<const A>(block.taps + 2 * c))[0];
        SHUFFLENET_UNROLL
        for (int half = 0; half < 2; ++half) {
          T value;
          narrow(relu(multiply_add(sum[j][2 * half + odd], constants.elements[0], constants.elements[1])), value);
          if (inside[half] && row < at.run.rows) block.y1[pixel_at[half] + c] = value;
        }
      }
    }
  }

  const UnitStaging<T>& block;
  const Sizes& s;
  const Tiling& t;
  const SharedLayout& layout;
  const Window& w;
  const int run_count;
  const Divisor by_runs;  // by the number of runs
};

}  // namespace shufflenet::cuda
