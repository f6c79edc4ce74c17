// Units on bfloat16, with weights as they are and images between the steps as planes of pairs of channels. Pointwise
// convolutions are products of pairs, summed in float; y1, and what the depthwise convolution and the pool work on, are
// planes of float. Scales are expected folded into the weights. Behind an image's planes, up to a vector is read whose
// values are not used. Included behind an ISA's pair_product*.h.
#pragma once

#include "pairs.h"
#include "unit_strips.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

inline int64_t pairs_of(int64_t channels) { return ceil_div(channels, 2); }

// Stores the first n pixels of a vector.
inline void store_pixels(float* p, Simd<float>::V v, int64_t n) {
  if (n >= Simd<float>::kLanes) return Simd<float>::store(p, v);
  Simd<float>::store(p, v, Simd<float>::first(n));
}
inline void store_pairs(Pair* p, Simd<float>::V first, Simd<float>::V second, int64_t n) {
  store_pixels(reinterpret_cast<float*>(p), Pairs::pack(first, second), n);
}

inline void pack(const float* first, const float* second, int64_t pixels, Pair* pairs) {
  using S = Simd<float>;
  for (int64_t i = 0; i < pixels; i += S::kLanes) {
    store_pairs(pairs + i, load_first(first + i, pixels - i), load_first(second + i, pixels - i), pixels - i);
  }
}

inline void unpack(const Pair* pairs, int64_t pixels, float* first, float* second) {
  using S = Simd<float>;
  for (int64_t i = 0; i < pixels; i += S::kLanes) {
    const auto both = Pairs::load(pairs + i);
    store_pixels(first + i, Pairs::first(both), pixels - i);
    store_pixels(second + i, Pairs::second(both), pixels - i);
  }
}

// ---- Pointwise convolution ------------------------------------------------------------------------------------------

// Rows that share their inputs, any number of them.
struct RowRange {
  int64_t row, rows, group;
  int64_t y_channel;  // of the first row's results, where they go to planes of float
};

struct PairConvolution {
  const Convolution& conv;
  int64_t pairs;  // of a group's depth
  const RowRange* ranges;
  int64_t range_count;
  int64_t pixels;
};

// Sums for all rows, blocks of pixels after each other: finish(range, row, rows, sums, pixel, n) takes those of some
// rows of a range and n pixels. A range's tiles are all of one number of rows, so that AMX is prepared once: the last
// of them may begin with rows that the one before has, which are left out. Who multiplies often, as the stem does for
// each row, prepares it but once with its own `products`.
template <class Finish>
void multiply(const PairConvolution& c, Planes<const Pair> x, Products& products, Finish& finish) {
  alignas(kScratchAlignment) float sums[kProductRows * kProductPixels];
  PairProduct p;
  p.pairs = c.pairs;
  p.x_plane = x.stride;
  p.sums = sums;
  const int64_t vectors = ceil_div(c.pixels, Simd<float>::kLanes), blocks = ceil_div(vectors, kProductVectors);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = vectors * block / blocks, pixel = first * Simd<float>::kLanes;
    p.vectors = vectors * (block + 1) / blocks - first;
    const int64_t n = std::min(c.pixels - pixel, p.vectors * Simd<float>::kLanes);
    for (const RowRange* range = c.ranges; range != c.ranges + c.range_count; ++range) {
      p.rows = ceil_div(range->rows, ceil_div(range->rows, kProductRows));
      p.x = x.channel(range->group * c.pairs) + pixel;
      products.prepare(p.rows, p.pairs);
      for (int64_t done = 0; done < range->rows;) {
        const int64_t row = std::min(done, range->rows - p.rows), end = row + p.rows;
        p.weight = static_cast<const BFloat16*>(c.conv.weight) + (range->row + row) * 2 * c.pairs;
        products.run(p);
        finish(*range, done, end - done, sums + (done - row) * kProductPixels, pixel, n);
        done = end;
      }
    }
  }
}

