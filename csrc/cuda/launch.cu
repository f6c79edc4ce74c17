// All calls to the CUDA runtime, for device properties and launches; each is checked. The runtime is linked statically,
// so that the library does not depend on the version that torch brings.
#include <cuda_runtime.h>

#include <array>
#include <mutex>
#include <stdexcept>

#include "kernels.h"

#ifndef SHUFFLENET_EXT_CUDA_ARCHS
#define SHUFFLENET_EXT_CUDA_ARCHS "unknown"
#endif

namespace shufflenet::cuda {
namespace {

constexpr int kMaxDevices = 64;

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version / 10 % 100);
}

std::string remedy(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver: {
      int driver = 0;  // the newest CUDA version that the driver supports
      if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
        return ": there is no NVIDIA driver here; install one, or make it visible to this container";
      }
      return ": the driver is for CUDA " + version_text(driver) + " and shufflenet_ext was built with CUDA " +
             version_text(CUDART_VERSION) + "; update the driver, or rebuild shufflenet_ext with an older CUDA toolkit";
    }
    case cudaErrorNoDevice: return ": no CUDA device is visible; check CUDA_VISIBLE_DEVICES and the driver";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return ": shufflenet_ext was built for " SHUFFLENET_EXT_CUDA_ARCHS
             "; rebuild it with TORCH_CUDA_ARCH_LIST naming this card's compute capability";
    default: return "";
  }
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which would otherwise show up in somebody else's next call
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error) + remedy(error));
}

int attribute(cudaDeviceAttr name, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, index), "cudaDeviceGetAttribute");
  return value;
}

const void* kernel_for(Dtype dtype, Layout layout) {
  switch (dtype) {
    case Dtype::float64: return kernel_float64(layout);
    case Dtype::bfloat16: return kernel_bfloat16(layout);
    case Dtype::float16: return kernel_float16(layout);
    case Dtype::tfloat32: return kernel_tfloat32(layout);
    default: return kernel_float32(layout);
  }
}

// Allows the kernel this much shared memory. CUDA wants to be asked beyond 48 KB, once for each device.
void allow_shared_memory(const void* kernel, Dtype dtype, Layout layout, int64_t bytes) {
  constexpr int64_t kWithoutAsking = 48 * 1024;
  if (bytes <= kWithoutAsking) return;
  static std::mutex mutex;
  static std::array<std::array<int64_t, 2 * kDtypes>, kMaxDevices> allowed = {};
  int index = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  int64_t& known = allowed.at(index)[static_cast<int>(dtype) * 2 + static_cast<int>(layout)];
  const std::lock_guard<std::mutex> lock(mutex);
  if (bytes <= known) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "cudaFuncSetAttribute");
  known = bytes;
}

}  // namespace

const Device& device_properties(int index) {
  static std::mutex mutex;
  static std::array<Device, kMaxDevices> devices;
  const std::lock_guard<std::mutex> lock(mutex);
  Device& device = devices.at(index);
  if (device.compute_capability == 0) {
    Device found;
    found.compute_capability =
        10 * attribute(cudaDevAttrComputeCapabilityMajor, index) + attribute(cudaDevAttrComputeCapabilityMinor, index);
    found.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index);
    found.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    found.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
    found.threads_per_multiprocessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor, index);
    device = found;
  }
  return device;
}

std::string device_error(int index) {
  int previous = 0;
  try {
    check(cudaGetDevice(&previous), "CUDA");
    check(cudaSetDevice(index), "CUDA");
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel_float32(Layout::contiguous));
    check(cudaSetDevice(previous), "CUDA");
    check(error, "CUDA");
    return "";
  } catch (const std::exception& error) {
    return error.what();
  }
}

void launch(const KernelArguments& arguments, Dtype dtype, Layout layout, int64_t shared_bytes, void* stream) {
  const int64_t windows = arguments.tiling.windows(arguments.sizes);
  if (windows == 0) return;
  // A grid has at most this many blocks. Where there are more windows, each block goes on to further ones.
  constexpr int64_t kMaxGrid = 0x7fffffff;
  const dim3 grid(static_cast<unsigned>(windows < kMaxGrid ? windows : kMaxGrid));
  const void* const kernel = kernel_for(dtype, layout);
  allow_shared_memory(kernel, dtype, layout, shared_bytes);
  void* parameters[] = {const_cast<KernelArguments*>(&arguments)};
  check(cudaLaunchKernel(kernel, grid, dim3(kThreads), parameters, static_cast<size_t>(shared_bytes),
                         static_cast<cudaStream_t>(stream)),
        "launch of the unit's kernel");
}

}  // namespace shufflenet::cuda
