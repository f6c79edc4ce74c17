#include "unit.h"

namespace shufflenet::cpu {

Forward forward(const TrainedUnit& unit) {
  const Unit& sizes = unit.sizes;
  const ScalarType type = unit.type();
  const Passes passes(unit.dtype());
  const WholeBatch whole(unit.x.size(0), unit.processes);
  const TrainedNorm &norm1 = unit.norms[0], &norm2 = unit.norms[1], &norm3 = unit.norms[2];
  const Tensor x_tensor = dense(unit.x, sizes.layout);
  const PlaneBatch x = PlaneBatch::read(x_tensor);
  Forward done;
  Statistics& s = done.statistics;
  s.whole = {whole.images, whole.count};

  done.y1 = unit.planes(unit.mid(), sizes.height, sizes.width);
  const PlaneBatch y1 = PlaneBatch::written(done.y1);
  std::optional<Moments> moments1, moments2;
  if (norm1.of_batch) moments1.emplace(y1.images, y1.channels);
  const Weights weights1 =
      weights_of(unit.dtype(), matrix_of("conv1_weight", unit.convs[0].weight), sizes.conv1_depth());
  {
    const ProfiledPass pass("shuffle_bottleneck_training: conv1");
    passes.pointwise(
        {{x, weights1}}, nullptr, nullptr, y1, sizes.conv1_groups, kNoActivation, moments1 ? &*moments1 : nullptr);
  }
  const MeanAndVariance of_y1 =
      moments1 ? MeanAndVariance(*moments1, y1.pixels(), whole, unit.processes) : norm1.fixed_statistics(unit.mid());
  const Affine affine1(norm1, of_y1);

  done.y2 = unit.planes(unit.mid(), sizes.out_height(), sizes.out_width());
  const PlaneBatch y2 = PlaneBatch::written(done.y2);
  if (norm2.of_batch || norm3.of_batch) moments2.emplace(y2.images, y2.channels);
  {
    const ProfiledPass pass("shuffle_bottleneck_training: conv2");
    const Numbers weight = unit.depthwise_weight(), scale(type, affine1.scale), shift(type, affine1.shifts());
    passes.depthwise(depthwise_of(sizes, weight, scale, shift), y1, y2, moments2 ? &*moments2 : nullptr);
  }
  MeanAndVariance of_y2 = norm2.fixed_statistics(unit.mid());
  s.centre = of_y2.mean;
  if (moments2) {
    MeanAndVariance found(*moments2, y2.pixels(), whole, unit.processes);
    s.centre = found.mean;
    if (norm2.of_batch) of_y2 = std::move(found);
  }
  const Affine affine2(norm2, of_y2);

  Tensor v_tensor = done.y2;
  if (sizes.conv2_relu) {
    v_tensor = unit.planes(unit.mid(), sizes.out_height(), sizes.out_width());
    const ProfiledPass pass("shuffle_bottleneck_training: relu(bn2)");
    passes.norm_and_relu(affine2, y2, PlaneBatch::written(v_tensor));
  }
  const PlaneBatch v = PlaneBatch::read(v_tensor);
  if (sizes.conv2_relu) {
    const ProfiledPass pass("shuffle_bottleneck_training: mean of relu(bn2)");
    s.centre = norm3.of_batch ? mean_of(passes.moments(v), whole, unit.processes) : Vector(unit.mid(), 0.0);
  }
  const Conv3 conv3(unit, affine2, s.centre);
  MeanAndVariance of_y3(conv3.mean_at_centre, Vector(unit.rows(), 0.0));
  if (norm3.of_batch) {
    {
      const ProfiledPass pass("shuffle_bottleneck_training: covariance");
      const Numbers centre(type, s.centre);
      s.covariance = passes.gram_matrix(v, centre, sizes.groups);
    }
    unit.processes.sum({&s.covariance});
    for (double& each : s.covariance) each /= unit.values(whole);
    conv3.times_covariance(s.covariance, [&](int64_t row, const double* of_v, const double* products) {
      // Rounding may leave less than zero where it is zero. NaN stays.
      of_y3.var[row] = std::max(sum_of(unit.depth(), [&](int64_t k) { return of_v[k] * products[k]; }), 0.0);
    });
  } else {
    of_y3 = norm3.fixed_statistics(unit.rows());
  }
  const Affine affine3(norm3, of_y3);

  // conv3 and its norm as one convolution of v, the shortcut and the last ReLU.
  Weights weights3(unit.dtype(), unit.rows(), unit.depth());
  Vector bias(unit.rows());
  conv3.each_row([&](int64_t row, double* of_v) {
    for (int64_t k = 0; k < unit.depth(); ++k) of_v[k] *= affine3.scale[row];
    weights3.round(row, of_v);
    const double* const centre = s.centre.data() + conv3.first_channel(row);
    bias[row] = affine3.bias[row] + affine3.scale[row] * (conv3.mean_at_centre[row] - affine3.mean[row]) -
                sum_of(unit.depth(), [&](int64_t k) { return of_v[k] * centre[k]; });
  });
  done.result = empty_result(unit.x, sizes);
  const PlaneBatch result = PlaneBatch::written(done.result);
  {
    const ProfiledPass pass("shuffle_bottleneck_training: conv3");
    const Numbers added(type, bias);
    passes.pointwise({{v, weights3}}, &added, sizes.adds_residual() ? &x : nullptr, unit.main_of(result), sizes.groups,
                     sizes.conv3_activation(), nullptr);
  }
  if (sizes.concatenates_pool()) {
    const ProfiledPass pass("shuffle_bottleneck_training: pool");
    passes.pool(sizes, x, unit.pooled_of(result));
  }
  s.mean1 = of_y1.mean, s.var1 = of_y1.var, s.unbiased1 = of_y1.unbiased(y1.pixels(), whole);
  s.mean2 = of_y2.mean, s.var2 = of_y2.var, s.unbiased2 = of_y2.unbiased(y2.pixels(), whole);
  s.mean3 = of_y3.mean, s.var3 = of_y3.var, s.unbiased3 = of_y3.unbiased(y2.pixels(), whole);
  return done;
}

}  // namespace shufflenet::cpu
