// A network's stem, written once over Simd<A>.
#pragma once

#include "depthwise.h"
#include "pointwise.h"
#include "staging.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// Pixels, or rows, of sorted ones over which the window reaches.
inline int64_t sorted_reach(const Stem& stem) { return (stem.kernel_size - 1) / stem.stride; }
// Pixels of a sorted row.
inline int64_t sorted_pitch(const Stem& stem) { return stem.conv_width() + sorted_reach(stem); }

// The rows of the convolution that some rows of the result are computed from.
struct ConvolvedRows {
  ConvolvedRows(const Stem& stem, int64_t row_begin, int64_t row_end)
      : begin(stem.max_pool ? std::max<int64_t>(0, 2 * row_begin - 1) : row_begin),
        end(stem.max_pool ? std::min(stem.conv_height(), 2 * row_end) : row_end) {}
  int64_t begin, end;
};

// The rows that some rows of the stem's result need. Rows and columns of x, with its padding, are sorted by their
// remainder modulo the stride into stride x stride planes a channel, so that each tap of the window reads consecutive
// pixels: the convolution is then a pointwise one whose depth are the taps. Its rows run together; the last columns of
// each, as many as the window reaches over, are of no use.
struct StemRows : ConvolvedRows {
  StemRows(const Stem& stem, int64_t row_begin, int64_t row_end)
      : ConvolvedRows(stem, row_begin, row_end),
        reach(sorted_reach(stem)),
        pitch(sorted_pitch(stem)),
        sorted_rows(end - begin + reach),
        pixels((end - begin - 1) * pitch + stem.conv_width()),
        window_rows(std::clamp(
            kWindowElements / (stem.out_channels * pitch), kLeastWindowRows, std::max(kLeastWindowRows, end - begin))) {
  }
  // Of the convolution and of what it reads, the last rows are kept, in windows that are moved down where they end. A
  // result is computed from three rows at most, and the next ones are convolved in whole vectors, which reach into a
  // fourth; the more rows there are, the less is moved (with 4 rows, at 224x224, that took 13 % of the stem), and the
  // less of the windows is in the L1 cache.
  static constexpr int64_t kLeastWindowRows = 10, kWindowElements = 32 * 1024;
  static_assert(kLeastWindowRows >= 4, "three rows and the vectors' reach must fit");
  int64_t reach;
  int64_t pitch;        // pixels from row to row
  int64_t sorted_rows;  // of each plane of x
  int64_t pixels;       // of the convolution
  int64_t window_rows;
};

template <class T>
struct StemScratch {
  using A = accumulator_t<T>;
  StemScratch(const Stem& stem, const StemRows& rows, void* memory) {
    Arena arena(memory);
    const int64_t window = rows.window_rows * rows.pitch + 2 * Simd<A>::kLanes;
    sorted = arena.planes<A>(stem.in_channels * stem.stride * stem.stride, window + (rows.reach + 1) * rows.pitch);
    convolved = arena.planes<A>(stem.out_channels, window);
    row = arena.take<T>(stem.width);
    work = {arena, stem.out_channels, stem.taps()};
    bytes = arena.bytes();
  }
  Planes<A> sorted, convolved;
  T* row;
  PointwiseScratch<A> work;
  int64_t bytes;
};

// Elements 0, 2, 4, … and 1, 3, 5, … of n to two arrays, cut where they end.
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

  // With zeros around them.
  template <class A>
  A* in(Planes<A> planes) const {
    A* const row = planes.channel(plane);
    std::fill_n(row, start, A{0});
    std::fill_n(row + start + count, after, A{0});
    return row + start;
  }
  int64_t plane, start, count, after;
};

// Sorts rows of x, each into `stride` rows of `pitch` pixels.
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

  // Row y of a channel, of zeros where that lies outside of the image, to the first pixels of some planes.
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

// Rows [first, end) of the sorted planes, whose memory begins with pixel `base`.
template <class T>
void sort_rows(const Stem& stem, const StemRows& rows, int64_t first, int64_t end, int64_t base, const T* image,
               const StemScratch<T>& scratch) {
  const int64_t s = stem.stride;
  const RowSorter<T> sorter(stem, rows.pitch, image, scratch.row);
  for (int64_t i = first; i < end; ++i) {
    for (int64_t remainder = 0; remainder < s; ++remainder) {
      const int64_t y = (rows.begin + i) * s + remainder - stem.padding;
      for (int64_t c = 0; c < stem.in_channels; ++c) {
        const auto planes = scratch.sorted.from((c * s + remainder) * s);
        sorter.sort(c, y, {planes.data + (i * rows.pitch - base), planes.stride});
      }
    }
  }
}

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
  // A row of results. One of the rows that lies outside of the image can be any of the others once more.
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
  // Of the columns before the row's end.
  static V largest_inside(const Rows& from, int64_t column, int64_t width) {
    const auto inside = S::first(std::max<int64_t>(0, width - column));
    V result = {};
    for (const A* row : from) result = largest(result, signless(S::load(row + column, inside)));
    return result;
  }
};

