// Runs csrc/cuda/unit_kernel.cuh on the CPU, by its source (host_device.h) or by the PTX that nvcc made of it
// (launch_ptx.h), and compares it with a naive unit in double. Reads cases from standard input, one a line as
// `key=value` pairs, and answers each with "ok <error>" or "wrong <error> <what>", where the error is relative to the
// largest magnitude of the result and in units of the dtype's rounding; or with "failed: <why>".
#define SHUFFLENET_TEST_DEVICE "host_device.h"

#include <iostream>
#include <sstream>
#include <string>

#include "case.h"
#include "naive_unit.h"
#include "unit_kernel.cuh"
#ifdef SHUFFLENET_TEST_PTX
#include "launch_ptx.h"
#endif

namespace shufflenet::cuda {
namespace {

template <class T, Layout kLayout, class Norm>
std::string run(const Case& c, const Unit& unit, Dtype dtype, Tiling tiling) {
  Problem<T, Norm> problem(c);
  Buffer<T> result(problem.result_elements(), c.number("shift", 0));
  const ConvolutionPointers conv3 = problem.conv3 ? problem.conv3->pointers : ConvolutionPointers{};
  const auto address = [](const void* p) { return reinterpret_cast<uint64_t>(p); };
  choose_vectors(
      unit, dtype, tiling,
      {address(problem.x.data), address(problem.conv1.pointers.weight), address(conv3.weight), address(result.data)});
  const SharedLayout layout(problem.sizes, tiling, kLayout, sizeof(T), sizeof(accumulator_t<T>));
  const KernelArguments arguments = {problem.sizes,          tiling, layout,     problem.x.data, problem.conv1.pointers,
                                     problem.conv2.pointers, conv3,  result.data};
  const int64_t blocks = std::min(c.number("blocks", 1 << 20), tiling.windows(problem.sizes));
#ifdef SHUFFLENET_TEST_PTX
  const std::string name = "LayoutE" + std::to_string(static_cast<int>(kLayout));  // as the compiler mangles it
  launch_ptx(c, name, blocks, kThreads, layout.bytes, arguments, result.data);
#else
  Machine machine(kThreads, layout.bytes, c.number("seed", 0));
  machine.launch(blocks, [&] { UnitBlock<T, kLayout>(arguments).run(); });
#endif

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
  Tiling tiling = plan.tiling;
  // A case may cut the unit otherwise than the planner would.
  tiling.tile_rows = static_cast<int>(c.number("tile_rows", tiling.tile_rows));
  tiling.tile_columns = static_cast<int>(c.number("tile_columns", tiling.tile_columns));
  tiling.slices = static_cast<int>(c.number("slices", tiling.slices));
  tiling.chunk = static_cast<int>(c.number("chunk", unit.slice_channels() * tiling.slices));
  tiling.tile_depth = static_cast<int>(c.number("tile_depth", tiling.tile_depth));
  const bool last = unit.layout == Layout::channels_last;
#if defined(SHUFFLENET_TEST_DTYPE16) || defined(SHUFFLENET_TEST_PTX)
  if (type == Dtype::bfloat16) {
    return last ? run<BFloat16, Layout::channels_last, float>(c, unit, type, tiling)
                : run<BFloat16, Layout::contiguous, float>(c, unit, type, tiling);
  }
  if (type == Dtype::float16) {
    return last ? run<Float16, Layout::channels_last, Float16>(c, unit, type, tiling)
                : run<Float16, Layout::contiguous, Float16>(c, unit, type, tiling);
  }
#endif
#ifndef SHUFFLENET_TEST_DTYPE16
  if (type == Dtype::tfloat32) {
    return last ? run<TFloat32, Layout::channels_last, float>(c, unit, type, tiling)
                : run<TFloat32, Layout::contiguous, float>(c, unit, type, tiling);
  }
  if (type == Dtype::float64) {
    return last ? run<double, Layout::channels_last, double>(c, unit, type, tiling)
                : run<double, Layout::contiguous, double>(c, unit, type, tiling);
  }
  if (type == Dtype::float32) {
    return last ? run<float, Layout::channels_last, float>(c, unit, type, tiling)
                : run<float, Layout::contiguous, float>(c, unit, type, tiling);
  }
#endif
  return "failed: a dtype that this program was not compiled for";
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
