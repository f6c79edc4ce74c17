// Pairs with AVX512-BF16, whose dot products add both products to a float.
namespace shufflenet::cpu::SHUFFLENET_ISA {

struct Pairs : PairVectors {
  static V pack(V first, V second) {
    const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));  // all of `first`, then
    alignas(64) static constexpr uint16_t kInterleaved[32] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return reinterpret_cast<V>(_mm512_permutexvar_epi16(_mm512_load_si512(kInterleaved), halves));
  }

  static constexpr int kParts = 1;
  static V part(V pairs, int) { return pairs; }
  static V multiply_add(V a, V b, V sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