template <class A>
using MaxPoolOfElements = MaxPool<A, std::conditional_t<sizeof(A) == 4, int32_t, int64_t>>;

template <class T>
int64_t stem_scratch_bytes(const Stem& stem, int64_t row_begin, int64_t row_end) {
  return StemScratch<T>(stem, StemRows(stem, row_begin, row_end), nullptr).bytes;
}

template <class A>
Tile stem_tile(const Stem& stem, int64_t row_begin, int64_t row_end) {
  const StemRows rows(stem, row_begin, row_end);
  return largest_tile(stem.out_channels, PixelTiles<A>(std::min(rows.pixels, (stem.max_pool ? 2 : 1) * rows.pitch)));
}

// Rows of the stem's result, as planes of the accumulator type. What a row needs is sorted and convolved just before
// it, as far as that has not been done for the rows above: so it is still near.
template <class T>
void run_stem(const Stem& stem, const Convolution& conv, const void* image, int64_t row_begin, int64_t row_end,
              void* result, int64_t result_plane, void* memory) {
  using A = accumulator_t<T>;
  const StemRows rows(stem, row_begin, row_end);
  const StemScratch<T> scratch(stem, rows, memory);
  int64_t* offset = scratch.work.offsets;
  for (int64_t c = 0; c < stem.in_channels; ++c) {
    for (int64_t ky = 0; ky < stem.kernel_size; ++ky) {
      for (int64_t kx = 0; kx < stem.kernel_size; ++kx) {
        const int64_t plane = (c * stem.stride + ky % stem.stride) * stem.stride + kx % stem.stride;
        *offset++ = plane * scratch.sorted.stride + ky / stem.stride * rows.pitch + kx / stem.stride;
      }
    }
  }
  scratch.work.fill_weight_offsets(stem.taps());
  int64_t count = 0;
  for (int64_t row = 0; row < stem.out_channels; row += scratch.work.row_tiles[count++].rows) {
    scratch.work.row_tiles[count] = {row, next_channels(stem.out_channels - row), 0};
  }

  int64_t sorted_rows = 0, convolved_pixels = 0;  // so far
  int64_t base = 0;                               // the pixel with which the windows begin
  const auto move_windows = [&](int64_t first_row) {
    const int64_t first = first_row * rows.pitch / Simd<A>::kLanes * Simd<A>::kLanes;
    const auto move = [&](Planes<A> planes, int64_t n, int64_t end) {
      for (int64_t i = 0; i < n; ++i) {
        std::memmove(planes.channel(i), planes.channel(i) + (first - base), (end - first) * sizeof(A));
      }
    };
    move(scratch.convolved, stem.out_channels, convolved_pixels);
    move(scratch.sorted, stem.in_channels * stem.stride * stem.stride, sorted_rows * rows.pitch);
    base = first;
  };
  // Rows [first_row, end_row) of the convolution are in the window afterwards.
  const auto convolve = [&](int64_t first_row, int64_t end_row) {
    // Whole vectors, which reach into the next row.
    const int64_t end = std::min(rows.pixels, ceil_div(end_row * rows.pitch, Simd<A>::kLanes) * Simd<A>::kLanes);
    if (end <= convolved_pixels) return;
    if (end - base > rows.window_rows * rows.pitch) move_windows(first_row);
    const int64_t sorted_end = std::min(rows.sorted_rows, ceil_div(end, rows.pitch) + rows.reach);
    sort_rows<T>(stem, rows, sorted_rows, sorted_end, base, static_cast<const T*>(image), scratch);
    sorted_rows = sorted_end;
    const int64_t done = convolved_pixels - base;
    pointwise<A>({conv, stem.taps(), scratch.work.row_tiles, count, 0, end - convolved_pixels},
                 {scratch.sorted.data + done, scratch.sorted.stride}, {},
                 {scratch.convolved.data + done, scratch.convolved.stride}, false, scratch.work);
    convolved_pixels = end;
  };

  const int64_t width = stem.conv_width(), out_width = stem.out_width();
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t middle = stem.max_pool ? 2 * row : row;
    const int64_t first = stem.max_pool ? std::max(rows.begin, middle - 1) : row;
    const int64_t last = stem.max_pool ? std::min(rows.end, middle + 2) - 1 : row;
    convolve(first - rows.begin, last + 1 - rows.begin);
    for (int64_t c = 0; c < stem.out_channels; ++c) {
      const A* const window = scratch.convolved.channel(c) - (rows.begin * rows.pitch + base);
      A* const to = static_cast<A*>(result) + c * result_plane + (row - row_begin) * out_width;
      if (stem.max_pool) {
        MaxPoolOfElements<A>::row(
            {window + first * rows.pitch, window + middle * rows.pitch, window + last * rows.pitch}, width, out_width,
            to);
      } else {
        std::copy_n(window + row * rows.pitch, out_width, to);
      }
    }
  }
}

template <class T>
constexpr StemKernel stem_kernel_for() {
  return {sizeof(accumulator_t<T>), 1, stem_scratch_bytes<T>, run_stem<T>, stem_tile<accumulator_t<T>>};
}

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
