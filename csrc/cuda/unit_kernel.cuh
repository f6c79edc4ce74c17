// The unit as one fused pass over a window of an image (tiling.h), written once for every dtype, layout and device:
// with device.cuh it is a CUDA kernel, with tests/cuda/host_device.h the same code runs on the CPU.
//
//   conv1      x (global) and its weights stream through shared tiles; relu(affine) of the sums goes to y1. The shuffle
//              is where a row of conv1 finds its column of y1.
//   depthwise  y1, with its halo of zeros, to y2.
//   conv3      y2 and streamed weights to a finished tile in shared memory, which leaves with the residual added in
//              accesses of up to 16 bytes. Where the unit ends after the depthwise convolution, y2 leaves that way.
//
// Intermediates are of x's dtype, as they are in PyTorch; sums and what is done to them are of the accumulator's.
#pragma once

#ifdef SHUFFLENET_TEST_DEVICE
#include SHUFFLENET_TEST_DEVICE
#else
#include "device.cuh"
#endif

#include "tiling.h"

namespace shufflenet::cuda {

template <class T>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <class T>
using accumulator_t = typename AccumulatorOf<T>::Type;

template <class T>
inline constexpr int kTileDepth = kTileDepthBytes / static_cast<int>(sizeof(T));
template <class T>
inline constexpr int kTilePitch = kTilePitchBytes / static_cast<int>(sizeof(T));
// A tile of x from contiguous planes keeps pixels together: depth rows of kTilePixels. A fragment's loads are of eight
// 16-byte rows by ldmatrix in 16 bits, else of four rows by eight pixels: both touch all banks with these pitches.
template <class T>
inline constexpr int kPlanePitch = kTilePixels + (sizeof(T) == 2 ? 1 : 2) * kBankPadding / static_cast<int>(sizeof(T));
template <class T>
inline constexpr bool kPlanesFit = kTileDepth<T> * kPlanePitch<T> * static_cast<int>(sizeof(T)) <= kTileBytes;
static_assert(kPlanesFit<Float16> && kPlanesFit<float> && kPlanesFit<double>,
              "both forms of a tile of x take kTileBytes");

SHUFFLENET_DEVICE int least(int a, int b) { return a < b ? a : b; }
SHUFFLENET_DEVICE int most(int a, int b) { return a > b ? a : b; }
template <class A>
SHUFFLENET_DEVICE A relu(A value) {
  return value < A{0} ? A{0} : value;  // NaN stays NaN, as in PyTorch
}

// n rows left: how many the next tile takes, such that all tiles are about equal.
SHUFFLENET_DEVICE int next_rows(int n) {
  const int even = ceil_div(n, ceil_div(n, kTileRows));
  return least(n, ceil_div(even, 8) * 8);
}

// ---- Where a block works --------------------------------------------------------------------------------------------

struct Window {
  SHUFFLENET_DEVICE Window(const Sizes& s, const Tiling& t, int64_t index) {
    // Slices vary fastest: blocks that read the same pixels of x run at about the same time, and meet in the L2 cache.
    const int slice_parts = t.slice_parts(s), column_tiles = t.column_tiles(s), row_tiles = t.row_tiles(s);
    const int slice_part = static_cast<int>(index % slice_parts);
    index /= slice_parts;
    const int column_tile = static_cast<int>(index % column_tiles);
    index /= column_tiles;
    const int row_tile = static_cast<int>(index % row_tiles);
    image = index / row_tiles;
    slice_begin = slice_part * t.slices;
    slice_end = least(slice_begin + t.slices, s.groups);
    out_row = row_tile * t.tile_rows;
    out_column = column_tile * t.tile_columns;
    out_rows = least(t.tile_rows, s.out_height - out_row);
    out_columns = least(t.tile_columns, s.out_width - out_column);
    in_row = out_row * s.stride - 1;
    in_column = out_column * s.stride - 1;
    in_rows = (out_rows - 1) * s.stride + 3;
    in_columns = (out_columns - 1) * s.stride + 3;
    image_row = most(in_row, 0);
    image_column = most(in_column, 0);
    image_rows = least(in_row + in_rows, s.height) - image_row;
    image_columns = least(in_column + in_columns, s.width) - image_column;
  }

  SHUFFLENET_DEVICE int out_pixels() const { return out_rows * out_columns; }
  SHUFFLENET_DEVICE int image_pixels() const { return image_rows * image_columns; }

