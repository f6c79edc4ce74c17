// How a unit is cut into Parts for the threads: by image, then into strips of rows (the rows at a cut are computed by
// both neighbours) or into slices (nothing is computed twice, but there are few, and each reads all of x).
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace shufflenet::cpu {

struct Partition {
  int64_t strips = 1;
  int64_t slice_parts = 1;

  int64_t parts(const Unit& unit) const { return unit.batch * strips * slice_parts; }

  Part part(const Unit& unit, int64_t index) const {
    const int64_t slice_part = index % slice_parts;
    const int64_t strip = index / slice_parts % strips;
    return {index / (slice_parts * strips), unit.out_height() * strip / strips,
            unit.out_height() * (strip + 1) / strips, unit.groups * slice_part / slice_parts,
            unit.groups * (slice_part + 1) / slice_parts};
  }
};

// A part's scratch memory stays below this wherever a strip of one row does: a share of the L2 cache, which also holds
// the weights and the rows of x.
inline constexpr int64_t kScratchBudget = 512 * 1024;
// Strips shorter than the budget asks for are tried up to this many: beyond it the halo costs more than balance gives.
inline constexpr int64_t kMostExtraStrips = 16;

// Multiply-adds of the largest part, halo included, in whole vectors.
inline int64_t part_cost(const Unit& unit, const Partition& partition, int64_t lanes) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t rows = ceil_div(unit.out_height(), partition.strips);
  const int64_t in_rows = std::min(unit.height, (rows - 1) * unit.stride + (partition.strips == 1 ? 1 : 3));
  const int64_t slices = ceil_div(unit.groups, partition.slice_parts);
  const int64_t channels = slices * unit.slice_channels();
  const int64_t in_vectors = ceil_div(in_rows * unit.width, lanes);
  const int64_t out_vectors = ceil_div(rows * unit.out_width(), lanes);
  return in_vectors * channels * unit.conv1_depth() +
         out_vectors * channels * (2 * 9 + unit.out_channels / unit.groups);
}

// The partition whose slowest thread finishes first by that count, the coarser of two equal ones.
inline Partition choose_partition(const Unit& unit, const UnitKernel& kernel, int64_t lanes, int64_t threads) {
  const auto fits = [&](int64_t strips) {
    const Part strip = {0, 0, (unit.out_height() + strips - 1) / strips, 0, unit.groups};
    return kernel.scratch_bytes(unit, strip) <= kScratchBudget;
  };
  int64_t fewest = 1;
  while (fewest < unit.out_height() && !fits(fewest)) ++fewest;

  Partition best = {fewest, 1};
  if (threads == 1) return best;
  int64_t best_time = INT64_MAX;
  const int64_t most = std::min(unit.out_height(), fewest + kMostExtraStrips);
  for (int64_t strips = fewest; strips <= most; ++strips) {
    for (int64_t slice_parts = 1; slice_parts <= std::min(unit.groups, threads); ++slice_parts) {
      const Partition candidate = {strips, slice_parts};
      const int64_t rounds = (candidate.parts(unit) + threads - 1) / threads;
      const int64_t time = rounds * part_cost(unit, candidate, lanes);
      if (time < best_time) {
        best = candidate;
        best_time = time;
      }
    }
  }
  return best;
}

}  // namespace shufflenet::cpu
