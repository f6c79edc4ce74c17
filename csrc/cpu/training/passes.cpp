#include "passes.h"

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

// Pixels of a plane that are transposed at once, at most: long rows are read faster than many short ones.
constexpr int64_t kTransposedPixels = 1024;
// Pixels whose products are added up in the planes' dtype, about, before they are added to sums in double.
constexpr int64_t kPixelsOfSums = 1024;

// Adds up products of planes, a group at a time. A thread has some tiles of planes of a, of which prepare(image, plane,
// pixels) may make each before it is read; block of pixels by block, it goes through them while those of b stay in the
// cache.
template <class Prepare>
Vector products_of(const PlaneBatch& a, const PlaneBatch& b, const void* offset, int64_t groups,
                   const TrainingKernel& kernel, const Prepare& prepare) {
  const int64_t rows = a.channels / groups, columns = b.channels / groups, tiles = ceil_div(rows, kTile);
  const int64_t row_size = kernel.product_row(columns);
  const int64_t of_block = std::min(kTransposedPixels, a.pixels());
  const int64_t transposed_bytes = ceil_div(of_block * row_size * a.element, kMemoryAlignment) * kMemoryAlignment;
  Vector products(a.channels * columns);
  torch::stable::parallel_for(0, groups * tiles, 1, [&](int64_t begin, int64_t end) {
    const auto first_plane = [&](int64_t tile) { return tile / tiles * rows + tile % tiles * kTile; };
    const auto count = [&](int64_t tile) { return std::min(kTile, rows - tile % tiles * kTile); };
    const auto sums_size = (end - begin) * kTile * row_size * a.element;
    char* const transposed = thread_workspace.reserve(transposed_bytes + sums_size);
    char* const sums = transposed + transposed_bytes;
    const auto sums_of = [&](int64_t tile) { return sums + (tile - begin) * kTile * row_size * a.element; };
    std::memset(sums, 0, sums_size);
    int64_t pixels = 0;  // whose products are in the sums
    for (int64_t n = 0; n < a.images; ++n) {
      for (int64_t pixel = 0; pixel < a.pixels(); pixel += of_block) {
        const Range block = {pixel, std::min(a.pixels(), pixel + of_block)};
        const int64_t skipped = pixel * a.element;
        for (int64_t tile = begin; tile < end; ++tile) {
          if (tile == begin || tile % tiles == 0) {
            const int64_t column = tile / tiles * columns;
            kernel.transpose({b.at(n, column) + skipped, b.pixels(), columns, block.count(),
                              offset ? static_cast<const char*>(offset) + column * b.element : nullptr},
                             transposed, row_size);
          }
          for (int64_t i = 0; i < count(tile); ++i) prepare(n, first_plane(tile) + i, block);
          kernel.products({a.at(n, first_plane(tile)) + skipped, a.pixels(), count(tile), transposed, columns,
                           block.count(), sums_of(tile)});
        }
        pixels += block.count();
        if (pixels < kPixelsOfSums && (n + 1 < a.images || block.end < a.pixels())) continue;
        for (int64_t tile = begin; tile < end; ++tile) {
          kernel.move_sums(sums_of(tile), count(tile), columns, products.data() + first_plane(tile) * columns);
        }
        pixels = 0;
      }
    }
  });
  return products;
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
  return products_of(a, b, offset, groups, kernel_, [](int64_t, int64_t, Range) {});
}

Vector Passes::relu_backward(const PlaneBatch& result, const PlaneBatch& result_gradient, const PlaneBatch& gradient,
                             const PlaneBatch& b, const void* offset, int64_t groups, Vector& total) const {
  total.assign(result.channels, 0.0);
  return products_of(gradient, b, offset, groups, kernel_, [&](int64_t n, int64_t c, Range pixels) {
    const int64_t skipped = pixels.begin * gradient.element;
    total[c] += kernel_.relu_backward(result.at(n, c) + skipped, pixels.count(), result_gradient.at(n, c) + skipped,
                                      gradient.at(n, c) + skipped);
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

}  // namespace shufflenet::cpu
