// How a unit is cut into parts, and how threads share them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../kernels/table.h"

namespace shufflenet::cpu {

enum class Sharing {
  whole_parts,  // each thread runs parts of its own, and rows of y1 at a cut are computed by both neighbours
  strips,       // the same, but rows of y1 at a cut are had from the neighbour: the threads wait for each other once
  channels,     // all threads share each phase of a part by channels: they wait for each other in each phase
};

// A unit is cut into so many parts, each some rows of its result.
struct Partition {
  int64_t parts = 1;
  Sharing sharing = Sharing::whole_parts;

  Range rows(const Unit& unit, int64_t part) const {
    return {unit.out_height() * part / parts, unit.out_height() * (part + 1) / parts};
  }
};

// A part's memory stays below this wherever that of a single row does: a share of a core's L2 cache, which also holds
// the weights and the rows of x. Or below what the weights take, which each part reads anew.
inline constexpr int64_t kPartBudget = 544 * 1024;
// A unit that fits twice of that is not cut: parts hand on rows and begin more tiles anew (first unit at 224x224, and
// units of stage 2 at 2x width: 1.12 times as fast as in two parts).
inline constexpr int64_t kWholeBudget = 2 * kPartBudget;
// A strip shared by threads has the whole of its y1 in memory. Beyond this the memory is not worth what it saves.
inline constexpr int64_t kMostStripBytes = 2304 * 1024;
// More parts than the budget asks for are tried, up to so many: beyond it the halo costs more than balance gives.
inline constexpr int64_t kMostExtraParts = 16;
// Costs are counted in multiply-adds of a vector by one core, of which a processor with two AVX-512 FMA units does
// about 5000 in a microsecond. The constants were measured on a 2-core Intel Xeon with AVX-512 and AMX, on 2026-11-24.
// `python -m benchmarks.partition` measures the same on any machine, and writes it beside these values to
// benchmarks/results/partition.md. Threads wait for each other for a quarter of a microsecond.
inline constexpr int64_t kWaitCost = 1250;
// What a thread reads that another has just written comes with 6 GB/s, line by line from many planes.
inline constexpr int64_t kForeignBytesPerCost = 1;
// Where a plane is cut inside a cache line, both threads write to that line, which takes 30 ns to come and go.
inline constexpr int64_t kSharedLineCost = 150;
// In a network of more than one unit, weights come from beyond the L2 cache, with 30 GB/s.
inline constexpr int64_t kWeightBytesPerCost = 6;
inline constexpr int64_t kAccumulatorBytes = 4;  // float32's, which is the type that counts

// Counts what a part of so many rows of the result costs, and of so many rows of y1.
inline int64_t part_cost(const Unit& unit, int64_t in_rows, int64_t rows, int64_t lanes) {
  // A last pixel alone in its vector is cheap: see has_lone_pixel.
  const auto vectors = [lanes](int64_t pixels) { return pixels <= lanes ? 1 : ceil_div(pixels - 1, lanes); };
  const int64_t in_vectors = vectors(in_rows * unit.width), out_vectors = vectors(rows * unit.out_width());
  constexpr int64_t kDepthwiseCost = 2 * 9;  // nine loads bound it, not multiply-adds
  const int64_t shortcut =
      unit.convolves_shortcut() ? unit.in_channels * out_vectors * (kDepthwiseCost + unit.shortcut_channels) : 0;
  return unit.mid_channels *
             (in_vectors * unit.conv1_depth() + out_vectors * (kDepthwiseCost + unit.out_channels / unit.groups)) +
         shortcut;
}

inline int64_t weights_bytes(const Unit& unit) {
  return (unit.mid_channels * (unit.conv1_depth() + unit.out_channels / unit.groups) + unit.shortcut_weights()) *
         kAccumulatorBytes;
}
inline int64_t weights_cost(const Unit& unit) { return weights_bytes(unit) / kWeightBytesPerCost; }

// Counts what a strip's y1 costs, which is not in the memory that all steps use, and so in no cache.
inline int64_t y1_cost(const Unit& unit, int64_t rows) {
  return unit.mid_channels * rows * unit.width * kAccumulatorBytes / kWeightBytesPerCost;
}

// Counts the channels of x that a worker reads and another has written: it has an equal share of the last unit's
// channels, in their order, and of conv1's rows. The one in the middle counts, whose groups are cut at both ends. What
// the first unit of a stage reads has been shared in another way.
inline int64_t foreign_channels(const Unit& unit, int64_t workers) {
  const int64_t own = unit.conv1_channels() / workers, worker = workers / 2;
  if (unit.stride == 2) return unit.in_channels - own;
  const int64_t first_group = unit.conv1_groups * worker / workers;
  const int64_t end_group = ceil_div(unit.conv1_groups * (worker + 1), workers);
  return (end_group - first_group) * unit.conv1_depth() - own;
}

// Chooses the partition that finishes first by that count. `has_strips` says whether the kernel's strips can be used;
// `in_place` that the result takes x's place, so that of parts which read rows around their own there is but one.
inline Partition choose_partition(const Unit& unit, const UnitKernel& kernel, int64_t threads, bool has_strips,
                                  bool in_place) {
  const int64_t lanes = kernel.lanes();
  const auto rows_of = [&](int64_t parts) { return ceil_div(unit.out_height(), parts); };
  const auto with_halo = [&](int64_t rows) { return std::min(unit.height, (rows - 1) * unit.stride + 3); };
  const auto fits = [&](int64_t parts, int64_t budget) {
    const Range rows = {0, rows_of(parts)};
    const int64_t workspace = kernel.workspace_bytes(unit, rows, unit.mid_channels);
    return kernel.buffer_bytes(unit, rows) + workspace <= std::max(budget, weights_bytes(unit));
  };
  int64_t fewest = 1;
  if (!fits(1, kWholeBudget)) {
    while (fewest < unit.out_height() && !fits(fewest, kPartBudget)) ++fewest;
  }
  if (threads == 1) return {fewest, has_strips && fewest > 1 ? Sharing::strips : Sharing::whole_parts};

  Partition best;
  int64_t least = INT64_MAX;
  const auto consider = [&](const Partition& partition, int64_t cost) {
    if (cost >= least) return;
    best = partition;
    least = cost;
  };
  const auto foreign = [](int64_t elements) { return elements * kAccumulatorBytes / kForeignBytesPerCost; };
  const int64_t halo = foreign(unit.width * unit.mid_channels);
  const int64_t rows_a_thread = rows_of(threads);
  const bool only_strips = in_place && fewest > 1 && threads <= unit.out_height();
  if (has_strips && threads <= unit.out_height() &&
      (only_strips || kernel.strip_bytes(unit, {0, rows_a_thread}).y1 <= kMostStripBytes)) {
    // Where a height does not divide, the neighbouring units' strips are others, and the planes stay whole.
    const int64_t whole_planes =
        (unit.height % threads ? unit.in_channels : 0) + (unit.out_height() % threads ? unit.result_channels() : 0);
    consider(
        {threads, Sharing::strips},
        part_cost(unit, std::min(unit.height, rows_a_thread * unit.stride), rows_a_thread, lanes) + weights_cost(unit) +
            kWaitCost + 2 * halo + whole_planes * kSharedLineCost + y1_cost(unit, rows_a_thread * unit.stride));
  }
  if (only_strips) return best;
  if (in_place) fewest = 1;
  const int64_t most = in_place ? 1 : std::min(unit.out_height(), fewest + kMostExtraParts);
  for (int64_t parts = fewest; parts <= most; ++parts) {
    const int64_t rows = rows_of(parts);
    // The halo's rows of x are foreign: four times the channels of y1, at least. No plane is cut into its parts.
    consider({parts, Sharing::whole_parts},
             ceil_div(parts, threads) * part_cost(unit, with_halo(rows), rows, lanes) + weights_cost(unit) + 8 * halo +
                 (parts > 1 ? unit.result_channels() * kSharedLineCost : 0));
  }
  const int64_t workers = std::min(threads, unit.slice_channels());
  // y2 counts by half: that fits the times measured in stage 3, with 1 to 8 groups; x's lines are also written anew, in
  // place, while the other thread has them.
  const int64_t handed_on = foreign_channels(unit, workers) * unit.height * unit.width +
                            unit.mid_channels * (workers - 1) / workers * unit.out_height() * unit.out_width() / 2;
  const int64_t rows = rows_of(fewest);
  consider({fewest, Sharing::channels},
           fewest * (ceil_div(part_cost(unit, with_halo(rows), rows, lanes), workers) + 2 * kWaitCost) +
               weights_cost(unit) / workers + foreign(handed_on));
  return best;
}

}  // namespace shufflenet::cpu
