// Arithmetic, logic and shifts: PTX ISA, "Integer Arithmetic Instructions", "Floating Point Instructions", "Half
// Precision Floating Point Instructions", "Logic and Shift Instructions". Each is a function of a lane's values;
// add_scalar says which opcode it is.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <type_traits>

#include "lanes.h"

namespace ptx {

template <class T>
inline constexpr bool kIsPair = false;
template <class T>
inline constexpr bool kIsPair<Pair<T>> = true;
template <class T>
inline constexpr bool kIsSmallFloat = std::is_same_v<T, Half> || std::is_same_v<T, BFloat>;

// Integers wrap around; unsigned ones do in C++ too.
template <class T>
using wrapping_t = std::conditional_t<std::is_integral_v<T>, uint64_t, T>;

struct Add {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(static_cast<wrapping_t<T>>(a) + static_cast<wrapping_t<T>>(b));
  }
};
struct Subtract {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(static_cast<wrapping_t<T>>(a) - static_cast<wrapping_t<T>>(b));
  }
};
struct Multiply {  // mul.lo of integers
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(static_cast<wrapping_t<T>>(a) * static_cast<wrapping_t<T>>(b));
  }
};
struct Divide {
  template <class T>
  static T of(T a, T b) {
    if constexpr (std::is_integral_v<T>) {
      // Division by zero "yields an unspecified, machine-specific value". What a signed type cannot hold wraps around.
      if (b == 0) return static_cast<T>(-1);
      if (std::is_signed_v<T> && b == static_cast<T>(-1)) return Subtract::of(T{0}, a);
    }
    return a / b;
  }
};
struct Remainder {
  template <class T>
  static T of(T a, T b) {
    if (b == 0) return a;
    return std::is_signed_v<T> && b == static_cast<T>(-1) ? T{0} : static_cast<T>(a % b);
  }
};
// A number and a NaN give the number; +0 is above -0.
template <bool kWantsGreater, bool kKeepsNan>
struct Extreme {
  template <class T>
  static T of(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) {
      if (kKeepsNan && (a != a || b != b)) return std::numeric_limits<T>::quiet_NaN();
      if (a != a) return b;
      if (b != b) return a;
      if (a == b) return std::signbit(a) == kWantsGreater ? b : a;
    }
    return kWantsGreater == (a > b) ? a : b;
  }
};
using Minimum = Extreme<false, false>;
using Maximum = Extreme<true, false>;
using MinimumOrNan = Extreme<false, true>;
using MaximumOrNan = Extreme<true, true>;
struct Negate {
  template <class T>
  static T of(T a) {
    return static_cast<T>(-static_cast<wrapping_t<T>>(a));
  }
};
struct Absolute {
  template <class T>
  static T of(T a) {
    if constexpr (std::is_floating_point_v<T>) return std::abs(a);
    return a < 0 ? Negate::of(a) : a;
  }
};
struct SquareRoot {
  template <class T>
  static T of(T a) {
    return std::sqrt(a);
  }
};
struct Reciprocal {
  template <class T>
  static T of(T a) {
    return 1 / a;
  }
};

// Sums and products of 16-bit numbers are rounded twice, once to float, which has more than twice their digits and so
// changes nothing.
template <class F, class T>
T unary(T a) {
  if constexpr (kIsPair<T>) {
    return {unary<F>(a.low), unary<F>(a.high)};
  } else if constexpr (kIsSmallFloat<T>) {
    return narrow<T>(F::of(widen(a)));
  } else {
    return F::of(a);
  }
}
template <class F, class T>
T binary(T a, T b) {
  if constexpr (kIsPair<T>) {
    return {binary<F>(a.low, b.low), binary<F>(a.high, b.high)};
  } else if constexpr (kIsSmallFloat<T>) {
    return narrow<T>(F::of(widen(a), widen(b)));
  } else {
    return F::of(a, b);
  }
}

