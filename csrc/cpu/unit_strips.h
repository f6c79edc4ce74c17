// The unit's phases on a strip of an image: rows of the result, whose halo is had from the strips beside it.
#pragma once

#include "unit_parts.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// A strip's rows of y1: the row above its own, its own, and with stride 1 the row below. Copies of its first and last
// own row are for its neighbours: in lines of their own, few and one behind the other, which nobody writes meanwhile.
template <class A>
struct StripRows {
  StripRows(const Unit& unit, const Strip& strip) : StripRows(unit, strip.part, strip.y1, strip.lent) {}
  StripRows(const Unit& unit, const Part& part, void* y1_memory, void* lent_memory)
      : in(unit, part),
        own_begin(part.row_begin * unit.stride),
        own_end(std::min(part.row_end * unit.stride, unit.height)),
        width(unit.width) {
    Arena arena(y1_memory), lent(lent_memory);
    y1 = arena.planes<A>(unit.mid_channels, (in.halo_end - in.halo_begin) * width);
    first_row = {lent.take<A>(unit.mid_channels * width), width};
    last_row = {lent.take<A>(unit.mid_channels * width), width};
    bytes = arena.bytes();
    lent_bytes = lent.bytes();
  }
  int64_t own_rows() const { return own_end - own_begin; }
  // From row 0, the one above the strip's own.
  Planes<A> from_row(int64_t row) const { return {y1.data + row * width, y1.stride}; }

  InputRows in;
  int64_t own_begin, own_end, width;
  Planes<A> y1, first_row, last_row;
  int64_t bytes, lent_bytes;
};

// A strip is projected some rows at a time, whose y2 stays in the L2 cache.
inline int64_t rows_projected_at_once(const Part& strip, int64_t row_bytes_of_y2) {
  constexpr int64_t kMostY2Bytes = 256 * 1024;
  return std::clamp<int64_t>(kMostY2Bytes / row_bytes_of_y2, 1, strip.row_end - strip.row_begin);
}

// Calls project(part, rows of the strip above it), from the bottom, as x and y1 may not stay in the cache: their last
// rows are those that have just been worked on.
template <class Project>
void project_from_bottom(const Part& strip, int64_t rows_at_once, const Project& project) {
  for (int64_t i = ceil_div(strip.row_end - strip.row_begin, rows_at_once) - 1; i >= 0; --i) {
    const int64_t row = strip.row_begin + i * rows_at_once;
    project(Part{row, std::min(strip.row_end, row + rows_at_once)}, i * rows_at_once);
  }
}

// What projecting a strip needs.
template <class A>
struct StripScratch {
  StripScratch(const Unit& unit, const Part& part, void* memory) {
    rows = rows_projected_at_once(part, unit.mid_channels * unit.out_width() * static_cast<int64_t>(sizeof(A)));
    Arena arena(memory);
    y2 = arena.planes<A>(unit.mid_channels, rows * unit.out_width());
    worker = static_cast<char*>(memory) + arena.bytes();
    bytes = arena.bytes() + Scratch<A>(unit, {part.row_begin, part.row_begin + rows}, {}, nullptr).bytes;
  }
  int64_t rows;
  Planes<A> y2;
  void* worker;
  int64_t bytes;
};

template <class A>
int64_t strip_bytes(const Unit& unit, const Part& part) {
  return StripRows<A>(unit, part, nullptr, nullptr).bytes;
}

template <class A>
int64_t lent_bytes(const Unit& unit, const Part& part) {
  return StripRows<A>(unit, part, nullptr, nullptr).lent_bytes;
}

template <class A>
int64_t strip_scratch_bytes(const Unit& unit, const Part& part) {
  return StripScratch<A>(unit, part, nullptr).bytes;
}

template <class A>
Planes<A> planes(const RowsOfImage& rows) {
  return {static_cast<A*>(rows.data), rows.plane};
}

