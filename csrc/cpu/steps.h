// What is done to each image of a batch, step by step, and how torch's threads share that: as many whole images as
// there are threads go through all steps on one thread each, and so stay in its caches; the threads share the steps of
// the images that are left. All of it is one parallel region.
#pragma once

#include <vector>

#include "../program.h"
#include "describe.h"
#include "partition.h"
#include "phases.h"
#include "prepared.h"
#include "scratch.h"

namespace shufflenet::cpu {

// A thread's memory: about twice kScratchBudget for the buffers and scratch of a part (more where one row of a unit
// needs it), the two images between which the steps go back and forth, and what threads it called share.
inline thread_local Scratch thread_buffers, thread_scratch, shared_buffers;
inline thread_local Scratch thread_images[2] = {Scratch(Scratch::Pages::huge), Scratch(Scratch::Pages::huge)};
inline thread_local Scratch shared_images[2] = {Scratch(Scratch::Pages::huge), Scratch(Scratch::Pages::huge)};

// An image between two steps. Planes of elements as large as the accumulator type can be cut into strips of rows, each
// of which then has memory of its own, so that threads write no cache line together. A strip has the same memory
// whatever the step, which stays in its thread's cache.
struct ImageLayout {
  int64_t channels = 0, height = 0, width = 0;
  int64_t plane = 0;  // elements from plane to plane, where it is not cut
  int64_t strips = 1;
  int64_t strip_bytes = 0;  // from strip to strip

  int64_t row(int64_t strip) const { return height * strip / strips; }
  int64_t strip_plane(int64_t strip) const { return padded((row(strip + 1) - row(strip)) * width); }
  // Planes start with a cache line.
  static int64_t padded(int64_t pixels) { return plane_lines(ceil_div(pixels, kPackedAlignment)) * kPackedAlignment; }

  // A strip of a cut image, or some rows from `first` on of one that is not.
  template <class A>
  RowsOfImage rows(const void* data, int64_t strip, int64_t first) const {
    char* const begin = static_cast<char*>(const_cast<void*>(data));
    if (strips == 1) return {begin + first * width * static_cast<int64_t>(sizeof(A)), plane};
    return {begin + strip * strip_bytes, strip_plane(strip)};
  }
};

// Made in a CallMemory, and so never destroyed: it owns nothing.
class Step {
 public:
  virtual int64_t result_bytes() const = 0;
  // Of what threads that share the step hand on to each other, by strip.
  virtual int64_t shared_bytes() const { return 0; }
  // Into how many strips threads that share the step cut its work, and whether they are to cut its result as well.
  virtual int64_t strips() const { return 1; }
  virtual bool cuts_result() const { return false; }
  virtual int64_t strip_bytes() const { return 0; }  // of a result that is cut
  virtual bool reads_strips(int64_t) const { return false; }
  // Whether the result may take the place of what it is computed from: run by one thread, or shared.
  virtual bool works_in_place(bool) const { return false; }
  // By one thread. A step goes through the image from the top to the bottom, the next one from the bottom to the top:
  // it begins where the caches still have the image.
  virtual void run(const void* from, void* to, bool upwards) const = 0;
  // By several threads: appends phases.
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
  virtual StepDescription describe() const = 0;

 protected:
  ~Step() = default;
};

// Of the images of a call, those that go through all steps on one thread each, and those whose steps are shared.
struct Images {
  int64_t alone, shared;
};

// Shared steps use the threads less well, but leave none without work.
inline Images images_of(int64_t images, int64_t threads) {
  const int64_t left = images % threads, shared = 2 * left > threads ? 0 : left;
  return {images - shared, shared};
}

template <class A>
class UnitStep final : public Step {
 public:
  // The pointers' x and result are void. Can run, or be shared, only where there are images for that.
  UnitStep(const Unit& unit, const UnitPointers& pointers, const UnitKernel& kernel, int64_t threads,
           const Images& images)
      : unit_(unit), pointers_(pointers), kernel_(kernel), threads_(threads) {
    const int64_t lanes = isa().vector_bytes / static_cast<int64_t>(sizeof(A));
    const bool has_strips = unit.has_conv3() && !kernel_.is_staged(unit);
    if (images.alone > 0) alone_ = choose_partition(unit_, kernel_, lanes, 1, has_strips);
    if (images.shared > 0) shared_ = choose_partition(unit_, kernel_, lanes, threads, has_strips);
  }

  int64_t result_bytes() const override {
    const bool planes = unit_.layout == Layout::contiguous;
    const int64_t plane = planes ? pointers_.result_plane : unit_.out_height() * unit_.out_width();
    return unit_.result_channels() / kernel_.channels_per_element * plane * kernel_.element_bytes;
  }

