// The passes of a stem's training on the CPU, as ops that shufflenet_ext/_stem_training.py puts together. An image may
// be of any dtype and in either layout; all else is float32 or float64 in contiguous planes. As in training.cpp, no
// result depends on the threads: images are cut into strips by their size alone, and what strips add up is added up in
// their order.
#include "isa/isa.h"
#include "training_tensors.h"

#include <torch/csrc/stable/library.h>

namespace shufflenet::cpu {
namespace {

// The dtype of an image's sums, as a tensor's.
ScalarType sums_type(const Tensor& x) {
  return dtype_of("x", x) == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
}

char* output(const char* name, const Tensor& tensor, ScalarType type, const std::vector<int64_t>& sizes) {
  return const_cast<char*>(array(name, tensor, type, sizes));
}

// The convolution of a batch of images, and the strips that its rows are cut into.
class StemBatch {
 public:
  StemBatch(const Tensor& x, int64_t out_channels, int64_t kernel_size, int64_t stride, int64_t padding) {
    const auto [n, channels, height, width] = check_x(x);
    if (!x.is_cpu()) fail("x: got a tensor on another device, expected one on the CPU");
    if (kernel_size < 1 || kernel_size > kMostKernelSize) {
      fail("kernel_size: got ", kernel_size, ", expected 1 to ", kMostKernelSize);
    }
    if (stride != 1 && stride != 2) fail("stride: got ", stride, ", expected 1 or 2");
    if (padding < 0 || padding >= kernel_size) fail("padding: got ", padding, ", expected 0 to ", kernel_size - 1);
    if (out_channels < 1) fail("weight: got ", out_channels, " rows, expected at least one");
    images_ = n;
    stem.in_channels = channels;
    stem.height = height;
    stem.width = width;
    stem.out_channels = out_channels;
    stem.kernel_size = kernel_size;
    stem.stride = stride;
    stem.padding = padding;
    stem.relu = false;
    stem.layout = layout_of(x);
    if (height + 2 * padding < kernel_size || width + 2 * padding < kernel_size) {
      fail("x: got ", shape_of(x), ", expected images that a window of ", kernel_size, " fits into");
    }
    const auto strides = strides_of({n, channels, height, width}, stem.layout);
    for (int64_t i = 0; i < 4; ++i) {
      if (x.size(i) > 1 && x.stride(i) != strides[i]) {
        fail("x: got strides that are neither contiguous nor channels_last, expected those of one of the two");
      }
    }
    dtype_ = dtype_of("x", x);
    image_bytes_ = channels * height * width * x.element_size();
    data_ = static_cast<const char*>(x.const_data_ptr());
    strips_ = ceil_div(stem.conv_height(), rows_of_strip());
  }

  // Calls run(image, rows, number), where numbers count the strips of all images.
  template <class Run>
  void each_strip(const Run& run) const {
    each_task(images_ * strips_, [&](int64_t number) { run(number / strips_, rows(number % strips_), number); });
  }
  Range rows(int64_t strip) const {
    const int64_t begin = strip * rows_of_strip();
    return {begin, std::min(stem.conv_height(), begin + rows_of_strip())};
  }
  const char* image(int64_t n) const { return data_ + n * image_bytes_; }
  int64_t images() const { return images_; }
  int64_t strips() const { return strips_; }
  int64_t pixels() const { return stem.conv_height() * stem.conv_width(); }
  Dtype dtype() const { return dtype_; }
  Stem stem;

 private:
  // Enough work for what comes with a strip not to matter, and little enough for batches of one to be shared.
  static constexpr int64_t kStripPixels = 2048;
  int64_t rows_of_strip() const { return ceil_div(kStripPixels, stem.conv_width()); }

