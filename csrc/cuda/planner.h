// Chooses a unit's Tiling for a device. Pure host code, which needs no CUDA: it is tested on the CPU for every shape of
// the paper and every architecture that is built.
#pragma once

#include <cmath>
#include <numeric>
#include <sstream>

#include "strip_planner.h"

namespace shufflenet::cuda {

// The depths of a warp's tile of x that the planner tries, in bytes of one pixel's channels. 160 bytes hold the 80
// channels of 16 bits that a group of conv1 reads in stage 2 of the paper's network with three groups. Smaller depths
// leave more shared memory for the rest.
inline constexpr int kTileDepthBytes[] = {160, 64, 32};

struct Plan {
  bool ok = false;
  Tiling tiling;
  int64_t shared_bytes = 0;
  int64_t windows = 0;
  int blocks_per_multiprocessor = 0;
  double cycles = 0;  // predicted for the whole launch, see predicted_cycles
  std::string explanation;
  // The plan to run the unit by strips instead, and whether that is chosen: it is for aligned tensors.
  StripPlan strips;
  bool by_strips = false;
};

// The addresses that a launch works on. Their alignment limits how wide an access can be.
struct Addresses {
  uint64_t x = 0, conv1_weight = 0, conv3_weight = 0, result = 0;
};

// Returns the bytes of an access: the largest power of two, at most 16, that divides every distance between accesses.
inline int vector_bytes(std::initializer_list<int64_t> distances) {
  int64_t divisor = 16;
  for (int64_t distance : distances) divisor = std::gcd(divisor, distance);
  return static_cast<int>(divisor);
}

inline void choose_vectors(const Unit& unit, Dtype dtype, Tiling& t, const Addresses& at = {}) {
  const int64_t e = element_bytes(dtype);
  const Sizes s = sizes_of(unit);
  const auto address = [](uint64_t a) { return static_cast<int64_t>(a % 16); };
  const int64_t residual = unit.adds_residual() ? address(at.x) : 0;
  t.conv1_vector = vector_bytes({unit.conv1_depth() * e, address(at.conv1_weight)});
  t.conv3_vector = vector_bytes({unit.slice_channels() * e, address(at.conv3_weight)});
  if (unit.layout == Layout::channels_last) {
    t.x_vector = vector_bytes({unit.in_channels * e, unit.conv1_depth() * e, address(at.x)});
    // Where a write can start: a tile of conv3 lies a multiple of kElements rows behind the start of its group. Without
    // conv3, the channels of a chunk are written, and so the distance between chunks counts.
    const int64_t start = unit.has_conv3() ? unit.out_channels / unit.groups * e
                                           : std::gcd(unit.slice_channels() * e * t.slices, int64_t{t.chunk} * e);
    t.result_vector =
        vector_bytes({unit.result_channels() * e, unit.first_conv3_channel() * e, start, address(at.result), residual});
    t.pool_vector = vector_bytes({unit.in_channels * e, unit.result_channels() * e, unit.first_pooled_channel() * e,
                                  address(at.x), address(at.result)});
  } else if (t.column_tiles(s) == 1) {
    const int64_t in_row = t.row_tiles(s) == 1 ? 16 : unit.width * e;
    const int64_t out_start = t.row_tiles(s) == 1 ? 16 : t.tile_rows * unit.out_width() * e;
    t.x_vector = vector_bytes({unit.height * unit.width * e, in_row, address(at.x)});
    t.result_vector = vector_bytes({unit.out_height() * unit.out_width() * e, out_start, address(at.result), residual});
  } else {
    t.x_vector = t.result_vector = 1;  // the pixels of a window narrower than the image are not contiguous in memory
  }
  // The kernel's narrowest copy has 4 bytes and its narrowest vector write 8. Below these it goes element by element.
  const int element = element_bytes(dtype);
  for (int* vector : {&t.x_vector, &t.conv1_vector, &t.conv3_vector}) *vector = *vector < 4 ? element : *vector;
  for (int* vector : {&t.result_vector, &t.pool_vector}) *vector = *vector < 8 ? element : *vector;
}

inline int blocks_per_multiprocessor(int64_t shared_bytes, int accumulator, const Device& device) {
  const int64_t by_shared = device.shared_per_multiprocessor / (shared_bytes + kReservedPerBlock);
  const int64_t by_threads = device.threads_per_multiprocessor / kThreads;
  const int64_t blocks = std::min({by_shared, by_threads, int64_t{blocks_by_registers(accumulator)}});
  return static_cast<int>(std::max<int64_t>(blocks, shared_bytes <= device.shared_per_block ? 1 : 0));
}

// How many instructions a warp executes for each piece of work, counted in the code that nvcc 13 makes of
// unit_kernel.cuh for sm_90.
struct Instructions {
  // The product of conv1 or conv3, for kStepBytes of the depth: `step` once for the tile's 16 lines, and `eight` for
  // each eight places that these are multiplied by.
  double step, eight;
  // conv1: `part` for each tile_depth channels of a tile, `copy` for each step of depth that is copied, `tile` once a
  // tile, and `outputs` for each eight rows of the tile that are written to y1.
  static constexpr double part = 90, copy = 20, tile = 60, outputs = 45;
  // conv3: `outputs3` for 16 x 32 outputs, without their product. The depthwise convolution: `column` for each column
  // of a pair of channels, `pair` for each output of the pair. The pooled shortcut: `pooled` for an output of as many
  // channels as one access holds.
  static constexpr double outputs3 = 205, column = 150, pair = 53, pooled = 350;
};
inline Instructions instructions_of(Dtype dtype, const Device& device) {
  const int element = element_bytes(dtype);
  if (uses_mma(dtype, device)) return element == 2 ? Instructions{8, 3} : Instructions{14, 5};
  // Without tensor cores, an FMA counts as many instructions as it keeps its unit busy for cycles of a 32-bit FMA:
  // 64-bit FMAs run at half the rate, or at a 64th; 16-bit operands must first be widened. Loads have 8 bytes, so a
  // step takes four of each row.
  const bool fast_double = device.compute_capability % 10 == 0 && device.compute_capability <= 100;
  const double multiply_add = element == 8 ? (fast_double ? 2 : 64) : element == 2 ? 1.5 : 1;
  return {24, 12 + 4.0 * kStepBytes / element * multiply_add};
}

// Predicts the cycles of a launch. Blocks run in rounds, each of as many blocks as fit on the card side by side. A
// round takes as long as its instructions or its memory traffic, whichever is longer, plus the times that a block waits
// for memory with nothing else to do.
inline double predicted_cycles(const Unit& unit, const Tiling& t, Dtype dtype, const Device& device, int blocks,
                               const SharedLayout& layout) {
  const Sizes s = sizes_of(unit);
  const Instructions count = instructions_of(dtype, device);
  const int element = element_bytes(dtype), step = kStepBytes / element;
  const int in_pixels =
      std::min((t.tile_rows - 1) * s.stride + 3, s.height) * std::min((t.tile_columns - 1) * s.stride + 3, s.width);
  const int out_pixels = t.tile_rows * t.tile_columns;
  const double slices = t.slices;
  const int chunks = ceil_div(s.slice_channels * t.slices, t.chunk);
  // Counts tiles as if all warps took equally many: the block waits for the warps that take one more.
  const auto all_warps = [](double tiles) { return std::ceil(tiles / kWarps) * kWarps; };

  const int runs = std::min(s.shuffle_groups, t.chunk), run_rows = ceil_div(t.chunk, runs);
  const int run_tiles = ceil_div(run_rows, kTileRows), eights = ceil_div(ceil_div(run_rows, run_tiles), 8);
  const double conv1 =
      chunks * all_warps(double(ceil_div(in_pixels, kTilePixels)) * runs * run_tiles) *
      (count.tile + count.part * ceil_div(s.conv1_depth, t.tile_depth) +
       (count.copy + count.step + eights * count.eight) * ceil_div(s.conv1_depth, step) + count.outputs * eights);
  const double depthwise = chunks * all_warps(double(ceil_div(t.chunk, 2)) * t.tile_columns / 32) *
                           (count.column + count.pair * t.tile_rows);
  const bool planes = unit.layout == Layout::contiguous;
  const int lines = planes ? s.group_rows : out_pixels, elements = planes ? out_pixels : s.group_rows;
  const double conv3 = slices * all_warps(double(ceil_div(lines, kLines)) * ceil_div(elements, kElements)) *
                       (count.outputs3 + (count.step + kElements / 8 * count.eight) * ceil_div(s.slice_channels, step));
  const double share = slices / s.groups;  // the part of x's and of the result's channels that a block works on
  const double pool =
      unit.concatenates_pool() ? share * s.in_channels * out_pixels / 32 * count.pooled * (planes ? 1 : element / 16.0)
                               : 0;
  // Blocks of different slices read the same x. The first of them fetches it from memory, the others find it in the
  // cache; each is charged its share.
  const double bytes = element * share * (double(in_pixels) * s.in_channels + double(out_pixels) * s.result_channels);
  // The times that a block waits for memory: for parameters, conv1's weights and its first tiles in each chunk; then
  // for each part of conv3's weights, and for the shortcut.
  const double waits = 3 * chunks + (s.out_channels ? 1 + slices * ceil_div(s.group_rows, layout.part_rows) : 0);

  const double windows = std::max(1.0, static_cast<double>(t.windows(s)));  // an empty batch is cut as one image is
  const double side_by_side = std::min<double>(blocks, std::ceil(windows / device.multiprocessors));
  const double instructions = std::min(kMostInstructions, side_by_side * kWarps / kWarpInterval);
  const double round =
      side_by_side * std::max((conv1 + depthwise + conv3 + pool) / instructions, bytes / bandwidth_of(device));
  return std::ceil(windows / (side_by_side * device.multiprocessors)) * (round + waits * kLatency);
}

// Returns how many times the cycles above launches were counted to take: by running the PTX of the paper's units at
// batch 64 for sm_80, sm_89 and sm_90. Accesses of x that are narrower than a copy cost most.
inline double counted_over_predicted(Dtype dtype, const Tiling& t, const Device& device) {
  if (!uses_mma(dtype, device)) return 1.4;
  return t.x_vector < 4 ? 2.5 : 1.2;
}

inline Plan plan_unit(const Unit& unit, Dtype dtype, const Device& device) {
  Plan best;
  std::ostringstream text;
  const int64_t most = std::numeric_limits<int>::max();
  const int64_t channels = std::max({unit.in_channels, unit.mid_channels, unit.out_channels, unit.result_channels()});
  if (channels > most / 2 || std::max(unit.height, unit.width) > most / 4 ||
      unit.height * unit.width > most / (2 * channels)) {
    best.explanation = "a size of the unit exceeds what the kernel counts in 32 bits";
    return best;
  }
  const Sizes s = sizes_of(unit);
  const int slice = s.slice_channels;
  const int e = element_bytes(dtype), a = accumulator_bytes(dtype);
  int64_t least_bytes = std::numeric_limits<int64_t>::max();

  const auto consider = [&](Tiling t) {
    const SharedLayout layout(s, t, unit.layout, e, a);
    const int64_t bytes = layout.bytes;
    least_bytes = std::min(least_bytes, bytes);
    if (bytes > device.shared_per_block) return;
    const int blocks = blocks_per_multiprocessor(bytes, a, device);
    const double cycles = predicted_cycles(unit, t, dtype, device, blocks, layout);
    if (best.ok && cycles >= best.cycles) return;
    best = {true, t, bytes, t.windows(s), blocks, cycles, {}, {}, false};
  };
  // Whole rows of as many slices as fit at once; narrower windows and fewer channels only where none does.
  for (int parts_of_slice = 1; !best.ok; parts_of_slice *= 2) {
    for (int columns = s.out_width; !best.ok; columns = ceil_div(columns, 2)) {
      for (int strips = 1, rows = 0; strips <= s.out_height; ++strips) {
        if (ceil_div(s.out_height, strips) == rows) continue;
        rows = ceil_div(s.out_height, strips);
        for (int parts = 1, slices = 0; parts <= s.groups; ++parts) {
          if (ceil_div(s.groups, parts) == slices) continue;
          slices = ceil_div(s.groups, parts);
          if (parts_of_slice > 1 && slices > 1) continue;
          const int chunk = parts_of_slice == 1 ? slice * slices : ceil_div(slice, parts_of_slice);
          for (int bytes : kTileDepthBytes) consider({rows, columns, slices, chunk, bytes / e});
        }
      }
      if (columns == 1) break;
    }
    if (parts_of_slice >= slice) break;
  }
  if (!best.ok) {
    text << "sm_" << device.compute_capability << ": the smallest window of one slice (" << slice
         << " intermediate channels) takes " << least_bytes << " bytes of shared memory, and a block has "
         << device.shared_per_block;
    best.explanation = text.str();
    return best;
  }
  const Tiling& t = best.tiling;
  choose_vectors(unit, dtype, best.tiling);
  text << "sm_" << device.compute_capability << ": windows of " << t.tile_rows << " x " << t.tile_columns
       << " result pixels, " << t.slices << " of " << s.groups << " slices, " << t.chunk
       << " intermediate channels at once; " << best.windows << " blocks of " << kThreads << " threads, "
       << best.shared_bytes << " bytes of shared memory, " << best.blocks_per_multiprocessor << " on a multiprocessor; "
       << t.tile_depth << " channels of x at a time; " << (uses_mma(dtype, device) ? "tensor cores" : "FMA")
       << "; accesses of " << t.x_vector << " bytes to x, " << t.result_vector << " to the result";
  best.explanation = text.str();
  best.cycles *= counted_over_predicted(dtype, t, device);
  best.strips = plan_strips(unit, dtype, device);
  best.by_strips = best.strips.ok && best.strips.cycles < best.cycles;
  return best;
}

}  // namespace shufflenet::cuda
