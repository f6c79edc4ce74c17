// The batch norms of a training step: what they normalize by, and what their gradients follow from. `mean` is that of
// the convolution's result without its bias, which the passes leave out.
#pragma once

#include <cmath>

#include "tensors.h"

namespace shufflenet::cpu {

// The processes that share the norms' statistics, by their group's name; empty: this process has its own.
class Processes {
 public:
  explicit Processes(std::string name) : name_(std::move(name)) {}

  // Replaces numbers by their sums over all processes.
  void sum(std::initializer_list<Vector*> vectors) const {
    if (name_.empty()) return;
    int64_t size = 0;
    for (const Vector* vector : vectors) size += static_cast<int64_t>(vector->size());
    Tensor flat = torch::stable::empty({size}, ScalarType::Double);
    auto* data = static_cast<double*>(flat.mutable_data_ptr());
    for (const Vector* vector : vectors) data = std::copy(vector->begin(), vector->end(), data);
    std::array<StableIValue, 2> stack{torch::stable::detail::from(flat), torch::stable::detail::from(name_)};
    // That of _training_op.py: torch.distributed is Python's.
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("shufflenet_ext::sum_over_processes", "", stack.data(), TORCH_ABI_VERSION));
    const auto* sums = static_cast<const double*>(flat.const_data_ptr());
    for (Vector* vector : vectors) {
      std::copy_n(sums, vector->size(), vector->begin());
      sums += vector->size();
    }
  }

 private:
  std::string name_;
};

// The batches of all processes: their images, and how many processes those are.
struct WholeBatch {
  WholeBatch(int64_t images_here, const Processes& processes) {
    Vector both = {static_cast<double>(images_here), 1};
    processes.sum({&both});
    images = both[0];
    count = both[1];
  }
  WholeBatch(double all_images, double processes) : images(all_images), count(processes) {}
  double images, count;
};

// The mean of each channel of each image of a batch, and the sum of squared deviations from it.
struct Moments {
  Moments(int64_t batch, int64_t planes) : images(batch), channels(planes), means(batch * planes), squares(means) {}
  double* means_of(int64_t image, int64_t channel) { return means.data() + image * channels + channel; }
  double* squares_of(int64_t image, int64_t channel) { return squares.data() + image * channels + channel; }
  const double* means_of(int64_t image) const { return means.data() + image * channels; }
  const double* squares_of(int64_t image) const { return squares.data() + image * channels; }

  int64_t images, channels;
  Vector means, squares;
};

// The mean of channels over the batches of all processes.
inline Vector mean_of(const Moments& moments, const WholeBatch& whole, const Processes& processes) {
  Vector mean(moments.channels);
  for (int64_t n = 0; n < moments.images; ++n) {
    const double* const of_image = moments.means_of(n);
    for (int64_t c = 0; c < moments.channels; ++c) mean[c] += of_image[c];
  }
  processes.sum({&mean});
  for (double& each : mean) each /= whole.images;
  return mean;
}

// Mean and variance of channels over the batches of all processes.
struct MeanAndVariance {
  MeanAndVariance(Vector means, Vector variances) : mean(std::move(means)), var(std::move(variances)) {}
  MeanAndVariance(const Moments& moments, int64_t pixels, const WholeBatch& whole, const Processes& processes)
      : mean(mean_of(moments, whole, processes)), var(mean.size()) {
    for (int64_t n = 0; n < moments.images; ++n) {
      const double *const means = moments.means_of(n), *const squares = moments.squares_of(n);
      for (int64_t c = 0; c < moments.channels; ++c) {
        const double deviation = means[c] - mean[c];
        var[c] += squares[c] + static_cast<double>(pixels) * deviation * deviation;
      }
    }
    processes.sum({&var});
    for (double& each : var) each /= whole.images * static_cast<double>(pixels);
  }
  // The variances that running ones are made of, from planes of so many pixels.
  Vector unbiased(int64_t pixels, const WholeBatch& whole) const {
    const double values = whole.images * static_cast<double>(pixels);
    Vector all(var);
    for (double& each : all) each *= values / (values - 1);
    return all;
  }
  Vector mean, var;
};

// A batch norm's tensors, and the bias of the convolution before it. Where there is no norm, all but that one are
// missing, and eps is 0: it then changes nothing.
struct TrainedNorm {
  std::optional<Tensor> conv_bias, weight, bias, running_mean, running_var;
  double eps;
  bool of_batch;  // whether it normalizes by the batch's statistics

