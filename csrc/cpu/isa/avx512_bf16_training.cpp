// Training by AVX512-BF16's dot products, in a file of its own: in one with inference's kernels GCC inlines less of
// those, and networks in bfloat16 take 5 % longer (measured with GCC 12).
#if defined(__x86_64__)
#include "target.h"

#include "avx512_with_pairs.h"

#define SHUFFLENET_ISA avx512_bf16
SHUFFLENET_TARGET_BEGIN(SHUFFLENET_AVX512_BF16)
#include "avx512.h"
#include "pairs_avx512.h"
#include "dot_avx512_bf16.h"
#include "../kernels/training_pairs.h"
SHUFFLENET_TARGET_END

namespace shufflenet::cpu {

const TrainingKernel& avx512_bf16_training = avx512_bf16::kPairTrainingKernels;

}  // namespace shufflenet::cpu
#endif
