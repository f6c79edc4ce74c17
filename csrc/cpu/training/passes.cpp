#include "passes.h"

namespace shufflenet::cpu {
namespace {

constexpr int64_t kTile = 16;  // planes that a kernel works on at once, at most

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

// Calls run(image, channels) for a few planes of a batch at a time.
template <class Run>
void each_tile(const PlaneBatch& batch, const Run& run) {
  const int64_t of_image = ceil_div(batch.channels, kTile);
  each_task(batch.images * of_image, [&](int64_t task) {
    const int64_t first = task % of_image * kTile;
    run(task / of_image, Range{first, std::min(batch.channels, first + kTile)});
  });
}

// Some channels' pixels of an image of a batch, which must outlive it, as kernels take them, in planes: as they lie,
// or, of channels_last, as a copy in memory that a thread keeps.
class ImagePlanes {
 public:
  ImagePlanes(const PlaneBatch& batch, Range channels, Range pixels)
      : batch_(batch), channels_(channels), pixels_(pixels) {}
  static ImagePlanes of_image(const PlaneBatch& batch) { return {batch, {0, batch.channels}, {0, batch.pixels()}}; }

  int64_t bytes() const {
    const int64_t copied = batch_.has_planes() ? 0 : channels_.count() * pixels_.count() * batch_.element;
    return ceil_div(copied, kMemoryAlignment) * kMemoryAlignment;
  }
  int64_t plane() const { return batch_.has_planes() ? batch_.pixels() : pixels_.count(); }  // elements between two
  char* at(int64_t n, char* memory) const { return batch_.has_planes() ? in_batch(n) : memory; }
  char* read(int64_t n, const TrainingKernel& kernel, char* memory) const {
    if (!batch_.has_planes()) {
      const MatrixRows from = {in_batch(n), pixels_.count(), channels_.count(), batch_.all_channels};
      kernel.transpose(from, memory, pixels_.count());
    }
    return at(n, memory);
  }
  void write(int64_t n, const TrainingKernel& kernel, const char* memory) const {
    if (batch_.has_planes()) return;
    kernel.transpose({memory, channels_.count(), pixels_.count(), pixels_.count()}, in_batch(n), batch_.all_channels);
  }

 private:
  char* in_batch(int64_t n) const { return batch_.at(n, channels_.begin, pixels_.begin); }
  const PlaneBatch& batch_;
  Range channels_, pixels_;
};

// Pixels of a plane that are interleaved at once, at most: long rows are read faster than many short ones.
constexpr int64_t kInterleavedPixels = 1024;
// Pixels whose products are added up in the accumulator type, about, before they are added to sums in double.
constexpr int64_t kPixelsOfSums = 1024;

// Products of a's planes, which are cut into tiles, with b's planes of the same group.
struct GroupedProducts {
  int64_t rows() const { return a.channels / groups; }
  int64_t columns() const { return b.channels / groups; }
  int64_t tiles_of_group() const { return ceil_div(rows(), kTile); }
  int64_t tiles() const { return groups * tiles_of_group(); }
  int64_t group(int64_t tile) const { return tile / tiles_of_group(); }
  Range planes(int64_t tile) const {
    const int64_t group = this->group(tile), first = group * rows() + (tile - group * tiles_of_group()) * kTile;
    return {first, std::min(first + kTile, (group + 1) * rows())};
  }
  OffsetPlanes of_b(int64_t image, int64_t group, Range pixels) const {
    const int64_t column = group * columns();
    return {b.at(image, column, pixels.begin), b.pixels(), columns(), pixels.count(),
            offset ? offset->from(column) : nullptr};
  }