// fma.rn{.relu}.
template <class T>
T multiply_add(T a, T b, T c) {
  if constexpr (kIsPair<T>) {
    return {multiply_add(a.low, b.low, c.low), multiply_add(a.high, b.high, c.high)};
  } else if constexpr (kIsSmallFloat<T>) {
    return narrow<T>(odd_multiply_add(widen(a), widen(b), widen(c)));
  } else {
    return std::fma(a, b, c);
  }
}
// .relu: a negative result becomes 0; a NaN stays one.
template <class T>
T relu(T a) {
  return binary<MaximumOrNan>(a, T{});
}
template <class T>
T multiply_add_relu(T a, T b, T c) {
  return relu(multiply_add(a, b, c));
}
// mad.lo.
template <class T>
T multiply_low_add(T a, T b, T c) {
  return Add::of(Multiply::of(a, b), c);
}
// mul.wide, mad.wide: the whole product of integers, which has twice their bits.
template <class W, class T>
W multiply_wide(T a, T b) {
  return Multiply::of(static_cast<W>(a), static_cast<W>(b));
}
template <class W, class T>
W multiply_wide_add(T a, T b, W c) {
  return Add::of(multiply_wide<W>(a, b), c);
}
// mul.hi: its upper half.
template <class T>
T multiply_high(T a, T b) {
  using W = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>(static_cast<W>(a) * static_cast<W>(b) >> 8 * sizeof(T));
}
template <class T>
T multiply_high_add(T a, T b, T c) {
  return Add::of(multiply_high(a, b), c);
}

// selp.
template <class T>
T select(T a, T b, bool first) {
  return first ? a : b;
}

// ---- Logic and shifts -----------------------------------------------------------------------------------------------

struct And {
  template <class T>
  static T of(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T of(T a, T b) {
    return a | b;
  }
};
struct ExclusiveOr {
  template <class T>
  static T of(T a, T b) {
    return a ^ b;
  }
};
template <class T>
T complement(T a) {
  if constexpr (std::is_same_v<T, bool>) {
    return !a;
  } else {
    return static_cast<T>(~a);
  }
}
template <class T>
T move(T a) {
  return a;
}

// "Shift amounts greater than the register width N are clamped to N."
template <class T>
T shift_left(T a, uint32_t n) {
  return n >= 8 * sizeof(T) ? T{0} : static_cast<T>(static_cast<uint64_t>(a) << n);
}
template <class T>
T shift_right(T a, uint32_t n) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  if (n >= kBits) return a < 0 ? static_cast<T>(-1) : T{0};
  return static_cast<T>(a >> n);
}

// shf: 32 bits of the 64 whose lower half is a and whose upper half is b. .wrap takes n modulo 32, .clamp at most 32.
template <bool kClamps>
uint32_t funnel_amount(uint32_t n) {
  return kClamps ? std::min(n, 32u) : n % 32;
}
template <bool kClamps>
uint32_t funnel_left(uint32_t a, uint32_t b, uint32_t n) {
  return static_cast<uint32_t>(((uint64_t{b} << 32 | a) << funnel_amount<kClamps>(n)) >> 32);
}
template <bool kClamps>
uint32_t funnel_right(uint32_t a, uint32_t b, uint32_t n) {
  return static_cast<uint32_t>((uint64_t{b} << 32 | a) >> funnel_amount<kClamps>(n));
}

// lop3: bit (4 a + 2 b + c) of the table, for every bit of the operands.
inline uint32_t logic3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (uint32_t i = 0; i < 8; ++i) {
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return result;
}

// prmt: each of four bytes is one of the eight of {b, a}; bit 3 of its selector asks for eight copies of its sign.
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t selector = selectors >> 4 * i & 0xf;
    uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (selector & 7)) & 0xff;
    if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}

