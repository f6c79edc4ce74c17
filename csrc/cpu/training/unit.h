// A unit's training step.
//
// conv3's result, the largest intermediate tensor, is neither stored nor computed twice. It is linear in what conv3
// reads, so batch norm 3's statistics follow from that tensor's mean and covariance (its Gram matrix within each
// group), and all sums that the backward pass needs from its products with the incoming gradient. What is left are
// passes over the tensors:
//
//     forward   y1 = conv1(x)    y2 = conv2(shuffle(relu(bn1(y1))))    result = relu(bn3(conv3(bn2(y2))) + x)
//     backward  products of the gradient with y2    gradient of y2    gradient of y1    gradient of x
//
// and small vectors and matrices, which are computed in double. What conv3 reads is slope * (v - centre) + at_centre: v
// is y2, or relu(bn2(y2)) where a ReLU follows the depthwise convolution. Matrices of conv3's weights are [its rows]
// [depth], the channels of a group that it reads.
#pragma once

#include <numeric>

#include "passes.h"

namespace shufflenet::cpu {

// The unit's tensors and options, as the op is given them and checked.
struct TrainedUnit {
  Unit sizes;
  Tensor x;
  std::vector<ConvolutionArguments> convs;
  std::vector<TrainedNorm> norms;
  Processes processes;

  Dtype dtype() const { return dtype_of("x", x); }  // of all planes
  ScalarType type() const { return sums_type(x); }  // of what is computed
  int64_t mid() const { return sizes.mid_channels; }
  int64_t rows() const { return sizes.out_channels; }
  int64_t depth() const { return sizes.slice_channels(); }
  double values(const WholeBatch& whole) const {  // that norms 2 and 3 have of a channel
    return whole.images * static_cast<double>(sizes.out_height() * sizes.out_width());
  }
  Numbers depthwise_weight() const { return {type(), numbers_of("conv2_weight", convs[1].weight)}; }
  Tensor planes(int64_t channels, int64_t height, int64_t width) const {
    return torch::stable::new_empty(x, std::vector<int64_t>{x.size(0), channels, height, width}, x.scalar_type());
  }
  PlaneBatch main_of(const PlaneBatch& result) const {
    return result.some_channels(sizes.first_conv3_channel(), sizes.out_channels);
  }
  PlaneBatch pooled_of(const PlaneBatch& result) const {
    return result.some_channels(sizes.first_pooled_channel(), sizes.in_channels);
  }
};

// What the backward pass needs of the forward pass beside its tensors, in the order in which the op hands it on.
struct Statistics {
  Vector mean1, unbiased1, mean2, unbiased2, mean3, unbiased3;  // the variances are for the running ones
  Vector var1, var2, var3;
  Vector whole;       // the images of all processes' batches, and how many processes those are
  Vector centre;      // of v
  Vector covariance;  // of v within each group; empty where norm 3 does not use the batch's statistics

  std::array<Vector*, 12> parts() {
    return {
        &mean1, &unbiased1, &mean2, &unbiased2, &mean3, &unbiased3, &var1, &var2, &var3, &whole, &centre, &covariance};
  }
  Tensor flat(const Tensor& like) {
    Vector all;
    for (const Vector* part : parts()) all.insert(all.end(), part->begin(), part->end());
    return tensor_of(all, {static_cast<int64_t>(all.size())}, ScalarType::Double, like);
  }
  static Statistics of(const Tensor& flat, const TrainedUnit& unit) {
    Statistics s;
    const int64_t mid = unit.mid(), rows = unit.rows();
    const std::array<int64_t, 12> sizes = {
        mid, mid, mid, mid, rows, rows, mid, mid, rows, 2, mid, unit.norms[2].of_batch ? mid * unit.depth() : 0};
    check_shape("statistics", flat, {std::accumulate(sizes.begin(), sizes.end(), int64_t{0})});
    const Vector numbers = numbers_of("statistics", flat);
    auto from = numbers.begin();
    for (size_t i = 0; i < sizes.size(); from += sizes[i++]) s.parts()[i]->assign(from, from + sizes[i]);
    return s;
  }
};

// conv3's weights, and what follows from them and norm 2: see above.
class Conv3 {
 public:
  Conv3(const TrainedUnit& unit, const Affine& norm2, const Vector& centre)
      : weight(matrix_of("conv3_weight", unit.convs[2].weight)),
        slope(unit.mid(), 1.0),
        at_centre(centre),
        mean_at_centre(unit.rows()),
        groups_(unit.sizes.groups),
        rows_(unit.rows() / groups_),
        depth_(unit.depth()) {
    if (!unit.sizes.conv2_relu) {
      slope = norm2.scale;
      for (int64_t c = 0; c < unit.mid(); ++c) {
        at_centre[c] = norm2.scale[c] * (centre[c] - norm2.mean[c]) + norm2.bias[c];
      }
    }
    cpu::each_row(unit.rows(), depth_, [&](int64_t row) {
      const double *const w = weight.data() + row * depth_, *const v = at_centre.data() + first_channel(row);
      mean_at_centre[row] = sum_of(depth_, [&](int64_t k) { return w[k] * v[k]; });
    });
  }