// y = relu(sum + bias), to planes of float.
struct FinishPlanes {
  const float* bias;
  int64_t channel_step;  // between the channels of y that neighbouring rows go to
  Planes<float> y;

  void operator()(const RowRange& range, int64_t first, int64_t rows, const float* sums, int64_t pixel, int64_t n) {
    using S = Simd<float>;
    for (int64_t row = first; row < first + rows; ++row, sums += kProductPixels) {
      const auto row_bias = S::broadcast(bias[range.row + row]);
      float* const to = y.channel(range.y_channel + row * channel_step) + pixel;
      for (int64_t i = 0; i < n; i += S::kLanes) {
        store_pixels(to + i, S::max(S::V{}, S::load(sums + i) + row_bias), n - i);
      }
    }
  }
};

// y = relu(sum + bias + residual), to pairs of rows, the first of which is an even one. A row whose partner is in the
// next tile or group, and so comes later, is kept until then.
struct FinishPairs {
  const float* bias;
  Planes<const Pair> residual;
  Planes<Pair> y;
  float kept[kProductPixels];

  void operator()(const RowRange& range, int64_t begin, int64_t rows, const float* sums, int64_t pixel, int64_t n) {
    const int64_t end = range.row + begin + rows;
    int64_t row = range.row + begin;
    if (row % 2 != 0) {
      finish(row - 1, kept, sums, pixel, n);
      ++row;
      sums += kProductPixels;
    }
    for (; row + 1 < end; row += 2, sums += 2 * kProductPixels) finish(row, sums, sums + kProductPixels, pixel, n);
    if (row < end) std::copy_n(sums, n, kept);
  }

 private:
  void finish(int64_t row, const float* first, const float* second, int64_t pixel, int64_t n) const {
    using S = Simd<float>;
    const auto first_bias = S::broadcast(bias[row]), second_bias = S::broadcast(bias[row + 1]);
    Pair* const to = y.channel(row / 2) + pixel;
    const Pair* const added = residual.data ? residual.channel(row / 2) + pixel : nullptr;
    for (int64_t i = 0; i < n; i += S::kLanes) {
      auto a = S::load(first + i) + first_bias, b = S::load(second + i) + second_bias;
      if (added) {
        const auto pairs = Pairs::load(added + i);
        a += Pairs::first(pairs);
        b += Pairs::second(pairs);
      }
      store_pairs(to + i, S::max(S::V{}, a), S::max(S::V{}, b), n - i);
    }
  }
};

// Some channels of y1, in shuffled order, as pairs of y2 are: intermediate channel n * groups + r is row
// r * slice_channels + n of conv1, so that each r needs consecutive rows and writes them `groups` channels apart.
inline void conv1_pairs(const Unit& unit, const Convolution& conv, Channels channels, Planes<const Pair> x,
                        int64_t pixels, Planes<float> y1, RowRange* ranges) {
  const int64_t slice = unit.slice_channels(), group_rows = unit.conv1_group_rows();
  int64_t count = 0;
  for (int64_t r = 0; r < unit.groups; ++r) {
    const int64_t row_end = r * slice + ceil_div(channels.end - r, unit.groups);
    int64_t row = r * slice + ceil_div(channels.begin - r, unit.groups);
    while (row < row_end) {
      const int64_t group = row / group_rows, rows = std::min(row_end, (group + 1) * group_rows) - row;
      ranges[count++] = {row, rows, group, (row - r * slice) * unit.groups + r - channels.begin};
      row += rows;
    }
  }
  Products products;
  FinishPlanes finish = {static_cast<const float*>(conv.bias), unit.groups, y1};
  multiply({conv, unit.conv1_depth() / 2, ranges, count, pixels}, x, products, finish);
}

