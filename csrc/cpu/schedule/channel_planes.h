// The names of planes: where the channels of an image are in a program of ShuffleNet v2, on planes of floats.
#pragma once

#include <numeric>

#include "memory.h"

namespace shufflenet::cpu {

// Splitting channels, joining and shuffling them moves none: a unit reads the planes of one half and overwrites them,
// and what changes is which plane a channel is in. That is settled here, when a program's steps are made.
class ChannelPlanes {
 public:
  // Those of an image whose channels are in their order.
  ChannelPlanes(int64_t channels, CallMemory& memory) : memory_(memory), planes_(in_order(channels)) {}

  // The plane of each channel.
  const int64_t* planes() const { return planes_; }

  // Tells the unit where its channels are, and goes on to those of its result.
  void go_through(const Unit& unit, UnitPointers& pointers) {
    const int64_t* const split = shuffled(planes_, unit.in_channels, unit.split_groups);
    pointers.x_planes = split + unit.conv1_first();
    const int64_t* joined = split;
    if (unit.passes_half()) {
      pointers.conv3_planes = pointers.x_planes;
    } else {
      joined = in_order(unit.result_channels());
      pointers.shortcut_planes = joined;
      pointers.conv3_planes = joined + unit.shortcut_channels;
    }
    planes_ = shuffled(joined, unit.result_channels(), unit.join_groups);
  }

 private:
  const int64_t* in_order(int64_t channels) {
    int64_t* const planes = memory_.array<int64_t>(channels);
    std::iota(planes, planes + channels, int64_t{0});
    return planes;
  }

  const int64_t* shuffled(const int64_t* planes, int64_t channels, int64_t groups) {
    if (groups == 1) return planes;
    int64_t* const result = memory_.array<int64_t>(channels);
    const int64_t rows = channels / groups;
    for (int64_t row = 0, c = 0; row < rows; ++row) {
      for (int64_t group = 0; group < groups; ++group) result[c++] = planes[group * rows + row];
    }
    return result;
  }

  CallMemory& memory_;
  const int64_t* planes_;
};

}  // namespace shufflenet::cpu
