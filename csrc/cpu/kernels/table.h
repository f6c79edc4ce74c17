// The interface between the schedule, which is compiled once and splits work over threads, and the kernels, which are
// compiled for each ISA.
#pragma once

#include <cstdint>

#include "../../network.h"

namespace shufflenet::cpu {

// Some channels, rows or classes, one behind the other.
struct Range {
  int64_t begin = 0, end = 0;
  int64_t count() const { return end - begin; }
};

// Rows of an image in planes: channel c starts `plane` elements behind channel c - 1.
struct ImageRows {
  void* data = nullptr;
  int64_t plane = 0;
};

// Rows of a unit's result which are computed without the rows of y1 around them: those come from the strips above and
// below. A strip's rows of x and of y1 are its rows of the result times the stride, and no two strips share a row.
struct Strip {
  Range rows;
  ImageRows x, result;  // from the strip's own first row
  ImageRows x_above;    // the row of x above; null: there is none
  void* y1 = nullptr;
  void* lent = nullptr;  // what the strips above and below need of y1
  const Strip* above = nullptr;
  const Strip* below = nullptr;
};

// What memory a strip needs, and (workspace) the thread that works on it.
struct StripBytes {
  int64_t y1, lent, workspace;
};

// What a pointwise convolution computes at once: so many channels of so many vectors of pixels.
struct Tile {
  int64_t channels = 0, vectors = 0;
};

// Some rows of a unit's result, and the memory in which the phases that compute them hand on what the next one needs.
struct UnitPart {
  const Unit& unit;
  const UnitPointers& pointers;
  Range rows;
  void* buffers = nullptr;
};

// A unit in phases, in the order in which they run. Each needs all channels of the one before, and its own channels may
// be split in any way, over any threads: no result depends on the splits, bit for bit. Workspaces are a worker's own.
class UnitKernel {
 public:
  virtual int64_t element_bytes() const = 0;         // of x and the result
  virtual int64_t channels_per_element() const = 0;  // 2 in planes of pairs
  virtual int64_t lanes() const = 0;                 // pixels of a vector
  // Counts what an image of so many channels takes, whose planes have so many elements.
  int64_t image_bytes(int64_t channels, int64_t plane) const {
    return channels / channels_per_element() * plane * element_bytes();
  }

  // What intermediate channels may be split by: each share but the last is a multiple of this. Those of the result must
  // not be cut inside of an element.
  virtual int64_t mid_multiple(const Unit&) const = 0;

  virtual int64_t buffer_bytes(const Unit&, Range rows) const = 0;
  // What a worker needs for so many intermediate channels; conv3 needs that of none.
  virtual int64_t workspace_bytes(const Unit&, Range rows, int64_t mid_channels) const = 0;

  // Whether x and the result are copied, since kernels do not work on them as they lie in their tensors.
  virtual bool is_copied(const Unit&) const = 0;
  // Copies channels of x, where that is so.
  virtual void copy_in(const UnitPart&, Range channels) const = 0;
  // Computes conv1 and the depthwise convolution, and pools the shortcut. `mid` are rows of conv1; in planes of pairs
  // they are intermediate channels behind the shuffle, as pairs are made of those.
  virtual void conv1_and_depthwise(const UnitPart&, Range mid, void* workspace) const = 0;
  // Computes rows of conv3. Where the unit ends after the depthwise convolution, copies channels of the result.
  virtual void conv3(const UnitPart&, Range channels, void* workspace) const = 0;

  // The same in two phases of strips, of images that are not copied: the second needs the first of the strips above and
  // below. The shortcut is pooled in the first, which has just read x.
  virtual StripBytes strip_bytes(const Unit&, Range rows) const = 0;
  virtual void strip_conv1(const Unit&, const UnitPointers&, const Strip&, void* workspace) const = 0;
  virtual void strip_depthwise_and_conv3(const Unit&, const UnitPointers&, const Strip&, void* workspace) const = 0;

