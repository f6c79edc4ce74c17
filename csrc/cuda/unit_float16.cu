#include "unit_instance.cuh"

namespace shufflenet::cuda {
const void* kernel_float16(Layout layout) { return kernel_of<Float16>(layout); }
}  // namespace shufflenet::cuda
