// Scalar products of planes with planes: the Gram matrix of y2 and the gradients of pointwise weights. They are a
// pointwise convolution over pixels in place of channels: planes of the one operand are its weights, as they lie, and
// the other's are transposed, so that a vector has a pixel of as many planes as it has lanes.
#pragma once

#include "pointwise.h"
#include "training_table.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// Transposes up to kLanes planes, whose rows in `to` go on from there for `left` elements. Where all vectors are whole
// the block stays in registers.
template <class A, bool IsWhole>
inline void transpose_block(const OffsetPlanes& p, const A* from, int64_t pixels, A* to, int64_t row, int64_t left) {
  using S = Simd<A>;
  const A* const offset = static_cast<const A*>(p.offset);
  typename S::V block[S::kLanes];
  unrolled<S::kLanes>([&](int i) {
    if (!IsWhole && i >= p.count) {
      block[i] = typename S::V{};
      return;
    }
    block[i] = IsWhole ? S::load(from + i * p.plane) : load_some(from + i * p.plane, pixels);
    if (offset) block[i] -= S::broadcast(offset[i]);
  });
  S::transpose(block);
  unrolled<S::kLanes>([&](int i) {
    if (IsWhole) {
      S::store(to + i * row, block[i]);
    } else if (i < pixels) {
      store_some(to + i * row, block[i], left);
    }
  });
}

template <class A>
void transpose_some(const OffsetPlanes& p, A* to, int64_t row, int64_t left) {
  constexpr int64_t kLanes = Simd<A>::kLanes;
  const A* const from = static_cast<const A*>(p.data);
  for (int64_t pixel = 0; pixel < p.pixels; pixel += kLanes) {
    const int64_t pixels = std::min(kLanes, p.pixels - pixel);
    if (pixels == kLanes && p.count == kLanes) {
      transpose_block<A, true>(p, from + pixel, pixels, to + pixel * row, row, left);
    } else {
      transpose_block<A, false>(p, from + pixel, pixels, to + pixel * row, row, left);
    }
  }
}

// Writes to[pixel][plane], and zeros behind the planes to the end of a row.
template <class A>
void transpose_planes(const OffsetPlanes& planes, A* to, int64_t row) {
  constexpr int64_t kLanes = Simd<A>::kLanes;
  for (int64_t c = 0; c < planes.count; c += kLanes) {
    OffsetPlanes some = planes;
    some.data = static_cast<const A*>(planes.data) + c * planes.plane;
    some.count = std::min(kLanes, planes.count - c);
    if (planes.offset) some.offset = static_cast<const A*>(planes.offset) + c;
    transpose_some<A>(some, to + c, row, row - c);
  }
}

// The elements of as many vectors as so many planes take.
template <class A>
int64_t product_row(int64_t planes) {
  return ceil_div(planes, Simd<A>::kLanes) * Simd<A>::kLanes;
}

// Adds the products to the sums. Pixels go through a tile in blocks, so that the list of their places is short.
template <class A>
void plane_products(const PlaneProducts& p) {
  using S = Simd<A>;
  constexpr int64_t kMostPixels = 2 * kMostTerms;
  static constexpr A zeros[kTileChannels] = {};
  const int64_t row = product_row<A>(p.b_planes);
  const PixelTiles<A> tiles(row);
  int64_t places[kMostPixels], y_rows[kTileChannels];
  for (int64_t i = 0; i < std::min(kMostPixels, p.pixels); ++i) places[i] = i * row;
  for (int64_t i = 0; i < kTileChannels; ++i) y_rows[i] = i * row;
  PointwiseTile<A> t = {};
  t.offsets = places;
  t.weight_stride = p.a_plane;
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
      t.weight = static_cast<const A*>(p.a) + a * p.a_plane + pixel;
      for (int64_t tile = 0; tile < tiles.count; ++tile) {
        t.x = static_cast<const A*>(p.b) + pixel * row + tiles.pixel(tile);
        t.y = static_cast<A*>(p.sums) + a * row + tiles.pixel(tile);
        t.residual = t.y;
        run_pointwise_tile(rows, tiles.tile_vectors(tile), false, t);
      }
    }
  }
}

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
