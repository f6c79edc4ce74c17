// The unit, written once over a Format: planes of floats (format_floats.h) or of pairs (format_pairs.h). Pixels lie
// along the vectors and weights are broadcast, so any number of channels and groups fills the lanes. A unit works on
// some rows of its result, in three phases, each of which can be split by channels (table.h):
//
//   copy_in               copies the rows of x to planes, where they are not such planes already
//   conv1_and_depthwise   conv1 from x to y1; then the depthwise convolution from y1, with its halo rows, to y2 (or to
//                         the result, where the unit ends here), the shuffle being no more than the order of channels;
//                         with stride 2 also the pooled shortcut, from x to the result
//   conv3                 conv3 from y2, adding the residual, to the result
//
// A unit of v2 has a shortcut of two convolutions where v1 pools: the depthwise one is in the second phase, the
// pointwise one in the third, each with a share of channels like that of the convolution beside it. The half of x that
// passes by stays where it is in planes of floats, whose result takes x's place; in planes of pairs conv3 copies it.
//
// Planes of the result that are not the tensor's own are copied out at the end of a phase. The phases of strips, whose
// halo rows are had from the strips beside them, follow below.
#pragma once

#include "depthwise.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// What comes between the convolutions of some rows.
template <class Format>
struct Between {
  using Element = typename Format::Element;
  Planes<Element> y2;
  Planes<Element> shortcut_y2,
      kept_shortcut;  // of v2: behind each of the shortcut's convolutions, the latter for conv3

  // Cuts their memory, for so many pixels.
  void take(Arena& arena, const Unit& unit, int64_t pixels) {
    if (unit.has_conv3()) y2 = arena.planes<Element>(Format::y2_planes(unit), pixels);
    if (!unit.convolves_shortcut()) return;
    shortcut_y2 = arena.planes<Element>(unit.in_channels / Format::kChannelsPerElement, pixels);
    if (!Format::kKeepsShortcut) return;
    kept_shortcut = arena.planes<Element>(unit.shortcut_channels / Format::kChannelsPerElement, pixels);
  }

  // Where the shortcut of a unit of v2 is written: kept for conv3, or in the result.
  Planes<Element> shortcut_result(Planes<Element> result) const {
    return Format::kKeepsShortcut ? kept_shortcut : result;
  }
};

// What the phases hand on to each other.
template <class Format>
struct UnitBuffers : Between<Format> {
  using Element = typename Format::Element;

  UnitBuffers(const Unit& unit, Range rows, void* memory) : in(unit, rows) {
    const int64_t out_pixels = rows.count() * unit.out_width();
    Arena arena(memory);
    this->take(arena, unit, out_pixels);
    if (Format::is_copied(unit)) {
      copied_x = arena.planes<Element>(unit.in_channels, in.image.count() * unit.width);
      if (!unit.adds_residual()) result = arena.planes<Element>(unit.result_channels(), out_pixels);
    }
    bytes = arena.bytes();
  }

  InputRows in;
  Planes<Element> copied_x, result;
  int64_t bytes;
};

// The same with the planes that the phases read from and write to, be they in the buffers or the tensors' own.
template <class Format>
struct UnitPlanes : UnitBuffers<Format> {
  using Element = typename Format::Element;

  explicit UnitPlanes(const UnitPart& part) : UnitBuffers<Format>(part.unit, part.rows, part.buffers) {
    const auto& [unit, pointers, rows, buffers] = part;
    const Range image = this->in.image;
    in_pixels = {image.begin * unit.width, image.end * unit.width};
    out_pixels = {rows.begin * unit.out_width(), rows.end * unit.out_width()};
    const int64_t before = (rows.begin - image.begin) * unit.width;  // what of x lies before the residual
    if (Format::is_copied(unit)) {
      x = read_only(this->copied_x);
      // A residual is added where it lies: conv1 is done with x by then.
      if (unit.adds_residual()) this->result = this->copied_x.behind(before);
    } else {
      x = {static_cast<const Element*>(pointers.x) + in_pixels.begin, pointers.x_plane};
      this->result = {static_cast<Element*>(pointers.result) + out_pixels.begin, pointers.result_plane};
    }
    // What conv3's result is added to, or joined with.
    if (unit.has_conv3() && unit.stride == 1) shortcut = x.behind(before);
    if (unit.convolves_shortcut()) shortcut = read_only(this->kept_shortcut);
  }

