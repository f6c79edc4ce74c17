// Tensors and numbers as the passes of training take them: images that are dense, and numbers in the dtype that sums
// are in.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include "../../arguments.h"
#include "../isa/isa.h"
#include "../schedule/step.h"

namespace shufflenet::cpu {

// What batch norms and weights are computed with.
using Vector = std::vector<double>;

// Leaves the elements of a vector as they come.
template <class T>
struct Uninitialized : std::allocator<T> {
  template <class U>
  struct rebind {
    using other = Uninitialized<U>;
  };
  template <class U>
  void construct(U* element) const noexcept {
    ::new (element) U;
  }
  template <class U, class... From>
  void construct(U* element, From&&... from) const {
    ::new (element) U(std::forward<From>(from)...);
  }
};
// Numbers of which whoever makes it writes each: a matrix is large enough for zeros to take their time.
using Matrix = std::vector<double, Uninitialized<double>>;

// Calls run(begin, end) for parts of n numbers, on torch's threads where they are many.
template <class Run>
void each_part(int64_t n, const Run& run) {
  constexpr int64_t kLeast = 16384;  // of a thread: what takes as long as to call it
  torch::stable::parallel_for(0, n, kLeast, run);
}

// Shares tasks among torch's threads.
template <class Run>
void each_task(int64_t tasks, const Run& run) {
  torch::stable::parallel_for(0, tasks, 1, [&run](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) run(task);
  });
}

// The dtype that sums of x are in.
inline ScalarType sums_type(const Tensor& x) {
  return dtype_of("x", x) == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
}

inline std::vector<int64_t> sizes_of(const Tensor& x) {
  std::vector<int64_t> sizes(x.dim());
  for (int64_t i = 0; i < x.dim(); ++i) sizes[i] = x.size(i);
  return sizes;
}

// Returns a copy of dense images, which are in the other layout.
inline Tensor in_layout(const Tensor& x, Layout layout) {
  const Tensor copy = empty_like_x(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, layout);
  const TrainingKernel& kernel = isa().training(dtype_of("x", x));
  const int64_t channels = x.size(1), pixels = x.size(2) * x.size(3), element = x.element_size();
  constexpr int64_t kPixels = 256;  // of a task
  const int64_t parts = ceil_div(pixels, kPixels);
  const auto* const from = static_cast<const char*>(x.const_data_ptr());
  auto* const to = static_cast<char*>(copy.mutable_data_ptr());
  each_task(x.size(0) * parts, [&](int64_t task) {
    const int64_t first = task % parts * kPixels, count = std::min(kPixels, pixels - first);
    const int64_t image = task / parts * channels * pixels;
    const int64_t of_plane = (image + first) * element, of_pixel = (image + first * channels) * element;
    if (layout == Layout::contiguous) {
      kernel.transpose({from + of_pixel, count, channels, channels}, to + of_plane, pixels);
    } else {
      kernel.transpose({from + of_plane, channels, count, pixels}, to + of_pixel, channels);
    }
  });
  return copy;
}

// Returns images, or a copy of them, whose planes are contiguous.
inline Tensor as_planes(const Tensor& x) {
  if (layout_of(x) == Layout::contiguous) return torch::stable::contiguous(x);
  return in_layout(dense(x, Layout::channels_last), Layout::contiguous);
}

// The same, of the dtype.
inline Tensor as_planes(const Tensor& x, ScalarType type) {
  const Tensor planes = as_planes(x);
  return planes.scalar_type() == type ? planes : torch::stable::to(planes, type);
}

// Returns planes, or a copy of them, in the dtype and the memory format of `given`.
inline Tensor as_given(const Tensor& planes, const Tensor& given) {
  const Tensor same = as_planes(planes, given.scalar_type());
  return layout_of(given) == Layout::contiguous ? same : in_layout(same, Layout::channels_last);
}

// The numbers of a tensor of any dtype.
template <class Numbers>
Numbers numbers_of_as(const char* name, const Tensor& tensor) {
  const Tensor contiguous = torch::stable::contiguous(tensor);
  const Dtype dtype = dtype_of(name, contiguous);
  const auto* const data = static_cast<const char*>(contiguous.const_data_ptr());
  const int64_t element = contiguous.element_size();
  Numbers numbers(contiguous.numel());
  each_part(contiguous.numel(), [&](int64_t begin, int64_t end) {
    if (dtype == Dtype::float64) {
      isa().to_accumulator(dtype, data + begin * element, numbers.data() + begin, end - begin);
      return;
    }
    std::array<float, 1024> floats;
    for (int64_t i = begin, n = 0; i < end; i += n) {
      n = std::min<int64_t>(floats.size(), end - i);
      isa().to_accumulator(dtype, data + i * element, floats.data(), n);
      std::copy_n(floats.data(), n, numbers.data() + i);
    }
  });
  return numbers;
}
inline Vector numbers_of(const char* name, const Tensor& tensor) { return numbers_of_as<Vector>(name, tensor); }
inline Matrix matrix_of(const char* name, const Tensor& tensor) { return numbers_of_as<Matrix>(name, tensor); }

