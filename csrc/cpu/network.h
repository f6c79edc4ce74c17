// A network's stem and head as steps of an image; units are in steps.h.
#pragma once

#include <functional>
#include <utility>

#include "steps.h"

namespace shufflenet::cpu {

// Cut into a strip of rows for each thread.
template <class A>
class StemStep : public Step {
 public:
  // With `pack`, the result is planes of pairs.
  StemStep(const Stem& stem, const Convolution& conv, int64_t result_plane, Dtype dtype, int64_t threads,
           PackFunction pack = nullptr)
      : stem_(stem), conv_(conv), result_plane_(result_plane), kernel_(isa().network_kernel(dtype)), pack_(pack) {
    // What is packed stays in the L2 cache until then.
    while (pack_ && rows() > kLeastRows && result_bytes() / strips_ > kScratchBudget / 2) ++strips_;
    strips_ = std::min(stem_.out_height(), ceil_div(strips_, threads) * threads);
  }

  int64_t result_bytes() const override {
    return stem_.out_channels / (pack_ ? 2 : 1) * result_plane_ * static_cast<int64_t>(sizeof(A));
  }

  void run(const void* from, void* to, bool) const override {
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
  // Of a strip, in which one of its 2 * kLeastRows + 1 rows of the convolution is also computed for another.
  static constexpr int64_t kLeastRows = 4;

  int64_t begin(int64_t strip) const { return stem_.out_height() * strip / strips_; }
  int64_t rows() const { return ceil_div(stem_.out_height(), strips_); }

  void run_strip(const void* from, void* to, int64_t i) const {
    void* const scratch = thread_scratch.reserve(kernel_.stem_scratch_bytes(stem_, begin(i), begin(i + 1)));
    A* const result = static_cast<A*>(to) + begin(i) * stem_.out_width();
    if (!pack_) return kernel_.stem(stem_, conv_, from, begin(i), begin(i + 1), result, result_plane_, scratch);
    const int64_t pixels = (begin(i + 1) - begin(i)) * stem_.out_width(), plane = ImageLayout::padded(pixels);
    void* const planes = thread_buffers.reserve(stem_.out_channels * plane * static_cast<int64_t>(sizeof(A)));
    kernel_.stem(stem_, conv_, from, begin(i), begin(i + 1), planes, plane, scratch);
    pack_(planes, plane, stem_.out_channels, pixels, result, result_plane_);
  }

  Stem stem_;
  Convolution conv_;
  int64_t result_plane_;
  NetworkKernel kernel_;
  PackFunction pack_;
  int64_t strips_ = 1;
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
