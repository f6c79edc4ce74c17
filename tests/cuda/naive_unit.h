// A unit's data drawn at random, as a kernel takes it, and what a naive unit in double makes of it. Only the dtypes are
// host_device.h's: this also serves kernels that run elsewhere.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "buffer.h"
#include "case.h"
#include "host_device.h"

namespace shufflenet::cuda {

template <class T>
using wide_t = decltype(widen(T{}));  // that in which sums of T are made

template <class T>
std::vector<double> fill(Buffer<T>& buffer, std::mt19937_64& random, double scale, double offset = 0) {
  std::vector<double> values(buffer.size);
  std::uniform_real_distribution<float> uniform(-1, 1);
  for (int64_t i = 0; i < buffer.size; ++i) {
    narrow(static_cast<wide_t<T>>(uniform(random) * scale + offset), buffer.data[i]);
    values[i] = widen(buffer.data[i]);
  }
  return values;
}

// What follows a convolution: its bias; a batch norm; its bias and a batch norm without weight and bias.
enum class Behind { bias, norm, bias_and_plain_norm };

// A convolution's parameters as the kernel takes them, and in double.
template <class T, class Norm>
struct TestConvolution {
  TestConvolution(int64_t rows, int64_t depth, Behind behind, int64_t offset, std::mt19937_64& random)
      : weight_data(rows * depth, offset), bias(rows), gamma(rows), beta(rows), mean(rows), var(rows) {
    weight = fill(weight_data, random, std::sqrt(2.0 / static_cast<double>(depth)));
    pointers.weight = weight_data.data;
    const auto biases = fill(bias, random, 0.5);
    const auto g = fill(gamma, random, 0.5, 1), b = fill(beta, random, 0.5), m = fill(mean, random, 0.5),
               v = fill(var, random, 0.5, 1);
    const bool has_norm = behind != Behind::bias, has_bias = behind != Behind::norm, affine = behind == Behind::norm;
    for (int64_t i = 0; i < rows; ++i) {
      scale.push_back(has_norm ? (affine ? g[i] : 1) / std::sqrt(v[i] + 1e-5) : 1);
      const double centred = (has_bias ? biases[i] : 0) - (has_norm ? m[i] : 0);
      shift.push_back(centred * scale[i] + (affine ? b[i] : 0));
    }
    const bool is_float32 = std::is_same_v<Norm, float>;
    if (has_bias) pointers.bias = {bias.data, false};
    if (has_norm) {
      pointers.norm_mean = {mean.data, is_float32};
      pointers.norm_var = {var.data, is_float32};
      pointers.eps = 1e-5;
    }
    if (affine) {
      pointers.norm_weight = {gamma.data, is_float32};
      pointers.norm_bias = {beta.data, is_float32};
    }
  }
  Buffer<T> weight_data, bias;
  Buffer<Norm> gamma, beta, mean, var;
  std::vector<double> weight, scale, shift;
  ConvolutionPointers pointers;
};

struct Tensor4 {  // contiguous, in double
  Tensor4(int64_t n, int64_t c, int64_t h, int64_t w) : n(n), c(c), h(h), w(w), data(n * c * h * w) {}
  double& at(int64_t i, int64_t j, int64_t k, int64_t l) { return data[((i * c + j) * h + k) * w + l]; }
  int64_t n, c, h, w;
  std::vector<double> data;
};

template <class T>
double rounded(double value) {
  T narrowed;
  narrow(static_cast<wide_t<T>>(value), narrowed);
  return widen(narrowed);
}

// The unit in double, with intermediates rounded to T as the kernel's are.
template <class T, class C>
Tensor4 naive_unit(const Unit& unit, const Sizes& s, Tensor4& x, const C& conv1, const C& conv2, const C* conv3) {
  Tensor4 y1(s.batch, s.mid_channels, s.height, s.width), y2(s.batch, s.mid_channels, s.out_height, s.out_width);
  Tensor4 result(s.batch, s.result_channels, s.out_height, s.out_width);
  const auto pointwise =
      [](Tensor4& from, int64_t groups, int64_t rows, const C& conv, int64_t n, int64_t row, int64_t h, int64_t w) {
        const int64_t depth = from.c / groups, first = row / (rows / groups) * depth;
        double sum = 0;
        for (int64_t k = 0; k < depth; ++k) sum += conv.weight[row * depth + k] * from.at(n, first + k, h, w);
        return conv.scale[row] * sum + conv.shift[row];
      };
  const int64_t first = unit.first_conv3_channel(), pooled = unit.first_pooled_channel();
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t c = 0; c < s.mid_channels; ++c) {
      const int64_t row = c % s.shuffle_groups * (s.mid_channels / s.shuffle_groups) + c / s.shuffle_groups;
      for (int64_t h = 0; h < s.height; ++h) {
        for (int64_t w = 0; w < s.width; ++w) {
          y1.at(n, c, h, w) = rounded<T>(relu(pointwise(x, s.conv1_groups, s.mid_channels, conv1, n, row, h, w)));
        }
      }
    }
    for (int64_t c = 0; c < s.mid_channels; ++c) {
      for (int64_t h = 0; h < s.out_height; ++h) {
        for (int64_t w = 0; w < s.out_width; ++w) {
          double sum = 0;
          for (int64_t tap = 0; tap < 9; ++tap) {
            const int64_t row = h * s.stride + tap / 3 - 1, column = w * s.stride + tap % 3 - 1;
            if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
            sum += conv2.weight[c * 9 + tap] * y1.at(n, c, row, column);
          }
          sum = conv2.scale[c] * sum + conv2.shift[c];
          if (s.conv2_relu) sum = relu(sum);
          (conv3 ? y2 : result).at(n, c, h, w) = rounded<T>(sum);
        }
      }
    }
    if (!conv3) continue;
    for (int64_t h = 0; h < s.out_height; ++h) {
      for (int64_t w = 0; w < s.out_width; ++w) {
        for (int64_t c = 0; c < s.out_channels; ++c) {
          double value = pointwise(y2, s.groups, s.out_channels, *conv3, n, c, h, w);
          if (s.stride == 1) value += x.at(n, c, h, w);
          result.at(n, first + c, h, w) = relu(value);
        }
        if (s.stride == 1) continue;
        for (int64_t c = 0; c < s.in_channels; ++c) {
          double sum = 0, count = 0;
          for (int64_t i = 0; i < 9; ++i) {
            const int64_t row = 2 * h + i / 3 - 1, column = 2 * w + i % 3 - 1;
            if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
            sum += x.at(n, c, row, column);
            ++count;
          }
          const double mean = sum / (s.pool_count_include_pad ? 9 : count);
          result.at(n, pooled + c, h, w) = unit.shortcut_relu ? relu(mean) : mean;
        }
      }
    }
  }
  return result;
}

