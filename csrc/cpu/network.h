// A network's stem and head as steps of an image; units are in steps.h.
#pragma once

#include <functional>
#include <utility>

#include "steps.h"

namespace shufflenet::cpu {

// Cut into strips of rows, whose share of the convolution stays in the L2 cache.
template <class A>
class StemStep : public Step {
 public:
  // With pairs, the result is planes of these.
  StemStep(const Stem& stem, const Convolution& conv, int64_t result_plane, Dtype dtype, int64_t threads,
           const PairKernel* pairs = nullptr)
      : stem_(stem), conv_(conv), result_plane_(result_plane), kernel_(isa().network_kernel(dtype)), pairs_(pairs) {
    while (strips_ < stem_.out_height() && strip_bytes() > kScratchBudget / 2) ++strips_;
    strips_ = std::min(stem_.out_height(), ceil_div(strips_, threads) * threads);
  }

  int64_t result_bytes(bool) const override {
    return stem_.out_channels / (pairs_ ? 2 : 1) * result_plane_ * static_cast<int64_t>(sizeof(A));
  }
  int64_t shared_bytes() const override { return 0; }

  void run(const void* from, void* to) const override {
    for (int64_t i = 0; i < strips_; ++i) run_strip(from, to, i);
  }
  void share(const Sharers& s) const override {
    s.phases.push_back({s.step, strips_, [=, from = s.from, to = s.to](int64_t i) { run_strip(from, to, i); }});
  }

 private:
  int64_t begin(int64_t strip) const { return stem_.out_height() * strip / strips_; }
  int64_t strip_bytes() const { return kernel_.stem_scratch_bytes(stem_, 0, ceil_div(stem_.out_height(), strips_)); }

  void run_strip(const void* from, void* to, int64_t i) const {
    void* const scratch = thread_scratch.reserve(kernel_.stem_scratch_bytes(stem_, begin(i), begin(i + 1)));
    A* const result = static_cast<A*>(to) + begin(i) * stem_.out_width();
    if (!pairs_) return kernel_.stem(stem_, conv_, from, begin(i), begin(i + 1), result, result_plane_, scratch);
    const int64_t pixels = (begin(i + 1) - begin(i)) * stem_.out_width(), plane = ImageLayout::padded(pixels);
    void* const planes = thread_buffers.reserve(stem_.out_channels * plane * static_cast<int64_t>(sizeof(A)));
    kernel_.stem(stem_, conv_, from, begin(i), begin(i + 1), planes, plane, scratch);
    pairs_->pack(planes, plane, stem_.out_channels, pixels, result, result_plane_);
  }

  Stem stem_;
  Convolution conv_;
  int64_t result_plane_;
  NetworkKernel kernel_;
  const PairKernel* pairs_;
  int64_t strips_ = 1;
};

// What is done to each channel of an image apart from the others: shared by channels.
class ChannelsStep : public Step {
 public:
  using Run = std::function<void(const void* from, void* to, Channels)>;

  // Run takes kImageChannels at a time.
  ChannelsStep(int64_t channels, int64_t result_bytes, Run run)
      : channels_(channels), result_bytes_(result_bytes), run_(std::move(run)) {}

  int64_t result_bytes(bool) const override { return result_bytes_; }
  int64_t shared_bytes() const override { return 0; }

  void run(const void* from, void* to) const override { run_share(from, to, 0, 1); }
  void share(const Sharers& s) const override {
    const int64_t workers = torch::stable::get_num_threads();
    s.phases.push_back(
        {s.step, workers, [=, from = s.from, to = s.to](int64_t i) { run_share(from, to, i, workers); }});
  }

 private:
  void run_share(const void* from, void* to, int64_t worker, int64_t workers) const {
    const int64_t count = ceil_div(channels_, kImageChannels);
    for (int64_t i = count * worker / workers; i < count * (worker + 1) / workers; ++i) {
      run_(from, to, {i * kImageChannels, std::min(channels_, (i + 1) * kImageChannels)});
    }
  }

  int64_t channels_, result_bytes_;
  Run run_;
};

}  // namespace shufflenet::cpu
