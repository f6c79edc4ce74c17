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

// The kernels of a unit that is cut into strips, of dtypes that tensor cores multiply.
struct StripKernels {
  const void* channels_last;
  const void* contiguous;
  const void* pack;
};
StripKernels strip_kernels_float16();
StripKernels strip_kernels_bfloat16();
StripKernels strip_kernels_tfloat32();

// Returns a device's properties, which are asked for once. Makes no context there. Throws std::runtime_error where CUDA
// fails.
const Device& device_properties(int index);

// Return the CUDA version of the library's runtime, 13000 for 13.0, and the newest one that the driver supports, 0
// where there is no driver. Initialise nothing.
int runtime_version();
int driver_version();

// Returns why kernels cannot run on a device and what to do about it, or an empty string where they can. Makes no
// context there.
std::string device_error(int index);

// Makes a device the current one of the library's CUDA runtime in this thread while it lives. torch's own guard does so
// for torch's runtime: one stands in the scope of the other. Throws std::runtime_error where CUDA refuses.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index);
  CurrentDevice(const CurrentDevice&) = delete;
  ~CurrentDevice();

 private:
  int index_, previous_ = 0;
};

// Launches the unit on the current device in `stream` (a cudaStream_t). Throws std::runtime_error where CUDA refuses.
void launch(const KernelArguments& arguments, Dtype dtype, Layout layout, int64_t shared_bytes, void* stream);

// Launch, in the same way, what packs the weights of a unit that is planned to run by strips, and the unit itself.
void launch_pack(const PackArguments& arguments, const StripPlan& plan, Dtype dtype, void* stream);
void launch_strips(const StripArguments& arguments, const StripPlan& plan, Dtype dtype, void* stream);

}  // namespace shufflenet::cuda
