// Units on planes of pairs of bfloat16, with weights as they are. Pointwise convolutions are products of pairs, summed
// in float; y1, and what the depthwise convolution and the pool work on, are planes of float. Behind an image's planes,
// up to a vector is read whose values are not used. See unit.h.
#pragma once

#include "average_pool.h"
#include "pairs.h"
#include "pointwise.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// ---- Pointwise convolution ------------------------------------------------------------------------------------------

struct PairConvolution {
  const Convolution& conv;
  int64_t pairs;           // of a group's depth
  const RowRange* ranges;  // any number of rows each
  int64_t range_count;
  int64_t pixels;
  bool has_lone_pixel = false;  // the last one: see has_lone_pixel in pointwise.h
};

// The deepest product whose lone pixel is taken alone, in memory on the stack: most are not half as deep.
inline constexpr int64_t kMostColumnPairs = 1024;

// Whether the last pixel of a part of a plane is taken alone.
inline bool has_lone_pair(int64_t plane, int64_t pixel_end) {
  return Products::kTakesLonePixels && has_lone_pixel<float>(plane, pixel_end);
}

// Sums all rows, one block of pixels after the other: finish(range, row, rows, sums, pixel, n) takes those of some
// rows of a range and n pixels. A range's tiles are all of one number of rows, so that AMX is prepared once: the last
// of them may begin with rows that the one before has, which are left out. Who multiplies often, as the stem does for
// each row, prepares it but once with its own `products`. A lone pixel is multiplied with the last block, while the
// rows' weights are in the L1 cache.
template <class Multiplier, class Finish>
void multiply(const PairConvolution& c, Planes<const Pair> x, Multiplier& products, Finish& finish) {
  alignas(kMemoryAlignment) float sums[kProductRows * kSumsStride];
  PairProduct p;
  p.pairs = c.pairs;
  p.x_plane = x.stride;
  p.sums = sums;
  alignas(kMemoryAlignment) Pair column[kMostColumnPairs];  // of the lone pixel
  int64_t gathered = -1;                                    // the group whose column is there
  const int64_t lone = c.has_lone_pixel && c.pairs <= kMostColumnPairs ? 1 : 0, pixels = c.pixels - lone;
  const int64_t vectors = ceil_div(pixels, Simd<float>::kLanes);
  const int64_t blocks = std::max(lone, ceil_div(vectors, kProductVectors));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = vectors * block / blocks, pixel = first * Simd<float>::kLanes;
    p.vectors = vectors * (block + 1) / blocks - first;
    const int64_t n = std::min(pixels - pixel, p.vectors * Simd<float>::kLanes);
    const int64_t behind = block + 1 == blocks ? lone : 0;
    for (const RowRange* range = c.ranges; range != c.ranges + c.range_count; ++range) {
      p.rows = ceil_div(range->rows, ceil_div(range->rows, kProductRows));
      p.x = x.channel(range->group * c.pairs) + pixel;
      products.prepare(p.rows, p.pairs);
      for (int64_t done = 0; done < range->rows;) {
        const int64_t row = std::min(done, range->rows - p.rows), end = row + p.rows;
        p.weight = static_cast<const BFloat16*>(c.conv.weight) + (range->row + row) * 2 * c.pairs;
        if (p.vectors > 0) products.run(p);
        if constexpr (Multiplier::kTakesLonePixels) {
          if (behind > 0) {
            const auto offset = [&](int64_t k) { return k * x.stride; };
            if (range->group != gathered) gather_column(p.x + n, c.pairs, offset, column);
            gathered = range->group;
            products.run_pixel(p, column, n);
          }
        }
        finish(*range, done, end - done, sums + (done - row) * kSumsStride, pixel, n + behind);
        done = end;
      }
    }
  }
}

// What is behind the sums of a convolution.
struct Finish {
  Finish(const Convolution& conv, Activation activation)
      : bias(static_cast<const float*>(conv.bias)), lower(static_cast<float>(activation.lower)) {}
  const float* bias;
  float lower;  // the activation's bound
};

// Computes y = activation(sum + bias), to planes of float: those of the channels that the rows become in the shuffle.
struct FinishPlanes : Finish {
  const Unit& unit;
  int64_t y_channel;  // channel 0 of y
  Planes<float> y;