template <class A>
void copy_row(const Unit& unit, Planes<A> to, Planes<const A> from) {
  for (int64_t c = 0; c < unit.mid_channels; ++c) std::copy_n(from.channel(c), unit.width, to.channel(c));
}

template <class A>
void clear_row(const Unit& unit, Planes<A> row) {
  for (int64_t c = 0; c < unit.mid_channels; ++c) std::fill_n(row.channel(c), unit.width, A{0});
}

// What the strips above and below need of y1.
template <class A>
void lend_rows(const Unit& unit, const Strip& strip, const StripRows<A>& rows) {
  if (strip.above) copy_row<A>(unit, rows.first_row, read_only(rows.from_row(1)));
  if (strip.below) copy_row<A>(unit, rows.last_row, read_only(rows.from_row(rows.own_rows())));
}

template <class A>
void expand_strip(const Unit& unit, const UnitPointers& pointers, const Strip& strip, void* memory) {
  const StripRows<A> rows(unit, strip);
  const Scratch<A> scratch(unit, strip.part, {}, memory);
  const bool lone_pixel = has_lone_pixel<A>(unit.height * unit.width, rows.own_end * unit.width);
  const Planes<const A> x = read_only(planes<A>(strip.x));
  conv1<A>(unit, pointers.conv1, {0, unit.mid_channels}, x, rows.own_rows() * unit.width, rows.from_row(1), lone_pixel,
           scratch.pointwise);
  if (unit.concatenates_pool()) {
    fill_edge_masks<A>(unit, strip.part, scratch.masks);
    pool<A>(unit, strip.part, {0, unit.in_channels}, scratch.masks, x, rows.own_begin,
            read_only(planes<A>(strip.x_above)), planes<A>(strip.result).from(unit.out_channels));
  }
  lend_rows(unit, strip, rows);
}

// The rows around a strip's own: from where another strip has them, or zeros outside the image.
template <class A>
void borrow_rows(const Unit& unit, const Strip& strip, const StripRows<A>& rows) {
  if (strip.above) {
    copy_row<A>(unit, rows.y1, read_only(StripRows<A>(unit, *strip.above).last_row));
  } else {
    clear_row(unit, rows.y1);
  }
  if (rows.in.halo_end == rows.own_end) return;
  const Planes<A> below = rows.from_row(rows.own_rows() + 1);
  if (strip.below) {
    copy_row<A>(unit, below, read_only(StripRows<A>(unit, *strip.below).first_row));
  } else {
    clear_row(unit, below);
  }
}

template <class A>
void project_strip(const Unit& unit, const UnitPointers& pointers, const Strip& strip, void* memory) {
  const StripRows<A> rows(unit, strip);
  borrow_rows(unit, strip, rows);
  const StripScratch<A> own(unit, strip.part, memory);
  const Planes<const A> x = read_only(planes<A>(strip.x));
  const Planes<A> result = planes<A>(strip.result);
  const int64_t out_width = unit.out_width();
  project_from_bottom(strip.part, own.rows, [&](const Part& part, int64_t before) {
    const Scratch<A> scratch(unit, part, {}, own.worker);
    fill_edge_masks<A>(unit, part, scratch.masks);
    const int64_t pixel = before * out_width;
    depthwise<A>(unit, part, pointers.conv2, {0, unit.mid_channels}, scratch.masks,
                 read_only(rows.from_row(before * unit.stride)), own.y2);
    const bool lone_pixel = has_lone_pixel<A>(unit.out_height() * out_width, part.row_end * out_width);
    const Planes<const A> residual = {x.data + pixel, x.stride};
    conv3<A>(unit, pointers.conv3, {0, unit.out_channels}, read_only(own.y2),
             (part.row_end - part.row_begin) * out_width, unit.adds_residual() ? residual : Planes<const A>{},
             {result.data + pixel, result.stride}, lone_pixel, scratch.pointwise);
  });
}

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
