// The passes of training over their tensors. Each is one parallel region, which PyTorch's profiler shows by its
// name. Whatever is added up over the batch is added up in one order, by one thread for each sum, so that no result
// depends on the threads.
#pragma once

#include "matrices.h"
#include "norm.h"

namespace shufflenet::cpu {

// Shows what runs while it lives to PyTorch's profiler.
class ProfiledPass {
 public:
  explicit ProfiledPass(const char* name) { aoti_record_function_start(name, nullptr, nullptr, 0, &handle_); }
  ProfiledPass(const ProfiledPass&) = delete;
  ~ProfiledPass() { aoti_record_function_end(handle_); }

 private:
  AtenRecordFunctionHandle handle_ = nullptr;
};

// A pointwise convolution's planes and its weights.
struct PointwiseTerm {
  const PlaneBatch& x;
  const Weights& weights;
};

// Batches may be in either layout where they are a unit's own tensors: x, results, and the gradients of both. What lies
// between is planes.
class Passes {
 public:
  // Takes planes of the dtype.
  explicit Passes(Dtype dtype) : kernel_(isa().training(dtype)), of_stems_(isa().stem_training(dtype)) {}

  // y = activation(weight x + bias + residual), and the moments of its planes. Of several terms the sum, without an
  // activation.
  void pointwise(const std::vector<PointwiseTerm>& terms, const Numbers* bias, const PlaneBatch* residual,
                 const PlaneBatch& y, int64_t groups, Activation activation, Moments* moments) const;

  // y2 = conv2(shuffle(relu(scale * y1 + shift))), and the moments of its planes.
  void depthwise(const TrainingDepthwise&, const PlaneBatch& y1, const PlaneBatch& y2, Moments* moments) const;
  // The gradient of scale * y1 + shift from that of y2; and by image and channel of y2 what it adds up.
  std::vector<DepthwiseSums> depthwise_backward(const TrainingDepthwise&, const PlaneBatch& y2_gradient,
                                                const PlaneBatch& y1, const void* y1_means,
                                                const PlaneBatch& gradient) const;

  // result = relu(norm(y)), or a stem's max pool of it (of planes that are not of 16 bits); and the gradient of norm(y)
  // from that of the result, which may take its place where nothing is pooled, with the sums that the norm wants.
  void norm_and_relu(const Affine&, const PlaneBatch& y, const PlaneBatch& result, bool max_pool = false) const;
  NormSums norm_and_relu_backward(const Affine&, const PlaneBatch& y, const PlaneBatch& result_gradient,
                                  const PlaneBatch& gradient, bool max_pool = false) const;
  // Replaces the gradient of a norm's result by that of its input, y.
  void norm_backward(const std::vector<TrainingKernel::NormBackward>&, const PlaneBatch& y,
                     const PlaneBatch& gradient) const;
  // The moments of a batch's planes.
  Moments moments(const PlaneBatch&) const;

  // The sum over the batch and its pixels of a's channel i times b's channel j of the same group: [channels of a][b's
  // channels of a group]. The Gram matrix has v's channels, less their centres, which are their means, as both.
  Vector products(const PlaneBatch& a, const PlaneBatch& b, int64_t groups) const;
  Vector gram_matrix(const PlaneBatch& v, const Numbers& centre, int64_t groups) const;
  // Makes the gradient of a ReLU's argument from that of its result, and its sum by channel; returns its products, as
  // above, with b's planes less their offsets.
  Vector relu_backward(const PlaneBatch& result, const PlaneBatch& result_gradient, const PlaneBatch& gradient,
                       const PlaneBatch& b, const Numbers& offset, int64_t groups, Vector& total) const;
  void relu_backward(const PlaneBatch& result, const PlaneBatch& result_gradient, const PlaneBatch& gradient) const;

  // The shortcut of a unit of stride 2, and its gradient.
  void pool(const Unit&, const PlaneBatch& x, const PlaneBatch& result) const;
  void pool_backward(const Unit&, const PlaneBatch& result_gradient, const PlaneBatch& gradient) const;

 private:
  const TrainingKernel& kernel_;
  const StemTrainingKernel& of_stems_;
};

}  // namespace shufflenet::cpu
