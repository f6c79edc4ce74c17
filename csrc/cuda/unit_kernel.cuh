// The unit as one fused pass over a window of an image (tiling.h), written once for every dtype, layout and device:
// with device.cuh it is a CUDA kernel, with tests/cuda/host_device.h the same code runs on the CPU.
//
//   conv1      keeps its weights in shared memory. Each warp copies tiles of x into buffers of its own, multiplies them
//   by
//              the weights, applies bias or batch norm and ReLU, and writes y1. The shuffle takes no step of its own:
//              it is the column of y1 that a row of conv1 writes to.
//   depthwise  makes y2 of y1, which has a halo of zeros. Each thread computes two channels.
//   conv3      multiplies y2 by weights in shared memory. The sums go from registers to the result, with the residual
//              added, in accesses of up to 16 bytes. Where a unit has no conv3, y2 is written as the result.
//
// y1 and y2 have x's dtype, as in PyTorch. Sums, biases and what else is done to sums have the accumulator's.
#pragma once

#include "common.cuh"

namespace shufflenet::cuda {

// How many elements of T 16 bytes hold (kPerBlock), and how many channels one mma instruction multiplies (kStep).
template <class T>
inline constexpr int kPerBlock = 16 / static_cast<int>(sizeof(T));
template <class T>
inline constexpr int kStep = kStepBytes / static_cast<int>(sizeof(T));

// Returns how many of the n rows that are left the next tile takes, so that all tiles become about equal.
SHUFFLENET_DEVICE int next_rows(int n) {
  const int even = ceil_div(n, ceil_div(n, kTileRows));
  return least(n, ceil_div(even, 8) * 8);
}

// Returns the place in the product at which element e of the kElements that a warp writes side by side is computed. In
// the product, a lane holds places 8 * j + 2 * (lane % 4) and the one behind, for j = 0 to 3. This mapping gives each
// lane eight neighbouring elements instead, which it writes in wide accesses. It swaps bits 1 and 2 of e with bits 3
// and 4, and so is its own inverse.
SHUFFLENET_DEVICE int place(int e) { return (e & ~0x1e) | (e >> 3 & 3) << 1 | (e >> 1 & 3) << 3; }

// ---- Where a block works --------------------------------------------------------------------------------------------

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

// ---- Global memory to shared memory ---------------------------------------------------------------------------------

// Fills a block of 16 bytes: element i with from[offset(i)] while i is below `valid`, the others with zeros. Each copy
// has kVector bytes from an aligned address, whose elements lie side by side and are either all valid or all not. A
// copy that reads nothing still needs an address that could be read: `readable`.
template <class T, int kVector, class Offset>
SHUFFLENET_DEVICE void copy_vectors(Shared<T> block, const T* from, int valid, const T* readable,
                                    const Offset& offset) {
  constexpr int kSize = kVector / static_cast<int>(sizeof(T));
  SHUFFLENET_UNROLL
  for (int first = 0; first < kPerBlock<T>; first += kSize) {
    const bool inside = first < valid;
    const T* const at = from + (kSize > 1 ? first : offset(first));
    copy_async<kVector>(block + first, inside ? at : readable, inside);
  }
}

// Does the same by copies of `vector` bytes or, if that is below 4, by plain loads.
template <class T, class Offset>
SHUFFLENET_DEVICE void copy_block(Shared<T> block, const T* from, int valid, const T* readable, int vector,
                                  const Offset& offset) {
  if (vector == 16) {
    copy_vectors<T, 16>(block, from, valid, readable, offset);
  } else if (vector == 8) {
    copy_vectors<T, 8>(block, from, valid, readable, offset);
  } else if (sizeof(T) <= 4 && vector == 4) {
    copy_vectors<T, sizeof(T) <= 4 ? 4 : 8>(block, from, valid, readable, offset);
  } else {
    SHUFFLENET_NO_UNROLL
    for (int i = 0; i < kPerBlock<T>; ++i) block[i] = i < valid ? from[offset(i)] : T{};
  }
}

// Fills `rows` rows of shared memory, `pitch` elements apart. Row place_of(i) gets the i-th row of `weight`, padded
// with zeros to whole steps of depth, or zeros alone if i is not below `valid_rows`. A warp copies a row at a time.
template <class T, class Place>
SHUFFLENET_DEVICE void stage_weights(Shared<T> to, int pitch, int rows, const T* weight, int valid_rows, int depth,
                                     int vector, const Place& place_of) {
  SHUFFLENET_NO_UNROLL
  for (int row = warp_index(); row < rows; row += kWarps) {
    const T* const from = weight + static_cast<int64_t>(row) * depth;
    const Shared<T> to_row = to + place_of(row) * pitch;
    SHUFFLENET_NO_UNROLL
    for (int k = lane_index() * kPerBlock<T>; k < ceil_div(depth, kStep<T>) * kStep<T>; k += 32 * kPerBlock<T>) {
      copy_block(to_row + k, from + k, row < valid_rows ? depth - k : 0, weight, vector, [](int i) { return i; });
    }
  }
}

// ---- Tile products --------------------------------------------------------------------------------------------------

// The 16 lines of a product's first operand in shared memory: y2, weights, or a tile of x. What lies side by side is
// the depth of a line or, where an engine is called with kDepthMajor, the lines at one depth.
template <class T>
struct Lines {
  Shared<const T> data;
  int pitch;
};

// A lane's accumulator sum[j][i] belongs to line(i) and place(j, i) of the product.
SHUFFLENET_DEVICE int line(int i) { return lane_index() / 4 + i / 2 * 8; }
SHUFFLENET_DEVICE int place(int j, int i) { return 8 * j + lane_index() % 4 * 2 + i % 2; }

// Multiplies by FMA instructions. It loads 8 bytes of depth at a time, as 16 would take more registers than there are.
// The lanes' loads touch different banks of shared memory, or the same address, which is read once for all.
template <class T>
struct FmaEngine {
  using A = accumulator_t<T>;
  static constexpr int kDepth = 8 / static_cast<int>(sizeof(T));
  using Block = Vector<T, kDepth>;

