// The convolutions around a program's units as steps: its stem and its last convolution.
#pragma once

#include "step.h"

namespace shufflenet::cpu {

// What a convolution's result can be cut into, for threads to share it.
struct Cuts {
  const char* name;
  int64_t parts;
  int64_t rows;   // of a part, as the layer's kernel counts them
  int64_t bytes;  // from a part to the next one
};

// A stem is cut into strips of rows of pixels.
inline Cuts cuts_of(const Stem& stem, const UnitKernel& unit_kernel, int64_t) {
  const int64_t row_bytes = stem.out_width() * unit_kernel.element_bytes();
  return {stem.max_pool ? "strips with halo" : "strips", stem.out_height(), 1, row_bytes};
}
// The last convolution is cut between planes.
inline Cuts cuts_of(const LastConvolution& layer, const UnitKernel& unit_kernel, int64_t result_plane) {
  const int64_t together = unit_kernel.channels_per_element();
  return {"channel shares", layer.out_channels / together, together, result_plane * unit_kernel.element_bytes()};
}

template <class Layer>
class ConvolutionStep final : public ImageStep {
 public:
  // The units' kernel says what planes are made of.
  ConvolutionStep(const Layer& layer, const Convolution& conv, int64_t result_plane, const LayerKernel<Layer>& kernel,
                  const UnitKernel& unit_kernel, int64_t threads)
      : layer_(layer),
        conv_(conv),
        result_plane_(result_plane),
        result_bytes_(unit_kernel.image_bytes(layer.out_channels, result_plane)),
        kernel_(kernel),
        cuts_(cuts_of(layer, unit_kernel, result_plane)),
        tasks_(std::min(cuts_.parts, threads)) {}

  int64_t result_bytes() const override { return result_bytes_; }

  void run(const void* from, void* to, bool) const override { run_task(from, to, 0, 1); }
  void share(const Sharers& s) const override {
    s.phases.add(s.step, tasks_, [this, from = s.from, to = s.to](int64_t i) { run_task(from, to, i, tasks_); });
  }

  StepDescription describe() const override {
    return {{layer_.in_channels, layer_.height, layer_.width},
            {layer_.out_channels, layer_.out_height(), layer_.out_width()},
            layer_.multiply_adds(),
            layer_.weights_and_biases(),
            describe(1),
            describe(tasks_)};
  }

 private:
  PassDescription describe(int64_t tasks) const {
    return {cut_into(tasks, cuts_.name), {kernel_.tile(layer_, tasks)}, kernel_.workspace_bytes(layer_)};
  }

  void run_task(const void* from, void* to, int64_t task, int64_t tasks) const {
    const int64_t begin = cuts_.parts * task / tasks, end = cuts_.parts * (task + 1) / tasks;
    void* const workspace = thread_workspace.reserve(kernel_.workspace_bytes(layer_));
    kernel_.run(layer_, conv_, from, {begin * cuts_.rows, end * cuts_.rows},
                static_cast<char*>(to) + begin * cuts_.bytes, result_plane_, workspace);
  }

  Layer layer_;
  Convolution conv_;
  int64_t result_plane_, result_bytes_;
  const LayerKernel<Layer>& kernel_;
  Cuts cuts_;
  int64_t tasks_;
};

}  // namespace shufflenet::cpu
