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
#include <torch/csrc/stable/library.h>

#include <numeric>

#include "passes.h"

namespace shufflenet::cpu {
namespace {

// The unit's tensors and options, as the op is given them and checked.
struct TrainedUnit {
  Unit sizes;
  Tensor x;
  std::vector<ConvolutionArguments> convs;
  std::vector<TrainedNorm> norms;
  Processes processes;

  ScalarType type() const { return sums_type(x); }
  int64_t mid() const { return sizes.mid_channels; }
  int64_t rows() const { return sizes.out_channels; }
  int64_t depth() const { return sizes.slice_channels(); }
  double values(const Share& share) const {  // that norms 2 and 3 have of a channel
    return share.images * static_cast<double>(sizes.out_height() * sizes.out_width());
  }
  // Calls run(its place in a matrix, row, channel that it is multiplied with) for each of conv3's weights. Threads
  // share the rows.
  template <class Run>
  void each_weight(const Run& run) const {
    const int64_t of_group = rows() / sizes.groups;
    each_row(rows(), depth(), [&](int64_t row) {
      const int64_t first = row / of_group * depth();
      for (int64_t k = 0; k < depth(); ++k) run(row * depth() + k, row, first + k);
    });
  }
  Tensor weight(int64_t i) const { return as_contiguous(convs[i].weight, type()); }
  Tensor planes(int64_t channels, int64_t height, int64_t width) const {
    return torch::stable::new_empty(x, std::vector<int64_t>{x.size(0), channels, height, width}, type());
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
  Vector share;       // the images of all processes' batches, and how many processes those are
  Vector centre;      // of v
  Vector covariance;  // of v within each group; empty where norm 3 does not use the batch's statistics

  std::array<Vector*, 12> parts() {
    return {
        &mean1, &unbiased1, &mean2, &unbiased2, &mean3, &unbiased3, &var1, &var2, &var3, &share, &centre, &covariance};
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
    check_shape("kept statistics", flat, {std::accumulate(sizes.begin(), sizes.end(), int64_t{0})});
    const Vector numbers = numbers_of("kept statistics", flat);
    auto from = numbers.begin();
    for (size_t i = 0; i < sizes.size(); from += sizes[i++]) s.parts()[i]->assign(from, from + sizes[i]);
    return s;
  }
};

// What follows from conv3's weights and norm 2: see above.
struct Conv3 {
  Conv3(const TrainedUnit& unit, const Affine& norm2, const Vector& centre)
      : weight(numbers_of("conv3_weight", unit.convs[2].weight)),
        of_v(weight),
        slope(unit.mid(), 1.0),
        at_centre(centre),
        mean_at_centre(unit.rows()) {
    if (!unit.sizes.conv2_relu) {
      slope = norm2.scale;
      for (int64_t c = 0; c < unit.mid(); ++c) {
        at_centre[c] = norm2.scale[c] * (centre[c] - norm2.mean[c]) + norm2.bias[c];
      }
    }
    unit.each_weight([&](int64_t i, int64_t row, int64_t channel) {
      of_v[i] *= slope[channel];
      mean_at_centre[row] += weight[i] * at_centre[channel];
    });
  }
  Vector weight, of_v;      // as it is, and times the slope
  Vector slope, at_centre;  // of the channels that it reads
  Vector mean_at_centre;    // of its rows: what they are where v is at its centre
};

TrainingDepthwise depthwise_of(const Unit& unit, const void* weight, const Numbers& scale, const Numbers& shift) {
  TrainingDepthwise d = {};
  d.in = {unit.height, unit.width};
  d.out = {unit.out_height(), unit.out_width()};
  d.stride = unit.stride;
  d.channels = unit.mid_channels;
  d.shuffle_groups = unit.shuffle_groups;
  d.norm1 = {scale.data(), shift.data()};
  d.weight = weight;
  return d;
}

struct Forward {
  Tensor result, y1, y2;
  Statistics statistics;
};

// The unit's result, its norms in training mode or not, and what its backward pass needs.
Forward forward(const TrainedUnit& unit) {
  const Unit& sizes = unit.sizes;
  const ScalarType type = unit.type();
  const Passes passes(type);
  const Share share(unit.x.size(0), unit.processes);
  const TrainedNorm &norm1 = unit.norms[0], &norm2 = unit.norms[1], &norm3 = unit.norms[2];
  const Tensor x_tensor = as_contiguous(unit.x, type);
  const PlaneBatch x = PlaneBatch::read(x_tensor);
  Forward done;
  Statistics& s = done.statistics;
  s.share = {share.images, share.count};

  done.y1 = unit.planes(unit.mid(), sizes.height, sizes.width);
  const PlaneBatch y1 = PlaneBatch::written(done.y1);
  std::optional<Moments> moments;
  if (norm1.of_batch) moments.emplace(y1.images, y1.channels);
  const Tensor weight1 = unit.weight(0), weight2 = unit.weight(1);
  {
    const ProfiledPass pass("shuffle_bottleneck_training: conv1");
    passes.pointwise({{x, weight1.const_data_ptr()}}, nullptr, nullptr, y1, sizes.conv1_groups, kNoActivation,
                     moments ? &*moments : nullptr);
  }
  const MeanAndVariance of_y1 =
      moments ? MeanAndVariance(*moments, y1.pixels(), share, unit.processes) : norm1.fixed_statistics(unit.mid());
  const Affine affine1(norm1, of_y1);

  done.y2 = unit.planes(unit.mid(), sizes.out_height(), sizes.out_width());
  const PlaneBatch y2 = PlaneBatch::written(done.y2);
  moments.reset();
  if (norm2.of_batch || norm3.of_batch) moments.emplace(y2.images, y2.channels);
  {
    const ProfiledPass pass("shuffle_bottleneck_training: conv2");
    const Numbers scale(type, affine1.scale), shift(type, affine1.shifts());
    passes.depthwise(
        depthwise_of(sizes, weight2.const_data_ptr(), scale, shift), y1, y2, moments ? &*moments : nullptr);
  }
  MeanAndVariance of_y2 = norm2.fixed_statistics(unit.mid());
  s.centre = of_y2.mean;
  if (moments) {
    MeanAndVariance found(*moments, y2.pixels(), share, unit.processes);
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
    s.centre = norm3.of_batch ? MeanAndVariance(passes.moments(v), v.pixels(), share, unit.processes).mean
                              : Vector(unit.mid(), 0.0);
  }
  const Conv3 conv3(unit, affine2, s.centre);
  MeanAndVariance of_y3(conv3.mean_at_centre, Vector(unit.rows(), 0.0));
  if (norm3.of_batch) {
    const ProfiledPass pass("shuffle_bottleneck_training: covariance");
    s.covariance = passes.products(v, v, Numbers(type, s.centre).data(), sizes.groups);
    unit.processes.sum({&s.covariance});
    for (double& each : s.covariance) each /= unit.values(share);
    const Vector products = times_transposed(conv3.of_v, s.covariance, sizes.groups, unit.depth());
    unit.each_weight([&](int64_t i, int64_t row, int64_t) { of_y3.var[row] += products[i] * conv3.of_v[i]; });
  } else {
    of_y3 = norm3.fixed_statistics(unit.rows());
  }
  const Affine affine3(norm3, of_y3);

  // conv3 and its norm as one convolution of v, the shortcut and the last ReLU.
  Vector matrix(conv3.of_v), bias(unit.rows());
  for (int64_t row = 0; row < unit.rows(); ++row) {
    bias[row] = affine3.bias[row] + affine3.scale[row] * (conv3.mean_at_centre[row] - affine3.mean[row]);
  }
  unit.each_weight([&](int64_t i, int64_t row, int64_t channel) {
    matrix[i] *= affine3.scale[row];
    bias[row] -= matrix[i] * s.centre[channel];
  });
  done.result = unit.planes(sizes.result_channels(), sizes.out_height(), sizes.out_width());
  const PlaneBatch result = PlaneBatch::written(done.result);
  {
    const ProfiledPass pass("shuffle_bottleneck_training: conv3");
    const Numbers weight(type, matrix), added(type, bias);
    passes.pointwise({{v, weight.data()}}, added.data(), sizes.adds_residual() ? &x : nullptr, unit.main_of(result),
                     sizes.groups, sizes.conv3_activation(), nullptr);
  }
  if (sizes.concatenates_pool()) {
    const ProfiledPass pass("shuffle_bottleneck_training: pool");
    passes.pool(sizes, x, unit.pooled_of(result));
  }
  s.mean1 = of_y1.mean, s.var1 = of_y1.var, s.unbiased1 = of_y1.unbiased(y1.pixels(), share);
  s.mean2 = of_y2.mean, s.var2 = of_y2.var, s.unbiased2 = of_y2.unbiased(y2.pixels(), share);
  s.mean3 = of_y3.mean, s.var3 = of_y3.var, s.unbiased3 = of_y3.unbiased(y2.pixels(), share);
  return done;
}

// Gradients of a convolution's weight, in its own order of rows, and of its bias and norm.
struct StageGradients {
  Vector weight;
  NormGradients norm;
};

// The backward pass of a unit, whose methods are called in their order.
class Backward {
 public:
  Backward(const TrainedUnit& unit, const Tensor& gradient, const Tensor& result, const Tensor& y1, const Tensor& y2,
           const Statistics& statistics)
      : unit_(unit),
        sizes_(unit.sizes),
        type_(unit.type()),
        passes_(type_),
        s_(statistics),
        share_(s_.share[0], s_.share[1]),
        x_(as_contiguous(unit.x, type_)),
        y1_(as_contiguous(y1, type_)),
        y2_(as_contiguous(y2, type_)),
        result_(as_contiguous(result, type_)),
        result_gradient_(as_contiguous(gradient, type_)),
        norm1_(unit.norms[0], {s_.mean1, s_.var1}),
        norm2_(unit.norms[1], {s_.mean2, s_.var2}),
        norm3_(unit.norms[2], {s_.mean3, s_.var3}),
        conv3_(unit, norm2_, s_.centre),
        v_(y2_) {
    if (sizes_.conv2_relu) {
      v_ = torch::stable::empty_like(y2_);
      const ProfiledPass pass("shuffle_bottleneck_training: relu(bn2)");
      passes_.norm_and_relu(norm2_, PlaneBatch::read(y2_), PlaneBatch::written(v_));
    }
  }

