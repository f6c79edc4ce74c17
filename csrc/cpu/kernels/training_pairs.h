// Pointwise convolutions and products of planes for training in bfloat16, as dot products of pairs: of channels in the
// one, of pixels in the other.
#pragma once

#include "format_pairs.h"
#include "training.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// Computes sums + bias to planes of float, or adds them to what is there.
struct FinishFloats {
  const float* bias;
  bool adds;
  Planes<float> y;

  void operator()(const RowRange&, int64_t first, int64_t rows, const float* sums, int64_t pixel, int64_t n) const {
    using S = Simd<float>;
    for (int64_t row = first; row < first + rows; ++row, sums += kSumsStride) {
      const auto row_bias = S::broadcast(bias[row]);
      float* const to = y.channel(row) + pixel;
      for (int64_t i = 0; i < n; i += S::kLanes) {
        auto value = S::load(sums + i) + row_bias;
        if (adds) value += S::load(to + i);
        store_first(to + i, value, n - i);
      }
    }
  }
};

// Pairs of channels that planes of bfloat16 are put together to, and their convolution.
class ConvertedToPairs {
 public:
  using Element = Pair;

  ConvertedToPairs(Arena&, int64_t, int64_t) {}

  static int64_t planes(int64_t depth) { return pairs_of(depth); }
  static void convert(const BFloat16* from, int64_t pixels, int64_t depth, Planes<Pair> to) {
    for (int64_t k = 0; k < depth; k += 2) {
      const BFloat16 *const first = from + k * pixels, *const second = first + pixels;
      Pair* const pairs = to.channel(k / 2);
      const bool has_second = k + 1 < depth;
      each_vector<float>(pixels, [&](int64_t i, int64_t n, auto is_tail) {
        const auto of_second = has_second ? load_pixels(second + i, n, is_tail) : Pairs::V{};
        store_pairs(pairs + i, load_pixels(first + i, n, is_tail), of_second, n);
      });
    }
  }

  // Computes rows, all of a group, to planes from 0 on, or adds them to what is there.
  void convolve(const PointwiseInput& input, Range rows, int64_t pixels, Planes<const Pair> x, bool adds,
                Planes<float> to) const {
    const int64_t pairs = pairs_of(input.depth);
    const Convolution conv = {static_cast<const BFloat16*>(input.weight) + rows.begin * 2 * pairs, nullptr, nullptr};
    const RowRange range = {0, rows.count(), 0};
    const FinishFloats finish = {static_cast<const float*>(input.bias) + rows.begin, adds, to};
    Products products;
    multiply({conv, pairs, &range, 1, pixels, has_lone_pair(pixels, pixels)}, x, products, finish);
  }
};

struct ProductsOfPairs {
  static constexpr bool kArePairs = true;

  // Writes to[pair of pixels][plane], and zeros behind the planes to the end of a row. Of an odd number of pixels the
  // last pair's second is zero.
  static void interleave(const OffsetPlanes& planes, void* to, int64_t row) {
    each_lanes<BFloat16>(planes, static_cast<Pair*>(to), [&](const OffsetPlanes& some, Pair* first) {
      interleave_some(some, first, row);
    });
  }

  // Adds the products to the sums. Pixels go through a tile in blocks, of which a's are copied, as a plane may end
  // within a pair.
  static void add(const PlaneProducts& p) {
    using S = Simd<float>;
    constexpr int64_t kMostPairs = 128;
    alignas(kMemoryAlignment) BFloat16 a[kProductRows * 2 * kMostPairs];
    alignas(kMemoryAlignment) float sums[kProductRows * kSumsStride];
    const int64_t row = product_row<float>(p.b_planes), vectors = row / S::kLanes;
    PairProduct product;
    product.weight = a;
    product.x_plane = row;
    product.sums = sums;
    Products products;
    for (int64_t plane = 0; plane < p.a_planes; plane += product.rows) {
      const int64_t left = p.a_planes - plane;
      product.rows = ceil_div(left, ceil_div(left, kProductRows));
      for (int64_t pixel = 0; pixel < p.pixels; pixel += 2 * kMostPairs) {
        const int64_t pixels = std::min(2 * kMostPairs, p.pixels - pixel);
        product.pairs = pairs_of(pixels);
        for (int64_t i = 0; i < product.rows; ++i) {
          const auto* const from = static_cast<const BFloat16*>(p.a) + (plane + i) * p.a_plane + pixel;
          BFloat16* const to = a + i * 2 * product.pairs;
          to[2 * product.pairs - 1] = {};  // behind an odd number of pixels
          const auto shift = S::broadcast(p.a_offset ? static_cast<const float*>(p.a_offset)[plane + i] : 0);
          each_vector<float>(pixels, [&](int64_t j, int64_t n, auto is_tail) {
            store_pixels(to + j, load_pixels(from + j, n, is_tail) - shift, n, is_tail);
          });
        }
        products.prepare(product.rows, product.pairs);
        for (int64_t v = 0; v < vectors; v += product.vectors) {
          product.vectors = ceil_div(vectors - v, ceil_div(vectors - v, kProductVectors));
          product.x = static_cast<const Pair*>(p.b) + pixel / 2 * row + v * S::kLanes;
          products.run(product);
          for (int64_t i = 0; i < product.rows; ++i) {
            float* const to = static_cast<float*>(p.sums) + (plane + i) * row + v * S::kLanes;
            for (int64_t j = 0; j < product.vectors * S::kLanes; j += S::kLanes) {
              S::store(to + j, S::load(to + j) + S::load(sums + i * kSumsStride + j));
            }
          }
        }
      }
    }
  }

 private:
  // Up to kLanes planes, as many pairs of pixels at a time.
  static void interleave_some(const OffsetPlanes& p, Pair* to, int64_t row) {
    using S = Simd<float>;
    const auto* const offset = static_cast<const float*>(p.offset);
    for (int64_t pixel = 0; pixel < p.pixels; pixel += 2 * S::kLanes) {
      const int64_t n = p.pixels - pixel;
      S::V block[S::kLanes] = {};
      for (int64_t i = 0; i < p.count; ++i) {
        const auto* const from = static_cast<const BFloat16*>(p.data) + i * p.plane + pixel;
        const auto shift = S::broadcast(offset ? offset[i] : 0);
        const auto part = [&](int64_t begin) {
          if (n >= begin + S::kLanes) return Stored<BFloat16>::load(from + begin) - shift;
          if (n <= begin) return S::V{};
          return S::keep(load_first(from + begin, n - begin) - shift, S::first(n - begin));
        };
        const S::V first = part(0), second = part(S::kLanes);
        block[i] = Pairs::pack(S::even(first, second), S::odd(first, second));
      }
      S::transpose(block);
      const int64_t pairs = std::min<int64_t>(S::kLanes, pairs_of(n));
      for (int64_t i = 0; i < pairs; ++i, to += row) S::store(reinterpret_cast<float*>(to), block[i]);
    }
  }
};

using TrainingOfPairs = TrainingOf<BFloat16, ConvertedPointwise<BFloat16, ConvertedToPairs>, ProductsOfPairs>;

inline constexpr TrainingOfPairs kPairTrainingKernels{};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
