// The interface between the op and the kernels. Nothing here knows torch.
#pragma once

#include <string>

#include "planner.h"

namespace shufflenet::cuda {

// The kernel for a dtype, as the CUDA runtime names it; compiled in unit_*.cu.
const void* kernel_float32(Layout layout);
const void* kernel_float64(Layout layout);
const void* kernel_bfloat16(Layout layout);
const void* kernel_float16(Layout layout);
const void* kernel_tfloat32(Layout layout);

// The device's properties, asked for once. std::runtime_error where CUDA fails.
const Device& device_properties(int index);

// Why kernels cannot run on the device, and what to do about it; empty where they can.
std::string device_error(int index);

// Runs the unit on the current device, in `stream` (a cudaStream_t). std::runtime_error where CUDA refuses.
void launch(const KernelArguments& arguments, Dtype dtype, Layout layout, int64_t shared_bytes, void* stream);

}  // namespace shufflenet::cuda
