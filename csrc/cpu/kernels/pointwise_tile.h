// The innermost part of a pointwise convolution: some channels of some pixels, written once over Simd<A>.
#pragma once

#include "simd.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// A tile's accumulators, one vector each, stay in registers next to a vector of pixels for each column and one
// broadcast weight. Eight channels use each loaded pixel vector eight times, three vectors use each broadcast weight
// three times: 11 loads for 24 multiply-adds. More vectors than three were slower on Zen 4, fewer leave the FMA latency
// exposed.
inline constexpr int kTileVectors = 3;
inline constexpr int kTileChannels = kRegisters == 32 ? 8 : 4;
static_assert(kTileChannels * kTileVectors + kTileVectors + 1 <= kRegisters, "a tile must fit the registers");

template <class A>
struct PointwiseTile {
  const A* x;
  const int64_t* offsets;  // from x to the pixels of each of the depth's planes
  int64_t depth;
  int64_t block;          // of the depth, at most the whole of it; see kMostTerms
  const A* weight;        // a row of depth for each channel of the tile
  int64_t weight_stride;  // from one row to the next
  // Cache lines that a later tile works on, one for each step of the depth, which are prefetched (HasAhead). They may
  // lie past the end of what is there.
  const A* ahead;  // null: none
  const int64_t* ahead_offsets;
  const A* scale;  // null: 1
  const A* bias;
  const A* residual;  // null: none
  int64_t residual_stride;
  A lower;  // the activation's bound
  A* y;
  const int64_t* y_offsets;     // from y to each row of the result
  typename Simd<A>::Mask tail;  // lanes of the last vector that are pixels
};

// Finishes a tile, once for each case of the residual: where both were one loop, the compiler kept the addresses of all
// rows at once, and moved them through vector registers.
template <class A, int Channels, int Vectors, bool HasTail, bool HasResidual>
inline void finish_tile(const PointwiseTile<A>& t, typename Simd<A>::V (&sum)[Channels][Vectors]) {
  using S = Simd<A>;
  const A* residual = t.residual;
  const int64_t residual_stride = t.residual_stride;
  const auto tail = t.tail;
  const auto lower = S::broadcast(t.lower);
  unrolled<Channels>([&](int c) {
    A* const y = t.y + t.y_offsets[c];
    unrolled<Vectors>([&](int v) {
      const bool masked = HasTail && v == Vectors - 1;
      auto value = sum[c][v];
      if (HasResidual) {
        value += masked ? S::load(residual + v * S::kLanes, tail) : S::load(residual + v * S::kLanes);
      }
      value = S::max(lower, value);
      if (masked) {
        S::store(y + v * S::kLanes, value, tail);
      } else {
        S::store(y + v * S::kLanes, value);
      }
    });
    if (HasResidual) residual += residual_stride;
  });
}

// Adds the products of terms [begin, end) of the depth to the sums. A masked load costs an FMA unit's slot, so only
// tiles with a tail (HasTail) have one.
template <class A, int Channels, int Vectors, bool HasTail, bool HasAhead>
inline void add_products(const PointwiseTile<A>& t, const A* const (&weights)[Channels], int64_t begin, int64_t end,
                         typename Simd<A>::V (&sum)[Channels][Vectors]) {
  using S = Simd<A>;
  for (int64_t k = begin; k < end; ++k) {
    if constexpr (HasAhead) __builtin_prefetch(t.ahead + t.ahead_offsets[k]);
    const A* const x = t.x + t.offsets[k];
    typename S::V pixels[Vectors];
    unrolled<Vectors>([&](int v) {
      const bool masked = HasTail && v == Vectors - 1;
      pixels[v] = masked ? S::load(x + v * S::kLanes, t.tail) : S::load(x + v * S::kLanes);
    });
    unrolled<Channels>([&](int c) {
      const auto weight = S::broadcast(weights[c][k]);
      unrolled<Vectors>([&](int v) { sum[c][v] = S::fma(weight, pixels[v], sum[c][v]); });
    });
  }
}

