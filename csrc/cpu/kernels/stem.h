// A network's stem to planes of floats, written once over Simd<A>.
#pragma once

#include "max_pool.h"
#include "pointwise.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// The rows of the convolution that some rows of the result are computed from.
inline Range convolved_rows(const Stem& stem, Range rows) {
  if (!stem.max_pool) return rows;
  return {std::max<int64_t>(0, 2 * rows.begin - 1), std::min(stem.conv_height(), 2 * rows.end)};
}

// The convolution is a pointwise one whose depth are the taps of its window (im2col): of each there is a plane, of the
// pixels of x that it reads for consecutive pixels of the convolution. Taps that are a multiple of the stride of rows
// apart share a plane, of some more rows. So many rows of the convolution are computed at a time, their pixels run
// together: enough of them for whole tiles, and at 224x224, where they are two, few enough for taps and results to be
// in the L1 cache (with twelve, a stem took 1.1 times as long).
inline int64_t rows_at_once(const Stem& stem) {
  constexpr int64_t kPixels = 256;
  const int64_t rows = std::min(std::max<int64_t>(1, kPixels / stem.conv_width()), stem.conv_height());
  return stem.max_pool ? ceil_div(rows, 2) * 2 : rows;
}
// Rows of a plane of taps beyond those of the convolution, and pixels of a sorted row beyond them.
inline int64_t taps_reach(const Stem& stem) { return (stem.kernel_size - 1) / stem.stride; }
inline int64_t sorted_pitch(const Stem& stem) { return stem.conv_width() + taps_reach(stem); }
// Remainders modulo the stride that the rows of a window have.
inline int64_t row_phases(const Stem& stem) { return std::min(stem.kernel_size, stem.stride); }

// Fills the planes of sorted rows with zeros.
template <class A>
void clear_sorted(const Stem& stem, Planes<A> sorted) {
  for (int64_t i = 0; i < stem.in_channels * stem.stride; ++i) std::fill_n(sorted.channel(i), sorted_pitch(stem), A{0});
}

template <class T>
struct StemWorkspace {
  using A = accumulator_t<T>;
  StemWorkspace(const Stem& stem, void* memory) {
    const int64_t width = stem.conv_width(), rows = rows_at_once(stem);
    Arena arena(memory);
    row = arena.take<T>(stem.width);
    sorted = arena.planes<A>(stem.in_channels * stem.stride, sorted_pitch(stem));
    const int64_t planes = stem.in_channels * row_phases(stem) * stem.kernel_size;
    taps = arena.planes<A>(planes, (rows + taps_reach(stem)) * width);
    if (stem.max_pool) {
      convolved = arena.planes<A>(kTileChannels, rows * width);
      last_row = arena.planes<A>(stem.out_channels, width);
    }
    lists = {arena, 0, stem.taps()};
    bytes = arena.bytes();
  }
  T* row;
  Planes<A> sorted, taps;
  Planes<A> convolved, last_row;  // of the channels of a tile; of each channel, from the time before
  PointwiseLists<A> lists;
  int64_t bytes;
};

// Sorts the pixels of row y of a channel of x, with its padding, by the remainder of their columns modulo the stride,
// into the first pixels of a plane for each: there the pixels that a tap reads follow each other. They are zeros where
// the row lies outside of the image. The planes have zeros already where its padding goes. `own_row` has room for a row
// of x.
template <class T>
void sort_row(const Stem& stem, const T* image, int64_t c, int64_t y, T* own_row, Planes<accumulator_t<T>> planes) {
  using A = accumulator_t<T>;
  using S = Simd<A>;
  if (y < 0 || y >= stem.height) {
    for (int64_t plane = 0; plane < stem.stride; ++plane) std::fill_n(planes.channel(plane), sorted_pitch(stem), A{0});
    return;
  }
  const T* x = image + (c * stem.height + y) * stem.width;
  if (stem.layout == Layout::channels_last) {
    const T* const pixels = image + y * stem.width * stem.in_channels + c;
    for (int64_t column = 0; column < stem.width; ++column) own_row[column] = pixels[column * stem.in_channels];
    x = own_row;
  }
  // Whole vectors are stored: the last one ends in zeros, and reaches into the slack behind a plane.
  const auto place_of = [&](int64_t column) {
    return planes.channel((stem.padding + column) % stem.stride) + (stem.padding + column) / stem.stride;
  };
  A *const even = place_of(0), *const odd = place_of(1);
  for (int64_t column = 0; column < stem.width; column += stem.stride * S::kLanes) {
    const int64_t left = stem.width - column;
    const auto first = load_first(x + column, left);
    if (stem.stride == 1) {
      S::store(even + column, first);
    } else {
      const auto second = left > S::kLanes ? load_first(x + column + S::kLanes, left - S::kLanes) : typename S::V{};
      S::store(even + column / 2, S::even(first, second));
      S::store(odd + column / 2, S::odd(first, second));
    }
  }
}

// Copies whole vectors, the last of which may reach past the n.
template <class A>
void copy_vectors(const A* from, int64_t n, A* to) {
  for (int64_t i = 0; i < n; i += Simd<A>::kLanes) Simd<A>::store(to + i, Simd<A>::load(from + i));
}

// The planes of taps, while rows of the convolution are gone through.
template <class T>
class StemTaps {
 public:
  using A = accumulator_t<T>;
  StemTaps(const Stem& stem, const T* image, const StemWorkspace<T>& own, int64_t first_row)
      : stem_(stem), image_(image), own_(own), begin_(first_row), end_(first_row) {
    clear_sorted(stem, own.sorted);
  }

