// A network's stem and head as steps of an image; units are in steps.h.
#pragma once

#include <functional>
#include <utility>

#include "steps.h"

namespace shufflenet::cpu {

// Cut into a strip of rows for each thread.
class StemStep : public Step {
 public:
  StemStep(const Stem& stem, const Convolution& conv, int64_t result_plane, const StemKernel& kernel, int64_t threads)
      : stem_(stem),
        conv_(conv),
        result_plane_(result_plane),
        kernel_(kernel),
        strips_(std::min(stem.out_height(), threads)) {}

  int64_t result_bytes() const override {
    return stem_.out_channels / kernel_.channels_per_element * result_plane_ * kernel_.element_bytes;
  }

  void run(const void* from, void* to, bool) const override { run_rows(from, to, 0, stem_.out_height()); }
  void share(const Sharers& s) const override {
    s.phases.push_back(
        {s.step, strips_, [=, from = s.from, to = s.to](int64_t i) { run_rows(from, to, begin(i), begin(i + 1)); }});
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

  RunDescription describe(int64_t strips) const {
    RunDescription run;
    run.cut = cut_into(strips, stem_.max_pool ? "strips with halo" : "strips");
    const int64_t last = stem_.out_height() * (strips - 1) / strips;  // no other is larger
    run.tiles = {kernel_.tile(stem_, last, stem_.out_height())};
    run.bytes = kernel_.scratch_bytes(stem_, last, stem_.out_height());
    return run;
  }

  void run_rows(const void* from, void* to, int64_t row_begin, int64_t row_end) const {
    void* const scratch = thread_scratch.reserve(kernel_.scratch_bytes(stem_, row_begin, row_end));
    char* const result = static_cast<char*>(to) + row_begin * stem_.out_width() * kernel_.element_bytes;
    kernel_.run(stem_, conv_, from, row_begin, row_end, result, result_plane_, scratch);
  }

  Stem stem_;
  Convolution conv_;
  int64_t result_plane_;
  StemKernel kernel_;
  int64_t strips_;
};

// What is done to the channels of an image apart from each other, and so shared by channels.
class ChannelsStep : public Step {
 public:
  using Run = std::function<void(const void* from, void* to, Channels)>;

  // Run takes kImageChannels at a time.
  ChannelsStep(StepDescription description, int64_t result_bytes, int64_t threads, Run run)
      : description_(std::move(description)),
        result_bytes_(result_bytes),
        tasks_(std::min(ceil_div(channels(), kImageChannels), threads)),
        run_(std::move(run)) {}

  int64_t result_bytes() const override { return result_bytes_; }

  void run(const void* from, void* to, bool) const override { run_share(from, to, 0, 1); }
  void share(const Sharers& s) const override {
    s.phases.push_back({s.step, tasks_, [=, from = s.from, to = s.to](int64_t i) { run_share(from, to, i, tasks_); }});
  }

  StepDescription describe() const override {
    StepDescription step = description_;
    step.alone.cut = cut_into(1, "channel shares");
    step.shared.cut = cut_into(tasks_, "channel shares");
    return step;
  }

 private:
  int64_t channels() const { return description_.input[0]; }

  void run_share(const void* from, void* to, int64_t task, int64_t tasks) const {
    const int64_t count = ceil_div(channels(), kImageChannels);
    for (int64_t i = count * task / tasks; i < count * (task + 1) / tasks; ++i) {
      run_(from, to, {i * kImageChannels, std::min(channels(), (i + 1) * kImageChannels)});
    }
  }

  StepDescription description_;  // but how it is shared
  int64_t result_bytes_, tasks_;
  Run run_;
};

// The head's means of an image; its linear layer takes those of all images at once.
inline StepDescription means_description(const Head& head) {
  StepDescription step;
  step.input = {head.channels, head.height, head.width};
  step.output = {head.channels};
  return step;
}

// From a tensor's image to planes of pairs, or back.
inline StepDescription conversion_description(int64_t channels, int64_t height, int64_t width) {
  StepDescription step;
  step.name = "conversion";
  step.input = step.output = {channels, height, width};
  return step;
}

}  // namespace shufflenet::cpu
