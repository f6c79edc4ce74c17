// The max pool of a stem (3x3, stride 2, padding 1), written once over Simd<A>.
#pragma once

#include "depthwise.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

inline constexpr int64_t kPoolRows = 3;

// The max pool. All values are at least 0 or NaN: without their signs they are in order as integers of their size, NaN
// the largest, and zeros can stand for the padding. A lane of A can so be a value, or two of bfloat16.
template <class A, class Integer>
class MaxPool {
  using S = Simd<A>;
  using V = typename S::V;
  using Rows = const A* [kPoolRows];
  typedef Integer Bits __attribute__((vector_size(kVectorBytes)));

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
      S::store(to + column, result, S::first(out_width - column));
    }
  }

 private:
  static V signless(V v) {
    return reinterpret_cast<V>(reinterpret_cast<Bits>(v) & std::numeric_limits<Integer>::max());
  }
  static V largest(V a, V b) {
    const Bits first = reinterpret_cast<Bits>(a), second = reinterpret_cast<Bits>(b);
    return reinterpret_cast<V>(first > second ? first : second);
  }
  static V largest(const Rows& from, int64_t column) {
    V result = signless(S::load(from[0] + column));
    for (int i = 1; i < kPoolRows; ++i) result = largest(result, signless(S::load(from[i] + column)));
    return result;
  }
  // The same where some of the columns lie behind the row's end.
  static V largest_inside(const Rows& from, int64_t column, int64_t width) {
    const auto inside = S::first(std::max<int64_t>(0, width - column));
    V result = {};
    for (const A* row : from) result = largest(result, signless(S::load(row + column, inside)));
    return result;
  }
};

template <class A>
using MaxPoolOfElements = MaxPool<A, std::conditional_t<sizeof(A) == 4, int32_t, int64_t>>;

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