  StageGradients conv3_gradients() {
    // Of conv3's result before its norm, dy3 = scale3 * (dz - total / values - rstd3 * y3 * with_y3 / values).
    dz_ = unit_.planes(unit_.rows(), sizes_.out_height(), sizes_.out_width());
    {
      const ProfiledPass pass("shuffle_bottleneck_training: gradient of conv3's weight");
      products_ = passes_.relu_backward(
          unit_.main_of(PlaneBatch::read(result_)), unit_.main_of(PlaneBatch::read(result_gradient_)),
          PlaneBatch::written(dz_), PlaneBatch::read(v_), Numbers(type_, s_.centre).data(), sizes_.groups, total3_);
    }
    unit_.processes.sum({&products_, &total3_});
    with_y3_.assign(unit_.rows(), 0.0);
    unit_.each_weight([&](int64_t i, int64_t row, int64_t) {
      with_y3_[row] += norm3_.rstd[row] * conv3_.of_v[i] * products_[i];
    });
    NormSums sums(unit_.rows());
    sums.total = total3_;
    sum3_.assign(unit_.rows(), 0.0);
    if (unit_.norms[2].of_batch) {
      const Vector of_covariance = times_transposed(conv3_.of_v, s_.covariance, sizes_.groups, unit_.depth());
      unit_.each_weight([&](int64_t i, int64_t row, int64_t) {
        products_[i] -= of_covariance[i] * with_y3_[row] * norm3_.rstd[row];
      });
    }
    for (int64_t row = 0; row < unit_.rows(); ++row) {
      sums.with_y[row] = with_y3_[row] / norm3_.rstd[row];
      if (unit_.norms[2].of_batch) continue;
      sum3_[row] = norm3_.scale[row] * total3_[row];
      sums.with_y[row] += total3_[row] * (conv3_.mean_at_centre[row] - s_.mean3[row]);
    }
    Vector of_weight(products_.size());
    unit_.each_weight([&](int64_t i, int64_t row, int64_t channel) {
      products_[i] *= norm3_.scale[row];  // of dy3 with v
      of_weight[i] = (conv3_.slope[channel] * products_[i] + sum3_[row] * conv3_.at_centre[channel]) / share_.count;
    });
    return {std::move(of_weight), {norm3_, unit_.norms[2].of_batch, sums, share_}};
  }

