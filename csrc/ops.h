// The ops' functions, the same for every device: library.cpp's schemas on one side, UnitArguments on the other.
#pragma once

#include <torch/csrc/stable/library.h>

#include "arguments.h"

namespace shufflenet {

// Of each unit of a chain: conv1's, conv2's and conv3's weight and bias; conv1_groups, groups, stride, conv2_relu and
// pool_count_include_pad.
inline std::vector<UnitArguments> chain_arguments(const Tensor& x, const std::vector<Tensor>& parameters,
                                                  const std::vector<int64_t>& options, bool allow_tf32) {
  if (options.empty() || options.size() % 5 != 0 || parameters.size() != options.size() / 5 * 6) {
    fail("parameters, options: got ", parameters.size(), " and ", options.size(),
         " elements, expected 6 and 5 for each of the units");
  }
  std::vector<UnitArguments> chain;
  for (size_t i = 0; i < options.size() / 5; ++i) {
    const Tensor* const p = &parameters[6 * i];
    const int64_t* const o = &options[5 * i];
    chain.push_back(
        {x,
         {"conv1", p[0], p[1], {}},
         {"conv2", p[2], p[3], {}},
         ConvolutionArguments{"conv3", p[4], p[5], {}},
         o[0],
         o[1],
         o[2],
         o[3] != 0,
         o[4] != 0,
         allow_tf32});
  }
  return chain;
}

// A device's run takes x and the units that work on it one behind the other.
template <Tensor (*run)(const Tensor& x, const std::vector<UnitArguments>& units)>
struct Ops {
  static Tensor pointwise_shuffle_depthwise(Tensor x, Tensor conv1_weight, std::optional<Tensor> conv1_bias,
                                            Tensor conv2_weight, std::optional<Tensor> conv2_bias, int64_t conv1_groups,
                                            int64_t shuffle_groups, int64_t stride, bool conv2_relu, bool allow_tf32) {
    return run(
        x, {{x,
             {"conv1", conv1_weight, conv1_bias, {}},
             {"conv2", conv2_weight, conv2_bias, {}},
             {},
             conv1_groups,
             shuffle_groups,
             stride,
             conv2_relu,
             true,
             allow_tf32}});
  }

  static Tensor shuffle_bottleneck(Tensor x, Tensor conv1_weight, std::optional<Tensor> conv1_bias, Tensor conv2_weight,
                                   std::optional<Tensor> conv2_bias, Tensor conv3_weight,
                                   std::optional<Tensor> conv3_bias, int64_t conv1_groups, int64_t groups,
                                   int64_t stride, bool conv2_relu, bool pool_count_include_pad, bool allow_tf32) {
    return run(
        x, {{x,
             {"conv1", conv1_weight, conv1_bias, {}},
             {"conv2", conv2_weight, conv2_bias, {}},
             ConvolutionArguments{"conv3", conv3_weight, conv3_bias, {}},
             conv1_groups,
             groups,
             stride,
             conv2_relu,
             pool_count_include_pad,
             allow_tf32}});
  }

  static Tensor shuffle_bottleneck_batch_norm(
      Tensor x, Tensor conv1_weight, Tensor bn1_weight, Tensor bn1_bias, Tensor bn1_mean, Tensor bn1_var,
      Tensor conv2_weight, Tensor bn2_weight, Tensor bn2_bias, Tensor bn2_mean, Tensor bn2_var, Tensor conv3_weight,
      Tensor bn3_weight, Tensor bn3_bias, Tensor bn3_mean, Tensor bn3_var, double bn1_eps, double bn2_eps,
      double bn3_eps, int64_t conv1_groups, int64_t groups, int64_t stride, bool conv2_relu,
      bool pool_count_include_pad, bool allow_tf32) {
    return run(
        x,
        {{x,
          {"conv1", conv1_weight, {}, BatchNorm{bn1_weight, bn1_bias, bn1_mean, bn1_var, bn1_eps}},
          {"conv2", conv2_weight, {}, BatchNorm{bn2_weight, bn2_bias, bn2_mean, bn2_var, bn2_eps}},
          ConvolutionArguments{"conv3", conv3_weight, {}, BatchNorm{bn3_weight, bn3_bias, bn3_mean, bn3_var, bn3_eps}},
          conv1_groups,
          groups,
          stride,
          conv2_relu,
          pool_count_include_pad,
          allow_tf32}});
  }

  static Tensor shuffle_bottleneck_chain(Tensor x, std::vector<Tensor> parameters, std::vector<int64_t> options,
                                         bool allow_tf32) {
    return run(x, chain_arguments(x, parameters, options, allow_tf32));
  }

  static void implement(torch::stable::detail::StableLibrary& library) {
    library.impl("pointwise_shuffle_depthwise", TORCH_BOX(&Ops::pointwise_shuffle_depthwise));
    library.impl("shuffle_bottleneck", TORCH_BOX(&Ops::shuffle_bottleneck));
    library.impl("shuffle_bottleneck_chain", TORCH_BOX(&Ops::shuffle_bottleneck_chain));
    library.impl("shuffle_bottleneck_batch_norm", TORCH_BOX(&Ops::shuffle_bottleneck_batch_norm));
  }
};

}  // namespace shufflenet