  int64_t images_, image_bytes_, strips_;
  const char* data_;
  Dtype dtype_;
};

// y = conv(x) without a bias, and by image and channel the mean of y and the sum of squared deviations from it.
void stem(Tensor x, Tensor weight, Tensor y, std::optional<Tensor> moments, int64_t kernel_size, int64_t stride,
          int64_t padding) {
  if (weight.dim() != 2) fail("weight: got ", shape_of(weight), ", expected 2 dimensions");
  const StemBatch batch(x, weight.size(0), kernel_size, stride, padding);
  const Stem& s = batch.stem;
  const ScalarType type = sums_type(x);
  const int64_t channels = s.out_channels, pixels = batch.pixels(), width = s.conv_width(), strips = batch.strips();
  const std::vector<double> zeros(channels);  // of either dtype
  const Convolution conv = {array("weight", weight, type, {channels, s.taps()}), nullptr, zeros.data()};
  char* const to = output("y", y, type, {batch.images(), channels, s.conv_height(), width});
  double* const means = moments ? doubles("moments", *moments, {2, batch.images(), channels}) : nullptr;
  std::vector<double> of_strips(means ? 2 * batch.images() * strips * channels : 0);
  const StemKernel& kernel = isa().kernels(batch.dtype()).stem();
  const TrainingKernel& training = isa().training(batch.dtype());
  const int64_t bytes = kernel.workspace_bytes(s), element = y.element_size();
  batch.each_strip([&](int64_t n, Range rows, int64_t number) {
    char* const first = to + (n * channels * pixels + rows.begin * width) * element;
    kernel.run(s, conv, batch.image(n), rows, first, pixels, thread_workspace.reserve(bytes));
    if (!means) return;
    double* const found = of_strips.data() + 2 * number * channels;
    for (int64_t c = 0; c < channels; ++c) {
      training.moments(first + c * pixels * element, rows.count() * width, 1, found + 2 * c, found + 2 * c + 1);
    }
  });
  if (!means) return;
  const auto pixels_of = [&](int64_t strip) { return static_cast<double>(batch.rows(strip).count() * width); };
  for (int64_t n = 0; n < batch.images(); ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      const auto of_strip = [&](int64_t i) { return of_strips.data() + 2 * ((n * strips + i) * channels + c); };
      double sum = 0, squares = 0;
      for (int64_t i = 0; i < strips; ++i) sum += pixels_of(i) * of_strip(i)[0];
      const double mean = sum / static_cast<double>(pixels);
      for (int64_t i = 0; i < strips; ++i) {
        const double deviation = of_strip(i)[0] - mean;
        squares += of_strip(i)[1] + pixels_of(i) * deviation * deviation;
      }
      means[n * channels + c] = mean;
      means[(batch.images() + n) * channels + c] = squares;
    }
  }
}

// A batch of the convolution's results, and the norm and the pool behind it.
class NormBatch {
 public:
  NormBatch(const Tensor& y, const Tensor& scale, const Tensor& shift, bool max_pool) : type(y.scalar_type()) {
    if (type != ScalarType::Float && type != ScalarType::Double) {
      fail("y: got dtype ", dtype_name(type), ", expected float32 or float64");
    }
    const auto [n, channels, height, width] = check_x(y);
    images = n;
    stem.in_channels = 1;
    stem.out_channels = channels;
    stem.height = height;
    stem.width = width;
    stem.max_pool = max_pool;
    in = height * width;
    out = stem.out_height() * stem.out_width();
    bytes = y.element_size();
    from = array("y", y, type, {n, channels, height, width});
    scales_ = array_of("scale", scale);
    shifts_ = array_of("shift", shift);
  }

  std::vector<int64_t> result_sizes() const { return {images, stem.out_channels, stem.out_height(), stem.out_width()}; }
  const double* array_of(const char* name, const Tensor& tensor) const {
    return doubles(name, tensor, {stem.out_channels});
  }
  // Calls run(kernel, norm, plane, channel, workspace) for each plane.
  template <class Run>
  void each_plane(const Run& run) const {
    const StemTrainingKernel& kernel =
        isa().stem_training(type == ScalarType::Double ? Dtype::float64 : Dtype::float32);
    const int64_t workspace = kernel.plane_bytes(stem);
    each_task(images * stem.out_channels, [&](int64_t plane) {
      const int64_t c = plane % stem.out_channels;
      run(kernel, StemNorm{scales_[c], shifts_[c]}, plane, c, thread_workspace.reserve(workspace));
    });
  }

  ScalarType type;
  Stem stem;  // of a convolution that changes nothing
  int64_t images, in, out, bytes;
  const char* from;