  StageGradients conv2_gradients() {
    find_y2_gradient();
    if (sizes_.conv2_relu) pass_relu_and_norm2();
    const NormGradients of_norm(norm2_, unit_.norms[1].of_batch, sums2_, share_);

    y1_gradient_ = torch::stable::empty_like(y1_);
    const Numbers scale(type_, norm1_.scale), shift(type_, norm1_.shifts()), means(type_, s_.mean1);
    const Tensor weight = unit_.weight(1);
    const TrainingDepthwise d = depthwise_of(sizes_, weight.const_data_ptr(), scale, shift);
    std::vector<DepthwiseSums> of_images;
    {
      const ProfiledPass pass("shuffle_bottleneck_training: gradient of conv2");
      of_images = passes_.depthwise_backward(
          d, PlaneBatch::read(y2_gradient_), PlaneBatch::read(y1_), means.data(), PlaneBatch::written(y1_gradient_));
    }
    Vector taps(unit_.mid() * 9);
    sums1_ = NormSums(unit_.mid());
    for (size_t i = 0; i < of_images.size(); ++i) {
      const auto c = static_cast<int64_t>(i) % unit_.mid();
      sums1_.total[d.source(c)] += of_images[i].gradient;
      sums1_.with_y[d.source(c)] += of_images[i].gradient_times_y1;
      for (int64_t tap = 0; tap < 9; ++tap) taps[c * 9 + tap] += of_images[i].taps[tap];
    }
    unit_.processes.sum({&sums1_.total, &sums1_.with_y});
    return {std::move(taps), of_norm};
  }