  Range in_pixels, out_pixels;  // of the images
  Planes<const Element> x, shortcut;
};

// ---- Strips ---------------------------------------------------------------------------------------------------------

// A strip's rows of y1: the row above its own, its own, and with stride 1 the row below. Copies of its first and last
// own row are for its neighbours: in lines of their own, few and one behind the other, which nobody writes meanwhile.
template <class A>
struct StripRows {
  StripRows(const Unit& unit, const Strip& strip) : StripRows(unit, strip.rows, strip.y1, strip.lent) {}
  StripRows(const Unit& unit, Range rows, void* y1_memory, void* lent_memory)
      : in(unit, rows),
        own{rows.begin * unit.stride, std::min(rows.end * unit.stride, unit.height)},
        width(unit.width) {
    Arena arena(y1_memory), lent(lent_memory);
    y1 = arena.planes<A>(unit.mid_channels, in.halo.count() * width);
    first_row = {lent.take<A>(unit.mid_channels * width), width};
    last_row = {lent.take<A>(unit.mid_channels * width), width};
    bytes = arena.bytes();
    lent_bytes = lent.bytes();
  }
  // From row 0, the one above the strip's own.
  Planes<A> from_row(int64_t row) const { return y1.behind(row * width); }

  InputRows in;
  Range own;
  int64_t width;
  Planes<A> y1, first_row, last_row;
  int64_t bytes, lent_bytes;
};

// Copies a row of y1, or fills it with zeros where there is none to copy.
template <class A>
void fill_row(const Unit& unit, Planes<A> to, Planes<A> from) {
  for (int64_t c = 0; c < unit.mid_channels; ++c) {
    if (from.data) {
      std::copy_n(from.channel(c), unit.width, to.channel(c));
    } else {
      std::fill_n(to.channel(c), unit.width, A{0});
    }
  }
}

// Copies what the strips above and below need of y1.
template <class A>
void lend_rows(const Unit& unit, const Strip& strip, const StripRows<A>& rows) {
  if (strip.above) fill_row(unit, rows.first_row, rows.from_row(1));
  if (strip.below) fill_row(unit, rows.last_row, rows.from_row(rows.own.count()));
}

// Fills the rows around a strip's own: from where another strip has them, or with zeros outside the image.
template <class A>
void borrow_rows(const Unit& unit, const Strip& strip, const StripRows<A>& rows) {
  fill_row(unit, rows.y1, strip.above ? StripRows<A>(unit, *strip.above).last_row : Planes<A>{});
  if (rows.in.halo.end == rows.own.end) return;
  const Planes<A> below = strip.below ? StripRows<A>(unit, *strip.below).first_row : Planes<A>{};
  fill_row(unit, rows.from_row(rows.own.count() + 1), below);
}

// A strip's second phase goes through it some rows at a time, whose y2 stays in the L2 cache.
template <class Format>
struct StripWorkspace : Between<Format> {
  StripWorkspace(const UnitPart& strip, void* memory) {
    constexpr int64_t kMostY2Bytes = 256 * 1024;
    const Unit& unit = strip.unit;
    const int64_t shortcut_planes = unit.convolves_shortcut() ? unit.in_channels / Format::kChannelsPerElement : 0;
    const int64_t row = (Format::y2_planes(unit) + shortcut_planes) * unit.out_width();
    const int64_t row_bytes = row * static_cast<int64_t>(sizeof(typename Format::Element));
    at_once = std::clamp<int64_t>(kMostY2Bytes / row_bytes, 1, strip.rows.count());
    Arena arena(memory);
    this->take(arena, unit, at_once * unit.out_width());
    rest = memory ? static_cast<char*>(memory) + arena.bytes() : nullptr;
    const Range most = {strip.rows.begin, strip.rows.begin + at_once};
    bytes = arena.bytes() + Format({strip.unit, strip.pointers, most}, 0, nullptr).bytes;
  }
  int64_t at_once;  // rows
  void* rest;       // what a worker needs for these rows
  int64_t bytes;
};