// Some of conv3's output channels, from an even one on.
inline void conv3_pairs(const Unit& unit, const Convolution& conv, Channels channels, Planes<const Pair> y2,
                        int64_t pixels, Planes<const Pair> residual, Planes<Pair> result, RowRange* ranges) {
  const int64_t group_rows = unit.out_channels / unit.groups;
  int64_t count = 0;
  for (int64_t row = channels.begin; row < channels.end;) {
    const int64_t group = row / group_rows, rows = std::min(channels.end, (group + 1) * group_rows) - row;
    ranges[count++] = {row, rows, group, row};
    row += rows;
  }
  Products products;
  FinishPairs finish = {static_cast<const float*>(conv.bias), residual, result, {}};
  multiply({conv, pairs_of(unit.slice_channels()), ranges, count, pixels}, y2, products, finish);
}

// ---- The unit -------------------------------------------------------------------------------------------------------

// Planes of pairs of y2: each slice begins with a pair of its own.
inline int64_t y2_pairs(const Unit& unit) { return unit.groups * pairs_of(unit.slice_channels()); }

// What a worker needs apart from y1.
struct PairScratch {
  PairScratch(const Unit& unit, const Part& part, void* memory) {
    const InputRows in(unit, part);
    Arena arena(memory);
    masks = arena.take<EdgeMasks<float>>(edge_vectors<float>(unit, part));
    ranges = arena.take<RowRange>(unit.groups + unit.conv1_groups);
    in_planes = arena.planes<float>(2, (in.halo_end - in.halo_begin) * unit.width);
    out_planes = arena.planes<float>(2, (part.row_end - part.row_begin) * unit.out_width());
    bytes = arena.bytes();
  }
  EdgeMasks<float>* masks;
  RowRange* ranges;
  Planes<float> in_planes, out_planes;  // of two channels
  int64_t bytes;
};

// As depthwise, to y2's pairs: two channels at a time.
inline void depthwise_pairs(const Unit& unit, const Part& part, const Convolution& conv, Channels channels,
                            Planes<const float> y1, Planes<Pair> y2, const PairScratch& scratch) {
  const int64_t slice = unit.slice_channels(), pixels = (part.row_end - part.row_begin) * unit.out_width();
  const float* const first = scratch.out_planes.channel(0);
  float* const second = scratch.out_planes.channel(1);
  for (int64_t c = channels.begin; c < channels.end;) {
    const int64_t in_slice = c % slice, n = std::min<int64_t>(2, slice - in_slice);
    for (int64_t i = 0; i < n; ++i) {
      depthwise_channel<float>(
          unit, part, conv, c + i, scratch.masks, y1.channel(c + i - channels.begin), scratch.out_planes.channel(i));
    }
    if (n == 1) std::fill_n(second, pixels, 0.0f);
    pack(first, second, pixels, y2.channel(c / slice * pairs_of(slice) + in_slice / 2));
    c += n;
  }
}

// As pool, for pairs.
inline void pool_pairs(const Unit& unit, const Part& part, Channels channels, Planes<const Pair> x, int64_t x_row,
                       Planes<const Pair> x_above, Planes<Pair> result, const PairScratch& scratch) {
  const int64_t above = x_above.data ? unit.width : 0, pixels = (part.row_end - part.row_begin) * unit.out_width();
  const int64_t in_pixels = (std::min(unit.height, 2 * part.row_end) - x_row) * unit.width;
  const Planes<float> in = scratch.in_planes, out = scratch.out_planes;
  for (int64_t pair = channels.begin / 2; pair < channels.end / 2; ++pair) {
    if (above) unpack(x_above.channel(pair), above, in.channel(0), in.channel(1));
    unpack(x.channel(pair), in_pixels, in.channel(0) + above, in.channel(1) + above);
    pool<float>(unit, part, {0, 2}, scratch.masks, read_only(in), x_row - (above ? 1 : 0), {}, out);
    pack(out.channel(0), out.channel(1), pixels, result.channel(pair));
  }
}

