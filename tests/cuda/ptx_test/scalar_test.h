// Each opcode that is a function of a lane's values, against plain C++, on random values and on those at which it could
// go wrong.
#pragma once

#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <type_traits>
#include <utility>

#include "kernel.h"

namespace ptx_test {

inline std::set<std::string> tested;  // opcodes

// Numbers of 16 bits. The test rounds by the definition: a multiple of the last place, the even one of two that are as
// near, in the long doubles of x86, which hold every sum of the tests exactly.
template <int kDigits, int kLeast>
struct Small {
  uint16_t bits;
  static Small of(long double value) {
    if (std::isnan(value)) return {0x7fff};
    constexpr int kBiased = 1 - kLeast, kMantissa = kDigits - 1;
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const int exponent = value == 0 || std::isinf(value) ? kLeast : std::max(kLeast, std::ilogb(value));
    const long double place = std::ldexp(1.0L, exponent - kMantissa);
    const long double rounded = std::nearbyint(std::abs(value) / place);  // the sum's mantissa, as an integer
    if (std::isinf(value) || rounded * place >= std::ldexp(1.0L, kBiased + 1)) {
      return {static_cast<uint16_t>(sign | (2 * kBiased + 1) << kMantissa)};
    }
    const auto mantissa = static_cast<int64_t>(rounded);
    // A mantissa of kDigits digits counts once more in the exponent's field.
    return {static_cast<uint16_t>(sign | (((exponent - kLeast) << kMantissa) + mantissa))};
  }
  operator long double() const {
    constexpr int kMantissa = kDigits - 1;
    const int field = (bits & 0x7fff) >> kMantissa, mantissa = bits & ((1 << kMantissa) - 1);
    const long double sign = bits & 0x8000 ? -1 : 1;
    if (field == 2 * (1 - kLeast) + 1) return mantissa ? NAN : sign * static_cast<long double>(INFINITY);
    const int whole = field ? mantissa | 1 << kMantissa : mantissa;
    return sign * std::ldexp(static_cast<long double>(whole), std::max(field, 1) - 1 + kLeast - kMantissa);
  }
};
using F16 = Small<11, -14>;
using BF16 = Small<8, -126>;
template <class T>
struct Two {
  T low, high;
};

template <class T>
inline constexpr bool kIsSmall = std::is_same_v<T, F16> || std::is_same_v<T, BF16>;
template <class T>
inline constexpr bool kIsTwo = false;
template <class T>
inline constexpr bool kIsTwo<Two<T>> = true;

// What the test knows of a type: how PTX names its registers, how to draw a value, and when two are the same.
struct Type {
  const char* registers;
  int bits;
  uint64_t (*any)(std::mt19937_64&);
  bool (*same)(uint64_t, uint64_t);
};

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
template <class T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  return bits;
}

// A value of every kind that a type has.
template <class T>
T any_value(std::mt19937_64& random) {
  const uint64_t bits = random();
  const int kind = static_cast<int>(random() % 8);
  if constexpr (std::is_same_v<T, bool>) {
    return bits & 1;
  } else if constexpr (kIsTwo<T>) {
    return {any_value<decltype(T::low)>(random), any_value<decltype(T::high)>(random)};
  } else if constexpr (std::is_integral_v<T>) {
    const T edges[] = {
        0, 1, static_cast<T>(-1), std::numeric_limits<T>::min(), std::numeric_limits<T>::max(), 31, 32, 33};
    return kind < 3 ? edges[bits % 8] : kind < 5 ? static_cast<T>(bits % 80) : static_cast<T>(bits);
  } else {
    const long double edges[] = {0.0L, -0.0L, 1.0L, -1.0L, INFINITY, -INFINITY, NAN, 0.5L, -1.5L, 2.5L};
    const long double plain =
        std::ldexp(static_cast<long double>(static_cast<int64_t>(bits)), static_cast<int>(random() % 9) - 63);
    const long double value = kind < 2 ? edges[bits % 10] : plain;
    if constexpr (kIsSmall<T>) {
      // Sums and products of bfloat16 are exact in long double while exponents are near each other.
      return kind == 7 && std::is_same_v<T, F16> ? from_bits<T>(bits) : T::of(value);
    } else {
      return kind == 7 ? from_bits<T>(bits) : static_cast<T>(value);
    }
  }
}