  // Those of its weight where it is wanted, and of its norm.
  StageGradients conv1_gradients(bool with_weight) {
    const bool of_batch = unit_.norms[0].of_batch;
    StageGradients gradients = {{}, {norm1_, of_batch, sums1_, share_}};
    if (!with_weight) return gradients;
    const PlaneBatch y1 = PlaneBatch::read(y1_), gradient = PlaneBatch::written(y1_gradient_);
    {
      const ProfiledPass pass("shuffle_bottleneck_training: gradient of bn1");
      const double values = share_.images * static_cast<double>(y1.pixels());
      passes_.norm_backward(norm_backward_of(norm1_, of_batch, values, sums1_), y1, gradient);
    }
    const ProfiledPass pass("shuffle_bottleneck_training: gradient of conv1's weight");
    // Turned about, as the planes of the first operand are read but once.
    const Vector turned = passes_.products(PlaneBatch::read(x_), gradient, nullptr, sizes_.conv1_groups);
    gradients.weight.resize(turned.size());
    const int64_t rows = sizes_.conv1_group_rows(), depth = sizes_.conv1_depth();
    for (int64_t row = 0; row < unit_.mid(); ++row) {
      const double* const from = turned.data() + row / rows * depth * rows + row % rows;
      for (int64_t k = 0; k < depth; ++k) gradients.weight[row * depth + k] = from[k * rows];
    }
    return gradients;
  }

