// What lanes tell each other: PTX ISA, "shfl.sync", "vote.sync", "redux.sync", "activemask".
#pragma once

#include <cstdint>

#include "scalar.h"
#include "warp.h"

namespace ptx {

enum class Shuffle { up, down, bfly, idx };

// shfl.sync d|p, a, b, c, members: c has the last lane that a lane may ask (the first one, for .up) in bits 0 to 4, and
// in bits 8 to 12 those of a lane's number that all lanes of a segment have in common.
template <Shuffle kShuffle>
void shuffle(Warp& warp, const Instruction& x, uint32_t lanes) {
  const bool tells = x.operands.size() == 6;  // whether it found a lane that it may ask
  const Operand* const sources = x.operands.data() + (tells ? 2 : 1);
  uint32_t values[kLanes], inside = 0;
  for_each_lane(lanes, [&](int lane) {
    require_whole(lanes, warp.row<uint32_t>(sources[3])[lane]);
    const int b = static_cast<int>(warp.row<uint32_t>(sources[1])[lane] & 0x1f);
    const int c = static_cast<int>(warp.row<uint32_t>(sources[2])[lane]);
    const int segment = c >> 8 & 0x1f, clamp = c & 0x1f, last = (lane & segment) | (clamp & ~segment);
    int from = 0;
    switch (kShuffle) {
      case Shuffle::up: from = lane - b; break;
      case Shuffle::down: from = lane + b; break;
      case Shuffle::bfly: from = lane ^ b; break;
      case Shuffle::idx: from = (lane & segment) | (b & ~segment);
    }
    const bool found = kShuffle == Shuffle::up ? from >= last : from <= last;
    if (!found) from = lane;
    if (!(lanes >> from & 1)) throw Error("a lane that takes no part is asked for its value");
    values[lane] = warp.row<uint32_t>(sources[0])[from];
    inside |= uint32_t{found} << lane;
  });
  put(warp, x.operands[0], lanes, values);
  if (tells) warp.set_mask(x.operands[1], lanes, inside);
}

enum class Vote { all, any, uni, ballot };

template <Vote kVote>
void vote(Warp& warp, const Instruction& x, uint32_t lanes) {
  for_each_lane(lanes, [&](int lane) { require_whole(lanes, warp.row<uint32_t>(x.operands[2])[lane]); });
  const uint32_t votes = warp.mask(x.operands[1]) & lanes;
  const bool all = votes == lanes, any = votes != 0;
  if (kVote == Vote::ballot) {
    for_each_lane(lanes, [&](int lane) { warp.set_value(x.operands[0], lane, votes); });
  } else {
    const bool answer = kVote == Vote::all ? all : kVote == Vote::any ? any : all || !any;
    warp.set_mask(x.operands[0], lanes, answer ? kAllLanes : 0);
  }
}

template <class F, class T>
void reduce(Warp& warp, const Instruction& x, uint32_t lanes) {
  T result = warp.row<T>(x.operands[1])[__builtin_ctz(lanes)];
  for_each_lane(lanes & (lanes - 1), [&](int lane) { result = F::of(result, warp.row<T>(x.operands[1])[lane]); });
  for_each_lane(lanes, [&](int lane) {
    require_whole(lanes, warp.row<uint32_t>(x.operands[2])[lane]);
    warp.set_value(x.operands[0], lane, static_cast<uint64_t>(result));
  });
}

inline void active_mask(Warp& warp, const Instruction& x, uint32_t lanes) {
  for_each_lane(lanes, [&](int lane) { warp.set_value(x.operands[0], lane, lanes); });
}

}  // namespace ptx