// Equal bits, or NaN both.
template <class T>
bool same(uint64_t a, uint64_t b) {
  if constexpr (std::is_floating_point_v<T>) {
    return a == b || (from_bits<T>(a) != from_bits<T>(a) && from_bits<T>(b) != from_bits<T>(b));
  } else if constexpr (kIsSmall<T>) {
    const auto is_nan = [](uint64_t bits) { return std::isnan(static_cast<long double>(from_bits<T>(bits))); };
    return a == b || (is_nan(a) && is_nan(b));
  } else if constexpr (kIsTwo<T>) {
    return same<decltype(T::low)>(a & 0xffff, b & 0xffff) && same<decltype(T::low)>(a >> 16, b >> 16);
  } else {
    return a == b;
  }
}

template <class T>
const Type* type_of() {
  static const Type type = {
      std::is_same_v<T, bool> ? ".pred"
      : sizeof(T) == 2        ? ".b16"
      : sizeof(T) == 4        ? ".b32"
                              : ".b64",
      8 * sizeof(T), [](std::mt19937_64& random) { return to_bits(any_value<T>(random)); }, same<T>};
  return &type;
}

using Expected = std::function<uint64_t(const uint64_t* operands)>;

// Compares an opcode with what is expected, for 2048 sets of operands.
inline void compare_with(const std::string& opcode, const Type& result, const std::vector<const Type*>& operands,
                         const Expected& expected) {
  constexpr int kThreads = 1024, kRounds = 2;
  tested.insert(opcode);
  std::mt19937_64 random(std::hash<std::string>()(opcode));
  const size_t n = operands.size();
  std::string body = ".reg .b16 %one;\n.reg .b64 %a, %b;\nmad.wide.u32 %a, %t, " + std::to_string(8 * n) +
                     ", %in;\nmad.wide.u32 %b, %t, 8, %out;\n.reg " + result.registers + " %r;\n";
  std::string call = opcode + " %r";
  for (size_t i = 0; i < n; ++i) {
    const std::string name = "%s" + std::to_string(i), from = "[%a+" + std::to_string(8 * i) + "];\n";
    body += std::string(".reg ") + operands[i]->registers + " " + name + ";\n";
    body += operands[i]->bits == 8 ? "ld.global.u8 %one, " + from + "setp.ne.s16 " + name + ", %one, 0;\n"
                                   : "ld.global.b" + std::to_string(operands[i]->bits) + " " + name + ", " + from;
    call += ", " + name;
  }
  body += call + ";\n";
  body += result.bits == 8 ? "selp.b16 %one, 1, 0, %r;\nst.global.u8 [%b], %one;"
                           : "st.global.b" + std::to_string(result.bits) + " [%b], %r;";
  for (int round = 0; round < kRounds; ++round) {
    std::vector<uint64_t> in, out(kThreads, 0);
    for (int thread = 0; thread < kThreads; ++thread) {
      for (const Type* type : operands) in.push_back(type->any(random));
    }
    const Result done = run(body, in, out, kThreads);
    if (!done.error.empty()) return check(false, opcode + ": " + done.error);
    for (int thread = 0; thread < kThreads; ++thread) {
      const uint64_t* const from = &in[static_cast<size_t>(thread) * n];
      const uint64_t wanted = expected(from);
      if (result.same(out[thread], wanted)) continue;
      char text[200];
      std::snprintf(text, sizeof(text), "%s of %lx, %lx, ...: %lx, expected %lx", opcode.c_str(), from[0],
                    n > 1 ? from[1] : 0, out[thread], wanted);
      return check(false, text);
    }
  }
  check(true, opcode);
}

template <class R, class... S, size_t... i, class F>
Expected typed(const F& f, std::index_sequence<i...>) {
  return [=](const uint64_t* operands) { return to_bits(static_cast<R>(f(from_bits<S>(operands[i])...))); };
}
template <class R, class... S, class F>
void compare(const std::string& opcode, const F& f) {
  compare_with(opcode, *type_of<R>(), {type_of<S>()...}, typed<R, S...>(f, std::make_index_sequence<sizeof...(S)>()));
}

