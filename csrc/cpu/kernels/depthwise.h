// Depthwise 3x3 convolutions, written once over Simd<A>.
#pragma once

#include "planes.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// The rows of y1 that some rows of the result are computed from, and which of them lie in the image.
struct InputRows {
  InputRows(const Unit& unit, Range rows)
      : halo{rows.begin * unit.stride - 1, (rows.end - 1) * unit.stride + 2},
        image{std::max<int64_t>(0, halo.begin), std::min(unit.height, halo.end)} {}
  Range halo, image;
};

// Copies the rows of a plane that some rows of the result are computed from, zeros where they lie outside of the image.
// x begins with input row x_row, and the row above that is in x_above (null: there is none). Calls copy(from, pixel, n)
// for n pixels that become those from `pixel` on, and clear(pixel, n).
template <class T, class Copy, class Clear>
void copy_with_halo(const Unit& unit, Range rows, const T* x, int64_t x_row, const T* x_above, const Copy& copy,
                    const Clear& clear) {
  const InputRows in(unit, rows);
  const int64_t width = unit.width, first = std::max(in.image.begin, x_row);
  const auto pixel = [&](int64_t row) { return (row - in.halo.begin) * width; };
  clear(0, pixel(in.image.begin));
  if (first > in.image.begin) copy(x_above, pixel(in.image.begin), width);
  copy(x + (first - x_row) * width, pixel(first), (in.image.end - first) * width);
  clear(pixel(in.image.end), (in.halo.end - in.image.end) * width);
}

// Lanes that lie inside the row: beyond its left and right end the taps see zeros. One entry a vector of results. With
// stride 1 a vector runs on over the ends of rows, and both side taps are masked; lanes past the last pixel are masked
// as well. With stride 2 it covers a part of one row, reads two vectors from the centre tap's first column on, and
// takes the left taps from the right taps before.
template <class A>
struct EdgeMasks {
  typename Simd<A>::Mask left;  // with stride 1 only
  typename Simd<A>::Mask right[2];
};

template <class A>
int64_t edge_vectors(const Unit& unit, Range rows) {
  const int64_t pixels = unit.stride == 1 ? rows.count() * unit.width : unit.out_width();
  return ceil_div(pixels, Simd<A>::kLanes);
}

template <class A>
void fill_edge_masks(const Unit& unit, Range rows, EdgeMasks<A>* masks) {
  using S = Simd<A>;
  const int64_t vectors = edge_vectors<A>(unit, rows);
  int64_t column = 0;  // of the lane, with stride 1
  int64_t pixels_left = rows.count() * unit.width;
  for (int64_t v = 0; v < vectors; ++v) {
    if (unit.stride == 1) {
      uint32_t left = 0, right = 0;
      for (int lane = 0; lane < S::kLanes && pixels_left > 0; ++lane, --pixels_left) {
        if (column > 0) left |= uint32_t{1} << lane;
        if (column < unit.width - 1) right |= uint32_t{1} << lane;
        column = column == unit.width - 1 ? 0 : column + 1;
      }
      masks[v] = {S::mask(left), {S::mask(right)}};
    } else {
      for (int half = 0; half < 2; ++half) {
        const int64_t first = (2 * v + half) * S::kLanes;
        masks[v].right[half] = S::first(std::max<int64_t>(0, unit.width - first));
      }
    }
  }
}

// Goes through a row from the left, a vector of even and one of odd columns at a time: what the taps of a 3x3 window
// read with stride 2.
template <class A>
struct StridedColumns {
  using S = Simd<A>;
  using V = typename S::V;

  // Takes the next 2 * kLanes columns, as two vectors.
  void next(V first, V second) {
    const V odd = S::odd(first, second);
    left = S::shift_in(right, odd);
    centre = S::even(first, second);
    right = odd;
  }

  V left = {}, centre = {}, right = {};  // left of the row's first column is zero
};

