// Runs csrc/cuda/unit_kernel.cuh, or strip_kernel.cuh for cases of `flow=strips`, on the CPU (host_device.h) and compares
// it with a naive unit in double. Reads cases from standard input, one a line as `key=value` pairs, and answers each with
// "ok <error>" or "wrong <error> <what>", where the error is relative to the largest magnitude of the result and in units
// of the dtype's rounding.
#define SHUFFLENET_TEST_DEVICE "host_matrices.h"

#include <iostream>
#include <sstream>
#include <string>

#include "case.h"
#include "naive_unit.h"
#ifdef SHUFFLENET_TEST_DTYPE16
#include "pack_kernel.cuh"
#include "strip_kernel.cuh"
#endif
#include "unit_kernel.cuh"

namespace shufflenet::cuda {
namespace {

// The pointers that a launch works on.
struct Launch {
  const void* x;
  ConvolutionPointers conv1, conv2, conv3;
  void* result;
};

// A case may cut the unit otherwise than the planner would.
template <class T, Layout kLayout>
void run_windows(const Case& c, const Unit& unit, const Plan& plan, const Launch& launch) {
  const Sizes s = sizes_of(unit);
  Tiling tiling = plan.tiling;
  tiling.tile_rows = static_cast<int>(c.number("tile_rows", tiling.tile_rows));
  tiling.tile_columns = static_cast<int>(c.number("tile_columns", tiling.tile_columns));
  tiling.slices = static_cast<int>(c.number("slices", tiling.slices));
  tiling.chunk = static_cast<int>(c.number("chunk", unit.slice_channels() * tiling.slices));
  tiling.tile_depth = static_cast<int>(c.number("tile_depth", tiling.tile_depth));
  const auto address = [](const void* p) { return reinterpret_cast<uint64_t>(p); };
  choose_vectors(
      unit, c.dtype(), tiling,
      {address(launch.x), address(launch.conv1.weight), address(launch.conv3.weight), address(launch.result)});
  const SharedLayout layout(s, tiling, kLayout, sizeof(T), sizeof(accumulator_t<T>));
  const KernelArguments arguments = {s,           tiling, layout, launch.x, launch.conv1, launch.conv2, launch.conv3,
                                     launch.result};
  Machine machine(kThreads, layout.bytes, c.number("seed", 0));
  machine.launch(std::min(c.number("blocks", 1 << 20), tiling.windows(s)), [&] { Block<T, kLayout>(arguments).run(); });
}

#ifdef SHUFFLENET_TEST_DTYPE16
template <class T>
void run_strips(const Case& c, const Unit& unit, const StripPlan& plan, const Launch& launch) {
  const Sizes s = sizes_of(unit);
  StripTiling tiling = plan.tiling;
  tiling.rows = static_cast<int>(c.number("rows", tiling.rows));
  tiling.slices = static_cast<int>(c.number("slices", tiling.slices));
  tiling.warps = static_cast<int>(c.number("warps", tiling.warps));
  tiling.gap = static_cast<int>(c.number("gap", tiling.gap));
  const StripLayout layout(s, tiling);
  Buffer<Fragment> fragments(layout.packed.part * int64_t{tiling.parts(s)});
  const PackArguments pack = {
      s, tiling.slices, layout.packed, launch.conv1, launch.conv2, launch.conv3, fragments.data};
  Machine packer(kPackThreads, pack_shared_bytes(s, layout.packed), c.number("seed", 0));
  packer.launch(c.number("blocks", 2), [&] { Packer<T>(pack).run(); });
  const StripArguments arguments = {s, tiling, layout, launch.x, fragments.data, launch.result};
  Machine machine(tiling.warps * 32, layout.bytes, c.number("seed", 0));
  machine.launch(tiling.blocks(s), [&] { StripBlock<T>(arguments).run(); });
}
#endif

template <class T, Layout kLayout, class Norm>
std::string run(const Case& c, const Unit& unit, const Plan& plan) {
  Problem<T, Norm> problem(c);
  Buffer<T> result(problem.result_elements(), c.number("shift", 0));
  const Launch launch = {
      problem.x.data, problem.conv1.pointers, problem.conv2.pointers,
      problem.conv3 ? problem.conv3->pointers : ConvolutionPointers{}, result.data};
#ifdef SHUFFLENET_TEST_DTYPE16
  if (c.text("flow", "windows") == "strips") {
    run_strips<T>(c, unit, plan.strips, launch);
  } else
#endif
    run_windows<T, kLayout>(c, unit, plan, launch);
  const Difference difference = problem.compare(result.data);
  std::ostringstream answer;
  answer << (difference.is_small() ? "ok " : "wrong ") << difference.units << " " << difference.where;
  return answer.str();
}

std::string run(const std::string& line) {
  const Case c(line);
  const Unit unit = c.unit();
  const Dtype type = c.dtype();
  const Plan plan = plan_unit(unit, type, c.device());
  if (!plan.ok) return "unplanned " + plan.explanation;
  if (c.text("flow", "windows") == "strips" && !plan.strips.ok) return "unplanned " + plan.strips.explanation;
  const bool last = unit.layout == Layout::channels_last;
#ifdef SHUFFLENET_TEST_DTYPE16
  if (type == Dtype::bfloat16) {
    return last ? run<BFloat16, Layout::channels_last, float>(c, unit, plan)
                : run<BFloat16, Layout::contiguous, float>(c, unit, plan);
  }
  return last ? run<Float16, Layout::channels_last, Float16>(c, unit, plan)
              : run<Float16, Layout::contiguous, Float16>(c, unit, plan);
#else
  if (type == Dtype::tfloat32) {
    return last ? run<TFloat32, Layout::channels_last, float>(c, unit, plan)
                : run<TFloat32, Layout::contiguous, float>(c, unit, plan);
  }
  if (type == Dtype::float64) {
    return last ? run<double, Layout::channels_last, double>(c, unit, plan)
                : run<double, Layout::contiguous, double>(c, unit, plan);
  }
  return last ? run<float, Layout::channels_last, float>(c, unit, plan)
              : run<float, Layout::contiguous, float>(c, unit, plan);
#endif
}

}  // namespace
}  // namespace shufflenet::cuda

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    std::cout << shufflenet::cuda::run(line) << std::endl;
  }
}
