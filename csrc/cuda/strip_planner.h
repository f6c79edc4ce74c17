// Chooses how a unit is cut into strips (strip.h), if it can be. Pure host code, as planner.h.
#pragma once

#include <cmath>
#include <sstream>

#include "device.h"
#include "strip_shares.h"

namespace shufflenet::cuda {

struct StripPlan {
  bool ok = false;
  StripTiling tiling;
  int64_t shared_bytes = 0;
  int64_t blocks = 0;
  int blocks_per_multiprocessor = 0;
  double busy_warps = 0;    // of a block, on average
  double instructions = 0;  // that the warps of the launch execute, as predicted
  double cycles = 0;        // predicted for the launch
  std::string explanation;  // why there is no plan, or what the best one is
};

// Says why a unit cannot be cut into strips, or nothing.
inline std::string obstacle_to_strips(const Unit& unit, Dtype dtype, const Device& device) {
  if (device.compute_capability < 80) return "strips need sm_80";
  if (!uses_mma(dtype, device)) return "strips are for dtypes that tensor cores multiply";
  if (!unit.adds_residual() && !unit.concatenates_pool()) return "strips are for whole units of v1";
  // Beyond this, layouts' bytes would not fit the numbers that count them.
  if (unit.in_channels * element_bytes(dtype) > device.shared_per_block) return "a pixel of x exceeds shared memory";
  if (unit.in_channels * element_bytes(dtype) % kBlockBytes != 0) return "strips need pixels that end at 16 bytes";
  if (unit.conv1_depth() % 4 != 0) return "strips need a multiple of 4 channels in a group of conv1";
  if (unit.layout == Layout::channels_last && unit.result_channels() % 4 != 0)
    return "strips need a multiple of 4 channels of a channels_last result";
  if (unit.mid_channels > 4096 || unit.groups * unit.conv1_groups > 256)
    return "too many channels or groups for strips";
  return "";
}

// How many instructions a warp executes for each piece of work, counted by running the PTX of strip_kernel.cuh for
// sm_90 on the CPU. The sum comes within a fifth of what whole launches execute.
struct StripInstructions {
  explicit StripInstructions(int element) {
    if (element == 2) return;
    operand1 = 10, outputs1 = 34, outputs3 = 31, block2 = 190, pool_item = 190, pool_pair = 110, plane_pool_item = 120;
  }
  // Once a warp; to copy the blocks of 32 lanes.
  double warp = 520, copy = 3.8;
  // A product, for each step, and for each half of a step: without its tiles, for an operand of conv1 or of conv3, and
  // for each tile. What a mask adds.
  double step = 8, step_tile = 1, operand1 = 2, operand3 = 2, half_tile = 2, mask = 12;
  // conv1 and conv3: an item, and what is done to the sums of each tile of it; what it adds to scatter one.
  double item1 = 32, outputs1 = 14, scattered1 = 26, item3 = 27, outputs3 = 22;
  // The depthwise convolution: an item, and each block of 8 slots of it.
  double item2 = 35, block2 = 47;
  // In the contiguous layout: once a warp that copies x or results, once a unit of a plane or some that it copies, and
  // once a unit of x (of less than 4 bytes, through a register) and of the result (of elements, some at a time); what
  // it adds to a half of a step of conv1, and to the sums of a tile of conv3.
  double copies = 60, copies_unit = 50, copy_in = 3.6, copy_element = 5, copy_out = 4.4, copy_row = 10, transposed = 2,
         in_place3 = 4;
  // The pool: 16 pixels, and 16 channels of them.
  double pool_item = 200, pool_pair = 79;
  // In the contiguous layout: 8 columns of the result, a row of them, and 16 channels of that; in 32 bits, 32 pixels
  // and a channel of them.
  double plane_pool_item = 220, plane_pool_row = 55, plane_pool_pair = 46, plane_pool_channel = 38;

