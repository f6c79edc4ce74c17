// card.h and csrc/cuda/kernels.h for a rehearsal: an H100 whose kernels, of float16 and float32, run on the CPU by
// tests/cuda/host_device.h.
#define SHUFFLENET_TEST_DEVICE "host_matrices.h"

#include "card.h"

#include <chrono>
#include <stdexcept>

#include "kernels.h"
#include "pack_kernel.cuh"
#include "strip_kernel.cuh"
#include "unit_kernel.cuh"

// AddressSanitizer, which wants to know of fibers, is not linked.
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
}

namespace shufflenet::cuda {

const Device& device_properties(int) {
  static const Device device = device_of(90);
  return device;
}

namespace {
template <class T>
void launch_of(const KernelArguments& arguments, Layout layout, int64_t shared_bytes) {
  Machine machine(kThreads, shared_bytes, 0);
  machine.launch(arguments.tiling.windows(arguments.sizes), [&] {
    if (layout == Layout::channels_last) {
      UnitBlock<T, Layout::channels_last>(arguments).run();
    } else {
      UnitBlock<T, Layout::contiguous>(arguments).run();
    }
  });
}
}  // namespace

void launch(const KernelArguments& arguments, Dtype dtype, Layout layout, int64_t shared_bytes, void*) {
  if (dtype == Dtype::float16) return launch_of<Float16>(arguments, layout, shared_bytes);
  if (dtype == Dtype::float32) return launch_of<float>(arguments, layout, shared_bytes);
  throw std::runtime_error("dtype: a rehearsal has kernels of float16 and float32 only");
}

void launch_strips(const PackArguments& pack, const StripArguments& arguments, const StripPlan& plan, Dtype dtype,
                   void*) {
  if (dtype != Dtype::float16) throw std::runtime_error("dtype: a rehearsal has kernels of float16 and float32 only");
  Machine packer(kPackThreads, pack_shared_bytes(pack.sizes, pack.layout), 0);
  packer.launch(2, [&] { Packer<Float16>(pack).run(); });
  Machine machine(32 * plan.tiling.warps, plan.shared_bytes, 0);
  machine.launch(plan.blocks, [&] {
    if (pack.layout.by_planes) {
      StripBlock<Float16, Layout::contiguous>(arguments).run();
    } else {
      StripBlock<Float16, Layout::channels_last>(arguments).run();
    }
  });
}

namespace card {

Memory::Memory(int64_t bytes) : bytes(bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, static_cast<size_t>(bytes))) throw std::runtime_error("no memory");
  data = static_cast<char*>(memory);
}
Memory::~Memory() { std::free(data); }
void Memory::fill(int byte) { std::memset(data, byte, static_cast<size_t>(bytes)); }
void Memory::write(int64_t at, const void* from, int64_t count) {
  std::memcpy(data + at, from, static_cast<size_t>(count));
}
std::vector<char> Memory::read() const { return {data, data + bytes}; }

int64_t l2_bytes() { return 0; }

int64_t least_launches() { return 2; }

void copy(void* to, const void* from, int64_t bytes, void*) { std::memcpy(to, from, static_cast<size_t>(bytes)); }

void run(const Work& work) { work(nullptr); }

std::vector<double> time(const Work& work, int) {
  const auto begin = std::chrono::steady_clock::now();
  work(nullptr);
  return {std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count()};
}

}  // namespace card
}  // namespace shufflenet::cuda
