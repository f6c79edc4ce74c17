// What is done to each image of a batch, step by step, and how torch's threads share that: as many whole images as
// there are threads go through all steps on one thread each, and so stay in its caches; the threads share the steps of
// the images that are left. All of it is one parallel region.
#pragma once

#include <memory>
#include <vector>

#include "partition.h"
#include "phases.h"
#include "prepared.h"
#include "scratch.h"

namespace shufflenet::cpu {

// A thread's memory: about kScratchBudget for the buffers and scratch of a part (more where one row of a unit needs
// it), the two images between which the steps go back and forth, and what threads it called share.
inline thread_local Scratch thread_buffers, thread_scratch, thread_images[2], shared_buffers, shared_images[2];

class Step {
 public:
  virtual ~Step() = default;
  virtual int64_t result_bytes() const = 0;
  // Of what threads that share the step hand on to each other.
  virtual int64_t shared_bytes() const = 0;
  // Whether the result may take the place of what it is computed from: run by one thread, or shared.
  virtual bool works_in_place(bool shared) const = 0;
  // By one thread.
  virtual void run(const void* from, void* to) const = 0;
  // By several threads: appends phases.
  virtual void share(int64_t step, const void* from, void* to, void* buffers, std::vector<Phase>& phases) const = 0;
};

template <class A>
class UnitStep : public Step {
 public:
  // The pointers' x and result are void.
  UnitStep(const Unit& unit, const UnitPointers& pointers, Dtype dtype, int64_t threads)
      : unit_(unit), pointers_(pointers), kernel_(isa().unit_kernel(dtype)) {
    const int64_t lanes = isa().vector_bytes / static_cast<int64_t>(sizeof(A));
    alone_ = choose_partition(unit_, kernel_, lanes, 1);
    shared_ = choose_partition(unit_, kernel_, lanes, threads);
    const int64_t element_bytes = dtype == Dtype::bfloat16 || dtype == Dtype::float16 ? 2 : sizeof(A);
    const int64_t pixels =
        unit.layout == Layout::contiguous ? pointers.result_plane : unit.out_height() * unit.out_width();
    result_bytes_ = unit.result_channels() * pixels * element_bytes;
  }

  int64_t result_bytes() const override { return result_bytes_; }

  // Where a part is the whole image, all of x but the residual has been read before the result is written.
  bool works_in_place(bool shared) const override {
    return unit_.adds_residual() && (shared ? shared_ : alone_).strips == 1 &&
           pointers_.x_plane == pointers_.result_plane;
  }

  int64_t shared_bytes() const override {
    int64_t most = 0;
    for (int64_t i = 0; i < shared_.strips && shared_.workers_per_part > 1; ++i) {
      most = std::max(most, kernel_.buffer_bytes(unit_, shared_.part(unit_, i)));
    }
    return most;
  }

  void run(const void* from, void* to) const override {
    for (int64_t i = 0; i < alone_.strips; ++i) run_part(pointers(from, to), alone_.part(unit_, i));
  }

  void share(int64_t step, const void* from, void* to, void* buffers, std::vector<Phase>& phases) const override {
    const UnitPointers pointers = this->pointers(from, to);
    if (shared_.workers_per_part == 1) {
      phases.push_back(
          {step, shared_.strips, [this, pointers](int64_t i) { run_part(pointers, shared_.part(unit_, i)); }});
      return;
    }
    for (int64_t i = 0; i < shared_.strips; ++i) share_part(step, pointers, shared_.part(unit_, i), buffers, phases);
  }

 private:
  UnitPointers pointers(const void* from, void* to) const {
    UnitPointers result = pointers_;
    result.x = from;
    result.result = to;
    return result;
  }

  void run_part(const UnitPointers& pointers, const Part& part) const {
    const Channels mid = {0, unit_.mid_channels};
    void* const buffers = thread_buffers.reserve(kernel_.buffer_bytes(unit_, part));
    void* const scratch = thread_scratch.reserve(kernel_.scratch_bytes(unit_, part, mid));
    kernel_.stage(unit_, pointers, part, {0, unit_.in_channels}, buffers);
    kernel_.expand(unit_, pointers, part, mid, buffers, scratch);
    if (unit_.has_conv3()) kernel_.project(unit_, pointers, part, {0, unit_.result_channels()}, buffers, scratch);
  }