  // The largest tile for so many channels that share their inputs, and for the plane's last pixels.
  virtual Tile tile(int64_t channels, int64_t pixels, int64_t plane) const = 0;
};

// A convolution around a program's units, of whose result some rows are computed: of a stem the rows of pixels, of the
// last convolution those that belong to rows of its weights.
template <class Layer>
class LayerKernel {
 public:
  virtual int64_t workspace_bytes(const Layer&) const = 0;
  // Computes rows of an image's result, the first of which goes to `result`; result_plane elements of the format lie
  // between its planes.
  virtual void run(const Layer&, const Convolution&, const void* x, Range rows, void* result, int64_t result_plane,
                   void* workspace) const = 0;
  // The largest tile where so many tasks share the rows.
  virtual Tile tile(const Layer&, int64_t tasks) const = 0;
};
using StemKernel = LayerKernel<Stem>;
using LastConvolutionKernel = LayerKernel<LastConvolution>;

class HeadKernel {
 public:
  // The means of a batch: how many bytes they have, and how many lie between those of one image and the next.
  virtual int64_t means_bytes(const Head&, int64_t images) const = 0;
  virtual int64_t means_step(const Head&) const = 0;
  // Computes means of an image's channels; `means` are the image's own.
  virtual void means(const Head&, int64_t images, const void* x, Range channels, void* means) const = 0;
  virtual void linear(const Head&, int64_t images, const Convolution&, const void* means, Range classes,
                      void* result) const = 0;
};

// How an image lies in a tensor.
struct TensorImage {
  Layout layout;
  int64_t channels, pixels;
};

// Converts a tensor's image to a format's planes and back, for up to kImageChannels channels, the first an even one.
// What is written may come from planes in another order.
class ImageKernel {
 public:
  virtual int64_t workspace_bytes(const TensorImage&) const = 0;
  virtual void read(const TensorImage&, const void* from, Range channels, void* to, int64_t plane,
                    void* workspace) const = 0;
  virtual void write(const TensorImage&, const void* from, int64_t plane, const int64_t* planes, Range channels,
                     void* to, void* workspace) const = 0;
};
inline constexpr int64_t kImageChannels = 16;

// All kernels of a format, for tensors of one dtype. There are two formats of the images between a program's steps:
//   planes of floats    the accumulator type: double for float64, float for all other dtypes
//   planes of pairs     bfloat16, as its dot products take it: element i of plane c holds channels 2 c and 2 c + 1 at
//                       pixel i. Weights are bfloat16, in rows of an even depth (the depthwise convolution's are float;
//                       the stem's are as stem_row_pairs says), biases float. Scales are folded into the weights. Units
//                       must have what has_pairs asks for.
// In planes of floats, channels of units of v2 are in any planes (UnitPointers); pairs are in their order.
class Kernels {
 public:
  virtual const UnitKernel& unit() const = 0;
  virtual const StemKernel& stem() const = 0;
  virtual const LastConvolutionKernel& last_convolution() const = 0;
  virtual const HeadKernel& head() const = 0;
  virtual const ImageKernel& image() const = 0;
};

inline constexpr int64_t kPairsSlackBytes = 64;  // behind an image's planes of pairs: whole vectors are read

// Whether pairs neither straddle the groups that conv1 reads nor what the result is put together from. In v2 each pair
// of the result is a channel of both parts: they must be shuffled by two, and as many.
inline bool has_pairs(const Unit& unit) {
  if (unit.conv1_depth() % 2 != 0 || unit.out_channels % 2 != 0) return false;
  return !unit.is_v2() || (unit.split_groups == 1 && unit.join_groups == 2 && unit.conv1_first() % 2 == 0 &&
                           unit.result_channels() == 2 * unit.out_channels);
}

// In planes of pairs, a stem has for each row of its window the taps of all columns, channel by channel, in so many
// pairs: where they are an odd number, behind the last of them is a zero.
inline int64_t stem_row_pairs(const Stem& stem) { return ceil_div(stem.in_channels * stem.kernel_size, 2); }

inline constexpr int64_t kMemoryAlignment = 64;  // of buffers, workspaces and planes, in bytes: a cache line

// Cache lines from plane to plane, for so many at least. A tile reads the same few lines of many planes: where planes
// are larger than that, an odd number spreads them over all sets of a cache (720x1280, conv1: 1.4 times as fast).
inline int64_t plane_lines(int64_t lines) { return lines > 8 ? lines | 1 : lines; }

// Elements from plane to plane of an image between two steps, which so begin with a cache line each.
inline int64_t padded_plane(int64_t pixels) {
  constexpr int64_t kLine = 16;  // of float; two of double
  return plane_lines(ceil_div(pixels, kLine)) * kLine;
}

}  // namespace shufflenet::cpu
