// Runs csrc/cuda/unit_kernel.cuh on the CPU, by its source (by_source.h) or by the PTX that nvcc made of it (by_ptx.h),
// and compares it with a naive unit in double. Reads cases from standard input, one a line as `key=value` pairs, and
// answers each with "ok <error>" or "wrong <error> <what>", where the error is relative to the largest magnitude of the
// result and in units of the dtype's rounding; or with "failed <why>".
#define SHUFFLENET_TEST_DEVICE "host_device.h"

#include <iostream>
#include <sstream>
#include <string>

#include "buffer.h"
#include "case.h"
#include "unit_kernel.cuh"
#ifdef SHUFFLENET_TEST_PTX
#include "by_ptx.h"
#else
#include "by_source.h"
#endif

namespace shufflenet::cuda {
namespace {

template <class T>
std::vector<double> fill(Buffer<T>& buffer, std::mt19937_64& random, double scale, double offset = 0) {
  std::vector<double> values(buffer.size);
  std::uniform_real_distribution<float> uniform(-1, 1);
  for (int64_t i = 0; i < buffer.size; ++i) {
    narrow(static_cast<accumulator_t<T>>(uniform(random) * scale + offset), buffer.data[i]);
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
  narrow(static_cast<accumulator_t<T>>(value), narrowed);
  return widen(narrowed);
}

// The unit in double, with intermediates rounded to T as the kernel's are.
template <class T, class C>
Tensor4 naive_unit(const Sizes& s, Tensor4& x, const C& conv1, const C& conv2, const C* conv3) {
  const int64_t slice = s.mid_channels / s.groups;
  Tensor4 y1(s.batch, s.mid_channels, s.height, s.width), y2(s.batch, s.mid_channels, s.out_height, s.out_width);
  Tensor4 result(s.batch, s.result_channels, s.out_height, s.out_width);
  const auto pointwise =
      [](Tensor4& from, int64_t groups, int64_t rows, const C& conv, int64_t n, int64_t row, int64_t h, int64_t w) {
        const int64_t depth = from.c / groups, first = row / (rows / groups) * depth;
        double sum = 0;
        for (int64_t k = 0; k < depth; ++k) sum += conv.weight[row * depth + k] * from.at(n, first + k, h, w);
        return conv.scale[row] * sum + conv.shift[row];
      };
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t c = 0; c < s.mid_channels; ++c) {
      const int64_t row = c % s.groups * slice + c / s.groups;  // the shuffle
      for (int64_t h = 0; h < s.height; ++h) {
        for (int64_t w = 0; w < s.width; ++w) {
          y1.at(n, c, h, w) =
              rounded<T>(std::max(0.0, pointwise(x, s.conv1_groups, s.mid_channels, conv1, n, row, h, w)));
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
          if (s.conv2_relu) sum = std::max(0.0, sum);
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
          result.at(n, c, h, w) = std::max(0.0, value);
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
          result.at(n, s.out_channels + c, h, w) = std::max(0.0, sum / (s.pool_count_include_pad ? 9 : count));
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

template <class T, Layout kLayout, class Norm>
std::string run(const Case& c, const Unit& unit, Dtype dtype, Tiling tiling) {
  const Sizes s = sizes_of(unit);
  const int64_t shift = c.number("shift", 0);  // elements between an aligned address and each tensor
  std::mt19937_64 random(c.number("seed", 0));
  const int64_t in_pixels = int64_t{s.height} * s.width, out_pixels = int64_t{s.out_height} * s.out_width;
  Buffer<T> x(s.batch * s.in_channels * in_pixels, shift), result(s.batch * s.result_channels * out_pixels, shift);
  const auto offset = [](int64_t n, int64_t j, int64_t p, int64_t channels, int64_t pixels) {
    return kLayout == Layout::channels_last ? (n * pixels + p) * channels + j : (n * channels + j) * pixels + p;
  };
  const std::vector<double> values = fill(x, random, 2);
  Tensor4 x_double(s.batch, s.in_channels, s.height, s.width);
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t j = 0; j < s.in_channels; ++j) {
      for (int64_t p = 0; p < in_pixels; ++p) {
        x_double.data[(n * s.in_channels + j) * in_pixels + p] = values[offset(n, j, p, s.in_channels, in_pixels)];
      }
    }
  }
  const auto behind = static_cast<Behind>(c.number("norm", 0));
  using C = TestConvolution<T, Norm>;
  const C conv1(s.mid_channels, s.in_channels / s.conv1_groups, behind, shift, random);
  const C conv2(s.mid_channels, 9, behind, shift, random);
  std::unique_ptr<C> conv3;
  if (s.out_channels) conv3.reset(new C(s.out_channels, s.mid_channels / s.groups, behind, shift, random));

  const auto address = [](const void* p) { return reinterpret_cast<uint64_t>(p); };
  choose_vectors(unit, dtype, tiling,
                 {address(x.data), address(conv1.pointers.weight), conv3 ? address(conv3->pointers.weight) : 0,
                  address(result.data)});
  const SharedLayout layout(s, tiling, kLayout, sizeof(T), sizeof(accumulator_t<T>));
  const KernelArguments arguments = {
      s,
      tiling,
      layout,
      x.data,
      conv1.pointers,
      conv2.pointers,
      conv3 ? conv3->pointers : ConvolutionPointers{},
      result.data};
  launch<T, kLayout>(c, arguments, std::min(c.number("blocks", 1 << 20), tiling.windows(s)), result.data);

  Tensor4 expected = naive_unit<T>(s, x_double, conv1, conv2, conv3.get());
  double largest = 1e-30, error = 0;
  for (double value : expected.data) largest = std::max(largest, std::abs(value));
  std::string where;
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t j = 0; j < s.result_channels; ++j) {
      for (int64_t p = 0; p < out_pixels; ++p) {
        const double got = widen(result.data[offset(n, j, p, s.result_channels, out_pixels)]);
        const double want = expected.data[(n * s.result_channels + j) * out_pixels + p];
        const double relative = std::abs(got - want) / largest / kRounding<T>;
        if (relative <= error) continue;
        error = std::isnan(relative) ? 1e30 : relative;
        std::ostringstream text;
        text << "image " << n << " channel " << j << " pixel " << p << ": got " << got << ", expected " << want;
        where = text.str();
      }
    }
  }
  std::ostringstream answer;
  // The sums round differently, so an intermediate may fall to the other side of a rounding: a few units.
  answer << (error <= 16 ? "ok " : "wrong ") << error << " " << where;
  return answer.str();
}

std::string run(const std::string& line) {
  const Case c(line);
  const Unit unit = c.unit();
  const Dtype type = c.dtype();
  const Plan plan = plan_unit(unit, type, c.device());
  if (!plan.ok) return "unplanned " + plan.explanation;
  Tiling tiling = plan.tiling;
  // A case may cut the unit otherwise than the planner would.
  tiling.tile_rows = static_cast<int>(c.number("tile_rows", tiling.tile_rows));
  tiling.tile_columns = static_cast<int>(c.number("tile_columns", tiling.tile_columns));
  tiling.slices = static_cast<int>(c.number("slices", tiling.slices));
  tiling.chunk = static_cast<int>(c.number("chunk", unit.slice_channels() * tiling.slices));
  tiling.tile_depth = static_cast<int>(c.number("tile_depth", tiling.tile_depth));
  const bool last = unit.layout == Layout::channels_last;
#if defined(SHUFFLENET_TEST_DTYPE16) || defined(SHUFFLENET_TEST_PTX)
  if (type == Dtype::bfloat16) {
    return last ? run<BFloat16, Layout::channels_last, float>(c, unit, type, tiling)
                : run<BFloat16, Layout::contiguous, float>(c, unit, type, tiling);
  }
  if (type == Dtype::float16) {
    return last ? run<Float16, Layout::channels_last, Float16>(c, unit, type, tiling)
                : run<Float16, Layout::contiguous, Float16>(c, unit, type, tiling);
  }
#endif
#ifndef SHUFFLENET_TEST_DTYPE16
  if (type == Dtype::tfloat32) {
    return last ? run<TFloat32, Layout::channels_last, float>(c, unit, type, tiling)
                : run<TFloat32, Layout::contiguous, float>(c, unit, type, tiling);
  }
  if (type == Dtype::float64) {
    return last ? run<double, Layout::channels_last, double>(c, unit, type, tiling)
                : run<double, Layout::contiguous, double>(c, unit, type, tiling);
  }
  if (type == Dtype::float32) {
    return last ? run<float, Layout::channels_last, float>(c, unit, type, tiling)
                : run<float, Layout::contiguous, float>(c, unit, type, tiling);
  }
#endif
  return "failed: a dtype that this program was not compiled for";
}

}  // namespace
}  // namespace shufflenet::cuda

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    try {
      std::cout << shufflenet::cuda::run(line) << std::endl;
    } catch (const std::exception& error) {
      std::cout << "failed: " << error.what() << std::endl;
    }
  }
}
