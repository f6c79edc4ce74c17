// Depthwise 3x3 convolutions and average pooling, written once over Simd<A>.
#pragma once

#include "planes.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

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
int64_t edge_vectors(const Unit& unit, const Part& part) {
  const int64_t run = unit.stride == 1 ? (part.row_end - part.row_begin) * unit.width : unit.out_width();
  return ceil_div(run, Simd<A>::kLanes);
}

template <class A>
void fill_edge_masks(const Unit& unit, const Part& part, EdgeMasks<A>* masks) {
  using S = Simd<A>;
  const int64_t vectors = edge_vectors<A>(unit, part);
  int64_t column = 0;  // of the lane, with stride 1
  int64_t pixels_left = (part.row_end - part.row_begin) * unit.width;
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

// A row's even and odd columns from the left, a vector of each at a time: the taps of a 3x3 window at stride 2.
template <class A>
class StridedColumns {
 public:
  using S = Simd<A>;
  using V = typename S::V;

  // Of the 2 * kLanes columns that are next, given as two vectors.
  void next(V first, V second) {
    const V odd = S::odd(first, second);
    left = S::shift_in(right, odd);
    centre = S::even(first, second);
    right = odd;
  }

  V left = {}, centre = {}, right = {};  // left of the row's first column is zero
};

// A vector of results with stride 1. Lanes past the last pixel (HasTail) load zeros: what lies there may be denormal,
// which would cost a microcode assist.
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

// One plane with stride 1, its rows run together: x starts with the row above the first.
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

// The part's rows of intermediate channel c. x has the halo row above the first, of zeros at the image's edge.
template <class A>
void depthwise_channel(const Unit& unit, const Part& part, const Convolution& conv, int64_t c,
                       const EdgeMasks<A>* masks, const A* x, A* y) {
  using S = Simd<A>;
  const int64_t rows = part.row_end - part.row_begin;
  const auto lower = S::broadcast(unit.conv2_relu ? A{0} : -std::numeric_limits<A>::infinity());
  const A scale = conv.scale ? static_cast<const A*>(conv.scale)[c] : A{1};
  const auto bias = S::broadcast(static_cast<const A*>(conv.bias)[c]);
  typename S::V weight[9];
  for (int i = 0; i < 9; ++i) weight[i] = S::broadcast(static_cast<const A*>(conv.weight)[c * 9 + i] * scale);
  if (unit.stride == 1) {
    depthwise_stride1<A>(x, unit.width, rows * unit.width, masks, weight, bias, lower, y);
  } else {
    depthwise_stride2<A>(x, unit.width, rows, unit.out_width(), masks, weight, bias, lower, y);
  }
}

// From some rows of conv1, in y1 from its channel 0 on, to their channels of y2: row r * slice_channels + n of conv1 is
// intermediate channel n * groups + r behind the shuffle.
template <class A>
void depthwise(const Unit& unit, const Part& part, const Convolution& conv, Channels rows, const EdgeMasks<A>* masks,
               Planes<const A> y1, Planes<A> y2) {
  const int64_t slice = unit.slice_channels();
  int64_t row = rows.begin;
  for (int64_t r = row / slice; row < rows.end; ++r) {
    for (; row < std::min(rows.end, (r + 1) * slice); ++row) {
      const int64_t channel = (row - r * slice) * unit.groups + r;
      depthwise_channel<A>(unit, part, conv, channel, masks, y1.channel(row - rows.begin), y2.channel(channel));
    }
  }
}

// relu(avg_pool2d(x, 3, stride=2, padding=1)) of some channels; x starts with input row x_row, and the row above that
// is in x_above (null: there is none). The rows are added before the columns, which so are sorted once; and they are
// gone through from the top to the bottom, so that of three rows two have to be loaded.
template <class A>
void pool(const Unit& unit, const Part& part, Channels channels, const EdgeMasks<A>* masks, Planes<const A> x,
          int64_t x_row, Planes<const A> x_above, Planes<A> result) {
  using S = Simd<A>;
  using V = typename S::V;
  const V one = S::broadcast(1), ninth = one / 9;
  const int64_t width = unit.width, out_width = unit.out_width();  // a division, not to be made for each row
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    const A* const first = x.channel(c) + (2 * part.row_begin - x_row) * width;
    const A* above = 2 * part.row_begin > x_row ? first - width : nullptr;
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
      // Of x: two vectors of columns, the second of which starts with `second`, and the column before them.
      const int64_t left = 2 * column, second = left + S::kLanes;
      const EdgeMasks<A> mask = masks[v];
      const auto stored = S::first(out_width - column);
      V shares[3] = {ninth, ninth, ninth};  // by the rows that count
      if (!unit.pool_count_include_pad) {
        const V inside = S::odd(S::keep(one, mask.right[0]), S::keep(one, mask.right[1]));
        const V share = one / (S::shift_in(S::broadcast(column > 0 ? 1 : 0), inside) + one + inside);
        for (int rows = 1; rows <= 3; ++rows) shares[rows - 1] = share / static_cast<A>(rows);
      }
      V top[2] = {};
      A top_before = 0;
      if (above) {
        top[0] = S::load(above + left, mask.right[0]);
        top[1] = S::load(above + second, mask.right[1]);
        if (column > 0) top_before = above[left - 1];
      }
      const A* middle = first;
      A* y = result.channel(c) + column;
      for (int64_t row = part.row_begin; row < part.row_end; ++row, middle += 2 * width, y += out_width) {
        const bool has_bottom = 2 * row + 1 < unit.height;
        V bottom[2] = {};
        A before = top_before;
        top_before = 0;
        if (has_bottom) {
          bottom[0] = S::load(middle + width + left, mask.right[0]);
          bottom[1] = S::load(middle + width + second, mask.right[1]);
          if (column > 0) top_before = middle[width + left - 1];
        }
        if (column > 0) before = middle[left - 1] + before + top_before;
        const V first_half = S::load(middle + left, mask.right[0]) + top[0] + bottom[0];
        const V second_half = S::load(middle + second, mask.right[1]) + top[1] + bottom[1];
        const V right = S::odd(first_half, second_half);
        const V sum = S::shift_in(S::broadcast(before), right) + S::even(first_half, second_half) + right;
        S::store(y, S::max(V{}, sum * shares[(row > 0) + has_bottom]), stored);
        top[0] = bottom[0];
        top[1] = bottom[1];
      }
    }
  }
}

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
