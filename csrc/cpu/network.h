// A network's stem and head as steps of an image; units are in steps.h.
#pragma once

#include "steps.h"

namespace shufflenet::cpu {

// Cut into a strip of rows for each thread.
class StemStep final : public Step {
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
    s.phases.add(
        s.step, strips_, [this, from = s.from, to = s.to](int64_t i) { run_rows(from, to, begin(i), begin(i + 1)); });
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
    run.tiles = {kernel_.tile(stem_)};
    run.bytes = kernel_.scratch_bytes(stem_);
    return run;
  }

  void run_rows(const void* from, void* to, int64_t row_begin, int64_t row_end) const {
    void* const scratch = thread_scratch.reserve(kernel_.scratch_bytes(stem_));
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
struct ChannelsWork {
  enum class Kind {
    means,      // the head's, of an image; its linear layer takes those of all images at once
    conversion  // from a tensor's image to planes of pairs, or back
  };
  Kind kind;
  int64_t channels, height, width;
  int64_t result_bytes;
};

// run(from, to, channels) does it to kImageChannels at a time.
template <class Run>
class ChannelsStep final : public Step {
 public:
  ChannelsStep(const ChannelsWork& work, int64_t threads, const Run& run)
      : work_(work), tasks_(std::min(ceil_div(work.channels, kImageChannels), threads)), run_(run) {}

  int64_t result_bytes() const override { return work_.result_bytes; }

  void run(const void* from, void* to, bool) const override { run_share(from, to, 0, 1); }
  void share(const Sharers& s) const override {
    s.phases.add(s.step, tasks_, [this, from = s.from, to = s.to](int64_t i) { run_share(from, to, i, tasks_); });
  }

  StepDescription describe() const override {
    StepDescription step;
    step.input = step.output = {work_.channels, work_.height, work_.width};
    if (work_.kind == ChannelsWork::Kind::conversion) step.name = "conversion";
    if (work_.kind == ChannelsWork::Kind::means) step.output = {work_.channels};
    step.alone.cut = cut_into(1, "channel shares");
    step.shared.cut = cut_into(tasks_, "channel shares");
    return step;
  }

 private:
  void run_share(const void* from, void* to, int64_t task, int64_t tasks) const {
    const int64_t count = ceil_div(work_.channels, kImageChannels);
    for (int64_t i = count * task / tasks; i < count * (task + 1) / tasks; ++i) {
      run_(from, to, Channels{i * kImageChannels, std::min(work_.channels, (i + 1) * kImageChannels)});
    }
  }

  ChannelsWork work_;
  int64_t tasks_;
  Run run_;
};

template <class Run>
const Step* channels_step(CallMemory& memory, const ChannelsWork& work, int64_t threads, const Run& run) {
  return memory.make<ChannelsStep<Run>>(work, threads, run);
}

}  // namespace shufflenet::cpu
