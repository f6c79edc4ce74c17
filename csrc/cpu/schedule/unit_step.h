// A unit as a step: cut into parts, which run one behind the other or are shared by threads.
#pragma once

#include "partition.h"
#include "step.h"

namespace shufflenet::cpu {

// An image between two steps. Its planes can be cut into strips of rows, each of which then has memory of its own, so
// that threads write no cache line together. A strip has the same memory whatever the step, which stays in its thread's
// cache.
struct ImageLayout {
  int64_t height, width;
  int64_t plane;  // elements from plane to plane, where it is not cut
  int64_t element_bytes;
  int64_t strips;       // 1: it is not cut
  int64_t strip_bytes;  // from strip to strip

  int64_t row(int64_t strip) const { return height * strip / strips; }
  int64_t strip_plane(int64_t strip) const { return padded_plane((row(strip + 1) - row(strip)) * width); }

  // Where a strip of a cut image lies, or some rows from `first` on of one that is not.
  ImageRows rows(const void* data, int64_t strip, int64_t first) const {
    char* const begin = static_cast<char*>(const_cast<void*>(data));
    if (strips == 1) return {begin + first * width * element_bytes, plane};
    return {begin + strip * strip_bytes, strip_plane(strip)};
  }
};

class UnitStep final : public ImageStep {
 public:
  // The pointers' x and result are void. Can run, or be shared, only where there are images for that.
  UnitStep(const Unit& unit, const UnitPointers& pointers, const UnitKernel& kernel, int64_t threads,
           const Images& images)
      : unit_(unit), pointers_(pointers), kernel_(kernel), threads_(threads) {
    const bool has_strips = unit.has_conv3() && !kernel_.is_copied(unit);
    const bool in_place = must_work_in_place();
    if (images.alone > 0) alone_ = choose_partition(unit_, kernel_, 1, has_strips, in_place);
    if (images.shared > 0) shared_ = choose_partition(unit_, kernel_, threads, has_strips, in_place);
  }

  int64_t result_bytes() const override {
    const bool planes = unit_.layout == Layout::contiguous;
    const int64_t plane = planes ? pointers_.result_plane : unit_.out_height() * unit_.out_width();
    return kernel_.image_bytes(unit_.result_channels(), plane);
  }

  int64_t shared_bytes() const override {
    int64_t most = 0;
    for (int64_t i = 0; i < shared_.parts; ++i) {
      const Range rows = shared_.rows(unit_, i);
      if (shared_.sharing == Sharing::strips) most = std::max(most, strip_memory(rows));
      if (shared_.sharing == Sharing::channels) most = std::max(most, kernel_.buffer_bytes(unit_, rows));
    }
    return most;
  }

  int64_t strips() const override { return shared_.sharing == Sharing::strips ? shared_.parts : 1; }

  // Large planes stay whole: a cut goes through few of their lines, and behind a step whose result is whole, as that of
  // strips with halo is, the image can only be worked on in place if it stays so.
  bool cuts_result() const override {
    constexpr int64_t kLargePlaneBytes = 32 * 1024;
    return strips() > 1 && pointers_.result_plane * kernel_.element_bytes() < kLargePlaneBytes;
  }

  int64_t strip_bytes() const override {
    if (!cuts_result()) return 0;
    const int64_t plane = result_layout(true).strip_plane(strips() - 1);  // no strip is larger than the last
    return kernel_.image_bytes(unit_.result_channels(), plane);
  }

  bool reads_strips(int64_t strips) const override {
    bool same = strips == this->strips();
    const ImageLayout x = x_layout(same);
    for (int64_t i = 1; same && i < strips; ++i) same = x.row(i) == shared_.rows(unit_, i).begin * unit_.stride;
    return same;
  }

  // The half that passes by stays in its planes.
  bool must_work_in_place() const override { return unit_.passes_half() && pointers_.conv3_planes; }

  // Where a part is the whole image, or has its own rows only, all of x but the residual has been read before the
  // result is written.
  bool works_in_place(bool shared) const override {
    if (must_work_in_place()) return true;
    const Partition& partition = shared ? shared_ : alone_;
    return unit_.adds_residual() && pointers_.x_plane == pointers_.result_plane &&
           (partition.parts == 1 || partition.sharing == Sharing::strips);
  }

  void run(const void* from, void* to, bool upwards) const override {
    if (alone_.sharing == Sharing::strips) return run_strips(from, to, upwards);
    const UnitPointers pointers = this->pointers(from, to);
    for (int64_t i = 0; i < alone_.parts; ++i) run_part(pointers, alone_.rows(unit_, i));
  }

