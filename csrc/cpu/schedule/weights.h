// An op's arguments as the kernels take them: arrays of the accumulator type A, or of bfloat16.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "../../program.h"
#include "../isa/isa.h"
#include "memory.h"

namespace shufflenet::cpu {

template <class A>
inline constexpr Dtype kDtypeOf = std::is_same_v<A, double> ? Dtype::float64 : Dtype::float32;

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
      const A* weight = conv.norm->weight ? values(*conv.norm->weight) : nullptr;
      const A* bias = conv.norm->bias ? values(*conv.norm->bias) : nullptr;
      const A* conv_bias = conv.bias ? values(*conv.bias) : nullptr;
      A* const scale = zeros(channels);
      A* const shift = zeros(channels);
      const A eps = static_cast<A>(conv.norm->eps);
      for (int64_t c = 0; c < channels; ++c) scale[c] = (weight ? weight[c] : A{1}) / std::sqrt(var[c] + eps);
      for (int64_t c = 0; c < channels; ++c) {
        const A distance = mean[c] - (conv_bias ? conv_bias[c] : A{0});
        shift[c] = (bias ? bias[c] : A{0}) - distance * scale[c];
      }
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
    if (tensor.is_contiguous() && dtype == kDtypeOf<A>) return static_cast<const A*>(tensor.const_data_ptr());
    const Tensor contiguous = torch::stable::contiguous(tensor);
    if (dtype == kDtypeOf<A>) {
      kept_.push_back(contiguous);
      return static_cast<const A*>(contiguous.const_data_ptr());
    }
    A* const converted = zeros(contiguous.numel());
    isa().to_accumulator(dtype, contiguous.const_data_ptr(), converted, contiguous.numel());
    return converted;
  }
  A* zeros(int64_t n) {
    arrays_.push_back(std::make_unique<A[]>(n));
    return arrays_.back().get();
  }

  std::vector<Tensor> kept_;
  std::vector<std::unique_ptr<A[]>> arrays_;
};

// The weights of a program, as it is given them.
struct PackedWeights {
  const void* data;
  Dtype dtype;
  int64_t elements;
};

inline int64_t element_bytes(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64: return 8;
    case Dtype::bfloat16:
    case Dtype::float16: return 2;
    default: return 4;
  }
}

inline thread_local Scratch converted_weights;

// The weights of a program as a format's kernels take them: for planes of floats in the accumulator type, in their own
// memory or this thread's; for planes of pairs as table.h says, in their own or the call's.
class ProgramWeights {
 public:
  ProgramWeights(const PackedWeights& weights, Dtype accumulator, bool in_pairs, CallMemory& memory)
      : data_(static_cast<const char*>(weights.data)),
        element_bytes_(element_bytes(in_pairs ? Dtype::bfloat16 : accumulator)),
        in_pairs_(in_pairs),
        memory_(memory) {
    if (in_pairs || weights.dtype == accumulator) return;
    char* const converted = converted_weights.reserve(weights.elements * element_bytes_);
    isa().to_accumulator(weights.dtype, data_, converted, weights.elements);
    data_ = converted;
  }

  // Those of a pointwise convolution or a linear layer.
  Convolution pointwise(const PackedConvolution& packed, int64_t rows, int64_t depth) {
    if (!in_pairs_) return find(packed);
    const auto* weight = static_cast<const uint16_t*>(array(packed.weight));
    if (depth % 2 != 0) {  // a zero at the end of each row
      uint16_t* const even = memory_.array<uint16_t>(rows * (depth + 1));
      for (int64_t row = 0; row < rows; ++row) {
        *std::copy_n(weight + row * depth, depth, even + row * (depth + 1)) = 0;
      }
      weight = even;
    }
    return {weight, nullptr, widened(packed.bias, rows)};
  }

  Convolution depthwise(const PackedConvolution& packed, int64_t channels) {
    if (!in_pairs_) return find(packed);
    return {widened(packed.weight, channels * 9), nullptr, widened(packed.bias, channels)};
  }

  Convolution stem(const PackedConvolution& packed, const Stem& stem) {
    if (!in_pairs_) return find(packed);
    const int64_t size = stem.kernel_size, row_taps = 2 * stem_row_pairs(stem);
    uint16_t* const rows = memory_.array<uint16_t>(stem.out_channels * size * row_taps);
    std::fill_n(rows, stem.out_channels * size * row_taps, uint16_t{0});
    const auto* from = static_cast<const uint16_t*>(array(packed.weight));
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
  const void* array(int64_t offset) const { return data_ + offset * element_bytes_; }
  Convolution find(const PackedConvolution& packed) const {
    return {array(packed.weight), nullptr, array(packed.bias)};
  }
  const float* widened(int64_t offset, int64_t n) {
    float* const floats = memory_.array<float>(n);
    isa().to_accumulator(Dtype::bfloat16, array(offset), floats, n);
    return floats;
  }

  const char* data_;
  int64_t element_bytes_;
  bool in_pairs_;
  CallMemory& memory_;
};

}  // namespace shufflenet::cpu
