#include "unit_instance.cuh"

namespace shufflenet::cuda {
const void* kernel_tfloat32(Layout layout) { return kernel_of<TFloat32>(layout); }
}  // namespace shufflenet::cuda
