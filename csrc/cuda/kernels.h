// The interface between the op and the kernels. Nothing here knows torch.
#pragma once

#include <string>

#include "planner.h"

namespace shufflenet::cuda {

// Each returns the kernel of its dtype, in the form that the CUDA runtime launches. They are compiled in unit_*.cu.
const void* kernel_float32(Layout layout);
const void* kernel_float64(Layout layout);
const void* kernel_bfloat16(Layout layout);
const void* kernel_float16(Layout layout);
const void* kernel_tfloat32(Layout layout);

// The kernels of a unit that is cut into strips, of 16-bit dtypes.
struct StripKernels {
  const void* strip;
  const void* pack;
};
StripKernels strip_kernels_float16();
StripKernels strip_kernels_bfloat16();

// Returns a device's properties, which are asked for once. Throws std::runtime_error where CUDA fails.
const Device& device_properties(int index);

// Returns why kernels cannot run on a device and what to do about it, or an empty string where they can.
std::string device_error(int index);

// Launches the unit on the current device in `stream` (a cudaStream_t). Throws std::runtime_error where CUDA refuses.
void launch(const KernelArguments& arguments, Dtype dtype, Layout layout, int64_t shared_bytes, void* stream);

}  // namespace shufflenet::cuda
