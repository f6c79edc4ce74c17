// Products of pairs by AVX512-BF16, in the tiles of kernels/pointwise_tile.h.
#pragma once

#include "../kernels/pairs.h"
#include "../kernels/pointwise_tile.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

inline constexpr int64_t kProductRows = kTileChannels, kProductVectors = kTileVectors;
inline constexpr int64_t kProductPixels = kProductVectors * Simd<float>::kLanes;

template <int Rows, int Vectors>
void product_tile(const PairProduct& product) {
  const PairProduct p = product;  // a copy that no store can alias
  using S = Simd<float>;
  S::V sum[Rows][Vectors] = {};
  const BFloat16* weights[Rows];
  unrolled<Rows>([&](int row) { weights[row] = p.weight + row * 2 * p.pairs; });
  for (int64_t k = 0; k < p.pairs; ++k) {
    const Pair* const x = p.x + k * p.x_plane;
    __m512bh pixels[Vectors];
    unrolled<Vectors>([&](int v) { pixels[v] = reinterpret_cast<__m512bh>(Pairs::load(x + v * S::kLanes)); });
    unrolled<Rows>([&](int row) {
      const auto weight = reinterpret_cast<__m512bh>(Pairs::broadcast(weights[row] + 2 * k));
      unrolled<Vectors>([&](int v) { sum[row][v] = _mm512_dpbf16_ps(sum[row][v], weight, pixels[v]); });
    });
  }
  unrolled<Rows, Vectors>([&](int row, int v) {
    S::store(p.sums + row * kProductPixels + v * S::kLanes, sum[row][v]);
  });
}

using ProductFunction = void (*)(const PairProduct&);

template <int... I>
constexpr std::array<ProductFunction, sizeof...(I)> product_functions(std::integer_sequence<int, I...>) {
  return {product_tile<I / kProductVectors + 1, I % kProductVectors + 1>...};
}

class Products {
 public:
  // Prepares products of so many rows and pairs.
  void prepare(int64_t, int64_t) {}

  void run(const PairProduct& product) {
    static constexpr auto functions =
        product_functions(std::make_integer_sequence<int, kProductRows * kProductVectors>{});
    functions[(product.rows - 1) * kProductVectors + product.vectors - 1](product);
  }
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
