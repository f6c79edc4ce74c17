// A stem's training step.
//
//     forward   y = conv(x)    result = max_pool(relu(norm(y)))
//     backward  gradient of norm(y), from y and the result's    gradient of the weight
//
// What lies between is not kept, but for y: the backward pass finds anew which of a window's values was the largest.
// Images seldom want a gradient of their own, so that one is PyTorch's (_stem_training_op.py). An image may be of any
// dtype and in either layout. No result depends on the threads: images are cut into strips by their size alone, and
// what strips add up is added up in their order.
#include <torch/csrc/stable/library.h>

#include "passes.h"

namespace shufflenet::cpu {
namespace {

// The stem's tensors and options, as the op is given them and checked.
struct TrainedStem {
  Stem sizes;
  Tensor x, weight;
  TrainedNorm norm;
  Processes processes;

  ScalarType type() const { return sums_type(x); }  // of the planes behind the convolution
  Dtype planes() const { return type() == ScalarType::Double ? Dtype::float64 : Dtype::float32; }
  std::vector<int64_t> y_sizes() const {
    return {x.size(0), sizes.out_channels, sizes.conv_height(), sizes.conv_width()};
  }
  std::vector<int64_t> result_sizes() const {
    return {x.size(0), sizes.out_channels, sizes.out_height(), sizes.out_width()};
  }
  // x as the kernels read it: dense, in one of the two formats.
  Tensor dense_x() const {
    using torch::headeronly::MemoryFormat;
    return torch::stable::contiguous(
        x, sizes.layout == Layout::channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  }
};

// The convolution of a batch of images, and the strips that its rows are cut into.
class StemBatch {
 public:
  StemBatch(const TrainedStem& trained, const Tensor& dense)
      : stem(trained.sizes),
        images_(dense.size(0)),
        image_bytes_(stem.in_channels * stem.height * stem.width * dense.element_size()),
        strips_(ceil_div(stem.conv_height(), rows_of_strip())),
        data_(static_cast<const char*>(dense.const_data_ptr())),
        dtype_(dtype_of("x", dense)),
        planes_(trained.planes()) {
    stem.relu = stem.max_pool = false;
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
  Dtype planes() const { return planes_; }  // of the convolution's results
  Stem stem;

 private:
  // Enough work for what comes with a strip not to matter, and little enough for batches of one to be shared.
  static constexpr int64_t kStripPixels = 2048;
  int64_t rows_of_strip() const { return ceil_div(kStripPixels, stem.conv_width()); }

  int64_t images_, image_bytes_, strips_;
  const char* data_;
  Dtype dtype_, planes_;
};

// Computes y = conv(x) without a bias, and the moments of its planes.
void convolve(const StemBatch& batch, const Tensor& weight, const Tensor& y_tensor, Moments* moments) {
  const Stem& s = batch.stem;
  const int64_t channels = s.out_channels, pixels = batch.pixels(), width = s.conv_width(), strips = batch.strips();
  const Vector zeros(channels);  // of either dtype
  const Convolution conv = {weight.const_data_ptr(), nullptr, zeros.data()};
  const PlaneBatch y = PlaneBatch::written(y_tensor);
  Moments of_strips(moments ? batch.images() * strips : 0, channels);
  const StemKernel& kernel = isa().kernels(batch.dtype()).stem();
  const TrainingKernel& training = isa().training(batch.planes());
  const int64_t bytes = kernel.workspace_bytes(s);
  batch.each_strip([&](int64_t n, Range rows, int64_t number) {
    char* const first = y.at(n) + rows.begin * width * y.element;
    kernel.run(s, conv, batch.image(n), rows, first, pixels, thread_workspace.reserve(bytes));
    for (int64_t c = 0; moments && c < channels; ++c) {
      training.moments(first + c * pixels * y.element, rows.count() * width, 1, of_strips.means_of(number, c),
                       of_strips.squares_of(number, c));
    }
  });
  if (!moments) return;
  const auto pixels_of = [&](int64_t strip) { return static_cast<double>(batch.rows(strip).count() * width); };
  for (int64_t n = 0; n < batch.images(); ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0, squares = 0;
      for (int64_t i = 0; i < strips; ++i) sum += pixels_of(i) * *of_strips.means_of(n * strips + i, c);
      const double mean = sum / static_cast<double>(pixels);
      for (int64_t i = 0; i < strips; ++i) {
        const double deviation = *of_strips.means_of(n * strips + i, c) - mean;
        squares += *of_strips.squares_of(n * strips + i, c) + pixels_of(i) * deviation * deviation;
      }
      *moments->means_of(n, c) = mean;
      *moments->squares_of(n, c) = squares;
    }
  }
}

// Finds the gradient of the convolution's weight from that of the norm's results.
Matrix weight_gradient(const StemBatch& batch, const Tensor& y_tensor, const Tensor& gradient_tensor,
                       const std::vector<TrainingKernel::NormBackward>& norms) {
  const Stem& s = batch.stem;
  const int64_t size = s.out_channels * s.taps();
  const PlaneBatch y = PlaneBatch::read(y_tensor), gradient = PlaneBatch::read(gradient_tensor);
  Vector of_strips(batch.images() * batch.strips() * size);
  Matrix sums(size, 0.0);
  const StemTrainingKernel& kernel = isa().stem_training(batch.dtype());
  const int64_t bytes = kernel.products_bytes(s);
  batch.each_strip([&](int64_t n, Range rows, int64_t number) {
    kernel.products(s, {batch.image(n), y.at(n), gradient.at(n), norms.data(), rows, of_strips.data() + number * size},
                    thread_workspace.reserve(bytes));
  });
  for (size_t i = 0; i < of_strips.size(); ++i) sums[static_cast<int64_t>(i) % size] += of_strips[i];
  return sums;
}

TrainedStem checked(const Tensor& x, const std::vector<std::optional<Tensor>>& tensors, double eps, bool of_batch,
                    int64_t stride, int64_t padding, bool max_pool, const std::string& processes) {
  const auto [n, channels, height, width] = check_x(x);
  (void)n;
  if (!x.is_cpu()) fail("x: got a tensor on another device, expected one on the CPU");
  if (tensors.size() != kTensors) fail("tensors: got ", tensors.size(), ", expected ", kTensors);
  if (!tensors[0]) fail("conv_weight: got None, expected a tensor");
  const Tensor& weight = *tensors[0];
  if (weight.dim() != 4 || weight.size(0) < 1 || weight.size(2) < 1 || weight.size(2) > kMostKernelSize) {
    fail("conv_weight: got ", shape_of(weight),
         ", expected [out_channels, in_channels, size, size] with a size of 1 to ", kMostKernelSize);
  }
  Stem sizes;
  sizes.in_channels = channels;
  sizes.height = height;
  sizes.width = width;
  sizes.out_channels = weight.size(0);
  sizes.kernel_size = weight.size(2);
  sizes.stride = stride;
  sizes.padding = padding;
  sizes.max_pool = max_pool;
  sizes.layout = layout_of(x);
  check_convolution(
      {"conv", weight, tensors[1], {}}, x, {sizes.out_channels, channels, sizes.kernel_size, sizes.kernel_size});
  if (stride != 1 && stride != 2) fail("stride: got ", stride, ", expected 1 or 2");
  if (padding < 0 || padding >= sizes.kernel_size) {
    fail("padding: got ", padding, ", expected 0 to ", sizes.kernel_size - 1);
  }
  if (height + 2 * padding < sizes.kernel_size || width + 2 * padding < sizes.kernel_size) {
    fail("x: got ", shape_of(x), ", expected images that a window of ", sizes.kernel_size, " fits into");
  }
  const TrainedNorm norm = {tensors[1], tensors[2], tensors[3], tensors[4], tensors[5], eps, of_batch};
  norm.check("bn", sizes.out_channels);
  return {sizes, x, weight, norm, Processes(processes)};
}

// The result; y, of the dtype that sums are in; and the norm's mean, unbiased variance and variance, the images of all
// processes' batches and how many processes those are.
std::vector<Tensor> training_stem(Tensor x, std::vector<std::optional<Tensor>> tensors, double eps, bool of_batch,
                                  int64_t stride, int64_t padding, bool max_pool, std::string processes) {
  const TrainedStem stem = checked(x, tensors, eps, of_batch, stride, padding, max_pool, processes);
  const Tensor dense = stem.dense_x(), weight = as_planes(stem.weight, stem.type());
  const StemBatch batch(stem, dense);
  const WholeBatch whole(x.size(0), stem.processes);
  const Tensor y = torch::stable::new_empty(x, stem.y_sizes(), stem.type());
  std::optional<Moments> moments;
  if (of_batch) moments.emplace(batch.images(), stem.sizes.out_channels);
  {
    const ProfiledPass pass("stem_training: conv");
    convolve(batch, weight, y, moments ? &*moments : nullptr);
  }
  const MeanAndVariance of_y = moments ? MeanAndVariance(*moments, batch.pixels(), whole, stem.processes)
                                       : stem.norm.fixed_statistics(stem.sizes.out_channels);
  const Tensor result = torch::stable::new_empty(x, stem.result_sizes(), stem.type());
  {
    const ProfiledPass pass("stem_training: bn, ReLU and pool");
    Passes(stem.planes()).norm_and_relu({stem.norm, of_y}, PlaneBatch::read(y), PlaneBatch::written(result), max_pool);
  }
  Vector statistics(of_y.mean);
  for (const Vector& part : {of_y.unbiased(batch.pixels(), whole), of_y.var}) {
    statistics.insert(statistics.end(), part.begin(), part.end());
  }
  statistics.insert(statistics.end(), {whole.images, whole.count});
  return {
      as_given(result, x), y, tensor_of(statistics, {static_cast<int64_t>(statistics.size())}, ScalarType::Double, x)};
}

// The gradients of y, where x wants one, and of the weight, where it is wanted; of its bias, and of the norm's weight
// and bias. Empty tensors for what is not wanted or what there is not.
std::vector<Tensor> training_stem_backward(
    Tensor gradient, Tensor x, Tensor y, Tensor statistics, std::vector<std::optional<Tensor>> tensors,
    std::vector<bool> wanted, double eps, bool of_batch, int64_t stride, int64_t padding, bool max_pool,
    std::string processes) {
  const TrainedStem stem = checked(x, tensors, eps, of_batch, stride, padding, max_pool, processes);
  const int64_t channels = stem.sizes.out_channels;
  if (wanted.size() != 2) fail("wanted: got ", wanted.size(), " values, expected 2, of x and the weight");
  check_shape("gradient", gradient, stem.result_sizes());
  check_like_x("gradient", gradient, x);
  check_shape("y", y, stem.y_sizes());
  if (y.scalar_type() != stem.type()) {
    fail("y: got dtype ", dtype_name(y.scalar_type()), ", expected ", dtype_name(stem.type()));
  }
  check_shape("statistics", statistics, {3 * channels + 2});
  const Vector kept = numbers_of("statistics", statistics);
  const WholeBatch whole(kept[3 * channels], kept[3 * channels + 1]);
  const auto mean = kept.begin(), var = mean + 2 * channels;
  const Affine norm(stem.norm, {Vector(mean, mean + channels), Vector(var, var + channels)});
  const Passes passes(stem.planes());
  const Tensor planes = as_planes(y, stem.type()), of_result = as_planes(gradient, stem.type());
  Tensor of_norm = torch::stable::empty_like(planes);
  const PlaneBatch convolved = PlaneBatch::read(planes);
  NormSums sums(channels);
  {
    const ProfiledPass pass("stem_training: gradient of bn, ReLU and pool");
    sums = passes.norm_and_relu_backward(
        norm, convolved, PlaneBatch::read(of_result), PlaneBatch::written(of_norm), max_pool);
  }
  stem.processes.sum({&sums.total, &sums.with_y});
  const double values = whole.images * static_cast<double>(convolved.pixels());
  const auto backward = norm_backward_of(norm, of_batch, values, sums);
  const NormGradients of_parameters(norm, of_batch, sums, whole);
  Matrix of_weight;
  if (wanted[1]) {
    const Tensor dense = stem.dense_x();
    const ProfiledPass pass("stem_training: gradient of conv's weight");
    of_weight = weight_gradient(StemBatch(stem, dense), planes, of_norm, backward);
  }
  if (wanted[0]) {
    const ProfiledPass pass("stem_training: gradient of bn");
    passes.norm_backward(backward, convolved, PlaneBatch::written(of_norm));
  }
  std::vector<Tensor> gradients = {wanted[0] ? of_norm : none_like(x)};
  add_gradients(gradients, of_weight, of_parameters, tensors.data(), x);
  return gradients;
}

}  // namespace
}  // namespace shufflenet::cpu

STABLE_TORCH_LIBRARY_IMPL(shufflenet_ext, CPU, m) {
  using namespace shufflenet::cpu;
  m.impl("training_stem", TORCH_BOX(&training_stem));
  m.impl("training_stem_backward", TORCH_BOX(&training_stem_backward));
}
