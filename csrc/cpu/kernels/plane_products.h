// Scalar products of planes with planes: the Gram matrix of y2 and the gradients of pointwise weights.
#pragma once

#include "pointwise_tile.h"
#include "training_table.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// Up to kTileChannels planes of a by kTileVectors of b: their sums stay in registers, as a pointwise tile's do.
template <class A>
struct ProductTile {
  const PlaneProducts& products;
  const A* a;
  const A* b;
  const A* offset;  // of b; null: none
  double* sums;
};

template <class A, int Rows, int Columns, bool IsTail>
inline void add_plane_products(const A* a, const A* b, int64_t plane, typename Simd<A>::Mask mask,
                               const typename Simd<A>::V (&offset)[Columns],
                               typename Simd<A>::V (&sum)[Rows][Columns]) {
  using S = Simd<A>;
  const auto load = [mask](const A* p) { return IsTail ? S::load(p, mask) : S::load(p); };
  typename S::V columns[Columns];
  // A tail's lanes that are no pixels are finite, as zeros of a are multiplied by them.
  unrolled<Columns>([&](int column) { columns[column] = load(b + column * plane) - offset[column]; });
  unrolled<Rows>([&](int row) {
    const auto value = IsTail ? load(a + row * plane) : S::load_once(a + row * plane);
    unrolled<Columns>([&](int column) { sum[row][column] = S::fma(value, columns[column], sum[row][column]); });
  });
}

template <class A, int Rows, int Columns>
void product_tile_of_planes(const ProductTile<A>& t) {
  using S = Simd<A>;
  const auto& p = t.products;
  const int64_t pixels = p.pixels, whole = pixels / S::kLanes * S::kLanes;
  const auto tail = S::first(pixels - whole);
  typename S::V sum[Rows][Columns] = {}, offset[Columns] = {};
  if (t.offset) unrolled<Columns>([&](int column) { offset[column] = S::broadcast(t.offset[column]); });
  for (int64_t image = 0; image < p.images; ++image) {
    const A* const a = t.a + image * p.a_image;
    const A* const b = t.b + image * p.b_image;
    for (int64_t i = 0; i < whole; i += S::kLanes) {
      add_plane_products<A, Rows, Columns, false>(a + i, b + i, p.plane, tail, offset, sum);
    }
    if (whole < pixels) add_plane_products<A, Rows, Columns, true>(a + whole, b + whole, p.plane, tail, offset, sum);
  }
  unrolled<Rows, Columns>([&](int row, int column) {
    t.sums[row * p.b_planes + column] += static_cast<double>(S::sum(sum[row][column]));
  });
}

template <class A>
using ProductTileFunction = void (*)(const ProductTile<A>&);

template <class A, int... I>
constexpr std::array<ProductTileFunction<A>, sizeof...(I)> product_tile_functions(std::integer_sequence<int, I...>) {
  return {product_tile_of_planes<A, I / kTileVectors + 1, I % kTileVectors + 1>...};
}

template <class A>
void plane_products(const PlaneProducts& p) {
  static constexpr auto functions =
      product_tile_functions<A>(std::make_integer_sequence<int, kTileChannels * kTileVectors>{});
  const A* const offset = static_cast<const A*>(p.b_offset);
  for (int64_t a = 0; a < p.a_planes; a += kTileChannels) {
    const int64_t rows = std::min<int64_t>(kTileChannels, p.a_planes - a);
    for (int64_t b = 0; b < p.b_planes; b += kTileVectors) {
      const int64_t columns = std::min<int64_t>(kTileVectors, p.b_planes - b);
      functions[(rows - 1) * kTileVectors + columns - 1](
          {p, static_cast<const A*>(p.a) + a * p.plane, static_cast<const A*>(p.b) + b * p.plane,
           offset ? offset + b : nullptr, p.sums + a * p.b_planes + b});
    }
  }
}

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
