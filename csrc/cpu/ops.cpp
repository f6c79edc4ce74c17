// The ops on the CPU: tensors in, raw pointers out.
#include "../ops.h"

#include "schedule/plan.h"

namespace shufflenet::cpu {
namespace {

Call call_of(const Tensor& x, const Tensor& result) {
  return {x.const_data_ptr(), result.mutable_data_ptr(), dtype_of("x", x), x.size(0)};
}

template <class A>
void run_unit_as(const UnitArguments& arguments, Unit unit, const Tensor& x, const Tensor& result) {
  unit.batch = 1;
  const UnitData<A> data(arguments);
  UnitPointers pointers;
  pointers.conv1 = data.conv1.pointers;
  pointers.conv2 = data.conv2.pointers;
  if (data.conv3) pointers.conv3 = data.conv3->pointers;
  pointers.x_plane = unit.height * unit.width;
  pointers.result_plane = unit.out_height() * unit.out_width();
  run_unit(unit, pointers, call_of(x, result));
}

Tensor run(const UnitArguments& arguments) {
  const Unit unit = check_unit(arguments);
  const Tensor x = dense(arguments.x, unit.layout);
  const Tensor result = empty_result(x, unit);
  if (unit.batch == 0) return result;
  const bool is_double = dtype_of("x", x) == Dtype::float64;
  (is_double ? run_unit_as<double> : run_unit_as<float>)(arguments, unit, x, result);
  return result;
}

// Calls run(call) with what a program takes and gives.
template <class Run>
Tensor with_result(const Program& program, const Tensor& given_x, const Run& run) {
  const Tensor x = dense(given_x, program.layout);
  const Tensor result =
      program.head ? empty_like_x<2>(x, {x.size(0), program.head->head.classes}, {program.head->head.classes, 1})
                   : empty_like_x(x, program.sizes, program.layout);
  if (x.size(0) > 0) run(call_of(x, result));
  return result;
}

Tensor run_packed(const Tensor& x, const Tensor& weights, const Program& program, bool) {
  return with_result(program, x, [&](const Call& call) {
    run_program(program, {weights.const_data_ptr(), dtype_of("weights", weights), weights.numel()}, call);
  });
}

template <class A>
void run_tensors_as(const Program& program, const std::vector<ConvolutionArguments>& arguments, const Call& call) {
  const std::vector<ConvolutionData<A>> data(arguments.begin(), arguments.end());
  std::vector<Convolution> convolutions;
  for (const ConvolutionData<A>& each : data) convolutions.push_back(each.pointers);
  run_program(program, convolutions.data(), call);
}

Tensor run_tensors(Tensor x, std::vector<std::optional<Tensor>> tensors, std::vector<double> eps,
                   std::vector<int64_t> integers, bool) {
  const auto [arguments, elements] = network_arguments(tensors, eps);
  const Program program = ProgramReader(check_x(x), layout_of(x), elements, integers).read();
  check_network(program, arguments, x);
  return with_result(program, x, [&, &arguments = arguments](const Call& call) {
    (call.dtype == Dtype::float64 ? run_tensors_as<double> : run_tensors_as<float>)(program, arguments, call);
  });
}

// A program of one unit.
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
  Program program;
  program.units.push_back({unit, {}, {}, {}, {}, {}});
  program.layout = unit.layout;
  program.x = {x.size(0), unit.in_channels, unit.height, unit.width};
  program.sizes = {x.size(0), unit.result_channels(), unit.out_height(), unit.out_width()};
  return with_result(program, x, [&](const Call& call) {
    (call.dtype == Dtype::float64 ? run_tensors_as<double> : run_tensors_as<float>)(program, arguments, call);
  });
}

}  // namespace
}  // namespace shufflenet::cpu

STABLE_TORCH_LIBRARY_IMPL(shufflenet_ext, CPU, m) {
  shufflenet::Ops<shufflenet::cpu::run, shufflenet::cpu::run_packed>::implement(m);
  m.impl("shuffle_network_batch_norm", TORCH_BOX(&shufflenet::cpu::run_tensors));
  m.impl("shuffle_unit_v2", TORCH_BOX(&shufflenet::cpu::run_unit_v2));
}
