// A network's stem as a step.
#pragma once

#include "step.h"

namespace shufflenet::cpu {

// Cut into a strip of rows for each thread.
class StemStep final : public ImageStep {
 public:
  // The kernel of the units behind it says what the result's planes are made of.
  StemStep(const Stem& stem, const Convolution& conv, int64_t result_plane, const StemKernel& kernel,
           const UnitKernel& unit_kernel, int64_t threads)
      : stem_(stem),
        conv_(conv),
        result_plane_(result_plane),
        kernel_(kernel),
        unit_kernel_(unit_kernel),
        strips_(std::min(stem.out_height(), threads)) {}

  int64_t result_bytes() const override {
    return stem_.out_channels / unit_kernel_.channels_per_element() * result_plane_ * unit_kernel_.element_bytes();
  }

  void run(const void* from, void* to, bool) const override { run_rows(from, to, {0, stem_.out_height()}); }
  void share(const Sharers& s) const override {
    s.phases.add(
        s.step, strips_, [this, from = s.from, to = s.to](int64_t i) { run_rows(from, to, {begin(i), begin(i + 1)}); });
  }

  StepDescription describe() const override {
    return {{stem_.in_channels, stem_.height, stem_.width},
            {stem_.out_channels, stem_.out_height(), stem_.out_width()},
            stem_.multiply_adds(),
            stem_.weights_and_biases(),
            describe(1),
            describe(strips_)};
  }

 private:
  int64_t begin(int64_t strip) const { return stem_.out_height() * strip / strips_; }

  PassDescription describe(int64_t strips) const {
    PassDescription pass;
    pass.cut = cut_into(strips, stem_.max_pool ? "strips with halo" : "strips");
    pass.tiles = {kernel_.tile(stem_)};
    pass.bytes = kernel_.workspace_bytes(stem_);
    return pass;
  }

  void run_rows(const void* from, void* to, Range rows) const {
    void* const workspace = thread_workspace.reserve(kernel_.workspace_bytes(stem_));
    char* const result = static_cast<char*>(to) + rows.begin * stem_.out_width() * unit_kernel_.element_bytes();
    kernel_.run(stem_, conv_, from, rows, result, result_plane_, workspace);
  }

  Stem stem_;
  Convolution conv_;
  int64_t result_plane_;
  const StemKernel& kernel_;
  const UnitKernel& unit_kernel_;
  int64_t strips_;
};

}  // namespace shufflenet::cpu
