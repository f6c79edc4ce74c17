// Fuzzes the kernels of training: each on planes of a random size, against loops in double. Part of fuzz_kernels.cpp.
#pragma once

// Values of random planes, as the kernels take them and in double.
template <class A>
struct RandomPlanes {
  explicit RandomPlanes(int64_t n) : values(n) {
    for (A& value : values) value = static_cast<A>(uniform(-64, 64)) / 32;
    values.shrink_to_fit();
  }
  double operator[](int64_t i) const { return values[i]; }
  const A* data() const { return values.data(); }
  Array<A> values;
};

template <class A>
Array<A> poisoned(int64_t n) {
  return Array<A>(n, std::numeric_limits<A>::quiet_NaN());
}

template <class A>
class TrainingFuzz {
 public:
  explicit TrainingFuzz(const Isa& isa)
      : isa_(isa), kernel_(isa.training(sizeof(A) == 8 ? Dtype::float64 : Dtype::float32)) {}

  void run() const {
    pointwise();
    depthwise();
    planes();
    products();
    pool();
  }

 private:
  static constexpr double kEpsilon = std::numeric_limits<A>::epsilon();

  void check(double got, double expected, double magnitude, const char* what, int64_t i) const {
    check_value(got, expected, 64 * kEpsilon * (magnitude + 1), what, i, isa_);
  }

  void pointwise() const {
    TrainingPointwise p = {};
    p.groups = uniform(1, 4);
    p.depth = uniform(1, 90);
    p.rows = p.groups * uniform(1, 20);
    p.pixels = uniform(1, 120);
    const RandomPlanes<A> x(p.groups * p.depth * p.pixels), weight(p.rows * p.depth), bias(p.rows);
    RandomPlanes<A> y(p.rows * p.pixels);  // which is the residual as well
    const bool has_residual = uniform(0, 1);
    const std::vector<A> before(y.values.begin(), y.values.end());
    p.conv.weight = weight.data();
    p.conv.bias = bias.data();
    p.activation = uniform(0, 1) ? kRelu : kNoActivation;
    p.x = x.data();
    p.y = y.values.data();
    p.residual = has_residual ? p.y : nullptr;
    p.images = uniform(1, 2000);  // from some on prefetches, which changes no result
    const Buffer workspace(kernel_.pointwise_bytes(p));
    in_shares(p.rows, 1, [&](Range rows) { kernel_.pointwise(p, rows, workspace.get()); });
    for (int64_t row = 0; row < p.rows; ++row) {
      const int64_t group = row / (p.rows / p.groups);
      for (int64_t i = 0; i < p.pixels; ++i) {
        double sum = bias[row] + (has_residual ? before[row * p.pixels + i] : 0), magnitude = std::abs(sum);
        for (int64_t k = 0; k < p.depth; ++k) {
          const double term = weight[row * p.depth + k] * x[(group * p.depth + k) * p.pixels + i];
          sum += term;
          magnitude += std::abs(term);
        }
        check(y[row * p.pixels + i], std::max(sum, p.activation.lower), magnitude, "training pointwise", i);
      }
    }
  }