  template <bool kDepthMajor, int kTiles>
  SHUFFLENET_DEVICE static void multiply(A (&sum)[kTiles][4], const Lines<T>& lines, Shared<const T> elements,
                                         int pitch, int tiles, int depth) {
    SHUFFLENET_NO_UNROLL
    for (int k = 0; k < depth; k += kDepth) {
      Block a[2];
      SHUFFLENET_UNROLL
      for (int half = 0; half < 2; ++half) {
        if constexpr (kDepthMajor) {
          SHUFFLENET_UNROLL
          for (int i = 0; i < kDepth; ++i) {
            a[half].elements[i] = lines.data[(k + i) * lines.pitch + line(2 * half)];
          }
        } else {
          a[half] = shared_as<const Block>(lines.data + (line(2 * half) * lines.pitch + k))[0];
        }
      }
      SHUFFLENET_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        if (j >= tiles) break;
        SHUFFLENET_UNROLL
        for (int odd = 0; odd < 2; ++odd) {
          const Block b = shared_as<const Block>(elements + (place(j, odd) * pitch + k))[0];
          SHUFFLENET_UNROLL
          for (int i = 0; i < kDepth; ++i) {
            SHUFFLENET_UNROLL
            for (int half = 0; half < 2; ++half) {
              A& to = sum[j][2 * half + odd];
              to = multiply_add(widen(a[half].elements[i]), widen(b.elements[i]), to);
            }
          }
        }
      }
    }
  }
};

