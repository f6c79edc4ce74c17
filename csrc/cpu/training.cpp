// The passes of a unit's training on the CPU, as ops that shufflenet_ext/_training.py puts together. Tensors are of
// float32 or float64, and hold contiguous planes: only the distance from image to image is free. Whatever is added up
// over the batch is added up in one order, by one thread for each sum, so that no result depends on the threads.
#include "isa/isa.h"
#include "training_tensors.h"

#include <torch/csrc/stable/library.h>

namespace shufflenet::cpu {
namespace {

const char* const kFloats = "float32 or float64";

// A batch of planes.
struct Batch4 {
  Batch4(const char* name, const Tensor& tensor, ScalarType type, bool is_written)
      : images(tensor.dim() == 4 ? tensor.size(0) : 0) {
    if (tensor.dim() != 4) fail(name, ": got ", shape_of(tensor), ", expected 4 dimensions");
    check_float(name, tensor, type);
    if (type != ScalarType::Float && type != ScalarType::Double) {
      fail(name, ": got dtype ", dtype_name(type), ", expected ", kFloats);
    }
    channels = tensor.size(1);
    size = {tensor.size(2), tensor.size(3)};
    if (channels < 1 || size.height < 1 || size.width < 1) {
      fail(name, ": got ", shape_of(tensor), ", expected at least one channel, row and column");
    }
    image = tensor.stride(0);
    bytes = tensor.element_size();
    const bool dense =
        (size.width == 1 || tensor.stride(3) == 1) && (size.height == 1 || tensor.stride(2) == size.width) &&
        (channels == 1 || tensor.stride(1) == size.pixels()) &&
        (images <= 1 || !is_written || image >= channels * size.pixels());
    if (!dense && tensor.numel() > 0) fail(name, ": got planes that are not contiguous, expected contiguous ones");
    data = static_cast<char*>(is_written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr()));
  }
  char* at(int64_t n, int64_t channel = 0) const { return data + (n * image + channel * size.pixels()) * bytes; }

  int64_t images, channels = 0, image = 0, bytes = 0;
  PlaneSize size;
  char* data = nullptr;
};

Batch4 read(const char* name, const Tensor& tensor, const Tensor& like) {
  return {name, tensor, like.scalar_type(), false};
}
Batch4 written(const char* name, const Tensor& tensor, const Tensor& like) {
  return {name, tensor, like.scalar_type(), true};
}

void check_sizes(const char* name, const Batch4& batch, int64_t images, int64_t channels, PlaneSize size) {
  if (batch.images == images && batch.channels == channels && batch.size.height == size.height &&
      batch.size.width == size.width) {
    return;
  }
  fail(name, ": got ", shape_of(Sizes{batch.images, batch.channels, batch.size.height, batch.size.width}),
       ", expected ", shape_of(Sizes{images, channels, size.height, size.width}));
}

const TrainingKernel& kernel_for(const Tensor& x) { return isa().training(dtype_of("x", x)); }

// The tasks of a batch: each is some channels of an image, and as many as keep all threads at work.
class ImageTasks {
 public:
  ImageTasks(int64_t images, int64_t channels) : channels_(channels) {
    constexpr int64_t kLeast = 8;  // channels: a tile's
    const int64_t wanted =
        ceil_div(2 * static_cast<int64_t>(torch::stable::get_num_threads()), std::max<int64_t>(1, images));
    at_once_ = ceil_div(channels, std::clamp<int64_t>(wanted, 1, ceil_div(channels, kLeast)));
    of_image_ = ceil_div(channels, at_once_);
    count_ = images * of_image_;
  }
  // Calls run(image, channels) for each.
  template <class Run>
  void run(const Run& run_task) const {
    each_task(count_, [&](int64_t task) {
      const int64_t first = task % of_image_ * at_once_;
      run_task(task / of_image_, Range{first, std::min(channels_, first + at_once_)});
    });
  }