// ---- Integers -------------------------------------------------------------------------------------------------------

template <class T, class U, class W>  // signed or unsigned; unsigned; twice as many bits
void test_integer(const std::string& type) {
  compare<T, T, T>("add." + type, [](T a, T b) { return T(U(U(a) + U(b))); });
  compare<T, T, T>("sub." + type, [](T a, T b) { return T(U(U(a) - U(b))); });
  compare<T, T, T>("mul.lo." + type, [](T a, T b) { return T(W(a) * W(b)); });
  compare<T, T, T, T>("mad.lo." + type, [](T a, T b, T c) { return T(W(a) * W(b) + W(c)); });
  compare<T, T, T>("min." + type, [](T a, T b) { return b < a ? b : a; });
  compare<T, T, T>("max." + type, [](T a, T b) { return a < b ? b : a; });
  compare<T, T, uint32_t>("shr." + type, [](T a, uint32_t n) {
    for (uint32_t i = 0; i < n && i < 64; ++i) a = T(a >> 1);
    return a;
  });
  compare<T, T>("mov." + type, [](T a) { return a; });
  compare<T, T, T, bool>("selp." + type, [](T a, T b, bool c) { return c ? a : b; });
  if constexpr (std::is_signed_v<T>) {
    compare<T, T>("neg." + type, [](T a) { return T(U(0) - U(a)); });
    compare<T, T>("abs." + type, [](T a) { return a < 0 ? T(U(0) - U(a)) : a; });
  }
  if constexpr (sizeof(T) >= 4) {
    // What an operand of 0 or an overflow gives is left open, so divisors are made odd and dividends small.
    compare<T, T, T>("mul.hi." + type, [](T a, T b) { return T(W(a) * W(b) >> 8 * sizeof(T)); });
    compare<T, T, T, T>("mad.hi." + type, [](T a, T b, T c) { return T(U(T(W(a) * W(b) >> 8 * sizeof(T))) + U(c)); });
    compare<T, T, T>("div." + type, [](T a, T b) { return b == 0 ? T(-1) : T(W(a) / W(b)); });
    compare<T, T, T>("rem." + type, [](T a, T b) { return b == 0 ? a : T(W(a) % W(b)); });
    // The ISA's own description of bfe.
    compare<T, T, uint32_t, uint32_t>("bfe." + type, [](T a, uint32_t b, uint32_t c) {
      const int msb = 8 * sizeof(T) - 1, pos = b & 0xff, len = c & 0xff;
      const auto bit = [&](int i) { return U(a) >> i & 1; };
      const U sign = std::is_unsigned_v<T> || len == 0 ? 0 : bit(std::min(pos + len - 1, msb));
      U d = 0;
      for (int i = 0; i <= msb; ++i) d |= (i < len && pos + i <= msb ? bit(pos + i) : sign) << i;
      return T(d);
    });
  }
}

template <class T>
void test_setp(const std::string& type, bool ordered) {
  const auto one = [&](const std::string& name, auto f) { compare<bool, T, T>("setp." + name + "." + type, f); };
  using V = std::conditional_t<kIsSmall<T>, long double, T>;
  const auto is_nan = [](V a) { return a != a; };
  const auto nan = [&](T a, T b) { return is_nan(V(a)) || is_nan(V(b)); };
  one("eq", [](T a, T b) { return V(a) == V(b); });
  one("ne", [=](T a, T b) { return !nan(a, b) && V(a) != V(b); });
  if (!ordered) return;
  one("lt", [](T a, T b) { return V(a) < V(b); });
  one("le", [](T a, T b) { return V(a) <= V(b); });
  one("gt", [](T a, T b) { return V(a) > V(b); });
  one("ge", [](T a, T b) { return V(a) >= V(b); });
  if constexpr (std::is_unsigned_v<T>) {
    one("lo", [](T a, T b) { return a < b; });
    one("ls", [](T a, T b) { return a <= b; });
    one("hi", [](T a, T b) { return a > b; });
    one("hs", [](T a, T b) { return a >= b; });
  }
  if constexpr (!std::is_integral_v<T>) {
    one("equ", [=](T a, T b) { return nan(a, b) || V(a) == V(b); });
    one("neu", [=](T a, T b) { return nan(a, b) || V(a) != V(b); });
    one("ltu", [=](T a, T b) { return nan(a, b) || V(a) < V(b); });
    one("leu", [=](T a, T b) { return nan(a, b) || V(a) <= V(b); });
    one("gtu", [=](T a, T b) { return nan(a, b) || V(a) > V(b); });
    one("geu", [=](T a, T b) { return nan(a, b) || V(a) >= V(b); });
    one("num", [=](T a, T b) { return !nan(a, b); });
    one("nan", [=](T a, T b) { return nan(a, b); });
  }
}

