#include "passes.h"

#include "../schedule/step.h"

namespace shufflenet::cpu {
namespace {

constexpr int64_t kTile = 8;  // planes that a kernel works on at once, at most

// The tasks of a batch: each is some channels of an image, and as many as keep all threads at work. Calls
// run(image, channels) for each.
template <class Run>
void each_share_of_images(int64_t images, int64_t channels, const Run& run) {
  const int64_t wanted =
      ceil_div(2 * static_cast<int64_t>(torch::stable::get_num_threads()), std::max<int64_t>(1, images));
  const int64_t at_once = ceil_div(channels, std::clamp<int64_t>(wanted, 1, ceil_div(channels, kTile)));
  const int64_t of_image = ceil_div(channels, at_once);
  each_task(images * of_image, [&](int64_t task) {
    const int64_t first = task % of_image * at_once;
    run(task / of_image, Range{first, std::min(channels, first + at_once)});
  });
}

// Calls run(image, channel) for each plane of a batch.
template <class Run>
void each_plane(const PlaneBatch& batch, const Run& run) {
  each_task(batch.images * batch.channels, [&](int64_t task) { run(task / batch.channels, task % batch.channels); });
}

// Pixels of eight planes (a tile's) and three more, in as many images as it takes, that an L1 cache of 32 KiB holds in
// float32. Long planes are cut into blocks of whole vectors.
constexpr int64_t kPixelsAtOnce = 448, kVectorPixels = 16;

// Adds up products of planes, a group at a time. A thread has some tiles of planes of a, of which prepare(image, plane)
// may make each before it is read; in each image it goes through them while the planes of b stay in the cache.
template <class Prepare>
Vector products_of(const PlaneBatch& a, const PlaneBatch& b, const void* offset, int64_t groups,
                   const TrainingKernel& kernel, const Prepare& prepare) {
  const int64_t rows = a.channels / groups, columns = b.channels / groups, tiles = ceil_div(rows, kTile);
  const int64_t images_at_once = std::max<int64_t>(1, kPixelsAtOnce / std::max<int64_t>(1, a.pixels()));
  const int64_t blocks = std::max<int64_t>(1, ceil_div(a.pixels(), kPixelsAtOnce));
  const int64_t of_block = ceil_div(a.pixels(), blocks * kVectorPixels) * kVectorPixels;
  Vector sums(a.channels * columns);
  torch::stable::parallel_for(0, groups * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = 0; n < a.images; n += images_at_once) {
      const int64_t images = std::min(images_at_once, a.images - n);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t group = tile / tiles, row = tile % tiles * kTile;
        const int64_t first = group * rows + row, count = std::min(kTile, rows - row), column = group * columns;
        for (int64_t i = 0; i < images; ++i) {
          for (int64_t plane = first; plane < first + count; ++plane) prepare(n + i, plane);
        }
        const void* const of_group = offset ? static_cast<const char*>(offset) + column * b.element : nullptr;
        for (int64_t pixel = 0; pixel < a.pixels(); pixel += of_block) {
          const int64_t skipped = pixel * a.element;
          kernel.products(
              {a.at(n, first) + skipped, b.at(n, column) + skipped, a.image, b.image, of_group, a.pixels(), count,
               columns, images, std::min(of_block, a.pixels() - pixel), sums.data() + first * columns});
        }
      }
    }
  });
  return sums;
}

// A plane of the batch as the stem's kernels of a norm, a ReLU and a pool take it.
Stem plane_of(const PlaneBatch& batch, bool max_pool) {
  Stem plane;
  plane.in_channels = plane.out_channels = 1;
  plane.height = batch.size.height;
  plane.width = batch.size.width;
  plane.max_pool = max_pool;
  return plane;
}

}  // namespace

void Passes::pointwise(const std::vector<PointwiseTerm>& terms, const void* bias, const PlaneBatch* residual,
                       const PlaneBatch& y, int64_t groups, Activation activation, Moments* moments) const {
  std::vector<TrainingPointwise> convolutions;
  const Vector zeros(y.channels);  // of either dtype
  int64_t bytes = 0;
  for (const auto& [x, weight] : terms) {
    TrainingPointwise p = {};
    p.conv = {weight, nullptr, bias && convolutions.empty() ? bias : zeros.data()};
    p.activation = activation;
    p.rows = y.channels;
    p.groups = groups;
    p.depth = x.channels / groups;
    p.pixels = y.pixels();
    p.images = y.images;
    bytes = std::max(bytes, kernel_.pointwise_bytes(p));
    convolutions.push_back(p);
  }
  each_share_of_images(y.images, y.channels, [&](int64_t n, Range some) {
    for (size_t i = 0; i < terms.size(); ++i) {
      TrainingPointwise p = convolutions[i];
      p.x = terms[i].x.at(n);
      p.y = y.at(n);
      p.residual = i > 0 ? p.y : residual ? residual->at(n) : nullptr;
      kernel_.pointwise(p, some, thread_workspace.reserve(bytes));
    }
    if (!moments) return;
    kernel_.moments(y.at(n, some.begin), y.pixels(), some.count(), moments->means_of(n, some.begin),
                    moments->squares_of(n, some.begin));
  });
}

void Passes::depthwise(const TrainingDepthwise& d, const PlaneBatch& y1, const PlaneBatch& y2, Moments* moments) const {
  const int64_t bytes = kernel_.depthwise_bytes(d);
  each_share_of_images(y2.images, d.channels, [&](int64_t n, Range some) {
    kernel_.depthwise(d, some, y1.at(n), y2.at(n), thread_workspace.reserve(bytes));
    if (!moments) return;
    kernel_.moments(y2.at(n, some.begin), y2.pixels(), some.count(), moments->means_of(n, some.begin),
                    moments->squares_of(n, some.begin));
  });
}

