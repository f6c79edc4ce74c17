// Pairs without instructions for them: a dot product, added to a sum, is a multiply-add of each of their parts.
namespace shufflenet::cpu::SHUFFLENET_ISA {

struct Pairs : PairVectors {
  static V pack(V first, V second) {
    return reinterpret_cast<V>(Stored<BFloat16>::narrow(first) | Stored<BFloat16>::narrow(second) << 16);
  }

  static constexpr int kParts = 2;
  static V part(V pairs, int i) { return i == 0 ? first(pairs) : second(pairs); }
  static V multiply_add(V a, V b, V sum) { return S::fma(a, b, sum); }
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