  // Says of each tap where in the planes its pixels for the first row of the convolution begin.
  void offsets(int64_t* offset) const {
    const int64_t k = stem_.kernel_size, s = stem_.stride;
    for (int64_t c = 0; c < stem_.in_channels; ++c) {
      for (int64_t ky = 0; ky < k; ++ky) {
        for (int64_t kx = 0; kx < k; ++kx) *offset++ = tap(c, ky % s, kx, ky / s) - own_.taps.data;
      }
    }
  }

  // Rows [row, end) of the convolution become the first ones. They follow those of the call before.
  void move_to(int64_t row, int64_t end) {
    const int64_t width = stem_.conv_width(), kept = end_ - row;
    for (int64_t c = 0; c < stem_.in_channels * row_phases(stem_) * stem_.kernel_size; ++c) {
      A* const plane = own_.taps.channel(c);
      std::memmove(plane, plane + (row - begin_) * width, kept * width * sizeof(A));
    }
    begin_ = row;
    for (; end_ < end + taps_reach(stem_); ++end_) {
      for (int64_t remainder = 0; remainder < row_phases(stem_); ++remainder) make(remainder);
    }
  }

 private:
  A* tap(int64_t c, int64_t remainder, int64_t kx, int64_t row) const {
    return own_.taps.channel((c * row_phases(stem_) + remainder) * stem_.kernel_size + kx) + row * stem_.conv_width();
  }

  // Makes row end_ of the taps in rows of this remainder.
  void make(int64_t remainder) const {
    const int64_t s = stem_.stride, y = end_ * s + remainder - stem_.padding;
    for (int64_t c = 0; c < stem_.in_channels; ++c) sort_row(stem_, image_, c, y, own_.row, own_.sorted.from(c * s));
    for (int64_t c = 0; c < stem_.in_channels; ++c) {
      for (int64_t kx = 0; kx < stem_.kernel_size; ++kx) {
        const A* const from = own_.sorted.channel(c * s + kx % s) + kx / s;
        copy_vectors(from, stem_.conv_width(), tap(c, remainder, kx, end_ - begin_));
      }
    }
  }

  const Stem& stem_;
  const T* image_;
  const StemWorkspace<T>& own_;
  int64_t begin_, end_;  // the rows of the planes
};

// Computes the rows of the max pool whose middle row is among rows [row, end) of the convolution, for the channels of a
// tile. The first of them goes to `result`.
template <class T>
void pool_rows(const Stem& stem, const RowRange& tile, int64_t row, int64_t end, const StemWorkspace<T>& own,
               Planes<accumulator_t<T>> result) {
  using A = accumulator_t<T>;
  const int64_t width = stem.conv_width(), out_width = stem.out_width();
  for (int64_t c = 0; c < tile.rows; ++c) {
    const A* const convolved = own.convolved.channel(c);
    A* const last_row = own.last_row.channel(tile.row + c);
    A* to = result.channel(tile.row + c);
    for (int64_t r = ceil_div(row, 2) * 2; r < end; r += 2, to += out_width) {
      const A* const middle = convolved + (r - row) * width;
      const A* const above = r > row ? middle - width : row > 0 ? last_row : middle;
      const A* const below = r + 1 < end ? middle + width : middle;
      max_pool_row<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>, A>(stem, {above, middle, below}, to);
    }
    copy_vectors(convolved + (end - 1 - row) * width, width, last_row);
  }
}

template <class T>
class FloatStem final : public StemKernel {
 public:
  using A = accumulator_t<T>;

  int64_t workspace_bytes(const Stem& stem) const override { return StemWorkspace<T>(stem, nullptr).bytes; }

  void run(const Stem& stem, const Convolution& conv, const void* image, Range rows, void* result, int64_t result_plane,
           void* memory) const override {
    const Range convolved = convolved_rows(stem, rows);
    const StemWorkspace<T> own(stem, memory);
    StemTaps<T> taps(stem, static_cast<const T*>(image), own, convolved.begin);
    taps.offsets(own.lists.offsets);
    for (int64_t row = convolved.begin, end; row < convolved.end; row = end) {
      const bool is_halo = stem.max_pool && row % 2 != 0;  // the row above what the first row of a strip is pooled from
      end = std::min(convolved.end, row + (is_halo ? 1 : rows_at_once(stem)));
      taps.move_to(row, end);
      const int64_t first = stem.max_pool ? ceil_div(row, 2) : row;
      const Planes<A> to = {static_cast<A*>(result) + (first - rows.begin) * stem.out_width(), result_plane};
      for (int64_t c = 0; c < stem.out_channels;) {
        const RowRange tile = {c, next_channels(stem.out_channels - c), 0};
        pointwise<A>(
            {{conv, stem.activation(), stem.taps(), stem.out_channels}, &tile, 1, c, (end - row) * stem.conv_width()},
            read_only(own.taps), {}, stem.max_pool ? own.convolved : to.from(c), false, own.lists);
        if (stem.max_pool) pool_rows(stem, tile, row, end, own, to);
        c += tile.rows;
      }
    }
  }

  Tile tile(const Stem& stem, int64_t) const override {
    const int64_t rows = std::min(rows_at_once(stem), stem.conv_height());
    return SHUFFLENET_ISA::tile<A>(stem.out_channels, rows * stem.conv_width());
  }
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
