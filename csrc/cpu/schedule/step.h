// What is done to each image of a batch, step by step, and how torch's threads share that: as many whole images as
// there are threads go through all steps on one thread each, and so stay in its caches; the threads share the steps of
// the images that are left. All of it is one parallel region.
#pragma once

#include <string>
#include <vector>

#include "memory.h"
#include "phases.h"

namespace shufflenet::cpu {

// A thread's memory: what the phases of a unit hand on to each other, what they work in, the two images between which
// the steps go back and forth, and what threads it called share of the first and the last.
inline thread_local Scratch thread_buffers, thread_workspace, shared_buffers;
inline thread_local Scratch thread_images[2] = {Scratch(Scratch::Pages::huge), Scratch(Scratch::Pages::huge)};
inline thread_local Scratch shared_images[2] = {Scratch(Scratch::Pages::huge), Scratch(Scratch::Pages::huge)};

// How an image goes through a step.
struct PassDescription {
  std::string cut;          // into what the work is cut
  std::vector<Tile> tiles;  // of its pointwise convolutions
  int64_t bytes = 0;        // what a thread works in beside weights, input and result
};

struct StepDescription {
  std::vector<int64_t> input, output;  // sizes of an image
  int64_t multiply_adds = 0;           // of an image
  int64_t weights_and_biases = 0;
  PassDescription alone, shared;  // run by one thread; shared by all
  std::string name = {};          // of what is not a step of the program
};

inline std::string cut_into(int64_t n, const char* parts) { return n == 1 ? "whole" : std::to_string(n) + " " + parts; }

// Made in a CallMemory, and so never destroyed: it owns nothing.
class Step {
 public:
  virtual StepDescription describe() const = 0;

 protected:
  ~Step() = default;
};

// A step that takes one image at a time.
class ImageStep : public Step {
 public:
  virtual int64_t result_bytes() const = 0;
  // Bytes of what threads that share the step hand on to each other, for each strip.
  virtual int64_t shared_bytes() const { return 0; }
  // Into how many strips threads that share the step cut its work, and whether they are to cut its result as well.
  virtual int64_t strips() const { return 1; }
  virtual bool cuts_result() const { return false; }
  virtual int64_t strip_bytes() const { return 0; }  // of a result that is cut
  virtual bool reads_strips(int64_t) const { return false; }
  // Whether the result may take the place of what it is computed from: run by one thread, or shared. And whether it
  // must, as a part of it is there already: then the step is neither the first nor the last.
  virtual bool works_in_place(bool) const { return false; }
  virtual bool must_work_in_place() const { return false; }

  // Runs it by one thread. A step goes through the image from the top to the bottom, the next one from the bottom to
  // the top: it begins where the caches still have the image.
  virtual void run(const void* from, void* to, bool upwards) const = 0;

  // Appends the phases that run it by several threads.
  struct Sharers {
    int64_t step;
    const void* from;
    void* to;
    bool from_is_cut, to_is_cut;
    int64_t strip_bytes;  // of a cut image, the most of all steps
    char* buffers;
    int64_t shared_bytes;  // the most of all steps
    Phases& phases;
  };
  virtual void share(const Sharers&) const = 0;
};

// The images of a call that go through all steps on one thread each, and those whose steps are shared.
struct Images {
  int64_t alone, shared;
};

// Shares out a batch. Shared steps use the threads less well, but leave none without work.
inline Images images_of(int64_t images, int64_t threads) {
  const int64_t left = images % threads, shared = 2 * left > threads ? 0 : left;
  return {images - shared, shared};
}

struct Batch {
  Images images;
  const void* x;
  int64_t x_bytes;  // from image to image
  void* result;     // of the last step
};

using ImageSteps = std::vector<const ImageStep*>;

// Whether what threads that share the steps hand on from each is cut into strips. Steps that must work in place leave
// an image as it is: cut from the step that makes it to the last of them, or whole.
inline const bool* cut_results(const ImageSteps& steps, CallMemory& memory) {
  const size_t n = steps.size();
  bool* const is_cut = memory.array<bool>(static_cast<int64_t>(n));
  for (size_t i = 0; i < n; ++i) {
    is_cut[i] = i + 1 < n && steps[i]->cuts_result() && steps[i + 1]->reads_strips(steps[i]->strips());
  }
  const auto both = [&](size_t i) {
    if (steps[i]->must_work_in_place()) is_cut[i - 1] = is_cut[i] = is_cut[i - 1] && is_cut[i];
  };
  for (size_t i = 1; i < n; ++i) both(i);
  for (size_t i = n; i-- > 1;) both(i);
  return is_cut;
}

// Adds the phases that run the steps on each image of the batch. They refer to `steps`.
inline void add_phases(const ImageSteps& steps, const Batch& batch, Phases& phases) {
  int64_t largest = 0, strip_bytes = 0, shared_bytes = 0, strips = 1;
  for (size_t i = 0; i < steps.size(); ++i) {
    if (i + 1 < steps.size()) {
      largest = std::max(largest, steps[i]->result_bytes());
      strip_bytes = std::max(strip_bytes, steps[i]->strip_bytes());
    }
    shared_bytes = std::max(shared_bytes, steps[i]->shared_bytes());
    strips = std::max(strips, steps[i]->strips());
  }
  largest = std::max(largest, strips * strip_bytes);
  const bool* const is_cut = cut_results(steps, phases.memory());
  // Calls visit(i, from, to) for the steps of an image, the results in between in `images`.
  const auto each_step =
      [&steps, batch, largest, is_cut](int64_t image, bool shared, Scratch(&images)[2], const auto& visit) {
        const char* from = static_cast<const char*>(batch.x) + image * batch.x_bytes;
        char* at = nullptr;  // `from`, where it is one of the images
        int next = 0;
        for (size_t i = 0; i < steps.size(); ++i) {
          const ImageStep& step = *steps[i];
          const bool same_layout = !shared || (i > 0 && is_cut[i - 1]) == is_cut[i];
          if (i + 1 == steps.size()) {
            at = static_cast<char*>(batch.result) + image * step.result_bytes();
          } else if (!at || !same_layout || !step.works_in_place(shared)) {
            at = images[next].reserve(largest + kPairsSlackBytes);
            next = 1 - next;
          }
          visit(i, from, at);
          from = at;
        }
      };
  if (batch.images.alone > 0) {
    phases.add(kTimedInside, batch.images.alone, [each_step, &steps](int64_t image) {
      each_step(image, false, thread_images, [&](size_t i, const char* from, char* to) {
        steps[i]->run(from, to, i % 2 == 1);
        current_stopwatch->lap(static_cast<int64_t>(i));
      });
    });
  }
  char* const buffers = shared_buffers.reserve(strips * shared_bytes);
  for (int64_t image = batch.images.alone; image < batch.images.alone + batch.images.shared; ++image) {
    each_step(image, true, shared_images, [&](size_t i, const char* from, char* to) {
      steps[i]->share({static_cast<int64_t>(i), from, to, i > 0 && is_cut[i - 1], is_cut[i], strip_bytes, buffers,
                       shared_bytes, phases});
    });
  }
}

}  // namespace shufflenet::cpu