  Tensor x_gradient() {
    Tensor gradient = dz_;
    if (sizes_.concatenates_pool()) {
      Tensor pooled = result_gradient_;
      if (sizes_.shortcut_relu) {
        pooled = unit_.planes(sizes_.result_channels(), sizes_.out_height(), sizes_.out_width());
        const ProfiledPass pass("shuffle_bottleneck_training: gradient of the pool's ReLU");
        passes_.relu_backward(
            unit_.pooled_of(PlaneBatch::read(result_)), unit_.pooled_of(PlaneBatch::read(result_gradient_)),
            unit_.pooled_of(PlaneBatch::written(pooled)));
      }
      gradient = torch::stable::empty_like(x_);
      const ProfiledPass pass("shuffle_bottleneck_training: gradient of the pool");
      passes_.pool_backward(sizes_, unit_.pooled_of(PlaneBatch::read(pooled)), PlaneBatch::written(gradient));
    }
    const int64_t rows = sizes_.conv1_group_rows(), depth = sizes_.conv1_depth();
    const Vector weight = numbers_of("conv1_weight", unit_.convs[0].weight);
    Vector turned(weight.size());  // [in_channels][rows of a group]
    for (int64_t row = 0; row < unit_.mid(); ++row) {
      double* const to = turned.data() + row / rows * depth * rows + row % rows;
      for (int64_t k = 0; k < depth; ++k) to[k * rows] = weight[row * depth + k];
    }
    const ProfiledPass pass("shuffle_bottleneck_training: gradient of conv1");
    const PlaneBatch to = PlaneBatch::written(gradient);
    const Numbers matrix(type_, turned);
    passes_.pointwise({{PlaneBatch::read(y1_gradient_), matrix.data()}}, nullptr, &to, to, sizes_.conv1_groups,
                      kNoActivation, nullptr);
    return as_given(gradient, unit_.x);
  }

 private:
  // That of v, which is y2's own without a ReLU: matrix dz - b (v - centre) - c, group by group.
  void find_y2_gradient() {
    const int64_t mid = unit_.mid(), depth = unit_.depth(), groups = sizes_.groups, of_group = unit_.rows() / groups;
    const bool of_batch2 = unit_.norms[1].of_batch && !sizes_.conv2_relu, of_batch3 = unit_.norms[2].of_batch;
    const double values = unit_.values(share_);
    sums2_ = NormSums(mid);
    Vector matrix(mid * of_group), pulled(matrix), c(mid);  // [mid][rows of a group]; pulled: towards the centre
    Vector mean_gradient(unit_.rows()), pull(unit_.rows());
    for (int64_t row = 0; row < unit_.rows() && of_batch3; ++row) {
      mean_gradient[row] = total3_[row] / values;
      pull[row] = with_y3_[row] * norm3_.rstd[row] / values;
    }
    each_row(mid, of_group, [&](int64_t channel) {
      const int64_t first = channel / depth * of_group, k = channel % depth;
      for (int64_t row = first; row < first + of_group; ++row) {
        const int64_t i = channel * of_group + row - first, weight = row * depth + k;
        matrix[i] = conv3_.of_v[weight] * norm3_.scale[row];
        pulled[i] = conv3_.of_v[weight] * pull[row];
        c[channel] += matrix[i] * mean_gradient[row];
        sums2_.total[channel] += conv3_.weight[weight] * sum3_[row];
        sums2_.with_y[channel] += conv3_.weight[weight] * products_[weight];
      }
    });
    Vector b = of_batch3 ? times_transposed(matrix, pulled, groups, of_group) : Vector(mid * depth, 0.0);
    for (int64_t i = 0; i < mid && of_batch2; ++i) {
      b[i * depth + i % depth] += norm2_.scale[i] * norm2_.rstd[i] * norm2_.rstd[i] * sums2_.with_y[i] / values;
      c[i] += norm2_.scale[i] * sums2_.total[i] / values;
    }
    each_row(mid, depth, [&](int64_t i) {
      const double* const centre = s_.centre.data() + i / depth * depth;
      c[i] = -c[i];
      for (int64_t k = 0; k < depth; ++k) {
        double& each = b[i * depth + k];
        c[i] += each * centre[k];
        each = -each;
      }
    });
    if (!sizes_.conv2_relu) {
      for (int64_t i = 0; i < mid; ++i) sums2_.with_y[i] += sums2_.total[i] * (s_.centre[i] - s_.mean2[i]);
    }
    y2_gradient_ = torch::stable::empty_like(y2_);
    const ProfiledPass pass("shuffle_bottleneck_training: gradient of conv3");
    const Numbers of_v(type_, b), constant(type_, c), of_dz(type_, matrix);
    const PlaneBatch v = PlaneBatch::read(v_), dz = PlaneBatch::read(dz_);
    std::vector<PointwiseTerm> terms;
    if (of_batch2 || of_batch3) terms.push_back({v, of_v.data()});
    terms.push_back({dz, of_dz.data()});
    passes_.pointwise(
        terms, constant.data(), nullptr, PlaneBatch::written(y2_gradient_), groups, kNoActivation, nullptr);
  }