  int64_t image;
  int slice_begin, slice_end;
  int out_row, out_column, out_rows, out_columns;          // of the result
  int in_row, in_column, in_rows, in_columns;              // of y1, with its halo
  int image_row, image_column, image_rows, image_columns;  // the part of that inside the image
};

// Where channel `c` of a pixel lies in a tensor.
template <Layout kLayout>
SHUFFLENET_DEVICE int64_t tensor_offset(int64_t image, int channels, int height, int width, int c, int row,
                                        int column) {
  if constexpr (kLayout == Layout::channels_last) {
    return ((image * height + row) * width + column) * channels + c;
  } else {
    return ((image * channels + c) * height + row) * width + column;
  }
}

// ---- Parameters -----------------------------------------------------------------------------------------------------

template <class T>
SHUFFLENET_DEVICE accumulator_t<T> read(const Parameter& parameter, int i) {
  if (parameter.is_float32) return static_cast<const float*>(parameter.data)[i];
  return widen(static_cast<const T*>(parameter.data)[i]);
}

template <class A>
struct Affine {
  A scale, bias;
};

template <class T>
SHUFFLENET_DEVICE Affine<accumulator_t<T>> affine(const ConvolutionPointers& conv, int channel) {
  using A = accumulator_t<T>;
  if (conv.norm_weight.data) {
    const A scale =
        read<T>(conv.norm_weight, channel) / square_root(read<T>(conv.norm_var, channel) + static_cast<A>(conv.eps));
    return {scale, read<T>(conv.norm_bias, channel) - read<T>(conv.norm_mean, channel) * scale};
  }
  return {A{1}, conv.bias.data ? read<T>(conv.bias, channel) : A{0}};
}

// ---- Staging: global memory to shared tiles -------------------------------------------------------------------------

// Fills `rows` rows of kElements, `pitch` apart. The first `valid_rows` of them get `valid` elements from where
// address(row, element) says; all else is zeroed. `vector` bytes hold consecutive elements at consecutive, aligned
// addresses.
template <class T, int kElements, int kVector, class Address>
SHUFFLENET_DEVICE void stage_vectors(Shared<T> tile, int pitch, int rows, int valid_rows, int valid,
                                     const Address& address) {
  constexpr int kPerVector = kVector / static_cast<int>(sizeof(T));
  constexpr int kVectors = kElements / kPerVector;
  SHUFFLENET_NO_UNROLL
  for (int i = thread_index(); i < rows * kVectors; i += kThreads) {
    const int row = i / kVectors;
    const int element = i % kVectors * kPerVector;
    const int inside = row < valid_rows ? most(0, least(valid - element, kPerVector)) : 0;
    // Where nothing is copied the address is not used, but must be one: the first.
    const T* const from = inside ? address(row, element) : address(0, 0);
    copy_async<kVector>(tile + (row * pitch + element), from, inside * static_cast<int>(sizeof(T)));
  }
}

template <class T, int kElements, class Address>
SHUFFLENET_DEVICE void stage(Shared<T> tile, int pitch, int rows, int valid_rows, int valid, int vector,
                             const Address& address) {
  if (vector == 16) {
    stage_vectors<T, kElements, 16>(tile, pitch, rows, valid_rows, valid, address);
  } else if (sizeof(T) <= 8 && vector == 8) {
    stage_vectors<T, kElements, 8>(tile, pitch, rows, valid_rows, valid, address);
  } else if (sizeof(T) <= 4 && vector == 4) {
    stage_vectors<T, kElements, sizeof(T) <= 4 ? 4 : 8>(tile, pitch, rows, valid_rows, valid, address);
  } else {
    SHUFFLENET_NO_UNROLL
    for (int i = thread_index(); i < rows * kElements; i += kThreads) {
      const int row = i / kElements;
      const int element = i % kElements;
      T value = {};
      if (row < valid_rows && element < valid) value = *address(row, element);
      tile[row * pitch + element] = value;
    }
  }
}

template <class T>
SHUFFLENET_DEVICE void stage_weights(Shared<T> tile, const void* weight, int depth, int row, int rows, int k,
                                     int vector) {
  const T* const first = static_cast<const T*>(weight) + (static_cast<int64_t>(row) * depth + k);
  stage<T, kTileDepth<T>>(tile, kTilePitch<T>, ceil_div(rows, 8) * 8, rows, depth - k, vector, [=](int i, int element) {
    return first + (static_cast<int64_t>(i) * depth + element);
  });
}

template <int kPending>
SHUFFLENET_DEVICE void wait_for_stage() {
  wait_copies<kPending>();
  barrier();
}
// Until the oldest of `stages` - 1 staged tiles has landed for all threads, and all are done with the one before it.
SHUFFLENET_DEVICE void wait_for_stage(int stages) {
  static_assert(kMinStages == 2 && kMaxStages == 4, "a case for each number of stages");
  switch (stages) {
    case 2: wait_for_stage<0>(); break;
    case 3: wait_for_stage<1>(); break;
    default: wait_for_stage<2>();
  }
}

// ---- Tile products --------------------------------------------------------------------------------------------------

// The pixels' side of a product, in shared memory: y2, or a staged tile of x.
template <class T>
struct PixelOperand {
  Shared<const T> data;
  int pixel_pitch, depth_pitch;
  int pixels;
};

// A thread's accumulator (j, i) is the sum for row(j, i) and pixel(i) of the tile; its warp's j-th eight of rows is
// row_tile(j).
inline constexpr int kRowTiles = kTileRows / 8 / kRowWarps;
SHUFFLENET_DEVICE int row_tile(int j) { return j * kRowWarps + thread_index() / (kThreads / kRowWarps); }

template <class T>
struct FmaEngine {
  using A = accumulator_t<T>;
  // A warp's lanes take 16 neighbouring pixels and two rows: its loads of pixels differ in bank, those of weights are
  // broadcast. Four pixels and up to four rows a thread: 8 loads for 16 multiply-adds.
  SHUFFLENET_DEVICE static int pixel(int i) { return thread_index() % 16 + 16 * i; }
  SHUFFLENET_DEVICE static int row(int j, int) { return 8 * row_tile(j) + thread_index() / 16 % 8; }

