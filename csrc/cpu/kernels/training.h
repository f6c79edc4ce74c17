// The kernels of training, written once over Simd<A>; see training_table.h. What is not here is inference's.
#pragma once

#include "average_pool.h"
#include "plane_products.h"
#include "pointwise.h"
#include "training_table.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// Calls step(pixel, mask, is_tail) for each vector of so many pixels. Only the last one may be a tail, whose lanes
// outside of the mask are no pixels.
template <class A, class Step>
inline void each_vector(int64_t pixels, const Step& step) {
  using S = Simd<A>;
  int64_t pixel = 0;
  for (; pixel + S::kLanes <= pixels; pixel += S::kLanes) step(pixel, S::first(S::kLanes), std::false_type{});
  if (pixel < pixels) step(pixel, S::first(pixels - pixel), std::true_type{});
}

template <class A, class IsTail>
inline typename Simd<A>::V load_pixels(const A* p, typename Simd<A>::Mask mask, IsTail) {
  return IsTail::value ? Simd<A>::load(p, mask) : Simd<A>::load(p);
}

template <class A, class IsTail>
inline void store_pixels(A* p, typename Simd<A>::V v, typename Simd<A>::Mask mask, IsTail) {
  if (IsTail::value) {
    Simd<A>::store(p, v, mask);
  } else {
    Simd<A>::store(p, v);
  }
}

// A plane with a row of zeros above and one below, for the taps of a 3x3 window with stride 1.
template <class A>
class PaddedPlane {
 public:
  PaddedPlane(Arena& arena, PlaneSize size)
      : size_(size), rows_(arena.planes<A>(1, (size.height + 2) * size.width).data) {}

  const A* from_row_above() const { return rows_; }
  A* plane() const { return rows_ + size_.width; }
  void clear_rows_outside() const {
    std::fill_n(rows_, size_.width, A{0});
    std::fill_n(plane() + size_.pixels(), size_.width, A{0});
  }

  // Puts the pixels of a plane of half the size, times their factors, to the even rows and columns, zeros elsewhere:
  // a convolution with stride 2 backwards is then one with stride 1. Only the first and the last column's factor may
  // differ from the others'.
  template <class Factor>
  void spread(const A* from, PlaneSize half, const Factor& factor) const {
    using S = Simd<A>;
    const int64_t last = half.width - 1;
    for (int64_t row = 0; row < half.height; ++row, from += half.width) {
      A* const to = plane() + 2 * row * size_.width;
      const typename S::V none = {}, between = S::broadcast(factor(row, std::min<int64_t>(1, last)));
      for (int64_t i = 0; i < half.width; i += S::kLanes) {
        const auto values = load_some(from + i, half.width - i) * between;
        store_some(to + 2 * i, S::first_in_turn(values, none), size_.width - 2 * i);
        store_some(to + 2 * i + S::kLanes, S::last_in_turn(values, none), size_.width - 2 * i - S::kLanes);
      }
      to[0] = from[0] * factor(row, 0);
      to[2 * last] = from[last] * factor(row, last);
      if (2 * row + 1 < size_.height) std::fill_n(to + size_.width, size_.width, A{0});
    }
  }

 private:
  PlaneSize size_;
  A* rows_;
};

// What a worker needs for the depthwise convolution and its gradient, and for the pool's.
template <class A>
struct TrainingWorkspace {
  TrainingWorkspace(PlaneSize in, void* memory) : TrainingWorkspace(in, Arena(memory)) {}
  TrainingWorkspace(PlaneSize in, Arena arena)
      : masks(arena.take<EdgeMasks<A>>(ceil_div(in.pixels(), Simd<A>::kLanes))),
        values(arena, in),
        gradient(arena, in),
        bytes(arena.bytes()) {}
  EdgeMasks<A>* masks;
  PaddedPlane<A> values, gradient;
  int64_t bytes;
};

// Prepares masks for all rows of planes.
template <class A>
void fill_plane_masks(PlaneSize in, int64_t stride, EdgeMasks<A>* masks) {
  Unit unit;
  unit.height = in.height;
  unit.width = in.width;
  unit.stride = stride;
  fill_edge_masks<A>(unit, {0, unit.out_height()}, masks);
}