  int64_t shared_bytes() const override {
    int64_t most = 0;
    for (int64_t i = 0; i < shared_.strips; ++i) {
      const Part part = shared_.part(unit_, i);
      if (shared_.sharing == Sharing::strips) most = std::max(most, strip_memory(part));
      if (shared_.sharing == Sharing::channels) most = std::max(most, kernel_.buffer_bytes(unit_, part));
    }
    return most;
  }

  int64_t strips() const override { return shared_.sharing == Sharing::strips ? shared_.strips : 1; }

  // Large planes stay whole: a cut goes through few of their lines, and behind a step whose result is whole, as that of
  // strips with halo is, the image can only be worked on in place if it stays so.
  bool cuts_result() const override {
    constexpr int64_t kLargePlaneBytes = 32 * 1024;
    return strips() > 1 && pointers_.result_plane * kernel_.element_bytes < kLargePlaneBytes;
  }

  int64_t strip_bytes() const override {
    if (!cuts_result()) return 0;
    const ImageLayout result = result_layout(true);  // no strip is larger than the last
    return result.channels * result.strip_plane(strips() - 1) * kernel_.element_bytes;
  }

  bool reads_strips(int64_t strips) const override {
    bool same = strips == this->strips();
    const ImageLayout x = x_layout(same);
    for (int64_t i = 1; same && i < strips; ++i) same = x.row(i) == shared_.part(unit_, i).row_begin * unit_.stride;
    return same;
  }

  // Where a part is the whole image, or has its own rows only, all of x but the residual has been read before the
  // result is written.
  bool works_in_place(bool shared) const override {
    const Partition& partition = shared ? shared_ : alone_;
    return unit_.adds_residual() && pointers_.x_plane == pointers_.result_plane &&
           (partition.strips == 1 || partition.sharing == Sharing::strips);
  }

  void run(const void* from, void* to, bool upwards) const override {
    if (alone_.sharing == Sharing::strips) {
      run_strips(from, to, upwards);
    } else {
      for (int64_t i = 0; i < alone_.strips; ++i) run_part(pointers(from, to), alone_.part(unit_, i));
    }
  }

  void share(const Sharers& s) const override {
    const UnitPointers pointers = this->pointers(s.from, s.to);
    if (shared_.sharing == Sharing::strips) {
      share_strips(s);
    } else if (shared_.sharing == Sharing::channels) {
      for (int64_t i = 0; i < shared_.strips; ++i) share_part(s, pointers, shared_.part(unit_, i));
    } else {
      s.phases.add(s.step, shared_.strips, [this, pointers](int64_t i) { run_part(pointers, shared_.part(unit_, i)); });
    }
  }

  StepDescription describe() const override {
    return {{unit_.in_channels, unit_.height, unit_.width},
            {unit_.result_channels(), unit_.out_height(), unit_.out_width()},
            unit_.multiply_adds(),
            unit_.weights_and_biases(),
            describe(alone_, 1),
            describe(shared_, workers())};
  }

 private:
  // Of a strip: its y1, and what it lends.
  int64_t strip_memory(const Part& part) const {
    return kernel_.strip_bytes(unit_, part) + kernel_.lent_bytes(unit_, part);
  }

  // A unit without conv3 has what it staged copied out.
  bool has_project() const { return unit_.has_conv3() || kernel_.is_staged(unit_); }
  int64_t projected_channels() const { return unit_.has_conv3() ? unit_.out_channels : unit_.mid_channels; }

  // Threads that share a part by channels: a thread has a channel of each slice at least.
  int64_t workers() const { return std::min(threads_, unit_.slice_channels()); }

  RunDescription describe(const Partition& partition, int64_t workers) const {
    const bool by_channels = partition.sharing == Sharing::channels, strips = partition.sharing == Sharing::strips;
    if (!by_channels) workers = 1;
    RunDescription run;
    if (partition.strips > 1 || !by_channels)
      run.cut = cut_into(partition.strips, strips ? "strips" : "strips with halo");
    if (by_channels) run.cut += (run.cut.empty() ? "" : ", ") + cut_into(workers, "channel shares");
    const Channels mid = {0, ceil_div(unit_.mid_channels, workers)};
    for (int64_t i = 0; i < partition.strips; ++i) {
      const Part part = partition.part(unit_, i);
      const int64_t bytes = strips ? strip_memory(part) + kernel_.strip_scratch_bytes(unit_, part)
                                   : kernel_.buffer_bytes(unit_, part) + kernel_.scratch_bytes(unit_, part, mid);
      run.bytes = std::max(run.bytes, bytes);
    }
    const Part last = partition.part(unit_, partition.strips - 1);  // no other is larger
    const int64_t x_begin = std::max<int64_t>(0, last.row_begin * unit_.stride - (strips ? 0 : 1));
    const int64_t plane = unit_.height * unit_.width, out_plane = unit_.out_height() * unit_.out_width();
    const int64_t rows1 = std::min(mid.count(), unit_.conv1_group_rows());
    const int64_t rows3 = std::min(ceil_div(unit_.out_channels, workers), unit_.out_channels / unit_.groups);
    run.tiles = {kernel_.tile(rows1, plane - x_begin * unit_.width, plane),
                 kernel_.tile(rows3, out_plane - last.row_begin * unit_.out_width(), out_plane)};
    return run;
  }

