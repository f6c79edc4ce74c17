// Fuzzes the kernels of training: each on planes of a random size, against loops in double. Part of fuzz_kernels.cpp.
#pragma once

// Random numbers of an accumulator type, which every dtype represents exactly.
template <class A>
struct RandomNumbers {
  explicit RandomNumbers(int64_t n) : values(n) {
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

// Planes of a dtype: random ones of such numbers, or NaN.
class StoredPlanes {
 public:
  static StoredPlanes random(Dtype dtype, int64_t n) {
    StoredPlanes planes(dtype);
    for (int64_t i = 0; i < n; ++i) put(dtype, static_cast<double>(uniform(-64, 64)) / 32, planes.bytes_);
    planes.bytes_.shrink_to_fit();
    return planes;
  }
  static StoredPlanes poisoned(Dtype dtype, int64_t n) {
    StoredPlanes planes(dtype);
    planes.bytes_ = Array<char>(n * size_of(dtype), '\xff');
    return planes;
  }

  double operator[](int64_t i) const { return get(dtype_, bytes_.data(), i); }
  const void* data(int64_t i = 0) const { return bytes_.data() + i * size_of(dtype_); }
  void* data(int64_t i = 0) { return bytes_.data() + i * size_of(dtype_); }

 private:
  explicit StoredPlanes(Dtype dtype) : dtype_(dtype) {}
  Dtype dtype_;
  Array<char> bytes_;
};

// The kernels of planes of a dtype, whose accumulator type is A.
template <class A>
class TrainingFuzz {
 public:
  TrainingFuzz(Dtype dtype, const Isa& isa) : dtype_(dtype), isa_(isa), kernel_(isa.training(dtype)) {}

  void run() const {
    pointwise();
    depthwise();
    planes();
    transpose();
    products();
    pool();
  }

 private:
  StoredPlanes random(int64_t n) const { return StoredPlanes::random(dtype_, n); }
  StoredPlanes poison(int64_t n) const { return StoredPlanes::poisoned(dtype_, n); }

  // A sum in the accumulator type.
  void check(double got, double expected, double magnitude, const char* what, int64_t i) const {
    check_value(got, expected, 64 * std::numeric_limits<A>::epsilon() * (magnitude + 1), what, i, isa_);
  }
  // What was rounded to the planes' dtype as well.
  void check_stored(double got, double expected, double magnitude, const char* what, int64_t i) const {
    const double tolerance = 64 * std::numeric_limits<A>::epsilon() * (magnitude + 1);
    check_value(got, expected, tolerance + epsilon(dtype_) * std::abs(expected), what, i, isa_);
  }

  // Weights in the form in which the kernel takes them.
  Array<char> in_form(const RandomNumbers<A>& weight, int64_t depth) const {
    Array<char> bytes;
    const bool pairs = kernel_.multiplies_pairs();
    const Dtype dtype = pairs ? Dtype::bfloat16 : sizeof(A) == 8 ? Dtype::float64 : Dtype::float32;
    for (size_t i = 0; i < weight.values.size(); ++i) {
      put(dtype, weight.values[i], bytes);
      if (pairs && depth % 2 != 0 && (static_cast<int64_t>(i) + 1) % depth == 0) put(dtype, 0, bytes);
    }
    bytes.shrink_to_fit();
    return bytes;
  }

  void pointwise() const {
    TrainingPointwise p = {};
    p.groups = uniform(1, 4);
    p.rows = p.groups * uniform(1, 20);
    p.pixels = uniform(0, 9) ? uniform(1, 120) : uniform(1, 3000);
    p.input_count = uniform(1, kMostInputs);
    p.activation = p.input_count == 1 && uniform(0, 1) ? kRelu : kNoActivation;
    p.images = uniform(1, 2000);  // from some on prefetches, which changes no result
    const bool has_residual = uniform(0, 1);
    StoredPlanes y = random(p.rows * p.pixels);  // which is the residual as well
    std::vector<double> expected(p.rows * p.pixels), magnitude(expected.size());
    for (size_t i = 0; i < expected.size(); ++i) {
      if (has_residual) expected[i] = y[static_cast<int64_t>(i)];
    }
    std::vector<StoredPlanes> x;
    std::vector<Array<char>> weights;
    std::vector<RandomNumbers<A>> biases;
    std::vector<PointwiseInput> inputs;
    for (int64_t i = 0; i < p.input_count; ++i) {
      const int64_t depth = uniform(1, 90);
      x.push_back(random(p.groups * depth * p.pixels));
      const RandomNumbers<A> weight(p.rows * depth);
      weights.push_back(in_form(weight, depth));
      biases.emplace_back(p.rows);
      inputs.push_back({nullptr, nullptr, nullptr, depth});
      for (int64_t row = 0; row < p.rows; ++row) {
        const int64_t group = row / (p.rows / p.groups);
        for (int64_t pixel = 0; pixel < p.pixels; ++pixel) {
          double& sum = expected[row * p.pixels + pixel];
          sum += biases.back()[row];
          for (int64_t k = 0; k < depth; ++k) {
            const double term = weight[row * depth + k] * x.back()[(group * depth + k) * p.pixels + pixel];
            sum += term;
            magnitude[row * p.pixels + pixel] += std::abs(term);
          }
        }
      }
    }
    for (int64_t i = 0; i < p.input_count; ++i) {
      inputs[i].x = x[i].data();
      inputs[i].weight = weights[i].data();
      inputs[i].bias = biases[i].data();
    }
    p.inputs = inputs.data();
    p.y = y.data();
    p.residual = has_residual ? p.y : nullptr;
    const Buffer workspace(kernel_.pointwise_bytes(p));
    in_shares(p.rows, 1, [&](Range rows) { kernel_.pointwise(p, rows, workspace.get()); });
    for (int64_t i = 0; i < p.rows * p.pixels; ++i) {
      check_stored(y[i], std::max(expected[i], p.activation.lower), magnitude[i], "training pointwise", i);
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
    const RandomNumbers<A> scale(d.channels), shift(d.channels), weight(9 * d.channels), means(d.channels);
    const StoredPlanes y1 = random(d.channels * in), gradient = random(d.channels * out);
    d.norm1 = {scale.data(), shift.data()};
    d.weight = weight.data();
    StoredPlanes y2 = poison(d.channels * out), y1_gradient = poison(d.channels * in);
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
          check_stored(y2[at], sum, 100, "training depthwise", at);
        }
      }
      double total = 0, with_y1 = 0;
      for (int64_t i = 0; i < in; ++i) {
        if (std::abs(scale[source] * y1[source * in + i] + shift[source]) < 1e-6)
          expected[i] = 0;  // at the ReLU's edge
        const double value = z(i) > 1e-6 ? expected[i] : 0;
        check_stored(y1_gradient[source * in + i], value, 40, "gradient of y1", i);
        total += value;
        with_y1 += value * (y1[source * in + i] - means[source]);
      }
      check(sums[c].gradient, total, 40.0 * in, "sum of the gradient of y1", c);
      check(sums[c].gradient_times_y1, with_y1, 160.0 * in, "sum of the gradient times y1", c);
      for (int tap = 0; tap < 9; ++tap) check(sums[c].taps[tap], taps[tap], 12.0 * in, "gradient of a tap", tap);
    }
  }

