// card.h and csrc/cuda/kernels.h for a rehearsal: an H100 whose kernels, of float16 and float32, run on the CPU by
// tests/cuda/host_launch.h.
#include "card.h"

#include <chrono>
#include <stdexcept>

#include "host_launch.h"
#include "kernels.h"

namespace shufflenet::cuda {

const Device& device_properties(int) {
  static const Device device = device_of(90);
  return device;
}

void launch(const KernelArguments& arguments, Dtype dtype, Layout layout, int64_t shared_bytes, void*) {
  if (dtype == Dtype::float16) return launch_on_host<Float16>(arguments, layout, shared_bytes);
  if (dtype == Dtype::float32) return launch_on_host<float>(arguments, layout, shared_bytes);
  throw std::runtime_error("dtype: a rehearsal has kernels of float16 and float32 only");
}
void launch_pack(const PackArguments& arguments, const StripPlan&, Dtype dtype, void*) {
  if (dtype != Dtype::float16) throw std::runtime_error("dtype: a rehearsal has kernels of float16 and float32 only");
  launch_pack_on_host<Float16>(arguments);
}
void launch_strips(const StripArguments& arguments, const StripPlan& plan, Dtype, void*) {
  launch_strips_on_host<Float16>(arguments, plan);
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