// ---- The kernel -----------------------------------------------------------------------------------------------------

template <class Format>
class UnitOf final : public UnitKernel {
 public:
  using A = typename Format::A;
  using Element = typename Format::Element;
  static constexpr int64_t kChannels = Format::kChannelsPerElement;

  int64_t element_bytes() const override { return Format::kTensorBytes; }
  int64_t channels_per_element() const override { return kChannels; }
  int64_t lanes() const override { return Simd<A>::kLanes; }
  int64_t mid_multiple(const Unit& unit) const override { return Format::mid_multiple(unit); }
  Tile tile(int64_t channels, int64_t pixels, int64_t plane) const override {
    return Format::tile(channels, pixels, plane);
  }

  int64_t buffer_bytes(const Unit& unit, Range rows) const override {
    return UnitBuffers<Format>(unit, rows, nullptr).bytes;
  }
  int64_t workspace_bytes(const Unit& unit, Range rows, int64_t mid_channels) const override {
    return Format({unit, {}, rows}, mid_channels, nullptr).bytes;
  }

  bool is_copied(const Unit& unit) const override { return Format::is_copied(unit); }
  void copy_in(const UnitPart& part, Range channels) const override {
    if (!Format::is_copied(part.unit)) return;
    const UnitPlanes<Format> planes(part);
    Format::copy_in(part, planes.in_pixels, channels, planes.copied_x);
  }

  void conv1_and_depthwise(const UnitPart& part, Range mid, void* workspace) const override {
    const Unit& unit = part.unit;
    const UnitPlanes<Format> planes(part);
    const Format own(part, mid.count(), workspace);
    clear_outside(unit, planes.in, mid.count(), own.y1);
    const int64_t rows_above = planes.in.image.begin - planes.in.halo.begin;
    own.conv1(mid, planes.x, planes.in.image, own.y1.behind(rows_above * unit.width));
    fill_edge_masks<A>(unit, part.rows, own.masks);
    own.depthwise(mid, read_only(own.y1), unit.has_conv3() ? planes.y2 : planes.result);
    if (unit.concatenates_pool()) {
      const Range pooled = share_with(mid, unit.mid_channels, unit.in_channels);
      own.pool(pooled, planes.x, planes.in.image.begin, {}, pooled_result(unit, planes.result));
      copy_out(part, planes, pooled, unit.first_pooled_channel());
    }
    if (unit.convolves_shortcut()) {
      const Range channels = share_with(mid, unit.mid_channels, unit.in_channels);
      own.shortcut1(channels, planes.x, planes.in.image.begin, {}, planes.shortcut_y2);
    }
  }

  void conv3(const UnitPart& part, Range channels, void* workspace) const override {
    const Unit& unit = part.unit;
    const UnitPlanes<Format> planes(part);
    if (unit.has_conv3()) {
      const Format own(part, 0, workspace);
      if (unit.convolves_shortcut()) {
        const Range rows = share_with(channels, unit.out_channels, unit.shortcut_channels);
        own.shortcut2(rows, read_only(planes.shortcut_y2), planes.shortcut_result(planes.result));
      }
      own.conv3(channels, read_only(planes.y2), planes.shortcut, conv3_result(unit, planes.result));
    }
    copy_out(part, planes, channels, unit.first_conv3_channel());
  }

  StripBytes strip_bytes(const Unit& unit, Range rows) const override {
    const StripRows<A> strip(unit, rows, nullptr, nullptr);
    const int64_t second_phase = StripWorkspace<Format>({unit, {}, rows}, nullptr).bytes;
    return {strip.bytes, strip.lent_bytes, std::max(workspace_bytes(unit, rows, 0), second_phase)};
  }

  void strip_conv1(const Unit& unit, const UnitPointers& pointers, const Strip& strip, void* memory) const override {
    const StripRows<A> rows(unit, strip);
    const Format own({unit, pointers, strip.rows}, 0, memory);
    const Planes<const Element> x = read_only(planes(strip.x));
    own.conv1({0, unit.mid_channels}, x, rows.own, rows.from_row(1));
    if (unit.concatenates_pool()) {
      fill_edge_masks<A>(unit, strip.rows, own.masks);
      own.pool({0, unit.in_channels}, x, rows.own.begin, read_only(planes(strip.x_above)),
               pooled_result(unit, planes(strip.result)));
    }
    lend_rows(unit, strip, rows);
  }

