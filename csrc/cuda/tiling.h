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

// A block has eight warps. In a pointwise convolution each warp computes tiles on its own, with no barrier between
// them. A tile of conv1 is 16 pixels by up to kTileRows rows of its weights (a row is an output channel), and is summed
// over the input channels in parts of `tile_depth`. A tile of conv3 is 16 x 32 outputs. 48 rows take 24 accumulators a
// thread, and hold the 40 rows that a group of conv1 has in stage 3 of the paper's network with three groups.
inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kTilePixels = 16;
inline constexpr int kTileRows = 48;
inline constexpr int kRowPadding = 7;  // rows read behind the last one, as a tile's rows are read in eights
// How many bytes of a row one mma instruction multiplies: 16 elements of 16 bits (m16n8k16) or 8 of 32 bits (m16n8k8).
// Rows are padded to a multiple of it with zeros.
inline constexpr int kStepBytes = 32;
// The same in elements of T (kStep), and how many of them an access of 16 bytes has (kPerBlock).
template <class T>
inline constexpr int kStep = kStepBytes / static_cast<int>(sizeof(T));
template <class T>
inline constexpr int kPerBlock = 16 / static_cast<int>(sizeof(T));
// A tile of conv3 has 16 lines (the M of mma.m16n8) of 32 elements (four times its N). Elements are what lies side by
// side in the result's memory: channels where it is channels_last, pixels where it is contiguous. Lines are the other
// of the two.
inline constexpr int kLines = 16;
inline constexpr int kElements = 32;
// Returns how many blocks a multiprocessor's 65536 registers hold. unit_instance.cuh compiles the kernel for this
// limit: 128 registers a thread, or 255 where an accumulator takes two registers.
SHUFFLENET_HOST_DEVICE constexpr int blocks_by_registers(int accumulator) { return accumulator == 8 ? 1 : 2; }

// The elements from one channel to the next in a tile of x that comes from contiguous planes. With this pitch, what one
// load of a fragment reads lies in different banks of shared memory: the 16-byte blocks of 16-bit elements, and the
// four rows of eight pixels of 32-bit elements.
inline constexpr int kPlanePitch = kTilePixels + 8;

inline constexpr int kBuffers = 2;  // tiles of x that each warp has room for: it fills one while it reads the other

inline constexpr int kTapConstants = 12;  // an intermediate channel's scale1, bias1, bias2 and nine scaled taps

SHUFFLENET_HOST_DEVICE inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
SHUFFLENET_HOST_DEVICE inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Divides by a number that is used often, by multiplying with its inverse. The quotient is exact while the product of
// dividend and divisor is below 2^32: as it is for the pixels of a window, whose number shared memory bounds.
struct Divisor {
  SHUFFLENET_HOST_DEVICE explicit Divisor(int divisor) : inverse(0xffffffffu / static_cast<uint32_t>(divisor) + 1) {}
  SHUFFLENET_HOST_DEVICE int quotient(int n) const {
    // The inverse of 1 does not fit in 32 bits, and is stored as 0. Without signs, the product is one instruction.
    return inverse ? static_cast<int>(uint64_t{static_cast<uint32_t>(n)} * inverse >> 32) : n;
  }
  uint32_t inverse;
};

// A unit's sizes as the kernel uses them. Offsets inside an image are counted in 32 bits, which the planner checks;
// offsets of images in 64.
struct Sizes {
  int64_t batch;
  int in_channels, height, width, mid_channels, out_channels, conv1_groups, groups, shuffle_groups, stride;
  int out_height, out_width, result_channels;
  int slice_channels, shuffle_rows, conv1_depth, group_rows;  // group_rows: output channels of a group of conv3
  int first_conv3_channel, first_pooled_channel;              // in the result
  int in_plane, out_plane;                                    // pixels of a channel
  bool conv2_relu, pool_count_include_pad, pool_relu;
};

inline Sizes sizes_of(const Unit& unit) {
  const auto narrow = [](int64_t n) { return static_cast<int>(n); };
  return {
      unit.batch,
      narrow(unit.in_channels),
      narrow(unit.height),
      narrow(unit.width),
      narrow(unit.mid_channels),
      narrow(unit.out_channels),
      narrow(unit.conv1_groups),
      narrow(unit.groups),
      narrow(unit.shuffle_groups),
      narrow(unit.stride),
      narrow(unit.out_height()),
      narrow(unit.out_width()),
      narrow(unit.result_channels()),
      narrow(unit.slice_channels()),
      narrow(unit.shuffle_rows()),
      narrow(unit.conv1_depth()),
      narrow(unit.out_channels / unit.groups),
      narrow(unit.first_conv3_channel()),
      narrow(unit.first_pooled_channel()),
      narrow(unit.height * unit.width),
      narrow(unit.out_height() * unit.out_width()),
      unit.conv2_relu,
      unit.pool_count_include_pad,
      unit.shortcut_relu};
}

struct Tiling {
  int tile_rows = 0, tile_columns = 0;
  int slices = 0;
  int chunk = 0;
  int tile_depth = 0;  // channels of x that a warp multiplies at a time
  // The bytes of an access, to which every address that it is used for is aligned: 16, 8 or 4. A smaller number means
  // element by element.
  int x_vector = 0, conv1_vector = 0, conv3_vector = 0, result_vector = 0, pool_vector = 0;

  SHUFFLENET_HOST_DEVICE int row_tiles(const Sizes& s) const { return ceil_div(s.out_height, tile_rows); }
  SHUFFLENET_HOST_DEVICE int column_tiles(const Sizes& s) const { return ceil_div(s.out_width, tile_columns); }
  SHUFFLENET_HOST_DEVICE int slice_parts(const Sizes& s) const { return ceil_div(s.groups, slices); }
  SHUFFLENET_HOST_DEVICE int64_t windows(const Sizes& s) const {
    return s.batch * slice_parts(s) * row_tiles(s) * column_tiles(s);
  }
};

