// A unit's training step as ops; _training_op.py makes one of them.
#include "unit.h"

#include <torch/csrc/stable/library.h>

namespace shufflenet::cpu {
namespace {

// The ops' options about a unit's geometry.
UnitArguments geometry(int64_t conv1_groups, int64_t groups, int64_t stride, bool conv2_relu,
                       bool pool_count_include_pad, int64_t shuffle_groups, bool shortcut_first, bool shortcut_relu) {
  UnitArguments arguments = {};
  arguments.conv1_groups = conv1_groups;
  arguments.groups = groups;
  arguments.stride = stride;
  arguments.conv2_relu = conv2_relu;
  arguments.pool_count_include_pad = pool_count_include_pad;
  arguments.shuffle_groups = shuffle_groups;
  arguments.shortcut_first = shortcut_first;
  arguments.shortcut_relu = shortcut_relu;
  return arguments;
}

TrainedUnit checked(const Tensor& x, const std::vector<std::optional<Tensor>>& tensors, const std::vector<double>& eps,
                    const std::vector<bool>& of_batch, UnitArguments arguments, const std::string& processes) {
  if (!x.is_cpu()) fail("x: got a tensor on another device, expected one on the CPU");
  if (tensors.size() != 3 * kTensors) fail("tensors: got ", tensors.size(), ", expected ", 3 * kTensors);
  if (eps.size() != 3) fail("eps: got ", eps.size(), " numbers, expected 3");
  if (of_batch.size() != 3) fail("of_batch: got ", of_batch.size(), " values, expected 3");
  std::vector<ConvolutionArguments> convs;
  std::vector<TrainedNorm> norms;
  for (size_t i = 0; i < 3; ++i) {
    const auto* const own = tensors.data() + i * kTensors;
    const std::string number = std::to_string(i + 1);
    if (!own[0]) fail("conv", number, "_weight: got None, expected a tensor");
    convs.push_back({"conv" + number, *own[0], own[1], {}});
    norms.push_back({own[1], own[2], own[3], own[4], own[5], eps[i], of_batch[i]});
  }
  arguments.x = x;
  arguments.conv1 = convs[0];
  arguments.conv2 = convs[1];
  arguments.conv3 = convs[2];
  const Unit sizes = check_unit(arguments);
  norms[0].check("bn1", sizes.mid_channels);
  norms[1].check("bn2", sizes.mid_channels);
  norms[2].check("bn3", sizes.out_channels);
  return {sizes, x, std::move(convs), std::move(norms), Processes(processes)};
}

std::vector<Tensor> training_unit(Tensor x, std::vector<std::optional<Tensor>> tensors, std::vector<double> eps,
                                  std::vector<bool> of_batch, int64_t conv1_groups, int64_t groups, int64_t stride,
                                  bool conv2_relu, bool pool_count_include_pad, int64_t shuffle_groups,
                                  bool shortcut_first, bool shortcut_relu, std::string processes) {
  const TrainedUnit unit = checked(
      x, tensors, eps, of_batch,
      geometry(conv1_groups, groups, stride, conv2_relu, pool_count_include_pad, shuffle_groups, shortcut_first,
               shortcut_relu),
      processes);
  Forward done = forward(unit);
  return {done.result, done.y1, done.y2, done.statistics.flat(x)};
}

// The gradients of x and of each convolution's trained tensors; empty tensors where they are not wanted or there is no
// such tensor.
std::vector<Tensor> training_unit_backward(
    Tensor gradient, Tensor x, Tensor result, Tensor y1, Tensor y2, Tensor statistics,
    std::vector<std::optional<Tensor>> tensors, std::vector<double> eps, std::vector<bool> of_batch, int64_t depth,
    int64_t conv1_groups, int64_t groups, int64_t stride, bool conv2_relu, bool pool_count_include_pad,
    int64_t shuffle_groups, bool shortcut_first, bool shortcut_relu, std::string processes) {
  const TrainedUnit unit = checked(
      x, tensors, eps, of_batch,
      geometry(conv1_groups, groups, stride, conv2_relu, pool_count_include_pad, shuffle_groups, shortcut_first,
               shortcut_relu),
      processes);
  if (depth < kConv3 || depth > kX) fail("depth: got ", depth, ", expected 1 to 4");
  const Unit& sizes = unit.sizes;
  const int64_t n = x.size(0), mid = unit.mid(), height = sizes.out_height(), width = sizes.out_width();
  const std::vector<int64_t> of_result = {n, sizes.result_channels(), height, width};
  check_shape("gradient", gradient, of_result);
  check_shape("result", result, of_result);
  check_shape("y1", y1, {n, mid, sizes.height, sizes.width});
  check_shape("y2", y2, {n, mid, height, width});
  check_like_x("gradient", gradient, x);
  check_like_x("result", result, x);
  check_like_x("y1", y1, x);
  check_like_x("y2", y2, x);
  const Statistics kept = Statistics::of(statistics, unit);

  const Gradients found = backward(unit, gradient, {result, y1, y2, kept}, depth);
  std::vector<Tensor> gradients = {found.x};
  for (size_t i = 0; i < 3; ++i) {
    const std::optional<StageGradients>& stage = found.stages[i];
    if (stage) {
      add_gradients(gradients, stage->weight, stage->norm, tensors.data() + i * kTensors, x);
    } else {
      for (size_t j = 0; j < kTrained; ++j) gradients.push_back(none_like(x));
    }
  }
  return gradients;
}

}  // namespace
}  // namespace shufflenet::cpu

STABLE_TORCH_LIBRARY_IMPL(shufflenet_ext, CPU, m) {
  using namespace shufflenet::cpu;
  m.impl("training_unit", TORCH_BOX(&training_unit));
  m.impl("training_unit_backward", TORCH_BOX(&training_unit_backward));
}
