// Runs csrc/cuda/pack_kernel.cuh and strip_kernel.cuh on the CPU, by their source (host_matrices.h) or their PTX
// (launch_ptx.h), and compares the result with a naive unit in double. Reads cases and answers them as unit_test.cpp
// does.
#define SHUFFLENET_TEST_DEVICE "host_matrices.h"

#include <iostream>
#include <sstream>
#include <string>

#include "case.h"
#include "naive_unit.h"
#include "pack_kernel.cuh"
#include "strip_kernel.cuh"
#ifdef SHUFFLENET_TEST_PTX
#include "launch_ptx.h"
#endif

namespace shufflenet::cuda {
namespace {

template <class T, class Norm, Layout kLayout>
std::string run(const Case& c, const Sizes& s, StripTiling tiling) {
  // A case may cut the unit otherwise than the planner would.
  tiling.rows = static_cast<int>(c.number("rows", tiling.rows));
  tiling.slices = static_cast<int>(c.number("slices", tiling.slices));
  tiling.warps = static_cast<int>(c.number("warps", tiling.warps));
  tiling.gap = static_cast<int>(c.number("gap", tiling.gap));
  const StripLayout layout(s, tiling, kLayout, sizeof(T));
  Problem<T, Norm> problem(c);
  Buffer<T> result(problem.result_elements());
  Buffer<Fragment> fragments(layout.packed.fragments(s, tiling.slices));
  const PackArguments pack = {
      s,
      tiling.slices,
      layout.packed,
      problem.conv1.pointers,
      problem.conv2.pointers,
      problem.conv3->pointers,
      fragments.data};
  const StripArguments arguments(s, tiling, layout, problem.x.data, fragments.data, result.data);
#ifdef SHUFFLENET_TEST_PTX
  launch_ptx(
      c, "pack_kernel", 2, kPackThreads, pack_shared_bytes(s, tiling.slices, layout.packed), pack, fragments.data);
  const std::string kernel = kLayout == Layout::channels_last ? "LayoutE1" : "LayoutE0";
  launch_ptx(c, kernel, tiling.blocks(s), tiling.warps * 32, layout.bytes, arguments, result.data);
#else
  Machine packer(kPackThreads, pack_shared_bytes(s, tiling.slices, layout.packed), c.number("seed", 0));
  packer.launch(2, [&] { Packer<T>(pack).run(); });
  Machine machine(tiling.warps * 32, layout.bytes, c.number("seed", 0));
  machine.launch(tiling.blocks(s), [&] { StripBlock<T, kLayout>(arguments).run(); });
#endif
  const Difference difference = problem.compare(result.data);
  std::ostringstream answer;
  answer << (difference.is_small() ? "ok " : "wrong ") << difference.units << " " << difference.where;
  return answer.str();
}

template <Layout kLayout>
std::string run(const Case& c, const Sizes& s, const StripTiling& tiling) {
  if (c.dtype() == Dtype::tfloat32) return run<TFloat32, TFloat32, kLayout>(c, s, tiling);
  if (c.dtype() == Dtype::bfloat16) return run<BFloat16, float, kLayout>(c, s, tiling);
  return run<Float16, Float16, kLayout>(c, s, tiling);
}

std::string run(const std::string& line) {
  const Case c(line);
  const StripPlan plan = plan_strips(c.unit(), c.dtype(), c.device());
  if (!plan.ok) return "unplanned " + plan.explanation;
  const Sizes s = sizes_of(c.unit());
#ifdef SHUFFLENET_TEST_LAYOUT  // one kernel compiles in a fraction of the time
  using T = SHUFFLENET_TEST_TYPE;
  const Dtype dtype = kIsWide<T> ? Dtype::tfloat32 : Dtype::float16;
  if (c.dtype() != dtype || c.unit().layout != Layout::SHUFFLENET_TEST_LAYOUT) return "not compiled";
  return run<T, T, Layout::SHUFFLENET_TEST_LAYOUT>(c, s, plan.tiling);
#else
  if (c.unit().layout == Layout::channels_last) return run<Layout::channels_last>(c, s, plan.tiling);
  return run<Layout::contiguous>(c, s, plan.tiling);
#endif
}

}  // namespace
}  // namespace shufflenet::cuda

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    try {
      std::cout << shufflenet::cuda::run(line) << std::endl;
    } catch (const std::exception& error) {
      std::cout << "failed: " << error.what() << std::endl;
    }
  }
}