// Multiplies on tensor cores: 16 lines (matrix a, 16 x kStep) by eight places at a time (matrix b, kStep x 8). Lanes
// hold the fragments as the PTX manual draws them for mma.m16n8k16, and for mma.m16n8k8 of TF32.
template <class T>
struct MmaEngine {
  template <bool kDepthMajor, int kTiles>
  SHUFFLENET_DEVICE static void multiply(float (&sum)[kTiles][4], const Lines<T>& lines, Shared<const T> elements,
                                         int pitch, int tiles, int depth) {
    const int lane = lane_index();
    SHUFFLENET_NO_UNROLL
    for (int k = 0; k < depth; k += kStep<T>) {
      uint32_t a[4];
      if constexpr (kDepthMajor && sizeof(T) == 4) {
        SHUFFLENET_UNROLL
        for (int i = 0; i < 4; ++i) {
          a[i] = bits_of(lines.data[(k + lane % 4 + i / 2 * 4) * lines.pitch + lane / 4 + i % 2 * 8]);
        }
      } else if constexpr (kDepthMajor) {
        // In memory these are matrices of 8 depths x 8 lines; the load transposes them.
        load_matrices<true, T>(a, lines.data + ((k + lane % 8 + lane / 16 * 8) * lines.pitch + lane / 8 % 2 * 8));
      } else {
        load_matrices<false, T>(a, lines.data + (lane % 16 * lines.pitch + k + lane / 16 * kPerBlock<T>));
      }
      round_operands<T>(a);
      SHUFFLENET_UNROLL
      for (int j = 0; j < kTiles; j += 2) {
        if (j >= tiles) break;
        uint32_t b[4];
        // Where the number of tiles is odd, nothing may be read behind the last: its second half reads that row again.
        const int at = least(8 * j + lane / 16 * 8 + lane % 8, 8 * tiles - 1);
        load_matrices<false, T>(b, elements + (at * pitch + k + lane / 8 % 2 * kPerBlock<T>));
        round_operands<T>(b);
        SHUFFLENET_UNROLL
        for (int next = 0; next < 2; ++next) {
          if constexpr (kHasMmaK16) {
            multiply_matrices(sum[j + next], a, {b[2 * next], b[2 * next + 1]}, T{});
          } else {
            SHUFFLENET_UNROLL
            for (int half = 0; half < 2; ++half) {
              multiply_matrices(sum[j + next], {a[2 * half], a[2 * half + 1]}, b[2 * next + half], T{});
            }
          }
        }
      }
    }
  }
};

template <class T, bool kMma = kHasMma<T>>
struct EngineOf {
  using Type = FmaEngine<T>;
};
template <class T>
struct EngineOf<T, true> {
  using Type = MmaEngine<T>;
};

template <class A, int kTiles>
SHUFFLENET_DEVICE void clear(A (&sum)[kTiles][4]) {
  SHUFFLENET_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    SHUFFLENET_UNROLL
    for (int i = 0; i < 4; ++i) sum[j][i] = A{0};
  }
}

// ---- The block ------------------------------------------------------------------------------------------------------

template <class T, Layout kLayout>
struct UnitBlock {
  using A = accumulator_t<T>;
  using Engine = typename EngineOf<T>::Type;
  using Pair = Vector<T, 2>;
  using Sums = Vector<A, 2>;
  static constexpr bool kPlanes = kLayout == Layout::contiguous;

  SHUFFLENET_DEVICE explicit UnitBlock(const KernelArguments& arguments)
      : arguments(arguments),
        s(arguments.sizes),
        t(arguments.tiling),
        layout(arguments.layout),
        runs(shared_at<Run>(shared_memory(), 0)),
        taps(shared_at<A>(shared_memory(), layout.taps)),
        affine3(shared_at<A>(shared_memory(), layout.affine3)),
        y1(shared_at<T>(shared_memory(), layout.y1)),
        y2(shared_at<T>(shared_memory(), layout.y2)),
        weight1(shared_at<T>(shared_memory(), layout.weight1)),
        weight3(shared_at<T>(shared_memory(), layout.weight3)),
        x(static_cast<const T*>(arguments.x)),
        result(static_cast<T*>(arguments.result)) {}

  SHUFFLENET_DEVICE void run() {
    const int64_t windows = t.windows(s);
    for (int64_t index = block_index(); index < windows; index += block_count()) {
      const Window window(s, t, index);
      const int channel_begin = window.slice_begin * s.slice_channels,
                channel_end = window.slice_end * s.slice_channels;
      for (int begin = channel_begin; begin < channel_end; begin += t.chunk) {
        const int channels = least(t.chunk, channel_end - begin);
        const int end = begin + channels;
        barrier();  // all threads have finished reading what is overwritten now
        const int run_count = find_runs(begin, end);
        load_taps(begin, channels);
        if (s.out_channels && begin == channel_begin) load_affine3(window);
        clear_halo(window, channels);
        barrier();  // all threads see the runs
        stage_weights1(run_count);
        barrier();  // all threads see weights and taps
        conv1(window, run_count);
        barrier();
        if (s.out_channels && begin == channel_begin) {
          clear_y2();  // now, as tiles of x may have been in its place until here
          barrier();
        }
        if (s.stride == 1) {
          depthwise<1>(window, begin - channel_begin, channels);
        } else {
          depthwise<2>(window, begin - channel_begin, channels);
        }
        if (!s.out_channels) {
          barrier();
          write_y2(window, begin, channels);
        }
      }
      if (s.out_channels) conv3(window);
      if (s.out_channels && s.stride == 2) pool(window);
    }
  }