  // Begins at the bottom, as x and y1 may not stay in the cache: their last rows are those that have just been used.
  void strip_depthwise_and_conv3(const Unit& unit, const UnitPointers& pointers, const Strip& strip,
                                 void* memory) const override {
    const StripRows<A> y1(unit, strip);
    borrow_rows(unit, strip, y1);
    const StripWorkspace<Format> work({unit, pointers, strip.rows}, memory);
    const Planes<const Element> x = read_only(planes(strip.x));
    for (int64_t i = ceil_div(strip.rows.count(), work.at_once) - 1; i >= 0; --i) {
      const int64_t above = i * work.at_once, first = strip.rows.begin + above, pixel = above * unit.out_width();
      const Range rows = {first, std::min(strip.rows.end, first + work.at_once)};
      const Format own({unit, pointers, rows}, 0, work.rest);
      fill_edge_masks<A>(unit, rows, own.masks);
      const Planes<Element> result = planes(strip.result).behind(pixel);
      own.depthwise({0, unit.mid_channels}, read_only(y1.from_row(above * unit.stride)), work.y2);
      Planes<const Element> shortcut = unit.stride == 1 ? x.behind(pixel) : Planes<const Element>{};
      if (unit.convolves_shortcut()) {
        own.shortcut1({0, unit.in_channels}, x, y1.own.begin, read_only(planes(strip.x_above)), work.shortcut_y2);
        own.shortcut2({0, unit.shortcut_channels}, read_only(work.shortcut_y2), work.shortcut_result(result));
        shortcut = read_only(work.kept_shortcut);
      }
      own.conv3({0, unit.out_channels}, read_only(work.y2), shortcut, conv3_result(unit, result));
    }
  }

 private:
  static Planes<Element> planes(const ImageRows& rows) { return {static_cast<Element*>(rows.data), rows.plane}; }
  static Planes<Element> conv3_result(const Unit& unit, Planes<Element> result) {
    return result.from(unit.first_conv3_channel() / kChannels);
  }
  static Planes<Element> pooled_result(const Unit& unit, Planes<Element> result) {
    return result.from(unit.first_pooled_channel() / kChannels);
  }

  // Fills the rows of y1 that lie outside of the image with zeros.
  static void clear_outside(const Unit& unit, const InputRows& in, int64_t channels, Planes<A> y1) {
    for (int64_t c = 0; c < channels; ++c) {
      std::fill_n(y1.channel(c), (in.image.begin - in.halo.begin) * unit.width, A{0});
      A* const end = y1.channel(c) + in.halo.count() * unit.width;
      std::fill(end - (in.halo.end - in.image.end) * unit.width, end, A{0});
    }
  }

  // The channels of the shortcut that go with some of `all` others to a worker.
  static Range share_with(Range some, int64_t all, int64_t channels) {
    const int64_t n = channels / kChannels;
    return {n * some.begin / all * kChannels, n * some.end / all * kChannels};
  }

  // Copies some of the channels that begin with `first` from their planes to the tensor, where these are not its own.
  static void copy_out(const UnitPart& part, const UnitPlanes<Format>& planes, Range channels, int64_t first) {
    if (!Format::is_copied(part.unit)) return;
    const Range in_result = {first + channels.begin, first + channels.end};
    Format::copy_out(part, planes.out_pixels, in_result, read_only(planes.result));
  }
};

template <class Kernel>
inline constexpr Kernel kKernel{};

// The kernels of a format, by their classes.
template <class Unit, class Stem, class LastConvolution, class Head, class Image>
class KernelsOf final : public Kernels {
 public:
  const UnitKernel& unit() const override { return kKernel<Unit>; }
  const StemKernel& stem() const override { return kKernel<Stem>; }
  const LastConvolutionKernel& last_convolution() const override { return kKernel<LastConvolution>; }
  const HeadKernel& head() const override { return kKernel<Head>; }
  const ImageKernel& image() const override { return kKernel<Image>; }
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
