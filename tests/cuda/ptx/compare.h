// Comparisons: PTX ISA, "setp".
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "lanes.h"

namespace ptx {

// How two values can be to each other. A comparison says for which of these it holds.
enum Outcome { kLess = 1, kEqual = 2, kGreater = 4, kUnordered = 8 };  // unordered: one of them is NaN

inline int outcomes_of(const std::string& comparison) {
  static const std::map<std::string, int> outcomes = {
      {"lt", kLess},
      {"le", kLess | kEqual},
      {"gt", kGreater},
      {"ge", kGreater | kEqual},
      {"eq", kEqual},
      {"ne", kLess | kGreater},
      {"lo", kLess},
      {"ls", kLess | kEqual},
      {"hi", kGreater},
      {"hs", kGreater | kEqual},
      {"ltu", kLess | kUnordered},
      {"leu", kLess | kEqual | kUnordered},
      {"gtu", kGreater | kUnordered},
      {"geu", kGreater | kEqual | kUnordered},
      {"equ", kEqual | kUnordered},
      {"neu", kLess | kGreater | kUnordered},
      {"num", kLess | kEqual | kGreater},
      {"nan", kUnordered}};
  const auto found = outcomes.find(comparison);
  if (found == outcomes.end()) throw Error("a comparison that is not known");
  return found->second;
}

inline uint32_t combined(Combine combine, uint32_t a, uint32_t b) {
  return combine == Combine::none       ? a
         : combine == Combine::with_and ? a & b
         : combine == Combine::with_or  ? a | b
                                        : a ^ b;
}

template <class T>
auto comparable(T value) {
  if constexpr (std::is_arithmetic_v<T>) {
    return value;
  } else {
    return widen(value);
  }
}

// setp.comparison{.and, .or, .xor}.type p, a, b {, c}.
template <class T>
void compare(Warp& warp, const Instruction& x, uint32_t lanes) {
  const Values<T> a(warp, x.operands[1]), b(warp, x.operands[2]);
  uint32_t less = 0, equal = 0, greater = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto one = comparable(a[lane]), other = comparable(b[lane]);
    less |= uint32_t{one < other} << lane;
    equal |= uint32_t{one == other} << lane;
    greater |= uint32_t{one > other} << lane;
  }
  const uint32_t holds =
      (x.outcomes & kLess ? less : 0) | (x.outcomes & kEqual ? equal : 0) | (x.outcomes & kGreater ? greater : 0) |
      (x.outcomes & kUnordered ? ~(less | equal | greater) : 0);
  const uint32_t other = x.combine == Combine::none ? 0 : warp.mask(x.operands[3]);
  warp.set_mask(x.operands[0], lanes, combined(x.combine, holds, other));
}

inline const std::map<std::string, Execute>& comparisons() {
  static const std::map<std::string, Execute> by_type = {
      {"s16", compare<int16_t>},  {"u16", compare<uint16_t>}, {"b16", compare<uint16_t>}, {"s32", compare<int32_t>},
      {"u32", compare<uint32_t>}, {"b32", compare<uint32_t>}, {"s64", compare<int64_t>},  {"u64", compare<uint64_t>},
      {"b64", compare<uint64_t>}, {"f16", compare<Half>},     {"bf16", compare<BFloat>},  {"f32", compare<float>},
      {"f64", compare<double>}};
  return by_type;
}

}  // namespace ptx