std::vector<DepthwiseSums> Passes::depthwise_backward(const TrainingDepthwise& d, const PlaneBatch& y2_gradient,
                                                      const PlaneBatch& y1, const void* y1_means,
                                                      const PlaneBatch& gradient) const {
  std::vector<DepthwiseSums> sums(y1.images * d.channels);
  const int64_t bytes = kernel_.depthwise_bytes(d);
  each_share_of_images(y1.images, d.channels, [&](int64_t n, Range some) {
    kernel_.depthwise_backward(d, some, y2_gradient.at(n), y1.at(n), y1_means, gradient.at(n),
                               sums.data() + n * d.channels, thread_workspace.reserve(bytes));
  });
  return sums;
}

void Passes::norm_and_relu(const Affine& norm, const PlaneBatch& y, const PlaneBatch& result, bool max_pool) const {
  const Stem plane = plane_of(y, max_pool);
  const int64_t bytes = of_norms_.plane_bytes(plane);
  each_plane(y, [&](int64_t n, int64_t c) {
    of_norms_.norm_and_pool(
        plane, {norm.scale[c], norm.shift(c)}, y.at(n, c), result.at(n, c), thread_workspace.reserve(bytes));
  });
}

NormSums Passes::norm_and_relu_backward(const Affine& norm, const PlaneBatch& y, const PlaneBatch& result_gradient,
                                        const PlaneBatch& gradient, bool max_pool) const {
  const Stem plane = plane_of(y, max_pool);
  const int64_t bytes = of_norms_.plane_bytes(plane);
  std::vector<StemSums> of_planes(y.images * y.channels);
  each_plane(y, [&](int64_t n, int64_t c) {
    of_planes[n * y.channels + c] = of_norms_.norm_and_pool_backward(
        plane, {norm.scale[c], norm.shift(c)}, norm.mean[c], result_gradient.at(n, c), y.at(n, c), gradient.at(n, c),
        thread_workspace.reserve(bytes));
  });
  NormSums sums(y.channels);
  for (size_t i = 0; i < of_planes.size(); ++i) {
    sums.total[i % y.channels] += of_planes[i].gradient;
    sums.with_y[i % y.channels] += of_planes[i].gradient_times_y;
  }
  return sums;
}

void Passes::norm_backward(const std::vector<TrainingKernel::NormBackward>& norms, const PlaneBatch& y,
                           const PlaneBatch& gradient) const {
  each_plane(
      y, [&](int64_t n, int64_t c) { kernel_.norm_backward(norms[c], y.at(n, c), y.pixels(), gradient.at(n, c)); });
}

Moments Passes::moments(const PlaneBatch& batch) const {
  Moments found(batch.images, batch.channels);
  each_plane(batch, [&](int64_t n, int64_t c) {
    kernel_.moments(batch.at(n, c), batch.pixels(), 1, found.means_of(n, c), found.squares_of(n, c));
  });
  return found;
}

Vector Passes::products(const PlaneBatch& a, const PlaneBatch& b, const void* offset, int64_t groups) const {
  return products_of(a, b, offset, groups, kernel_, [](int64_t, int64_t) {});
}

Vector Passes::relu_backward(const PlaneBatch& result, const PlaneBatch& result_gradient, const PlaneBatch& gradient,
                             const PlaneBatch& b, const void* offset, int64_t groups, Vector& total) const {
  total.assign(result.channels, 0.0);
  return products_of(gradient, b, offset, groups, kernel_, [&](int64_t n, int64_t c) {
    total[c] += kernel_.relu_backward(result.at(n, c), result.pixels(), result_gradient.at(n, c), gradient.at(n, c));
  });
}

void Passes::relu_backward(const PlaneBatch& result, const PlaneBatch& result_gradient,
                           const PlaneBatch& gradient) const {
  each_plane(result, [&](int64_t n, int64_t c) {
    kernel_.relu_backward(result.at(n, c), result.pixels(), result_gradient.at(n, c), gradient.at(n, c));
  });
}

void Passes::pool(const Unit& unit, const PlaneBatch& x, const PlaneBatch& result) const {
  const int64_t bytes = kernel_.pool_bytes(x.size);
  each_share_of_images(x.images, x.channels, [&](int64_t n, Range some) {
    kernel_.pool(unit, some, x.at(n), result.at(n), thread_workspace.reserve(bytes));
  });
}

void Passes::pool_backward(const Unit& unit, const PlaneBatch& result_gradient, const PlaneBatch& gradient) const {
  const int64_t bytes = kernel_.pool_bytes(gradient.size);
  each_share_of_images(gradient.images, gradient.channels, [&](int64_t n, Range some) {
    kernel_.pool_backward(unit, some, result_gradient.at(n), gradient.at(n), thread_workspace.reserve(bytes));
  });
}

Vector times_transposed(const Vector& a, const Vector& b, int64_t groups, int64_t depth) {
  const auto rows_of = [&](const Vector& matrix) { return static_cast<int64_t>(matrix.size()) / depth / groups; };
  const int64_t rows = rows_of(a), columns = rows_of(b);
  Vector result(groups * rows * columns);
  constexpr int64_t kRows = 32;  // of a task
  const int64_t parts = ceil_div(rows, kRows);
  const TrainingKernel& kernel = isa().training(Dtype::float64);
  each_task(groups * parts, [&](int64_t task) {
    const int64_t group = task / parts, row = group * rows + task % parts * kRows;
    const int64_t count = std::min(kRows, (group + 1) * rows - row);
    kernel.products({a.data() + row * depth, b.data() + group * columns * depth, 0, 0, nullptr, depth, count, columns,
                     1, depth, result.data() + row * columns});
  });
  return result;
}

}  // namespace shufflenet::cpu
