// The interface between the passes of a stem's training (../training/stem.cpp) and their kernels, as training_table.h
// is for units'. The convolution itself is inference's.
#pragma once

#include "training_table.h"

namespace shufflenet::cpu {

// Rows of an image of which a thread finds the products with the taps.
struct StemProducts {
  const void* image;
  const void* y;         // planes of the whole image, as is the gradient
  const void* gradient;  // of the norm's results
  const TrainingKernel::NormBackward* norms;
  Range rows;    // of the convolution
  double* sums;  // [out_channels][taps], which are written
};

// Planes are contiguous, one behind the other, of the accumulator type.
class StemTrainingKernel {
 public:
  virtual int64_t plane_bytes(const Stem&) const = 0;
  // Computes the norm, the ReLU and the max pool of a plane of the convolution's result.
  virtual void norm_and_pool(const Stem&, const PlaneNorm&, const void* y, void* result, void* workspace) const = 0;
  // Computes the gradient of the norm's results from that of the pool's. A window's goes to its largest value, to the
  // first of several, and to its last NaN where it has one.
  virtual PlaneSums norm_and_pool_backward(const Stem&, const PlaneNorm&, const void* result_gradient, const void* y,
                                           void* gradient, void* workspace) const = 0;

  virtual int64_t products_bytes(const Stem&) const = 0;
  // Adds up the gradient of y times what each of the convolution's taps has read.
  virtual void products(const Stem&, const StemProducts&, void* workspace) const = 0;
};

}  // namespace shufflenet::cpu
