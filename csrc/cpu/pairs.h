// Pairs: the bfloat16 values of two neighbouring channels at a pixel, the first in the lower half of 32 bits, as the
// dot products of AVX512-BF16 and AMX take them.
#pragma once

#include "simd.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

struct Pair {
  uint16_t first, second;
};

struct Pairs {
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
  static V pack(V first, V second) {
    const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));  // all of `first`, then
    alignas(64) static constexpr uint16_t kInterleaved[32] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return reinterpret_cast<V>(_mm512_permutexvar_epi16(_mm512_load_si512(kInterleaved), halves));
  }
};

// Rows of a product of weights with pairs: each sums over the depth.
struct PairProduct {
  const BFloat16* weight;  // rows of 2 * pairs
  int64_t rows;            // at most kProductRows
  int64_t pairs;           // of the depth
  const Pair* x;           // whole vectors of it are read
  int64_t x_plane;         // from pair to pair of the depth
  int64_t vectors;         // of pixels, at most kProductVectors
  float* sums;             // rows of kProductPixels
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