  SHUFFLENET_DEVICE const T* x_image(const Window& w) const { return x + w.image * s.in_channels * s.in_plane; }
  SHUFFLENET_DEVICE T* result_image(const Window& w) const {
    return result + w.image * s.result_channels * s.out_plane;
  }

  // Finds the runs of conv1's rows that compute the shuffled channels [begin, end), and returns their number. Shuffled
  // channel n * shuffle_groups + r is row r * shuffle_rows + n: for each r these rows are consecutive, and a run of
  // them is cut where a group of conv1 ends. One thread writes the runs; all threads count them.
  SHUFFLENET_DEVICE int find_runs(int begin, int end) const {
    const int group_rows = s.mid_channels / s.conv1_groups;
    int count = 0, position = 0;
    for (int r = 0; r < s.shuffle_groups; ++r) {
      const int first = r * s.shuffle_rows, run_end = first + ceil_div(most(end - r, 0), s.shuffle_groups);
      for (int row = first + ceil_div(most(begin - r, 0), s.shuffle_groups), rows; row < run_end; row += rows) {
        const int group = row / group_rows;
        rows = next_rows(least(run_end, (group + 1) * group_rows) - row);
        if (thread_index() == 0) {
          runs[count] = Run{row, rows, position, group * s.conv1_depth, (row - first) * s.shuffle_groups + r - begin};
        }
        position += rows;
        ++count;
      }
    }
    return count;
  }

  SHUFFLENET_DEVICE void load_taps(int begin, int channels) {
    const T* const weight = static_cast<const T*>(arguments.conv2.weight);
    SHUFFLENET_NO_UNROLL
    for (int i = thread_index(); i < channels; i += kThreads) {
      const int channel = begin + i;
      const Affine<A> first =
          affine<T>(arguments.conv1, channel % s.shuffle_groups * s.shuffle_rows + channel / s.shuffle_groups);
      const Affine<A> second = affine<T>(arguments.conv2, channel);
      taps[2 * i] = first.scale;
      taps[2 * i + 1] = first.bias;
      taps[2 * layout.columns + i] = second.bias;
      SHUFFLENET_UNROLL
      for (int tap = 0; tap < 9; ++tap) {
        taps[(3 + tap) * layout.columns + i] = second.scale * widen(weight[static_cast<int64_t>(channel) * 9 + tap]);
      }
    }
    if (channels % 2 != 0 && thread_index() < kTapConstants - 2) {
      // An odd last channel is computed as a pair whose second channel has zeros for constants.
      taps[(2 + thread_index()) * layout.columns + channels] = A{0};
    }
  }

  SHUFFLENET_DEVICE void load_affine3(const Window& w) {
    SHUFFLENET_NO_UNROLL
    for (int i = thread_index(); i < (w.slice_end - w.slice_begin) * s.group_rows; i += kThreads) {
      const Affine<A> constants = affine<T>(arguments.conv3, w.slice_begin * s.group_rows + i);
      affine3[2 * i] = constants.scale;
      affine3[2 * i + 1] = constants.bias;
    }
  }

  // Zeroes the pixels of y1 outside the image, as padding is zero behind conv1's bias and ReLU; and everywhere the
  // channel that makes a pair of an odd last one.
  SHUFFLENET_DEVICE void clear_halo(const Window& w, int channels) {
    SHUFFLENET_NO_UNROLL
    for (int i = thread_index(); i < w.in_rows * w.in_columns; i += kThreads) {
      const int window_row = w.by_in_columns.quotient(i);
      const int row = window_row + w.in_row, column = i - window_row * w.in_columns + w.in_column;
      const bool inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
      for (int c = inside ? channels / 2 * 2 : 0; c < channels; c += 2) {
        shared_as<Pair>(y1 + (i * layout.y1_pitch + c))[0] = Pair{};
      }
    }
  }

  SHUFFLENET_DEVICE void stage_weights1(int run_count) {
    const T* const weight = static_cast<const T*>(arguments.conv1.weight);
    for (int i = 0; i < run_count; ++i) {
      const Run run = runs[i];
      const int rows = i + 1 < run_count ? run.rows : run.rows + kRowPadding;
      stage_weights<T>(weight1 + run.position * layout.weight1_pitch, layout.weight1_pitch, rows,
                       weight + static_cast<int64_t>(run.row) * s.conv1_depth, run.rows, s.conv1_depth, t.conv1_vector,
                       [](int row) { return row; });
    }
    commit_copies();
    wait_copies<0>();
  }

