// The number formats of PTX that C++ lacks, and their roundings (PTX ISA, "Alternate Floating-Point Data Formats" and
// "Packed Floating Point Data Types").
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace ptx {

// What stops the machine: an opcode that it does not know, or an access that a kernel must not make.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};
// Two numbers of 16 bits in a register of 32: f16x2 and bf16x2.
template <class T>
struct Pair {
  T low, high;
};

inline float widen(Half value) { return static_cast<float>(bits_as<_Float16>(value.bits)); }
inline float widen(BFloat value) { return bits_as<float>(uint32_t{value.bits} << 16); }
inline float widen(float value) { return value; }
inline double widen(double value) { return value; }

// Rounds to the nearest number of the format, ties to even: .rn. A NaN becomes the format's canonical one.
template <class T>
T narrow(float value);
template <>
inline float narrow(float value) {
  return value;
}
template <>
inline Half narrow(float value) {
  return {value != value ? uint16_t{0x7fff} : bits_as<uint16_t>(static_cast<_Float16>(value))};
}
template <>
inline BFloat narrow(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  return {static_cast<uint16_t>(value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// Rounds to float so that a second rounding, to a format of 16 bits, gives what a single one would: where the value
// lies between two floats, the one whose last bit is set is taken ("round to odd").
inline float to_odd_float(double value) {
  const float near = static_cast<float>(value);
  if (static_cast<double>(near) == value || near != near || bits_as<uint32_t>(near) & 1) return near;
  const float limit = std::numeric_limits<float>::infinity();
  return std::nextafter(near, static_cast<double>(near) < value ? limit : -limit);
}

// Computes a * b + c for operands of 16 bits, rounded to odd. Their product is exact in double; the error of the sum is
// what "TwoSum" computes, and decides where the sum itself was rounded.
inline float odd_multiply_add(float a, float b, float c) {
  const double product = static_cast<double>(a) * b, sum = product + c;
  const double part = sum - product, error = (product - (sum - part)) + (c - part);
  if (!std::isfinite(sum) || error == 0) return to_odd_float(sum);
  const float odd = to_odd_float(sum);
  if (static_cast<double>(odd) != sum || bits_as<uint32_t>(odd) & 1) return odd;
  const float limit = std::numeric_limits<float>::infinity();
  return std::nextafter(odd, error > 0 ? limit : -limit);
}

// cvt.rna.tf32.f32: TF32 keeps ten bits of the mantissa; to nearest, ties away from zero.
inline uint32_t round_to_tf32(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  return value != value ? 0x7fffffff : std::isinf(value) ? bits : (bits + 0x1000) & ~uint32_t{0x1fff};
}

}  // namespace ptx