// The gradient where a ReLU's result is above zero. Where it is NaN it passes, as in PyTorch.
template <class V>
inline V relu_passes(V result, V gradient) {
  return result <= V{} ? V{} : gradient;
}

template <class A>
class TrainingOf final : public TrainingKernel {
 public:
  using S = Simd<A>;
  using V = typename S::V;

  int64_t pointwise_bytes(const TrainingPointwise& p) const override {
    Arena arena(nullptr);
    PointwiseLists<A>(arena, p.rows, p.depth);
    return arena.bytes();
  }
  void pointwise(const TrainingPointwise& p, Range rows, void* workspace) const override {
    Arena arena(workspace);
    const PointwiseLists<A> lists(arena, p.rows, p.depth);
    const Planes<A> y = {static_cast<A*>(p.y), p.pixels};
    // A pass goes over the whole batch, so no cache has an image of a large one. Of x and y the larger is prefetched.
    const int64_t in_channels = p.depth * p.groups;
    Far far = Far::nothing;
    if (is_far<A>(std::max(in_channels, p.rows) * p.images, p.pixels)) far = in_channels >= p.rows ? Far::x : Far::y;
    grouped_pointwise<A>({p.conv, p.activation, p.depth, p.rows / p.groups}, rows, planes(p.x, p.pixels), p.pixels,
                         planes(p.residual, p.pixels), y, 0, has_lone_pixel<A>(p.pixels, p.pixels), lists, far);
  }

  void moments(const void* data, int64_t pixels, int64_t count, double* means, double* squares) const override {
    for (int64_t c = 0; c < count; ++c) {
      const A* const plane = static_cast<const A*>(data) + c * pixels;
      V sum = {}, square = {};
      each_vector<A>(pixels, [&](int64_t i, auto mask, auto is_tail) { sum += load_pixels(plane + i, mask, is_tail); });
      const A mean = S::sum(sum) / static_cast<A>(pixels);
      const V broadcast = S::broadcast(mean);
      V rest = {};  // what the rounding of the mean leaves
      each_vector<A>(pixels, [&](int64_t i, auto mask, auto is_tail) {
        V deviation = load_pixels(plane + i, mask, is_tail) - broadcast;
        if (is_tail) deviation = S::keep(deviation, mask);
        rest += deviation;
        square = S::fma(deviation, deviation, square);
      });
      const double correction = static_cast<double>(S::sum(rest)) / static_cast<double>(pixels);
      means[c] = mean + correction;
      squares[c] = S::sum(square) - correction * correction * static_cast<double>(pixels);
    }
  }