  void depthwise() const {
    TrainingDepthwise d = {};
    d.stride = uniform(1, 2);
    d.in = {uniform(1, 20), uniform(1, 40)};
    d.out = {(d.in.height - 1) / d.stride + 1, (d.in.width - 1) / d.stride + 1};
    d.shuffle_groups = uniform(1, 4);
    d.channels = d.shuffle_groups * uniform(1, 3);
    const int64_t in = d.in.pixels(), out = d.out.pixels();
    const RandomPlanes<A> y1(d.channels * in), scale(d.channels), shift(d.channels), weight(9 * d.channels);
    const RandomPlanes<A> gradient(d.channels * out), means(d.channels);
    d.norm1 = {scale.data(), shift.data()};
    d.weight = weight.data();
    Array<A> y2 = poisoned<A>(d.channels * out), y1_gradient = poisoned<A>(d.channels * in);
    std::vector<DepthwiseSums> sums(d.channels);
    const Buffer workspace(kernel_.depthwise_bytes(d));
    in_shares(d.channels, 1, [&](Range some) {
      kernel_.depthwise(d, some, y1.data(), y2.data(), workspace.get());
      kernel_.depthwise_backward(
          d, some, gradient.data(), y1.data(), means.data(), y1_gradient.data(), sums.data(), workspace.get());
    });
    for (int64_t c = 0; c < d.channels; ++c) {
      const int64_t source = d.source(c);
      const auto z = [&](int64_t i) { return std::max(0.0, scale[source] * y1[source * in + i] + shift[source]); };
      std::vector<double> expected(in), taps(9);
      for (int64_t row = 0; row < d.out.height; ++row) {
        for (int64_t column = 0; column < d.out.width; ++column) {
          const int64_t at = c * out + row * d.out.width + column;
          double sum = 0;
          for (int64_t tap = 0; tap < 9; ++tap) {
            const int64_t r = row * d.stride + tap / 3 - 1, k = column * d.stride + tap % 3 - 1;
            if (r < 0 || k < 0 || r >= d.in.height || k >= d.in.width) continue;
            const int64_t i = r * d.in.width + k;
            sum += weight[9 * c + tap] * z(i);
            taps[tap] += gradient[at] * z(i);
            expected[i] += weight[9 * c + tap] * gradient[at];
          }
          check(y2[at], sum, 100, "training depthwise", at);
        }
      }
      double total = 0, with_y1 = 0;
      for (int64_t i = 0; i < in; ++i) {
        if (std::abs(scale[source] * y1[source * in + i] + shift[source]) < 1e-6)
          expected[i] = 0;  // at the ReLU's edge
        const double value = z(i) > 1e-6 ? expected[i] : 0;
        check(y1_gradient[source * in + i], value, 40, "gradient of y1", i);
        total += value;
        with_y1 += value * (y1[source * in + i] - means[source]);
      }
      check(sums[c].gradient, total, 40.0 * in, "sum of the gradient of y1", c);
      check(sums[c].gradient_times_y1, with_y1, 160.0 * in, "sum of the gradient times y1", c);
      for (int tap = 0; tap < 9; ++tap) check(sums[c].taps[tap], taps[tap], 12.0 * in, "gradient of a tap", tap);
    }
  }

  // Moments, and the gradients of a ReLU and of a norm.
  void planes() const {
    const int64_t count = uniform(1, 5), pixels = uniform(1, 200);
    const RandomPlanes<A> y(count * pixels), gradient(count * pixels);
    std::vector<double> means(count), squares(count);
    kernel_.moments(y.data(), pixels, count, means.data(), squares.data());
    for (int64_t c = 0; c < count; ++c) {
      double mean = 0, square = 0, total = 0;
      for (int64_t i = 0; i < pixels; ++i) mean += y[c * pixels + i] / static_cast<double>(pixels);
      for (int64_t i = 0; i < pixels; ++i) square += std::pow(y[c * pixels + i] - mean, 2);
      check(means[c], mean, 2, "mean", c);
      check(squares[c], square, 4.0 * pixels, "sum of squares", c);
      Array<A> kept = poisoned<A>(pixels), back(gradient.values.begin(), gradient.values.begin() + pixels);
      const double sum =
          kernel_.relu_backward(y.data() + c * pixels, pixels, gradient.data() + c * pixels, kept.data());
      const TrainingKernel::NormBackward n = {0.5, 0.25, mean, 0.125};
      kernel_.norm_backward(n, y.data() + c * pixels, pixels, back.data());
      for (int64_t i = 0; i < pixels; ++i) {
        const double value = y[c * pixels + i] > 0 ? gradient[c * pixels + i] : 0;
        total += value;
        check(kept[i], value, 0, "gradient of a ReLU", i);
        check(back[i], 0.5 * gradient[i] - 0.25 * (y[c * pixels + i] - mean) - 0.125, 8, "gradient of a norm", i);
      }
      check(sum, total, 2.0 * pixels, "sum of a gradient", c);
    }
  }

