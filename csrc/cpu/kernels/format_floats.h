// Units on planes of floats, for tensors of T: x, y1, y2 and the result are planes of the accumulator type. See unit.h.
#pragma once

#include "average_pool.h"
#include "image.h"
#include "pointwise.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

template <class T>
struct FloatFormat {
  using A = accumulator_t<T>;  // what y1 is in
  using Element = A;           // what x, y2 and the result are in
  static constexpr int64_t kTensorBytes = sizeof(T);
  static constexpr int64_t kChannelsPerElement = 1;

  static int64_t mid_multiple(const Unit&) { return 1; }
  static int64_t y2_planes(const Unit& unit) { return unit.mid_channels; }
  static constexpr bool kKeepsShortcut = false;  // its result is written where it belongs

  static bool is_copied(const Unit& unit) { return unit.layout != Layout::contiguous || !std::is_same_v<T, A>; }
  static void copy_in(const UnitPart& part, Range pixels, Range channels, Planes<A> x) {
    const Unit& unit = part.unit;
    const TensorImage image = {unit.layout, unit.in_channels, unit.height * unit.width};
    image_to_planes<T>(image, part.pointers.x, pixels, channels, x.from(channels.begin));
  }
  static void copy_out(const UnitPart& part, Range pixels, Range channels, Planes<const A> result) {
    const Unit& unit = part.unit;
    const TensorImage image = {unit.layout, unit.result_channels(), unit.out_height() * unit.out_width()};
    planes_to_image<T>(result.from(channels.begin), image, part.pointers.result, pixels, channels);
  }

  static Tile tile(int64_t channels, int64_t pixels, int64_t plane) {
    return SHUFFLENET_ISA::tile<A>(channels, pixels, plane);
  }

  // Cuts a worker's memory, which has room for the y1 of so many intermediate channels.
  FloatFormat(const UnitPart& part, int64_t mid_channels, void* memory)
      : unit(part.unit), pointers(part.pointers), rows(part.rows) {
    Arena arena(memory);
    masks = arena.take<EdgeMasks<A>>(edge_vectors<A>(unit, rows));
    const int64_t in_pixels = InputRows(unit, rows).halo.count() * unit.width;
    y1 = arena.planes<A>(mid_channels, in_pixels);
    int64_t depth = std::max(unit.conv1_depth(), unit.slice_channels());
    if (unit.convolves_shortcut()) {
      depth = std::max(depth, unit.in_channels);
      in_plane = arena.planes<A>(1, in_pixels);
    }
    lists = {arena, std::max({unit.mid_channels, unit.out_channels, unit.shortcut_channels}), depth};
    bytes = arena.bytes();
  }

  // Computes rows `mid` of conv1 for some rows of x, to channels from 0 on.
  void conv1(Range mid, Planes<const A> x, Range x_rows, Planes<A> to) const {
    const int64_t plane = unit.height * unit.width;
    grouped_pointwise<A>(
        {pointers.conv1, unit.conv1_activation(), unit.conv1_depth(), unit.conv1_group_rows(), pointers.x_planes}, mid,
        x, x_rows.count() * unit.width, {}, to, mid.begin, has_lone_pixel<A>(plane, x_rows.end * unit.width), lists,
        is_far<A>(unit.in_channels, plane) ? Far::x : Far::nothing);
  }

  // Computes the channels behind the shuffle that rows `mid` of conv1 become, whose rows from the halo on are in
  // `from`, from its channel 0 on.
  void depthwise(Range mid, Planes<const A> from, Planes<A> y2) const {
    const int64_t n = unit.shuffle_rows();
    int64_t row = mid.begin;
    for (int64_t r = row / n; row < mid.end; ++r) {
      for (; row < std::min(mid.end, (r + 1) * n); ++row) {
        const int64_t c = (row - r * n) * unit.shuffle_groups + r;
        depthwise_channel<A>(unit, rows, pointers.conv2, c, masks, from.channel(row - mid.begin), y2.channel(c));
      }
    }
  }

  void pool(Range channels, Planes<const A> x, int64_t x_row, Planes<const A> x_above, Planes<A> result) const {
    average_pool<A>(unit, rows, channels, masks, x, x_row, x_above, result);
  }

  // The shortcut of a unit of v2: channels of its depthwise convolution, of x as in pool, and rows of its pointwise
  // one.
  void shortcut1(Range channels, Planes<const A> x, int64_t x_row, Planes<const A> x_above, Planes<A> y2) const {
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      const int64_t plane = pointers.x_planes ? pointers.x_planes[c] : c;
      const A* const above = x_above.data ? x_above.channel(plane) : nullptr;
      copy_with_halo(
          unit, rows, x.channel(plane), x_row, above,
          [&](const A* from, int64_t pixel, int64_t n) { std::copy_n(from, n, in_plane.data + pixel); },
          [&](int64_t pixel, int64_t n) { std::fill_n(in_plane.data + pixel, n, A{0}); });
      depthwise_channel<A>(unit, rows, pointers.shortcut1, c, masks, in_plane.data, y2.channel(c));
    }
  }
  void shortcut2(Range channels, Planes<const A> y2, Planes<A> result) const {
    const int64_t plane = unit.out_height() * unit.out_width();
    grouped_pointwise<A>({pointers.shortcut2, unit.conv3_activation(), unit.in_channels, unit.shortcut_channels,
                          nullptr, pointers.shortcut_planes},
                         channels, y2, rows.count() * unit.out_width(), {}, result, 0,
                         has_lone_pixel<A>(plane, rows.end * unit.out_width()), lists, Far::nothing);
  }

  // Adds what the shortcut has of each channel, in v1.
  void conv3(Range channels, Planes<const A> y2, Planes<const A> shortcut, Planes<A> result) const {
    const int64_t plane = unit.out_height() * unit.out_width();
    grouped_pointwise<A>(
        {pointers.conv3, unit.conv3_activation(), unit.slice_channels(), unit.out_channels / unit.groups, nullptr,
         pointers.conv3_planes},
        channels, y2, rows.count() * unit.out_width(), unit.adds_residual() ? shortcut : Planes<const A>{}, result, 0,
        has_lone_pixel<A>(plane, rows.end * unit.out_width()), lists,
        is_far<A>(unit.result_channels(), plane) ? Far::y : Far::nothing);
  }

  const Unit& unit;
  const UnitPointers& pointers;
  Range rows;
  EdgeMasks<A>* masks;
  Planes<A> y1;
  Planes<A> in_plane;  // a plane of the shortcut's, with its halo rows
  PointwiseLists<A> lists;
  int64_t bytes;
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