  // A warp's position in conv1. An item is 16 pixels and a run; a warp takes every kWarps-th item, and goes through its
  // depth in parts, from channel k on.
  struct Cursor {
    SHUFFLENET_DEVICE bool done(const Window& w) const { return pixel >= w.image_pixels(); }
    int item, pixel, k;
    Run run;
  };
  SHUFFLENET_DEVICE Cursor cursor_at(const Window& w, int item, int run_count, const Divisor& by_runs) const {
    const int tile = by_runs.quotient(item);
    Cursor cursor = {item, tile * kTilePixels, 0, {}};
    if (!cursor.done(w)) cursor.run = runs[item - tile * run_count];
    return cursor;
  }
  // Starts to copy a tile of x. A lane copies 16 bytes of each step of depth: channels of one pixel or, from contiguous
  // planes, neighbouring pixels of one channel.
  SHUFFLENET_DEVICE void stage_x(const Window& w, const Cursor& at, Shared<T> tile) {
    constexpr int kBlocks = kPlanes ? kTilePixels / kPerBlock<T> : 2;  // blocks a channel has; a pixel, in a step
    const int major = lane_index() / kBlocks, minor = lane_index() % kBlocks * kPerBlock<T>;
    const int pixel = at.pixel + (kPlanes ? minor : major);
    const int pixels = w.image_pixels() - pixel;
    const int depth = least(t.tile_depth, s.conv1_depth - at.k);
    const T* const from =
        x_image(w) + image_offset<kLayout>(s.in_channels, s.in_plane, at.run.x_channel + at.k,
                                           w.image_index(s, most(0, least(pixel, w.image_pixels() - 1))));
    SHUFFLENET_NO_UNROLL
    for (int k = 0; k < depth; k += kStep<T>) {
      if constexpr (kPlanes) {
        copy_block(tile + ((k + major) * kPlanePitch + minor), from + (k + major) * s.in_plane,
                   k + major < depth ? pixels : 0, x, t.x_vector,
                   [&](int i) { return w.image_index(s, pixel + i) - w.image_index(s, pixel); });
      } else {
        copy_block(tile + (major * layout.x_pitch + k + minor), from + (k + minor), pixels > 0 ? depth - k - minor : 0,
                   x, t.x_vector, [](int i) { return i; });
      }
    }
  }

  SHUFFLENET_DEVICE void conv1(const Window& w, int run_count) {
    const Shared<T> tiles =
        shared_at<T>(shared_memory(), layout.tiles + static_cast<int64_t>(warp_index()) * kBuffers * layout.x_bytes);
    const int tile_elements = layout.x_bytes / static_cast<int>(sizeof(T));
    const Divisor by_runs(run_count);
    Cursor load = cursor_at(w, warp_index(), run_count, by_runs);
    int buffer = 0;  // holds the tile that is multiplied, while the next one is copied into the other buffer
    const auto stage_next = [&](int to) {
      if (!load.done(w)) {
        stage_x(w, load, tiles + to * tile_elements);
        load.k += t.tile_depth;
        if (load.k >= s.conv1_depth) load = cursor_at(w, load.item + kWarps, run_count, by_runs);
      }
      commit_copies();
    };

    stage_next(0);
    SHUFFLENET_NO_UNROLL
    for (Cursor at = cursor_at(w, warp_index(), run_count, by_runs); !at.done(w);
         at = cursor_at(w, at.item + kWarps, run_count, by_runs)) {
      A sum[kTileRows / 8][4];
      clear(sum);
      SHUFFLENET_NO_UNROLL
      for (int k = 0; k < s.conv1_depth; k += t.tile_depth, buffer = 1 - buffer) {
        wait_copies<0>();
        warp_barrier();  // all lanes see the tile, and have finished reading the other buffer
        stage_next(1 - buffer);
        Engine::template multiply<kPlanes>(
            sum, {tiles + buffer * tile_elements, kPlanes ? kPlanePitch : layout.x_pitch},
            weight1 + (at.run.position * layout.weight1_pitch + k), layout.weight1_pitch, ceil_div(at.run.rows, 8),
            least(t.tile_depth, s.conv1_depth - k));
      }
      write_y1(w, at, sum);
    }
  }

