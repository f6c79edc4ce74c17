// Training by AMX's dot products, in a file of its own: in one with inference's kernels GCC inlines less of those, and
// networks in bfloat16 take 5 % longer (measured with GCC 12).
#if defined(__x86_64__)
#include "target.h"

#include "avx512_with_pairs.h"

#define SHUFFLENET_ISA amx
SHUFFLENET_TARGET_BEGIN(SHUFFLENET_AMX)
#include "avx512.h"
#include "pairs_avx512.h"
#include "dot_amx.h"
#include "../kernels/training_pairs.h"
SHUFFLENET_TARGET_END

namespace shufflenet::cpu {

const TrainingKernel& amx_training = amx::kPairTrainingKernels;

}  // namespace shufflenet::cpu
#endif
