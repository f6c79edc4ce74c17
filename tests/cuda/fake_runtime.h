// A CUDA runtime of the tests' own, for csrc/cuda/launch.cu: two cards that run nothing. It notes each call with the
// device that is current in the calling thread, knows which devices have a context, and refuses what the real one does.
#pragma once

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace fake {

inline std::vector<std::string> calls;
inline std::set<int> contexts;                              // the devices that have one
inline std::set<std::pair<int, const void*>> loaded;        // kernels, by device
inline std::map<std::pair<int, const void*>, int> allowed;  // bytes of dynamic shared memory beyond 48 KB
inline std::map<std::string, cudaError_t> failing;          // functions, and what they answer
inline bool is_capturing = false;                           // some stream into a graph, so that loading is forbidden
inline int driver = 13000;
inline int compute_capability = 90;
inline thread_local int device = 0;
inline thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;

inline cudaError_t note(const std::string& function, const std::string& what = "") {
  calls.push_back(std::to_string(device) + ": " + function + (what.empty() ? "" : " " + what));
  const auto found = failing.find(function);
  return found == failing.end() ? cudaSuccess : found->second;
}

// Loads a kernel on the current device, as everything does that needs it there.
inline cudaError_t load(const void* kernel) {
  contexts.insert(device);
  if (loaded.count({device, kernel})) return cudaSuccess;
  if (is_capturing && mode != cudaStreamCaptureModeRelaxed) return cudaErrorStreamCaptureUnsupported;
  loaded.insert({device, kernel});
  return cudaSuccess;
}

inline CUresult CUDAAPI get_state(CUdevice index, unsigned* flags, int* is_active) {
  *flags = 0;
  *is_active = static_cast<int>(contexts.count(index));
  return CUDA_SUCCESS;
}

}  // namespace fake

extern "C" {
cudaError_t cudaDriverGetVersion(int* version) {
  *version = fake::driver;
  return fake::note("cudaDriverGetVersion");
}
cudaError_t cudaGetDevice(int* index) {
  *index = fake::device;
  return fake::note("cudaGetDevice");
}
cudaError_t cudaSetDevice(int index) {
  const cudaError_t error = fake::note("cudaSetDevice", std::to_string(index));
  if (error != cudaSuccess) return error;
  fake::device = index;
  fake::contexts.insert(index);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int index) {
  const std::map<cudaDeviceAttr, int> values = {
      {cudaDevAttrComputeCapabilityMajor, fake::compute_capability / 10},
      {cudaDevAttrComputeCapabilityMinor, fake::compute_capability % 10},
      {cudaDevAttrMultiProcessorCount, 132},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, 227 * 1024},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 * 1024},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048}};
  *value = values.at(name);
  return fake::note("cudaDeviceGetAttribute", "of " + std::to_string(index));
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  *attributes = {};
  const cudaError_t error = fake::note("cudaFuncGetAttributes");
  return error == cudaSuccess ? fake::load(kernel) : error;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute name, int value) {
  const bool is_carveout = name == cudaFuncAttributePreferredSharedMemoryCarveout;
  const cudaError_t error =
      fake::note("cudaFuncSetAttribute", (is_carveout ? "carveout " : "bytes ") + std::to_string(value));
  if (error != cudaSuccess) return error;
  if (!is_carveout) fake::allowed[{fake::device, kernel}] = value;
  return fake::load(kernel);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, fake::mode);
  return fake::note("cudaThreadExchangeStreamCaptureMode");
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult*) {
  const cudaError_t error = fake::note("cudaGetDriverEntryPointByVersion", symbol);
  if (error == cudaSuccess) *function = reinterpret_cast<void*>(&fake::get_state);
  return error;
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t bytes, cudaStream_t) {
  const cudaError_t error = fake::note("cudaLaunchKernel");
  if (error != cudaSuccess) return error;
  const auto found = fake::allowed.find({fake::device, kernel});
  const size_t most = found == fake::allowed.end() ? 48 * 1024 : static_cast<size_t>(found->second);
  return bytes > most ? cudaErrorInvalidValue : fake::load(kernel);
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaErrorUnknown ? "(unknown)" : "(error)"; }
}