// What the phases of a part hand on to each other.
struct PairBuffers {
  PairBuffers(const Unit& unit, const Part& part, void* memory) {
    Arena arena(memory);
    y2 = arena.planes<Pair>(y2_pairs(unit), (part.row_end - part.row_begin) * unit.out_width());
    bytes = arena.bytes();
  }
  Planes<Pair> y2;
  int64_t bytes;
};

inline int64_t pair_buffer_bytes(const Unit& unit, const Part& part) { return PairBuffers(unit, part, nullptr).bytes; }

struct ExpandScratch {
  ExpandScratch(const Unit& unit, const Part& part, Channels mid, void* memory) : worker(unit, part, memory) {
    const InputRows in(unit, part);
    Arena arena(memory ? static_cast<char*>(memory) + worker.bytes : nullptr);
    y1 = arena.planes<float>(mid.count(), (in.halo_end - in.halo_begin) * unit.width);
    bytes = worker.bytes + arena.bytes();
  }
  PairScratch worker;
  Planes<float> y1;
  int64_t bytes;
};

inline int64_t pair_scratch_bytes(const Unit& unit, const Part& part, Channels mid) {
  return ExpandScratch(unit, part, mid, nullptr).bytes;
}

inline bool stays_in_place(const Unit&) { return false; }  // is_staged
inline void stage_nothing(const Unit&, const UnitPointers&, const Part&, Channels, void*) {}

inline void expand_pairs(const Unit& unit, const UnitPointers& pointers, const Part& part, Channels channels,
                         void* buffers, void* memory) {
  const InputRows in(unit, part);
  const ExpandScratch scratch(unit, part, channels, memory);
  clear_outside(unit, in, channels.count(), scratch.y1);
  const Planes<const Pair> x = {static_cast<const Pair*>(pointers.x) + in.begin * unit.width, pointers.x_plane};
  const Planes<float> y1_image = {scratch.y1.data + (in.begin - in.halo_begin) * unit.width, scratch.y1.stride};
  conv1_pairs(unit, pointers.conv1, channels, x, (in.end - in.begin) * unit.width, y1_image, scratch.worker.ranges);
  fill_edge_masks<float>(unit, part, scratch.worker.masks);
  depthwise_pairs(
      unit, part, pointers.conv2, channels, read_only(scratch.y1), PairBuffers(unit, part, buffers).y2, scratch.worker);
  if (unit.concatenates_pool()) {
    const Planes<Pair> result = {
        static_cast<Pair*>(pointers.result) + part.row_begin * unit.out_width(), pointers.result_plane};
    pool_pairs(unit, part, pooled_with(unit, channels, 2), x, in.begin, {}, result.from(unit.out_channels / 2),
               scratch.worker);
  }
}

inline void project_pairs(const Unit& unit, const UnitPointers& pointers, const Part& part, Channels channels,
                          void* buffers, void* memory) {
  const PairScratch scratch(unit, part, memory);
  const Planes<const Pair> x = {static_cast<const Pair*>(pointers.x), pointers.x_plane};
  const Planes<Pair> result = {
      static_cast<Pair*>(pointers.result) + part.row_begin * unit.out_width(), pointers.result_plane};
  Planes<const Pair> residual;
  if (unit.adds_residual()) residual = {x.data + part.row_begin * unit.width, x.stride};
  conv3_pairs(unit, pointers.conv3, channels, read_only(PairBuffers(unit, part, buffers).y2),
              (part.row_end - part.row_begin) * unit.out_width(), residual, result, scratch.ranges);
}

// ---- Strips ---------------------------------------------------------------------------------------------------------

