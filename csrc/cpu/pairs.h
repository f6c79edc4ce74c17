// Pairs: the bfloat16 values of two neighbouring channels at a pixel, the first in the lower half of 32 bits, as dot
// products of bfloat16 take them. Their arithmetic is in pairs_emulated.h, or in an ISA's own file.
namespace shufflenet::cpu::SHUFFLENET_ISA {

struct Pair {
  uint16_t first, second;
};

struct PairVectors {
  using S = Simd<float>;
  using V = S::V;  // of bits, where it holds pairs
  using Word = Stored<BFloat16>::Word;

  static V load(const Pair* p) { return S::load(reinterpret_cast<const float*>(p)); }
  static void store(Pair* p, V pairs, S::Mask m) { S::store(reinterpret_cast<float*>(p), pairs, m); }
  static V broadcast(const BFloat16* p) {
    uint32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return reinterpret_cast<V>(bits - Word{});
  }

  static V first(V pairs) { return reinterpret_cast<V>(reinterpret_cast<Word>(pairs) << 16); }
  static V second(V pairs) { return reinterpret_cast<V>(reinterpret_cast<Word>(pairs) & 0xffff0000); }
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
