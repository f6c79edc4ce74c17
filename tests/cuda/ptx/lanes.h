// Makes an instruction of a function of one lane's values.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <string>
#include <tuple>
#include <utility>

#include "warp.h"

namespace ptx {

// An opcode that is a function of each lane's values: how it is executed, and the bytes of its result and operands, 0
// for a predicate. They tell what an immediate value is.
struct Operation {
  Execute execute;
  std::array<uint8_t, 5> bytes;
  int operands;
  bool takes_wider_registers;
};
using Operations = std::map<std::string, Operation>;

// A lane's operands and results by type: predicates are bits of a mask.
template <class T>
struct Values {
  Values(Warp& warp, const Operand& operand) : row(warp.row<T>(operand)) {}
  T operator[](int lane) const { return row[lane]; }
  const T* row;
};
template <>
struct Values<bool> {
  Values(Warp& warp, const Operand& operand) : mask(warp.mask(operand)) {}
  bool operator[](int lane) const { return mask >> lane & 1; }
  uint32_t mask;
};

template <class T>
void put(Warp& warp, const Operand& operand, uint32_t lanes, const T (&values)[kLanes]) {
  T* const to = warp.row<T>(operand);
  if (lanes == kAllLanes) {
    std::memcpy(to, values, sizeof(values));
  } else {
    for_each_lane(lanes, [&](int lane) { to[lane] = values[lane]; });
  }
}
inline void put(Warp& warp, const Operand& operand, uint32_t lanes, const bool (&values)[kLanes]) {
  uint32_t mask = 0;
  for (int lane = 0; lane < kLanes; ++lane) mask |= uint32_t{values[lane]} << lane;
  warp.set_mask(operand, lanes, mask);
}

template <auto f>
struct Lanes;
template <class D, class... S, D (*f)(S...)>
struct Lanes<f> {
  static constexpr Operation operation() {
    return {execute, {bytes_of<D>(), bytes_of<S>()...}, 1 + sizeof...(S), false};
  }
  static constexpr Operation conversion() {
    return {convert, {bytes_of<D>(), bytes_of<S>()...}, 1 + sizeof...(S), true};
  }

 private:
  template <class T>
  static constexpr uint8_t bytes_of() {
    return std::is_same_v<T, bool> ? 0 : sizeof(T);
  }

  // All lanes are computed at once, and those of the mask are kept: what others hold does no harm.
  static void execute(Warp& warp, const Instruction& x, uint32_t lanes) {
    compute(warp, x, lanes, std::make_integer_sequence<int, sizeof...(S)>());
  }
  template <int... i>
  static void compute(Warp& warp, const Instruction& x, uint32_t lanes, std::integer_sequence<int, i...>) {
    const auto sources = std::make_tuple(Values<S>(warp, x.operands[i + 1])...);
    D results[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) results[lane] = f(std::get<i>(sources)[lane]...);
    put(warp, x.operands[0], lanes, results);
  }

  // Conversions take part of a register, and extend what they put into a wider one by its sign.
  static void convert(Warp& warp, const Instruction& x, uint32_t lanes) {
    convert_lanes(warp, x, lanes, std::make_integer_sequence<int, sizeof...(S)>());
  }
  template <int... i>
  static void convert_lanes(Warp& warp, const Instruction& x, uint32_t lanes, std::integer_sequence<int, i...>) {
    for_each_lane(lanes, [&](int lane) {
      const auto part = [&](const Operand& operand, auto zero) {
        const uint64_t value = warp.value(operand, lane);
        std::memcpy(&zero, &value, sizeof(zero));
        return zero;
      };
      const D result = f(part(x.operands[i + 1], S{})...);
      uint64_t extended = 0;
      if constexpr (std::is_integral_v<D>) {
        extended = static_cast<uint64_t>(static_cast<int64_t>(result));
      } else {
        std::memcpy(&extended, &result, sizeof(result));
      }
      warp.set_value(x.operands[0], lane, extended);
    });
  }
};

// Adds opcodes that end with the same type: the operation of each, by what comes before the type.
struct NamedOperation {
  const char* name;
  Operation operation;
};
inline void add(Operations& to, const std::string& type, std::initializer_list<NamedOperation> named) {
  for (const NamedOperation& one : named) {
    const std::string opcode = one.name + type;
    if (!to.emplace(opcode, one.operation).second) throw Error("an opcode that is there twice: " + opcode);
  }
}
template <auto f>
inline constexpr Operation kOperation = Lanes<f>::operation();
template <auto f>
inline constexpr Operation kConversion = Lanes<f>::conversion();

}  // namespace ptx