  PlaneBatch a, b;
  const Numbers* offset;  // of b's planes; null: none
  int64_t groups;
  bool is_gram = false;  // of b's planes with themselves
};

// Adds up some tiles' products, [a's channels][columns], on one thread. Image by image and block of pixels by block it
// goes through the tiles while b's interleaved planes stay in the cache. make(image, planes, pixels, memory) returns a
// part of a's planes, and how many elements lie between them; it has so many bytes of memory.
template <class Make>
void add_products(const GroupedProducts& p, Range tiles, const TrainingKernel& kernel, int64_t bytes_of_make,
                  const Make& make, double* products) {
  const int64_t pixels = p.a.pixels(), of_block = std::min(kInterleavedPixels, pixels), columns = p.columns();
  const int64_t sum_bytes = p.a.element == sizeof(double) ? sizeof(double) : sizeof(float);
  const int64_t row_size = kernel.product_row(columns), row_bytes = row_size * sum_bytes;
  const int64_t interleaved_bytes = ceil_div(of_block * row_bytes, kMemoryAlignment) * kMemoryAlignment;
  char* const own = thread_workspace.reserve(bytes_of_make + interleaved_bytes + tiles.count() * kTile * row_bytes);
  char* const interleaved = own + bytes_of_make;
  char* const sums = interleaved + interleaved_bytes;
  const auto sums_of = [&](int64_t tile) { return sums + (tile - tiles.begin) * kTile * row_bytes; };
  std::memset(sums, 0, tiles.count() * kTile * row_bytes);
  int64_t in_sums = 0;  // pixels
  for (int64_t n = 0; n < p.a.images; ++n) {
    for (Range block = {0, of_block}; block.begin < pixels;
         block = {block.end, std::min(pixels, block.end + of_block)}) {
      for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
        const Range planes = p.planes(tile);
        if (tile == tiles.begin || p.group(tile) != p.group(tile - 1)) {
          kernel.interleave(p.of_b(n, p.group(tile), block), interleaved, row_size);
        }
        const auto [a, a_plane] = make(n, planes, block, own);
        const void* const a_offset = p.is_gram && p.offset ? p.offset->from(planes.begin) : nullptr;
        kernel.products({a, a_plane, planes.count(), interleaved, columns, block.count(), a_offset, sums_of(tile)});
      }
      in_sums += block.count();
      if (in_sums < kPixelsOfSums && (n + 1 < p.a.images || block.end < pixels)) continue;
      for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
        const Range planes = p.planes(tile);
        kernel.move_sums(sums_of(tile), planes.count(), columns, products + planes.begin * columns);
      }
      in_sums = 0;
    }
  }
}

template <class Make>
Vector products_of(const GroupedProducts& p, const TrainingKernel& kernel, int64_t bytes_of_make, const Make& make) {
  Vector products(p.a.channels * p.columns());
  torch::stable::parallel_for(0, p.tiles(), 1, [&](int64_t begin, int64_t end) {
    add_products(p, {begin, end}, kernel, bytes_of_make, make, products.data());
  });
  return products;
}

// What a tile of planes and a block of pixels take at most.
int64_t bytes_of_tile(const PlaneBatch& batch) {
  return ImagePlanes(batch, {0, kTile}, {0, std::min(kInterleavedPixels, batch.pixels())}).bytes();
}

// The max pool of a plane of the batch, as the stem's kernels take it.
Stem pool_of(const PlaneBatch& batch) {
  Stem pool;
  pool.in_channels = pool.out_channels = 1;
  pool.height = batch.size.height;
  pool.width = batch.size.width;
  pool.max_pool = true;
  return pool;
}

}  // namespace