  template <bool kDepthMajor>
  SHUFFLENET_DEVICE static void multiply(A (&sum)[kRowTiles][4], const PixelOperand<T>& x, Shared<const T> weights,
                                         int row_tiles, int depth) {
    int offset[4];
    SHUFFLENET_UNROLL
    for (int i = 0; i < 4; ++i) offset[i] = least(pixel(i), x.pixels - 1) * x.pixel_pitch;
    for (int k = 0; k < depth; ++k) {
      A pixels[4];
      SHUFFLENET_UNROLL
      for (int i = 0; i < 4; ++i) pixels[i] = widen(T(x.data[offset[i] + k * x.depth_pitch]));
      SHUFFLENET_UNROLL
      for (int j = 0; j < kRowTiles; ++j) {
        if (row_tile(j) >= row_tiles) break;
        const A weight = widen(T(weights[row(j, 0) * kTilePitch<T> + k]));
        SHUFFLENET_UNROLL
        for (int i = 0; i < 4; ++i) sum[j][i] = multiply_add(weight, pixels[i], sum[j][i]);
      }
    }
  }
};

// Tensor cores. A warp multiplies its 16 pixels (a, 16 x kStep) by eight rows of weights at a time (b, kStep x 8);
// lanes hold the fragments as the PTX manual draws them for mma.m16n8k16, and for mma.m16n8k8 of TF32. A step is 32
// bytes deep in either.
template <class T>
struct MmaEngine {
  static constexpr int kStep = 32 / static_cast<int>(sizeof(T));
  static_assert(kDepthStep % kStep == 0 && kTileDepth<T> % kStep == 0, "a tile is whole steps deep");

  SHUFFLENET_DEVICE static int warp_pixel() { return thread_index() / 32 % kPixelWarps * 16; }
  SHUFFLENET_DEVICE static int pixel(int i) { return warp_pixel() + thread_index() % 32 / 4 + i / 2 * 8; }
  SHUFFLENET_DEVICE static int row(int j, int i) { return 8 * row_tile(j) + thread_index() % 4 * 2 + i % 2; }

