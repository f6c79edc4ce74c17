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

// Sorts elements 0, 2, 4, … and 1, 3, 5, … of n into two arrays, cut where these end.
template <class T>
void sort_even_odd(const T* from, int64_t n, accumulator_t<T>* even, int64_t evens, accumulator_t<T>* odd,
                   int64_t odds) {
  using S = Simd<accumulator_t<T>>;
  constexpr int64_t kLanes = S::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= std::min({n / 2, evens, odds}); i += kLanes) {
    const auto first = Stored<T>::load(from + 2 * i), second = Stored<T>::load(from + 2 * i + kLanes);
    S::store(even + i, S::even(first, second));
    S::store(odd + i, S::odd(first, second));
  }
  for (; 2 * i < n; i += kLanes) {
    const int64_t left = n - 2 * i;
    const auto first = load_first(from + 2 * i, left);
    const auto second = left > kLanes ? load_first(from + 2 * i + kLanes, left - kLanes) : typename S::V{};
    if (evens > i) S::store(even + i, S::even(first, second), S::first(evens - i));
    if (odds > i) S::store(odd + i, S::odd(first, second), S::first(odds - i));
  }
}

// Where the columns of a row of x go that a column and every stride-th behind it are: to which of the row's planes,
// from where on, and how many of them have room.
struct SortedColumns {
  SortedColumns(const Stem& stem, int64_t pitch, int64_t column)
      : plane((stem.padding + column) % stem.stride),
        start(std::min((stem.padding + column) / stem.stride, pitch)),
        count(std::min(ceil_div(stem.width - column, stem.stride), pitch - start)),
        after(pitch - start - count) {}

  // Finds them in these planes, and puts zeros around them.
  template <class A>
  A* in(Planes<A> planes) const {
    A* const row = planes.channel(plane);
    std::fill_n(row, start, A{0});
    std::fill_n(row + start + count, after, A{0});
    return row + start;
  }
  int64_t plane, start, count, after;
};

// Sorts the pixels of a row of x, with its padding, by the remainder of their columns modulo the stride, into a row of
// `pitch` pixels for each: there the pixels that a tap reads follow each other.
template <class T>
class RowSorter {
 public:
  using A = accumulator_t<T>;
  // `row` has room for a row of x.
  RowSorter(const Stem& stem, int64_t pitch, const T* image, T* row)
      : stem_(stem),
        pitch_(pitch),
        image_(image),
        row_(row),
        even_(stem, pitch, 0),
        odd_(stem, pitch, std::min(stem.stride - 1, stem.width)) {}

  // Sorts row y of a channel, of zeros where that lies outside of the image, to the first pixels of some planes.
  void sort(int64_t c, int64_t y, Planes<A> planes) const {
    using S = Simd<A>;
    if (y < 0 || y >= stem_.height) {
      for (int64_t plane = 0; plane < stem_.stride; ++plane) std::fill_n(planes.channel(plane), pitch_, A{0});
      return;
    }
    const T* x = image_ + (c * stem_.height + y) * stem_.width;
    if (stem_.layout == Layout::channels_last) {
      const T* const pixels = image_ + y * stem_.width * stem_.in_channels + c;
      for (int64_t column = 0; column < stem_.width; ++column) row_[column] = pixels[column * stem_.in_channels];
      x = row_;
    }
    if (stem_.stride == 1) {
      A* const to = even_.in(planes);
      for (int64_t j = 0; j < even_.count; j += S::kLanes) {
        S::store(to + j, load_first(x + j, even_.count - j), S::first(even_.count - j));
      }
    } else {
      sort_even_odd<T>(x, stem_.width, even_.in(planes), even_.count, odd_.in(planes), odd_.count);
    }
  }

 private:
  const Stem& stem_;
  int64_t pitch_;
  const T* image_;
  T* row_;
  SortedColumns even_, odd_;
};

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
      : stem_(stem),
        sorter_(stem, sorted_pitch(stem), image, own.row),
        sorted_(own.sorted),
        taps_(own.taps),
        begin_(first_row),
        end_(first_row) {}

  // Says of each tap where in the planes its pixels for the first row of the convolution begin.
  void offsets(int64_t* offset) const {
    const int64_t k = stem_.kernel_size, s = stem_.stride;
    for (int64_t c = 0; c < stem_.in_channels; ++c) {
      for (int64_t ky = 0; ky < k; ++ky) {
        for (int64_t kx = 0; kx < k; ++kx) *offset++ = tap(c, ky % s, kx, ky / s) - taps_.data;
      }
    }
  }

  // Rows [row, end) of the convolution become the first ones. They follow those of the call before.
  void move_to(int64_t row, int64_t end) {
    const int64_t width = stem_.conv_width(), kept = end_ - row;
    for (int64_t c = 0; c < stem_.in_channels * row_phases(stem_) * stem_.kernel_size; ++c) {
      A* const plane = taps_.channel(c);
      std::memmove(plane, plane + (row - begin_) * width, kept * width * sizeof(A));
    }
    begin_ = row;
    for (; end_ < end + taps_reach(stem_); ++end_) {
      for (int64_t remainder = 0; remainder < row_phases(stem_); ++remainder) make(remainder);
    }
  }

 private:
  A* tap(int64_t c, int64_t remainder, int64_t kx, int64_t row) const {
    return taps_.channel((c * row_phases(stem_) + remainder) * stem_.kernel_size + kx) + row * stem_.conv_width();
  }

  // Makes row end_ of the taps in rows of this remainder.
  void make(int64_t remainder) const {
    const int64_t s = stem_.stride, y = end_ * s + remainder - stem_.padding;
    for (int64_t c = 0; c < stem_.in_channels; ++c) sorter_.sort(c, y, sorted_.from(c * s));
    for (int64_t c = 0; c < stem_.in_channels; ++c) {
      for (int64_t kx = 0; kx < stem_.kernel_size; ++kx) {
        const A* const from = sorted_.channel(c * s + kx % s) + kx / s;
        copy_vectors(from, stem_.conv_width(), tap(c, remainder, kx, end_ - begin_));
      }
    }
  }

  const Stem& stem_;
  RowSorter<T> sorter_;
  Planes<A> sorted_, taps_;
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
        pointwise<A>({conv, stem.activation(), stem.taps(), &tile, 1, c, (end - row) * stem.conv_width()},
                     read_only(own.taps), {}, stem.max_pool ? own.convolved : to.from(c), false, own.lists);
        if (stem.max_pool) pool_rows(stem, tile, row, end, own, to);
        c += tile.rows;
      }
    }
  }

  Tile tile(const Stem& stem, int64_t) const override {
    const int64_t rows = std::min(rows_at_once(stem), stem.conv_height());
    return largest_tile(stem.out_channels, PixelTiles<A>(rows * stem.conv_width()));
  }
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
