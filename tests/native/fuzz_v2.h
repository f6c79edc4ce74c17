// The part of fuzz_kernels.cpp that is of ShuffleNet v2: units whose channels are in any planes, in place with stride
// 1, units on pairs, and the last convolution. Included by that file alone, behind what it has of v1.
#pragma once

// Channels with, of each value, the sum of its terms' absolute values, which rounding of sums goes with.
struct Channels {
  int64_t channels, height, width;
  std::vector<double> value, size;

  int64_t pixels() const { return height * width; }
  double at(int64_t c, int64_t p) const { return value[c * pixels() + p]; }
};

static Channels some_channels(const Channels& x, int64_t first, int64_t n) {
  const auto cut = [&](const std::vector<double>& all) {
    return std::vector<double>(all.begin() + first * x.pixels(), all.begin() + (first + n) * x.pixels());
  };
  return {n, x.height, x.width, cut(x.value), cut(x.size)};
}

// A convolution of all channels, 1x1, or of each apart, 3x3 with padding 1; `rounding` is added to the sizes for each
// term: how much more than its own is lost where what is read was rounded before.
static Channels convolved(const Channels& x, const Weights& w, int64_t rows, int64_t stride, bool depthwise,
                          bool has_relu, double rounding) {
  Channels y = {rows, (x.height - 1) / stride + 1, (x.width - 1) / stride + 1, {}, {}};
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t p = 0; p < y.pixels(); ++p) {
      double sum = 0, size = 0;
      const auto add = [&](double weight, int64_t i) {
        sum += weight * x.value[i];
        size += std::abs(weight) * (x.size[i] + rounding * std::abs(x.value[i]));
      };
      for (int64_t k = 0; !depthwise && k < x.channels; ++k) {
        add(w.weight[row * x.channels + k], k * x.pixels() + p);
      }
      for (int64_t tap = 0; depthwise && tap < 9; ++tap) {
        const int64_t in_row = p / y.width * stride - 1 + tap / 3, column = p % y.width * stride - 1 + tap % 3;
        if (in_row < 0 || in_row >= x.height || column < 0 || column >= x.width) continue;
        add(w.weight[row * 9 + tap], row * x.pixels() + in_row * x.width + column);
      }
      const double value = w.scale[row] * sum + w.bias[row];
      y.value.push_back(has_relu ? relu(value) : value);
      y.size.push_back(std::abs(w.scale[row]) * size + std::abs(w.bias[row]));
    }
  }
  return y;
}

struct CaseV2 {
  Unit unit;
  Channels x;
  Weights conv1, conv2, conv3, shortcut1, shortcut2;
};

static CaseV2 random_case_v2(bool in_pairs) {
  CaseV2 c;
  Unit& u = c.unit;
  u.version = Version::v2;
  u.batch = 1;
  u.stride = uniform(1, 2);
  const int64_t even = in_pairs ? 2 : 1;
  u.in_channels = (u.stride == 1 ? 2 : 1) * even * uniform(1, 14);
  u.mid_channels = uniform(1, 24);
  u.out_channels = u.stride == 1 ? u.in_channels / 2 : even * uniform(1, 14);
  const bool is_equal = in_pairs && uniform(0, 3);  // what pairs need, but for has_pairs to refuse
  u.shortcut_channels = u.stride == 1 ? 0 : is_equal ? u.out_channels : even * uniform(1, 20);
  u.join_groups = in_pairs ? 2 : 1;
  u.height = uniform(0, 5) ? uniform(1, 18) : 1;
  u.width = uniform(0, 5) ? uniform(1, 36) : 1;
  if (uniform(0, 199) == 0) {
    u.height = uniform(70, 110);
    u.width = uniform(100, 140);
  }
  c.x = {u.in_channels, u.height, u.width, random_values(u.in_channels * u.height * u.width), {}};
  c.x.size.assign(c.x.value.size(), 2);
  c.conv1 = random_weights(u.mid_channels, u.conv1_depth());
  c.conv2 = random_weights(u.mid_channels, 9);
  c.conv3 = random_weights(u.out_channels, u.mid_channels);
  if (u.convolves_shortcut()) {
    c.shortcut1 = random_weights(u.in_channels, 9);
    c.shortcut2 = random_weights(u.shortcut_channels, u.in_channels);
  }
  if (!in_pairs) return c;
  for (Weights* const w : {&c.conv1, &c.conv2, &c.conv3, &c.shortcut1, &c.shortcut2}) {
    std::fill(w->scale.begin(), w->scale.end(), 1.0);
  }
  for (Weights* const w : {&c.conv1, &c.conv3, &c.shortcut2}) round_weights(*w);
  return c;
}

