// The kernels of training, written once over Simd<A>, on planes of a stored dtype T; see training_table.h. What is not
// here is inference's.
#pragma once

#include "average_pool.h"
#include "plane_products.h"
#include "training_pointwise.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// What a worker needs for the depthwise convolution and its gradient, and for the pool's.
template <class A>
struct TrainingWorkspace {
  TrainingWorkspace(PlaneSize in, void* memory) : TrainingWorkspace(in, Arena(memory)) {}
  TrainingWorkspace(PlaneSize in, Arena arena)
      : masks(arena.take<EdgeMasks<A>>(ceil_div(in.pixels(), Simd<A>::kLanes))),
        values(arena, in),
        gradient(arena, in),
        converted(arena.planes<A>(2, in.pixels())),
        bytes(arena.bytes()) {}
  EdgeMasks<A>* masks;
  PaddedPlane<A> values, gradient;
  Planes<A> converted;  // for planes of 16 bits
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

// PointwiseOfPlanes are the convolutions of planes of T, ProductsOfPlanes their products with other planes.
template <class T, class PointwiseOfPlanes, class ProductsOfPlanes>
class TrainingOf final : public TrainingKernel {
 public:
  using A = accumulator_t<T>;
  using S = Simd<A>;
  using V = typename S::V;

  bool multiplies_pairs() const override { return ProductsOfPlanes::kArePairs; }

  int64_t pointwise_bytes(const TrainingPointwise& p) const override { return PointwiseOfPlanes(p, nullptr).bytes(); }
  void pointwise(const TrainingPointwise& p, Range rows, void* workspace) const override {
    PointwiseOfPlanes(p, workspace).run(rows);
  }

