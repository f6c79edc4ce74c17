// Pairs: the bfloat16 values of two neighbouring channels at a pixel, the first in the lower half of 32 bits, as dot
// products of bfloat16 take them. Written once over the PairIntrinsics of an ISA's header in isa/.
#pragma once

#include "planes.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

struct Pair {
  uint16_t first, second;
};

struct Pairs : PairIntrinsics {
  using S = Simd<float>;
  using V = S::V;  // of bits, where it holds pairs
  using Word = Stored<BFloat16>::Word;

  static V load(const Pair* p) { return S::load(reinterpret_cast<const float*>(p)); }
  static V broadcast(const BFloat16* p) {
    uint32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return reinterpret_cast<V>(bits - Word{});
  }

  static V first(V pairs) { return reinterpret_cast<V>(reinterpret_cast<Word>(pairs) << 16); }
  static V second(V pairs) { return reinterpret_cast<V>(reinterpret_cast<Word>(pairs) & 0xffff0000); }
};

inline int64_t pairs_of(int64_t channels) { return ceil_div(channels, 2); }

inline void store_pairs(Pair* p, Simd<float>::V first, Simd<float>::V second, int64_t n) {
  store_first(reinterpret_cast<float*>(p), Pairs::pack(first, second), n);
}

inline void pack(const float* first, const float* second, int64_t pixels, Pair* pairs) {
  using S = Simd<float>;
  for (int64_t i = 0; i < pixels; i += S::kLanes) {
    store_pairs(pairs + i, load_first(first + i, pixels - i), load_first(second + i, pixels - i), pixels - i);
  }
}

inline void unpack(const Pair* pairs, int64_t pixels, float* first, float* second) {
  using S = Simd<float>;
  for (int64_t i = 0; i < pixels; i += S::kLanes) {
    const auto both = Pairs::load(pairs + i);
    store_first(first + i, Pairs::first(both), pixels - i);
    store_first(second + i, Pairs::second(both), pixels - i);
  }
}

// Rows of a product of weights with pairs: each sums over the depth. An ISA's Products run it.
struct PairProduct {
  const BFloat16* weight;  // rows of 2 * pairs
  int64_t rows;            // at most kProductRows
  int64_t pairs;           // of the depth
  const Pair* x;           // whole vectors of it are read
  int64_t x_plane;         // from pair to pair of the depth
  int64_t vectors;         // of pixels, at most kProductVectors
  float* sums;             // rows of kSumsStride: pixels, and behind them a lone one
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
