// The pointwise convolution behind a network's units as a step.
#pragma once

#include "step.h"

namespace shufflenet::cpu {

// Shared by its rows.
class LastConvolutionStep final : public ImageStep {
 public:
  // What it reads lies in x_planes, null where channels are in their order. The units' kernel says what planes are made
  // of.
  LastConvolutionStep(const LastConvolution& layer, const Convolution& conv, int64_t x_plane, const int64_t* x_planes,
                      int64_t result_plane, const LastConvolutionKernel& kernel, const UnitKernel& unit_kernel,
                      int64_t threads)
      : layer_(layer),
        conv_(conv),
        x_plane_(x_plane),
        x_planes_(x_planes),
        result_plane_(result_plane),
        kernel_(kernel),
        unit_kernel_(unit_kernel),
        tasks_(std::min(layer.out_channels / unit_kernel.channels_per_element(), threads)) {}

  int64_t result_bytes() const override {
    return layer_.out_channels / unit_kernel_.channels_per_element() * result_plane_ * unit_kernel_.element_bytes();
  }

  void run(const void* from, void* to, bool) const override { run_rows(from, to, {0, layer_.out_channels}); }
  void share(const Sharers& s) const override {
    s.phases.add(s.step, tasks_,
                 [this, from = s.from, to = s.to](int64_t i) { run_rows(from, to, {first_row(i), first_row(i + 1)}); });
  }

  StepDescription describe() const override {
    return {{layer_.in_channels, layer_.height, layer_.width},
            {layer_.out_channels, layer_.height, layer_.width},
            layer_.multiply_adds(),
            layer_.weights_and_biases(),
            describe(1),
            describe(tasks_)};
  }

 private:
  int64_t first_row(int64_t task) const {
    const int64_t together = unit_kernel_.channels_per_element();
    return layer_.out_channels / together * task / tasks_ * together;
  }

  PassDescription describe(int64_t tasks) const {
    PassDescription pass;
    pass.cut = cut_into(tasks, "channel shares");
    pass.tiles = {kernel_.tile(layer_, ceil_div(layer_.out_channels, tasks))};
    pass.bytes = kernel_.workspace_bytes(layer_);
    return pass;
  }

  void run_rows(const void* from, void* to, Range rows) const {
    void* const workspace = thread_workspace.reserve(kernel_.workspace_bytes(layer_));
    kernel_.run(layer_, conv_, from, x_plane_, x_planes_, rows, to, result_plane_, workspace);
  }

  LastConvolution layer_;
  Convolution conv_;
  int64_t x_plane_;
  const int64_t* x_planes_;
  int64_t result_plane_;
  const LastConvolutionKernel& kernel_;
  const UnitKernel& unit_kernel_;
  int64_t tasks_;
};

}  // namespace shufflenet::cpu
