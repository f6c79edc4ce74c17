// How a unit is cut into tiles: what planner.h chooses on the host and unit_kernel.cuh works by on the device.
//
// A block computes a window of `tile_rows` x `tile_columns` result pixels of one image for `slices` slices of the unit
// (slice h: group h of conv3 and the intermediate channels that it reads), `chunk` of these channels at a time.
#pragma once

#include <cstdint>

#include "../unit.h"

#if defined(__CUDACC__)
#define SHUFFLENET_HOST_DEVICE __host__ __device__
#else
#define SHUFFLENET_HOST_DEVICE
#endif

namespace shufflenet::cuda {

// A block's pointwise convolutions run in tiles of kTilePixels x kTileRows (rows of the weight matrix, so output
// channels), summed over the depth in steps of kTileDepthBytes. Eight warps: four of 16 pixels, the M of mma.m16n8,
// by two that take every other eight rows, its N. A 7 x 7 plane (49 pixels) is one tile, as are the 20 to 64 rows that
// most groups have; 64 rows are 16 accumulators a thread. 128 bytes of depth are four k16 steps in 16 bits between
// barriers, and four copies of 16 bytes a thread for a tile of pixels and one of weights.
inline constexpr int kThreads = 256;
inline constexpr int kTilePixels = 64;
inline constexpr int kTileRows = 64;
inline constexpr int kTileDepthBytes = 128;
inline constexpr int kPixelWarps = kTilePixels / 16;
inline constexpr int kRowWarps = kThreads / 32 / kPixelWarps;
static_assert(kPixelWarps * kRowWarps * 32 == kThreads, "every warp has its share of a tile");
// Blocks that a multiprocessor's 65536 registers hold, by the limit that instance.cuh compiles for: 128 registers a
// thread, 255 where an accumulator takes two.
SHUFFLENET_HOST_DEVICE constexpr int blocks_by_registers(int accumulator) { return accumulator == 8 ? 1 : 2; }

// Bytes between rows of the staged tiles: eight rows' 16-byte blocks lie in eight different groups of banks, so that
// reading a fragment (eight rows at a time) has no conflict.
inline constexpr int kBankPadding = 16;
inline constexpr int kTilePitchBytes = kTileDepthBytes + kBankPadding;
static_assert(kTilePitchBytes / 16 % 2 == 1, "rows an odd number of 16-byte blocks apart touch all banks in turn");
inline constexpr int kTileBytes = kTilePixels * kTilePitchBytes;
static_assert(kTilePixels == kTileRows, "tiles of pixels and of weights share kTileBytes");
// Accumulators between rows of the finished tile: 8 pixels x 4 lanes x 2 rows of a fragment touch different banks.
inline constexpr int kFinishedPitch = kTileRows + 8;

inline constexpr int kMinStages = 2;  // one barrier a step needs a tile to fill beside the one being read
inline constexpr int kMaxStages = 4;

inline constexpr int kTapConstants = 12;  // an intermediate channel's scale1, bias1, bias2 and nine scaled taps

// Depths of y2's slices are padded with zeros to whole mma steps.
inline constexpr int kDepthStep = 16;

SHUFFLENET_HOST_DEVICE inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
SHUFFLENET_HOST_DEVICE inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A unit's sizes as the kernel uses them; the planner checks that they fit. Offsets into tensors are 64-bit.
struct Sizes {
  int64_t batch;
  int in_channels, height, width, mid_channels, out_channels, conv1_groups, groups, stride;
  int out_height, out_width, result_channels;
  bool conv2_relu, pool_count_include_pad;
};

struct Tiling {
  int tile_rows = 0, tile_columns = 0;
  int slices = 0;
  int chunk = 0;
  int stages = 0;
  // Bytes of an access that every address it is used for is aligned to: 16, 8, 4, or below 4 element by element.
  int x_vector = 0, conv1_vector = 0, conv3_vector = 0, result_vector = 0;

  SHUFFLENET_HOST_DEVICE int row_tiles(const Sizes& s) const { return ceil_div(s.out_height, tile_rows); }
  SHUFFLENET_HOST_DEVICE int column_tiles(const Sizes& s) const { return ceil_div(s.out_width, tile_columns); }
  SHUFFLENET_HOST_DEVICE int slice_parts(const Sizes& s) const { return ceil_div(s.groups, slices); }
  SHUFFLENET_HOST_DEVICE int64_t windows(const Sizes& s) const {
    return s.batch * slice_parts(s) * row_tiles(s) * column_tiles(s);
  }
};

// A block's shared memory, as byte offsets. The finished tile of conv3 lies where the tiles it was computed from lay.
struct SharedLayout {
  SHUFFLENET_HOST_DEVICE SharedLayout(const Sizes& s, const Tiling& t, int element, int accumulator) {
    const auto narrow = [](int64_t n) { return static_cast<int>(n); };
    slice_pitch = narrow(round_up(s.mid_channels / s.groups, kDepthStep));
    const int64_t staged = int64_t{2} * t.stages * kTileBytes;
    const int64_t finished = s.out_channels ? int64_t{kTilePixels} * kFinishedPitch * accumulator : 0;
    const int64_t in_pixels = int64_t{(t.tile_rows - 1) * s.stride + 3} * ((t.tile_columns - 1) * s.stride + 3);
    const int64_t out_pixels = int64_t{t.tile_rows} * t.tile_columns;
    const int64_t y1_elements = pitch(t.chunk, element);
    const int64_t y2_elements = pitch(s.out_channels ? int64_t{t.slices} * slice_pitch : t.chunk, element);
    y1_pitch = narrow(y1_elements);
    y2_pitch = narrow(y2_elements);
    int64_t end = round_up(staged > finished ? staged : finished, 16);
    taps = narrow(end);
    end += round_up(int64_t{kTapConstants} * t.chunk * accumulator, 16);
    affine3 = narrow(end);
    end += round_up(int64_t{2} * kTileRows * accumulator, 16);
    y1 = narrow(end);
    end += round_up(in_pixels * y1_elements * element, 16);
    y2 = narrow(end);
    bytes = end + round_up(out_pixels * y2_elements * element, 16);
  }

  // Elements between the pixels of an intermediate: whole 16-byte blocks, an odd number of them.
  SHUFFLENET_HOST_DEVICE static int64_t pitch(int64_t channels, int element) {
    const int64_t blocks = (channels * element + 15) / 16;
    return (blocks % 2 == 1 ? blocks : blocks + 1) * 16 / element;
  }

  int slice_pitch;
  int y1_pitch, y2_pitch;     // elements between pixels
  int taps, affine3, y1, y2;  // offsets
  int64_t bytes;              // of all: may exceed what the others hold, and every device, in which case they are void
};

// One vector of per-channel parameters: of x's dtype or float32 (batch norm under 16-bit convolutions).
struct Parameter {
  const void* data = nullptr;
  bool is_float32 = false;
};

// A convolution with a bias, a batch norm in inference mode (norm_weight not null), or neither.
struct ConvolutionPointers {
  const void* weight = nullptr;
  Parameter bias, norm_weight, norm_bias, norm_mean, norm_var;
  double eps = 0;
};

struct KernelArguments {
  Sizes sizes;
  Tiling tiling;
  const void* x;
  ConvolutionPointers conv1, conv2, conv3;
  void* result;
};

}  // namespace shufflenet::cuda