  // Moments, a norm and its ReLU, and the gradients of these.
  void planes() const {
    const int64_t count = uniform(1, 5), pixels = uniform(1, 200);
    const StoredPlanes y = random(count * pixels), gradient = random(count * pixels);
    std::vector<double> means(count), squares(count);
    kernel_.moments(y.data(), pixels, count, means.data(), squares.data());
    for (int64_t c = 0; c < count; ++c) {
      double mean = 0, square = 0, total = 0;
      for (int64_t i = 0; i < pixels; ++i) mean += y[c * pixels + i] / static_cast<double>(pixels);
      for (int64_t i = 0; i < pixels; ++i) square += std::pow(y[c * pixels + i] - mean, 2);
      check(means[c], mean, 2, "mean", c);
      check(squares[c], square, 4.0 * pixels, "sum of squares", c);
      const int64_t first = c * pixels;
      StoredPlanes kept = poison(pixels), back = poison(pixels), applied = poison(pixels), passed = poison(pixels);
      std::memcpy(back.data(), gradient.data(first), pixels * size_of(dtype_));
      const double sum = kernel_.relu_backward(y.data(first), pixels, gradient.data(first), kept.data());
      const TrainingKernel::NormBackward n = {0.5, 0.25, mean, 0.125};
      kernel_.norm_backward(n, y.data(first), pixels, back.data());
      const PlaneNorm norm = {0.5, 0.140625, mean};  // no number's result is 0
      kernel_.norm_and_relu(norm, y.data(first), pixels, applied.data());
      const PlaneSums sums =
          kernel_.norm_and_relu_backward(norm, gradient.data(first), y.data(first), pixels, passed.data());
      double of_norm = 0, with_y = 0;
      for (int64_t i = 0; i < pixels; ++i) {
        const double value = y[first + i], given = gradient[first + i], normed = norm.scale * value + norm.shift;
        total += value > 0 ? given : 0;
        check(kept[i], value > 0 ? given : 0, 0, "gradient of a ReLU", i);
        check_stored(back[i], 0.5 * given - 0.25 * (value - mean) - 0.125, 8, "gradient of a norm", i);
        check_stored(applied[i], relu(normed), 4, "norm and ReLU", i);
        check(passed[i], normed > 0 ? given : 0, 0, "gradient of a norm's result", i);
        of_norm += normed > 0 ? given : 0;
        with_y += normed > 0 ? given * (value - mean) : 0;
      }
      check(sum, total, 2.0 * pixels, "sum of a gradient", c);
      check(sums.gradient, of_norm, 2.0 * pixels, "sum of the gradient of a norm's results", c);
      check(sums.gradient_times_y, with_y, 8.0 * pixels, "sum of the gradient of a norm's results times y", c);
    }
  }

