// All calls to the CUDA runtime, for device properties and launches; each is checked. The runtime is linked statically,
// so that the library does not depend on the version that torch brings. So it has state of its own: which device is
// current in a thread, and which kernels are loaded.
//
// What the calls leave behind matters to the rest of the process. A context takes some hundred megabytes of a card's
// memory, and a process whose driver is initialised cannot use CUDA in its forked children:
//
//   cudaDriverGetVersion                             initialises nothing
//   cudaDeviceGetAttribute, cudaGetDevice,
//   cudaGetDriverEntryPointByVersion                 initialise the driver, make no context
//   cudaSetDevice (from CUDA 12 on), cudaFunc...,
//   cudaThreadExchangeStreamCaptureMode, a launch    make a context on the device that they are about
//
// The last ones are called for the device of a call's tensors alone, where torch has made the context already.
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>

#include "kernels.h"

#ifndef SHUFFLENET_EXT_CUDA_ARCHS
#define SHUFFLENET_EXT_CUDA_ARCHS "unknown"
#endif

namespace shufflenet::cuda {
namespace {

constexpr int kMaxDevices = 64;

constexpr char kOtherArchitectures[] =
    ": shufflenet_ext was built for " SHUFFLENET_EXT_CUDA_ARCHS
    "; rebuild it with TORCH_CUDA_ARCH_LIST naming this card's compute capability";

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
    case cudaErrorUnsupportedPtxVersion: return kOtherArchitectures;
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

// Whether one of these architectures, such as "8.0;9.0a;12.0+PTX", runs on a card. Machine code does on cards of the
// same major version and at least the minor one, PTX on all newer cards; with an "a" both do on that very card alone.
// An entry without a version, as torch takes names as well, may be anything.
bool run_on(const char* architectures, int compute_capability) {
  std::istringstream entries(architectures);
  for (std::string entry; std::getline(entries, entry, ';');) {
    int major = 0, minor = 0;
    char suffix[8] = "";
    if (std::sscanf(entry.c_str(), "%d.%d%7s", &major, &minor, suffix) < 2) return true;
    const int architecture = 10 * major + minor;
    if (architecture == compute_capability) return true;
    const bool is_ptx = entry.find("+PTX") != std::string::npos;
    if (suffix[0] != 'a' && architecture < compute_capability && (is_ptx || major == compute_capability / 10)) {
      return true;
    }
  }
  return false;
}

// Whether a device has a context. Asking makes none. Only the driver can say, which is not linked: the library loads
// where there is none.
bool has_context(int index) {
  static const auto get_state = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &function, 7000, cudaEnableDefault, &result)) {
      cudaGetLastError();
    }
    return reinterpret_cast<PFN_cuDevicePrimaryCtxGetState_v7000>(function);
  }();
  unsigned flags = 0;
  int is_active = 0;
  return get_state != nullptr && get_state(index, &flags, &is_active) == CUDA_SUCCESS && is_active;
}

// Lets this thread, while it lives, do what is forbidden elsewhere while a stream is captured into a CUDA graph.
class RelaxedCapture {
 public:
  RelaxedCapture() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode"); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then the mode before
};

// Returns the percentage of a multiprocessor's shared memory that holds the blocks which the planner counts on. The
// rest of it caches what is read from memory. Left alone, CUDA may keep less than these blocks need.
int carveout_of(int64_t shared_bytes, int64_t blocks, const Device& device) {
  const int64_t used = blocks * (shared_bytes + kReservedPerBlock);
  const int64_t whole = device.shared_per_multiprocessor;
  return static_cast<int>(std::min<int64_t>(100, (100 * used + whole - 1) / whole));
}

// Makes a kernel ready for a launch with this much shared memory, and so many blocks on a multiprocessor, on the
// current device. The first time on a device it is loaded, which CUDA would otherwise put off until the launch
// (CUDA_MODULE_LOADING), where it can fail inside of a graph's capture; and it is allowed all the shared memory that a
// block can have, which beyond 48 KB has to be asked for.
template <class Blocks>
void prepare(const void* kernel, int64_t shared_bytes, const Blocks& blocks_on) {
  static std::mutex mutex;
  // The percentage that each kernel was given last on a device; none where it is not loaded.
  static std::array<std::map<const void*, int>, kMaxDevices> carveouts;
  int index = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  const Device& device = device_properties(index);
  const int carveout = carveout_of(shared_bytes, blocks_on(device), device);
  const std::lock_guard<std::mutex> lock(mutex);
  int& given = carveouts.at(index)[kernel];
  if (given == carveout) return;
  const RelaxedCapture relaxed;
  if (given == 0) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), "loading the unit's kernel");
    const auto most = static_cast<int>(device.shared_per_block - static_cast<int64_t>(attributes.sharedSizeBytes));
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "cudaFuncSetAttribute");
  }
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, carveout), "cudaFuncSetAttribute");
  given = carveout;
}

