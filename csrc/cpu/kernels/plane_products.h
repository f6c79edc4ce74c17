// Scalar products of planes with planes: the Gram matrix of y2 and the gradients of pointwise weights. They are a
// pointwise convolution over pixels in place of channels: planes of the one operand are its weights, as they lie or,
// where they are of 16 bits, converted, and the other's are interleaved, so that a vector has a pixel of as many planes
// as it has lanes.
#pragma once

#include "pointwise.h"
#include "training_planes.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// Interleaves up to kLanes planes. Where all vectors are whole the block stays in registers.
template <class T, bool IsWhole>
inline void interleave_block(const OffsetPlanes& p, const T* from, int64_t pixels, accumulator_t<T>* to, int64_t row) {
  using A = accumulator_t<T>;
  using S = Simd<A>;
  const A* const offset = static_cast<const A*>(p.offset);
  typename S::V block[S::kLanes];
  unrolled<S::kLanes>([&](int i) {
    if (!IsWhole && i >= p.count) {
      block[i] = typename S::V{};
      return;
    }
    block[i] = IsWhole ? Stored<T>::load(from + i * p.plane) : load_first(from + i * p.plane, pixels);
    if (offset) block[i] -= S::broadcast(offset[i]);
  });
  S::transpose(block);
  unrolled<S::kLanes>([&](int i) {
    if (IsWhole || i < pixels) S::store(to + i * row, block[i]);
  });
}

template <class T>
void interleave_some(const OffsetPlanes& p, accumulator_t<T>* to, int64_t row) {
  constexpr int64_t kLanes = Simd<accumulator_t<T>>::kLanes;
  const T* const from = static_cast<const T*>(p.data);
  for (int64_t pixel = 0; pixel < p.pixels; pixel += kLanes) {
    const int64_t pixels = std::min(kLanes, p.pixels - pixel);
    if (pixels == kLanes && p.count == kLanes) {
      interleave_block<T, true>(p, from + pixel, pixels, to + pixel * row, row);
    } else {
      interleave_block<T, false>(p, from + pixel, pixels, to + pixel * row, row);
    }
  }
}

// Calls some(planes, to) for as many planes at a time as a vector has lanes: a part of the planes, and where its rows
// begin.
template <class T, class To, class Some>
void each_lanes(const OffsetPlanes& planes, To* to, const Some& some) {
  using A = accumulator_t<T>;
  constexpr int64_t kLanes = Simd<A>::kLanes;
  for (int64_t c = 0; c < planes.count; c += kLanes) {
    OffsetPlanes part = planes;
    part.data = static_cast<const T*>(planes.data) + c * planes.plane;
    part.count = std::min(kLanes, planes.count - c);
    if (planes.offset) part.offset = static_cast<const A*>(planes.offset) + c;
    some(part, to + c);
  }
}

// The elements of as many vectors as so many planes take.
template <class A>
int64_t product_row(int64_t planes) {
  return ceil_div(planes, Simd<A>::kLanes) * Simd<A>::kLanes;
}

// Products of planes of T in its accumulator type.
template <class T>
struct ProductsOfFloats {
  using A = accumulator_t<T>;
  static constexpr bool kArePairs = false;

  // Writes to[pixel][plane], and zeros behind the planes to the end of a row.
  static void interleave(const OffsetPlanes& planes, void* to, int64_t row) {
    each_lanes<T>(
        planes, static_cast<A*>(to), [&](const OffsetPlanes& some, A* first) { interleave_some<T>(some, first, row); });
  }

  // Adds the products to the sums. Pixels go through a tile in blocks, so that the list of their places is short.
  static void add(const PlaneProducts& p) {
    using S = Simd<A>;
    constexpr bool kConverts = !std::is_same_v<T, A>;
    constexpr int64_t kMostPixels = 2 * kMostTerms;
    static constexpr A zeros[kTileChannels] = {};
    alignas(kMemoryAlignment) A converted[kConverts ? kTileChannels * kMostPixels : 1];
    const int64_t row = product_row<A>(p.b_planes);
    const PixelTiles<A> tiles(row);
    int64_t places[kMostPixels], y_rows[kTileChannels];
    for (int64_t i = 0; i < std::min(kMostPixels, p.pixels); ++i) places[i] = i * row;
    for (int64_t i = 0; i < kTileChannels; ++i) y_rows[i] = i * row;
    PointwiseTile<A> t = {};
    t.offsets = places;
    t.weight_stride = kConverts ? kMostPixels : p.a_plane;
    t.bias = zeros;
    t.residual_stride = row;
    t.lower = static_cast<A>(kNoActivation.lower);
    t.y_offsets = y_rows;
    t.tail = S::first(S::kLanes);
    for (int64_t a = 0, rows = 0; a < p.a_planes; a += rows) {
      rows = next_channels(p.a_planes - a);
      for (int64_t pixel = 0; pixel < p.pixels; pixel += t.depth) {
        t.depth = std::min(kMostPixels, p.pixels - pixel);
        t.block = std::min(kMostTerms, t.depth);
        const T* const planes = static_cast<const T*>(p.a) + a * p.a_plane + pixel;
        if constexpr (kConverts) {
          for (int64_t i = 0; i < rows; ++i) copy_plane(planes + i * p.a_plane, t.depth, converted + i * kMostPixels);
          t.weight = converted;
        } else {
          t.weight = planes;
        }
        for (int64_t tile = 0; tile < tiles.count; ++tile) {
          t.x = static_cast<const A*>(p.b) + pixel * row + tiles.pixel(tile);
          t.y = static_cast<A*>(p.sums) + a * row + tiles.pixel(tile);
          t.residual = t.y;
          run_pointwise_tile(rows, tiles.tile_vectors(tile), false, t);
        }
      }
    }
  }
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