template <class T>
void test_bits(const std::string& type) {
  compare<T, T, T>("and." + type, [](T a, T b) { return T(a & b); });
  compare<T, T, T>("or." + type, [](T a, T b) { return T(a | b); });
  compare<T, T, T>("xor." + type, [](T a, T b) { return T(a ^ b); });
  compare<T, T>("not." + type, [](T a) { return std::is_same_v<T, bool> ? T(a == 0) : T(~uint64_t(a)); });
  compare<T, T>("mov." + type, [](T a) { return a; });
  if constexpr (!std::is_same_v<T, bool>) {
    compare<T, T, uint32_t>("shl." + type, [](T a, uint32_t n) {
      for (uint32_t i = 0; i < n && i < 64; ++i) a = T(a << 1);
      return a;
    });
    compare<T, T, uint32_t>("shr." + type, [](T a, uint32_t n) {
      for (uint32_t i = 0; i < n && i < 64; ++i) a = T(a >> 1);
      return a;
    });
    compare<T, T, T, bool>("selp." + type, [](T a, T b, bool c) { return c ? a : b; });
    if constexpr (sizeof(T) >= 4) {
      compare<T, T, T, uint32_t, uint32_t>("bfi." + type, [](T a, T b, uint32_t c, uint32_t d) {
        const int bits = 8 * sizeof(T), pos = c & 0xff, len = d & 0xff;
        for (int i = 0; i < len && pos + i < bits; ++i) b = (b & ~(T(1) << (pos + i))) | (a >> i & 1) << (pos + i);
        return b;
      });
      compare<uint32_t, T>("popc." + type, [](T a) {
        uint32_t n = 0;
        for (; a; a &= a - 1) ++n;
        return n;
      });
      compare<uint32_t, T>("clz." + type, [](T a) {
        uint32_t n = 8 * sizeof(T);
        for (; a; a >>= 1) --n;
        return n;
      });
    }
  }
}