  void moments(const void* data, int64_t pixels, int64_t count, double* means, double* squares) const override {
    for (int64_t c = 0; c < count; ++c) {
      const T* const plane = static_cast<const T*>(data) + c * pixels;
      V sum = {}, square = {};
      each_vector<A>(pixels, [&](int64_t i, int64_t n, auto is_tail) { sum += load_pixels(plane + i, n, is_tail); });
      const A mean = S::sum(sum) / static_cast<A>(pixels);
      const V broadcast = S::broadcast(mean);
      V rest = {};  // what the rounding of the mean leaves
      each_vector<A>(pixels, [&](int64_t i, int64_t n, auto is_tail) {
        V deviation = load_pixels(plane + i, n, is_tail) - broadcast;
        if (is_tail) deviation = S::keep(deviation, S::first(n));
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
      const A* const from = work.values.from_row_above();
      const int64_t pixels = d.out.pixels();
      write_plane(static_cast<T*>(y2) + c * pixels, pixels, work.converted.channel(0), [&](A* to) {
        if (d.stride == 1) {
          depthwise_stride1<A>(from, d.in.width, d.in.pixels(), work.masks, weight, V{}, none, to);
        } else {
          depthwise_stride2<A>(from, d.in.width, d.out.height, d.out.width, work.masks, weight, V{}, none, to);
        }
      });
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
      const T* const from = static_cast<const T*>(y2_gradient) + c * d.out.pixels();
      if (d.stride == 1) {
        copy_plane(from, d.in.pixels(), work.gradient.plane());
      } else {
        const A* const converted = read_plane(from, d.out.pixels(), work.converted.channel(0));
        work.gradient.spread(converted, d.out, [](int64_t, int64_t) { return A{1}; });
      }
      depthwise_backward_plane(
          d, work, static_cast<const A*>(d.weight) + c * 9, static_cast<const T*>(y1) + source * d.in.pixels(),
          static_cast<const A*>(y1_means)[source], static_cast<T*>(gradient) + source * d.in.pixels(), sums[c]);
    }
  }

  void norm_backward(const NormBackward& n, const void* y, int64_t pixels, void* gradient) const override {
    const V scale = S::broadcast(static_cast<A>(n.scale)), slope = S::broadcast(static_cast<A>(n.slope));
    const V mean = S::broadcast(static_cast<A>(n.mean)), shift = S::broadcast(static_cast<A>(n.shift));
    T* const to = static_cast<T*>(gradient);
    if (n.slope == 0 && n.shift == 0) {  // as with statistics that are not the batch's: whatever y is has no part in it
      each_vector<A>(pixels, [&](int64_t i, int64_t left, auto is_tail) {
        store_pixels(to + i, scale * load_pixels(to + i, left, is_tail), left, is_tail);
      });
      return;
    }
    each_vector<A>(pixels, [&](int64_t i, int64_t left, auto is_tail) {
      const V deviation = load_pixels(static_cast<const T*>(y) + i, left, is_tail) - mean;
      const V scaled = scale * load_pixels(to + i, left, is_tail) - shift;
      store_pixels(to + i, scaled - slope * deviation, left, is_tail);
    });
  }

  void norm_and_relu(const PlaneNorm& norm, const void* y, int64_t pixels, void* result) const override {
    const NormAndRelu<A> applied(norm.scale, norm.shift);
    applied.of_plane(static_cast<const T*>(y), pixels, static_cast<T*>(result));
  }
  PlaneSums norm_and_relu_backward(const PlaneNorm& norm, const void* result_gradient, const void* y, int64_t pixels,
                                   void* gradient) const override {
    const NormAndRelu<A> applied(norm.scale, norm.shift);
    const V mean = S::broadcast(static_cast<A>(norm.mean));
    V sum = {}, times_y = {};
    each_vector<A>(pixels, [&](int64_t i, int64_t n, auto is_tail) {
      const V value = load_pixels(static_cast<const T*>(y) + i, n, is_tail);
      const V given = load_pixels(static_cast<const T*>(result_gradient) + i, n, is_tail);
      const V kept = relu_passes(applied(value), given);
      sum += kept;
      times_y = S::fma(kept, value - mean, times_y);
      store_pixels(static_cast<T*>(gradient) + i, kept, n, is_tail);
    });
    return {static_cast<double>(S::sum(sum)), static_cast<double>(S::sum(times_y))};
  }

  double relu_backward(const void* result, int64_t pixels, const void* gradient, void* to) const override {
    V sum = {};
    each_vector<A>(pixels, [&](int64_t i, int64_t n, auto is_tail) {
      const V y = load_pixels(static_cast<const T*>(result) + i, n, is_tail);
      const V kept = relu_passes(y, load_pixels(static_cast<const T*>(gradient) + i, n, is_tail));
      sum += kept;
      store_pixels(static_cast<T*>(to) + i, kept, n, is_tail);
    });
    return S::sum(sum);
  }

  void transpose(const MatrixRows& from, void* to, int64_t to_row) const override {
    transpose_matrix<T>(from, static_cast<T*>(to), to_row);
  }

  void interleave(const OffsetPlanes& planes, void* to, int64_t row) const override {
    ProductsOfPlanes::interleave(planes, to, row);
  }
  int64_t product_row(int64_t b_planes) const override { return SHUFFLENET_ISA::product_row<A>(b_planes); }
  void products(const PlaneProducts& p) const override { ProductsOfPlanes::add(p); }
  void move_sums(void* sums, int64_t rows, int64_t columns, double* to) const override {
    const int64_t row_size = product_row(columns);
    for (int64_t row = 0; row < rows; ++row) {
      A* const from = static_cast<A*>(sums) + row * row_size;
      for (int64_t i = 0; i < columns; ++i) to[row * columns + i] += from[i];
      std::fill_n(from, row_size, A{0});
    }
  }

  int64_t pool_bytes(PlaneSize in) const override { return TrainingWorkspace<A>(in, nullptr).bytes; }
  void pool(const Unit& unit, int64_t count, const void* x, void* result, void* memory) const override {
    const PlaneSize in = {unit.height, unit.width};
    const int64_t out = unit.out_height() * unit.out_width();
    const TrainingWorkspace<A> work(in, memory);
    fill_plane_masks<A>(in, 2, work.masks);
    for (int64_t c = 0; c < count; ++c) {
      const T* const plane = static_cast<const T*>(x) + c * in.pixels();
      const Planes<const A> from = {read_plane(plane, in.pixels(), work.converted.channel(0)), 0};
      write_plane(static_cast<T*>(result) + c * out, out, work.converted.channel(1), [&](A* to) {
        average_pool<A>(unit, {0, unit.out_height()}, {0, 1}, work.masks, from, 0, {}, {to, 0});
      });
    }
  }
  // A pixel's gradient is the sum of those results, divided by what they are means of, whose windows it is in.
  void pool_backward(const Unit& unit, int64_t count, const void* result_gradient, void* gradient,
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
    const V none = S::broadcast(static_cast<A>(kNoActivation.lower));
    V ones[9];
    unrolled<9>([&](int i) { ones[i] = S::broadcast(1); });
    for (int64_t c = 0; c < count; ++c) {
      const T* const plane = static_cast<const T*>(result_gradient) + c * out.pixels();
      work.gradient.spread(read_plane(plane, out.pixels(), work.converted.channel(0)), out, factor);
      const int64_t pixels = in.pixels();
      write_plane(static_cast<T*>(gradient) + c * pixels, pixels, work.converted.channel(1), [&](A* to) {
        const A* const from = work.gradient.from_row_above();
        depthwise_stride1<A>(from, in.width, pixels, work.masks, ones, V{}, none, to);
      });
    }
  }

 private:
  // Computes relu(scale * y1 + shift) of what the shuffle sends to place c.
  static void apply_norm1(const TrainingDepthwise& d, int64_t c, const void* y1, const PaddedPlane<A>& to) {
    const int64_t source = d.source(c), pixels = d.in.pixels();
    const NormAndRelu<A> norm(
        static_cast<const A*>(d.norm1.scale)[source], static_cast<const A*>(d.norm1.shift)[source]);
    norm.of_plane(static_cast<const T*>(y1) + source * pixels, pixels, to.plane());
  }

  // Convolves the gradient of y2 with the taps turned about, and multiplies it with what each tap has seen.
  static void depthwise_backward_plane(const TrainingDepthwise& d, const TrainingWorkspace<A>& work, const A* weight,
                                       const T* y1, A y1_mean, T* to, DepthwiseSums& sums) {
    const int64_t width = d.in.width;
    const A* const values = work.values.from_row_above();
    const A* const gradient = work.gradient.from_row_above();
    V turned[9], taps[9] = {}, sum = {}, times_y1 = {};
    unrolled<9>([&](int i) { turned[i] = S::broadcast(weight[8 - i]); });
    const V mean = S::broadcast(y1_mean);
    const EdgeMasks<A>* edges = work.masks;
    each_vector<A>(d.in.pixels(), [&](int64_t i, int64_t n, auto is_tail) {
      const V centre = load_pixels(gradient + width + i, n, is_tail);
      V convolved = {}, value = {};
      unrolled<3>([&](int row) {
        const A* const z = values + row * width + i;
        const A* const g = gradient + row * width + i;
        const V middle = load_pixels(z, n, is_tail);
        if (row == 1) value = middle;
        taps[3 * row] = S::fma(S::load(z - 1, edges->left), centre, taps[3 * row]);
        taps[3 * row + 1] = S::fma(middle, centre, taps[3 * row + 1]);
        taps[3 * row + 2] = S::fma(S::load(z + 1, edges->right[0]), centre, taps[3 * row + 2]);
        convolved = S::fma(S::load(g - 1, edges->left), turned[3 * row], convolved);
        convolved = S::fma(load_pixels(g, n, is_tail), turned[3 * row + 1], convolved);
        convolved = S::fma(S::load(g + 1, edges->right[0]), turned[3 * row + 2], convolved);
      });
      ++edges;
      const V kept = relu_passes(value, convolved);  // zeros behind the last pixel, as the values are there
      sum += kept;
      times_y1 = S::fma(kept, load_pixels(y1 + i, n, is_tail) - mean, times_y1);
      store_pixels(to + i, kept, n, is_tail);
    });
    sums.gradient = S::sum(sum);
    sums.gradient_times_y1 = S::sum(times_y1);
    unrolled<9>([&](int i) { sums.taps[i] = S::sum(taps[i]); });
  }
};

template <class T>
using TrainingOfFloats =
    TrainingOf<T,
               std::conditional_t<std::is_same_v<T, accumulator_t<T>>, PointwiseAsItLies<T>,
                                  ConvertedPointwise<T, ConvertedToFloats>>,
               ProductsOfFloats<T>>;

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
