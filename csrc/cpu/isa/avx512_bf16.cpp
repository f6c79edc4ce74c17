#if defined(__x86_64__)
#include "target.h"

#include "avx512_with_pairs.h"

#define SHUFFLENET_ISA avx512_bf16
SHUFFLENET_TARGET_BEGIN(SHUFFLENET_AVX512_BF16)
#include "avx512.h"
#include "pairs_avx512.h"
#include "dot_avx512_bf16.h"
#include "../kernels/pair_kernels.h"
SHUFFLENET_TARGET_END

namespace shufflenet::cpu {
namespace {

class Avx512Bf16 final : public Avx512WithPairs {
  const char* name() const override { return "avx512_bf16"; }
  bool is_usable() const override { return avx512_isa.is_usable() && __builtin_cpu_supports("avx512bf16"); }
  const Kernels* pair_kernels(Dtype dtype) const override { return &avx512_bf16::pair_kernels(dtype); }
  const TrainingKernel& training_of_pairs() const override { return avx512_bf16_training; }
};
constexpr Avx512Bf16 kAvx512Bf16;

}  // namespace
const Isa& avx512_bf16_isa = kAvx512Bf16;

}  // namespace shufflenet::cpu
#endif
