// The pointwise convolutions of training. Planes of floats are convolved as they lie. Those of 16 bits are converted: a
// group's inputs once, and its results some rows at a time, which stay in the L2 cache until then.
#pragma once

#include "pointwise.h"
#include "training_planes.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

inline int64_t deepest_input(const TrainingPointwise& p) {
  int64_t depth = 0;
  for (int64_t i = 0; i < p.input_count; ++i) depth = std::max(depth, p.inputs[i].depth);
  return depth;
}

template <class A>
class PointwiseAsItLies {
 public:
  PointwiseAsItLies(const TrainingPointwise& p, void* memory)
      : p_(p), arena_(memory), lists_(arena_, p.rows, deepest_input(p)) {}
  int64_t bytes() const { return arena_.bytes(); }

  void run(Range rows) const {
    const Planes<A> y = {static_cast<A*>(p_.y), p_.pixels};
    for (int64_t i = 0; i < p_.input_count; ++i) {
      const auto& [x, weight, bias, depth] = p_.inputs[i];
      const Convolution conv = {weight, nullptr, bias};
      const auto* const added = static_cast<const A*>(i > 0 ? p_.y : p_.residual);
      // A pass goes over the whole batch, so no cache has an image of a large one. Of x and y the larger is prefetched.
      const int64_t in_channels = depth * p_.groups;
      Far far = Far::nothing;
      if (is_far<A>(std::max(in_channels, p_.rows) * p_.images, p_.pixels)) {
        far = in_channels >= p_.rows ? Far::x : Far::y;
      }
      grouped_pointwise<A>(
          {conv, p_.activation, depth, p_.rows / p_.groups}, rows, {static_cast<const A*>(x), p_.pixels}, p_.pixels,
          {added, p_.pixels}, y, 0, has_lone_pixel<A>(p_.pixels, p_.pixels), lists_, far);
    }
  }

 private:
  const TrainingPointwise& p_;
  Arena arena_;
  PointwiseLists<A> lists_;
};

// Planes of floats that 16-bit ones are converted to, and their convolution.
class ConvertedToFloats {
 public:
  using Element = float;

  ConvertedToFloats(Arena& arena, int64_t rows, int64_t depth) : lists_(arena, rows, depth) {}

  static int64_t planes(int64_t depth) { return depth; }
  template <class T>
  static void convert(const T* from, int64_t pixels, int64_t depth, Planes<float> to) {
    for (int64_t k = 0; k < depth; ++k) copy_plane(from + k * pixels, pixels, to.channel(k));
  }

  // Computes rows, all of a group, to planes from 0 on, or adds them to what is there.
  void convolve(const PointwiseInput& input, Range rows, int64_t pixels, Planes<const float> x, bool adds,
                Planes<float> to) const {
    const Convolution conv = {static_cast<const float*>(input.weight) + rows.begin * input.depth, nullptr,
                              static_cast<const float*>(input.bias) + rows.begin};
    grouped_pointwise<float>({conv, kNoActivation, input.depth, rows.count()}, {0, rows.count()}, x, pixels,
                             adds ? read_only(to) : Planes<const float>{}, to, 0, has_lone_pixel<float>(pixels, pixels),
                             lists_, Far::nothing);
  }

 private:
  PointwiseLists<float> lists_;
};

// T is the dtype of the planes in memory, of 16 bits.
template <class T, class Converted>
class ConvertedPointwise {
 public:
  using Element = typename Converted::Element;

  ConvertedPointwise(const TrainingPointwise& p, void* memory)
      : p_(p),
        arena_(memory),
        rows_at_once_(kRowsMultiple * std::clamp<int64_t>(kBytesAtOnce / (kRowsMultiple * p.pixels * 4), 1,
                                                          ceil_div(p.rows, kRowsMultiple))),
        converted_(arena_, rows_at_once_, deepest_input(p)),
        y_(arena_.planes<float>(rows_at_once_, p.pixels)) {
    for (int64_t i = 0; i < p.input_count; ++i) {
      x_[i] = arena_.planes<Element>(Converted::planes(p.inputs[i].depth), p.pixels);
    }
  }
  int64_t bytes() const { return arena_.bytes(); }

  void run(Range rows) const {
    const int64_t of_group = p_.rows / p_.groups;
    for (Range some = {rows.begin, 0}; some.begin < rows.end; some.begin = some.end) {
      const int64_t group = some.begin / of_group, group_end = std::min(rows.end, (group + 1) * of_group);
      if (some.begin == rows.begin || some.begin % of_group == 0) convert_inputs(group);
      some.end = std::min(group_end, some.begin + rows_at_once_);
      for (int64_t i = 0; i < p_.input_count; ++i) {
        converted_.convolve(p_.inputs[i], some, p_.pixels, read_only(x_[i]), i > 0, y_);
      }
      finish(some);
    }
  }

 private:
  static constexpr int64_t kBytesAtOnce = 128 * 1024;  // of results: a small part of an L2 cache
  static constexpr int64_t kRowsMultiple = 16;         // the rows of AMX's tiles, and two tiles of AVX-512's

  void convert_inputs(int64_t group) const {
    for (int64_t i = 0; i < p_.input_count; ++i) {
      const auto* const x = static_cast<const T*>(p_.inputs[i].x);
      const int64_t depth = p_.inputs[i].depth;
      Converted::convert(x + group * depth * p_.pixels, p_.pixels, depth, x_[i]);
    }
  }

  void finish(Range rows) const {
    using S = Simd<float>;
    const auto lower = S::broadcast(static_cast<float>(p_.activation.lower));
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const float* const from = y_.channel(row - rows.begin);
      T* const to = static_cast<T*>(p_.y) + row * p_.pixels;
      const T* const residual = p_.residual ? static_cast<const T*>(p_.residual) + row * p_.pixels : nullptr;
      each_vector<float>(p_.pixels, [&](int64_t i, int64_t n, auto is_tail) {
        auto value = S::load(from + i);
        if (residual) value += load_pixels(residual + i, n, is_tail);
        store_pixels(to + i, S::max(lower, value), n, is_tail);
      });
    }
  }

  const TrainingPointwise& p_;
  Arena arena_;
  int64_t rows_at_once_;
  Converted converted_;
  Planes<float> y_;
  Planes<Element> x_[kMostInputs];
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