  int64_t first_channel(int64_t row) const { return row / rows_ * depth_; }  // that a row reads
  // Writes a row of the weights times the slope: those of v.
  void of_v(int64_t row, double* to) const {
    const double *const w = weight.data() + row * depth_, *const s = slope.data() + first_channel(row);
    for (int64_t k = 0; k < depth_; ++k) to[k] = w[k] * s[k];
  }
  // Calls run(row, its weights of v), on torch's threads.
  template <class Run>
  void each_row(const Run& run) const {
    cpu::each_row(groups_ * rows_, depth_, [&](int64_t row) {
      auto* const to =
          reinterpret_cast<double*>(thread_workspace.reserve(depth_ * static_cast<int64_t>(sizeof(double))));
      of_v(row, to);
      run(row, to);
    });
  }
  // Calls take(row, its weights of v, their products with the covariance of v), on torch's threads.
  template <class Take>
  void times_covariance(const Vector& covariance, const Take& take) const {
    RightHandSides(groups_, depth_, depth_, [&](int64_t row, double* to) {
      std::copy_n(covariance.data() + row * depth_, depth_, to);
    }).multiply(rows_, [&](int64_t row, double* to) { of_v(row, to); }, take);
  }

  Matrix weight;            // as it is
  Vector slope, at_centre;  // of the channels that it reads
  Vector mean_at_centre;    // of its rows: what they are where v is at its centre

 private:
  int64_t groups_, rows_, depth_;  // rows_: of a group
};

inline TrainingDepthwise depthwise_of(const Unit& unit, const Numbers& weight, const Numbers& scale,
                                      const Numbers& shift) {
  TrainingDepthwise d = {};
  d.in = {unit.height, unit.width};
  d.out = {unit.out_height(), unit.out_width()};
  d.stride = unit.stride;
  d.channels = unit.mid_channels;
  d.shuffle_groups = unit.shuffle_groups;
  d.norm1 = {scale.data(), shift.data()};
  d.weight = weight.data();
  return d;
}

struct Forward {
  Tensor result, y1, y2;
  Statistics statistics;
};

// Computes the unit's result, its norms in training mode or not, and what its backward pass needs.
Forward forward(const TrainedUnit&);

// Gradients of a convolution's weight, in its own order of rows, and of its bias and norm.
struct StageGradients {
  Matrix weight;
  NormGradients norm;
};

// How far back gradients are wanted: to norm 3 and conv3, to norm 2 and conv2, to norm 1 and conv1, to x. Those of norm
// 1's tensors come with conv2's.
enum Depth : int64_t { kConv3 = 1, kConv2, kConv1, kX };

struct Gradients {
  Tensor x;
  std::array<std::optional<StageGradients>, 3> stages;  // of conv1, conv2 and conv3
};

// Computes gradients as far back as they are wanted.
Gradients backward(const TrainedUnit&, const Tensor& gradient, const Forward& done, int64_t depth);

}  // namespace shufflenet::cpu