  void transpose() const {
    const int64_t rows = uniform(1, 70), columns = uniform(1, 70);
    const int64_t row = columns + uniform(0, 1) * uniform(1, 20), to_row = rows + uniform(0, 1) * uniform(1, 20);
    const StoredPlanes from = random((rows - 1) * row + columns);
    StoredPlanes to = poison((columns - 1) * to_row + rows);
    kernel_.transpose({from.data(), rows, columns, row}, to.data(), to_row);
    for (int64_t column = 0; column < columns; ++column) {
      for (int64_t i = 0; i < rows; ++i) check(to[column * to_row + i], from[i * row + column], 0, "transposed", i);
      if (column == columns - 1) break;
      for (int64_t i = rows; i < to_row; ++i) {
        check_value(to[column * to_row + i], std::numeric_limits<double>::quiet_NaN(), 0, "behind a row", i, isa_);
      }
    }
  }

  void products() const {
    const int64_t pixels = uniform(1, 300), plane = pixels + uniform(0, 1) * uniform(1, 20);
    const int64_t a_planes = uniform(1, 20), b_planes = uniform(1, 60);
    // Planes end where their pixels do.
    const StoredPlanes a = random((a_planes - 1) * plane + pixels), b = random((b_planes - 1) * plane + pixels);
    const RandomNumbers<A> offset(b_planes);
    const bool has_offset = uniform(0, 1);
    const int64_t row = kernel_.product_row(b_planes);
    Array<A> interleaved = poisoned<A>(pixels * row), sums(a_planes * row, A{1});
    Array<double> moved(a_planes * b_planes, 1.0);
    const OffsetPlanes of_b = {b.data(), plane, b_planes, pixels, has_offset ? offset.data() : nullptr};
    kernel_.interleave(of_b, interleaved.data(), row);
    const auto of_b_at = [&](int64_t j, int64_t k) { return b[j * plane + k] - (has_offset ? offset[j] : 0); };
    for (int64_t k = 0; k < pixels && !kernel_.multiplies_pairs(); ++k) {
      for (int64_t j = 0; j < row; ++j) {
        check(interleaved[k * row + j], j < b_planes ? of_b_at(j, k) : 0, 0, "interleaved plane", j);
      }
    }
    const RandomNumbers<A> a_offset(a_planes);
    const bool has_a_offset = kernel_.multiplies_pairs() && uniform(0, 1);
    const void* const of_a = has_a_offset ? a_offset.data() : nullptr;
    kernel_.products({a.data(), plane, a_planes, interleaved.data(), b_planes, pixels, of_a, sums.data()});
    kernel_.move_sums(sums.data(), a_planes, b_planes, moved.data());
    for (int64_t i = 0; i < a_planes; ++i) {
      for (int64_t j = 0; j < b_planes; ++j) {
        double sum = 2;
        for (int64_t k = 0; k < pixels; ++k)
          sum += (a[i * plane + k] - (has_a_offset ? a_offset[i] : 0)) * of_b_at(j, k);
        check(moved[i * b_planes + j], sum, 16.0 * pixels, "product of planes", i);
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
    const StoredPlanes x = random(channels * in), gradient = random(channels * out);
    StoredPlanes result = poison(channels * out), back = poison(channels * in);
    const Buffer workspace(kernel_.pool_bytes({unit.height, unit.width}));
    in_shares(channels, 1, [&](Range some) {
      kernel_.pool(unit, some.count(), x.data(some.begin * in), result.data(some.begin * out), workspace.get());
      kernel_.pool_backward(
          unit, some.count(), gradient.data(some.begin * out), back.data(some.begin * in), workspace.get());
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
      check_stored(result[i], std::max(sum / count, unit.pool_activation().lower), 4, "training pool", i);
    }
    for (int64_t i = 0; i < channels * in; ++i) check_stored(back[i], expected[i], 8, "gradient of the pool", i);
  }

  Dtype dtype_;
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
    if (c.stem.max_pool) norm_and_pool(c.stem);
    products(c);
  }

 private:
  void check(double got, double expected, double magnitude, const char* what, int64_t i) const {
    check_value(got, expected, 64 * std::numeric_limits<A>::epsilon() * (magnitude + 1), what, i, isa_);
  }

  // They are multiples of a quarter, so that a window often has several largest values, and all sums are exact.
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
    const PlaneNorm norm = {uniform(-4, 4) / 4.0, uniform(-4, 4) / 4.0, uniform(-4, 4) / 4.0};
    Array<A> result = poisoned<A>(out), back = poisoned<A>(in);
    const Buffer workspace(kernel_.plane_bytes(s)), other(kernel_.plane_bytes(s));
    kernel_.norm_and_pool(s, norm, y.data(), result.data(), workspace.get());
    const PlaneSums sums = kernel_.norm_and_pool_backward(s, norm, gradient.data(), y.data(), back.data(), other.get());
    const auto z = [&](int64_t i) { return relu(norm.scale * y[i] + norm.shift); };
    std::vector<double> expected(in);
    for (int64_t i = 0; i < out; ++i) {
      int64_t winner = -1;
      for (int64_t tap = 0; tap < 9; ++tap) {
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
      with_y += expected[i] * (y[i] - norm.mean);
    }
    check(sums.gradient, total, 4.0 * out, "sum of the gradient of the stem's norm", 0);
    check(sums.gradient_times_y, with_y, 8.0 * out, "sum of the gradient of the stem's norm times y", 0);
  }

  void products(const StemCase& c) const {
    const Stem& s = c.stem;
    const int64_t height = s.conv_height(), width = s.conv_width(), pixels = height * width;
    const Array<char> x = image_of(c, dtype_);
    const RandomNumbers<A> y(s.out_channels * pixels), gradient(s.out_channels * pixels);
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
  const Dtype dtype = static_cast<Dtype>(uniform(0, 3));
  if (dtype == Dtype::float64) {
    TrainingFuzz<double>(dtype, isa).run();
    StemTrainingFuzz<double>(dtype, isa).run();
  } else {
    TrainingFuzz<float>(dtype, isa).run();
    StemTrainingFuzz<float>(dtype, isa).run();
  }
}