inline void test_words() {
  const auto window = [](uint32_t a, uint32_t b, uint32_t shift) {  // 32 bits of b:a, from bit `shift` on
    return uint32_t(((unsigned __int128)(b) << 32 | a) >> shift);
  };
  compare<uint32_t, uint32_t, uint32_t, uint32_t>(
      "shf.l.wrap.b32", [=](uint32_t a, uint32_t b, uint32_t c) { return window(a, b, 32 - (c & 31)); });
  compare<uint32_t, uint32_t, uint32_t, uint32_t>(
      "shf.l.clamp.b32", [=](uint32_t a, uint32_t b, uint32_t c) { return window(a, b, 32 - (c < 32 ? c : 32)); });
  compare<uint32_t, uint32_t, uint32_t, uint32_t>(
      "shf.r.wrap.b32", [=](uint32_t a, uint32_t b, uint32_t c) { return window(a, b, c & 31); });
  compare<uint32_t, uint32_t, uint32_t, uint32_t>(
      "shf.r.clamp.b32", [=](uint32_t a, uint32_t b, uint32_t c) { return window(a, b, c < 32 ? c : 32); });
  compare<uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>(
      "lop3.b32", [](uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
        uint32_t d = 0;
        for (int i = 0; i < 32; ++i) d |= (table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i;
        return d;
      });
  compare<uint32_t, uint32_t, uint32_t, uint32_t>("prmt.b32", [](uint32_t a, uint32_t b, uint32_t c) {
    int8_t bytes[8], d[4];
    std::memcpy(bytes, &a, 4);
    std::memcpy(bytes + 4, &b, 4);
    for (int i = 0; i < 4; ++i) {
      const int8_t byte = bytes[c >> 4 * i & 7];
      d[i] = c >> 4 * i & 8 ? int8_t(byte >> 7) : byte;
    }
    uint32_t result;
    std::memcpy(&result, d, 4);
    return result;
  });
  compare<uint32_t, uint32_t>("brev.b32", [](uint32_t a) {
    uint32_t d = 0;
    for (int i = 0; i < 32; ++i, a >>= 1) d = d << 1 | (a & 1);
    return d;
  });
}

// ---- Floats ---------------------------------------------------------------------------------------------------------

// f on numbers, or on both of a pair.
template <class T, class F>
auto on_each(const F& f) {
  return [=](auto... a) {
    if constexpr (kIsTwo<T>) {
      using E = decltype(T::low);
      return T{E::of(f(static_cast<long double>(a.low)...)), E::of(f(static_cast<long double>(a.high)...))};
    } else if constexpr (kIsSmall<T>) {
      return T::of(f(static_cast<long double>(a)...));
    } else {
      return f(a...);
    }
  };
}

template <class T>
void test_any_float(const std::string& type) {
  for (const std::string rn : {"", "rn."}) {
    compare<T, T, T>("add." + rn + type, on_each<T>([](auto a, auto b) { return a + b; }));
    compare<T, T, T>("sub." + rn + type, on_each<T>([](auto a, auto b) { return a - b; }));
    compare<T, T, T>("mul." + rn + type, on_each<T>([](auto a, auto b) { return a * b; }));
  }
  compare<T, T, T, T>("fma.rn." + type, on_each<T>([](auto a, auto b, auto c) { return std::fma(a, b, c); }));
  const auto least = [](auto a, auto b) {
    return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(a)) ? a : b;
  };
  const auto most = [](auto a, auto b) {
    return a != a ? b : b != b ? a : a > b || (a == b && !std::signbit(a)) ? a : b;
  };
  const auto or_nan = [](auto f) {
    return [=](auto a, auto b) { return a != a || b != b ? decltype(a)(NAN) : f(a, b); };
  };
  compare<T, T, T>("min." + type, on_each<T>(least));
  compare<T, T, T>("max." + type, on_each<T>(most));
  if (type != "f64") {
    compare<T, T, T>("min.NaN." + type, on_each<T>(or_nan(least)));
    compare<T, T, T>("max.NaN." + type, on_each<T>(or_nan(most)));
  }
  compare<T, T>("neg." + type, on_each<T>([](auto a) { return -a; }));
  compare<T, T>("abs." + type, on_each<T>([](auto a) { return std::abs(a); }));
  if constexpr (kIsTwo<T> || kIsSmall<T>) {
    compare<T, T, T, T>("fma.rn.relu." + type, on_each<T>([](auto a, auto b, auto c) {
                          const auto sum = std::fma(a, b, c);
                          return sum != sum || sum > 0 ? sum : decltype(sum)(0);
                        }));
  }
}
template <class T>
void test_float(const std::string& type) {
  test_any_float<T>(type);
  compare<T, T, T>("div.rn." + type, [](T a, T b) { return a / b; });
  compare<T, T>("sqrt.rn." + type, [](T a) { return std::sqrt(a); });
  compare<T, T>("rcp.rn." + type, [](T a) { return T(1) / a; });
  compare<T, T>("mov." + type, [](T a) { return a; });
  compare<T, T, T, bool>("selp." + type, [](T a, T b, bool c) { return c ? a : b; });
}

// ---- Conversions ----------------------------------------------------------------------------------------------------

