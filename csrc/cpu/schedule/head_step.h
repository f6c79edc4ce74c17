// Steps around a program's units: what is done to the channels of an image apart from each other, as a head's means
// are, and the head's linear layer.
#pragma once

#include "step.h"

namespace shufflenet::cpu {

// What a step does that is shared by channels.
struct ChannelsWork {
  const char* name;  // of what is not a step of the program, else empty
  int64_t channels, height, width;
  bool keeps_pixels;  // whether each channel's result is a plane as well
  int64_t result_bytes;
};

// run(from, to, channels) does it to kImageChannels at most.
template <class Run>
class ChannelsStep final : public ImageStep {
 public:
  ChannelsStep(const ChannelsWork& work, int64_t threads, const Run& run)
      : work_(work), tasks_(std::min(ceil_div(work.channels, kImageChannels), threads)), run_(run) {}

  int64_t result_bytes() const override { return work_.result_bytes; }

  void run(const void* from, void* to, bool) const override { run_task(from, to, 0, 1); }
  void share(const Sharers& s) const override {
    s.phases.add(s.step, tasks_, [this, from = s.from, to = s.to](int64_t i) { run_task(from, to, i, tasks_); });
  }

  StepDescription describe() const override {
    StepDescription step;
    step.name = work_.name;
    step.input = step.output = {work_.channels, work_.height, work_.width};
    if (!work_.keeps_pixels) step.output = {work_.channels};
    step.alone.cut = cut_into(1, "channel shares");
    step.shared.cut = cut_into(tasks_, "channel shares");
    return step;
  }

 private:
  void run_task(const void* from, void* to, int64_t task, int64_t tasks) const {
    const int64_t count = ceil_div(work_.channels, kImageChannels);
    for (int64_t i = count * task / tasks; i < count * (task + 1) / tasks; ++i) {
      run_(from, to, Range{i * kImageChannels, std::min(work_.channels, (i + 1) * kImageChannels)});
    }
  }

  ChannelsWork work_;
  int64_t tasks_;
  Run run_;
};

// Takes all images at once, and is shared by classes.
class LinearStep final : public Step {
 public:
  LinearStep(const Head& head, int64_t images, const Convolution& layer, const HeadKernel& kernel, int64_t threads)
      : head_(head), images_(images), layer_(layer), kernel_(kernel), tasks_(std::min(head.classes, 4 * threads)) {}

  int64_t means_bytes() const { return kernel_.means_bytes(head_, images_); }

  void share(int64_t step, const void* means, void* result, Phases& phases) const {
    phases.add(step, tasks_, [=](int64_t i) {
      const Range classes = {head_.classes * i / tasks_, head_.classes * (i + 1) / tasks_};
      kernel_.linear(head_, images_, layer_, means, classes, result);
    });
  }

  StepDescription describe() const override {
    StepDescription step;
    step.input = {head_.channels};
    step.output = {head_.classes};
    step.multiply_adds = head_.channels * head_.classes;
    step.weights_and_biases = (head_.channels + 1) * head_.classes;
    step.alone.cut = step.shared.cut = cut_into(tasks_, "class shares");
    return step;
  }

 private:
  Head head_;
  int64_t images_;
  Convolution layer_;
  const HeadKernel& kernel_;
  int64_t tasks_;
};

}  // namespace shufflenet::cpu
