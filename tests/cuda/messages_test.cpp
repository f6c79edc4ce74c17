// csrc/cuda/launch.cu on a CUDA runtime of the test's own, whose driver is of a version, and where asking for a
// kernel's attributes ends with an error: `messages_test ERROR DRIVER_VERSION` prints what launch.cu says about device
// 0.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

namespace {
cudaError_t error;
std::string name;
int driver;
}  // namespace

extern "C" {
cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return error; }
const char* cudaGetErrorString(cudaError_t) {
  static const std::string text = "(" + name + ")";
  return text.c_str();
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaErrorUnknown; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaErrorUnknown; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorUnknown; }
}

#include "launch.cu"

namespace shufflenet::cuda {
const void* kernel_float32(Layout) { return nullptr; }
const void* kernel_float64(Layout) { return nullptr; }
const void* kernel_bfloat16(Layout) { return nullptr; }
const void* kernel_float16(Layout) { return nullptr; }
const void* kernel_tfloat32(Layout) { return nullptr; }
}  // namespace shufflenet::cuda

int main(int, char** arguments) {
  const std::map<std::string, cudaError_t> errors = {
      {"cudaSuccess", cudaSuccess},
      {"cudaErrorInsufficientDriver", cudaErrorInsufficientDriver},
      {"cudaErrorNoDevice", cudaErrorNoDevice},
      {"cudaErrorNoKernelImageForDevice", cudaErrorNoKernelImageForDevice},
      {"cudaErrorInvalidDeviceFunction", cudaErrorInvalidDeviceFunction},
      {"cudaErrorUnknown", cudaErrorUnknown}};
  name = arguments[1];
  error = errors.at(name);
  driver = std::atoi(arguments[2]);
  std::printf("%s\n", shufflenet::cuda::device_error(0).c_str());
}