  UnitPointers pointers(const void* from, void* to) const {
    UnitPointers result = pointers_;
    result.x = from;
    result.result = to;
    return result;
  }

  // Cut ones have so many bytes from strip to strip.
  ImageLayout x_layout(bool is_cut, int64_t strip_bytes = 0) const {
    return layout(unit_.in_channels, unit_.height, unit_.width, pointers_.x_plane, is_cut, strip_bytes);
  }
  ImageLayout result_layout(bool is_cut, int64_t strip_bytes = 0) const {
    return layout(
        unit_.result_channels(), unit_.out_height(), unit_.out_width(), pointers_.result_plane, is_cut, strip_bytes);
  }
  ImageLayout layout(int64_t channels, int64_t height, int64_t width, int64_t plane, bool is_cut,
                     int64_t strip_bytes) const {
    return {channels / kernel_.channels_per_element, height, width, plane, is_cut ? strips() : 1, strip_bytes};
  }

  void run_part(const UnitPointers& pointers, const Part& part) const {
    const Channels mid = {0, unit_.mid_channels};
    void* const buffers = thread_buffers.reserve(kernel_.buffer_bytes(unit_, part));
    void* const scratch = thread_scratch.reserve(kernel_.scratch_bytes(unit_, part, mid));
    kernel_.stage(unit_, pointers, part, {0, unit_.in_channels}, buffers);
    kernel_.expand(unit_, pointers, part, mid, buffers, scratch);
    if (has_project()) kernel_.project(unit_, pointers, part, {0, projected_channels()}, buffers, scratch);
  }

  // The strips of a partition, with the memory that the i-th has of each kind.
  template <class Y1OfStrip, class LentOfStrip>
  Strip* strips_of(CallMemory& memory, const Partition& partition, const ImageLayout& x, const void* from,
                   const ImageLayout& result, const void* to, const Y1OfStrip& y1, const LentOfStrip& lent) const {
    Strip* const strips = memory.array<Strip>(partition.strips);
    for (int64_t i = 0; i < partition.strips; ++i) {
      Strip& strip = *new (&strips[i]) Strip;
      strip.part = partition.part(unit_, i);
      const int64_t first = strip.part.row_begin * unit_.stride;
      strip.x = x.rows<A>(from, i, first);
      strip.result = result.rows<A>(to, i, strip.part.row_begin);
      strip.y1 = y1(i);
      strip.lent = lent(i);
      if (i > 0) {
        Strip& above = strips[i - 1];
        strip.above = &above;
        above.below = &strip;
        const int64_t rows_above = first - above.part.row_begin * unit_.stride;
        strip.x_above = {static_cast<A*>(above.x.data) + (rows_above - 1) * unit_.width, above.x.plane};
      }
    }
    return strips;
  }

  using StripPhase = void (*)(const Unit&, const UnitPointers&, const Strip&, void*);
  void run_strip(StripPhase phase, const Strip& strip) const {
    phase(unit_, pointers_, strip, thread_scratch.reserve(kernel_.strip_scratch_bytes(unit_, strip.part)));
  }

  // One strip behind the other: the next one is expanded before one is projected, so that memory for the y1 of two is
  // enough, and for what three lend.
  void run_strips(const void* from, void* to, bool upwards) const {
    int64_t bytes = 0, lent_bytes = 0;
    for (int64_t i = 0; i < alone_.strips; ++i) {
      bytes = std::max(bytes, kernel_.strip_bytes(unit_, alone_.part(unit_, i)));
      lent_bytes = std::max(lent_bytes, kernel_.lent_bytes(unit_, alone_.part(unit_, i)));
    }
    char* const y1 = thread_buffers.reserve(2 * bytes + 3 * lent_bytes);
    char* const lent = y1 + 2 * bytes;
    CallMemory memory;
    const Strip* const strips = strips_of(
        memory, alone_, x_layout(false), from, result_layout(false), to, [=](int64_t i) { return y1 + i % 2 * bytes; },
        [=](int64_t i) { return lent + i % 3 * lent_bytes; });
    const auto strip = [&](int64_t i) -> const Strip& { return strips[upwards ? alone_.strips - 1 - i : i]; };
    for (int64_t i = 0; i <= alone_.strips; ++i) {
      if (i < alone_.strips) run_strip(kernel_.expand_strip, strip(i));
      if (i > 0) run_strip(kernel_.project_strip, strip(i - 1));
    }
  }

