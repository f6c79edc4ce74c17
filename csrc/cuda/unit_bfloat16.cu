#include "unit_instance.cuh"

namespace shufflenet::cuda {
const void* kernel_bfloat16(Layout layout) { return kernel_of<BFloat16>(layout); }
}  // namespace shufflenet::cuda