  template <bool kDepthMajor>
  SHUFFLENET_DEVICE static void multiply(float (&sum)[kRowTiles][4], const PixelOperand<T>& x, Shared<const T> weights,
                                         int row_tiles, int depth) {
    if (warp_pixel() >= x.pixels || row_tile(0) >= row_tiles) return;
    const int lane = thread_index() % 32;
    for (int k = 0; k < depth; k += kStep) {
      uint32_t a[4];
      if constexpr (kDepthMajor && sizeof(T) == 4) {
        SHUFFLENET_UNROLL
        for (int i = 0; i < 4; ++i) {
          a[i] = bits_of(x.data[(k + lane % 4 + i / 2 * 4) * x.depth_pitch + warp_pixel() + lane / 4 + i % 2 * 8]);
        }
      } else if constexpr (kDepthMajor) {
        // Matrices of 8 depths x 8 pixels, transposed on the way; pixels past the last were zeroed.
        const int at_k = k + lane % 8 + lane / 16 * 8;
        const int at_pixel = warp_pixel() + lane / 8 % 2 * 8;
        load_matrices<true, T>(a, x.data + (at_k * x.depth_pitch + at_pixel));
      } else {
        const int at_pixel = least(warp_pixel() + lane % 16, x.pixels - 1);
        load_matrices<false, T>(a, x.data + (at_pixel * x.pixel_pitch + k + lane / 16 * (kStep / 2)));
      }
      round_operands<T>(a);
      SHUFFLENET_UNROLL
      for (int j = 0; j < kRowTiles; ++j) {
        if (row_tile(j) >= row_tiles) break;
        uint32_t b[2];
        load_matrices<T>(b, weights + ((8 * row_tile(j) + lane % 8) * kTilePitch<T> + k + lane / 8 % 2 * (kStep / 2)));
        round_operands<T>(b);
        if constexpr (kHasMmaK16) {
          multiply_matrices(sum[j], a, b, T{});
        } else {
          SHUFFLENET_UNROLL
          for (int half = 0; half < 2; ++half) {
            multiply_matrices(sum[j], {a[2 * half], a[2 * half + 1]}, b[half], T{});
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

template <class A>
SHUFFLENET_DEVICE void clear(A (&sum)[kRowTiles][4]) {
  SHUFFLENET_UNROLL
  for (int j = 0; j < kRowTiles; ++j) {
    SHUFFLENET_UNROLL
    for (int i = 0; i < 4; ++i) sum[j][i] = A{0};
  }
}

// ---- The block ------------------------------------------------------------------------------------------------------

// The row tiles of conv1 that make channels [begin, end) of the shuffled order. Channel n * groups + r of it is row
// r * slice + n, so they are a run of consecutive rows for each r, cut where a group of conv1 ends.
struct ShuffledRows {
  SHUFFLENET_DEVICE ShuffledRows(const Sizes& s, int begin, int end)
      : groups(s.groups),
        slice(s.mid_channels / s.groups),
        group_rows(s.mid_channels / s.conv1_groups),
        begin(begin),
        end(end) {
    restart();
  }
  SHUFFLENET_DEVICE void restart() {
    r = -1;
    row = run_end = 0;
    find();
  }
  SHUFFLENET_DEVICE void next() {
    row += rows;
    find();
  }
  SHUFFLENET_DEVICE bool done() const { return r == groups; }
  SHUFFLENET_DEVICE int group() const { return row / group_rows; }
  // Of the tile's i-th row, among the channels from `begin`.
  SHUFFLENET_DEVICE int channel(int i) const { return (row + i - r * slice) * groups + r - begin; }

  SHUFFLENET_DEVICE void find() {
    while (row == run_end && ++r < groups) {
      row = r * slice + ceil_div(begin - r, groups);
      run_end = r * slice + ceil_div(end - r, groups);
    }
    if (!done()) rows = next_rows(least(run_end, (group() + 1) * group_rows) - row);
  }

  int groups, slice, group_rows, begin, end;
  int r, row, rows, run_end;
};

template <class T, Layout kLayout>
struct Block {
  using A = accumulator_t<T>;
  using Engine = typename EngineOf<T>::Type;
  static constexpr bool kDepthMajor = kLayout == Layout::contiguous;

  SHUFFLENET_DEVICE explicit Block(const KernelArguments& arguments)
      : arguments(arguments),
        s(arguments.sizes),
        t(arguments.tiling),
        layout(s, t, sizeof(T), sizeof(A)),
        memory(shared_memory()),
        taps(shared_at<A>(memory, layout.taps)),
        affine3(shared_at<A>(memory, layout.affine3)),
        y1(shared_at<T>(memory, layout.y1)),
        y2(shared_at<T>(memory, layout.y2)),
        x(static_cast<const T*>(arguments.x)),
        result(static_cast<T*>(arguments.result)),
        slice_channels(s.mid_channels / s.groups) {}

  SHUFFLENET_DEVICE Shared<T> pixel_tile(int stage) const { return shared_at<T>(memory, stage * kTileBytes); }
  SHUFFLENET_DEVICE Shared<T> weight_tile(int stage) const {
    return shared_at<T>(memory, (t.stages + stage) * kTileBytes);
  }

  SHUFFLENET_DEVICE void run() {
    clear_padding();
    const int64_t windows = t.windows(s);
    for (int64_t index = block_index(); index < windows; index += block_count()) {
      const Window window(s, t, index);
      const int channel_end = window.slice_end * slice_channels;
      for (int begin = window.slice_begin * slice_channels; begin < channel_end; begin += t.chunk) {
        const int end = least(begin + t.chunk, channel_end);
        barrier();  // all are done with what is overwritten now: taps, y1, tiles
        load_taps(begin, end);
        clear_halo(window, end - begin);
        conv1(window, begin, end);
        barrier();
        depthwise(window, begin, end);
        if (!s.out_channels) {
          barrier();
          write_y2(window, begin, end);
        }
      }
      if (s.out_channels) conv3(window);
      if (s.out_channels && s.stride == 2) pool(window);
    }
  }

  // Columns of y2 between a slice's last channel and a whole mma step: nothing else writes them.
  SHUFFLENET_DEVICE void clear_padding() {
    const int padding = layout.slice_pitch - slice_channels;
    if (!s.out_channels || padding == 0) return;
    const int pixels = t.tile_rows * t.tile_columns;
    SHUFFLENET_NO_UNROLL
    for (int i = thread_index(); i < pixels * t.slices; i += kThreads) {
      const int first = i / t.slices * layout.y2_pitch + i % t.slices * layout.slice_pitch + slice_channels;
      for (int c = 0; c < padding; ++c) y2[first + c] = T{};
    }
  }

  SHUFFLENET_DEVICE void load_taps(int begin, int end) {
    const T* const weight = static_cast<const T*>(arguments.conv2.weight);
    SHUFFLENET_NO_UNROLL
    for (int i = thread_index(); i < end - begin; i += kThreads) {
      const int channel = begin + i;
      const Affine<A> first = affine<T>(arguments.conv1, channel % s.groups * slice_channels + channel / s.groups);
      const Affine<A> second = affine<T>(arguments.conv2, channel);
      taps[i] = first.scale;
      taps[t.chunk + i] = first.bias;
      taps[2 * t.chunk + i] = second.bias;
      for (int tap = 0; tap < 9; ++tap) {
        taps[(3 + tap) * t.chunk + i] = second.scale * widen(weight[static_cast<int64_t>(channel) * 9 + tap]);
      }
    }
  }

  // Padding is zero behind conv1's bias and ReLU.
  SHUFFLENET_DEVICE void clear_halo(const Window& w, int channels) {
    SHUFFLENET_NO_UNROLL
    for (int i = thread_index(); i < w.in_rows * w.in_columns; i += kThreads) {
      const int row = i / w.in_columns + w.in_row;
      const int column = i % w.in_columns + w.in_column;
      if (row >= 0 && row < s.height && column >= 0 && column < s.width) continue;
      for (int c = 0; c < channels; ++c) y1[i * layout.y1_pitch + c] = T{};
    }
  }

  struct Step {
    SHUFFLENET_DEVICE bool done(const Window& w) const { return pixel >= w.image_pixels(); }
    SHUFFLENET_DEVICE void next(int depth) {
      k += kTileDepth<T>;
      if (k < depth) return;
      k = 0;
      rows.next();
      if (!rows.done()) return;
      rows.restart();
      pixel += kTilePixels;
    }
    ShuffledRows rows;
    int pixel = 0, k = 0;
  };

  SHUFFLENET_DEVICE void stage_x(const Window& w, const Step& step, int depth, Shared<T> tile) {
    const int pixels = least(kTilePixels, w.image_pixels() - step.pixel);
    const int channel = step.rows.group() * depth + step.k;
    const auto offset = [&](int pixel, int k) {
      return x + tensor_offset<kLayout>(w.image, s.in_channels, s.height, s.width, channel + k,
                                        w.image_row + (step.pixel + pixel) / w.image_columns,
                                        w.image_column + (step.pixel + pixel) % w.image_columns);
    };
    if constexpr (kDepthMajor) {
      const int valid = least(kTileDepth<T>, depth - step.k);
      const int rows = least(kTileDepth<T>, ceil_div(valid, kDepthStep) * kDepthStep);
      stage<T, kTilePixels>(
          tile, kPlanePitch<T>, rows, valid, pixels, t.x_vector, [&](int k, int pixel) { return offset(pixel, k); });
    } else {
      stage<T, kTileDepth<T>>(tile, kTilePitch<T>, pixels, pixels, depth - step.k, t.x_vector, offset);
    }
  }

  SHUFFLENET_DEVICE void conv1(const Window& w, int begin, int end) {
    const int depth = s.in_channels / s.conv1_groups;
    Step load = {ShuffledRows(s, begin, end)};
    Step step = load;
    int load_stage = 0, step_stage = 0;
    const auto stage_next = [&] {
      if (!load.done(w)) {
        stage_x(w, load, depth, pixel_tile(load_stage));
        stage_weights<T>(weight_tile(load_stage), arguments.conv1.weight, depth, load.rows.row, load.rows.rows, load.k,
                         t.conv1_vector);
        load.next(depth);
      }
      commit_copies();  // an empty group where nothing was left: wait_for_stage counts groups
      load_stage = load_stage + 1 == t.stages ? 0 : load_stage + 1;
    };

    A sum[kRowTiles][4];
    clear(sum);
    for (int i = 1 - t.stages; !step.done(w); ++i) {
      if (i >= 0) wait_for_stage(t.stages);
      stage_next();
      if (i < 0) continue;
      const int pixels = least(kTilePixels, w.image_pixels() - step.pixel);
      const PixelOperand<T> operand = {
          pixel_tile(step_stage), kDepthMajor ? 1 : kTilePitch<T>, kDepthMajor ? kPlanePitch<T> : 1, pixels};
      Engine::template multiply<kDepthMajor>(
          sum, operand, weight_tile(step_stage), ceil_div(step.rows.rows, 8), least(kTileDepth<T>, depth - step.k));
      step_stage = step_stage + 1 == t.stages ? 0 : step_stage + 1;
      if (step.k + kTileDepth<T> >= depth) {
        write_y1(w, step, pixels, sum);  // the barrier of this step has made the taps visible
        clear(sum);
      }
      step.next(depth);
    }
  }

  SHUFFLENET_DEVICE void write_y1(const Window& w, const Step& step, int pixels, const A (&sum)[kRowTiles][4]) {
    SHUFFLENET_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int pixel = Engine::pixel(i);
      if (pixel >= pixels) continue;
      const int row = (step.pixel + pixel) / w.image_columns + w.image_row - w.in_row;
      const int column = (step.pixel + pixel) % w.image_columns + w.image_column - w.in_column;
      const Shared<T> to = y1 + (row * w.in_columns + column) * layout.y1_pitch;
      SHUFFLENET_UNROLL
      for (int j = 0; j < kRowTiles; ++j) {
        if (Engine::row(j, i) >= step.rows.rows) break;
        const int channel = step.rows.channel(Engine::row(j, i));
        T value;
        narrow(relu(multiply_add(sum[j][i], A(taps[channel]), A(taps[t.chunk + channel]))), value);
        to[channel] = value;
      }
    }
  }

  // A thread walks down a column of a channel with the nine values below the taps in registers.
  SHUFFLENET_DEVICE void depthwise(const Window& w, int begin, int end) {
    const int channels = end - begin;
    SHUFFLENET_NO_UNROLL
    for (int i = thread_index(); i < channels * w.out_columns; i += kThreads) {
      const int c = i % channels;
      const int column = i / channels;
      const int slice = (begin + c) / slice_channels;
      const int y2_column =
          s.out_channels ? (slice - w.slice_begin) * layout.slice_pitch + begin + c - slice * slice_channels : c;
      A tap[9];
      SHUFFLENET_UNROLL
      for (int k = 0; k < 9; ++k) tap[k] = taps[(3 + k) * t.chunk + c];
      const A bias = taps[2 * t.chunk + c];
      A value[3][3];
      int next_row = 0;
      const auto read_row = [&](int into) {
        SHUFFLENET_UNROLL
        for (int k = 0; k < 3; ++k) {
          value[into][k] = widen(T(y1[(next_row * w.in_columns + column * s.stride + k) * layout.y1_pitch + c]));
        }
        ++next_row;
      };
      const auto move_row = [&](int from, int to) {
        SHUFFLENET_UNROLL
        for (int k = 0; k < 3; ++k) value[to][k] = value[from][k];
      };
      if (s.stride == 1) read_row(1);
      read_row(2);
      for (int row = 0; row < w.out_rows; ++row) {
        if (s.stride == 1) {
          move_row(1, 0);
          move_row(2, 1);
        } else {
          move_row(2, 0);
          read_row(1);
        }
        read_row(2);
        A sum = bias;
        SHUFFLENET_UNROLL
        for (int k = 0; k < 9; ++k) sum = multiply_add(tap[k], value[k / 3][k % 3], sum);
        T narrowed;
        narrow(s.conv2_relu ? relu(sum) : sum, narrowed);
        y2[(row * w.out_columns + column) * layout.y2_pitch + y2_column] = narrowed;
      }
    }
  }

  // Where the finished tile keeps a value: the result's neighbours in memory are its neighbours.
  SHUFFLENET_DEVICE static int finished_at(int pixel, int row) {
    return kDepthMajor ? row * kFinishedPitch + pixel : pixel * kFinishedPitch + row;
  }

  SHUFFLENET_DEVICE void conv3(const Window& w) {
    const int group_rows = s.out_channels / s.groups;
    const Shared<A> finished = shared_at<A>(memory, 0);
    for (int slice = w.slice_begin; slice < w.slice_end; ++slice) {
      const Shared<const T> slice_y2 = y2 + (slice - w.slice_begin) * layout.slice_pitch;
      for (int row = slice * group_rows, rows; row < (slice + 1) * group_rows; row += rows) {
        rows = next_rows((slice + 1) * group_rows - row);
        for (int pixel = 0; pixel < w.out_pixels(); pixel += kTilePixels) {
          barrier();  // y2 is complete, and the finished tile before this one has left
          if (thread_index() < rows) {
            const Affine<A> constants = affine<T>(arguments.conv3, row + thread_index());
            affine3[thread_index()] = constants.scale;
            affine3[kTileRows + thread_index()] = constants.bias;
          }
          const int pixels = least(kTilePixels, w.out_pixels() - pixel);
          A sum[kRowTiles][4];
          clear(sum);
          multiply_slice(
              {slice_y2 + pixel * layout.y2_pitch, static_cast<int>(layout.y2_pitch), 1, pixels}, row, rows, sum);
          barrier();  // all are done with the weights, whose place the finished tile takes
          SHUFFLENET_UNROLL
          for (int i = 0; i < 4; ++i) {
            if (Engine::pixel(i) >= pixels) continue;
            SHUFFLENET_UNROLL
            for (int j = 0; j < kRowTiles; ++j) {
              const int at = Engine::row(j, i);
              if (at >= rows) break;
              finished[finished_at(Engine::pixel(i), at)] =
                  multiply_add(sum[j][i], A(affine3[at]), A(affine3[kTileRows + at]));
            }
          }
          barrier();
          write(w, row, rows, pixel, pixels, s.stride == 1, true,
                [&](int p, int r) { return A(finished[finished_at(p, r)]); });
        }
      }
    }
  }

  SHUFFLENET_DEVICE void multiply_slice(const PixelOperand<T>& operand, int row, int rows, A (&sum)[kRowTiles][4]) {
    int load_k = 0, load_stage = 0, step_stage = 0;
    const auto stage_next = [&] {
      if (load_k < slice_channels) {
        stage_weights<T>(
            weight_tile(load_stage), arguments.conv3.weight, slice_channels, row, rows, load_k, t.conv3_vector);
        load_k += kTileDepth<T>;
      }
      commit_copies();
      load_stage = load_stage + 1 == t.stages ? 0 : load_stage + 1;
    };
    for (int k = (1 - t.stages) * kTileDepth<T>; k < slice_channels; k += kTileDepth<T>) {
      if (k >= 0) wait_for_stage(t.stages);
      stage_next();
      if (k < 0) continue;
      PixelOperand<T> part = operand;
      part.data = operand.data + k;
      Engine::template multiply<false>(
          sum, part, weight_tile(step_stage), ceil_div(rows, 8), least(kTileDepth<T>, slice_channels - k));
      step_stage = step_stage + 1 == t.stages ? 0 : step_stage + 1;
    }
  }

  SHUFFLENET_DEVICE void write_y2(const Window& w, int begin, int end) {
    write(w, begin, end - begin, 0, w.out_pixels(), false, false,
          [&](int pixel, int c) { return widen(T(y2[pixel * layout.y2_pitch + c])); });
  }

  // Writes channels [channel, channel + channels) of pixels [pixel, pixel + pixels) of the window.
  template <class Source>
  SHUFFLENET_DEVICE void write(const Window& w, int channel, int channels, int pixel, int pixels, bool adds_residual,
                               bool has_relu, const Source& source) {
    switch (t.result_vector) {
      case 16: write_vectors<16>(w, channel, channels, pixel, pixels, adds_residual, has_relu, source); break;
      case 8: write_vectors<8>(w, channel, channels, pixel, pixels, adds_residual, has_relu, source); break;
      default: write_vectors<sizeof(T)>(w, channel, channels, pixel, pixels, adds_residual, has_relu, source);
    }
  }

  template <int kVector, class Source>
  SHUFFLENET_DEVICE void write_vectors(const Window& w, int channel, int channels, int pixel, int pixels,
                                       bool adds_residual, bool has_relu, const Source& source) {
    constexpr int kPerVector = kVector / static_cast<int>(sizeof(T));
    struct alignas(kVector) Vector {
      T elements[kPerVector];
    };
    const int length = kDepthMajor ? pixels : channels;
    const int vectors = ceil_div(length, kPerVector);
    const int lines = kDepthMajor ? channels : pixels;
    SHUFFLENET_NO_UNROLL
    for (int i = thread_index(); i < lines * vectors; i += kThreads) {
      const int line = i / vectors;
      const int element = i % vectors * kPerVector;
      const int p = kDepthMajor ? element : line;
      const int c = kDepthMajor ? line : element;
      const int64_t offset = tensor_offset<kLayout>(
          w.image, s.result_channels, s.out_height, s.out_width, channel + c, w.out_row + (pixel + p) / w.out_columns,
          w.out_column + (pixel + p) % w.out_columns);
      const int inside = least(kPerVector, length - element);
      Vector vector = {};
      if (adds_residual) {
        if (inside == kPerVector) {
          vector = *reinterpret_cast<const Vector*>(x + offset);
        } else {
          for (int v = 0; v < inside; ++v) vector.elements[v] = x[offset + v];
        }
      }
      SHUFFLENET_UNROLL
      for (int v = 0; v < kPerVector; ++v) {
        if (v >= inside) break;
        A value = source(kDepthMajor ? p + v : p, kDepthMajor ? c : c + v);
        if (adds_residual) value += widen(vector.elements[v]);
        narrow(has_relu ? relu(value) : value, vector.elements[v]);
      }
      if (inside == kPerVector) {
        *reinterpret_cast<Vector*>(result + offset) = vector;
      } else {
        for (int v = 0; v < inside; ++v) result[offset + v] = vector.elements[v];
      }
    }
  }

  // The shortcut of a stride-2 unit: relu(avg_pool2d(x, 3, 2, 1)), the block's share of x's channels.
  SHUFFLENET_DEVICE void pool(const Window& w) {
    const int begin = static_cast<int>(int64_t{s.in_channels} * w.slice_begin / s.groups);
    const int channels = static_cast<int>(int64_t{s.in_channels} * w.slice_end / s.groups) - begin;
    SHUFFLENET_NO_UNROLL
    for (int i = thread_index(); i < channels * w.out_pixels(); i += kThreads) {
      const int c = begin + (kDepthMajor ? i / w.out_pixels() : i % channels);
      const int pixel = kDepthMajor ? i % w.out_pixels() : i / channels;
      const int out_row = w.out_row + pixel / w.out_columns;
      const int out_column = w.out_column + pixel % w.out_columns;
      const int row_begin = most(out_row * 2 - 1, 0), row_end = least(out_row * 2 + 2, s.height);
      const int column_begin = most(out_column * 2 - 1, 0), column_end = least(out_column * 2 + 2, s.width);
      A sum = A{0};
      for (int row = row_begin; row < row_end; ++row) {
        for (int column = column_begin; column < column_end; ++column) {
          sum += widen(x[tensor_offset<kLayout>(w.image, s.in_channels, s.height, s.width, c, row, column)]);
        }
      }
      const int count = s.pool_count_include_pad ? 9 : (row_end - row_begin) * (column_end - column_begin);
      T value;
      narrow(relu(sum / static_cast<A>(count)), value);
      result[tensor_offset<kLayout>(
          w.image, s.result_channels, s.out_height, s.out_width, s.out_channels + c, out_row, out_column)] = value;
    }
  }

  const KernelArguments& arguments;
  const Sizes& s;
  const Tiling& t;
  const SharedLayout layout;
  const Shared<char> memory;
  const Shared<A> taps, affine3;
  const Shared<T> y1, y2;
  const T* const x;
  T* const result;
  const int slice_channels;
};

}  // namespace shufflenet::cuda
