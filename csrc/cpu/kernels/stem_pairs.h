// A network's stem to planes of pairs: products of pairs whose depth are the taps of the window.
//
// A row of x becomes stem_row_pairs planes of a row's pairs: pixel j of a plane holds what two taps of the window's row
// read for column j of the convolution. The planes of consecutive rows follow each other, so that those of a window are
// one matrix, whose rows a product takes as they lie.
#pragma once

#include "format_pairs.h"
#include "stem.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

template <class T>
struct PairStemWorkspace {
  PairStemWorkspace(const Stem& stem, void* memory)
      : window_rows(stem.kernel_size + (kConvolvedAtOnce - 1) * stem.stride) {
    const int64_t pooled_planes = stem.max_pool ? kPoolRows * stem.out_channels / 2 : 0;
    Arena arena(memory);
    row = arena.take<T>(stem.width);
    sorted = arena.planes<float>(stem.in_channels * stem.stride, sorted_pitch(stem));
    zeros = arena.planes<float>(1, stem.conv_width()).data;
    taps = arena.planes<Pair>(window_rows * stem_row_pairs(stem), stem.conv_width());
    convolved = arena.planes<Pair>(pooled_planes, stem.conv_width());
    bytes = arena.bytes();
  }
  // The taps of so many rows of the convolution are made before the first of them is computed: AMX's loads wait for
  // stores just ahead of them (with one row at once, a quarter of the products' time). Twice as many were no faster.
  static constexpr int64_t kConvolvedAtOnce = 4;
  int64_t window_rows;  // of x
  T* row;
  Planes<float> sorted;
  float* zeros;                  // the partner of a row's last tap, where it has none
  Planes<Pair> taps, convolved;  // the latter: kPoolRows rows in turn
  int64_t bytes;
};

// Makes the taps of row y of x.
template <class T>
void pair_taps(const Stem& stem, const T* image, int64_t y, const PairStemWorkspace<T>& own, Planes<Pair> taps) {
  const int64_t k = stem.kernel_size, s = stem.stride, count = stem.in_channels * k;
  for (int64_t c = 0; c < stem.in_channels; ++c) sort_row(stem, image, c, y, own.row, own.sorted.from(c * s));
  const auto tap = [&](int64_t i) -> const float* {
    return i < count ? own.sorted.channel(i / k * s + i % k % s) + i % k / s : own.zeros;
  };
  for (int64_t pair = 0; pair < stem_row_pairs(stem); ++pair) {
    pack(tap(2 * pair), tap(2 * pair + 1), stem.conv_width(), taps.channel(pair));
  }
}

template <class T>
class PairStem final : public StemKernel {
 public:
  int64_t workspace_bytes(const Stem& stem) const override { return PairStemWorkspace<T>(stem, nullptr).bytes; }

  void run(const Stem& stem, const Convolution& conv, const void* image, Range rows, void* result, int64_t result_plane,
           void* memory) const override {
    const PairStemWorkspace<T> own(stem, memory);
    const int64_t row_pairs = stem_row_pairs(stem);
    const RowRange range = {0, stem.out_channels, 0};
    Products products;

    const Range needed = convolved_rows(stem, rows);
    std::fill_n(own.zeros, stem.conv_width(), 0.0f);
    clear_sorted(stem, own.sorted);
    // Rows of x, counted from the first one of its padding on: those whose taps are there.
    int64_t begin = needed.begin * stem.stride, end = begin;
    const auto taps_of = [&](int64_t row) { return own.taps.from((row - begin) * row_pairs); };
    // Makes the taps of as many rows as there is room for, from `row` on.
    const auto make_taps = [&](int64_t row) {
      if (end > row) {
        const Planes<Pair> kept = taps_of(row);
        std::memmove(own.taps.data, kept.data, (end - row) * row_pairs * kept.stride * sizeof(Pair));
      }
      begin = row;
      const int64_t last = (needed.end - 1) * stem.stride + stem.kernel_size;
      for (end = std::max(end, row); end < std::min(begin + own.window_rows, last); ++end) {
        pair_taps(stem, static_cast<const T*>(image), end - stem.padding, own, taps_of(end));
      }
    };
    // A row of the convolution. Each call has a later row than the one before.
    const auto convolve = [&](int64_t row, Planes<Pair> y) {
      if (row * stem.stride + stem.kernel_size > end) make_taps(row * stem.stride);
      FinishPairs finish = {{conv, stem.activation()}, {}, y, {}};
      multiply({conv, stem.kernel_size * row_pairs, &range, 1, stem.conv_width()},
               read_only(taps_of(row * stem.stride)), products, finish);
    };

    Pair* to = static_cast<Pair*>(result);
    if (!stem.max_pool) {
      for (int64_t row = rows.begin; row < rows.end; ++row, to += stem.out_width()) convolve(row, {to, result_plane});
      return;
    }
    const int64_t channels = stem.out_channels / 2;
    const auto convolved = [&](int64_t row) { return own.convolved.from(row % kPoolRows * channels); };
    const auto lanes = [](Planes<Pair> row, int64_t c) { return reinterpret_cast<const float*>(row.channel(c)); };
    int64_t next = needed.begin;
    for (int64_t row = rows.begin; row < rows.end; ++row, to += stem.out_width()) {
      const int64_t rows_end = std::min(stem.conv_height(), 2 * row + 2);
      for (; next < rows_end; ++next) convolve(next, convolved(next));
      const int64_t middle = 2 * row;
      const auto first = convolved(std::max<int64_t>(0, middle - 1)), last = convolved(rows_end - 1);
      for (int64_t c = 0; c < channels; ++c) {
        max_pool_row<int16_t, float>(stem, {lanes(first, c), lanes(convolved(middle), c), lanes(last, c)},
                                     reinterpret_cast<float*>(to + c * result_plane));
      }
    }
  }

  Tile tile(const Stem& stem, int64_t) const override { return PairFormat::tile(stem.out_channels, stem.conv_width()); }
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