template <class T>
constexpr double kRounding = 0;
template <>
constexpr double kRounding<float> = 0x1p-24;
template <>
constexpr double kRounding<double> = 0x1p-53;
template <>
constexpr double kRounding<Float16> = 0x1p-11;
template <>
constexpr double kRounding<BFloat16> = 0x1p-8;
template <>
constexpr double kRounding<TFloat32> = kHasMma<TFloat32> ? 0x1p-11 : 0x1p-24;  // of the products' operands

// How far a result is from the naive unit's at most, in units of the dtype's rounding and relative to the largest
// magnitude, and where that is.
struct Difference {
  // The sums round differently, so an intermediate may fall to the other side of a rounding: a few units.
  bool is_small() const { return units <= 16; }
  double units = 0;
  std::string where;
};

// A case's unit with random data. A case's `norm` says what follows the convolutions (Behind), `shift` how many
// elements lie between an aligned address and each tensor, `seed` which numbers are drawn, `wild` how many elements of
// x are Inf, -Inf or NaN.
template <class T, class Norm>
class Problem {
 public:
  using Convolution = TestConvolution<T, Norm>;

  explicit Problem(const Case& c) : Problem(c, c.unit(), std::mt19937_64(c.number("seed", 0))) {}

  // Returns how far `result`, which lies in the unit's layout, is from what is expected.
  Difference compare(const T* result) {
    Tensor4 expected = naive_unit<T>(unit, sizes, x_double_, conv1, conv2, conv3.get());
    double largest = 1e-30;
    for (double value : expected.data) {
      if (std::isfinite(value)) largest = std::max(largest, std::abs(value));
    }
    Difference difference;
    for_each(expected, [&](int64_t n, int64_t j, int64_t p, int64_t at, double& want) {
      const double got = widen(result[at]);
      const double units = std::abs(got - want) / largest / kRounding<T>;
      const bool is_same = got == want || (std::isnan(got) && std::isnan(want));
      const double relative = is_same ? 0 : std::isfinite(units) ? units : 1e30;
      if (relative <= difference.units) return;
      std::ostringstream text;
      text << "image " << n << " channel " << j << " pixel " << p << ": got " << got << ", expected " << want;
      difference = {relative, text.str()};
    });
    return difference;
  }

