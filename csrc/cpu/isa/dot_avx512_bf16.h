// Products of pairs by AVX512-BF16, in the tiles of kernels/pointwise_tile.h.
#pragma once

#include "../kernels/pairs.h"
#include "../kernels/pointwise_tile.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

inline constexpr int64_t kProductRows = kTileChannels, kProductVectors = kTileVectors;
inline constexpr int64_t kSumsStride = (kProductVectors + 1) * Simd<float>::kLanes;

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
  unrolled<Rows, Vectors>([&](int row, int v) { S::store(p.sums + row * kSumsStride + v * S::kLanes, sum[row][v]); });
}

// Computes the products of a lone pixel, whose `pairs` are in `column` with zeros up to a whole vector, and puts them
// in column `place` of the sums.
template <int Rows>
void product_pixel(const PairProduct& p, const Pair* column, int64_t place) {
  using S = Simd<float>;
  S::V sum[Rows] = {};
  const auto add = [&](int row, S::V weights, S::V pairs) {
    sum[row] = _mm512_dpbf16_ps(sum[row], reinterpret_cast<__m512bh>(weights), reinterpret_cast<__m512bh>(pairs));
  };
  const auto weights_at = [&](int row, int64_t k) {
    return reinterpret_cast<const float*>(p.weight + 2 * (row * p.pairs + k));
  };
  int64_t k = 0;
  for (; k + S::kLanes <= p.pairs; k += S::kLanes) {
    unrolled<Rows>([&](int row) { add(row, S::load(weights_at(row, k)), Pairs::load(column + k)); });
  }
  if (k < p.pairs) {
    const auto left = S::first(p.pairs - k);
    unrolled<Rows>([&](int row) { add(row, S::load(weights_at(row, k), left), Pairs::load(column + k)); });
  }
  unrolled<Rows>([&](int row) { p.sums[row * kSumsStride + place] = S::sum(sum[row]); });
}

template <int... I>
constexpr auto product_functions(std::integer_sequence<int, I...>) {
  return std::array{product_tile<I / kProductVectors + 1, I % kProductVectors + 1>...};
}

template <int... I>
constexpr auto pixel_functions(std::integer_sequence<int, I...>) {
  return std::array{product_pixel<I + 1>...};
}

class Products {
 public:
  static constexpr bool kTakesLonePixels = true;

  // Prepares products of so many rows and pairs.
  void prepare(int64_t, int64_t) {}

  void run(const PairProduct& product) {
    static constexpr auto functions =
        product_functions(std::make_integer_sequence<int, kProductRows * kProductVectors>{});
    functions[(product.rows - 1) * kProductVectors + product.vectors - 1](product);
  }
  void run_pixel(const PairProduct& product, const Pair* column, int64_t place) {
    static constexpr auto functions = pixel_functions(std::make_integer_sequence<int, kProductRows>{});
    functions[product.rows - 1](product, column, place);
  }
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