template <class D, class S>
void test_to_integer(const std::string& types) {
  const auto clamped = [](S a) -> D {
    if (a != a) return 0;
    const __int128 most = std::numeric_limits<D>::max(), least = std::numeric_limits<D>::min();
    if (std::abs(a) > 1e30) return D(a > 0 ? most : least);
    return D(std::max(least, std::min(most, __int128(a))));
  };
  const auto half_even = [](S a) {
    const S low = std::floor(a), part = a - low;
    return part < S(0.5) ? low : part > S(0.5) ? low + 1 : std::fmod(low, S(2)) == 0 ? low : low + 1;
  };
  compare<D, S>("cvt.rni." + types, [=](S a) { return clamped(half_even(a)); });
  compare<D, S>("cvt.rzi." + types, [=](S a) { return clamped(a < 0 ? std::ceil(a) : std::floor(a)); });
  compare<D, S>("cvt.rmi." + types, [=](S a) { return clamped(std::floor(a)); });
  compare<D, S>("cvt.rpi." + types, [=](S a) { return clamped(std::ceil(a)); });
}

template <class D>
void test_small_conversions(const std::string& type) {
  compare<float, D>("cvt.f32." + type, [](D a) { return static_cast<float>(static_cast<long double>(a)); });
  compare<double, D>("cvt.f64." + type, [](D a) { return static_cast<double>(static_cast<long double>(a)); });
  const auto relu = [](float a) { return a < 0 ? 0.0f : a; };
  compare<D, float>("cvt.rn." + type + ".f32", [](float a) { return D::of(a); });
  compare<D, double>("cvt.rn." + type + ".f64", [](double a) { return D::of(a); });
  compare<D, float>("cvt.rn.relu." + type + ".f32", [=](float a) { return D::of(std::signbit(a) && a == a ? 0 : a); });
  compare<Two<D>, float, float>(
      "cvt.rn." + type + "x2.f32", [](float a, float b) { return Two<D>{D::of(b), D::of(a)}; });
  compare<Two<D>, float, float>("cvt.rn.relu." + type + "x2.f32", [=](float a, float b) {
    return Two<D>{D::of(relu(b) == 0 ? 0 : relu(b)), D::of(relu(a) == 0 ? 0 : relu(a))};
  });
}

template <class D, class S>
void test_cvt(const std::string& to, const std::string& from) {
  compare<D, S>("cvt." + to + "." + from, [](S a) { return static_cast<D>(a); });
}

inline void test_conversions() {
  test_to_integer<int32_t, float>("s32.f32");
  test_to_integer<uint32_t, float>("u32.f32");
  test_to_integer<int64_t, double>("s64.f64");
  compare<float, float>("cvt.rni.f32.f32", [](float a) { return std::rint(a); });
  compare<float, float>("cvt.rzi.f32.f32", [](float a) { return std::copysign(std::floor(std::abs(a)), a); });
  compare<float, float>("cvt.rmi.f32.f32", [](float a) { return std::floor(a); });
  compare<float, float>("cvt.rpi.f32.f32", [](float a) { return std::ceil(a); });
  test_small_conversions<F16>("f16");
  test_small_conversions<BF16>("bf16");
  test_cvt<float, int32_t>("rn.f32", "s32");
  test_cvt<float, uint32_t>("rn.f32", "u32");
  test_cvt<float, int64_t>("rn.f32", "s64");
  test_cvt<float, uint64_t>("rn.f32", "u64");
  test_cvt<double, int32_t>("rn.f64", "s32");
  test_cvt<double, uint32_t>("rn.f64", "u32");
  test_cvt<double, int64_t>("rn.f64", "s64");
  test_cvt<double, uint64_t>("rn.f64", "u64");
  test_cvt<double, float>("f64", "f32");
  test_cvt<float, double>("rn.f32", "f64");
  test_cvt<int64_t, int32_t>("s64", "s32");
  test_cvt<uint64_t, uint32_t>("u64", "u32");
  test_cvt<int32_t, int64_t>("s32", "s64");
  test_cvt<uint32_t, uint64_t>("u32", "u64");
  test_cvt<uint32_t, uint16_t>("u32", "u16");
  test_cvt<int32_t, int16_t>("s32", "s16");
  test_cvt<uint16_t, uint32_t>("u16", "u32");
  compare<int32_t, int32_t>("cvt.s32.s8", [](int32_t a) { return int32_t(int8_t(a)); });  // of wider registers
  compare<uint32_t, uint32_t>("cvt.u32.u8", [](uint32_t a) { return uint32_t(uint8_t(a)); });
  compare<int32_t, int32_t>("cvt.s8.s32", [](int32_t a) { return int32_t(int8_t(a)); });
  compare<uint32_t, float>("cvt.rna.tf32.f32", [](float a) {  // the upper 19 bits; half of the last and more goes up
    uint32_t bits;
    std::memcpy(&bits, &a, 4);
    if (a != a) return 0x7fffffffu;
    return std::isinf(a) ? bits : (bits >> 13 << 13) + (bits >> 12 & 1) * 0x2000;
  });
  compare<float, float>("cvt.sat.f32.f32", [](float a) { return a >= 1 ? 1.0f : a > 0 ? a : 0.0f; });
  const auto same_address = [](uint64_t a) { return a; };
  compare<uint64_t, uint64_t>("cvta.global.u64", same_address);
  compare<uint64_t, uint64_t>("cvta.to.global.u64", same_address);
}

