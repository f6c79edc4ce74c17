// How a unit is cut into Parts and shared by the threads: a part is a strip of rows, and either each thread
// runs parts of its own (the rows at a cut are computed by both neighbours), or all share each part's phases by
// channels (nothing is computed twice, but they wait for each other).
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace shufflenet::cpu {

struct Partition {
  int64_t strips = 1;
  int64_t workers_per_part = 1;

  Part part(const Unit& unit, int64_t strip) const {
    return {unit.out_height() * strip / strips, unit.out_height() * (strip + 1) / strips};
  }
};

// A part's memory stays below this wherever a strip of one row does: a share of a core's L2 cache, which also holds the
// weights and the rows of x.
inline constexpr int64_t kScratchBudget = 768 * 1024;
// Strips shorter than the budget asks for are tried up to this many: beyond it the halo costs more than balance gives.
inline constexpr int64_t kMostExtraStrips = 16;
// What sharing a part costs, in the unit of part_cost, of which a processor with two AVX-512 FMA units does about 5000
// in a microsecond: the phases' barriers, half a microsecond, and what threads read that others wrote, 20 GB/s.
inline constexpr int64_t kSharingCost = 2500;
inline constexpr int64_t kSharedBytesPerCost = 4;
inline constexpr int64_t kAccumulatorBytes = 4;  // float32's, which is the type that counts

// Multiply-adds of a part, halo included, in whole vectors.
inline int64_t part_cost(const Unit& unit, int64_t strips, int64_t lanes) {
  const int64_t rows = ceil_div(unit.out_height(), strips);
  const int64_t in_rows = std::min(unit.height, (rows - 1) * unit.stride + 3);
  const int64_t in_vectors = ceil_div(in_rows * unit.width, lanes);
  const int64_t out_vectors = ceil_div(rows * unit.out_width(), lanes);
  constexpr int64_t kDepthwiseCost = 2 * 9;  // loads bound it, not multiply-adds
  return unit.mid_channels *
         (in_vectors * unit.conv1_depth() + out_vectors * (kDepthwiseCost + unit.out_channels / unit.groups));
}

// The partition that finishes first by that count, the coarser of two equal ones.
inline Partition choose_partition(const Unit& unit, const UnitKernel& kernel, int64_t lanes, int64_t threads) {
  const auto fits = [&](int64_t strips) {
    const Part strip = {0, ceil_div(unit.out_height(), strips)};
    const int64_t scratch = kernel.scratch_bytes(unit, strip, {0, unit.mid_channels});
    return kernel.buffer_bytes(unit, strip) + scratch <= kScratchBudget;
  };
  int64_t fewest = 1;
  while (fewest < unit.out_height() && !fits(fewest)) ++fewest;

  Partition best = {fewest, 1};
  if (threads == 1) return best;
  int64_t best_time = INT64_MAX;
  const int64_t most = std::min(unit.out_height(), fewest + kMostExtraStrips);
  for (int64_t strips = fewest; strips <= most; ++strips) {
    const int64_t time = ceil_div(strips, threads) * part_cost(unit, strips, lanes);
    if (time < best_time) {
      best = {strips, 1};
      best_time = time;
    }
  }
  const int64_t workers = std::min(threads, unit.slice_channels());
  const int64_t handed_on = unit.in_channels * unit.height * unit.width +
                            unit.mid_channels * unit.out_height() * unit.out_width();  // elements of x and y2
  const int64_t foreign_bytes = handed_on * kAccumulatorBytes * (workers - 1) / workers;
  const int64_t shared_time = ceil_div(fewest * part_cost(unit, fewest, lanes), workers) + fewest * kSharingCost +
                              foreign_bytes / kSharedBytesPerCost;
  return shared_time < best_time ? Partition{fewest, workers} : best;
}

}  // namespace shufflenet::cpu
