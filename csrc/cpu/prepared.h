// An op's arguments as the kernels take them: arrays of the accumulator type A.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "../arguments.h"
#include "kernels.h"
#include "scratch.h"

namespace shufflenet::cpu {

// The convolution's (or a linear layer's) arrays: the arguments' own memory where it has the type A already.
template <class A>
class ConvolutionData {
 public:
  explicit ConvolutionData(const ConvolutionArguments& conv) {
    const int64_t channels = conv.weight.size(0);
    pointers.weight = values(conv.weight);
    if (conv.norm) {
      const A* mean = values(conv.norm->running_mean);
      const A* var = values(conv.norm->running_var);
      const A* weight = values(conv.norm->weight);
      const A* bias = values(conv.norm->bias);
      A* const scale = zeros(channels);
      A* const shift = zeros(channels);
      const A eps = static_cast<A>(conv.norm->eps);
      for (int64_t c = 0; c < channels; ++c) scale[c] = weight[c] / std::sqrt(var[c] + eps);
      for (int64_t c = 0; c < channels; ++c) shift[c] = bias[c] - mean[c] * scale[c];
      pointers.scale = scale;
      pointers.bias = shift;
    } else {
      pointers.bias = conv.bias ? values(*conv.bias) : zeros(channels);
    }
  }

  Convolution pointers;

 private:
  const A* values(const Tensor& tensor) {
    const Dtype dtype = dtype_of("weight", tensor);
    const bool same = dtype == (std::is_same_v<A, double> ? Dtype::float64 : Dtype::float32);
    if (tensor.is_contiguous() && same) return static_cast<const A*>(tensor.const_data_ptr());
    const Tensor contiguous = torch::stable::contiguous(tensor);
    if (same) {
      kept_.push_back(contiguous);
      return static_cast<const A*>(contiguous.const_data_ptr());
    }
    A* const converted = zeros(contiguous.numel());
    isa().unit_kernel(dtype).to_accumulator(contiguous.const_data_ptr(), converted, contiguous.numel());
    return converted;
  }
  A* zeros(int64_t n) {
    arrays_.push_back(std::make_unique<A[]>(n));
    return arrays_.back().get();
  }

  std::vector<Tensor> kept_;
  std::vector<std::unique_ptr<A[]>> arrays_;
};

// A unit's arrays.
template <class A>
struct UnitData {
  explicit UnitData(const UnitArguments& arguments) : conv1(arguments.conv1), conv2(arguments.conv2) {
    if (arguments.conv3) conv3.emplace(*arguments.conv3);
  }

  ConvolutionData<A> conv1, conv2;
  std::optional<ConvolutionData<A>> conv3;
};

inline thread_local Scratch converted_weights;

// The weights of a program: their own memory where they are of type A, else this thread's.
template <class A>
class PackedData {
 public:
  PackedData() = default;  // none: of steps that are not run
  explicit PackedData(const Tensor& weights) {
    const Dtype dtype = dtype_of("weights", weights);
    if (dtype == (std::is_same_v<A, double> ? Dtype::float64 : Dtype::float32)) {
      data_ = static_cast<const A*>(weights.const_data_ptr());
    } else {
      void* const converted = converted_weights.reserve(weights.numel() * static_cast<int64_t>(sizeof(A)));
      isa().unit_kernel(dtype).to_accumulator(weights.const_data_ptr(), converted, weights.numel());
      data_ = static_cast<const A*>(converted);
    }
  }
  Convolution operator[](const PackedConvolution& packed) const {
    if (!data_) return {};
    return {data_ + packed.weight, nullptr, data_ + packed.bias};
  }

 private:
  const A* data_ = nullptr;
};

// The weights of a program in bfloat16, as PairKernel takes them.
class PairData {
 public:
  explicit PairData(CallMemory& memory) : memory_(memory) {}  // none: of steps that are not run
  PairData(const Tensor& weights, CallMemory& memory)
      : data_(static_cast<const uint16_t*>(weights.const_data_ptr())), memory_(memory) {}

  Convolution floats(const PackedConvolution& packed, int64_t rows, int64_t depth) {
    if (!data_) return {};
    return {widened(packed.weight, rows * depth), nullptr, widened(packed.bias, rows)};
  }
  Convolution pairs(const PackedConvolution& packed, int64_t rows, int64_t depth) {
    if (!data_) return {};
    const uint16_t* weight = data_ + packed.weight;
    if (depth % 2 != 0) {  // a zero at the end of each row
      uint16_t* const even = memory_.array<uint16_t>(rows * (depth + 1));
      for (int64_t row = 0; row < rows; ++row) {
        *std::copy_n(weight + row * depth, depth, even + row * (depth + 1)) = 0;
      }
      weight = even;
    }
    return {weight, nullptr, widened(packed.bias, rows)};
  }
  Convolution stem_pairs(const PackedConvolution& packed, const Stem& stem) {
    if (!data_) return {};
    const int64_t size = stem.kernel_size, row_taps = 2 * stem_row_pairs(stem);
    uint16_t* const rows = memory_.array<uint16_t>(stem.out_channels * size * row_taps);
    std::fill_n(rows, stem.out_channels * size * row_taps, uint16_t{0});
    const uint16_t* from = data_ + packed.weight;
    for (int64_t o = 0; o < stem.out_channels; ++o) {
      for (int64_t c = 0; c < stem.in_channels; ++c) {
        for (int64_t ky = 0; ky < size; ++ky, from += size) {
          std::copy_n(from, size, rows + (o * size + ky) * row_taps + c * size);
        }
      }
    }
    return {rows, nullptr, widened(packed.bias, stem.out_channels)};
  }

 private:
  const float* widened(int64_t offset, int64_t n) {
    float* const floats = memory_.array<float>(n);
    isa().unit_kernel(Dtype::bfloat16).to_accumulator(data_ + offset, floats, n);
    return floats;
  }

  const uint16_t* data_ = nullptr;
  CallMemory& memory_;
};

}  // namespace shufflenet::cpu
