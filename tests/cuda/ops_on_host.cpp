// csrc/cuda/ops.cpp on tensors of the CPU: its ops are registered for the CPU in a library of their own, and kernels
// run as planned for a card that the environment variable TEST_SM names. It is a Python module like _C_cuda, and says
// how often kernels were launched.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cstdlib>

#include "host_launch.h"
#include "kernels.h"

namespace torch::stable::accelerator {

class NoGuard {
 public:
  explicit NoGuard(int32_t) {}
};

}  // namespace torch::stable::accelerator

namespace shufflenet::cuda {
namespace {

enum Kernel { unit_kernel, pack_kernel, strip_kernel };
int launches[3] = {};

}  // namespace

// ---- In the place of launch.cu --------------------------------------------------------------------------------------

const Device& device_properties(int) {
  static const Device device = device_of(std::atoi(std::getenv("TEST_SM")));
  return device;
}
int runtime_version() { return 0; }
int driver_version() { return 0; }
std::string device_error(int) { return ""; }
CurrentDevice::CurrentDevice(int index) : index_(index) {}
CurrentDevice::~CurrentDevice() = default;

void launch(const KernelArguments& arguments, Dtype dtype, Layout layout, int64_t shared_bytes, void*) {
  ++launches[unit_kernel];
  switch (dtype) {
    case Dtype::float64: return launch_on_host<double>(arguments, layout, shared_bytes);
    case Dtype::bfloat16: return launch_on_host<BFloat16>(arguments, layout, shared_bytes);
    case Dtype::float16: return launch_on_host<Float16>(arguments, layout, shared_bytes);
    case Dtype::tfloat32: return launch_on_host<TFloat32>(arguments, layout, shared_bytes);
    default: return launch_on_host<float>(arguments, layout, shared_bytes);
  }
}
void launch_pack(const PackArguments& arguments, const StripPlan&, Dtype dtype, void*) {
  ++launches[pack_kernel];
  if (dtype == Dtype::bfloat16) return launch_pack_on_host<BFloat16>(arguments);
  if (dtype == Dtype::tfloat32) return launch_pack_on_host<TFloat32>(arguments);
  launch_pack_on_host<Float16>(arguments);
}
void launch_strips(const StripArguments& arguments, const StripPlan& plan, Dtype dtype, void*) {
  ++launches[strip_kernel];
  if (dtype == Dtype::bfloat16) return launch_strips_on_host<BFloat16>(arguments, plan);
  if (dtype == Dtype::tfloat32) return launch_strips_on_host<TFloat32>(arguments, plan);
  launch_strips_on_host<Float16>(arguments, plan);
}

}  // namespace shufflenet::cuda

extern "C" __attribute__((visibility("default"))) int launches_of(int kernel) {
  return shufflenet::cuda::launches[kernel];
}

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

#define SHUFFLENET_EXT_CUDA_ARCHS ""
#define DeviceGuard NoGuard
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, device, m) _STABLE_TORCH_LIBRARY_IMPL(shufflenet_ext_cuda, CPU, m, C10_UID)
#include "ops.cpp"
