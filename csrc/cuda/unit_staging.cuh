// Global memory to shared memory, and what a block of unit_kernel.cuh keeps there in either layout of x.
#pragma once

#include "common.cuh"
#include "tiling.h"
#include "unit_window.cuh"

namespace shufflenet::cuda {

// Returns how many of the n rows that are left the next tile takes, so that all tiles become about equal.
SHUFFLENET_DEVICE int next_rows(int n) {
  const int even = ceil_div(n, ceil_div(n, kTileRows));
  return least(n, ceil_div(even, 8) * 8);
}

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

// What a block works with: its arguments, and the places of its data in shared memory, which it fills.
template <class T>
struct UnitStaging {
  using A = accumulator_t<T>;

  SHUFFLENET_DEVICE explicit UnitStaging(const KernelArguments& arguments)
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

  // Return where a window's image begins, in x and in the result.
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

  // Loads the constants of `channels` shuffled channels, from `begin` on: for conv1 scales and biases, for the
  // depthwise convolution biases and scaled taps.
  SHUFFLENET_DEVICE void load_taps(int begin, int channels) const {
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

  // Loads the scales and biases of conv3, for all slices of the block.
  SHUFFLENET_DEVICE void load_affine3(const Window& w) const {
    SHUFFLENET_NO_UNROLL
    for (int i = thread_index(); i < (w.slice_end - w.slice_begin) * s.group_rows; i += kThreads) {
      const Affine<A> constants = affine<T>(arguments.conv3, w.slice_begin * s.group_rows + i);
      affine3[2 * i] = constants.scale;
      affine3[2 * i + 1] = constants.bias;
    }
  }

  // Zeroes the pixels of y1 outside the image, as padding is zero behind conv1's bias and ReLU; and everywhere the
  // channel that makes a pair of an odd last one.
  SHUFFLENET_DEVICE void clear_halo(const Window& w, int channels) const {
    SHUFFLENET_NO_UNROLL
    for (int i = thread_index(); i < w.in_rows * w.in_columns; i += kThreads) {
      const int window_row = w.by_in_columns.quotient(i);
      const int row = window_row + w.in_row, column = i - window_row * w.in_columns + w.in_column;
      const bool inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
      for (int c = inside ? channels / 2 * 2 : 0; c < channels; c += 2) {
        shared_as<Vector<T, 2>>(y1 + (i * layout.y1_pitch + c))[0] = {};
      }
    }
  }

  // Copies the weights of the runs, and behind the last one the rows that are read with it.
  SHUFFLENET_DEVICE void stage_weights1(int run_count) const {
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

  // Zeroes y2, for the sake of what no thread writes: channels behind the last of a slice, and pixels behind the
  // window's last, which conv3 reads as well.
  SHUFFLENET_DEVICE void clear_y2() const {
    using Block16 = Vector<T, kPerBlock<T>>;
    SHUFFLENET_NO_UNROLL
    for (int i = thread_index() * kPerBlock<T>; i < layout.y2_rows * layout.y2_pitch; i += kThreads * kPerBlock<T>) {
      shared_as<Block16>(y2 + i)[0] = Block16{};
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
