#include "strip_instance.cuh"

namespace shufflenet::cuda {
StripKernels strip_kernels_float16() { return strip_kernels_of<Float16>(); }
}  // namespace shufflenet::cuda
