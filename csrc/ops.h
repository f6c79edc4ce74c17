// The ops' functions, the same for every device: library.cpp's schemas on one side, UnitArguments on the other.
#pragma once

#include <torch/csrc/stable/library.h>

#include "program.h"

namespace shufflenet {

// A device's run takes a unit's arguments, its run_program what shuffle_network takes.
template <Tensor (*run)(const UnitArguments&),
          Tensor (*run_program)(const Tensor& x, const Tensor& weights, const Program&,
                                const std::optional<Tensor>& packed, bool allow_tf32)>
struct Ops {
  static Tensor pointwise_shuffle_depthwise(Tensor x, Tensor conv1_weight, std::optional<Tensor> conv1_bias,
                                            Tensor conv2_weight, std::optional<Tensor> conv2_bias, int64_t conv1_groups,
                                            int64_t shuffle_groups, int64_t stride, bool conv2_relu, bool allow_tf32) {
    return run({x,
                {"conv1", conv1_weight, conv1_bias, {}},
                {"conv2", conv2_weight, conv2_bias, {}},
                {},
                conv1_groups,
                shuffle_groups,
                stride,
                conv2_relu,
                true,
                allow_tf32});
  }

  static Tensor shuffle_bottleneck(
      Tensor x, Tensor conv1_weight, std::optional<Tensor> conv1_bias, Tensor conv2_weight,
      std::optional<Tensor> conv2_bias, Tensor conv3_weight, std::optional<Tensor> conv3_bias, int64_t conv1_groups,
      int64_t groups, int64_t stride, bool conv2_relu, bool pool_count_include_pad,
      std::optional<int64_t> shuffle_groups, bool shortcut_first, bool shortcut_relu, bool allow_tf32) {
    return run(
        {x,
         {"conv1", conv1_weight, conv1_bias, {}},
         {"conv2", conv2_weight, conv2_bias, {}},
         ConvolutionArguments{"conv3", conv3_weight, conv3_bias, {}},
         conv1_groups,
         groups,
         stride,
         conv2_relu,
         pool_count_include_pad,
         allow_tf32,
         shuffle_groups,
         shortcut_first,
         shortcut_relu});
  }

  static Tensor shuffle_bottleneck_batch_norm(
      Tensor x, Tensor conv1_weight, std::optional<Tensor> conv1_bias, std::optional<Tensor> bn1_weight,
      std::optional<Tensor> bn1_bias, Tensor bn1_mean, Tensor bn1_var, Tensor conv2_weight,
      std::optional<Tensor> conv2_bias, std::optional<Tensor> bn2_weight, std::optional<Tensor> bn2_bias,
      Tensor bn2_mean, Tensor bn2_var, Tensor conv3_weight, std::optional<Tensor> conv3_bias,
      std::optional<Tensor> bn3_weight, std::optional<Tensor> bn3_bias, Tensor bn3_mean, Tensor bn3_var, double bn1_eps,
      double bn2_eps, double bn3_eps, int64_t conv1_groups, int64_t groups, int64_t stride, bool conv2_relu,
      bool pool_count_include_pad, std::optional<int64_t> shuffle_groups, bool shortcut_first, bool shortcut_relu,
      bool allow_tf32) {
    return run(
        {x,
         {"conv1", conv1_weight, conv1_bias, BatchNorm{bn1_weight, bn1_bias, bn1_mean, bn1_var, bn1_eps}},
         {"conv2", conv2_weight, conv2_bias, BatchNorm{bn2_weight, bn2_bias, bn2_mean, bn2_var, bn2_eps}},
         ConvolutionArguments{
             "conv3", conv3_weight, conv3_bias, BatchNorm{bn3_weight, bn3_bias, bn3_mean, bn3_var, bn3_eps}},
         conv1_groups,
         groups,
         stride,
         conv2_relu,
         pool_count_include_pad,
         allow_tf32,
         shuffle_groups,
         shortcut_first,
         shortcut_relu});
  }

  static Tensor shuffle_network(Tensor x, Tensor weights, std::vector<int64_t> program, std::optional<Tensor> packed,
                                bool allow_tf32) {
    return run_program(x, weights, read_program(x, weights, program), packed, allow_tf32);
  }

  static void implement(torch::stable::detail::StableLibrary& library) {
    library.impl("pointwise_shuffle_depthwise", TORCH_BOX(&Ops::pointwise_shuffle_depthwise));
    library.impl("shuffle_bottleneck", TORCH_BOX(&Ops::shuffle_bottleneck));
    library.impl("shuffle_network", TORCH_BOX(&Ops::shuffle_network));
    library.impl("shuffle_bottleneck_batch_norm", TORCH_BOX(&Ops::shuffle_bottleneck_batch_norm));
  }
};

}  // namespace shufflenet