// Sums a vector of results with stride 1. Lanes past the last pixel (HasTail) load zeros: what lies there may be
// denormal, which would cost a microcode assist.
template <class A, bool HasTail>
typename Simd<A>::V depthwise_sum(const A* centre, int64_t width, const EdgeMasks<A>& edges,
                                  const typename Simd<A>::V (&weight)[9], typename Simd<A>::V bias,
                                  typename Simd<A>::Mask tail) {
  using S = Simd<A>;
  typename S::V sum = bias;
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i, centre += width) {
    sum = S::fma(S::load(centre - 1, edges.left), weight[3 * i], sum);
    sum = S::fma(HasTail ? S::load(centre, tail) : S::load(centre), weight[3 * i + 1], sum);
    sum = S::fma(S::load(centre + 1, edges.right[0]), weight[3 * i + 2], sum);
  }
  return sum;
}

// Computes a plane with stride 1, whose rows are taken together: x begins with the row above the first.
template <class A>
void depthwise_stride1(const A* x, int64_t width, int64_t pixels, const EdgeMasks<A>* masks,
                       const typename Simd<A>::V (&weight)[9], typename Simd<A>::V bias, typename Simd<A>::V lower,
                       A* y) {
  using S = Simd<A>;
  const auto tail = S::first(pixels % S::kLanes);
  int64_t v = 0, pixel = 0;
  for (; pixel + S::kLanes <= pixels; ++v, pixel += S::kLanes) {
    S::store(y + pixel, S::max(lower, depthwise_sum<A, false>(x + pixel, width, masks[v], weight, bias, tail)));
  }
  if (pixel < pixels) {
    S::store(y + pixel, S::max(lower, depthwise_sum<A, true>(x + pixel, width, masks[v], weight, bias, tail)), tail);
  }
}

template <class A>
void depthwise_stride2(const A* x, int64_t width, int64_t out_rows, int64_t out_width, const EdgeMasks<A>* masks,
                       const typename Simd<A>::V (&weight)[9], typename Simd<A>::V bias, typename Simd<A>::V lower,
                       A* y) {
  using S = Simd<A>;
  for (int64_t row = 0; row < out_rows; ++row, x += 2 * width) {
    StridedColumns<A> columns[3];
    for (int64_t v = 0, column = 0; column < out_width; ++v, column += S::kLanes) {
      typename S::V sum = bias;
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        const A* const from = x + i * width + 2 * column;
        columns[i].next(S::load(from, masks[v].right[0]), S::load(from + S::kLanes, masks[v].right[1]));
        sum = S::fma(columns[i].left, weight[3 * i], sum);
        sum = S::fma(columns[i].centre, weight[3 * i + 1], sum);
        sum = S::fma(columns[i].right, weight[3 * i + 2], sum);
      }
      S::store(y + row * out_width + column, S::max(lower, sum), S::first(out_width - column));
    }
  }
}

// Computes some rows of intermediate channel c. x begins with the row above them, of zeros at the image's edge.
template <class A>
void depthwise_channel(const Unit& unit, Range rows, const Convolution& conv, int64_t c, const EdgeMasks<A>* masks,
                       const A* x, A* y) {
  using S = Simd<A>;
  const auto lower = S::broadcast(static_cast<A>(unit.conv2_activation().lower));
  const A scale = conv.scale ? static_cast<const A*>(conv.scale)[c] : A{1};
  const auto bias = S::broadcast(static_cast<const A*>(conv.bias)[c]);
  typename S::V weight[9];
  for (int i = 0; i < 9; ++i) weight[i] = S::broadcast(static_cast<const A*>(conv.weight)[c * 9 + i] * scale);
  if (unit.stride == 1) {
    depthwise_stride1<A>(x, unit.width, rows.count() * unit.width, masks, weight, bias, lower, y);
  } else {
    depthwise_stride2<A>(x, unit.width, rows.count(), unit.out_width(), masks, weight, bias, lower, y);
  }
}

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