// What conv3 gives, and what is beside it.
struct ExpectedV2 {
  Channels main, beside;
};

static ExpectedV2 expected_result(const CaseV2& c, double rounding) {
  const Unit& u = c.unit;
  const Channels x = some_channels(c.x, u.conv1_first(), u.conv1_channels());
  const Channels y1 = convolved(x, c.conv1, u.mid_channels, 1, false, true, 0);
  const Channels y2 = convolved(y1, c.conv2, u.mid_channels, u.stride, true, false, 0);
  ExpectedV2 expected = {convolved(y2, c.conv3, u.out_channels, 1, false, true, rounding), {}};
  if (u.passes_half()) {
    expected.beside = some_channels(c.x, 0, u.conv1_first());
    std::fill(expected.beside.size.begin(), expected.beside.size.end(), 0.0);  // not rounded at all
  } else {
    const Channels shortcut = convolved(c.x, c.shortcut1, u.in_channels, 2, true, false, 0);
    expected.beside = convolved(shortcut, c.shortcut2, u.shortcut_channels, 1, false, true, rounding);
  }
  return expected;
}

static std::vector<int64_t> random_planes(int64_t n) {
  std::vector<int64_t> planes(n);
  for (int64_t i = 0; i < n; ++i) planes[i] = i;
  std::shuffle(planes.begin(), planes.end(), generator);
  return planes;
}

// On planes of floats, by parts or by strips, which must agree bit for bit.
template <class A>
static void check_unit_v2(const Isa& isa) {
  const CaseV2 c = random_case_v2(false);
  const Unit& u = c.unit;
  const UnitKernel& kernel = isa.kernels(std::is_same_v<A, double> ? Dtype::float64 : Dtype::float32).unit();
  const int64_t pixels = u.out_height() * u.out_width(), slack = uniform(0, 9);
  const Pointers<A> conv1(c.conv1), conv2(c.conv2), conv3(c.conv3), shortcut1(c.shortcut1), shortcut2(c.shortcut2);
  const std::vector<int64_t> x_planes = random_planes(u.in_channels), planes = random_planes(u.result_channels());
  const int64_t* const result_planes = u.passes_half() ? x_planes.data() : planes.data();
  UnitPointers pointers;
  pointers.conv1 = conv1;
  pointers.conv2 = conv2;
  pointers.conv3 = conv3;
  pointers.shortcut1 = shortcut1;
  pointers.shortcut2 = shortcut2;
  pointers.x_plane = c.x.pixels() + slack;
  pointers.result_plane = pixels + slack;
  pointers.x_planes = x_planes.data() + u.conv1_first();
  pointers.shortcut_planes = result_planes;
  pointers.conv3_planes = result_planes + u.result_channels() - u.out_channels;

  const ExpectedV2 expected = expected_result(c, 0);
  Array<A> first;
  for (const bool by_strips : {false, true}) {
    Array<A> x((u.in_channels - 1) * pointers.x_plane + c.x.pixels(), std::numeric_limits<A>::quiet_NaN());
    for (int64_t ch = 0; ch < u.in_channels; ++ch) {
      for (int64_t p = 0; p < c.x.pixels(); ++p) x[x_planes[ch] * pointers.x_plane + p] = static_cast<A>(c.x.at(ch, p));
    }
    Array<A> apart((u.result_channels() - 1) * pointers.result_plane + pixels, std::numeric_limits<A>::quiet_NaN());
    Array<A>& result = u.passes_half() ? x : apart;
    pointers.x = x.data();
    pointers.result = result.data();
    if (by_strips) {
      run_strips<A>(kernel, u, pointers, random_strips(u));
    } else {
      const Partition partition = u.passes_half() ? Partition() : random_partition(u, kernel, true);
      for (int64_t i = 0; i < partition.parts; ++i) run_part(kernel, u, pointers, partition.rows(u, i));
    }
    const double sum_epsilon = epsilon(std::is_same_v<A, double> ? Dtype::float64 : Dtype::float32);
    for (int64_t ch = 0; ch < u.result_channels(); ++ch) {
      const int64_t beside = u.result_channels() - u.out_channels;
      const Channels& part = ch < beside ? expected.beside : expected.main;
      for (int64_t p = 0; p < pixels; ++p) {
        const int64_t in_part = (ch < beside ? ch : ch - beside) * pixels + p;
        const int64_t i = result_planes[ch] * pointers.result_plane + p;
        const double got = static_cast<double>(result[i]);
        check_value(got, part.value[in_part], 64 * sum_epsilon * part.size[in_part], "unit of v2", i, isa);
        if (by_strips) check_value(got, static_cast<double>(first[i]), 0, "unit of v2 by strips", i, isa);
      }
    }
    first = result;
  }
}

