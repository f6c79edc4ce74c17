#include "unit.h"

namespace shufflenet::cpu {
namespace {

// The backward pass of a unit, whose methods are called in their order.
class Backward {
 public:
  Backward(const TrainedUnit& unit, const Tensor& gradient, const Forward& done)
      : unit_(unit),
        sizes_(unit.sizes),
        type_(unit.type()),
        passes_(unit.dtype()),
        s_(done.statistics),
        whole_(s_.whole[0], s_.whole[1]),
        x_(dense(unit.x, layout_of(unit.x))),
        y1_(torch::stable::contiguous(done.y1)),
        y2_(torch::stable::contiguous(done.y2)),
        result_(dense(done.result, layout_of(done.result))),
        result_gradient_(dense(gradient, layout_of(gradient))),
        norm1_(unit.norms[0], {s_.mean1, s_.var1}),
        norm2_(unit.norms[1], {s_.mean2, s_.var2}),
        norm3_(unit.norms[2], {s_.mean3, s_.var3}),
        conv3_(unit, norm2_, s_.centre),
        v_(y2_) {
    if (sizes_.conv2_relu) {
      v_ = torch::stable::empty_like(y2_);
      const ProfiledPass pass("shuffle_bottleneck_training: relu(bn2) again");
      passes_.norm_and_relu(norm2_, PlaneBatch::read(y2_), PlaneBatch::written(v_));
    }
  }

  StageGradients conv3_gradients() {
    // The gradient of conv3's result is dy3 = scale3 * (dz - total / values - rstd3 * y3 * with_y3 / values).
    dz_ = unit_.planes(unit_.rows(), sizes_.out_height(), sizes_.out_width());
    {
      const ProfiledPass pass("shuffle_bottleneck_training: gradient of conv3's weight");
      const Numbers centre(type_, s_.centre);
      products_ = passes_.relu_backward(
          unit_.main_of(PlaneBatch::read(result_)), unit_.main_of(PlaneBatch::read(result_gradient_)),
          PlaneBatch::written(dz_), PlaneBatch::read(v_), centre, sizes_.groups, total3_);
    }
    unit_.processes.sum({&products_, &total3_});
    NormSums sums(unit_.rows());
    sums.total = total3_;
    with_y3_.assign(unit_.rows(), 0.0);
    sum3_.assign(unit_.rows(), 0.0);
    Matrix of_weight(products_.size());
    const int64_t depth = unit_.depth();
    // of_covariance: the products of the weights of v with it; null where norm 3 does not use the batch's statistics.
    const auto finish = [&](int64_t row, const double* of_v, const double* of_covariance) {
      double* const products = products_.data() + row * depth;
      const double scale = norm3_.scale[row], rstd = norm3_.rstd[row];
      sums.with_y[row] = sum_of(depth, [&](int64_t k) { return of_v[k] * products[k]; });
      with_y3_[row] = sums.with_y[row] * rstd;
      if (of_covariance) {
        for (int64_t k = 0; k < depth; ++k) products[k] -= of_covariance[k] * with_y3_[row] * rstd;
      } else {
        sum3_[row] = scale * total3_[row];
        sums.with_y[row] += total3_[row] * (conv3_.mean_at_centre[row] - s_.mean3[row]);
      }
      const int64_t first = conv3_.first_channel(row);
      const double *const slope = conv3_.slope.data() + first, *const at_centre = conv3_.at_centre.data() + first;
      double* const to = of_weight.data() + row * depth;
      for (int64_t k = 0; k < depth; ++k) {
        products[k] *= scale;  // of dy3 with v
        to[k] = (slope[k] * products[k] + sum3_[row] * at_centre[k]) / whole_.count;
      }
    };
    if (unit_.norms[2].of_batch) {
      conv3_.times_covariance(s_.covariance, finish);
    } else {
      conv3_.each_row([&](int64_t row, const double* of_v) { finish(row, of_v, nullptr); });
    }
    return {std::move(of_weight), {norm3_, unit_.norms[2].of_batch, sums, whole_}};
  }

  StageGradients conv2_gradients() {
    find_y2_gradient();
    if (sizes_.conv2_relu) pass_relu_and_norm2();
    const NormGradients of_norm(norm2_, unit_.norms[1].of_batch, sums2_, whole_);

    y1_gradient_ = torch::stable::empty_like(y1_);
    const Numbers scale(type_, norm1_.scale), shift(type_, norm1_.shifts()), means(type_, s_.mean1);
    const Numbers weight = unit_.depthwise_weight();
    const TrainingDepthwise d = depthwise_of(sizes_, weight, scale, shift);
    std::vector<DepthwiseSums> of_images;
    {
      const ProfiledPass pass("shuffle_bottleneck_training: gradient of conv2");
      of_images = passes_.depthwise_backward(
          d, PlaneBatch::read(y2_gradient_), PlaneBatch::read(y1_), means.data(), PlaneBatch::written(y1_gradient_));
    }
    Matrix taps(unit_.mid() * 9, 0.0);
    sums1_ = NormSums(unit_.mid());
    for (int64_t c = 0; c < unit_.mid(); ++c) {
      const int64_t source = d.source(c);
      for (size_t i = c; i < of_images.size(); i += unit_.mid()) {
        sums1_.total[source] += of_images[i].gradient;
        sums1_.with_y[source] += of_images[i].gradient_times_y1;
        for (int64_t tap = 0; tap < 9; ++tap) taps[c * 9 + tap] += of_images[i].taps[tap];
      }
    }
    unit_.processes.sum({&sums1_.total, &sums1_.with_y});
    return {std::move(taps), of_norm};
  }