  void operator()(const RowRange& range, int64_t first, int64_t rows, const float* sums, int64_t pixel, int64_t n) {
    using S = Simd<float>;
    const auto bound = S::broadcast(lower);
    for (int64_t row = range.row + first; row < range.row + first + rows; ++row, sums += kSumsStride) {
      const int64_t channel = row % unit.shuffle_rows() * unit.shuffle_groups + row / unit.shuffle_rows();
      const auto row_bias = S::broadcast(bias[row]);
      float* const to = y.channel(channel - y_channel) + pixel;
      for (int64_t i = 0; i < n; i += S::kLanes) {
        store_first(to + i, S::max(bound, S::load(sums + i) + row_bias), n - i);
      }
    }
  }
};

// Computes y = activation(sum + bias + residual), to pairs of rows, the first of which is an even one. A row whose
// partner is in the next tile or group, and so comes later, is kept until then.
struct FinishPairs : Finish {
  Planes<const Pair> residual;
  Planes<Pair> y;
  float kept[kSumsStride];

  void operator()(const RowRange& range, int64_t begin, int64_t rows, const float* sums, int64_t pixel, int64_t n) {
    const int64_t end = range.row + begin + rows;
    int64_t row = range.row + begin;
    if (row % 2 != 0) {
      finish(row - 1, kept, sums, pixel, n);
      ++row;
      sums += kSumsStride;
    }
    for (; row + 1 < end; row += 2, sums += 2 * kSumsStride) finish(row, sums, sums + kSumsStride, pixel, n);
    if (row < end) std::copy_n(sums, n, kept);
  }

 private:
  void finish(int64_t row, const float* first, const float* second, int64_t pixel, int64_t n) const {
    using S = Simd<float>;
    const auto first_bias = S::broadcast(bias[row]), second_bias = S::broadcast(bias[row + 1]);
    const auto bound = S::broadcast(lower);
    Pair* const to = y.channel(row / 2) + pixel;
    const Pair* const added = residual.data ? residual.channel(row / 2) + pixel : nullptr;
    for (int64_t i = 0; i < n; i += S::kLanes) {
      auto a = S::load(first + i) + first_bias, b = S::load(second + i) + second_bias;
      if (added) {
        const auto pairs = Pairs::load(added + i);
        a += Pairs::first(pairs);
        b += Pairs::second(pairs);
      }
      store_pairs(to + i, S::max(bound, a), S::max(bound, b), n - i);
    }
  }
};

// Computes y = activation(sum + bias) of a unit of v2, in the order of the shuffle by two: each row becomes a pair with
// the channel of its number beside it, which comes first.
struct FinishShuffled : Finish {
  Planes<const Pair> beside;
  Planes<Pair> y;

  void operator()(const RowRange& range, int64_t begin, int64_t rows, const float* sums, int64_t pixel, int64_t n) {
    using S = Simd<float>;
    const auto bound = S::broadcast(lower);
    for (int64_t row = range.row + begin; row < range.row + begin + rows; ++row, sums += kSumsStride) {
      const Pair* const first = beside.channel(row / 2) + pixel;
      const auto row_bias = S::broadcast(bias[row]);
      for (int64_t i = 0; i < n; i += S::kLanes) {
        const auto pairs = Pairs::load(first + i);
        const auto value = S::max(bound, S::load(sums + i) + row_bias);
        store_pairs(y.channel(row) + pixel + i, row % 2 ? Pairs::second(pairs) : Pairs::first(pairs), value, n - i);
      }
    }
  }
};

// ---- The format -----------------------------------------------------------------------------------------------------

struct PairFormat {
  using A = float;       // what y1 is in
  using Element = Pair;  // what x, y2 and the result are in
  static constexpr int64_t kTensorBytes = sizeof(Pair);
  static constexpr int64_t kChannelsPerElement = 2;

  // Shares must not cut a pair of y2, whose halves two workers would write; nor, into single rows, what the products of
  // conv1 take at once.
  static int64_t mid_multiple(const Unit& unit) {
    const bool has_whole_pairs = unit.slice_channels() % 2 == 0, has_long_runs = unit.shuffle_groups <= unit.groups;
    return has_whole_pairs && has_long_runs ? 2 * unit.groups : unit.mid_channels;
  }
  // Each slice of y2 begins with a pair of its own.
  static int64_t y2_planes(const Unit& unit) { return unit.groups * pairs_of(unit.slice_channels()); }

