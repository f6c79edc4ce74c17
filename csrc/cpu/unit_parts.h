// The unit's phases on a part of an image: some rows of the result, with their halo. See unit_kernel.h.
#pragma once

#include "depthwise.h"
#include "pointwise.h"
#include "staging.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// Larger than what an L2 cache has room for.
template <class A>
bool is_far(int64_t channels, int64_t pixels) {
  constexpr int64_t kMostBytes = 1024 * 1024;
  return channels * pixels * static_cast<int64_t>(sizeof(A)) > kMostBytes;
}

// To y1, from its channel 0 on.
template <class A>
void conv1(const Unit& unit, const Convolution& conv, Channels rows, Planes<const A> x, int64_t pixels, Planes<A> y1,
           bool lone_pixel, const PointwiseScratch<A>& scratch) {
  grouped_pointwise<A>(
      conv, unit.conv1_depth(), unit.conv1_group_rows(), rows, x, pixels, {}, y1, rows.begin, lone_pixel, scratch,
      is_far<A>(unit.in_channels, unit.height * unit.width) ? Far::x : Far::nothing);
}

template <class A>
void conv3(const Unit& unit, const Convolution& conv, Channels rows, Planes<const A> y2, int64_t pixels,
           Planes<const A> residual, Planes<A> result, bool lone_pixel, const PointwiseScratch<A>& scratch) {
  grouped_pointwise<A>(
      conv, unit.slice_channels(), unit.out_channels / unit.groups, rows, y2, pixels, residual, result, 0, lone_pixel,
      scratch, is_far<A>(unit.result_channels(), unit.out_height() * unit.out_width()) ? Far::y : Far::nothing);
}

template <class T>
bool is_staged(const Unit& unit) {
  return unit.layout != Layout::contiguous || !std::is_same_v<T, accumulator_t<T>>;
}

// The rows that a part reads: of y1 with its halo, and of the image.
struct InputRows {
  InputRows(const Unit& unit, const Part& part)
      : halo_begin(part.row_begin * unit.stride - 1),
        halo_end((part.row_end - 1) * unit.stride + 2),
        begin(halo_begin > 0 ? halo_begin : 0),
        end(halo_end < unit.height ? halo_end : unit.height) {}
  int64_t halo_begin, halo_end;
  int64_t begin, end;
};

// What the phases of a part hand on to each other.
template <class T>
struct Buffers {
  using A = accumulator_t<T>;

  Buffers(const Unit& unit, const Part& part, void* memory) {
    const InputRows in(unit, part);
    const int64_t out_pixels = (part.row_end - part.row_begin) * unit.out_width();
    Arena arena(memory);
    if (unit.has_conv3()) y2 = arena.planes<A>(unit.mid_channels, out_pixels);
    if (is_staged<T>(unit)) {
      x = arena.planes<A>(unit.in_channels, (in.end - in.begin) * unit.width);
      // A residual is added where it lies: conv1 is done with x by then.
      if (unit.adds_residual()) {
        result = {x.channel(0) + (part.row_begin - in.begin) * unit.width, x.stride};
      } else {
        result = arena.planes<A>(unit.result_channels(), out_pixels);
      }
    }
    bytes = arena.bytes();
  }

  Planes<A> y2, x, result;
  int64_t bytes;
};

// A part with its buffers and the pointers of its image.
template <class T>
struct PartView : Buffers<T> {
  using A = accumulator_t<T>;

  PartView(const Unit& unit, const UnitPointers& pointers, const Part& part, void* memory)
      : Buffers<T>(unit, part, memory), in(unit, part), staged(is_staged<T>(unit)) {
    in_begin = in.begin * unit.width;
    in_pixels = (in.end - in.begin) * unit.width;
    out_begin = part.row_begin * unit.out_width();
    out_pixels = (part.row_end - part.row_begin) * unit.out_width();
    image_x = {static_cast<const T*>(pointers.x), unit.layout, unit.in_channels, pointers.x_plane};
    image_result = {static_cast<T*>(pointers.result), unit.layout, unit.result_channels(), pointers.result_plane};
    planes_x = read_only(this->x);
    if constexpr (std::is_same_v<T, A>) {
      if (!staged) {
        planes_x = {image_x.data + in_begin, pointers.x_plane};
        this->result = {image_result.data + out_begin, pointers.result_plane};
      }
    }
  }

  void write_out(Channels channels) const {
    if (staged) stage_out<T>(image_result, out_begin, out_pixels, channels, read_only(this->result));
  }

  InputRows in;
  bool staged;
  int64_t in_begin, in_pixels, out_begin, out_pixels;
  Image<const T> image_x;
  Image<T> image_result;
  Planes<const A> planes_x;  // the part's rows of x, staged or in place
};

