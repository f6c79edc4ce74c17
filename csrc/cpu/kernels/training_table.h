// The interface between the passes of training (../training), which are compiled once and share their tasks among
// threads, and their kernels, which are compiled for each ISA. Planes are contiguous, one behind the other, of a
// tensor's dtype. What is computed with them is of its accumulator type; sums and statistics are doubles.
#pragma once

#include <cstdint>

#include "table.h"

namespace shufflenet::cpu {

// The height and width of a plane.
struct PlaneSize {
  int64_t height = 0, width = 0;
  int64_t pixels() const { return height * width; }
};

// What makes planes of others by a value for each channel.
struct ChannelAffine {
  const void* scale = nullptr;
  const void* shift = nullptr;
};

// Planes that a pointwise convolution reads, and with what.
struct PointwiseInput {
  const void* x;
  const void* weight;  // [rows][depth], in the form that the kernel says
  const void* bias;
  int64_t depth;  // of a group
};

inline constexpr int64_t kMostInputs = 2;

// A grouped pointwise convolution of an image, of several inputs their sum: activation(weight x + bias + residual).
struct TrainingPointwise {
  const PointwiseInput* inputs;
  int64_t input_count;
  Activation activation;  // none where there are several inputs
  int64_t rows, groups, pixels;
  int64_t images;        // of the batch, of which this is one
  const void* residual;  // null: none; y itself: its results are added where they lie
  void* y;
};

// The depthwise convolution behind the first norm, its ReLU and the shuffle.
struct TrainingDepthwise {
  PlaneSize in, out;
  int64_t stride, channels, shuffle_groups;
  ChannelAffine norm1;  // of y1's channels
  const void* weight;   // of the accumulator type

  // The channel of y1 that the shuffle sends to place c.
  int64_t source(int64_t c) const { return c % shuffle_groups * (channels / shuffle_groups) + c / shuffle_groups; }
};

// A norm as it is applied to a channel: scale * y + shift. `mean` is that of y.
struct PlaneNorm {
  double scale, shift, mean;
};

// What a plane of the gradient of a norm's results adds up.
struct PlaneSums {
  double gradient, gradient_times_y;  // times what y lies above its mean
};

// What a channel's backward pass through it, the ReLU and the first norm adds up, over an image.
struct DepthwiseSums {
  double gradient, gradient_times_y1;  // of the norm's results; times what y1 lies above its mean
  double taps[9];
};

struct MatrixRows {
  const void* data;
  int64_t rows, columns;
  int64_t row;  // elements from one to the next
};

// Some planes, of each of which an offset is taken.
struct OffsetPlanes {
  const void* data;
  int64_t plane;  // elements from one to the next
  int64_t count, pixels;
  const void* offset;  // null: none
};

// Scalar products of some planes, a, with others, b, that were interleaved.
struct PlaneProducts {
  const void* a;
  int64_t a_plane, a_planes;  // a_plane: elements from one to the next
  const void* b;              // as interleave left them, in rows of product_row(b_planes)
  int64_t b_planes, pixels;
  // What products of pairs take of a's planes, as was taken of b's; null: nothing. Rounded deviations so have a Gram
  // matrix without negative eigenvalues. Products of floats need it not: b's deviations add up to zero there.
  const void* a_offset;
  void* sums;  // [a_planes][product_row(b_planes)], to which the products are added
};

class TrainingKernel {
 public:
  // Whether pointwise convolutions and products of planes are of pairs of bfloat16. Pointwise weights are then bfloat16
  // in rows of an even depth, where need be with a zero behind the last; else they are of the accumulator type.
  virtual bool multiplies_pairs() const = 0;

  virtual int64_t pointwise_bytes(const TrainingPointwise&) const = 0;
  // Computes some of the rows. The result does not depend on how rows are split.
  virtual void pointwise(const TrainingPointwise&, Range rows, void* workspace) const = 0;

  // Finds the mean and the sum of squared deviations from it of each plane.
  virtual void moments(const void* planes, int64_t pixels, int64_t count, double* means, double* squares) const = 0;

  virtual int64_t depthwise_bytes(const TrainingDepthwise&) const = 0;
  // Computes some channels of y2 of an image.
  virtual void depthwise(const TrainingDepthwise&, Range channels, const void* y1, void* y2, void* workspace) const = 0;
  // Computes, from the gradient of y2, that of the norm's results (of y1's channels), and sums: two planes may be one.
  virtual void depthwise_backward(const TrainingDepthwise&, Range channels, const void* y2_gradient, const void* y1,
                                  const void* y1_means, void* gradient, DepthwiseSums* sums, void* workspace) const = 0;

  // Writes scale * gradient - slope * (y - mean) - shift over the gradient of a plane.
  struct NormBackward {
    double scale, slope, mean, shift;
  };
  virtual void norm_backward(const NormBackward&, const void* y, int64_t pixels, void* gradient) const = 0;

  // Computes relu(norm(y)) of a plane; and the gradient of norm(y) from that of this result, with what it adds up.
  virtual void norm_and_relu(const PlaneNorm&, const void* y, int64_t pixels, void* result) const = 0;
  virtual PlaneSums norm_and_relu_backward(const PlaneNorm&, const void* result_gradient, const void* y, int64_t pixels,
                                           void* gradient) const = 0;

  // Copies the gradient where a ReLU's result is above zero, zeros elsewhere, and returns its sum.
  virtual double relu_backward(const void* result, int64_t pixels, const void* gradient, void* to) const = 0;

  // Turns a matrix of the planes' dtype about: writes to[column][row]. Rows lie so many elements apart.
  virtual void transpose(const MatrixRows& from, void* to, int64_t to_row) const = 0;

  // Writes b's planes as products take them, [pixel or pair of pixels][plane], with zeros behind the planes to the end
  // of a row of product_row elements.
  virtual void interleave(const OffsetPlanes&, void* to, int64_t row) const = 0;
  // The elements of as many vectors as the planes of b take.
  virtual int64_t product_row(int64_t b_planes) const = 0;
  virtual void products(const PlaneProducts&) const = 0;
  // Adds the first columns of sums to those at `to`, [rows][columns], and leaves zeros.
  virtual void move_sums(void* sums, int64_t rows, int64_t columns, double* to) const = 0;

  virtual int64_t pool_bytes(PlaneSize in) const = 0;
  // The shortcut of stride 2, as in Unit, of so many planes; and its gradient from that of its results.
  virtual void pool(const Unit&, int64_t count, const void* x, void* result, void* workspace) const = 0;
  virtual void pool_backward(const Unit&, int64_t count, const void* result_gradient, void* gradient,
                             void* workspace) const = 0;
};

}  // namespace shufflenet::cpu