  void products() const {
    const int64_t pixels = uniform(1, 300), plane = pixels + uniform(0, 1) * uniform(1, 20);
    const int64_t a_planes = uniform(1, 20), b_planes = uniform(1, 60);
    const RandomPlanes<A> a(a_planes * plane), b(b_planes * plane), offset(b_planes);
    const bool has_offset = uniform(0, 1);
    const int64_t row = kernel_.product_row(b_planes);
    Array<A> transposed = poisoned<A>(pixels * row), tight = poisoned<A>(pixels * b_planes), sums(a_planes * row, A{1});
    Array<double> moved(a_planes * b_planes, 1.0);
    const OffsetPlanes of_b = {b.data(), plane, b_planes, pixels, has_offset ? offset.data() : nullptr};
    kernel_.transpose(of_b, transposed.data(), row);
    kernel_.transpose(of_b, tight.data(), b_planes);
    const auto of_b_at = [&](int64_t j, int64_t k) { return b[j * plane + k] - (has_offset ? offset[j] : 0); };
    for (int64_t k = 0; k < pixels; ++k) {
      for (int64_t j = 0; j < row; ++j) {
        check(transposed[k * row + j], j < b_planes ? of_b_at(j, k) : 0, 0, "transposed plane", j);
        if (j < b_planes) check(tight[k * b_planes + j], of_b_at(j, k), 0, "tightly transposed plane", j);
      }
    }
    kernel_.products({a.data(), plane, a_planes, transposed.data(), b_planes, pixels, sums.data()});
    kernel_.move_sums(sums.data(), a_planes, b_planes, moved.data());
    for (int64_t i = 0; i < a_planes; ++i) {
      for (int64_t j = 0; j < b_planes; ++j) {
        double sum = 2;
        for (int64_t k = 0; k < pixels; ++k) sum += a[i * plane + k] * of_b_at(j, k);
        check(moved[i * b_planes + j], sum, 8.0 * pixels, "product of planes", i);
      }
    }
    for (const A left : sums) check(left, 0, 0, "sum that was moved", 0);
  }

  void pool() const {
    Unit unit;
    unit.stride = 2;
    unit.height = uniform(1, 20);
    unit.width = uniform(1, 40);
    unit.shortcut_relu = uniform(0, 1);
    unit.pool_count_include_pad = uniform(0, 1);
    const int64_t in = unit.height * unit.width, out = unit.out_height() * unit.out_width(), channels = uniform(1, 3);
    const RandomPlanes<A> x(channels * in), gradient(channels * out);
    Array<A> result = poisoned<A>(channels * out), back = poisoned<A>(channels * in);
    const Buffer workspace(kernel_.pool_bytes({unit.height, unit.width}));
    in_shares(channels, 1, [&](Range some) {
      kernel_.pool(unit, some, x.data(), result.data(), workspace.get());
      kernel_.pool_backward(unit, some, gradient.data(), back.data(), workspace.get());
    });
    std::vector<double> expected(channels * in);
    for (int64_t i = 0; i < channels * out; ++i) {
      const int64_t plane = i / out * in, pixel = i % out;
      std::vector<int64_t> window;
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t row = pixel / unit.out_width() * 2 + tap / 3 - 1,
                      column = pixel % unit.out_width() * 2 + tap % 3 - 1;
        if (row < 0 || column < 0 || row >= unit.height || column >= unit.width) continue;
        window.push_back(plane + row * unit.width + column);
      }
      const double count = unit.pool_count_include_pad ? 9 : static_cast<double>(window.size());
      double sum = 0;
      for (const int64_t at : window) {
        sum += x[at];
        expected[at] += gradient[i] / count;
      }
      check(result[i], std::max(sum / count, unit.pool_activation().lower), 4, "training pool", i);
    }
    for (int64_t i = 0; i < channels * in; ++i) check(back[i], expected[i], 8, "gradient of the pool", i);
  }

  const Isa& isa_;
  const TrainingKernel& kernel_;
};

// A stem's kernels, on images of a random dtype.
template <class A>
class StemTrainingFuzz {
 public:
  StemTrainingFuzz(Dtype dtype, const Isa& isa) : dtype_(dtype), isa_(isa), kernel_(isa.stem_training(dtype)) {}

  void run() const {
    StemCase c = random_stem();
    c.stem.relu = true;
    norm_and_pool(c.stem);
    products(c);
  }

 private:
  void check(double got, double expected, double magnitude, const char* what, int64_t i) const {
    check_value(got, expected, 64 * std::numeric_limits<A>::epsilon() * (magnitude + 1), what, i, isa_);
  }

  // Of multiples of a quarter, so that a window often has several largest values, and all sums are exact.
  Array<A> few_values(int64_t n) const {
    Array<A> values(n);
    for (A& value : values) value = static_cast<A>(uniform(-4, 4)) / 4;
    if (uniform(0, 3) == 0) values[uniform(0, n - 1)] = std::numeric_limits<A>::quiet_NaN();
    return values;
  }