  static constexpr bool kKeepsShortcut = true;  // until conv3's result is paired with its

  // Tensors' images are converted by steps of their own (head_pairs.h).
  static constexpr bool is_copied(const Unit&) { return false; }
  static void copy_in(const UnitPart&, Range, Range, Planes<Pair>) {}
  static void copy_out(const UnitPart&, Range, Range, Planes<const Pair>) {}

  // The largest product for so many channels and pixels of a plane.
  static Tile tile(int64_t channels, int64_t pixels, int64_t plane = 0) {
    const int64_t vectors = ceil_div(has_lone_pair(plane, plane) ? pixels - 1 : pixels, Simd<float>::kLanes);
    return {
        ceil_div(channels, ceil_div(channels, kProductRows)), ceil_div(vectors, ceil_div(vectors, kProductVectors))};
  }

  // Cuts a worker's memory, which has room for the y1 of so many intermediate channels.
  PairFormat(const UnitPart& part, int64_t mid_channels, void* memory)
      : unit(part.unit), pointers(part.pointers), rows(part.rows) {
    Arena arena(memory);
    const int64_t in_pixels = InputRows(unit, rows).halo.count() * unit.width;
    masks = arena.take<EdgeMasks<float>>(edge_vectors<float>(unit, rows));
    y1 = arena.planes<float>(mid_channels, in_pixels);
    ranges = arena.take<RowRange>(std::max(unit.groups, unit.shuffle_groups) + unit.conv1_groups);
    in_planes = arena.planes<float>(2, in_pixels);
    out_planes = arena.planes<float>(2, rows.count() * unit.out_width());
    bytes = arena.bytes();
  }

  // Computes intermediate channels `mid` for some rows of x, to channels from 0 on: in shuffled order, as pairs of y2
  // are. Each r < shuffle_groups needs consecutive rows of conv1, and writes them shuffle_groups channels apart. All
  // channels need all rows, which then are ranges as long as conv1's groups, wherever their results go.
  void conv1(Range mid, Planes<const Pair> x, Range x_rows, Planes<float> to) const {
    const int64_t shuffle = unit.shuffle_groups, n = unit.shuffle_rows(), group_rows = unit.conv1_group_rows();
    int64_t count = 0;
    const auto add = [&](int64_t row, int64_t end) { count = add_ranges({row, end}, group_rows, count); };
    if (mid.count() == unit.mid_channels) {
      add(0, unit.mid_channels);
    } else {
      const auto first_row = [=](int64_t r, int64_t channel) { return r * n + ceil_div(channel - r, shuffle); };
      for (int64_t r = 0; r < shuffle; ++r) add(first_row(r, mid.begin), first_row(r, mid.end));
    }
    Products products;
    FinishPlanes finish = {{pointers.conv1, unit.conv1_activation()}, unit, mid.begin, to};
    const bool has_lone = has_lone_pair(unit.height * unit.width, x_rows.end * unit.width);
    multiply({pointers.conv1, unit.conv1_depth() / 2, ranges, count, x_rows.count() * unit.width, has_lone},
             x.from(unit.conv1_first() / 2), products, finish);
  }

  // Computes two channels at a time.
  void depthwise(Range mid, Planes<const float> from, Planes<Pair> y2) const {
    const int64_t slice = unit.slice_channels(), pixels = rows.count() * unit.out_width();
    for (int64_t c = mid.begin, n; c < mid.end; c += n) {
      const int64_t in_slice = c % slice;
      n = std::min<int64_t>(2, slice - in_slice);
      for (int64_t i = 0; i < n; ++i) {
        const float* const plane = from.channel(c + i - mid.begin);
        depthwise_channel<float>(unit, rows, pointers.conv2, c + i, masks, plane, out_planes.channel(i));
      }
      if (n == 1) std::fill_n(out_planes.channel(1), pixels, 0.0f);
      Pair* const pairs = y2.channel(c / slice * pairs_of(slice) + in_slice / 2);
      pack(out_planes.channel(0), out_planes.channel(1), pixels, pairs);
    }
  }