  // Takes the gradient of v to y2, and finds the sums between the two.
  void pass_relu_and_norm2() {
    const PlaneBatch y2 = PlaneBatch::read(y2_), gradient = PlaneBatch::written(y2_gradient_);
    const ProfiledPass pass("shuffle_bottleneck_training: gradient of relu(bn2)");
    sums2_ = passes_.norm_and_relu_backward(norm2_, y2, gradient, gradient);
    unit_.processes.sum({&sums2_.total, &sums2_.with_y});
    passes_.norm_backward(
        norm_backward_of(norm2_, unit_.norms[1].of_batch, unit_.values(share_), sums2_), y2, gradient);
  }

  const TrainedUnit& unit_;
  const Unit& sizes_;
  ScalarType type_;
  Passes passes_;
  const Statistics& s_;
  Share share_;
  Tensor x_, y1_, y2_, result_, result_gradient_;
  Affine norm1_, norm2_, norm3_;
  Conv3 conv3_;
  Tensor v_, dz_, y2_gradient_, y1_gradient_;
  // Of dz: its sum; times y3; its products with v. Of dy3, conv3's own result: its sum.
  Vector total3_, with_y3_, products_, sum3_;
  NormSums sums1_{0}, sums2_{0};
};

constexpr size_t kTensors = 6;  // of a convolution: weight and bias; its norm's weight, bias, mean and variance
constexpr size_t kTrained = 4;  // of those, the first ones have gradients

TrainedUnit checked(const Tensor& x, const std::vector<std::optional<Tensor>>& tensors, const std::vector<double>& eps,
                    const std::vector<bool>& of_batch, UnitArguments arguments, const std::string& processes) {
  if (!x.is_cpu()) fail("x: got a tensor on another device, expected one on the CPU");
  if (tensors.size() != 3 * kTensors) fail("tensors: got ", tensors.size(), ", expected ", 3 * kTensors);
  if (eps.size() != 3) fail("eps: got ", eps.size(), " numbers, expected 3");
  if (of_batch.size() != 3) fail("of_batch: got ", of_batch.size(), " values, expected 3");
  std::vector<ConvolutionArguments> convs;
  std::vector<TrainedNorm> norms;
  for (size_t i = 0; i < 3; ++i) {
    const auto* const own = tensors.data() + i * kTensors;
    const std::string number = std::to_string(i + 1);
    if (!own[0]) fail("conv", number, "_weight: got None, expected a tensor");
    convs.push_back({"conv" + number, *own[0], own[1], {}});
    norms.push_back({own[1], own[2], own[3], own[4], own[5], eps[i], of_batch[i]});
  }
  arguments.x = x;
  arguments.conv1 = convs[0];
  arguments.conv2 = convs[1];
  arguments.conv3 = convs[2];
  const Unit sizes = check_unit(arguments);
  norms[0].check("bn1", sizes.mid_channels);
  norms[1].check("bn2", sizes.mid_channels);
  norms[2].check("bn3", sizes.out_channels);
  return {sizes, x, std::move(convs), std::move(norms), Processes(processes)};
}

std::vector<Tensor> training_unit(Tensor x, std::vector<std::optional<Tensor>> tensors, std::vector<double> eps,
                                  std::vector<bool> of_batch, int64_t conv1_groups, int64_t groups, int64_t stride,
                                  bool conv2_relu, bool pool_count_include_pad, int64_t shuffle_groups,
                                  bool shortcut_first, bool shortcut_relu, std::string processes) {
  const TrainedUnit unit = checked(
      x, tensors, eps, of_batch,
      {{},
       {},
       {},
       {},
       conv1_groups,
       groups,
       stride,
       conv2_relu,
       pool_count_include_pad,
       false,
       shuffle_groups,
       shortcut_first,
       shortcut_relu},
      processes);
  Forward done = forward(unit);
  const auto kept = [&](const Tensor& y) {
    return y.scalar_type() == x.scalar_type() ? y : torch::stable::to(y, x.scalar_type());
  };
  return {as_given(done.result, x), kept(done.y1), kept(done.y2), done.statistics.flat(x)};
}

// How far back gradients are wanted: to norm 3 and conv3, to norm 2 and conv2, to norm 1 and conv1, to x. Those of norm
// 1's tensors come with conv2's.
enum Depth : int64_t { kConv3 = 1, kConv2, kConv1, kX };

// The gradients of x and of each convolution's trained tensors; empty tensors where they are not wanted or there is no
// such tensor.
std::vector<Tensor> training_unit_backward(
    Tensor gradient, Tensor x, Tensor result, Tensor y1, Tensor y2, Tensor statistics,
    std::vector<std::optional<Tensor>> tensors, std::vector<double> eps, std::vector<bool> of_batch, int64_t depth,
    int64_t conv1_groups, int64_t groups, int64_t stride, bool conv2_relu, bool pool_count_include_pad,
    int64_t shuffle_groups, bool shortcut_first, bool shortcut_relu, std::string processes) {
  const TrainedUnit unit = checked(
      x, tensors, eps, of_batch,
      {{},
       {},
       {},
       {},
       conv1_groups,
       groups,
       stride,
       conv2_relu,
       pool_count_include_pad,
       false,
       shuffle_groups,
       shortcut_first,
       shortcut_relu},
      processes);
  if (depth < kConv3 || depth > kX) fail("depth: got ", depth, ", expected 1 to 4");
  const Unit& sizes = unit.sizes;
  const int64_t n = x.size(0), mid = unit.mid(), height = sizes.out_height(), width = sizes.out_width();
  const std::vector<int64_t> of_result = {n, sizes.result_channels(), height, width};
  check_shape("gradient", gradient, of_result);
  check_shape("result", result, of_result);
  check_shape("y1", y1, {n, mid, sizes.height, sizes.width});
  check_shape("y2", y2, {n, mid, height, width});
  for (const Tensor* each : {&gradient, &result, &y1, &y2}) check_like_x("gradient, result, y1 and y2", *each, x);
  const Statistics kept = Statistics::of(statistics, unit);

  std::vector<Tensor> gradients(1 + 3 * kTrained, torch::stable::new_empty(x, std::vector<int64_t>{0}));
  const auto give = [&](size_t stage, const StageGradients& found) {
    const std::array<const Vector*, kTrained> numbers = {
        &found.weight, &found.norm.conv_bias, &found.norm.weight, &found.norm.bias};
    for (size_t i = 0; i < kTrained; ++i) {
      const std::optional<Tensor>& like = tensors[stage * kTensors + i];
      if (!like || numbers[i]->empty()) continue;
      gradients[1 + stage * kTrained + i] = tensor_of(*numbers[i], sizes_of(*like), like->scalar_type(), x);
    }
  };
  Backward backward(unit, gradient, result, y1, y2, kept);
  give(2, backward.conv3_gradients());
  if (depth >= kConv2) give(1, backward.conv2_gradients());
  if (depth >= kConv2) give(0, backward.conv1_gradients(depth >= kConv1));
  if (depth >= kX) gradients[0] = backward.x_gradient();
  return gradients;
}

}  // namespace
}  // namespace shufflenet::cpu

STABLE_TORCH_LIBRARY_IMPL(shufflenet_ext, CPU, m) {
  using namespace shufflenet::cpu;
  m.impl("training_unit", TORCH_BOX(&training_unit));
  m.impl("training_unit_backward", TORCH_BOX(&training_unit_backward));
}