inline void expand_pair_strip(const Unit& unit, const UnitPointers& pointers, const Strip& strip, void* memory) {
  const StripRows<float> rows(unit, strip);
  const PairScratch scratch(unit, strip.part, memory);
  const Planes<const Pair> x = read_only(planes<Pair>(strip.x));
  conv1_pairs(
      unit, pointers.conv1, {0, unit.mid_channels}, x, rows.own_rows() * unit.width, rows.from_row(1), scratch.ranges);
  if (unit.concatenates_pool()) {
    fill_edge_masks<float>(unit, strip.part, scratch.masks);
    pool_pairs(unit, strip.part, {0, unit.in_channels}, x, rows.own_begin, read_only(planes<Pair>(strip.x_above)),
               planes<Pair>(strip.result).from(unit.out_channels / 2), scratch);
  }
  lend_rows(unit, strip, rows);
}

// What projecting a strip needs.
struct PairStripScratch {
  PairStripScratch(const Unit& unit, const Part& part, void* memory) {
    rows = rows_projected_at_once(part, y2_pairs(unit) * unit.out_width() * static_cast<int64_t>(sizeof(Pair)));
    const Part largest = {part.row_begin, part.row_begin + rows};
    const PairBuffers buffers(unit, largest, memory);
    y2 = buffers.y2;
    worker = static_cast<char*>(memory) + buffers.bytes;
    bytes = buffers.bytes + PairScratch(unit, largest, nullptr).bytes;
  }
  int64_t rows;
  Planes<Pair> y2;
  void* worker;
  int64_t bytes;
};

inline int64_t pair_strip_scratch_bytes(const Unit& unit, const Part& part) {
  return std::max(PairScratch(unit, part, nullptr).bytes, PairStripScratch(unit, part, nullptr).bytes);
}

inline void project_pair_strip(const Unit& unit, const UnitPointers& pointers, const Strip& strip, void* memory) {
  const StripRows<float> rows(unit, strip);
  borrow_rows(unit, strip, rows);
  const PairStripScratch own(unit, strip.part, memory);
  const Planes<const Pair> x = read_only(planes<Pair>(strip.x));
  const Planes<Pair> result = planes<Pair>(strip.result);
  const int64_t out_width = unit.out_width();
  project_from_bottom(strip.part, own.rows, [&](const Part& part, int64_t before) {
    const PairScratch scratch(unit, part, own.worker);
    fill_edge_masks<float>(unit, part, scratch.masks);
    const int64_t pixel = before * out_width;
    depthwise_pairs(unit, part, pointers.conv2, {0, unit.mid_channels}, read_only(rows.from_row(before * unit.stride)),
                    own.y2, scratch);
    const Planes<const Pair> residual = {x.data + pixel, x.stride};
    conv3_pairs(
        unit, pointers.conv3, {0, unit.out_channels}, read_only(own.y2), (part.row_end - part.row_begin) * out_width,
        unit.adds_residual() ? residual : Planes<const Pair>{}, {result.data + pixel, result.stride}, scratch.ranges);
  });
}

// Shares must not cut a pair of y2, whose halves two workers would write.
inline int64_t pair_expand_multiple(const Unit& unit) {
  return unit.slice_channels() % 2 == 0 ? 2 * unit.groups : unit.mid_channels;
}

// The largest product for so many channels that share their inputs; the last pixels are no others' concern.
inline Tile product_tile_of(int64_t channels, int64_t pixels, int64_t) {
  const int64_t vectors = ceil_div(pixels, Simd<float>::kLanes);
  return {ceil_div(channels, ceil_div(channels, kProductRows)), ceil_div(vectors, ceil_div(vectors, kProductVectors))};
}

inline constexpr UnitKernel kPairUnitKernel = {
    4,
    2,
    pair_expand_multiple,
    2,
    pair_buffer_bytes,
    stays_in_place,
    stage_nothing,
    pair_scratch_bytes,
    expand_pairs,
    project_pairs,
    strip_bytes<float>,
    lent_bytes<float>,
    pair_strip_scratch_bytes,
    expand_pair_strip,
    project_pair_strip,
    product_tile_of,
    to_accumulator<BFloat16>};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