  double product(int tiles, int steps, int halves, double operand) const {
    return steps * (step + tiles * step_tile) + halves * (operand + tiles * half_tile);
  }
};

// A strip of an image, from a row of the result on.
struct Strip {
  Strip(const Sizes& s, const StripTiling& t, int row) : rows(std::min(t.rows, s.out_height - row)) {
    const int in_row = t.first_in_row(s, row);
    in_rows = std::min(in_row + t.in_rows(s, rows), s.height) - std::max(in_row, 0);
  }
  int rows, in_rows;  // of the result; of x
};

// What the warps of a block execute: to copy, in conv1, in the depthwise convolution and conv3, and else.
struct BlockInstructions {
  double copies, conv1, conv3, others;
  double all() const { return copies + conv1 + conv3 + others; }
};

inline BlockInstructions block_instructions(const Sizes& s, const StripTiling& t, const StripLayout& layout,
                                            const Strip& strip) {
  const PackedLayout& p = layout.packed;
  const StripInstructions count(p.element);
  const int conv3_tiles = 2 * p.conv3_chunk;
  const double conv1 =
      count.item1 + p.conv1_chunk * (count.outputs1 + (p.scatters ? count.scattered1 : 0)) +
      (p.by_planes ? p.conv1_halves * count.transposed : 0) +
      count.product(p.conv1_chunk, p.conv1_steps, p.conv1_halves, count.operand1 + (p.is_masked ? count.mask : 0));
  const double depthwise = count.item2 + p.blocks * count.block2;
  const double conv3 = count.item3 + conv3_tiles * (count.outputs3 + (p.by_planes ? count.in_place3 : 0)) +
                       count.product(conv3_tiles, p.conv3_steps, p.conv3_halves, count.operand3);
  // What the pool takes, by its pairs of blocks and by how many warps share the channels of a tile.
  const double pairs = static_cast<double>(ceil_div(layout.own_blocks, 2)) / t.parts(s);
  const auto shares_of_pool = [&](double tiles) { return std::max(1.0, std::min(std::floor(t.warps / tiles), pairs)); };
  double pool = 0;
  if (s.stride == 2 && p.by_planes && p.element == 4) {
    const int pixels = strip.rows * s.out_width, side_by_side = std::max(1, 32 / pixels);
    const double items = ceil_div(pixels, 32), channels = static_cast<double>(s.in_channels) / t.parts(s);
    pool = items * (std::max(1.0, t.warps / items) * count.plane_pool_item +
                    channels / side_by_side * count.plane_pool_channel);
  } else if (s.stride == 2 && p.by_planes) {
    const PlanePoolTiles by(s, strip.rows, t.warps);
    const double tiles = by.in_row * by.rows.count, shares = shares_of_pool(tiles);
    const double pools = std::min(1.0, pairs);  // the share of the parts that have any
    pool = pools * shares * (tiles * count.plane_pool_item + by.in_row * strip.rows * count.plane_pool_row) +
           by.in_row * strip.rows * pairs * count.plane_pool_pair;
  } else if (s.stride == 2) {
    const double tiles = ceil_div(strip.rows * s.out_width, kTilePixels);
    pool = tiles * (shares_of_pool(tiles) * count.pool_item + pairs * count.pool_pair);
  }
  double copies =
      count.copy * strip.in_rows * s.width * ceil_div(layout.own_blocks, 32) / std::max(1, 32 / layout.own_blocks);
  if (p.by_planes) {
    const auto of = [&](int planes, int pixels, int plane, int unit, double each, bool is_stored) {
      const PlaneCopy by(pixels, plane, p.element, unit, t.warps * 32, is_stored);
      const double steps = ceil_div(planes, by.together * by.side_by_side);
      const double slots = ceil_div(by.slots * by.together, by.lanes);
      const double one = by.in_a_row > 1 ? count.copy_row : each;
      return t.warps * (count.copies + slots * (count.copies_unit + one * steps));
    };
    const double in = layout.x_unit < 4 ? count.copy_element : count.copy_in;
    const auto stored = [&](int planes) {
      return of(planes, strip.rows * s.out_width, s.out_plane, layout.result_unit, count.copy_out, true);
    };
    copies = of(s.in_channels, strip.in_rows * s.width, s.in_plane, layout.x_unit, in, false) +
             stored(t.slices * s.group_rows) + (s.stride == 2 ? stored(ceil_div(s.in_channels, t.parts(s))) : 0);
  }
  return {copies, ceil_div(strip.in_rows * s.width, kItemPixels) * s.conv1_groups * p.conv1_chunks * conv1,
          ceil_div(strip.rows * s.out_width, kItemPixels) * t.slices * (depthwise + p.conv3_chunks * conv3),
          t.warps * count.warp + pool};
}

// Predicts what the warps of a launch execute.
inline double strip_instructions(const Sizes& s, const StripTiling& t, const StripLayout& layout) {
  double image = 0;
  for (int row = 0; row < s.out_height; row += t.rows) image += block_instructions(s, t, layout, {s, t, row}).all();
  return image * static_cast<double>(s.batch) * t.parts(s);
}

// How many warps work at a time in a phase: a block waits for those that take one item more than others.
struct BusyWarps {
  BusyWarps(const Sizes& s, const StripTiling& t, const StripLayout& layout, const Strip& strip)
      : conv1(of(t, s.conv1_groups * layout.packed.conv1_chunks, strip.in_rows * s.width)),
        conv3(of(t, t.slices, strip.rows * s.out_width)) {}
  static double of(const StripTiling& t, int pieces, int pixels) {
    const WarpShares shares(t.warps, pieces);
    const int items = ceil_div(pixels, kItemPixels);
    return static_cast<double>(pieces) * items / (ceil_div(pieces, shares.step) * ceil_div(items, shares.teams));
  }
  double conv1, conv3;
};

// Predicts the cycles of a block, where its share of the memory traffic takes so many.
inline double block_cycles(const BlockInstructions& instructions, const BusyWarps& busy, int warps, double side_by_side,
                           double memory_cycles) {
  const auto cycles = [&](double all, double busy_warps) {
    return side_by_side * all / std::min(kMostInstructions, side_by_side * busy_warps / kWarpInterval);
  };
  const double computing = cycles(instructions.others, warps) + cycles(instructions.conv1, busy.conv1) +
                           cycles(instructions.conv3, busy.conv3);
  return std::max({computing, cycles(instructions.copies, warps), memory_cycles});
}

// Returns how many of a block's warps work at a time, on the average of all instructions.
inline double busy_warps(const Sizes& s, const StripTiling& t, const StripLayout& layout) {
  double all = 0, longest = 0;
  for (int row = 0; row < s.out_height; row += t.rows) {
    const Strip strip(s, t, row);
    const BlockInstructions instructions = block_instructions(s, t, layout, strip);
    const BusyWarps busy(s, t, layout, strip);
    all += instructions.all();
    longest += (instructions.copies + instructions.others) / t.warps + instructions.conv1 / busy.conv1 +
               instructions.conv3 / busy.conv3;
  }
  return all / longest;
}

// Predicts the cycles of a launch, as predicted_cycles in planner.h does: in rounds, of which each takes as long as the
// longest block and the times that one waits for memory with nothing else to do. All blocks share the memory's
// bandwidth.
inline double strip_cycles(const Unit& unit, const StripTiling& t, const StripLayout& layout, const Device& device,
                           int blocks_per_multiprocessor) {
  constexpr double kWaits = 2;  // for x, and for the first operands of weights
  // Among plans that take about as long, the one of fewest instructions is the best: this part of their time counts.
  constexpr double kOfInstructions = 0.1;
  const Sizes s = sizes_of(unit);
  const double blocks = static_cast<double>(t.blocks(s));
  const double side_by_side =
      std::clamp<double>(std::ceil(blocks / device.multiprocessors), 1, blocks_per_multiprocessor);
  double values = 0;
  for (int row = 0; row < s.out_height; row += t.rows) {
    const Strip strip(s, t, row);
    // Each part of an image copies all of x, the first from memory and the others from the cache.
    values += s.in_channels * s.width * strip.in_rows + s.result_channels * s.out_width * strip.rows;
  }
  values /= t.strips(s);
  if (layout.packed.by_planes && t.rows < s.out_height) {
    // Runs that do not begin at a sector take a part of one more.
    const int element = layout.packed.element;
    const auto beside = [&](int pixels, int plane) {
      int aligned = element;
      while (aligned < kSectorBytes && pixels * element % (2 * aligned) == 0 && plane * element % (2 * aligned) == 0) {
        aligned *= 2;
      }
      return static_cast<double>(kSectorBytes - aligned) / element;
    };
    values +=
        s.in_channels * beside(s.width, s.in_plane) + s.result_channels * beside(t.rows * s.out_width, s.out_plane);
  }
  const double memory_cycles = side_by_side * layout.packed.element * values / t.parts(s) / bandwidth_of(device);
  double longest = 0, instructions = 0;
  for (int row = 0; row < s.out_height; row += t.rows) {
    const Strip strip(s, t, row);
    const BlockInstructions of_block = block_instructions(s, t, layout, strip);
    const BusyWarps busy(s, t, layout, strip);
    longest = std::max(longest, block_cycles(of_block, busy, t.warps, side_by_side, memory_cycles));
    instructions += of_block.all() / t.strips(s);
  }
  const double rounds = std::max(1.0, std::ceil(blocks / (side_by_side * device.multiprocessors)));
  return rounds * (longest + kWaits * kLatency + kOfInstructions * side_by_side * instructions / kMostInstructions);
}

inline int strips_per_multiprocessor(int64_t shared_bytes, int warps, Layout layout, const Device& device) {
  const int64_t by_shared = device.shared_per_multiprocessor / (shared_bytes + kReservedPerBlock);
  const int64_t by_registers = most_strip_warps(device.compute_capability, layout) / warps;
  return static_cast<int>(std::max<int64_t>(1, std::min(by_shared, by_registers)));
}

// Returns the most blocks of a launch: a grid's, and what StripConstants can divide.
inline int64_t most_blocks(const Sizes& s, const StripTiling& t) {
  const int64_t divided = std::numeric_limits<uint32_t>::max() / std::max(t.strips(s), t.parts(s));
  return std::min<int64_t>(divided, std::numeric_limits<int>::max());
}

// Returns the plan to cut a unit in this way.
inline StripPlan plan_of(const Unit& unit, const StripTiling& t, const StripLayout& layout, const Device& device) {
  const Sizes s = sizes_of(unit);
  StripPlan plan;
  plan.ok = true;
  plan.tiling = t;
  plan.shared_bytes = layout.bytes;
  plan.blocks_per_multiprocessor = strips_per_multiprocessor(layout.bytes, t.warps, unit.layout, device);
  plan.blocks = t.blocks(s);
  plan.busy_warps = busy_warps(s, t, layout);
  plan.instructions = strip_instructions(s, t, layout);
  plan.cycles = strip_cycles(unit, t, layout, device, plan.blocks_per_multiprocessor);
  return plan;
}

inline StripPlan plan_strips(const Unit& unit, Dtype dtype, const Device& device) {
  StripPlan best;
  best.explanation = obstacle_to_strips(unit, dtype, device);
  if (!best.explanation.empty()) return best;
  const Sizes s = sizes_of(unit);
  int64_t least_bytes = std::numeric_limits<int64_t>::max();
  for (int slices = s.groups; slices >= 1; --slices) {
    if (s.groups % slices != 0) continue;
    const PackedLayout packed(s, slices, unit.layout, element_bytes(dtype));  // takes longer than the rest of a layout
    if (pack_shared_bytes(s, slices, packed) > kSharedWithoutAsking) continue;
    for (int rows = s.out_height; rows >= 1; --rows) {
      if (int64_t{rows} * s.stride * s.width > 1 << 14)
        continue;  // more pixels than shared memory holds, and than fit 32 bits
      for (int warps = most_strip_warps(device.compute_capability, unit.layout); warps > 0; warps -= 2) {
        for (int gap : {8, 1}) {
          if (s.stride == 2 && gap != 1) continue;  // which then has no meaning
          const StripTiling t = {rows, slices, warps, gap};
          const StripLayout layout(s, t, packed);
          least_bytes = std::min(least_bytes, layout.bytes);
          if (layout.bytes > device.shared_per_block || t.blocks(s) > most_blocks(s, t)) continue;
          const int blocks = strips_per_multiprocessor(layout.bytes, warps, unit.layout, device);
          if (best.ok && strip_cycles(unit, t, layout, device, blocks) >= best.cycles) continue;
          best = plan_of(unit, t, layout, device);
        }
      }
    }
  }
  std::ostringstream text;
  text << "sm_" << device.compute_capability << ": ";
  if (best.ok) {
    text << "strips of " << best.tiling.rows << " rows, " << best.tiling.slices << " of " << s.groups << " slices; "
         << best.blocks << " blocks of " << best.tiling.warps * 32 << " threads, " << best.shared_bytes
         << " bytes of shared memory, " << best.blocks_per_multiprocessor << " on a multiprocessor; x is copied once; "
         << "about " << static_cast<int64_t>(best.instructions) << " warp instructions; tensor cores";
  } else {
    text << "the smallest strip takes " << least_bytes << " bytes of shared memory, and a block has "
         << device.shared_per_block;
  }
  best.explanation = text.str();
  return best;
}

}  // namespace shufflenet::cuda
