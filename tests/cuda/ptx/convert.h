// Conversions: PTX ISA, "cvt", and "cvta" of addresses.
#pragma once

#include <cmath>
#include <limits>
#include <string>

#include "scalar.h"

namespace ptx {

template <class D, class S>
D convert(S a) {
  if constexpr (std::is_integral_v<S> || (std::is_floating_point_v<S> && std::is_floating_point_v<D>)) {
    return static_cast<D>(a);  // integers are cut or extended; C++ rounds to the nearest float, as .rn does
  } else {
    return static_cast<D>(widen(a));
  }
}

// .rn{.relu} to 16 bits. From a double, too, it rounds once.
template <class D, class S, bool kRelu = false>
D round_small(S a) {
  const D result = narrow<D>(std::is_same_v<S, double> ? to_odd_float(a) : static_cast<float>(a));
  return kRelu ? relu(result) : result;
}
// Two numbers to 16 bits each: the first operand becomes the upper half.
template <class D, bool kRelu>
Pair<D> round_pair(float high, float low) {
  return {round_small<D, float, kRelu>(low), round_small<D, float, kRelu>(high)};
}

// To an integer: .rni to the nearest, .rzi towards zero, .rmi down, .rpi up. What is out of range becomes the nearest
// integer that there is, and NaN becomes 0.
enum class ToInteger { rni, rzi, rmi, rpi };
template <class D, class S, ToInteger kRounding>
D round_to_integer(S a) {
  if (a != a) return std::is_integral_v<D> ? 0 : static_cast<D>(a);
  const S rounded =
      kRounding == ToInteger::rni   ? std::nearbyint(a)
      : kRounding == ToInteger::rzi ? std::trunc(a)
      : kRounding == ToInteger::rmi ? std::floor(a)
                                    : std::ceil(a);
  if constexpr (std::is_integral_v<D>) {
    if (rounded <= static_cast<S>(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
    if (rounded >= static_cast<S>(std::numeric_limits<D>::max())) return std::numeric_limits<D>::max();
  }
  return static_cast<D>(rounded);
}

// .sat: to between 0 and 1, and NaN to 0.
inline float saturate(float a) { return a > 0 ? (a < 1 ? a : 1) : 0; }

// Windows of generic addresses in which shared memory and the parameters appear. Others are addresses of global memory.
inline constexpr uint64_t kSharedWindow = uint64_t{1} << 60, kParameterWindow = uint64_t{1} << 61;
template <uint64_t kWindow>
uint64_t to_generic(uint64_t a) {
  return a + kWindow;
}
template <uint64_t kWindow>
uint64_t from_generic(uint64_t a) {
  return a - kWindow;
}

template <class D, class S>
void add_float_to_integer(Operations& to, const std::string& types) {
  add(to, types,
      {{"cvt.rni.", kConversion<round_to_integer<D, S, ToInteger::rni>>},
       {"cvt.rzi.", kConversion<round_to_integer<D, S, ToInteger::rzi>>},
       {"cvt.rmi.", kConversion<round_to_integer<D, S, ToInteger::rmi>>},
       {"cvt.rpi.", kConversion<round_to_integer<D, S, ToInteger::rpi>>}});
}
template <class S>
void add_integer_to_float(Operations& to, const std::string& type) {
  add(to, type, {{"cvt.rn.f32.", kConversion<convert<float, S>>}, {"cvt.rn.f64.", kConversion<convert<double, S>>}});
}
template <class D>
void add_small_conversions(Operations& to, const std::string& type) {
  add(to, type, {{"cvt.f32.", kConversion<convert<float, D>>}, {"cvt.f64.", kConversion<convert<double, D>>}});
  add(to, type + ".f32",
      {{"cvt.rn.", kConversion<round_small<D, float>>}, {"cvt.rn.relu.", kConversion<round_small<D, float, true>>}});
  add(to, type + ".f64", {{"cvt.rn.", kConversion<round_small<D, double>>}});
  add(to, type + "x2.f32",
      {{"cvt.rn.", kConversion<round_pair<D, false>>}, {"cvt.rn.relu.", kConversion<round_pair<D, true>>}});
}

inline void add_conversions(Operations& to) {
  add_float_to_integer<int32_t, float>(to, "s32.f32");
  add_float_to_integer<uint32_t, float>(to, "u32.f32");
  add_float_to_integer<int64_t, double>(to, "s64.f64");
  add_float_to_integer<float, float>(to, "f32.f32");
  add_integer_to_float<int32_t>(to, "s32");
  add_integer_to_float<uint32_t>(to, "u32");
  add_integer_to_float<int64_t>(to, "s64");
  add_integer_to_float<uint64_t>(to, "u64");
  add_small_conversions<Half>(to, "f16");
  add_small_conversions<BFloat>(to, "bf16");
  add(to, "f32",
      {{"cvt.f64.", kConversion<convert<double, float>>},
       {"cvt.sat.f32.", kConversion<saturate>},
       {"cvt.rna.tf32.", kConversion<round_to_tf32>}});
  add(to, "f64", {{"cvt.rn.f32.", kConversion<convert<float, double>>}});
  add(to, "u64",
      {{"cvta.global.", kOperation<move<uint64_t>>},
       {"cvta.to.global.", kOperation<move<uint64_t>>},
       {"cvta.shared.", kOperation<to_generic<kSharedWindow>>},
       {"cvta.to.shared.", kOperation<from_generic<kSharedWindow>>},
       {"cvta.param.", kOperation<to_generic<kParameterWindow>>},
       {"cvta.to.param.", kOperation<from_generic<kParameterWindow>>}});
}

// cvt between integers: cuts a value, or extends it by the sign of the type that it comes from.
inline uint64_t cut(uint64_t value, int bytes, bool is_signed) {
  const int unused = 64 - 8 * bytes;
  return is_signed ? static_cast<uint64_t>(static_cast<int64_t>(value << unused) >> unused) : value << unused >> unused;
}
inline void convert_integer(Warp& warp, const Instruction& x, uint32_t lanes) {
  for_each_lane(lanes, [&](int lane) {
    const uint64_t value = cut(warp.value(x.operands[1], lane), x.bytes, x.is_signed);
    warp.set_value(x.operands[0], lane, cut(value, x.result_bytes, x.result_is_signed));
  });
}

}  // namespace ptx