  // Those of its weight where it is wanted, and of its norm.
  StageGradients conv1_gradients(bool with_weight) {
    const bool of_batch = unit_.norms[0].of_batch;
    StageGradients gradients = {{}, {norm1_, of_batch, sums1_, whole_}};
    if (!with_weight) return gradients;
    const PlaneBatch y1 = PlaneBatch::read(y1_), gradient = PlaneBatch::written(y1_gradient_);
    {
      const ProfiledPass pass("shuffle_bottleneck_training: gradient of bn1");
      const double values = whole_.images * static_cast<double>(y1.pixels());
      passes_.norm_backward(norm_backward_of(norm1_, of_batch, values, sums1_), y1, gradient);
    }
    const ProfiledPass pass("shuffle_bottleneck_training: gradient of conv1's weight");
    // Turned about, as the planes of the first operand are read but once.
    const Vector turned = passes_.products(PlaneBatch::read(x_), gradient, sizes_.conv1_groups);
    gradients.weight.resize(turned.size());
    transpose(
        turned.data(), sizes_.conv1_groups, sizes_.conv1_depth(), sizes_.conv1_group_rows(), gradients.weight.data());
    return gradients;
  }

  Tensor x_gradient() {
    const Sizes of_x = {x_.size(0), x_.size(1), x_.size(2), x_.size(3)};
    Tensor of_shortcut = dz_;
    if (sizes_.concatenates_pool()) {
      Tensor pooled = result_gradient_;
      if (sizes_.shortcut_relu) {
        pooled = unit_.planes(sizes_.result_channels(), sizes_.out_height(), sizes_.out_width());
        const ProfiledPass pass("shuffle_bottleneck_training: gradient of the pool's ReLU");
        passes_.relu_backward(
            unit_.pooled_of(PlaneBatch::read(result_)), unit_.pooled_of(PlaneBatch::read(result_gradient_)),
            unit_.pooled_of(PlaneBatch::written(pooled)));
      }
      of_shortcut = empty_like_x(x_, of_x, sizes_.layout);
      const ProfiledPass pass("shuffle_bottleneck_training: gradient of the pool");
      passes_.pool_backward(sizes_, unit_.pooled_of(PlaneBatch::read(pooled)), PlaneBatch::written(of_shortcut));
    }
    const Matrix weight = matrix_of("conv1_weight", unit_.convs[0].weight);
    Matrix turned(weight.size());  // [in_channels][rows of a group]
    transpose(weight.data(), sizes_.conv1_groups, sizes_.conv1_group_rows(), sizes_.conv1_depth(), turned.data());
    const Weights weights = weights_of(unit_.dtype(), std::move(turned), sizes_.conv1_group_rows());
    const ProfiledPass pass("shuffle_bottleneck_training: gradient of conv1");
    // Where the layouts agree, in the shortcut's place.
    const bool in_place = layout_of(of_shortcut) == sizes_.layout;
    const Tensor gradient = in_place ? of_shortcut : empty_like_x(x_, of_x, sizes_.layout);
    const PlaneBatch residual = PlaneBatch::read(of_shortcut);
    passes_.pointwise({{PlaneBatch::read(y1_gradient_), weights}}, nullptr, &residual, PlaneBatch::written(gradient),
                      sizes_.conv1_groups, kNoActivation, nullptr);
    return gradient;
  }

