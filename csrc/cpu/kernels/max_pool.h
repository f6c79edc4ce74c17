// The max pool of a stem (3x3, stride 2, padding 1), written once over Simd<A>.
#pragma once

#include "depthwise.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

inline constexpr int64_t kPoolRows = 3;

// The max pool, by the bits of the values, integers of their size that are in the values' order, NaN the largest, and
// the smallest 0, which so can stand for the padding. A lane of A can be a value, or two of bfloat16. Where all values
// are at least 0 or NaN, as behind a ReLU, they are such integers without their signs. Where they are not (an unsigned
// Integer), it is their distance from minus infinity: that of a NaN of either sign is past infinity's.
template <class A, class Integer>
class MaxPool {
  using S = Simd<A>;
  using V = typename S::V;
  using Rows = const A* [kPoolRows];
  typedef Integer Bits __attribute__((vector_size(kVectorBytes)));
  typedef std::make_signed_t<Integer> SignedBits __attribute__((vector_size(kVectorBytes)));
  static constexpr bool kAnySign = std::is_unsigned_v<Integer>;
  static constexpr auto kWithoutSign = std::numeric_limits<std::make_signed_t<Integer>>::max();
  static constexpr int kExponentBits = sizeof(Integer) == 8 ? 11 : 8;
  static constexpr Integer kInfinity =
      kWithoutSign >> (8 * sizeof(Integer) - 1 - kExponentBits) << (8 * sizeof(Integer) - 1 - kExponentBits);

 public:
  // Computes a row of results. One of the rows that lies outside of the image can be any of the others once more.
  static void row(const Rows& from, int64_t width, int64_t out_width, A* to) {
    StridedColumns<A> columns;
    for (int64_t column = 0; column < out_width; column += S::kLanes) {
      const int64_t first = 2 * column, second = first + S::kLanes;
      if (second + S::kLanes <= width) {
        columns.next(largest(from, first), largest(from, second));
      } else {
        columns.next(largest_inside(from, first, width), largest_inside(from, second, width));
      }
      const V result = largest(largest(columns.left, columns.centre), columns.right);
      S::store(to + column, value(result), S::first(out_width - column));
    }
  }

 private:
  // Turns the sign of numbers whose sign bit is set: two's complement becomes sign and magnitude's negation, and back.
  static V ordered(V v) {
    const SignedBits bits = reinterpret_cast<SignedBits>(v), magnitude = bits & kWithoutSign;
    if constexpr (!kAnySign) return reinterpret_cast<V>(magnitude);
    const SignedBits negative = bits >> (8 * sizeof(Integer) - 1);
    return reinterpret_cast<V>(reinterpret_cast<Bits>((magnitude ^ negative) - negative) + kInfinity);
  }
  static V value(V v) {
    if constexpr (!kAnySign) return v;
    const SignedBits bits = reinterpret_cast<SignedBits>(reinterpret_cast<Bits>(v) - kInfinity);
    const SignedBits negative = bits >> (8 * sizeof(Integer) - 1);
    return reinterpret_cast<V>(((bits ^ negative) - negative) | (negative & ~kWithoutSign));
  }
  static V largest(V a, V b) {
    const Bits first = reinterpret_cast<Bits>(a), second = reinterpret_cast<Bits>(b);
    return reinterpret_cast<V>(first > second ? first : second);
  }
  static V largest(const Rows& from, int64_t column) {
    V result = ordered(S::load(from[0] + column));
    for (int i = 1; i < kPoolRows; ++i) result = largest(result, ordered(S::load(from[i] + column)));
    return result;
  }
  // The same where some of the columns lie behind the row's end.
  static V largest_inside(const Rows& from, int64_t column, int64_t width) {
    const auto inside = S::first(std::max<int64_t>(0, width - column));
    V result = {};
    for (const A* row : from) result = largest(result, S::keep(ordered(S::load(row + column, inside)), inside));
    return result;
  }
};

// Pools a row of a stem, whose values are as large as Integer, a signed type.
template <class Integer, class A>
void max_pool_row(const Stem& stem, const A* const (&from)[kPoolRows], A* to) {
  const auto row = stem.relu ? MaxPool<A, Integer>::row : MaxPool<A, std::make_unsigned_t<Integer>>::row;
  row(from, stem.conv_width(), stem.out_width(), to);
}

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