  SHUFFLENET_DEVICE void write_y1(const Window& w, const Cursor& at, const A (&sum)[kTileRows / 8][4]) {
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
        const Sums constants = shared_as<const Sums>(Shared<const A>(taps + 2 * c))[0];
        SHUFFLENET_UNROLL
        for (int half = 0; half < 2; ++half) {
          T value;
          narrow(relu(multiply_add(sum[j][2 * half + odd], constants.elements[0], constants.elements[1])), value);
          if (inside[half] && row < at.run.rows) y1[pixel_at[half] + c] = value;
        }
      }
    }
  }

  // Zeroes y2, for the sake of what no thread writes: channels behind the last of a slice, and pixels behind the
  // window's last, which conv3 reads as well.
  SHUFFLENET_DEVICE void clear_y2() {
    using Block16 = Vector<T, kPerBlock<T>>;
    SHUFFLENET_NO_UNROLL
    for (int i = thread_index() * kPerBlock<T>; i < layout.y2_rows * layout.y2_pitch; i += kThreads * kPerBlock<T>) {
      shared_as<Block16>(y2 + i)[0] = Block16{};
    }
  }

  // Computes y2. A thread goes down a column of a pair of channels, and keeps the nine values that the taps multiply in
  // registers: row i of y1 is in value[i % 3].
  template <int kStride>
  SHUFFLENET_DEVICE void depthwise(const Window& w, int first, int channels) {
    // Whether the channels of a pair are side by side in y2 as well.
    const bool together = !s.out_channels || (s.slice_channels % 2 == 0 && first % 2 == 0);
    const int pairs = ceil_div(channels, 2);
    SHUFFLENET_NO_UNROLL
    for (int i = thread_index(); i < pairs * w.out_columns; i += kThreads) {
      const int column = i / pairs;
      const int c = (i - column * pairs) * 2;
      const int c2 = s.out_channels ? y2_column(first + c) : c, next_c2 = y2_column(first + c + 1);
      const auto constant = [&](int k) -> Sums {
        return shared_as<const Sums>(Shared<const A>(taps + (k * layout.columns + c)))[0];
      };
      Sums tap[9];
      SHUFFLENET_UNROLL
      for (int k = 0; k < 9; ++k) tap[k] = constant(3 + k);
      const Sums bias = constant(2);
      Sums value[3][3];
      Shared<const T> next = y1 + (column * kStride * layout.y1_pitch + c);
      const auto read_row = [&](int into) {
        SHUFFLENET_UNROLL
        for (int k = 0; k < 3; ++k) {
          const Pair pair = shared_as<const Pair>(next + k * layout.y1_pitch)[0];
          value[into][k] = {widen(pair.elements[0]), widen(pair.elements[1])};
        }
        next = next + w.in_columns * layout.y1_pitch;
      };
      SHUFFLENET_UNROLL
      for (int k = 0; k < 3 - kStride; ++k) read_row(k);
      SHUFFLENET_NO_UNROLL
      for (int three = 0; three < w.out_rows; three += 3) {
        SHUFFLENET_UNROLL
        for (int r = 0; r < 3; ++r) {
          const int row = three + r;
          if (row >= w.out_rows) break;
          SHUFFLENET_UNROLL
          for (int k = 3 - kStride; k < 3; ++k) read_row((kStride * r + k) % 3);
          Pair pair;
          SHUFFLENET_UNROLL
          for (int e = 0; e < 2; ++e) {
            A sum = bias.elements[e];
            SHUFFLENET_UNROLL
            for (int k = 0; k < 9; ++k) {
              sum = multiply_add(tap[k].elements[e], value[(kStride * r + k / 3) % 3][k % 3].elements[e], sum);
            }
            narrow(s.conv2_relu ? relu(sum) : sum, pair.elements[e]);
          }
          const Shared<T> to = y2 + y2_row(row * w.out_columns + column) * layout.y2_pitch;
          if (together) {
            shared_as<Pair>(to + c2)[0] = pair;
          } else {
            to[c2] = pair.elements[0];
            if (c + 1 < channels) to[next_c2] = pair.elements[1];
          }
        }
      }
    }
  }

  // Returns the column of y2 that holds the block's c-th channel. Each slice starts at a whole step, where conv3
  // begins.
  SHUFFLENET_DEVICE int y2_column(int c) const {
    return c + c / s.slice_channels * (layout.slice_pitch - s.slice_channels);
  }
  // Returns the row of y2 that holds a pixel: where the product of conv3 takes it, see place().
  SHUFFLENET_DEVICE int y2_row(int pixel) const { return kPlanes && s.out_channels ? place(pixel) : pixel; }

  SHUFFLENET_DEVICE void conv3(const Window& w) {
    const T* const weight = static_cast<const T*>(arguments.conv3.weight);
    for (int slice = w.slice_begin; slice < w.slice_end; ++slice) {
      for (int row = 0; row < s.group_rows; row += layout.part_rows) {
        const int rows = least(layout.part_rows, s.group_rows - row);
        barrier();  // y2 is complete, and all threads have finished reading the weights that were here before
        stage_weights<T>(weight3, layout.weight3_pitch, ceil_div(rows, layout.weight3_unit) * layout.weight3_unit,
                         weight + static_cast<int64_t>(slice * s.group_rows + row) * s.slice_channels, rows,
                         s.slice_channels, t.conv3_vector, [](int i) { return kPlanes ? i : place(i); });
        commit_copies();
        wait_copies<0>();
        barrier();
        switch (t.result_vector) {
          case 16: multiply_part<16>(w, slice, row, rows); break;
          case 8: multiply_part<8>(w, slice, row, rows); break;
          default: multiply_part<sizeof(T)>(w, slice, row, rows);
        }
      }
    }
  }

  // Computes `rows` rows of a slice, from its `first`-th on, for all pixels of the window. Warps share the tiles of
  // lines x elements. The number of elements is a multiple of those that a vector has.
  template <int kVector>
  SHUFFLENET_DEVICE void multiply_part(const Window& w, int slice, int first, int rows) {
    constexpr int kSize = kVector / static_cast<int>(sizeof(T));
    using V = Vector<T, kSize>;
    const int constants = (slice - w.slice_begin) * s.group_rows + first;
    const int channel = slice * s.group_rows + first;
    const int lines = kPlanes ? rows : w.out_pixels(), elements = kPlanes ? w.out_pixels() : rows;
    const Shared<const T> pixel_data = y2 + (slice - w.slice_begin) * layout.slice_pitch;
    const Shared<const T> line_data = kPlanes ? weight3 : pixel_data, element_data = kPlanes ? pixel_data : weight3;
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
              *reinterpret_cast<const V*>(x_image(w) + (start[half] + distance<kVector>(w, element, e)));
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
              constant = shared_as<const Sums>(Shared<const A>(affine3 + 2 * row))[0];
            }
            const A value =
                multiply_add(sum[(e + i) / 2][2 * half + (e + i) % 2], constant.elements[0], constant.elements[1]);
            narrow(relu(value + widen(residual[half][e / kSize].elements[i])), vector[half].elements[i]);
          }
        }
        SHUFFLENET_UNROLL
        for (int half = 0; half < 2; ++half) {
          if (first_line + line(2 * half) >= lines) continue;
          *reinterpret_cast<V*>(result_image(w) + (start[half] + distance<kVector>(w, element, e))) = vector[half];
        }
      }
    }
  }

  // Returns the distance in memory from element `first` of a line to the e-th behind it. It is e, except for pixels of
  // a window narrower than the image: these are written one by one, and lie in several rows.
  template <int kVector>
  SHUFFLENET_DEVICE int distance(const Window& w, int first, int e) const {
    if (!kPlanes || kVector > static_cast<int>(sizeof(T)) || w.out_columns == s.out_width) return e;
    const int rows = w.by_out_columns.quotient(first + e) - w.by_out_columns.quotient(first);
    return e + rows * (s.out_width - w.out_columns);
  }

  SHUFFLENET_DEVICE void write_y2(const Window& w, int begin, int channels) {
    switch (t.result_vector) {
      case 16: write_vectors<16>(w, begin, channels); break;
      case 8: write_vectors<8>(w, begin, channels); break;
      default: write_vectors<sizeof(T)>(w, begin, channels);
    }
  }

  template <int kVector>
  SHUFFLENET_DEVICE void write_vectors(const Window& w, int begin, int channels) {
    constexpr int kSize = kVector / static_cast<int>(sizeof(T));
    const int lines = kPlanes ? channels : w.out_pixels(), elements = kPlanes ? w.out_pixels() : channels;
    const int vectors = elements / kSize;
    SHUFFLENET_NO_UNROLL
    for (int index = thread_index(); index < lines * vectors; index += kThreads) {
      const int line = index / vectors, element = index % vectors * kSize;
      Vector<T, kSize> vector;
      SHUFFLENET_UNROLL
      for (int i = 0; i < kSize; ++i) {
        const int p = kPlanes ? element + i : line, c = kPlanes ? line : element + i;
        vector.elements[i] = y2[p * layout.y2_pitch + c];
      }
      write_vector(vector, w, begin + (kPlanes ? line : element), kPlanes ? element : line);
    }
  }

  // Writes a vector to the result, whose first element is channel c of the window's p-th pixel.
  template <int kSize>
  SHUFFLENET_DEVICE void write_vector(const Vector<T, kSize>& vector, const Window& w, int c, int p) {
    const int at = image_offset<kLayout>(s.result_channels, s.out_plane, c, w.out_index(s, p));
    *reinterpret_cast<Vector<T, kSize>*>(result_image(w) + at) = vector;
  }

  // Computes the shortcut of a stride-2 unit, avg_pool2d(x, 3, 2, 1) with or without a ReLU, for the block's share of
  // x's channels.
  SHUFFLENET_DEVICE void pool(const Window& w) {
    switch (t.pool_vector) {
      case 16: pool_vectors<16>(w); break;
      case 8: pool_vectors<8>(w); break;
      default: pool_vectors<sizeof(T)>(w);
    }
  }

  // A thread pools as many channels at once as a vector holds; one, where channels are contiguous planes.
  template <int kVector>
  SHUFFLENET_DEVICE void pool_vectors(const Window& w) {
    constexpr int kSize = kPlanes ? 1 : kVector / static_cast<int>(sizeof(T));
    using Channels = Vector<T, kSize>;
    const auto share = [&](int slice) {
      const int channels = static_cast<int>(int64_t{s.in_channels} * slice / s.groups);
      return slice == s.groups ? channels : channels / kPerBlock<T> * kPerBlock<T>;
    };
    const int begin = share(w.slice_begin), pixels = w.out_pixels();
    const int vectors = (share(w.slice_end) - begin) / kSize;
    SHUFFLENET_NO_UNROLL
    for (int i = thread_index(); i < vectors * pixels; i += kThreads) {
      const int c = begin + (kPlanes ? i / pixels : i % vectors * kSize);
      const int pixel = kPlanes ? i % pixels : i / vectors;
      const int row = (w.out_row + pixel / w.out_columns) * 2 - 1,
                column = (w.out_column + pixel % w.out_columns) * 2 - 1;
      A sum[kSize] = {};
      SHUFFLENET_UNROLL
      for (int k = 0; k < 9; ++k) {
        const int at_row = row + k / 3, at_column = column + k % 3;
        if (at_row < 0 || at_row >= s.height || at_column < 0 || at_column >= s.width) continue;
        const Channels channels = *reinterpret_cast<const Channels*>(
            x_image(w) + image_offset<kLayout>(s.in_channels, s.in_plane, c, at_row * s.width + at_column));
        SHUFFLENET_UNROLL
        for (int e = 0; e < kSize; ++e) sum[e] += widen(channels.elements[e]);
      }
      const int rows = least(row + 3, s.height) - most(row, 0), columns = least(column + 3, s.width) - most(column, 0);
      const A count = static_cast<A>(s.pool_count_include_pad ? 9 : rows * columns);
      Channels pooled;
      SHUFFLENET_UNROLL
      for (int e = 0; e < kSize; ++e) {
        const A mean = sum[e] / count;
        narrow(s.pool_relu ? relu(mean) : mean, pooled.elements[e]);
      }
      write_vector(pooled, w, s.first_pooled_channel + c, pixel);
    }
  }

  const KernelArguments& arguments;
  const Sizes& s;
  const Tiling& t;
  const SharedLayout& layout;
  const Shared<Run> runs;
  const Shared<A> taps, affine3;
  const Shared<T> y1, y2, weight1, weight3;
  const T* const x;
  T* const result;
};

}  // namespace shufflenet::cuda