  void share_strips(const Sharers& s) const {
    const auto y1 = [&s](int64_t i) { return s.buffers + i * s.shared_bytes; };
    const auto lent = [&](int64_t i) { return y1(i) + kernel_.strip_bytes(unit_, shared_.part(unit_, i)); };
    const Strip* const strips = strips_of(s.phases.memory(), shared_, x_layout(s.from_is_cut, s.strip_bytes), s.from,
                                          result_layout(s.to_is_cut, s.strip_bytes), s.to, y1, lent);
    for (const StripPhase phase : {kernel_.expand_strip, kernel_.project_strip}) {
      s.phases.add(s.step, shared_.strips, [=](int64_t i) { run_strip(phase, strips[i]); });
    }
  }

  // The threads share each phase of the part by channels: nothing is computed twice.
  void share_part(const Sharers& s, const UnitPointers& pointers, const Part& part) const {
    const int64_t workers = this->workers();
    void* const buffers = s.buffers;
    // A worker's share of n channels, in multiples of `multiple`.
    const auto share_of = [workers](int64_t n, int64_t multiple, int64_t worker) {
      const int64_t count = ceil_div(n, multiple);
      return Channels{
          std::min(n, count * worker / workers * multiple), std::min(n, count * (worker + 1) / workers * multiple)};
    };
    if (kernel_.is_staged(unit_)) {
      s.phases.add(s.step, workers, [=](int64_t i) {
        kernel_.stage(unit_, pointers, part, share_of(unit_.in_channels, 16, i), buffers);
      });
    }
    s.phases.add(s.step, workers, [=](int64_t i) {
      const int64_t multiple = kernel_.expand_multiple(unit_);
      const Channels channels = share_of(unit_.mid_channels, multiple, i);
      void* const scratch = thread_scratch.reserve(kernel_.scratch_bytes(unit_, part, channels));
      kernel_.expand(unit_, pointers, part, channels, buffers, scratch);
    });
    if (!has_project()) return;
    s.phases.add(s.step, workers, [=](int64_t i) {
      void* const scratch = thread_scratch.reserve(kernel_.scratch_bytes(unit_, part, {}));
      const Channels channels = share_of(projected_channels(), kernel_.project_multiple, i);
      kernel_.project(unit_, pointers, part, channels, buffers, scratch);
    });
  }

  Unit unit_;
  UnitPointers pointers_;
  UnitKernel kernel_;
  int64_t threads_;
  Partition alone_, shared_;
};

struct Batch {
  Images images;
  const char* x;
  int64_t x_bytes;  // of an image
  char* result;     // of the last step
};

using Steps = std::vector<const Step*>;

// Adds the phases that run the steps on each image of the batch. They refer to `steps`.
inline void add_phases(const Steps& steps, const Batch& batch, Phases& phases) {
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
  // Whether what threads that share the steps hand on from step i is cut into strips.
  const auto is_cut = [&steps](size_t i) {
    return i + 1 < steps.size() && steps[i]->cuts_result() && steps[i + 1]->reads_strips(steps[i]->strips());
  };
  // Calls visit(i, from, to) for the steps of an image, the results in between in `images`.
  const auto each_step =
      [&steps, batch, largest, is_cut](int64_t image, bool shared, Scratch(&images)[2], const auto& visit) {
        const char* from = batch.x + image * batch.x_bytes;
        char* at = nullptr;  // `from`, where it is one of the images
        int next = 0;
        for (size_t i = 0; i < steps.size(); ++i) {
          const Step& step = *steps[i];
          const bool same_layout = !shared || (i > 0 && is_cut(i - 1)) == is_cut(i);
          if (i + 1 == steps.size()) {
            at = batch.result + image * step.result_bytes();
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
      steps[i]->share({static_cast<int64_t>(i), from, to, i > 0 && is_cut(i - 1), is_cut(i), strip_bytes, buffers,
                       shared_bytes, phases});
    });
  }
}

}  // namespace shufflenet::cpu