  void norm_and_pool(const Stem& s) const {
    const int64_t height = s.conv_height(), width = s.conv_width(), in = height * width;
    const int64_t out_width = s.out_width(), out = s.out_height() * out_width;
    const Array<A> y = few_values(in), gradient = few_values(out);
    const StemNorm norm = {uniform(-4, 4) / 4.0, uniform(-4, 4) / 4.0};
    const double mean = uniform(-4, 4) / 4.0;
    Array<A> result = poisoned<A>(out), back = poisoned<A>(in);
    const Buffer workspace(kernel_.plane_bytes(s)), other(kernel_.plane_bytes(s));
    kernel_.norm_and_pool(s, norm, y.data(), result.data(), workspace.get());
    const StemSums sums =
        kernel_.norm_and_pool_backward(s, norm, mean, gradient.data(), y.data(), back.data(), other.get());
    const auto z = [&](int64_t i) { return relu(norm.scale * y[i] + norm.shift); };
    std::vector<double> expected(in);
    for (int64_t i = 0; i < out; ++i) {
      int64_t winner = s.max_pool ? -1 : i;
      for (int64_t tap = 0; s.max_pool && tap < 9; ++tap) {
        const int64_t row = i / out_width * 2 + tap / 3 - 1, column = i % out_width * 2 + tap % 3 - 1;
        if (row < 0 || column < 0 || row >= height || column >= width) continue;
        const int64_t at = row * width + column;
        if (winner < 0 || z(at) > z(winner) || std::isnan(z(at))) winner = at;
      }
      check(result[i], z(winner), 2, "training stem", i);
      if (!(z(winner) <= 0)) expected[winner] += gradient[i];
    }
    double total = 0, with_y = 0;
    for (int64_t i = 0; i < in; ++i) {
      check(back[i], expected[i], 0, "gradient of the stem's norm", i);
      total += expected[i];
      with_y += expected[i] * (y[i] - mean);
    }
    check(sums.gradient, total, 4.0 * out, "sum of the gradient of the stem's norm", 0);
    check(sums.gradient_times_y, with_y, 8.0 * out, "sum of the gradient of the stem's norm times y", 0);
  }

  void products(const StemCase& c) const {
    const Stem& s = c.stem;
    const int64_t height = s.conv_height(), width = s.conv_width(), pixels = height * width;
    const Array<char> x = image_of(c, dtype_);
    const RandomPlanes<A> y(s.out_channels * pixels), gradient(s.out_channels * pixels);
    std::vector<TrainingKernel::NormBackward> norms;
    for (int64_t i = 0; i < s.out_channels; ++i) {
      norms.push_back({uniform(-4, 4) / 4.0, uniform(-4, 4) / 4.0, uniform(-4, 4) / 4.0, uniform(-4, 4) / 4.0});
    }
    std::vector<double> sums(s.out_channels * s.taps());
    in_shares(height, 1, [&](Range rows) {
      const Buffer workspace(kernel_.products_bytes(s));
      std::vector<double> of_rows(sums.size(), std::numeric_limits<double>::quiet_NaN());
      kernel_.products(s, {x.data(), y.data(), gradient.data(), norms.data(), rows, of_rows.data()}, workspace.get());
      for (size_t i = 0; i < sums.size(); ++i) sums[i] += of_rows[i];
    });
    for (int64_t i = 0; i < static_cast<int64_t>(sums.size()); ++i) {
      const int64_t channel = i / s.taps(), tap = i % s.taps(), k = s.kernel_size;
      const auto& n = norms[channel];
      double sum = 0, terms = 0;
      for (int64_t p = 0; p < pixels; ++p) {
        const int64_t row = p / width * s.stride - s.padding + tap / k % k;
        const int64_t column = p % width * s.stride - s.padding + tap % k;
        if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
        const int64_t at = channel * pixels + p;
        const double of_y = n.scale * gradient[at] - n.slope * (y[at] - n.mean) - n.shift;
        const double term = of_y * c.values[(tap / (k * k) * s.height + row) * s.width + column];
        sum += term;
        terms += std::isnan(term) ? 0 : std::abs(term);
      }
      check(sums[i], sum, terms, "gradient of the stem's weight", i);
    }
  }

  Dtype dtype_;
  const Isa& isa_;
  const StemTrainingKernel& kernel_;
};

static void check_training(const Isa& isa) {
  if (uniform(0, 1)) {
    TrainingFuzz<float>(isa).run();
  } else {
    TrainingFuzz<double>(isa).run();
  }
  const Dtype dtype = static_cast<Dtype>(uniform(0, 3));
  if (dtype == Dtype::float64) {
    StemTrainingFuzz<double>(dtype, isa).run();
  } else {
    StemTrainingFuzz<float>(dtype, isa).run();
  }
}