 private:
  int64_t channels_, at_once_, of_image_, count_;
};

// y = activation(weight x + bias + residual), and the moments of its planes: means, then sums of squared deviations.
void pointwise(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual, Tensor y,
               std::optional<Tensor> moments, int64_t groups, bool relu) {
  const Batch4 from = read("x", x, x), to = written("y", y, x);
  check_divides("groups", groups, "channels of x", from.channels);
  check_divides("groups", groups, "channels of y", to.channels);
  check_sizes("y", to, from.images, to.channels, from.size);
  const int64_t rows = to.channels, depth = from.channels / groups, pixels = from.size.pixels();
  TrainingPointwise p = {};
  p.conv.weight = array("weight", weight, x.scalar_type(), {rows, depth});
  std::vector<double> zeros;  // of either dtype
  if (bias) {
    p.conv.bias = array("bias", *bias, x.scalar_type(), {rows});
  } else {
    zeros.resize(rows);
    p.conv.bias = zeros.data();
  }
  p.activation = relu ? kRelu : kNoActivation;
  p.rows = rows;
  p.groups = groups;
  p.depth = depth;
  p.pixels = pixels;
  p.images = from.images;
  std::optional<Batch4> added;
  if (residual) {
    added.emplace(read("residual", *residual, x));
    check_sizes("residual", *added, to.images, to.channels, to.size);
  }
  double* const means = moments ? doubles("moments", *moments, {2, to.images, rows}) : nullptr;
  const TrainingKernel& kernel = kernel_for(x);
  const int64_t bytes = kernel.pointwise_bytes(p);
  ImageTasks(to.images, rows).run([&](int64_t n, Range some) {
    TrainingPointwise image = p;
    image.x = from.at(n);
    image.y = to.at(n);
    image.residual = added ? added->at(n) : nullptr;
    kernel.pointwise(image, some, thread_workspace.reserve(bytes));
    if (!means) return;
    double* const mean = means + n * rows + some.begin;
    kernel.moments(to.at(n, some.begin), pixels, some.count(), mean, mean + to.images * rows);
  });
}

TrainingDepthwise depthwise_of(const Batch4& y1, const Batch4& y2, const Tensor& scale, const Tensor& shift,
                               const Tensor& weight, int64_t shuffle_groups, int64_t stride) {
  if (stride != 1 && stride != 2) fail("stride: got ", stride, ", expected 1 or 2");
  check_divides("shuffle_groups", shuffle_groups, "channels of y1", y1.channels);
  const auto size = [stride](int64_t n) { return (n - 1) / stride + 1; };
  check_sizes("y2", y2, y1.images, y1.channels, {size(y1.size.height), size(y1.size.width)});
  const ScalarType type = weight.scalar_type();
  TrainingDepthwise d = {};
  d.in = y1.size;
  d.out = y2.size;
  d.stride = stride;
  d.channels = y1.channels;
  d.shuffle_groups = shuffle_groups;
  d.norm1 = {array("scale", scale, type, {d.channels}), array("shift", shift, type, {d.channels})};
  d.weight = array("weight", weight, type, {d.channels, 9});
  return d;
}

// y2 = conv2(shuffle(relu(scale * y1 + shift))), and the moments of its planes.
void depthwise(Tensor y1, Tensor scale, Tensor shift, Tensor weight, Tensor y2, std::optional<Tensor> moments,
               int64_t shuffle_groups, int64_t stride) {
  const Batch4 from = read("y1", y1, weight), to = written("y2", y2, weight);
  const TrainingDepthwise d = depthwise_of(from, to, scale, shift, weight, shuffle_groups, stride);
  double* const means = moments ? doubles("moments", *moments, {2, to.images, d.channels}) : nullptr;
  const TrainingKernel& kernel = kernel_for(weight);
  const int64_t bytes = kernel.depthwise_bytes(d);
  ImageTasks(to.images, d.channels).run([&](int64_t n, Range some) {
    kernel.depthwise(d, some, from.at(n), to.at(n), thread_workspace.reserve(bytes));
    if (!means) return;
    double* const mean = means + n * d.channels + some.begin;
    kernel.moments(to.at(n, some.begin), d.out.pixels(), some.count(), mean, mean + to.images * d.channels);
  });
}

constexpr int64_t kDepthwiseSums = sizeof(DepthwiseSums) / sizeof(double);

// The gradient of scale * y1 + shift from that of y2; and by image and channel of y2 what DepthwiseSums has.
void depthwise_backward(Tensor y2_gradient, Tensor y1, Tensor y1_mean, Tensor scale, Tensor shift, Tensor weight,
                        Tensor gradient, Tensor sums, int64_t shuffle_groups, int64_t stride) {
  const Batch4 from = read("y2_gradient", y2_gradient, weight), before = read("y1", y1, weight),
               to = written("gradient", gradient, weight);
  const TrainingDepthwise d = depthwise_of(before, from, scale, shift, weight, shuffle_groups, stride);
  check_sizes("gradient", to, before.images, d.channels, d.in);
  const char* const means = array("y1_mean", y1_mean, weight.scalar_type(), {d.channels});
  double* const all_sums = doubles("sums", sums, {from.images, d.channels, kDepthwiseSums});
  const TrainingKernel& kernel = kernel_for(weight);
  const int64_t bytes = kernel.depthwise_bytes(d);
  ImageTasks(to.images, d.channels).run([&](int64_t n, Range some) {
    auto* const of_image = reinterpret_cast<DepthwiseSums*>(all_sums + n * d.channels * kDepthwiseSums);
    kernel.depthwise_backward(
        d, some, from.at(n), before.at(n), means, to.at(n), of_image, thread_workspace.reserve(bytes));
  });
}

// Replaces the gradient of a norm's result by that of its input, y: see TrainingKernel. The coefficients are those of
// each channel, in the order in which NormBackward has them.
void norm_backward(Tensor gradient, Tensor y, Tensor coefficients) {
  const Batch4 to = written("gradient", gradient, y), from = read("y", y, y);
  check_sizes("gradient", to, from.images, from.channels, from.size);
  const double* const c = doubles("coefficients", coefficients, {4, from.channels});
  const int64_t n = from.channels;
  const TrainingKernel& kernel = kernel_for(y);
  each_task(from.images * n, [&](int64_t task) {
    const int64_t image = task / n, i = task % n;
    kernel.norm_backward(
        {c[i], c[n + i], c[2 * n + i], c[3 * n + i]}, from.at(image, i), from.size.pixels(), to.at(image, i));
  });
}

// Adds up products of planes, a group at a time. A task has some planes of a, of which prepare(image, plane) may make
// each before it is read. In each image it goes through them a tile's at a time, while the planes of b stay in the
// cache.
template <class Prepare>
void products_of(const Batch4& a, const Batch4& b, const void* offset, double* sums, int64_t groups,
                 const TrainingKernel& kernel, const Prepare& prepare) {
  constexpr int64_t kTile = 8;  // planes of a
  // Of a plane of a, in as many images as it takes: what the L1 cache holds of a tile.
  constexpr int64_t kPixels = 1024;
  const int64_t rows = a.channels / groups, columns = b.channels / groups;
  const int64_t images_at_once = std::max<int64_t>(1, kPixels / std::max<int64_t>(1, a.size.pixels()));
  const int64_t wanted = ceil_div(4 * static_cast<int64_t>(torch::stable::get_num_threads()), groups);  // tasks a group
  const int64_t at_once = ceil_div(ceil_div(rows, kTile), wanted) * kTile, parts = ceil_div(rows, at_once);
  std::fill_n(sums, a.channels * columns, 0.0);
  each_task(groups * parts, [&](int64_t task) {
    const int64_t group = task / parts, begin = task % parts * at_once, end = std::min(rows, begin + at_once);
    const auto* const of_group = static_cast<const char*>(offset);
    for (int64_t n = 0; n < a.images; n += images_at_once) {
      const int64_t images = std::min(images_at_once, a.images - n);
      for (int64_t row = begin; row < end; row += kTile) {
        const int64_t first = group * rows + row, count = std::min(kTile, end - row);
        for (int64_t i = 0; i < images; ++i) {
          for (int64_t plane = first; plane < first + count; ++plane) prepare(n + i, plane);
        }
        kernel.products({a.at(n, first), b.at(n, group * columns), a.image, b.image,
                         of_group ? of_group + group * columns * b.bytes : nullptr, count, columns, images,
                         a.size.pixels(), sums + first * columns});
      }
    }
  });
}

// sums[i][j]: the sum over the batch and its pixels of a's channel i times b's channel j of the same group, less its
// offset.
void products(Tensor a, Tensor b, std::optional<Tensor> offset, Tensor sums, int64_t groups) {
  const Batch4 left = read("a", a, a), right = read("b", b, a);
  check_divides("groups", groups, "channels of a", left.channels);
  check_divides("groups", groups, "channels of b", right.channels);
  check_sizes("b", right, left.images, right.channels, left.size);
  const void* const less = offset ? array("offset", *offset, a.scalar_type(), {right.channels}) : nullptr;
  products_of(left, right, less, doubles("sums", sums, {left.channels, right.channels / groups}), groups, kernel_for(a),
              [](int64_t, int64_t) {});
}

// The gradient of a ReLU's argument from that of its result; its products with b, as above; and its sum by channel.
void relu_backward(Tensor result, Tensor result_gradient, Tensor gradient, std::optional<Tensor> b,
                   std::optional<Tensor> offset, std::optional<Tensor> sums, Tensor totals, int64_t groups) {
  const Batch4 value = read("result", result, result), from = read("result_gradient", result_gradient, result),
               to = written("gradient", gradient, result);
  check_sizes("result_gradient", from, value.images, value.channels, value.size);
  check_sizes("gradient", to, value.images, value.channels, value.size);
  double* const total = doubles("totals", totals, {value.channels});
  std::fill_n(total, value.channels, 0.0);
  const TrainingKernel& kernel = kernel_for(result);
  const auto prepare = [&](int64_t n, int64_t c) {
    total[c] += kernel.relu_backward(value.at(n, c), value.size.pixels(), from.at(n, c), to.at(n, c));
  };
  if (!b) {
    each_task(value.channels, [&](int64_t c) {
      for (int64_t n = 0; n < value.images; ++n) prepare(n, c);
    });
    return;
  }
  if (!sums) fail("sums: got None, expected a tensor, as b is one");
  const Batch4 right = read("b", *b, result);
  check_divides("groups", groups, "channels of result", value.channels);
  check_divides("groups", groups, "channels of b", right.channels);
  check_sizes("b", right, value.images, right.channels, value.size);
  const void* const less = offset ? array("offset", *offset, result.scalar_type(), {right.channels}) : nullptr;
  products_of(
      to, right, less, doubles("sums", *sums, {value.channels, right.channels / groups}), groups, kernel, prepare);
}

Unit pooled_unit(PlaneSize in, bool relu, bool count_include_pad) {
  Unit unit;
  unit.stride = 2;
  unit.height = in.height;
  unit.width = in.width;
  unit.shortcut_relu = relu;
  unit.pool_count_include_pad = count_include_pad;
  return unit;
}

// The shortcut of stride 2: avg_pool2d(x, 3, 2, 1), with or without a ReLU.
void pool(Tensor x, Tensor y, bool relu, bool count_include_pad) {
  const Batch4 from = read("x", x, x), to = written("y", y, x);
  const Unit unit = pooled_unit(from.size, relu, count_include_pad);
  check_sizes("y", to, from.images, from.channels, {unit.out_height(), unit.out_width()});
  const TrainingKernel& kernel = kernel_for(x);
  const int64_t bytes = kernel.pool_bytes(from.size), n = from.channels;
  each_task(from.images * n, [&](int64_t task) {
    kernel.pool(unit, from.at(task / n, task % n), to.at(task / n, task % n), thread_workspace.reserve(bytes));
  });
}

void pool_backward(Tensor y_gradient, Tensor gradient, bool count_include_pad) {
  const Batch4 from = read("y_gradient", y_gradient, gradient), to = written("gradient", gradient, gradient);
  const Unit unit = pooled_unit(to.size, false, count_include_pad);
  check_sizes("y_gradient", from, to.images, to.channels, {unit.out_height(), unit.out_width()});
  const TrainingKernel& kernel = kernel_for(gradient);
  const int64_t bytes = kernel.pool_bytes(to.size), n = to.channels;
  each_task(to.images * n, [&](int64_t task) {
    kernel.pool_backward(unit, from.at(task / n, task % n), to.at(task / n, task % n), thread_workspace.reserve(bytes));
  });
}

}  // namespace
}  // namespace shufflenet::cpu

STABLE_TORCH_LIBRARY_IMPL(shufflenet_ext, CPU, m) {
  using namespace shufflenet::cpu;
  m.impl("training_pointwise", TORCH_BOX(&pointwise));
  m.impl("training_depthwise", TORCH_BOX(&depthwise));
  m.impl("training_depthwise_backward", TORCH_BOX(&depthwise_backward));
  m.impl("training_norm_backward", TORCH_BOX(&norm_backward));
  m.impl("training_products", TORCH_BOX(&products));
  m.impl("training_relu_backward", TORCH_BOX(&relu_backward));
  m.impl("training_pool", TORCH_BOX(&pool));
  m.impl("training_pool_backward", TORCH_BOX(&pool_backward));
}