// On planes of pairs, in the order of a shuffle by two, whatever has_pairs says they fit.
static void check_pair_unit_v2(const Isa& isa) {
  CaseV2 c;
  do {
    c = random_case_v2(true);
  } while (!has_pairs(c.unit));
  const Unit& u = c.unit;
  const UnitKernel& kernel = isa.pair_kernels(Dtype::bfloat16)->unit();
  const int64_t pixels = u.out_height() * u.out_width();
  UnitPointers pointers;
  pointers.x_plane = c.x.pixels() + uniform(0, 9);
  pointers.result_plane = pixels + uniform(0, 9);
  const Array<char> x = pairs_of(c.x.value, u.in_channels, c.x.pixels(), pointers.x_plane);
  const Array<char> weight1 = pair_weights(c.conv1, u.conv1_depth()), weight3 = pair_weights(c.conv3, u.mid_channels),
                    shortcut_weight = pair_weights(c.shortcut2, u.in_channels);
  const Pointers<float> conv1(c.conv1), conv2(c.conv2), conv3(c.conv3), shortcut1(c.shortcut1), shortcut2(c.shortcut2);
  pointers.x = x.data();
  pointers.conv1 = {weight1.data(), nullptr, conv1.bias.data()};
  pointers.conv2 = {conv2.weight.data(), nullptr, conv2.bias.data()};
  pointers.conv3 = {weight3.data(), nullptr, conv3.bias.data()};
  pointers.shortcut1 = {shortcut1.weight.data(), nullptr, shortcut1.bias.data()};
  pointers.shortcut2 = {shortcut_weight.data(), nullptr, shortcut2.bias.data()};
  const int64_t rows = std::max(u.out_channels, u.result_channels() - u.out_channels);
  const int64_t elements = 2 * ((rows - 1) * pointers.result_plane + pixels);
  Array<uint16_t> by_parts(elements, 0xffff), by_strips(elements, 0xffff);
  pointers.result = by_parts.data();
  const Partition partition = random_partition(u, kernel, true);
  for (int64_t i = 0; i < partition.parts; ++i) run_part(kernel, u, pointers, partition.rows(u, i));
  pointers.result = by_strips.data();
  run_strips<float>(kernel, u, pointers, random_strips(u));

  // What was rounded ahead of the last convolution is an epsilon of bfloat16, in those of the sums.
  const double half_epsilon = epsilon(Dtype::bfloat16), sum_epsilon = 64 * epsilon(Dtype::float32);
  const ExpectedV2 expected = expected_result(c, half_epsilon / sum_epsilon);
  for (const bool is_main : {false, true}) {
    const Channels& part = is_main ? expected.main : expected.beside;
    for (int64_t row = 0; row < (is_main ? u.out_channels : u.result_channels() - u.out_channels); ++row) {
      for (int64_t p = 0; p < pixels; ++p) {
        const int64_t i = row * pixels + p, element = 2 * (row * pointers.result_plane + p) + is_main;
        const double got = get(Dtype::bfloat16, by_parts.data(), element), value = part.value[i];
        check_value(get(Dtype::bfloat16, by_strips.data(), element), got, 0, "pairs of v2 by strips", i, isa);
        const double rounding = part.size[i] > 0 ? half_epsilon * std::abs(value) : 0;
        check_value(got, value, rounding + sum_epsilon * part.size[i], "pairs of v2", i, isa);
      }
    }
  }
}