 private:
  // That of v, which is y2's own without a ReLU: matrix dz - b (v - centre) - c, group by group.
  void find_y2_gradient() {
    const int64_t mid = unit_.mid(), depth = unit_.depth(), groups = sizes_.groups, of_group = unit_.rows() / groups;
    const bool of_batch2 = unit_.norms[1].of_batch && !sizes_.conv2_relu, of_batch3 = unit_.norms[2].of_batch;
    const double values = unit_.values(whole_);
    sums2_ = NormSums(mid);
    Vector mean_gradient(unit_.rows()), pull(unit_.rows());  // pull: towards the centre
    for (int64_t row = 0; row < unit_.rows() && of_batch3; ++row) {
      mean_gradient[row] = total3_[row] / values;
      pull[row] = with_y3_[row] * norm3_.rstd[row] / values;
    }
    Vector c(mid), b(mid * depth);
    Matrix matrix(mid * of_group), products(matrix.size());  // [mid][rows of a group]
    Weights of_dz(unit_.dtype(), mid, of_group), of_v(unit_.dtype(), mid, depth);
    transpose(conv3_.weight.data(), groups, of_group, depth, matrix.data());
    transpose(products_.data(), groups, of_group, depth, products.data());
    each_row(mid, of_group, [&](int64_t channel) {
      const int64_t first = channel / depth * of_group;  // row
      double* const m = matrix.data() + channel * of_group;
      const double* const of_channel = products.data() + channel * of_group;
      sums2_.total[channel] = sum_of(of_group, [&](int64_t i) { return m[i] * sum3_[first + i]; });
      sums2_.with_y[channel] = sum_of(of_group, [&](int64_t i) { return m[i] * of_channel[i]; });
      for (int64_t i = 0; i < of_group; ++i) m[i] *= conv3_.slope[channel] * norm3_.scale[first + i];
      of_dz.round(channel, m);
      c[channel] = sum_of(of_group, [&](int64_t i) { return m[i] * mean_gradient[first + i]; });
    });
    if (of_batch3) {
      const RightHandSides pulled(groups, of_group, depth, [&](int64_t row, double* to) {
        conv3_.of_v(row, to);
        for (int64_t k = 0; k < depth; ++k) to[k] *= pull[row];
      });
      pulled.multiply(
          depth, [&](int64_t channel, double* to) { std::copy_n(matrix.data() + channel * of_group, of_group, to); },
          [&](int64_t channel, const double*, const double* found) {
            std::copy_n(found, depth, b.data() + channel * depth);
          });
    }
    for (int64_t i = 0; i < mid && of_batch2; ++i) {
      b[i * depth + i % depth] += norm2_.scale[i] * norm2_.rstd[i] * norm2_.rstd[i] * sums2_.with_y[i] / values;
      c[i] += norm2_.scale[i] * sums2_.total[i] / values;
    }
    each_row(mid, depth, [&](int64_t i) {
      const double* const centre = s_.centre.data() + i / depth * depth;
      double* const row = b.data() + i * depth;
      for (int64_t k = 0; k < depth; ++k) row[k] = -row[k];
      of_v.round(i, row);
      c[i] = -c[i] - sum_of(depth, [&](int64_t k) { return row[k] * centre[k]; });
    });
    if (!sizes_.conv2_relu) {
      for (int64_t i = 0; i < mid; ++i) sums2_.with_y[i] += sums2_.total[i] * (s_.centre[i] - s_.mean2[i]);
    }
    y2_gradient_ = torch::stable::empty_like(y2_);
    const ProfiledPass pass("shuffle_bottleneck_training: gradient of conv3");
    const Numbers constant(type_, c);
    const PlaneBatch v = PlaneBatch::read(v_), dz = PlaneBatch::read(dz_);
    std::vector<PointwiseTerm> terms;
    if (of_batch2 || of_batch3) terms.push_back({v, of_v});
    terms.push_back({dz, of_dz});
    passes_.pointwise(terms, &constant, nullptr, PlaneBatch::written(y2_gradient_), groups, kNoActivation, nullptr);
  }

  // Takes the gradient of v to y2, and finds the sums between the two.
  void pass_relu_and_norm2() {
    const PlaneBatch y2 = PlaneBatch::read(y2_), gradient = PlaneBatch::written(y2_gradient_);
    const ProfiledPass pass("shuffle_bottleneck_training: gradient of relu(bn2)");
    sums2_ = passes_.norm_and_relu_backward(norm2_, y2, gradient, gradient);
    unit_.processes.sum({&sums2_.total, &sums2_.with_y});
    passes_.norm_backward(
        norm_backward_of(norm2_, unit_.norms[1].of_batch, unit_.values(whole_), sums2_), y2, gradient);
  }

  const TrainedUnit& unit_;
  const Unit& sizes_;
  ScalarType type_;
  Passes passes_;
  const Statistics& s_;
  WholeBatch whole_;
  Tensor x_, y1_, y2_, result_, result_gradient_;
  Affine norm1_, norm2_, norm3_;
  Conv3 conv3_;
  Tensor v_, dz_, y2_gradient_, y1_gradient_;
  // The sums of dz, and of dz times the normalized y3; the products of dz with v, then those of dy3; the sum of dy3,
  // the gradient of conv3's own result.
  Vector total3_, with_y3_, products_, sum3_;
  NormSums sums1_{0}, sums2_{0};
};

}  // namespace

Gradients backward(const TrainedUnit& unit, const Tensor& gradient, const Forward& done, int64_t depth) {
  Backward run(unit, gradient, done);
  Gradients found = {none_like(unit.x), {}};
  auto& [conv1, conv2, conv3] = found.stages;
  conv3 = run.conv3_gradients();
  if (depth >= kConv2) {
    conv2 = run.conv2_gradients();
    conv1 = run.conv1_gradients(depth >= kConv1);
  }
  if (depth >= kX) found.x = run.x_gradient();
  return found;
}

}  // namespace shufflenet::cpu