// A run of consecutive rows of conv1's weights that belong to one tile. `row` is the first one in the weights,
// `position` the first one among the rows that the block keeps in shared memory. `x_channel` is the first channel of x
// that they read, `channel` the shuffled place of the channel that the first row computes, counted from the chunk's
// first. The next row's channel is shuffled to a place `shuffle_groups` further on.
struct Run {
  int row, rows, position, x_channel, channel;
};

// A block's shared memory, as byte offsets. When the last channels of a window have been through the depthwise
// convolution, y1 and conv1's weights are no longer needed: conv3's weights take their place, `part_rows` rows of a
// slice at a time. Where a block computes all its channels at once, y2 also takes the place of the tiles of x.
struct SharedLayout {
  SHUFFLENET_HOST_DEVICE SharedLayout(const Sizes& s, const Tiling& t, Layout layout, int element, int accumulator) {
    const auto narrow = [](int64_t n) { return static_cast<int>(n); };
    const int step = kStepBytes / element;
    const int slice = s.slice_channels;
    columns = narrow(round_up(t.chunk, 2));
    slice_pitch = narrow(round_up(slice, step));
    const int64_t in_pixels = int64_t{(t.tile_rows - 1) * s.stride + 3} * ((t.tile_columns - 1) * s.stride + 3);
    const bool planes = layout == Layout::contiguous;
    y2_rows = narrow(round_up(int64_t{t.tile_rows} * t.tile_columns, planes ? kElements : kLines));
    weight3_unit = planes ? kLines : kElements;
    const int64_t y1_elements = pitch(columns, element);
    const int64_t y2_elements = pitch(s.out_channels ? int64_t{t.slices} * slice_pitch : columns, element);
    const int64_t weight1_elements = pitch(round_up(s.conv1_depth, step), element);
    const int64_t weight3_elements = pitch(slice_pitch, element);
    y1_pitch = narrow(y1_elements);
    y2_pitch = narrow(y2_elements);
    weight1_pitch = narrow(weight1_elements);
    weight3_pitch = narrow(weight3_elements);
    x_pitch = narrow(pitch(t.tile_depth, element));
    x_bytes = (planes ? t.tile_depth * kPlanePitch : kTilePixels * x_pitch) * element;
    max_runs = (s.shuffle_groups < t.chunk ? s.shuffle_groups : t.chunk) + s.conv1_groups + t.chunk / (kTileRows / 2);

    int64_t end = round_up(int64_t{max_runs} * sizeof(Run), 16);
    taps = narrow(end);
    end += round_up(int64_t{kTapConstants} * columns * accumulator, 16);
    affine3 = narrow(end);
    end += round_up(int64_t{2} * t.slices * s.group_rows * accumulator, 16);
    y1 = narrow(end);
    end += round_up(in_pixels * y1_elements * element, 16);
    weight1 = narrow(end);
    end += (t.chunk + kRowPadding) * weight1_elements * element;
    const int64_t y2_bytes = y2_rows * y2_elements * element;
    const int64_t part_bytes = weight3_unit * weight3_elements * element;
    weight3 = y1;
    if (s.out_channels && end - y1 < part_bytes) end = y1 + part_bytes;
    part_rows = narrow((end - y1) / part_bytes * weight3_unit);
    tiles = narrow(end);
    const int64_t tile_bytes = int64_t{kWarps} * kBuffers * x_bytes;
    const bool all_at_once = t.chunk >= slice * t.slices;
    y2 = narrow(all_at_once ? end : end + tile_bytes);
    bytes = all_at_once ? end + (y2_bytes > tile_bytes ? y2_bytes : tile_bytes) : end + tile_bytes + y2_bytes;
  }

  // Returns the elements from one row to the next: an odd number of 16-byte blocks. Eight rows then lie in eight
  // different groups of banks, and a fragment of them is read without a conflict.
  SHUFFLENET_HOST_DEVICE static int64_t pitch(int64_t elements, int element) {
    const int64_t blocks = (elements * element + 15) / 16;
    return (blocks % 2 == 1 ? blocks : blocks + 1) * 16 / element;
  }

  int columns;      // channels of y1: a chunk, rounded up to pairs
  int slice_pitch;  // channels from one slice of y2 to the next: slice_channels, rounded up to whole steps
  int y1_pitch, y2_pitch, weight1_pitch, weight3_pitch, x_pitch;  // elements from one row to the next
  int x_bytes;                                                    // size of one tile of x
  int max_runs, part_rows;
  int y2_rows, weight3_unit;  // pixels of y2, and the number whose multiples conv3's rows are padded to: whole tiles
  int taps, affine3, y1, weight1, weight3, tiles, y2;  // offsets
  // Size of it all. It may be more than any device has, and more than 32 bits hold: then the other members mean
  // nothing.
  int64_t bytes;
};

// A parameter for each channel. It has x's dtype, or float32 as batch norms may have beside 16-bit convolutions.
struct Parameter {
  const void* data = nullptr;
  bool is_float32 = false;
};

// A convolution with or without a bias and a batch norm in inference mode (norm_mean not null).
struct ConvolutionPointers {
  const void* weight = nullptr;
  Parameter bias, norm_weight, norm_bias, norm_mean, norm_var;
  double eps = 0;
};

struct KernelArguments {
  Sizes sizes;
  Tiling tiling;
  SharedLayout layout;  // computed on the host, so that the kernel reads it as constants
  const void* x;
  ConvolutionPointers conv1, conv2, conv3;
  void* result;
};

}  // namespace shufflenet::cuda
