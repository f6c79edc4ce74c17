// The average pool of a shortcut (3x3, stride 2, padding 1), written once over Simd<A>.
#pragma once

#include "depthwise.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// Computes some rows of activation(avg_pool2d(x, 3, stride=2, padding=1)) for some channels. x begins with input row
// x_row, and the row above that is in x_above (null: there is none). Rows are added before columns, which are sorted
// but once in this way; and they are gone through from the top to the bottom, so that two rows of three have to be
// loaded.
template <class A>
void average_pool(const Unit& unit, Range rows, Range channels, const EdgeMasks<A>* masks, Planes<const A> x,
                  int64_t x_row, Planes<const A> x_above, Planes<A> result) {
  using S = Simd<A>;
  using V = typename S::V;
  const V one = S::broadcast(1), ninth = one / 9;
  const V lower = S::broadcast(static_cast<A>(unit.pool_activation().lower));
  const int64_t width = unit.width, out_width = unit.out_width();  // a division, not to be made for each row
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    const A* const first = x.channel(c) + (2 * rows.begin - x_row) * width;
    const A* above = 2 * rows.begin > x_row ? first - width : nullptr;
    if (!above && x_above.data) {
      above = x_above.channel(c);
      // The row is of another thread, in as many places as there are channels: that of a channel some way ahead is on
      // its way from that core's cache while this one is pooled (three times as fast for the shortcut of stage 3).
      constexpr int64_t kAhead = 8;
      for (int64_t column = 0; column < width && c + kAhead < channels.end; column += S::kLanes) {
        __builtin_prefetch(x_above.channel(c + kAhead) + column);
      }
    }
    for (int64_t v = 0, column = 0; column < out_width; ++v, column += S::kLanes) {
      // Two vectors of x's columns, the second of which starts with `second`, and the column before them are read.
      const int64_t left = 2 * column, second = left + S::kLanes;
      const EdgeMasks<A> mask = masks[v];
      const auto stored = S::first(out_width - column);
      V shares[3] = {ninth, ninth, ninth};  // by the rows that count
      if (!unit.pool_count_include_pad) {
        const V inside = S::odd(S::keep(one, mask.right[0]), S::keep(one, mask.right[1]));
        const V share = one / (S::shift_in(S::broadcast(column > 0 ? 1 : 0), inside) + one + inside);
        for (int n = 1; n <= 3; ++n) shares[n - 1] = share / static_cast<A>(n);
      }
      const auto read = [&](const A* row, V& first_half, V& second_half, A& before) __attribute__((always_inline)) {
        first_half = S::load(row + left, mask.right[0]);
        second_half = S::load(row + second, mask.right[1]);
        if (column > 0) before = row[left - 1];
      };
      V top[2] = {};
      A top_before = 0;
      if (above) read(above, top[0], top[1], top_before);
      const A* from = first;
      A* y = result.channel(c) + column;
      for (int64_t row = rows.begin; row < rows.end; ++row, from += 2 * width, y += out_width) {
        const bool has_bottom = 2 * row + 1 < unit.height;
        V middle[2], bottom[2] = {};
        A before = 0, bottom_before = 0;
        read(from, middle[0], middle[1], before);
        if (has_bottom) read(from + width, bottom[0], bottom[1], bottom_before);
        const V first_half = middle[0] + top[0] + bottom[0], second_half = middle[1] + top[1] + bottom[1];
        const V right = S::odd(first_half, second_half);
        const V left_of_first = S::broadcast(before + top_before + bottom_before);
        const V sum = S::shift_in(left_of_first, right) + S::even(first_half, second_half) + right;
        S::store(y, S::max(lower, sum * shares[(row > 0) + has_bottom]), stored);
        top[0] = bottom[0];
        top[1] = bottom[1];
        top_before = bottom_before;
      }
    }
  }
}

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
