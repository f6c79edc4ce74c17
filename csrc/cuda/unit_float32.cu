#include "unit_instance.cuh"

namespace shufflenet::cuda {
const void* kernel_float32(Layout layout) { return kernel_of<float>(layout); }
}  // namespace shufflenet::cuda