  int64_t depthwise_bytes(const TrainingDepthwise& d) const override {
    return TrainingWorkspace<A>(d.in, nullptr).bytes;
  }
  void depthwise(const TrainingDepthwise& d, Range channels, const void* y1, void* y2, void* memory) const override {
    const TrainingWorkspace<A> work(d.in, memory);
    work.values.clear_rows_outside();
    fill_plane_masks<A>(d.in, d.stride, work.masks);
    const V none = S::broadcast(static_cast<A>(kNoActivation.lower));
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      apply_norm1(d, c, y1, work.values);
      V weight[9];
      unrolled<9>([&](int i) { weight[i] = S::broadcast(static_cast<const A*>(d.weight)[c * 9 + i]); });
      A* const to = static_cast<A*>(y2) + c * d.out.pixels();
      const A* const from = work.values.from_row_above();
      if (d.stride == 1) {
        depthwise_stride1<A>(from, d.in.width, d.in.pixels(), work.masks, weight, V{}, none, to);
      } else {
        depthwise_stride2<A>(from, d.in.width, d.out.height, d.out.width, work.masks, weight, V{}, none, to);
      }
    }
  }

  void depthwise_backward(const TrainingDepthwise& d, Range channels, const void* y2_gradient, const void* y1,
                          const void* y1_means, void* gradient, DepthwiseSums* sums, void* memory) const override {
    const TrainingWorkspace<A> work(d.in, memory);
    work.values.clear_rows_outside();
    work.gradient.clear_rows_outside();
    fill_plane_masks<A>(d.in, 1, work.masks);
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      const int64_t source = d.source(c);
      apply_norm1(d, c, y1, work.values);
      const A* const from = static_cast<const A*>(y2_gradient) + c * d.out.pixels();
      if (d.stride == 1) {
        std::copy_n(from, d.in.pixels(), work.gradient.plane());
      } else {
        work.gradient.spread(from, d.out, [](int64_t, int64_t) { return A{1}; });
      }
      depthwise_backward_plane(
          d, work, static_cast<const A*>(d.weight) + c * 9, static_cast<const A*>(y1) + source * d.in.pixels(),
          static_cast<const A*>(y1_means)[source], static_cast<A*>(gradient) + source * d.in.pixels(), sums[c]);
    }
  }

  void norm_backward(const NormBackward& n, const void* y, int64_t pixels, void* gradient) const override {
    const V scale = S::broadcast(static_cast<A>(n.scale)), slope = S::broadcast(static_cast<A>(n.slope));
    const V mean = S::broadcast(static_cast<A>(n.mean)), shift = S::broadcast(static_cast<A>(n.shift));
    A* const to = static_cast<A*>(gradient);
    if (n.slope == 0 && n.shift == 0) {  // as with statistics that are not the batch's: whatever y is has no part in it
      each_vector<A>(pixels, [&](int64_t i, auto mask, auto is_tail) {
        store_pixels(to + i, scale * load_pixels(to + i, mask, is_tail), mask, is_tail);
      });
      return;
    }
    each_vector<A>(pixels, [&](int64_t i, auto mask, auto is_tail) {
      const V deviation = load_pixels(static_cast<const A*>(y) + i, mask, is_tail) - mean;
      const V scaled = scale * load_pixels(to + i, mask, is_tail) - shift;
      store_pixels(to + i, scaled - slope * deviation, mask, is_tail);
    });
  }

  double relu_backward(const void* result, int64_t pixels, const void* gradient, void* to) const override {
    V sum = {};
    each_vector<A>(pixels, [&](int64_t i, auto mask, auto is_tail) {
      const V y = load_pixels(static_cast<const A*>(result) + i, mask, is_tail);
      const V kept = relu_passes(y, load_pixels(static_cast<const A*>(gradient) + i, mask, is_tail));
      sum += kept;
      store_pixels(static_cast<A*>(to) + i, kept, mask, is_tail);
    });
    return S::sum(sum);
  }

  void transpose(const OffsetPlanes& planes, void* to, int64_t row) const override {
    transpose_planes<A>(planes, static_cast<A*>(to), row);
  }
  int64_t product_row(int64_t b_planes) const override { return SHUFFLENET_ISA::product_row<A>(b_planes); }
  void products(const PlaneProducts& p) const override { plane_products<A>(p); }
  void move_sums(void* sums, int64_t rows, int64_t columns, double* to) const override {
    const int64_t row_size = product_row(columns);
    for (int64_t row = 0; row < rows; ++row) {
      A* const from = static_cast<A*>(sums) + row * row_size;
      for (int64_t i = 0; i < columns; ++i) to[row * columns + i] += from[i];
      std::fill_n(from, row_size, A{0});
    }
  }

  int64_t pool_bytes(PlaneSize in) const override { return TrainingWorkspace<A>(in, nullptr).bytes; }
  void pool(const Unit& unit, Range channels, const void* x, void* result, void* memory) const override {
    const PlaneSize in = {unit.height, unit.width};
    const TrainingWorkspace<A> work(in, memory);
    fill_plane_masks<A>(in, 2, work.masks);
    const Planes<A> to = {static_cast<A*>(result), unit.out_height() * unit.out_width()};
    average_pool<A>(unit, {0, unit.out_height()}, channels, work.masks, planes(x, in.pixels()), 0, {}, to);
  }
  // A pixel's gradient is the sum of those results, divided by what they are means of, whose windows it is in.
  void pool_backward(const Unit& unit, Range channels, const void* result_gradient, void* gradient,
                     void* memory) const override {
    const PlaneSize in = {unit.height, unit.width}, out = {unit.out_height(), unit.out_width()};
    const TrainingWorkspace<A> work(in, memory);
    work.gradient.clear_rows_outside();
    fill_plane_masks<A>(in, 1, work.masks);
    const auto inside = [](int64_t i, int64_t n) { return std::min(2 * i + 2, n) - std::max<int64_t>(0, 2 * i - 1); };
    const auto factor = [&](int64_t row, int64_t column) {
      const int64_t count = unit.pool_count_include_pad ? 9 : inside(row, in.height) * inside(column, in.width);
      return A{1} / static_cast<A>(count);
    };
    V ones[9];
    unrolled<9>([&](int i) { ones[i] = S::broadcast(1); });
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      work.gradient.spread(static_cast<const A*>(result_gradient) + c * out.pixels(), out, factor);
      depthwise_stride1<A>(
          work.gradient.from_row_above(), in.width, in.pixels(), work.masks, ones, V{},
          S::broadcast(static_cast<A>(kNoActivation.lower)), static_cast<A*>(gradient) + c * in.pixels());
    }
  }

 private:
  static Planes<const A> planes(const void* data, int64_t pixels) { return {static_cast<const A*>(data), pixels}; }

  // Computes relu(scale * y1 + shift) of what the shuffle sends to place c.
  static void apply_norm1(const TrainingDepthwise& d, int64_t c, const void* y1, const PaddedPlane<A>& to) {
    const int64_t source = d.source(c), pixels = d.in.pixels();
    const A* const from = static_cast<const A*>(y1) + source * pixels;
    const V scale = S::broadcast(static_cast<const A*>(d.norm1.scale)[source]);
    const V shift = S::broadcast(static_cast<const A*>(d.norm1.shift)[source]);
    A* const plane = to.plane();
    each_vector<A>(pixels, [&](int64_t i, auto mask, auto is_tail) {
      const V value = S::fma(load_pixels(from + i, mask, is_tail), scale, shift);
      store_pixels(plane + i, S::max(V{}, value), mask, is_tail);
    });
  }

  // Convolves the gradient of y2 with the taps turned about, and multiplies it with what each tap has seen.
  static void depthwise_backward_plane(const TrainingDepthwise& d, const TrainingWorkspace<A>& work, const A* weight,
                                       const A* y1, A y1_mean, A* to, DepthwiseSums& sums) {
    const int64_t width = d.in.width;
    const A* const values = work.values.from_row_above();
    const A* const gradient = work.gradient.from_row_above();
    V turned[9], taps[9] = {}, sum = {}, times_y1 = {};
    unrolled<9>([&](int i) { turned[i] = S::broadcast(weight[8 - i]); });
    const V mean = S::broadcast(y1_mean);
    const EdgeMasks<A>* edges = work.masks;
    each_vector<A>(d.in.pixels(), [&](int64_t i, auto mask, auto is_tail) {
      const V centre = load_pixels(gradient + width + i, mask, is_tail);
      V convolved = {}, value = {};
      unrolled<3>([&](int row) {
        const A* const z = values + row * width + i;
        const A* const g = gradient + row * width + i;
        const V middle = load_pixels(z, mask, is_tail);
        if (row == 1) value = middle;
        taps[3 * row] = S::fma(S::load(z - 1, edges->left), centre, taps[3 * row]);
        taps[3 * row + 1] = S::fma(middle, centre, taps[3 * row + 1]);
        taps[3 * row + 2] = S::fma(S::load(z + 1, edges->right[0]), centre, taps[3 * row + 2]);
        convolved = S::fma(S::load(g - 1, edges->left), turned[3 * row], convolved);
        convolved = S::fma(load_pixels(g, mask, is_tail), turned[3 * row + 1], convolved);
        convolved = S::fma(S::load(g + 1, edges->right[0]), turned[3 * row + 2], convolved);
      });
      ++edges;
      const V kept = relu_passes(value, convolved);  // zeros behind the last pixel, as the values are there
      sum += kept;
      times_y1 = S::fma(kept, load_pixels(y1 + i, mask, is_tail) - mean, times_y1);
      store_pixels(to + i, kept, mask, is_tail);
    });
    sums.gradient = S::sum(sum);
    sums.gradient_times_y1 = S::sum(times_y1);
    unrolled<9>([&](int i) { sums.taps[i] = S::sum(taps[i]); });
  }
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