  // The threads share each phase of the part by channels: nothing is computed twice.
  void share_part(int64_t step, const UnitPointers& pointers, const Part& part, void* buffers,
                  std::vector<Phase>& phases) const {
    const int64_t workers = shared_.workers_per_part;
    if (kernel_.is_staged(unit_)) {
      phases.push_back({step, workers, [=](int64_t i) {
                          kernel_.stage(unit_, pointers, part, share_of(unit_.in_channels, 16, i), buffers);
                        }});
    }
    phases.push_back({step, workers, [=](int64_t i) {
                        // Whole multiples of the groups leave each of conv1's groups an equal share of its rows.
                        const Channels channels = share_of(unit_.mid_channels, unit_.groups, i);
                        void* const scratch = thread_scratch.reserve(kernel_.scratch_bytes(unit_, part, channels));
                        kernel_.expand(unit_, pointers, part, channels, buffers, scratch);
                      }});
    if (!unit_.has_conv3()) return;
    phases.push_back({step, workers, [=](int64_t i) {
                        void* const scratch = thread_scratch.reserve(kernel_.scratch_bytes(unit_, part, {}));
                        const Channels channels = share_of(unit_.result_channels(), 1, i);
                        kernel_.project(unit_, pointers, part, channels, buffers, scratch);
                      }});
  }

  // A worker's share of n channels, in multiples of `multiple`.
  Channels share_of(int64_t n, int64_t multiple, int64_t worker) const {
    const int64_t count = ceil_div(n, multiple), workers = shared_.workers_per_part;
    return {std::min(n, count * worker / workers * multiple), std::min(n, count * (worker + 1) / workers * multiple)};
  }

  Unit unit_;
  UnitPointers pointers_;
  UnitKernel kernel_;
  Partition alone_, shared_;
  int64_t result_bytes_;
};

struct Batch {
  int64_t images;
  const char* x;
  int64_t x_bytes;  // of an image
  char* result;     // of the last step
};

// Phases that run the steps on each image of the batch.
inline std::vector<Phase> phases_of(const std::vector<std::unique_ptr<Step>>& steps, const Batch& batch) {
  int64_t largest = 0, shared = 0;
  for (size_t i = 0; i < steps.size(); ++i) {
    if (i + 1 < steps.size()) largest = std::max(largest, steps[i]->result_bytes());
    shared = std::max(shared, steps[i]->shared_bytes());
  }
  // Calls visit(step, from, to) for the steps of an image, the results in between in `images`.
  const auto each_step = [&steps, batch, largest](int64_t image, bool shared, Scratch(&images)[2], const auto& visit) {
    const char* from = batch.x + image * batch.x_bytes;
    char* at = nullptr;  // `from`, where it is one of the images
    int next = 0;
    for (size_t i = 0; i < steps.size(); ++i) {
      const Step& step = *steps[i];
      if (i + 1 == steps.size()) {
        at = batch.result + image * step.result_bytes();
      } else if (!at || !step.works_in_place(shared)) {
        at = images[next].reserve(largest);
        next = 1 - next;
      }
      visit(static_cast<int64_t>(i), from, at);
      from = at;
    }
  };
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t left = batch.images % threads;
  // Shared steps use the threads less well than images of their own, but leave none without work.
  const int64_t alone = 2 * left > threads ? batch.images : batch.images - left;
  std::vector<Phase> phases;
  if (alone > 0) {
    phases.push_back({kTimedInside, alone, [each_step, &steps](int64_t image) {
                        Stopwatch stopwatch(current_profile);
                        each_step(image, false, thread_images, [&](int64_t i, const char* from, char* to) {
                          steps[i]->run(from, to);
                          stopwatch.lap(i);
                        });
                      }});
  }
  void* const buffers = shared_buffers.reserve(shared);
  for (int64_t image = alone; image < batch.images; ++image) {
    each_step(image, true, shared_images,
              [&](int64_t i, const char* from, char* to) { steps[i]->share(i, from, to, buffers, phases); });
  }
  return phases;
}

}  // namespace shufflenet::cpu
