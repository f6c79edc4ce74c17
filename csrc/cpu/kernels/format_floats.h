// Units on planes of floats, for tensors of T: x, y1, y2 and the result are planes of the accumulator type. See unit.h.
#pragma once

#include "average_pool.h"
#include "image.h"
#include "pointwise.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// Whether planes are larger than what an L2 cache has room for.
template <class A>
bool is_far(int64_t channels, int64_t pixels) {
  constexpr int64_t kMostBytes = 1024 * 1024;
  return channels * pixels * static_cast<int64_t>(sizeof(A)) > kMostBytes;
}

template <class T>
struct FloatFormat {
  using A = accumulator_t<T>;  // what y1 is in
  using Element = A;           // what x, y2 and the result are in
  static constexpr int64_t kTensorBytes = sizeof(T);
  static constexpr int64_t kChannelsPerElement = 1;

  static int64_t mid_multiple(const Unit&) { return 1; }
  static int64_t y2_planes(const Unit& unit) { return unit.mid_channels; }

  static bool is_copied(const Unit& unit) { return unit.layout != Layout::contiguous || !std::is_same_v<T, A>; }
  static void copy_in(const UnitPart& part, Range pixels, Range channels, Planes<A> x) {
    const auto& [unit, pointers, rows, buffers] = part;
    const Image<const T> image = {static_cast<const T*>(pointers.x), unit.layout, unit.in_channels, pointers.x_plane};
    image_to_planes<T>(image, pixels.begin, pixels.count(), channels, x);
  }
  static void copy_out(const UnitPart& part, Range pixels, Range channels, Planes<const A> result) {
    const auto& [unit, pointers, rows, buffers] = part;
    const Image<T> image = {
        static_cast<T*>(pointers.result), unit.layout, unit.result_channels(), pointers.result_plane};
    planes_to_image<T>(image, pixels.begin, pixels.count(), channels, result);
  }

  static Tile tile(int64_t channels, int64_t pixels, int64_t plane) {
    return SHUFFLENET_ISA::tile<A>(channels, pixels, plane);
  }

  // Cuts a worker's memory, which has room for the y1 of so many intermediate channels.
  FloatFormat(const UnitPart& part, int64_t mid_channels, void* memory)
      : unit(part.unit), pointers(part.pointers), rows(part.rows) {
    Arena arena(memory);
    masks = arena.take<EdgeMasks<A>>(edge_vectors<A>(unit, rows));
    y1 = arena.planes<A>(mid_channels, InputRows(unit, rows).halo.count() * unit.width);
    const int64_t depth = std::max(unit.conv1_depth(), unit.slice_channels());
    lists = {arena, std::max(unit.mid_channels, unit.out_channels), depth};
    bytes = arena.bytes();
  }

  // Computes rows `mid` of conv1 for some rows of x, to channels from 0 on.
  void conv1(Range mid, Planes<const A> x, Range x_rows, Planes<A> to) const {
    const int64_t plane = unit.height * unit.width;
    grouped_pointwise<A>(
        {pointers.conv1, unit.conv1_activation(), unit.conv1_depth(), unit.conv1_group_rows()}, mid, x,
        x_rows.count() * unit.width, {}, to, mid.begin, has_lone_pixel<A>(plane, x_rows.end * unit.width), lists,
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

  void conv3(Range channels, Planes<const A> y2, Planes<const A> residual, Planes<A> result) const {
    const int64_t plane = unit.out_height() * unit.out_width();
    grouped_pointwise<A>(
        {pointers.conv3, unit.conv3_activation(), unit.slice_channels(), unit.out_channels / unit.groups}, channels, y2,
        rows.count() * unit.out_width(), residual, result, 0, has_lone_pixel<A>(plane, rows.end * unit.out_width()),
        lists, is_far<A>(unit.result_channels(), plane) ? Far::y : Far::nothing);
  }

  const Unit& unit;
  const UnitPointers& pointers;
  Range rows;
  EdgeMasks<A>* masks;
  Planes<A> y1;
  PointwiseLists<A> lists;
  int64_t bytes;
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