template <class T>
int64_t buffer_bytes(const Unit& unit, const Part& part) {
  return Buffers<T>(unit, part, nullptr).bytes;
}

template <class T>
void stage(const Unit& unit, const UnitPointers& pointers, const Part& part, Channels channels, void* buffers) {
  const PartView<T> view(unit, pointers, part, buffers);
  if (view.staged) stage_in<T>(view.image_x, view.in_begin, view.in_pixels, channels, view.x);
}

// What one worker needs for its channels of a phase.
template <class A>
struct Scratch {
  Scratch(const Unit& unit, const Part& part, Channels mid, void* memory) {
    const InputRows in(unit, part);
    Arena arena(memory);
    masks = arena.take<EdgeMasks<A>>(edge_vectors<A>(unit, part));
    y1 = arena.planes<A>(mid.count(), (in.halo_end - in.halo_begin) * unit.width);
    const int64_t depth = std::max(unit.conv1_depth(), unit.slice_channels());
    pointwise = {arena, std::max(unit.mid_channels, unit.out_channels), depth};
    bytes = arena.bytes();
  }

  EdgeMasks<A>* masks;
  Planes<A> y1;
  PointwiseScratch<A> pointwise;
  int64_t bytes;
};

template <class T>
int64_t scratch_bytes(const Unit& unit, const Part& part, Channels mid) {
  return Scratch<accumulator_t<T>>(unit, part, mid, nullptr).bytes;
}

// Zeros to the rows of y1 that lie outside of the image.
template <class A>
void clear_outside(const Unit& unit, const InputRows& in, int64_t channels, Planes<A> y1) {
  for (int64_t c = 0; c < channels; ++c) {
    A* const plane = y1.channel(c);
    std::fill(plane, plane + (in.begin - in.halo_begin) * unit.width, A{0});
    std::fill(plane + (in.end - in.halo_begin) * unit.width, plane + (in.halo_end - in.halo_begin) * unit.width, A{0});
  }
}

// The channels of the shortcut that go with some rows of conv1 to a worker.
inline Channels pooled_with(const Unit& unit, Channels rows, int64_t multiple) {
  const int64_t n = unit.in_channels / multiple;
  return {n * rows.begin / unit.mid_channels * multiple, n * rows.end / unit.mid_channels * multiple};
}

template <class T>
void expand(const Unit& unit, const UnitPointers& pointers, const Part& part, Channels rows, void* buffers,
            void* memory) {
  using A = accumulator_t<T>;
  const PartView<T> view(unit, pointers, part, buffers);
  const InputRows& in = view.in;
  const Scratch<A> scratch(unit, part, rows, memory);
  const Planes<A> y1 = scratch.y1;
  clear_outside(unit, in, rows.count(), y1);
  const Planes<A> y1_image = {y1.data + (in.begin - in.halo_begin) * unit.width, y1.stride};
  const bool lone_pixel = has_lone_pixel<A>(unit.height * unit.width, in.end * unit.width);
  conv1<A>(unit, pointers.conv1, rows, view.planes_x, view.in_pixels, y1_image, lone_pixel, scratch.pointwise);
  const Planes<A> y2 = unit.has_conv3() ? view.y2 : view.result;
  fill_edge_masks<A>(unit, part, scratch.masks);
  depthwise<A>(unit, part, pointers.conv2, rows, scratch.masks, read_only(y1), y2);
  if (unit.concatenates_pool()) {
    const Channels pooled = pooled_with(unit, rows, 1);
    pool<A>(unit, part, pooled, scratch.masks, view.planes_x, view.in.begin, {}, view.result.from(unit.out_channels));
    view.write_out({unit.out_channels + pooled.begin, unit.out_channels + pooled.end});
  }
}

template <class T>
void project(const Unit& unit, const UnitPointers& pointers, const Part& part, Channels channels, void* buffers,
             void* memory) {
  using A = accumulator_t<T>;
  const PartView<T> view(unit, pointers, part, buffers);
  const Scratch<A> scratch(unit, part, {}, memory);
  if (unit.has_conv3()) {
    const bool lone_pixel = has_lone_pixel<A>(unit.out_height() * unit.out_width(), part.row_end * unit.out_width());
    Planes<const A> residual;
    if (unit.adds_residual()) {
      residual = {view.planes_x.data + (part.row_begin - view.in.begin) * unit.width, view.planes_x.stride};
    }
    conv3<A>(unit, pointers.conv3, channels, read_only(view.y2), view.out_pixels, residual, view.result, lone_pixel,
             scratch.pointwise);
  }
  view.write_out(channels);
}

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
