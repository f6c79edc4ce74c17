#include "unit_instance.cuh"

namespace shufflenet::cuda {
const void* kernel_float64(Layout layout) { return kernel_of<double>(layout); }
}  // namespace shufflenet::cuda
