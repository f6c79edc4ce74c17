// Pairs of bfloat16 by AVX512-BF16. Included inside a region compiled for an ISA that has it.
#pragma once

namespace shufflenet::cpu::SHUFFLENET_ISA {

struct PairIntrinsics {
  // Rounds two vectors of float, and interleaves them.
  static __m512 pack(__m512 first, __m512 second) {
    const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));  // all of `first`, then
    alignas(64) static constexpr uint16_t kInterleaved[32] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return reinterpret_cast<__m512>(_mm512_permutexvar_epi16(_mm512_load_si512(kInterleaved), halves));
  }
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
