// The ops' tensor arguments, checked once and turned into a Unit. Shared by the devices; see library.cpp for the
// schemas.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "network.h"

namespace shufflenet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class Sizes>
std::string shape_of(const Sizes& sizes) {
  std::ostringstream shape;
  shape << "shape [";
  const char* separator = "";
  for (const int64_t size : sizes) {
    shape << separator << size;
    separator = ", ";
  }
  shape << "]";
  return shape.str();
}

inline std::string shape_of(const Tensor& tensor) {
  std::vector<int64_t> sizes(tensor.dim());
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes[i] = tensor.size(i);
  return shape_of(sizes);
}

inline void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& expected) {
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  for (int64_t i = 0; same && i < tensor.dim(); ++i) same = tensor.size(i) == expected[i];
  if (same) return;
  fail(name, ": got ", shape_of(tensor), ", expected ", shape_of(expected));
}

inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    default: return "ScalarType(" + std::to_string(static_cast<int>(type)) + ")";
  }
}

inline Dtype dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default:
      fail(name, ": got dtype ", dtype_name(tensor.scalar_type()), ", expected float32, float64, bfloat16 or float16");
  }
}

// Finds the dtype of this name.
inline Dtype dtype_named(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "float64") return Dtype::float64;
  if (name == "bfloat16") return Dtype::bfloat16;
  if (name == "float16") return Dtype::float16;
  if (name == "tfloat32") return Dtype::tfloat32;
  throw std::invalid_argument("dtype: got " + name + ", expected float32, float64, bfloat16, float16 or tfloat32");
}

// Refuses a tensor that is not of x's dtype (or of the other one), or not on its device.
inline void check_like_x(const char* name, const Tensor& tensor, const Tensor& x,
                         std::optional<ScalarType> other = {}) {
  if (tensor.scalar_type() != x.scalar_type() && tensor.scalar_type() != other) {
    fail(name, ": got dtype ", dtype_name(tensor.scalar_type()), ", expected x's, ", dtype_name(x.scalar_type()),
         other ? " (or " + dtype_name(*other) + ")" : "");
  }
  if (tensor.is_cpu() != x.is_cpu() || tensor.get_device_index() != x.get_device_index()) {
    fail(name, ": got a tensor on another device than x's, expected the same");
  }
}

inline void check_divides(const char* name, int64_t divisor, const char* of, int64_t value) {
  if (divisor < 1 || value % divisor != 0) {
    fail(name, ": got ", divisor, ", expected a positive divisor of the ", value, " ", of);
  }
}

// Inference-mode batch norm behind a convolution, with or without a weight and a bias; see nn.BatchNorm2d.
struct BatchNorm {
  std::optional<Tensor> weight, bias;
  Tensor running_mean, running_var;
  double eps;
};

// One convolution's arguments, with or without a bias and a batch norm.
struct ConvolutionArguments {
  std::string name;
  Tensor weight;
  std::optional<Tensor> bias;
  std::optional<BatchNorm> norm;
};

struct UnitArguments {
  Tensor x;
  ConvolutionArguments conv1, conv2;
  std::optional<ConvolutionArguments> conv3;
  int64_t conv1_groups, groups, stride;
  bool conv2_relu, pool_count_include_pad;
  bool allow_tf32;                        // for float32 on CUDA; see library.cpp
  std::optional<int64_t> shuffle_groups;  // groups
  bool shortcut_first = false, shortcut_relu = true;
};

inline void check_convolution(const ConvolutionArguments& conv, const Tensor& x, const std::vector<int64_t>& shape) {
  const std::string& name = conv.name;
  check_shape((name + "_weight").c_str(), conv.weight, shape);
  check_like_x((name + "_weight").c_str(), conv.weight, x);
  const std::vector<int64_t> channels = {shape[0]};
  if (conv.bias) {
    check_shape((name + "_bias").c_str(), *conv.bias, channels);
    check_like_x((name + "_bias").c_str(), *conv.bias, x);
  }
  if (conv.norm) {
    const std::string norm = "bn" + name.substr(4);
    const std::array<std::pair<const char*, const Tensor*>, 4> tensors = {
        {{"_weight", conv.norm->weight ? &*conv.norm->weight : nullptr},
         {"_bias", conv.norm->bias ? &*conv.norm->bias : nullptr},
         {"_mean", &conv.norm->running_mean},
         {"_var", &conv.norm->running_var}}};
    // As in PyTorch, norms of 16-bit tensors may be of float32.
    const std::optional other = x.element_size() == 2 ? std::optional(ScalarType::Float) : std::nullopt;
    for (const auto& [suffix, tensor] : tensors) {
      if (!tensor) continue;
      check_shape((norm + suffix).c_str(), *tensor, channels);
      check_like_x((norm + suffix).c_str(), *tensor, x, other);
    }
  }
}

