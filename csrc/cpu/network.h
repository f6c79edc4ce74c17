// A network's stem and head as steps of an image; units are in steps.h.
#pragma once

#include "steps.h"

namespace shufflenet::cpu {

// Cut into strips of rows, whose share of the convolution stays in the L2 cache.
template <class A>
class StemStep : public Step {
 public:
  StemStep(const Stem& stem, const Convolution& conv, int64_t result_plane, Dtype dtype, int64_t threads)
      : stem_(stem), conv_(conv), result_plane_(result_plane), kernel_(isa().network_kernel(dtype)) {
    while (strips_ < stem_.out_height() && strip_bytes() > kScratchBudget / 2) ++strips_;
    strips_ = std::min(stem_.out_height(), ceil_div(strips_, threads) * threads);
  }

  int64_t result_bytes(bool) const override {
    return stem_.out_channels * result_plane_ * static_cast<int64_t>(sizeof(A));
  }

  void run(const void* from, void* to) const override {
    for (int64_t i = 0; i < strips_; ++i) run_strip(from, to, i);
  }
  void share(const Sharers& s) const override {
    s.phases.push_back({s.step, strips_, [=, from = s.from, to = s.to](int64_t i) { run_strip(from, to, i); }});
  }

  StepDescription describe() const override {
    RunDescription run;
    run.cut = cut_into(strips_, stem_.max_pool ? "strips with halo" : "strips");
    run.tiles = {kernel_.stem_tile(stem_, begin(strips_ - 1), begin(strips_))};
    for (int64_t i = 0; i < strips_; ++i) {
      run.bytes = std::max(run.bytes, kernel_.stem_scratch_bytes(stem_, begin(i), begin(i + 1)));
    }
    return {{stem_.in_channels, stem_.height, stem_.width},
            {stem_.out_channels, stem_.out_height(), stem_.out_width()},
            stem_.multiply_adds(),
            stem_.weights_and_biases(),
            run,
            run};
  }

 private:
  int64_t begin(int64_t strip) const { return stem_.out_height() * strip / strips_; }
  int64_t strip_bytes() const { return kernel_.stem_scratch_bytes(stem_, 0, ceil_div(stem_.out_height(), strips_)); }

  void run_strip(const void* from, void* to, int64_t i) const {
    void* const scratch = thread_scratch.reserve(kernel_.stem_scratch_bytes(stem_, begin(i), begin(i + 1)));
    kernel_.stem(stem_, conv_, from, begin(i), begin(i + 1), to, result_plane_, scratch);
  }

  Stem stem_;
  Convolution conv_;
  int64_t result_plane_;
  NetworkKernel kernel_;
  int64_t strips_ = 1;
};

// The head's means of an image; its linear layer takes those of all images at once.
template <class A>
class MeansStep : public Step {
 public:
  MeansStep(const Head& head, int64_t x_plane, Dtype dtype, int64_t threads)
      : head_(head),
        x_plane_(x_plane),
        kernel_(isa().network_kernel(dtype)),
        tasks_(std::min(head.channels, threads)) {}

  int64_t result_bytes(bool) const override { return head_.channels * static_cast<int64_t>(sizeof(A)); }

  void run(const void* from, void* to) const override {
    kernel_.window_means(head_, from, x_plane_, {0, head_.channels}, to);
  }
  void share(const Sharers& s) const override {
    s.phases.push_back({s.step, tasks_, [=, from = s.from, to = s.to](int64_t i) {
                          const Channels channels = {head_.channels * i / tasks_, head_.channels * (i + 1) / tasks_};
                          kernel_.window_means(head_, from, x_plane_, channels, to);
                        }});
  }

  StepDescription describe() const override {
    StepDescription step;
    step.input = {head_.channels, head_.height, head_.width};
    step.output = {head_.channels};
    step.alone.cut = cut_into(1, "channel shares");
    step.shared.cut = cut_into(tasks_, "channel shares");
    return step;
  }

 private:
  Head head_;
  int64_t x_plane_;
  NetworkKernel kernel_;
  int64_t tasks_;
};

}  // namespace shufflenet::cpu