static LastConvolution random_last(int64_t even) {
  LastConvolution layer = {even * uniform(1, 30), uniform(1, 9), uniform(1, 20), even * uniform(1, 20), 0, nullptr};
  layer.x_plane = layer.pixels() + uniform(0, 9);
  return layer;
}

static Channels random_channels(const LastConvolution& layer) {
  Channels x = {layer.in_channels, layer.height, layer.width, random_values(layer.in_channels * layer.pixels()), {}};
  x.size.assign(x.value.size(), 2);
  return x;
}

template <class A>
static void check_last_convolution(const Isa& isa) {
  LastConvolution layer = random_last(1);
  const Channels x = random_channels(layer);
  const Weights w = random_weights(layer.out_channels, layer.in_channels);
  const Channels expected = convolved(x, w, layer.out_channels, 1, false, true, 0);
  const Dtype dtype = std::is_same_v<A, double> ? Dtype::float64 : Dtype::float32;
  const LastConvolutionKernel& kernel = isa.kernels(dtype).last_convolution();
  const Pointers<A> conv(w);
  const int64_t x_plane = layer.x_plane, plane = layer.pixels() + uniform(0, 9);
  const std::vector<int64_t> planes = random_planes(layer.in_channels);
  layer.x_planes = planes.data();
  Array<A> image((layer.in_channels - 1) * x_plane + layer.pixels(), std::numeric_limits<A>::quiet_NaN());
  for (int64_t c = 0; c < layer.in_channels; ++c) {
    for (int64_t p = 0; p < layer.pixels(); ++p) image[planes[c] * x_plane + p] = static_cast<A>(x.at(c, p));
  }
  Array<A> result((layer.out_channels - 1) * plane + layer.pixels(), std::numeric_limits<A>::quiet_NaN());
  in_shares(layer.out_channels, 1, [&](Range rows) {
    const Buffer workspace(kernel.workspace_bytes(layer));
    A* const first = result.data() + rows.begin * plane;
    kernel.run(layer, conv, image.data(), rows, first, plane, workspace.get());
  });
  for (int64_t i = 0; i < layer.out_channels * layer.pixels(); ++i) {
    const double got = static_cast<double>(result[i / layer.pixels() * plane + i % layer.pixels()]);
    check_value(got, expected.value[i], 32 * epsilon(dtype) * expected.size[i], "last convolution", i, isa);
  }
}

static void check_pair_last_convolution(const Isa& isa) {
  const LastConvolution layer = random_last(2);
  const Channels x = random_channels(layer);
  Weights w = random_weights(layer.out_channels, layer.in_channels);
  std::fill(w.scale.begin(), w.scale.end(), 1.0);
  round_weights(w);
  const Channels expected = convolved(x, w, layer.out_channels, 1, false, true, 0);
  const LastConvolutionKernel& kernel = isa.pair_kernels(Dtype::bfloat16)->last_convolution();
  const Pointers<float> conv(w);
  const Array<char> weight = pair_weights(w, layer.in_channels);
  const int64_t x_plane = layer.x_plane, plane = layer.pixels() + uniform(0, 9);
  const Array<char> image = pairs_of(x.value, layer.in_channels, layer.pixels(), x_plane);
  Array<uint16_t> result(2 * ((layer.out_channels / 2 - 1) * plane + layer.pixels()), 0xffff);
  in_shares(layer.out_channels, 2, [&](Range rows) {
    uint16_t* const first = result.data() + rows.begin * plane;
    kernel.run(layer, {weight.data(), nullptr, conv.bias.data()}, image.data(), rows, first, plane, nullptr);
  });
  for (int64_t i = 0; i < layer.out_channels * layer.pixels(); ++i) {
    const int64_t c = i / layer.pixels(), p = i % layer.pixels();
    const double got = get(Dtype::bfloat16, result.data(), 2 * (c / 2 * plane + p) + c % 2);
    const double tolerance =
        epsilon(Dtype::bfloat16) * std::abs(expected.value[i]) + 32 * epsilon(Dtype::float32) * expected.size[i];
    check_value(got, expected.value[i], tolerance, "last convolution of pairs", i, isa);
  }
}

static void check_v2(const Isa& isa) {
  check_unit_v2<float>(isa);
  check_unit_v2<double>(isa);
  check_last_convolution<float>(isa);
  check_last_convolution<double>(isa);
}
