// Tensors and numbers as the passes of training take them: in the dtype that sums are in, their planes contiguous.
#pragma once

#include "../../arguments.h"
#include "../isa/isa.h"

namespace shufflenet::cpu {

// What batch norms and weights are computed with.
using Vector = std::vector<double>;

// The dtype that sums of x are in.
inline ScalarType sums_type(const Tensor& x) {
  return dtype_of("x", x) == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
}

inline std::vector<int64_t> sizes_of(const Tensor& x) {
  std::vector<int64_t> sizes(x.dim());
  for (int64_t i = 0; i < x.dim(); ++i) sizes[i] = x.size(i);
  return sizes;
}

// Returns x itself, or a copy that is contiguous and of the dtype.
inline Tensor as_contiguous(const Tensor& x, ScalarType type) {
  if (x.scalar_type() == type && x.is_contiguous()) return x;
  Tensor copy = torch::stable::new_empty(x, sizes_of(x), type);
  return torch::stable::copy_(copy, x);
}

// Returns planes, or a copy of them, in the dtype and the memory format of `given`.
inline Tensor as_given(const Tensor& planes, const Tensor& given) {
  const bool channels_last = layout_of(given) == Layout::channels_last;
  if (planes.scalar_type() == given.scalar_type() && !channels_last) return planes;
  using torch::headeronly::MemoryFormat;
  return torch::stable::to(planes, given.scalar_type(), {}, {}, {}, false, false,
                           channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// The numbers of a tensor of any dtype.
inline Vector numbers_of(const char* name, const Tensor& tensor) {
  const Tensor contiguous = torch::stable::contiguous(tensor);
  const int64_t n = contiguous.numel();
  const Dtype dtype = dtype_of(name, contiguous);
  Vector numbers(n);
  if (dtype == Dtype::float64) {
    isa().to_accumulator(dtype, contiguous.const_data_ptr(), numbers.data(), n);
  } else {
    std::vector<float> floats(n);
    isa().to_accumulator(dtype, contiguous.const_data_ptr(), floats.data(), n);
    numbers.assign(floats.begin(), floats.end());
  }
  return numbers;
}

// A tensor of these numbers, on the device of another one.
inline Tensor tensor_of(const Vector& numbers, const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  const bool is_float = type == ScalarType::Float;
  Tensor tensor = torch::stable::new_empty(like, sizes, is_float ? ScalarType::Float : ScalarType::Double);
  void* const data = tensor.mutable_data_ptr();
  if (is_float) {
    std::copy(numbers.begin(), numbers.end(), static_cast<float*>(data));
    return tensor;
  }
  std::copy(numbers.begin(), numbers.end(), static_cast<double*>(data));
  return type == ScalarType::Double ? tensor : torch::stable::to(tensor, type);
}

// What stands for a gradient that there is not.
inline Tensor none_like(const Tensor& x) { return torch::stable::new_empty(x, std::vector<int64_t>{0}); }

// Numbers in the dtype of planes.
class Numbers {
 public:
  Numbers(ScalarType type, const Vector& numbers) {
    if (type == ScalarType::Double) {
      doubles_ = numbers;
    } else {
      floats_.assign(numbers.begin(), numbers.end());
    }
  }
  const void* data() const {
    return doubles_.empty() ? static_cast<const void*>(floats_.data()) : static_cast<const void*>(doubles_.data());
  }

 private:
  Vector doubles_;
  std::vector<float> floats_;
};

// Planes of a batch of images, contiguous in each image.
struct PlaneBatch {
  PlaneBatch(const Tensor& tensor, void* data)
      : images(tensor.size(0)),
        channels(tensor.size(1)),
        size{tensor.size(2), tensor.size(3)},
        element(tensor.element_size()),
        image(channels * size.pixels()),
        data(static_cast<char*>(data)) {}

  static PlaneBatch read(const Tensor& tensor) { return {tensor, const_cast<void*>(tensor.const_data_ptr())}; }
  static PlaneBatch written(const Tensor& tensor) { return {tensor, tensor.mutable_data_ptr()}; }

  char* at(int64_t n, int64_t channel = 0) const { return data + (n * image + channel * size.pixels()) * element; }
  PlaneBatch some_channels(int64_t first, int64_t count) const {
    PlaneBatch some = *this;
    some.data = at(0, first);
    some.channels = count;
    return some;
  }
  int64_t pixels() const { return size.pixels(); }

  int64_t images, channels;
  PlaneSize size;
  int64_t element;  // bytes
  int64_t image;    // elements from one to the next
  char* data;
};

}  // namespace shufflenet::cpu