 private:
  const double *scales_, *shifts_;
};

// result = max_pool(relu(scale * y + shift)), or the same without the pool.
void stem_norm(Tensor y, Tensor scale, Tensor shift, Tensor result, bool max_pool) {
  const NormBatch batch(y, scale, shift, max_pool);
  char* const to = output("result", result, batch.type, batch.result_sizes());
  batch.each_plane([&](const StemTrainingKernel& kernel, StemNorm norm, int64_t plane, int64_t, void* workspace) {
    kernel.norm_and_pool(
        batch.stem, norm, batch.from + plane * batch.in * batch.bytes, to + plane * batch.out * batch.bytes, workspace);
  });
}

// The gradient of scale * y + shift from that of the result; and by channel its sum, and that of it times y - mean.
void stem_norm_backward(Tensor result_gradient, Tensor y, Tensor mean, Tensor scale, Tensor shift, Tensor gradient,
                        Tensor sums, bool max_pool) {
  const NormBatch batch(y, scale, shift, max_pool);
  const Stem& s = batch.stem;
  const int64_t channels = s.out_channels;
  const char* const given = array("result_gradient", result_gradient, batch.type, batch.result_sizes());
  char* const to = output("gradient", gradient, batch.type, {batch.images, channels, s.height, s.width});
  const double* const means = batch.array_of("mean", mean);
  double* const totals = doubles("sums", sums, {2, channels});
  std::vector<StemSums> of_planes(batch.images * channels);
  batch.each_plane([&](const StemTrainingKernel& kernel, StemNorm norm, int64_t plane, int64_t c, void* workspace) {
    const int64_t at = plane * batch.in * batch.bytes;
    of_planes[plane] = kernel.norm_and_pool_backward(
        s, norm, means[c], given + plane * batch.out * batch.bytes, batch.from + at, to + at, workspace);
  });
  std::fill_n(totals, 2 * channels, 0.0);
  for (int64_t plane = 0; plane < batch.images * channels; ++plane) {
    totals[plane % channels] += of_planes[plane].gradient;
    totals[channels + plane % channels] += of_planes[plane].gradient_times_y;
  }
}

// The gradient of the convolution's weight from that of the norm's results; the coefficients are those of
// training_norm_backward.
void stem_weight_backward(Tensor x, Tensor gradient, Tensor y, Tensor coefficients, Tensor weight_gradient,
                          int64_t kernel_size, int64_t stride, int64_t padding) {
  if (weight_gradient.dim() != 2) fail("weight_gradient: got ", shape_of(weight_gradient), ", expected 2 dimensions");
  const StemBatch batch(x, weight_gradient.size(0), kernel_size, stride, padding);
  const Stem& s = batch.stem;
  const ScalarType type = sums_type(x);
  const int64_t channels = s.out_channels, size = channels * s.taps();
  const std::vector<int64_t> sizes = {batch.images(), channels, s.conv_height(), s.conv_width()};
  const char* const of_norm = array("gradient", gradient, type, sizes);
  const char* const convolved = array("y", y, type, sizes);
  const double* const c = doubles("coefficients", coefficients, {4, channels});
  double* const sums = doubles("weight_gradient", weight_gradient, {channels, s.taps()});
  std::vector<TrainingKernel::NormBackward> norms(channels);
  for (int64_t i = 0; i < channels; ++i) norms[i] = {c[i], c[channels + i], c[2 * channels + i], c[3 * channels + i]};
  std::vector<double> of_strips(batch.images() * batch.strips() * size);
  const StemTrainingKernel& kernel = isa().stem_training(batch.dtype());
  const int64_t bytes = kernel.products_bytes(s), image = channels * batch.pixels() * y.element_size();
  batch.each_strip([&](int64_t n, Range rows, int64_t number) {
    kernel.products(s,
                    {batch.image(n), convolved + n * image, of_norm + n * image, norms.data(), rows,
                     of_strips.data() + number * size},
                    thread_workspace.reserve(bytes));
  });
  std::fill_n(sums, size, 0.0);
  for (size_t i = 0; i < of_strips.size(); ++i) sums[static_cast<int64_t>(i) % size] += of_strips[i];
}

}  // namespace
}  // namespace shufflenet::cpu

STABLE_TORCH_LIBRARY_IMPL(shufflenet_ext, CPU, m) {
  using namespace shufflenet::cpu;
  m.impl("training_stem", TORCH_BOX(&stem));
  m.impl("training_stem_norm", TORCH_BOX(&stem_norm));
  m.impl("training_stem_norm_backward", TORCH_BOX(&stem_norm_backward));
  m.impl("training_stem_weight_backward", TORCH_BOX(&stem_weight_backward));
}