  void pool(Range channels, Planes<const Pair> x, int64_t x_row, Planes<const Pair> x_above,
            Planes<Pair> result) const {
    for (int64_t pair = channels.begin / 2; pair < channels.end / 2; ++pair) {
      unpack_input(pair, x, x_row, x_above);
      const int64_t first_row = InputRows(unit, rows).halo.begin;
      average_pool<float>(unit, rows, {0, 2}, masks, read_only(in_planes), first_row, {}, out_planes);
      pack(out_planes.channel(0), out_planes.channel(1), rows.count() * unit.out_width(), result.channel(pair));
    }
  }

  void shortcut1(Range channels, Planes<const Pair> x, int64_t x_row, Planes<const Pair> x_above,
                 Planes<Pair> y2) const {
    for (int64_t pair = channels.begin / 2; pair < channels.end / 2; ++pair) {
      unpack_input(pair, x, x_row, x_above);
      for (int64_t i = 0; i < 2; ++i) {
        depthwise_channel<float>(
            unit, rows, pointers.shortcut1, 2 * pair + i, masks, in_planes.channel(i), out_planes.channel(i));
      }
      pack(out_planes.channel(0), out_planes.channel(1), rows.count() * unit.out_width(), y2.channel(pair));
    }
  }
  void shortcut2(Range channels, Planes<const Pair> y2, Planes<Pair> result) const {
    if (channels.count() == 0) return;
    const RowRange range = {channels.begin, channels.count(), 0};
    Products products;
    FinishPairs finish = {{pointers.shortcut2, unit.conv3_activation()}, {}, result, {}};
    multiply({pointers.shortcut2, unit.in_channels / 2, &range, 1, rows.count() * unit.out_width(), has_lone_result()},
             y2, products, finish);
  }

  // Computes channels from an even one on; in v2, with those of their numbers that are beside them.
  void conv3(Range channels, Planes<const Pair> y2, Planes<const Pair> shortcut, Planes<Pair> result) const {
    const int64_t count = add_ranges(channels, unit.out_channels / unit.groups, 0);
    Products products;
    const Finish behind = {pointers.conv3, unit.conv3_activation()};
    const PairConvolution conv = {pointers.conv3, pairs_of(unit.slice_channels()), ranges,
                                  count,          rows.count() * unit.out_width(), has_lone_result()};
    if (unit.is_v2()) {
      FinishShuffled finish = {behind, shortcut, result};
      multiply(conv, y2, products, finish);
    } else {
      FinishPairs finish = {behind, unit.adds_residual() ? shortcut : Planes<const Pair>{}, result, {}};
      multiply(conv, y2, products, finish);
    }
  }

  // Unpacks two channels of x to in_planes, with their halo rows.
  void unpack_input(int64_t pair, Planes<const Pair> x, int64_t x_row, Planes<const Pair> x_above) const {
    float *const first = in_planes.channel(0), *const second = in_planes.channel(1);
    copy_with_halo(
        unit, rows, x.channel(pair), x_row, x_above.data ? x_above.channel(pair) : nullptr,
        [=](const Pair* from, int64_t pixel, int64_t n) { unpack(from, n, first + pixel, second + pixel); },
        [=](int64_t pixel, int64_t n) {
          std::fill_n(first + pixel, n, 0.0f);
          std::fill_n(second + pixel, n, 0.0f);
        });
  }

  // Adds rows to so many ranges, cut where groups end, and returns how many there are.
  int64_t add_ranges(Range rows, int64_t group_rows, int64_t count) const {
    for (int64_t row = rows.begin; row < rows.end; row += ranges[count++].rows) {
      const int64_t group = row / group_rows;
      ranges[count] = {row, std::min(rows.end, (group + 1) * group_rows) - row, group};
    }
    return count;
  }

  bool has_lone_result() const {
    return has_lone_pair(unit.out_height() * unit.out_width(), rows.end * unit.out_width());
  }

  const Unit& unit;
  const UnitPointers& pointers;
  Range rows;
  EdgeMasks<float>* masks;
  Planes<float> y1;
  RowRange* ranges;
  Planes<float> in_planes, out_planes;  // of two channels
  int64_t bytes;
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