// Terms that are summed one behind the other: a deeper sum is one of nearly equal blocks of at most so many, as its
// rounding errors would grow with the square root of the depth. Errors of the paper's units against float64 are so 0.97
// times eager PyTorch's, geometric mean of their root mean squares; 1.17 times with one sum, 0.93 with blocks of 40. It
// takes 0.5 to 1 % of a unit's time; with blocks of 40, 2 %. (pointwise_pixel has a sum for each lane.)
inline constexpr int64_t kMostTerms = 64;

// Computes y = activation(scale * (weight x) + bias + residual) for Channels x Vectors. Each pixel sums over the depth
// in the same order whatever the tile, so results do not depend on how pixels are cut into tiles. The bias comes last:
// a sum that began with it would be rounded with it at every step (networks' errors against float64 were 1.16 times as
// large, and larger than eager PyTorch's; the nine taps of the depthwise convolution are few).
template <class A, int Channels, int Vectors, bool HasTail, bool HasAhead>
void pointwise_tile(const PointwiseTile<A>& t) {
  using S = Simd<A>;
  using V = typename S::V;
  const A* weights[Channels];  // a pointer a row: address arithmetic in the loop would compete for the FMA units' ports
  unrolled<Channels>([&](int c) { weights[c] = t.weight + c * t.weight_stride; });
  V sum[Channels][Vectors] = {};
  add_products<A, Channels, Vectors, HasTail, HasAhead>(t, weights, 0, t.block, sum);
  for (int64_t k = t.block; k < t.depth; k += t.block) {
    V before[Channels][Vectors];
    unrolled<Channels, Vectors>([&](int c, int v) {
      before[c][v] = sum[c][v];
      sum[c][v] = V{};
    });
    add_products<A, Channels, Vectors, HasTail, HasAhead>(t, weights, k, std::min(k + t.block, t.depth), sum);
    unrolled<Channels, Vectors>([&](int c, int v) { sum[c][v] += before[c][v]; });
  }
  unrolled<Channels>([&](int c) {
    const V bias = S::broadcast(t.bias[c]);
    if (t.scale) {
      const V scale = S::broadcast(t.scale[c]);
      unrolled<Vectors>([&](int v) { sum[c][v] = S::fma(sum[c][v], scale, bias); });
    } else {
      unrolled<Vectors>([&](int v) { sum[c][v] += bias; });
    }
  });
  if (t.residual) {
    finish_tile<A, Channels, Vectors, HasTail, true>(t, sum);
  } else {
    finish_tile<A, Channels, Vectors, HasTail, false>(t, sum);
  }
}

template <class A, int... I>
constexpr auto pointwise_functions(std::integer_sequence<int, I...>) {
  return std::array{
      pointwise_tile<A, I / 4 / kTileVectors + 1, I / 4 % kTileVectors + 1, I / 2 % 2 == 1, I % 2 == 1>...};
}

template <class A>
void run_pointwise_tile(int64_t channels, int64_t vectors, bool has_tail, const PointwiseTile<A>& tile) {
  static constexpr auto functions =
      pointwise_functions<A>(std::make_integer_sequence<int, kTileChannels * kTileVectors * 4>{});
  functions[((channels - 1) * kTileVectors + vectors - 1) * 4 + has_tail * 2 + (tile.ahead != nullptr)](tile);
}

// Computes what pointwise_tile does, for one pixel, whose inputs are in `column`.
template <class A>
void pointwise_pixel(const PointwiseTile<A>& t, int64_t rows, const A* column) {
  using S = Simd<A>;
  for (int64_t row = 0; row < rows; ++row) {
    const A* const weight = t.weight + row * t.weight_stride;
    typename S::V sum = {};
    int64_t k = 0;
    for (; k + S::kLanes <= t.depth; k += S::kLanes) sum = S::fma(S::load(weight + k), S::load(column + k), sum);
    if (k < t.depth) sum = S::fma(S::load(weight + k, S::first(t.depth - k)), S::load(column + k), sum);
    A value = S::sum(sum) * (t.scale ? t.scale[row] : A{1}) + t.bias[row];
    if (t.residual) value += t.residual[row * t.residual_stride];
    t.y[t.y_offsets[row]] = value < t.lower ? t.lower : value;
  }
}

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