StripKernels strip_kernels_for(Dtype dtype) {
  if (dtype == Dtype::tfloat32) return strip_kernels_tfloat32();
  return dtype == Dtype::float16 ? strip_kernels_float16() : strip_kernels_bfloat16();
}

struct Grid {
  int64_t blocks;
  int threads;           // of a block
  int64_t shared_bytes;  // of a block
};

// Launches a kernel that is prepared.
void launch_prepared(const void* kernel, const void* arguments, const Grid& grid, void* stream) {
  void* parameters[] = {const_cast<void*>(arguments)};
  check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(grid.blocks)), dim3(grid.threads), parameters,
                         static_cast<size_t>(grid.shared_bytes), static_cast<cudaStream_t>(stream)),
        "launch of the unit's kernel");
}

// Launches a kernel of a unit by strips. All of them have the carveout of the strips, so that a multiprocessor need not
// change it between them.
void launch_planned(const void* kernel, const void* arguments, const StripPlan& plan, const Grid& grid, void* stream) {
  if (grid.blocks == 0) return;
  prepare(kernel, plan.shared_bytes, [&](const Device&) { return plan.blocks_per_multiprocessor; });
  launch_prepared(kernel, arguments, grid, stream);
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

int runtime_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version;
}

std::string device_error(int index) {
  try {
    const int found = device_properties(index).compute_capability;
    if (run_on(SHUFFLENET_EXT_CUDA_ARCHS, found)) return "";
    return "a card of compute capability " + std::to_string(found / 10) + "." + std::to_string(found % 10) +
           kOtherArchitectures;
  } catch (const std::exception& error) {
    return error.what();
  }
}

CurrentDevice::CurrentDevice(int index) : index_(index) {
  check(cudaGetDevice(&previous_), "cudaGetDevice");
  if (previous_ != index) check(cudaSetDevice(index), "cudaSetDevice");
}

CurrentDevice::~CurrentDevice() {
  // A device without a context was current by default alone. To make it so again would make one.
  if (previous_ != index_ && has_context(previous_)) cudaSetDevice(previous_);
}

void launch(const KernelArguments& arguments, Dtype dtype, Layout layout, int64_t shared_bytes, void* stream) {
  const int64_t windows = arguments.tiling.windows(arguments.sizes);
  if (windows == 0) return;
  // A grid has at most this many blocks. Where there are more windows, each block goes on to further ones.
  constexpr int64_t kMaxGrid = 0x7fffffff;
  const void* const kernel = kernel_for(dtype, layout);
  const auto blocks = [&](const Device& device) {
    return blocks_per_multiprocessor(shared_bytes, accumulator_bytes(dtype), device);
  };
  prepare(kernel, shared_bytes, blocks);
  launch_prepared(kernel, &arguments, {std::min(windows, kMaxGrid), kThreads, shared_bytes}, stream);
}

void launch_pack(const PackArguments& arguments, const StripPlan& plan, Dtype dtype, void* stream) {
  constexpr int64_t kMostBlocks = 512;
  const int64_t fragments = arguments.layout.fragments(arguments.sizes, arguments.slices);
  const int64_t blocks = std::min(kMostBlocks, shufflenet::ceil_div(fragments, int64_t{kPackThreads}));
  launch_planned(
      strip_kernels_for(dtype).pack, &arguments, plan,
      {blocks, kPackThreads, pack_shared_bytes(arguments.sizes, arguments.slices, arguments.layout)}, stream);
}

void launch_strips(const StripArguments& arguments, const StripPlan& plan, Dtype dtype, void* stream) {
  const StripKernels kernels = strip_kernels_for(dtype);
  launch_planned(arguments.layout.packed.by_planes ? kernels.contiguous : kernels.channels_last, &arguments, plan,
                 {plan.blocks, 32 * plan.tiling.warps, plan.shared_bytes}, stream);
}

}  // namespace shufflenet::cuda