void Passes::pointwise(const std::vector<PointwiseTerm>& terms, const Numbers* bias, const PlaneBatch* residual,
                       const PlaneBatch& y, int64_t groups, Activation activation, Moments* moments) const {
  const Vector zeros(y.channels);  // of either dtype
  std::array<PointwiseInput, kMostInputs> inputs = {};
  for (size_t i = 0; i < terms.size(); ++i) {
    inputs[i].weight = terms[i].weights.data();
    inputs[i].bias = bias && i == 0 ? bias->data() : zeros.data();
    inputs[i].depth = terms[i].x.channels / groups;
  }
  TrainingPointwise p = {};
  p.inputs = inputs.data();
  p.input_count = static_cast<int64_t>(terms.size());
  p.activation = activation;
  p.rows = y.channels;
  p.groups = groups;
  p.pixels = y.pixels();
  p.images = y.images;
  const ImagePlanes result = ImagePlanes::of_image(y);
  int64_t bytes_of_inputs = 0;
  for (const PointwiseTerm& term : terms) bytes_of_inputs += ImagePlanes::of_image(term.x).bytes();
  const int64_t bytes_of_residual = residual ? ImagePlanes::of_image(*residual).bytes() : 0;
  const int64_t bytes = bytes_of_inputs + bytes_of_residual + result.bytes() + kernel_.pointwise_bytes(p);
  each_share_of_images(y.images, y.channels, [&](int64_t n, Range some) {
    char* memory = thread_workspace.reserve(bytes);
    const auto read = [&](const PlaneBatch& batch) {
      const ImagePlanes planes = ImagePlanes::of_image(batch);
      char* const own = memory;
      memory += planes.bytes();
      return planes.read(n, kernel_, own);
    };
    auto of_image = inputs;
    for (size_t i = 0; i < terms.size(); ++i) of_image[i].x = read(terms[i].x);
    TrainingPointwise own = p;
    own.inputs = of_image.data();
    // The residual, which may be y itself, is read in the share's rows alone: others are being written.
    const Range all = {0, y.pixels()};
    const int64_t first_row = some.begin * y.pixels() * y.element;
    if (residual) {
      ImagePlanes(*residual, some, all).read(n, kernel_, memory + first_row);
      own.residual = ImagePlanes::of_image(*residual).at(n, memory);
      memory += bytes_of_residual;
    }
    own.y = result.at(n, memory);
    kernel_.pointwise(own, some, memory + result.bytes());
    if (!y.has_planes()) ImagePlanes(y, some, all).write(n, kernel_, memory + first_row);
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
  const Stem pool = pool_of(y);
  const int64_t bytes = max_pool ? of_stems_.plane_bytes(pool) : 0;
  each_plane(y, [&](int64_t n, int64_t c) {
    const PlaneNorm of_plane = {norm.scale[c], norm.shift(c), norm.mean[c]};
    if (!max_pool) return kernel_.norm_and_relu(of_plane, y.at(n, c), y.pixels(), result.at(n, c));
    of_stems_.norm_and_pool(pool, of_plane, y.at(n, c), result.at(n, c), thread_workspace.reserve(bytes));
  });
}

NormSums Passes::norm_and_relu_backward(const Affine& norm, const PlaneBatch& y, const PlaneBatch& result_gradient,
                                        const PlaneBatch& gradient, bool max_pool) const {
  const Stem pool = pool_of(y);
  const int64_t bytes = max_pool ? of_stems_.plane_bytes(pool) : 0;
  std::vector<PlaneSums> of_planes(y.images * y.channels);
  each_plane(y, [&](int64_t n, int64_t c) {
    const PlaneNorm of_plane = {norm.scale[c], norm.shift(c), norm.mean[c]};
    const void* const given = result_gradient.at(n, c);
    PlaneSums& sums = of_planes[n * y.channels + c];
    if (!max_pool) {
      sums = kernel_.norm_and_relu_backward(of_plane, given, y.at(n, c), y.pixels(), gradient.at(n, c));
    } else {
      sums = of_stems_.norm_and_pool_backward(
          pool, of_plane, given, y.at(n, c), gradient.at(n, c), thread_workspace.reserve(bytes));
    }
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

Vector Passes::products(const PlaneBatch& a, const PlaneBatch& b, int64_t groups) const {
  const auto read = [&](int64_t n, Range planes, Range pixels, char* memory) {
    const ImagePlanes part(a, planes, pixels);
    return std::pair<const char*, int64_t>(part.read(n, kernel_, memory), part.plane());
  };
  return products_of({a, b, nullptr, groups}, kernel_, bytes_of_tile(a), read);
}

Vector Passes::gram_matrix(const PlaneBatch& v, const Numbers& centre, int64_t groups) const {
  const auto as_it_lies = [&](int64_t n, Range planes, Range pixels, char*) {
    return std::pair<const char*, int64_t>(v.at(n, planes.begin, pixels.begin), v.pixels());
  };
  return products_of({v, v, &centre, groups, true}, kernel_, 0, as_it_lies);
}

Vector Passes::relu_backward(const PlaneBatch& result, const PlaneBatch& result_gradient, const PlaneBatch& gradient,
                             const PlaneBatch& b, const Numbers& offset, int64_t groups, Vector& total) const {
  total.assign(result.channels, 0.0);
  const int64_t bytes_of_result = bytes_of_tile(result);
  const auto make = [&](int64_t n, Range planes, Range pixels, char* memory) {
    const ImagePlanes of_result(result, planes, pixels), of_gradient(result_gradient, planes, pixels);
    const char* y = of_result.read(n, kernel_, memory);
    const char* given = of_gradient.read(n, kernel_, memory + bytes_of_result);
    for (int64_t c = planes.begin; c < planes.end; ++c) {
      total[c] += kernel_.relu_backward(y, pixels.count(), given, gradient.at(n, c, pixels.begin));
      y += of_result.plane() * result.element;
      given += of_gradient.plane() * result.element;
    }
    return std::pair<const char*, int64_t>(gradient.at(n, planes.begin, pixels.begin), gradient.pixels());
  };
  const int64_t bytes = bytes_of_result + bytes_of_tile(result_gradient);
  return products_of({gradient, b, &offset, groups}, kernel_, bytes, make);
}

void Passes::relu_backward(const PlaneBatch& result, const PlaneBatch& result_gradient,
                           const PlaneBatch& gradient) const {
  each_tile(result, [&](int64_t n, Range channels) {
    const ImagePlanes of_result(result, channels, {0, result.pixels()});
    const ImagePlanes of_gradient(result_gradient, channels, {0, result.pixels()});
    char* const memory = thread_workspace.reserve(of_result.bytes() + of_gradient.bytes());
    const char* const y = of_result.read(n, kernel_, memory);
    const char* const given = of_gradient.read(n, kernel_, memory + of_result.bytes());
    kernel_.relu_backward(y, channels.count() * result.pixels(), given, gradient.at(n, channels.begin));
  });
}

void Passes::pool(const Unit& unit, const PlaneBatch& x, const PlaneBatch& result) const {
  const int64_t bytes = kernel_.pool_bytes(x.size);
  each_tile(x, [&](int64_t n, Range channels) {
    const ImagePlanes of_x(x, channels, {0, x.pixels()}), of_result(result, channels, {0, result.pixels()});
    char* const memory = thread_workspace.reserve(of_x.bytes() + of_result.bytes() + bytes);
    char* const written = of_result.at(n, memory + of_x.bytes());
    const char* const planes = of_x.read(n, kernel_, memory);
    kernel_.pool(unit, channels.count(), planes, written, memory + of_x.bytes() + of_result.bytes());
    of_result.write(n, kernel_, written);
  });
}

void Passes::pool_backward(const Unit& unit, const PlaneBatch& result_gradient, const PlaneBatch& gradient) const {
  const int64_t bytes = kernel_.pool_bytes(gradient.size);
  each_tile(gradient, [&](int64_t n, Range channels) {
    const ImagePlanes given(result_gradient, channels, {0, result_gradient.pixels()});
    const ImagePlanes found(gradient, channels, {0, gradient.pixels()});
    char* const memory = thread_workspace.reserve(given.bytes() + found.bytes() + bytes);
    char* const written = found.at(n, memory + given.bytes());
    const char* const planes = given.read(n, kernel_, memory);
    kernel_.pool_backward(unit, channels.count(), planes, written, memory + given.bytes() + found.bytes());
    found.write(n, kernel_, written);
  });
}

}  // namespace shufflenet::cpu