  void share(const Sharers& s) const override {
    if (shared_.sharing == Sharing::strips) return share_strips(s);
    const UnitPointers& pointers = *s.phases.memory().make<UnitPointers>(this->pointers(s.from, s.to));
    if (shared_.sharing == Sharing::channels) {
      for (int64_t i = 0; i < shared_.parts; ++i) share_part(s, {unit_, pointers, shared_.rows(unit_, i), s.buffers});
    } else {
      s.phases.add(s.step, shared_.parts, [this, &pointers](int64_t i) { run_part(pointers, shared_.rows(unit_, i)); });
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
  int64_t strip_memory(Range rows) const {
    const StripBytes bytes = kernel_.strip_bytes(unit_, rows);
    return bytes.y1 + bytes.lent;
  }

  // Threads that share a part by channels: a thread has a channel of each slice at least.
  int64_t workers() const { return std::min(threads_, unit_.slice_channels()); }

  PassDescription describe(const Partition& partition, int64_t workers) const {
    const bool by_channels = partition.sharing == Sharing::channels, strips = partition.sharing == Sharing::strips;
    if (!by_channels) workers = 1;
    PassDescription pass;
    if (partition.parts > 1 || !by_channels)
      pass.cut = cut_into(partition.parts, strips ? "strips" : "strips with halo");
    if (by_channels) pass.cut += (pass.cut.empty() ? "" : ", ") + cut_into(workers, "channel shares");
    const int64_t mid = ceil_div(unit_.mid_channels, workers);
    for (int64_t i = 0; i < partition.parts; ++i) {
      const Range rows = partition.rows(unit_, i);
      const int64_t bytes = strips ? strip_memory(rows) + kernel_.strip_bytes(unit_, rows).workspace
                                   : kernel_.buffer_bytes(unit_, rows) + kernel_.workspace_bytes(unit_, rows, mid);
      pass.bytes = std::max(pass.bytes, bytes);
    }
    const Range last = partition.rows(unit_, partition.parts - 1);  // no other is larger
    const int64_t x_begin = std::max<int64_t>(0, last.begin * unit_.stride - (strips ? 0 : 1));
    const int64_t plane = unit_.height * unit_.width, out_plane = unit_.out_height() * unit_.out_width();
    const int64_t rows1 = std::min(mid, unit_.conv1_group_rows());
    const int64_t rows3 = std::min(ceil_div(unit_.out_channels, workers), unit_.out_channels / unit_.groups);
    pass.tiles = {kernel_.tile(rows1, plane - x_begin * unit_.width, plane),
                  kernel_.tile(rows3, out_plane - last.begin * unit_.out_width(), out_plane)};
    return pass;
  }

  UnitPointers pointers(const void* from, void* to) const {
    UnitPointers result = pointers_;
    result.x = from;
    result.result = to;
    return result;
  }

  // Cut ones have so many bytes from strip to strip.
  ImageLayout x_layout(bool is_cut, int64_t strip_bytes = 0) const {
    return {unit_.height, unit_.width, pointers_.x_plane, kernel_.element_bytes(), is_cut ? strips() : 1, strip_bytes};
  }
  ImageLayout result_layout(bool is_cut, int64_t strip_bytes = 0) const {
    return {unit_.out_height(),      unit_.out_width(),     pointers_.result_plane,
            kernel_.element_bytes(), is_cut ? strips() : 1, strip_bytes};
  }

  // The last phase computes conv3; where there is none, it copies the result where it must be copied.
  bool has_last_phase() const { return unit_.has_conv3() || kernel_.is_copied(unit_); }
  int64_t last_channels() const { return unit_.has_conv3() ? unit_.out_channels : unit_.mid_channels; }

  void run_part(const UnitPointers& pointers, Range rows) const {
    const UnitPart part = {unit_, pointers, rows, thread_buffers.reserve(kernel_.buffer_bytes(unit_, rows))};
    void* const workspace = thread_workspace.reserve(kernel_.workspace_bytes(unit_, rows, unit_.mid_channels));
    kernel_.copy_in(part, {0, unit_.in_channels});
    kernel_.conv1_and_depthwise(part, {0, unit_.mid_channels}, workspace);
    if (has_last_phase()) kernel_.conv3(part, {0, last_channels()}, workspace);
  }

  // The threads share each phase of the part by channels: nothing is computed twice.
  void share_part(const Sharers& s, const UnitPart& part) const {
    const int64_t workers = this->workers();
    // Adds a phase that calls run with each worker's share of n channels, in multiples of `multiple`.
    const auto share = [&](int64_t n, int64_t multiple, const auto& run) {
      s.phases.add(s.step, workers, [=](int64_t i) {
        const auto begin = [=](int64_t worker) {
          return std::min(n, ceil_div(n, multiple) * worker / workers * multiple);
        };
        run(Range{begin(i), begin(i + 1)});
      });
    };
    const auto workspace = [this, part](int64_t mid) {
      return thread_workspace.reserve(kernel_.workspace_bytes(unit_, part.rows, mid));
    };
    if (kernel_.is_copied(unit_)) {
      share(unit_.in_channels, 16, [this, part](Range channels) { kernel_.copy_in(part, channels); });
    }
    share(unit_.mid_channels, kernel_.mid_multiple(unit_),
          [=](Range mid) { kernel_.conv1_and_depthwise(part, mid, workspace(mid.count())); });
    if (!has_last_phase()) return;
    share(last_channels(), kernel_.channels_per_element(),
          [=](Range channels) { kernel_.conv3(part, channels, workspace(0)); });
  }

  // The strips of a partition, with the memory that the i-th has of each kind.
  template <class Y1OfStrip, class LentOfStrip>
  Strip* strips_of(CallMemory& memory, const Partition& partition, const ImageLayout& x, const void* from,
                   const ImageLayout& result, const void* to, const Y1OfStrip& y1, const LentOfStrip& lent) const {
    Strip* const strips = memory.array<Strip>(partition.parts);
    for (int64_t i = 0; i < partition.parts; ++i) {
      Strip& strip = *new (&strips[i]) Strip;
      strip.rows = partition.rows(unit_, i);
      const int64_t first = strip.rows.begin * unit_.stride;
      strip.x = x.rows(from, i, first);
      strip.result = result.rows(to, i, strip.rows.begin);
      strip.y1 = y1(i);
      strip.lent = lent(i);
      if (i > 0) {
        Strip& above = strips[i - 1];
        strip.above = &above;
        above.below = &strip;
        const int64_t rows_above = first - above.rows.begin * unit_.stride;
        const int64_t bytes = (rows_above - 1) * unit_.width * kernel_.element_bytes();
        strip.x_above = {static_cast<char*>(above.x.data) + bytes, above.x.plane};
      }
    }
    return strips;
  }

  using StripPhase = void (UnitKernel::*)(const Unit&, const UnitPointers&, const Strip&, void*) const;
  void run_strip(StripPhase phase, const Strip& strip) const {
    void* const workspace = thread_workspace.reserve(kernel_.strip_bytes(unit_, strip.rows).workspace);
    (kernel_.*phase)(unit_, pointers_, strip, workspace);
  }

  // One strip behind the other: the first phase of the next one comes before the second phase of one, so that memory
  // for the y1 of two is enough, and for what three lend.
  void run_strips(const void* from, void* to, bool upwards) const {
    int64_t bytes = 0, lent_bytes = 0;
    for (int64_t i = 0; i < alone_.parts; ++i) {
      const StripBytes strip = kernel_.strip_bytes(unit_, alone_.rows(unit_, i));
      bytes = std::max(bytes, strip.y1);
      lent_bytes = std::max(lent_bytes, strip.lent);
    }
    char* const y1 = thread_buffers.reserve(2 * bytes + 3 * lent_bytes);
    char* const lent = y1 + 2 * bytes;
    CallMemory memory;
    const Strip* const strips = strips_of(
        memory, alone_, x_layout(false), from, result_layout(false), to, [=](int64_t i) { return y1 + i % 2 * bytes; },
        [=](int64_t i) { return lent + i % 3 * lent_bytes; });
    const auto strip = [&](int64_t i) -> const Strip& { return strips[upwards ? alone_.parts - 1 - i : i]; };
    for (int64_t i = 0; i <= alone_.parts; ++i) {
      if (i < alone_.parts) run_strip(&UnitKernel::strip_conv1, strip(i));
      if (i > 0) run_strip(&UnitKernel::strip_depthwise_and_conv3, strip(i - 1));
    }
  }

  void share_strips(const Sharers& s) const {
    const auto y1 = [&s](int64_t i) { return s.buffers + i * s.shared_bytes; };
    const auto lent = [&](int64_t i) { return y1(i) + kernel_.strip_bytes(unit_, shared_.rows(unit_, i)).y1; };
    const Strip* const strips = strips_of(s.phases.memory(), shared_, x_layout(s.from_is_cut, s.strip_bytes), s.from,
                                          result_layout(s.to_is_cut, s.strip_bytes), s.to, y1, lent);
    for (const StripPhase phase : {&UnitKernel::strip_conv1, &UnitKernel::strip_depthwise_and_conv3}) {
      s.phases.add(s.step, shared_.parts, [=](int64_t i) { run_strip(phase, strips[i]); });
    }
  }

  Unit unit_;
  UnitPointers pointers_;
  const UnitKernel& kernel_;
  int64_t threads_;
  Partition alone_, shared_;
};

}  // namespace shufflenet::cpu
