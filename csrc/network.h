// What a network has around its units: the sizes of its stem, its last convolution and its head. Nothing here knows
// torch.
#pragma once

#include "unit.h"

namespace shufflenet {

// The most that a stem's may be: what its kernels need of memory grows with the square.
inline constexpr int64_t kMostKernelSize = 11;

// A square convolution and, in the paper's networks, a ReLU and a max pool (3x3, stride 2, padding 1).
struct Stem {
  int64_t in_channels = 0;
  int64_t height = 0;
  int64_t width = 0;
  int64_t out_channels = 0;
  int64_t kernel_size = 1;
  int64_t stride = 1;
  int64_t padding = 0;
  bool max_pool = false;
  bool relu = true;
  Layout layout = Layout::contiguous;

  Activation activation() const { return relu ? kRelu : kNoActivation; }

  int64_t conv_height() const { return (height + 2 * padding - kernel_size) / stride + 1; }
  int64_t conv_width() const { return (width + 2 * padding - kernel_size) / stride + 1; }
  int64_t out_height() const { return max_pool ? (conv_height() - 1) / 2 + 1 : conv_height(); }
  int64_t out_width() const { return max_pool ? (conv_width() - 1) / 2 + 1 : conv_width(); }
  int64_t taps() const { return in_channels * kernel_size * kernel_size; }

  int64_t multiply_adds() const { return out_channels * conv_height() * conv_width() * taps(); }
  int64_t weights_and_biases() const { return out_channels * (taps() + 1); }
};

// A dense pointwise convolution with a ReLU, behind the units.
struct LastConvolution {
  int64_t in_channels = 0;
  int64_t height = 0;
  int64_t width = 0;
  int64_t out_channels = 0;
  // How x lies in memory, as in UnitPointers.
  int64_t x_plane = 0;
  const int64_t* x_planes = nullptr;

  int64_t out_height() const { return height; }
  int64_t out_width() const { return width; }
  int64_t pixels() const { return height * width; }
  int64_t multiply_adds() const { return pixels() * in_channels * out_channels; }
  int64_t weights_and_biases() const { return out_channels * (in_channels + 1); }
};

// The mean over a plane's upper left window, and a linear layer.
struct Head {
  int64_t channels = 0;
  int64_t height = 0;
  int64_t width = 0;
  int64_t window_height = 0;
  int64_t window_width = 0;
  int64_t classes = 0;
  // How x lies in memory, as in UnitPointers.
  int64_t x_plane = 0;
  const int64_t* x_planes = nullptr;
};

}  // namespace shufflenet