inline void test_scalar() {
  test_integer<int16_t, uint16_t, int32_t>("s16");
  test_integer<uint16_t, uint16_t, uint32_t>("u16");
  test_integer<int32_t, uint32_t, int64_t>("s32");
  test_integer<uint32_t, uint32_t, uint64_t>("u32");
  test_integer<int64_t, uint64_t, __int128>("s64");
  test_integer<uint64_t, uint64_t, unsigned __int128>("u64");
  compare<int32_t, int16_t, int16_t>("mul.wide.s16", [](int16_t a, int16_t b) { return int32_t(a) * b; });
  compare<uint32_t, uint16_t, uint16_t>("mul.wide.u16", [](uint16_t a, uint16_t b) { return uint32_t(a) * b; });
  compare<int64_t, int32_t, int32_t>("mul.wide.s32", [](int32_t a, int32_t b) { return int64_t(a) * b; });
  compare<uint64_t, uint32_t, uint32_t>("mul.wide.u32", [](uint32_t a, uint32_t b) { return uint64_t(a) * b; });
  compare<int32_t, int16_t, int16_t, int32_t>(
      "mad.wide.s16", [](int16_t a, int16_t b, int32_t c) { return int32_t(uint32_t(a * b) + uint32_t(c)); });
  compare<uint32_t, uint16_t, uint16_t, uint32_t>(
      "mad.wide.u16", [](uint16_t a, uint16_t b, uint32_t c) { return uint32_t(a) * b + c; });
  compare<int64_t, int32_t, int32_t, int64_t>(
      "mad.wide.s32", [](int32_t a, int32_t b, int64_t c) { return int64_t(uint64_t(int64_t(a) * b) + uint64_t(c)); });
  compare<uint64_t, uint32_t, uint32_t, uint64_t>(
      "mad.wide.u32", [](uint32_t a, uint32_t b, uint64_t c) { return uint64_t(a) * b + c; });
  test_bits<bool>("pred");
  test_bits<uint16_t>("b16");
  test_bits<uint32_t>("b32");
  test_bits<uint64_t>("b64");
  test_words();
  test_float<float>("f32");
  test_float<double>("f64");
  test_any_float<F16>("f16");
  test_any_float<BF16>("bf16");
  test_any_float<Two<F16>>("f16x2");
  test_any_float<Two<BF16>>("bf16x2");
  test_conversions();
  test_setp<int16_t>("s16", true);
  test_setp<uint16_t>("u16", true);
  test_setp<int32_t>("s32", true);
  test_setp<uint32_t>("u32", true);
  test_setp<int64_t>("s64", true);
  test_setp<uint64_t>("u64", true);
  test_setp<uint16_t>("b16", false);
  test_setp<uint32_t>("b32", false);
  test_setp<uint64_t>("b64", false);
  test_setp<float>("f32", true);
  test_setp<double>("f64", true);
  test_setp<F16>("f16", true);
  test_setp<BF16>("bf16", true);
  compare<bool, float, float, bool>("setp.lt.and.f32", [](float a, float b, bool c) { return a < b && c; });
  compare<bool, float, float, bool>("setp.geu.or.f32", [](float a, float b, bool c) { return !(a < b) || c; });
  compare<bool, int32_t, int32_t, bool>("setp.ne.xor.s32", [](int32_t a, int32_t b, bool c) { return (a != b) != c; });
}

}  // namespace ptx_test