// A tensor of these numbers, on the device of another one.
template <class Numbers>
Tensor tensor_of(const Numbers& numbers, const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  const bool is_float = type == ScalarType::Float;
  Tensor tensor = torch::stable::new_empty(like, sizes, is_float ? ScalarType::Float : ScalarType::Double);
  void* const data = tensor.mutable_data_ptr();
  each_part(static_cast<int64_t>(numbers.size()), [&](int64_t begin, int64_t end) {
    const double* const from = numbers.data() + begin;
    if (is_float) {
      std::copy_n(from, end - begin, static_cast<float*>(data) + begin);
    } else {
      std::copy_n(from, end - begin, static_cast<double*>(data) + begin);
    }
  });
  return is_float || type == ScalarType::Double ? tensor : torch::stable::to(tensor, type);
}

// What stands for a gradient that there is not.
inline Tensor none_like(const Tensor& x) { return torch::stable::new_empty(x, std::vector<int64_t>{0}); }

// Numbers in the dtype that sums are in.
class Numbers {
 public:
  Numbers(ScalarType type, int64_t count) : is_double_(type == ScalarType::Double) {
    is_double_ ? doubles_.resize(count) : floats_.resize(count);
  }
  Numbers(ScalarType type, const Vector& numbers) : Numbers(type, static_cast<int64_t>(numbers.size())) {
    put(0, numbers.data(), static_cast<int64_t>(numbers.size()));
  }
  void put(int64_t at, const double* from, int64_t count) {
    if (is_double_) {
      std::copy_n(from, count, doubles_.data() + at);
    } else {
      std::copy_n(from, count, floats_.data() + at);
    }
  }
  // Puts numbers, and leaves in their place what they are rounded to.
  void round(int64_t at, double* numbers, int64_t count) {
    put(at, numbers, count);
    if (!is_double_) std::copy_n(floats_.data() + at, count, numbers);
  }
  void* data() { return is_double_ ? static_cast<void*>(doubles_.data()) : static_cast<void*>(floats_.data()); }
  const void* data() const { return const_cast<Numbers*>(this)->data(); }
  const void* from(int64_t at) const {
    return is_double_ ? static_cast<const void*>(doubles_.data() + at) : static_cast<const void*>(floats_.data() + at);
  }

 private:
  bool is_double_;
  Matrix doubles_;
  std::vector<float, Uninitialized<float>> floats_;
};

// A pointwise convolution's weights, [rows][depth], as the kernels of training multiply planes of the dtype with them.
class Weights {
 public:
  Weights(Dtype planes, int64_t rows, int64_t depth)
      : depth_(depth),
        pair_depth_(isa().training(planes).multiplies_pairs() ? ceil_div(depth, 2) * 2 : 0),
        numbers_(planes == Dtype::float64 ? ScalarType::Double : ScalarType::Float, is_pairs() ? 0 : rows * depth),
        halves_(rows * pair_depth_) {}

  // Keeps a row, and leaves in its place what of it is kept.
  void round(int64_t row, double* of_row) {
    if (!is_pairs()) return numbers_.round(row * depth_, of_row, depth_);
    for (int64_t k = 0; k < depth_; ++k) {
      const torch::headeronly::BFloat16 half(static_cast<float>(of_row[k]));
      halves_[row * pair_depth_ + k] = half.x;
      of_row[k] = static_cast<float>(half);
    }
  }
  const void* data() const { return is_pairs() ? halves_.data() : numbers_.data(); }

 private:
  bool is_pairs() const { return pair_depth_ > 0; }

  int64_t depth_;
  int64_t pair_depth_;  // from row to row, with zeros behind the depth; 0: weights are not bfloat16
  Numbers numbers_;
  std::vector<uint16_t> halves_;
};

// A batch of images, some channels of a tensor that is dense in either layout.
struct PlaneBatch {
  PlaneBatch(const Tensor& tensor, void* data)
      : images(tensor.size(0)),
        channels(tensor.size(1)),
        size{tensor.size(2), tensor.size(3)},
        element(tensor.element_size()),
        layout(layout_of(tensor)),
        all_channels(channels),
        data(static_cast<char*>(data)) {}

  static PlaneBatch read(const Tensor& tensor) { return {tensor, const_cast<void*>(tensor.const_data_ptr())}; }
  static PlaneBatch written(const Tensor& tensor) { return {tensor, tensor.mutable_data_ptr()}; }

  int64_t pixels() const { return size.pixels(); }
  bool has_planes() const { return layout == Layout::contiguous; }
  // A channel's pixels from some one on: a part of its plane, or, in channels_last, as far apart as there are channels.
  char* at(int64_t n, int64_t channel = 0, int64_t pixel = 0) const {
    const int64_t in_image = has_planes() ? channel * pixels() + pixel : channel + pixel * all_channels;
    return data + (n * all_channels * pixels() + in_image) * element;
  }
  PlaneBatch some_channels(int64_t first, int64_t count) const {
    PlaneBatch some = *this;
    some.data = at(0, first);
    some.channels = count;
    return some;
  }

  int64_t images, channels;
  PlaneSize size;
  int64_t element;  // bytes
  Layout layout;
  int64_t all_channels;  // of the tensor
  char* data;
};

}  // namespace shufflenet::cpu