  // Refuses tensors that are not of these channels. `name`: "bn1", say.
  void check(const std::string& name, int64_t channels) const {
    const std::array<std::pair<const char*, const std::optional<Tensor>*>, 4> tensors = {
        {{"_weight", &weight}, {"_bias", &bias}, {"_mean", &running_mean}, {"_var", &running_var}}};
    for (const auto& [suffix, tensor] : tensors) {
      if (!*tensor) continue;
      check_shape((name + suffix).c_str(), **tensor, {channels});
      dtype_of((name + suffix).c_str(), **tensor);
      if (!(*tensor)->is_cpu()) fail(name, suffix, ": got a tensor on another device than x's, expected the same");
    }
    if (running_mean.has_value() != running_var.has_value()) {
      fail(name, "_mean and ", name, "_var: got one of them, expected both or none");
    }
  }

  // What a norm normalizes by that does not use the batch's statistics.
  MeanAndVariance fixed_statistics(int64_t channels) const {
    Vector mean = running_mean ? numbers_of("mean", *running_mean) : Vector(channels, 0.0);
    Vector var = running_var ? numbers_of("var", *running_var) : Vector(channels, 1.0);
    if (conv_bias) {
      const Vector added = numbers_of("bias", *conv_bias);
      for (int64_t c = 0; c < channels; ++c) mean[c] -= added[c];
    }
    return {std::move(mean), std::move(var)};
  }
};

// A norm as it is applied: scale * (y - mean) + bias.
struct Affine {
  Affine(const TrainedNorm& norm, const MeanAndVariance& statistics)
      : mean(statistics.mean), rstd(mean.size()), scale(mean.size(), 1.0), bias(mean.size(), 0.0) {
    if (norm.weight) scale = numbers_of("weight", *norm.weight);
    if (norm.bias) bias = numbers_of("bias", *norm.bias);
    for (size_t c = 0; c < mean.size(); ++c) {
      rstd[c] = 1 / std::sqrt(statistics.var[c] + norm.eps);
      scale[c] *= rstd[c];
    }
  }
  double shift(int64_t c) const { return bias[c] - scale[c] * mean[c]; }
  Vector shifts() const {
    Vector all(mean.size());
    for (size_t c = 0; c < all.size(); ++c) all[c] = shift(static_cast<int64_t>(c));
    return all;
  }

  Vector mean, rstd, scale, bias;
};

// By channel, sums over all processes of the gradient of a norm's result.
struct NormSums {
  explicit NormSums(int64_t channels) : total(channels), with_y(channels) {}
  Vector total;   // of the gradient
  Vector with_y;  // of it times y - mean
};

// What makes the gradient of a norm's input of that of its result, over so many values a channel.
inline std::vector<TrainingKernel::NormBackward> norm_backward_of(const Affine& norm, bool of_batch, double values,
                                                                  const NormSums& sums) {
  std::vector<TrainingKernel::NormBackward> channels(norm.mean.size());
  for (size_t c = 0; c < channels.size(); ++c) {
    channels[c] = {norm.scale[c], 0, norm.mean[c], 0};
    if (!of_batch) continue;
    channels[c].slope = norm.scale[c] * norm.rstd[c] * norm.rstd[c] * sums.with_y[c] / values;
    channels[c].shift = norm.scale[c] * sums.total[c] / values;
  }
  return channels;
}

// Gradients of a convolution's bias and of its norm's weight and bias. What is summed over all processes is shared out,
// so that their gradients add up to it.
struct NormGradients {
  NormGradients(const Affine& norm, bool of_batch, const NormSums& sums, const WholeBatch& whole)
      : conv_bias(norm.mean.size()), weight(norm.mean.size()), bias(sums.total) {
    for (size_t c = 0; c < bias.size(); ++c) {
      conv_bias[c] = of_batch ? 0 : norm.scale[c] * sums.total[c] / whole.count;
      weight[c] = norm.rstd[c] * sums.with_y[c] / whole.count;
      bias[c] /= whole.count;
    }
  }
  Vector conv_bias, weight, bias;
};

// What the ops have of a convolution: weight and bias; its norm's weight, bias, mean and variance.
inline constexpr size_t kTensors = 6;
inline constexpr size_t kTrained = 4;  // of those, the first ones have gradients

// Adds a convolution's gradients, in the order and the dtypes of its tensors: empty ones where there is no such tensor,
// and for a weight whose gradient is empty.
inline void add_gradients(std::vector<Tensor>& gradients, const Matrix& weight, const NormGradients& norm,
                          const std::optional<Tensor>* tensors, const Tensor& x) {
  const auto add = [&](const std::optional<Tensor>& tensor, const auto& numbers) {
    const bool is_there = tensor && !numbers.empty();
    gradients.push_back(is_there ? tensor_of(numbers, sizes_of(*tensor), tensor->scalar_type(), x) : none_like(x));
  };
  add(tensors[0], weight);
  add(tensors[1], norm.conv_bias);
  add(tensors[2], norm.weight);
  add(tensors[3], norm.bias);
}

}  // namespace shufflenet::cpu
