#include "strip_instance.cuh"

namespace shufflenet::cuda {
StripKernels strip_kernels_tfloat32() { return strip_kernels_of<TFloat32>(); }
}  // namespace shufflenet::cuda