// The lowest `length` bits of a type.
template <class T>
T low_bits(uint32_t length) {
  return length >= 8 * sizeof(T) ? static_cast<T>(~T{0}) : static_cast<T>((T{1} << length) - 1);
}
// bfe: `length` bits from bit `position` on. Of a signed type, what is above them repeats the last one (or the
// operand's sign, where the field reaches beyond the operand).
template <class T>
T extract_bits(T a, uint32_t position, uint32_t length) {
  using U = std::make_unsigned_t<T>;
  constexpr uint32_t kBits = 8 * sizeof(T);
  position &= 0xff, length &= 0xff;
  if (length == 0) return 0;
  const uint32_t last = std::min(position + length - 1, kBits - 1);
  const bool fill = std::is_signed_v<T> && static_cast<U>(a) >> last & 1;
  if (position >= kBits) return static_cast<T>(fill ? ~U{0} : U{0});
  const U kept = low_bits<U>(last - position + 1);
  return static_cast<T>((static_cast<U>(a) >> position & kept) | (fill ? ~kept : U{0}));
}
// bfi: b with `length` bits of it, from bit `position` on, replaced by the lowest ones of a.
template <class T>
T insert_bits(T a, T b, uint32_t position, uint32_t length) {
  position &= 0xff, length &= 0xff;
  if (position >= 8 * sizeof(T)) return b;
  const T kept = low_bits<T>(length);
  return (b & ~(kept << position)) | (a & kept) << position;
}
template <class T>
uint32_t count_ones(T a) {
  return static_cast<uint32_t>(__builtin_popcountll(a));
}
template <class T>
uint32_t count_leading_zeros(T a) {
  return a == 0 ? 8 * sizeof(T) : static_cast<uint32_t>(__builtin_clzll(a)) - (64 - 8 * sizeof(T));
}
inline uint32_t reverse_bits(uint32_t a) {
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) result |= (a >> i & 1) << (31 - i);
  return result;
}

// ---- The opcodes ----------------------------------------------------------------------------------------------------

template <class T>
void add_integer(Operations& to, const std::string& type) {
  add(to, type,
      {{"add.", kOperation<binary<Add, T>>},
       {"sub.", kOperation<binary<Subtract, T>>},
       {"mul.lo.", kOperation<binary<Multiply, T>>},
       {"mad.lo.", kOperation<multiply_low_add<T>>},
       {"min.", kOperation<binary<Minimum, T>>},
       {"max.", kOperation<binary<Maximum, T>>},
       {"shr.", kOperation<shift_right<T>>},
       {"mov.", kOperation<move<T>>},
       {"selp.", kOperation<select<T>>}});
  if constexpr (sizeof(T) >= 4) {
    add(to, type,
        {{"div.", kOperation<binary<Divide, T>>},
         {"rem.", kOperation<binary<Remainder, T>>},
         {"mul.hi.", kOperation<multiply_high<T>>},
         {"mad.hi.", kOperation<multiply_high_add<T>>},
         {"bfe.", kOperation<extract_bits<T>>}});
  }
  if constexpr (std::is_signed_v<T>) {
    add(to, type, {{"neg.", kOperation<unary<Negate, T>>}, {"abs.", kOperation<unary<Absolute, T>>}});
  }
}
template <class W, class T>
void add_wide(Operations& to, const std::string& type) {
  add(to, type, {{"mul.wide.", kOperation<multiply_wide<W, T>>}, {"mad.wide.", kOperation<multiply_wide_add<W, T>>}});
}

template <class T>
void add_bits(Operations& to, const std::string& type) {
  add(to, type,
      {{"and.", kOperation<binary<And, T>>},
       {"or.", kOperation<binary<Or, T>>},
       {"xor.", kOperation<binary<ExclusiveOr, T>>},
       {"not.", kOperation<complement<T>>},
       {"mov.", kOperation<move<T>>}});
  if constexpr (!std::is_same_v<T, bool>) {
    add(to, type,
        {{"shl.", kOperation<shift_left<T>>}, {"shr.", kOperation<shift_right<T>>}, {"selp.", kOperation<select<T>>}});
  }
  if constexpr (sizeof(T) >= 4) {
    add(to, type,
        {{"bfi.", kOperation<insert_bits<T>>},
         {"popc.", kOperation<count_ones<T>>},
         {"clz.", kOperation<count_leading_zeros<T>>}});
  }
}

