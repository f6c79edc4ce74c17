// The ops on the CPU: tensors in, raw pointers out.
#include "../ops.h"

#include "schedule/plan.h"

namespace shufflenet::cpu {
namespace {

// Calls run(call) with what a program takes and gives.
template <class Run>
Tensor with_result(const Program& program, const Tensor& given_x, const Run& run) {
  const Tensor x = dense(given_x, program.layout);
  const Tensor result =
      program.head ? empty_like_x<2>(x, {x.size(0), program.head->head.classes}, {program.head->head.classes, 1})
                   : empty_like_x(x, program.sizes, program.layout);
  if (x.size(0) > 0) run(Call{x.const_data_ptr(), result.mutable_data_ptr(), dtype_of("x", x), x.size(0)});
  return result;
}

Tensor run_packed(const Tensor& x, const Tensor& weights, const Program& program, const std::optional<Tensor>& packed,
                  bool) {
  if (packed) fail("packed: got a tensor, expected None on the CPU");
  return with_result(program, x, [&](const Call& call) {
    run_program(program, {weights.const_data_ptr(), dtype_of("weights", weights), weights.numel()}, call);
  });
}

template <class A>
void run_arguments_as(const Program& program, const std::vector<ConvolutionArguments>& arguments, const Call& call) {
  const std::vector<ConvolutionData<A>> data(arguments.begin(), arguments.end());
  std::vector<Convolution> convolutions;
  for (const ConvolutionData<A>& each : data) convolutions.push_back(each.pointers);
  run_program(program, convolutions.data(), call);
}

Tensor run_arguments(const Program& program, const std::vector<ConvolutionArguments>& arguments, const Tensor& x) {
  return with_result(program, x, [&](const Call& call) {
    (call.dtype == Dtype::float64 ? run_arguments_as<double> : run_arguments_as<float>)(program, arguments, call);
  });
}

Tensor run_tensors(Tensor x, std::vector<std::optional<Tensor>> tensors, std::vector<double> eps,
                   std::vector<int64_t> integers, bool) {
  const auto [arguments, elements] = network_arguments(tensors, eps);
  const Program program = ProgramReader(check_x(x), layout_of(x), elements, integers).read();
  check_network(program, arguments, x);
  return run_arguments(program, arguments, x);
}

// Runs a unit as a program of its own.
Tensor run_unit(const Unit& unit, const std::vector<ConvolutionArguments>& arguments, const Tensor& x) {
  Program program;
  program.units.push_back({unit, {}, {}, {}, {}, {}});
  program.layout = unit.layout;
  program.x = {x.size(0), unit.in_channels, unit.height, unit.width};
  program.sizes = {x.size(0), unit.result_channels(), unit.out_height(), unit.out_width()};
  program.copies_parts = !unit.is_v2();
  return run_arguments(program, arguments, x);
}

Tensor run_unit_v1(const UnitArguments& a) {
  Unit unit = check_unit(a);
  unit.batch = 1;
  std::vector<ConvolutionArguments> arguments = {a.conv1, a.conv2};
  if (a.conv3) arguments.push_back(*a.conv3);
  return run_unit(unit, arguments, a.x);
}

Tensor run_unit_v2(Tensor x, Tensor conv1_weight, std::optional<Tensor> conv1_bias, Tensor conv2_weight,
                   std::optional<Tensor> conv2_bias, Tensor conv3_weight, std::optional<Tensor> conv3_bias,
                   std::optional<Tensor> shortcut1_weight, std::optional<Tensor> shortcut1_bias,
                   std::optional<Tensor> shortcut2_weight, std::optional<Tensor> shortcut2_bias, int64_t stride,
                   int64_t split_groups, int64_t shuffle_groups, bool) {
  UnitV2Arguments a = {
      x,
      {"conv1", conv1_weight, conv1_bias, {}},
      {"conv2", conv2_weight, conv2_bias, {}},
      {"conv3", conv3_weight, conv3_bias, {}},
      {},
      {},
      stride,
      split_groups,
      shuffle_groups};
  if (shortcut1_weight) a.shortcut1 = ConvolutionArguments{"shortcut1", *shortcut1_weight, shortcut1_bias, {}};
  if (shortcut2_weight) a.shortcut2 = ConvolutionArguments{"shortcut2", *shortcut2_weight, shortcut2_bias, {}};
  const Unit unit = check_unit(a);
  std::vector<ConvolutionArguments> arguments = {a.conv1, a.conv2, a.conv3};
  if (unit.convolves_shortcut()) arguments.insert(arguments.end(), {*a.shortcut1, *a.shortcut2});
  return run_unit(unit, arguments, x);
}

}  // namespace
}  // namespace shufflenet::cpu

STABLE_TORCH_LIBRARY_IMPL(shufflenet_ext, CPU, m) {
  shufflenet::Ops<shufflenet::cpu::run_unit_v1, shufflenet::cpu::run_packed>::implement(m);
  m.impl("shuffle_network_batch_norm", TORCH_BOX(&shufflenet::cpu::run_tensors));
  m.impl("shuffle_unit_v2", TORCH_BOX(&shufflenet::cpu::run_unit_v2));
}
