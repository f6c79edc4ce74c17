#include "strip_instance.cuh"

namespace shufflenet::cuda {
StripKernels strip_kernels_bfloat16() { return strip_kernels_of<BFloat16>(); }
}  // namespace shufflenet::cuda