// Takes a tensor for channels_last where a pixel's channels are adjacent in memory and the tensor is not contiguous
// anyway. The fake kernels decide by the same rule (ops.py).
inline Layout layout_of(const Tensor& x) {
  return !x.is_contiguous() && x.stride(1) == 1 ? Layout::channels_last : Layout::contiguous;
}

using Sizes = std::array<int64_t, 4>;

inline Sizes check_x(const Tensor& x) {
  if (x.dim() != 4) fail("x: got ", shape_of(x), ", expected 4 dimensions (batch, channels, height, width)");
  dtype_of("x", x);
  if (x.size(1) < 1 || x.size(2) < 1 || x.size(3) < 1) {
    fail("x: got ", shape_of(x), ", expected at least one channel, row and column");
  }
  return {x.size(0), x.size(1), x.size(2), x.size(3)};
}

// Makes the unit of these arguments on an input of these sizes, of the dtype and device of a.x.
inline Unit check_unit(const UnitArguments& a, const Sizes& sizes, Layout layout) {
  const Tensor& x = a.x;
  if (a.stride != 1 && a.stride != 2) fail("stride: got ", a.stride, ", expected 1 or 2");
  const Tensor& weight = a.conv1.weight;
  if (weight.dim() != 4 || weight.size(0) < 1) {
    fail("conv1_weight: got ", shape_of(weight), ", expected [mid_channels, in_channels / conv1_groups, 1, 1]");
  }
  Unit unit;
  unit.batch = sizes[0];
  unit.in_channels = sizes[1];
  unit.height = sizes[2];
  unit.width = sizes[3];
  unit.mid_channels = weight.size(0);
  unit.conv1_groups = a.conv1_groups;
  unit.groups = a.groups;
  unit.shuffle_groups = a.shuffle_groups.value_or(a.groups);
  unit.shortcut_first = a.shortcut_first;
  unit.shortcut_relu = a.shortcut_relu;
  unit.stride = a.stride;
  unit.conv2_relu = a.conv2_relu;
  unit.pool_count_include_pad = a.pool_count_include_pad;
  unit.layout = layout;
  const char* const groups = a.conv3 ? "groups" : "shuffle_groups";
  check_divides("conv1_groups", unit.conv1_groups, "channels of x", unit.in_channels);
  check_divides("conv1_groups", unit.conv1_groups, "rows of conv1_weight", unit.mid_channels);
  check_divides(groups, unit.groups, "rows of conv1_weight", unit.mid_channels);
  check_divides("shuffle_groups", unit.shuffle_groups, "rows of conv1_weight", unit.mid_channels);
  check_convolution(a.conv1, x, {unit.mid_channels, unit.conv1_depth(), 1, 1});
  check_convolution(a.conv2, x, {unit.mid_channels, 1, 3, 3});
  if (a.conv3) {
    const Tensor& last = a.conv3->weight;
    if (last.dim() != 4 || last.size(0) < 1) {
      fail("conv3_weight: got ", shape_of(last), ", expected [out_channels, mid_channels / groups, 1, 1]");
    }
    unit.out_channels = last.size(0);
    check_divides(groups, unit.groups, "rows of conv3_weight", unit.out_channels);
    check_convolution(*a.conv3, x, {unit.out_channels, unit.slice_channels(), 1, 1});
    if (unit.stride == 1 && unit.out_channels != unit.in_channels) {
      fail("conv3_weight: got ", unit.out_channels, " rows, expected ", unit.in_channels,
           " (with stride 1, x is added to the result)");
    }
  }
  return unit;
}

inline Unit check_unit(const UnitArguments& a) {
  const Sizes sizes = check_x(a.x);  // before its strides are asked for
  return check_unit(a, sizes, layout_of(a.x));
}

// A unit of ShuffleNet v2; see Unit.
struct UnitV2Arguments {
  Tensor x;
  ConvolutionArguments conv1, conv2, conv3;
  std::optional<ConvolutionArguments> shortcut1, shortcut2;
  int64_t stride, split_groups, shuffle_groups;
};