  int64_t result_elements() const { return sizes.batch * sizes.result_channels * sizes.out_plane; }

  Unit unit;
  Sizes sizes;
  Buffer<T> x;
  Convolution conv1, conv2;
  std::unique_ptr<Convolution> conv3;  // null where the unit has none

 private:
  Problem(const Case& c, const Unit& u, std::mt19937_64 random)
      : unit(u),
        sizes(sizes_of(u)),
        x(sizes.batch * sizes.in_channels * sizes.in_plane, c.number("shift", 0)),
        conv1(sizes.mid_channels, sizes.conv1_depth, behind(c), c.number("shift", 0), random),
        conv2(sizes.mid_channels, 9, behind(c), c.number("shift", 0), random),
        x_double_(sizes.batch, sizes.in_channels, sizes.height, sizes.width) {
    if (sizes.out_channels) {
      conv3.reset(new Convolution(sizes.out_channels, sizes.slice_channels, behind(c), c.number("shift", 0), random));
    }
    std::vector<double> values = fill(x, random, 2);
    for (int64_t i = 0; i < c.number("wild", 0); ++i) {
      const int64_t at = std::uniform_int_distribution<int64_t>(0, x.size - 1)(random);
      constexpr double kInfinity = std::numeric_limits<double>::infinity();
      values[at] = i % 3 == 0 ? kInfinity : i % 3 == 1 ? -kInfinity : std::numeric_limits<double>::quiet_NaN();
      narrow(static_cast<wide_t<T>>(values[at]), x.data[at]);
    }
    for_each(x_double_, [&](int64_t, int64_t, int64_t, int64_t at, double& value) { value = values[at]; });
  }

  static Behind behind(const Case& c) { return static_cast<Behind>(c.number("norm", 0)); }

  // Calls visit(image, channel, pixel, place in the unit's layout, value).
  template <class Visit>
  void for_each(Tensor4& tensor, const Visit& visit) const {
    const int64_t pixels = tensor.h * tensor.w;
    for (int64_t n = 0; n < tensor.n; ++n) {
      for (int64_t j = 0; j < tensor.c; ++j) {
        for (int64_t p = 0; p < pixels; ++p) {
          const int64_t planar = (n * tensor.c + j) * pixels + p;
          const int64_t last = (n * pixels + p) * tensor.c + j;
          visit(n, j, p, unit.layout == Layout::channels_last ? last : planar, tensor.data[planar]);
        }
      }
    }
  }

  Tensor4 x_double_;
};

}  // namespace shufflenet::cuda