// What floats of all sizes have. Where no rounding is named, .rn is meant.
template <class T>
void add_any_float(Operations& to, const std::string& type) {
  add(to, type,
      {{"add.", kOperation<binary<Add, T>>},
       {"add.rn.", kOperation<binary<Add, T>>},
       {"sub.", kOperation<binary<Subtract, T>>},
       {"sub.rn.", kOperation<binary<Subtract, T>>},
       {"mul.", kOperation<binary<Multiply, T>>},
       {"mul.rn.", kOperation<binary<Multiply, T>>},
       {"fma.rn.", kOperation<multiply_add<T>>},
       {"min.", kOperation<binary<Minimum, T>>},
       {"max.", kOperation<binary<Maximum, T>>},
       {"neg.", kOperation<unary<Negate, T>>},
       {"abs.", kOperation<unary<Absolute, T>>}});
}
template <class T>
void add_float(Operations& to, const std::string& type) {
  add_any_float<T>(to, type);
  add(to, type,
      {{"div.rn.", kOperation<binary<Divide, T>>},
       {"sqrt.rn.", kOperation<unary<SquareRoot, T>>},
       {"rcp.rn.", kOperation<unary<Reciprocal, T>>},
       {"mov.", kOperation<move<T>>},
       {"selp.", kOperation<select<T>>}});
}
// "Half Precision Floating Point Instructions".
template <class T>
void add_small_float(Operations& to, const std::string& type) {
  add_any_float<T>(to, type);
  add(to, type,
      {{"fma.rn.relu.", kOperation<multiply_add_relu<T>>},
       {"min.NaN.", kOperation<binary<MinimumOrNan, T>>},
       {"max.NaN.", kOperation<binary<MaximumOrNan, T>>}});
}

inline void add_scalar(Operations& to) {
  add_integer<int16_t>(to, "s16");
  add_integer<uint16_t>(to, "u16");
  add_integer<int32_t>(to, "s32");
  add_integer<uint32_t>(to, "u32");
  add_integer<int64_t>(to, "s64");
  add_integer<uint64_t>(to, "u64");
  add_wide<int32_t, int16_t>(to, "s16");
  add_wide<uint32_t, uint16_t>(to, "u16");
  add_wide<int64_t, int32_t>(to, "s32");
  add_wide<uint64_t, uint32_t>(to, "u32");
  add_bits<bool>(to, "pred");
  add_bits<uint16_t>(to, "b16");
  add_bits<uint32_t>(to, "b32");
  add_bits<uint64_t>(to, "b64");
  add_float<float>(to, "f32");
  add_float<double>(to, "f64");
  add_small_float<Half>(to, "f16");
  add_small_float<BFloat>(to, "bf16");
  add_small_float<Pair<Half>>(to, "f16x2");
  add_small_float<Pair<BFloat>>(to, "bf16x2");
  add(to, "f32",
      {{"min.NaN.", kOperation<binary<MinimumOrNan, float>>}, {"max.NaN.", kOperation<binary<MaximumOrNan, float>>}});
  add(to, "b32",
      {{"shf.l.wrap.", kOperation<funnel_left<false>>},
       {"shf.l.clamp.", kOperation<funnel_left<true>>},
       {"shf.r.wrap.", kOperation<funnel_right<false>>},
       {"shf.r.clamp.", kOperation<funnel_right<true>>},
       {"lop3.", kOperation<logic3>},
       {"prmt.", kOperation<permute>},
       {"brev.", kOperation<reverse_bits>}});
}

}  // namespace ptx