inline Unit check_unit(const UnitV2Arguments& a) {
  const Tensor& x = a.x;
  const auto [n, channels, height, width] = check_x(x);
  (void)n;
  if (a.stride != 1 && a.stride != 2) fail("stride: got ", a.stride, ", expected 1 or 2");
  const auto rows_of = [](const ConvolutionArguments& conv, const char* shape) {
    if (conv.weight.dim() != 4 || conv.weight.size(0) < 1) {
      fail(conv.name, "_weight: got ", shape_of(conv.weight), ", expected ", shape);
    }
    return conv.weight.size(0);
  };
  Unit unit;
  unit.version = Version::v2;
  unit.batch = 1;
  unit.in_channels = channels;
  unit.height = height;
  unit.width = width;
  unit.stride = a.stride;
  unit.split_groups = a.split_groups;
  unit.join_groups = a.shuffle_groups;
  unit.layout = layout_of(x);
  if (unit.stride == 1 && channels % 2 != 0) {
    fail("x: got ", shape_of(x), ", expected an even number of channels (with stride 1, half of them pass by)");
  }
  unit.mid_channels = rows_of(a.conv1, "[mid_channels, the channels that it reads, 1, 1]");
  unit.out_channels = rows_of(a.conv3, "[out_channels, mid_channels, 1, 1]");
  check_convolution(a.conv1, x, {unit.mid_channels, unit.conv1_channels(), 1, 1});
  check_convolution(a.conv2, x, {unit.mid_channels, 1, 3, 3});
  check_convolution(a.conv3, x, {unit.out_channels, unit.mid_channels, 1, 1});
  if (unit.stride == 1 && unit.out_channels != channels / 2) {
    fail("conv3_weight: got ", unit.out_channels, " rows, expected ", channels / 2,
         " (with stride 1, half of x passes by, and the other half's place is taken)");
  }
  if (a.shortcut1.has_value() != (unit.stride == 2) || a.shortcut2.has_value() != (unit.stride == 2)) {
    const char* const name = a.shortcut1.has_value() != (unit.stride == 2) ? "shortcut1_weight" : "shortcut2_weight";
    fail(name, ": got ", unit.stride == 2 ? "None" : "a tensor", " with stride ", unit.stride, ", expected ",
         unit.stride == 2 ? "a tensor" : "None");
  }
  if (unit.stride == 2) {
    unit.shortcut_channels = rows_of(*a.shortcut2, "[shortcut_channels, x's channels, 1, 1]");
    check_convolution(*a.shortcut1, x, {channels, 1, 3, 3});
    check_convolution(*a.shortcut2, x, {unit.shortcut_channels, channels, 1, 1});
  }
  check_divides("split_groups", unit.split_groups, "channels of x", channels);
  check_divides("shuffle_groups", unit.join_groups, "channels of the result", unit.result_channels());
  return unit;
}

inline Sizes strides_of(const Sizes& sizes, Layout layout) {
  const auto [n, c, h, w] = sizes;
  (void)n;
  if (layout == Layout::channels_last) return {h * w * c, 1, w * c, c};
  return {c * h * w, h * w, w, 1};
}

template <size_t N>
Tensor empty_like_x(const Tensor& x, const std::array<int64_t, N>& sizes, const std::array<int64_t, N>& strides) {
  int32_t dtype, device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(N, sizes.data(), strides.data(), dtype, device_type, x.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor empty_like_x(const Tensor& x, const Sizes& sizes, Layout layout) {
  return empty_like_x<4>(x, sizes, strides_of(sizes, layout));
}

// Returns x itself where its elements lie densely in the layout, else a copy in which they do.
inline Tensor dense(const Tensor& x, Layout layout) {
  const Sizes sizes = {x.size(0), x.size(1), x.size(2), x.size(3)};
  const Sizes strides = strides_of(sizes, layout);
  bool is_dense = true;
  for (int i = 0; i < 4; ++i) is_dense = is_dense && (sizes[i] == 1 || x.stride(i) == strides[i]);
  if (is_dense || x.numel() == 0) return x;
  Tensor copy = empty_like_x(x, sizes, layout);
  torch::stable::copy_(copy, x);
  return copy;
}

inline Tensor empty_result(const Tensor& x, const Unit& unit) {
  return empty_like_x(x, {unit.batch, unit.result_channels(), unit.out_height(), unit.out_width()}, unit.layout);
}

}  // namespace shufflenet
