// Fuzzes the kernels without torch: units, stems and heads of random shapes, every ISA, dtype and layout, cut at random
// into parts, strips and shares of channels, on memory that ends exactly where its contents end, against a naive
// implementation in double. Behind that memory is a page which no access survives, be it one by a masked intrinsic or
// by AMX, which sanitizers do not see. run_sanitized.sh also finds what is read or written just before it.
//
// Usage: fuzz_kernels [units] [seed]
#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <vector>

#include "../../csrc/cpu/isa/isa.h"
#include "../../csrc/cpu/schedule/partition.h"

namespace shufflenet::cpu {
extern const Isa& plain_pairs;  // see plain_pairs.cpp
}

using namespace shufflenet;
using namespace shufflenet::cpu;

static std::mt19937 generator;

static int64_t uniform(int64_t lowest, int64_t highest) {
  return std::uniform_int_distribution<int64_t>(lowest, highest)(generator);
}

// Memory that ends with a page, the next of which cannot be accessed. What the first page has before it is poisoned.
template <class T>
struct GuardedAllocator {
  using value_type = T;
  GuardedAllocator() = default;
  template <class U>
  GuardedAllocator(const GuardedAllocator<U>&) {}

  T* allocate(size_t n) {
    const size_t pages = page_bytes(n);
    void* const first =
        mmap(nullptr, pages + guard_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (first == MAP_FAILED || mprotect(static_cast<char*>(first) + pages, guard_bytes(), PROT_NONE) != 0) {
      throw std::bad_alloc();
    }
    ASAN_POISON_MEMORY_REGION(first, pages - n * sizeof(T));
    return reinterpret_cast<T*>(static_cast<char*>(first) + pages - n * sizeof(T));
  }
  void deallocate(T* p, size_t n) {
    const size_t pages = page_bytes(n);
    char* const first = reinterpret_cast<char*>(p + n) - pages;
    ASAN_UNPOISON_MEMORY_REGION(first, pages);
    munmap(first, pages + guard_bytes());
  }
  bool operator==(const GuardedAllocator&) const { return true; }
  bool operator!=(const GuardedAllocator&) const { return false; }

 private:
  static size_t guard_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
  static size_t page_bytes(size_t n) { return (n * sizeof(T) + guard_bytes() - 1) / guard_bytes() * guard_bytes(); }
};

// What kernels work on. It grows by copies, and ends where its contents do once it is shrunk to fit.
template <class T>
using Array = std::vector<T, GuardedAllocator<T>>;

// Memory of exactly n bytes in which every number, of any dtype, is NaN until it is written.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : data_(bytes, '\xff') {
    if (bytes % kMemoryAlignment != 0) throw std::logic_error("a buffer's size is a multiple of its alignment");
  }
  void* get() const { return const_cast<char*>(data_.data()); }

 private:
  Array<char> data_;
};

// ---- Numbers of a dtype ---------------------------------------------------------------------------------------------

static int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64: return 8;
    case Dtype::float32: return 4;
    default: return 2;
  }
}

static double epsilon(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64: return 0x1p-52;
    case Dtype::float32: return 0x1p-23;
    case Dtype::float16: return 0x1p-10;
    default: return 0x1p-7;
  }
}

static double relu(double value) { return value < 0 ? 0 : value; }  // NaN stays

static bool agrees(double got, double expected, double tolerance) {
  return std::isnan(expected) ? std::isnan(got) : std::abs(got - expected) <= tolerance;
}

// Appends a value that every dtype represents exactly, or NaN.
static void put(Dtype dtype, double value, Array<char>& bytes) {
  const auto append = [&](const void* p, size_t n) {
    bytes.insert(bytes.end(), static_cast<const char*>(p), static_cast<const char*>(p) + n);
  };
  if (dtype == Dtype::float64) return append(&value, 8);
  const float single = static_cast<float>(value);
  if (dtype == Dtype::float32) return append(&single, 4);
  uint32_t bits;
  std::memcpy(&bits, &single, 4);
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (dtype == Dtype::float16) {
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    const uint32_t finite = sign | (magnitude ? (magnitude - (112u << 23)) >> 13 : 0);
    half = static_cast<uint16_t>(std::isnan(value) ? 0x7e00 : finite);
  }
  append(&half, 2);
}

static double get(Dtype dtype, const void* data, int64_t i) {
  if (dtype == Dtype::float64) return static_cast<const double*>(data)[i];
  if (dtype == Dtype::float32) return static_cast<const float*>(data)[i];
  const uint16_t half = static_cast<const uint16_t*>(data)[i];
  if (dtype == Dtype::bfloat16) {
    const uint32_t bits = uint32_t{half} << 16;
    float single;
    std::memcpy(&single, &bits, 4);
    return single;
  }
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 31) return std::numeric_limits<double>::quiet_NaN();  // none overflows here
  const double value = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return half & 0x8000 ? -value : value;
}

// ---- The unit, naively ----------------------------------------------------------------------------------------------

struct Weights {
  std::vector<double> weight, scale, bias;
};

struct Case {
  Unit unit;
  Dtype dtype = Dtype::float32;
  std::vector<double> x;  // (batch, channels, height, width), whatever the layout
  Weights conv1, conv2, conv3;
};

[[noreturn]] static void fail(const Case& c) {
  const Unit& u = c.unit;
  std::fprintf(
      stderr,
      "batch %lld, channels %lld %lld %lld, plane %lldx%lld, conv1_groups %lld, groups %lld, shuffle_groups %lld, "
      "stride %lld, conv2_relu %d, include_pad %d, shortcut_first %d, shortcut_relu %d, layout %d, dtype %d\n",
      static_cast<long long>(u.batch), static_cast<long long>(u.in_channels), static_cast<long long>(u.mid_channels),
      static_cast<long long>(u.out_channels), static_cast<long long>(u.height), static_cast<long long>(u.width),
      static_cast<long long>(u.conv1_groups), static_cast<long long>(u.groups),
      static_cast<long long>(u.shuffle_groups), static_cast<long long>(u.stride), u.conv2_relu,
      u.pool_count_include_pad, u.shortcut_first, u.shortcut_relu, static_cast<int>(u.layout),
      static_cast<int>(c.dtype));
  std::exit(1);
}

static int64_t offset(int64_t n, int64_t c, int64_t row, int64_t column, int64_t channels, int64_t height,
                      int64_t width, Layout layout) {
  if (layout == Layout::contiguous) return ((n * channels + c) * height + row) * width + column;
  return ((n * height + row) * width + column) * channels + c;
}

// What is expected of each element of the result, in the order in which they are in memory.
struct Expected {
  std::vector<double> value;
  std::vector<double> magnitude;  // the sum of the absolute terms, of all convolutions: what rounding of sums goes with
  std::vector<double> of_y2;      // that of conv3's terms: what rounding of y2 goes with
};

static Expected expected_result(const Case& c) {
  const Unit& u = c.unit;
  const int64_t out_height = u.out_height(), out_width = u.out_width(), channels = u.result_channels();
  Expected expected;
  for (auto* const values : {&expected.value, &expected.magnitude, &expected.of_y2}) {
    values->resize(u.batch * channels * out_height * out_width);
  }
  const auto x = [&](int64_t n, int64_t ch, int64_t row, int64_t column) {
    return c.x[((n * u.in_channels + ch) * u.height + row) * u.width + column];
  };
  for (int64_t n = 0; n < u.batch; ++n) {
    std::vector<double> y1(u.mid_channels * u.height * u.width), y2(u.mid_channels * out_height * out_width);
    std::vector<double> size1(y1.size()), size2(y2.size());
    for (int64_t m = 0; m < u.mid_channels; ++m) {
      // Channel m after the shuffle is row `row` of conv1.
      const int64_t row = m % u.shuffle_groups * u.shuffle_rows() + m / u.shuffle_groups;
      const int64_t first = row / u.conv1_group_rows() * u.conv1_depth();
      for (int64_t p = 0; p < u.height * u.width; ++p) {
        double sum = 0, size = 0;
        for (int64_t k = 0; k < u.conv1_depth(); ++k) {
          const double term = c.conv1.weight[row * u.conv1_depth() + k] * x(n, first + k, p / u.width, p % u.width);
          sum += term;
          size += std::abs(term);
        }
        const int64_t i = m * u.height * u.width + p;
        y1[i] = relu(c.conv1.scale[row] * sum + c.conv1.bias[row]);
        size1[i] = std::abs(c.conv1.scale[row]) * size + std::abs(c.conv1.bias[row]);
      }
      for (int64_t p = 0; p < out_height * out_width; ++p) {
        double sum = 0, size = 0;
        for (int64_t tap = 0; tap < 9; ++tap) {
          const int64_t in_row = p / out_width * u.stride - 1 + tap / 3,
                        column = p % out_width * u.stride - 1 + tap % 3;
          if (in_row < 0 || in_row >= u.height || column < 0 || column >= u.width) continue;
          const int64_t i = (m * u.height + in_row) * u.width + column;
          sum += c.conv2.weight[m * 9 + tap] * y1[i];
          size += std::abs(c.conv2.weight[m * 9 + tap]) * size1[i];
        }
        const int64_t i = m * out_height * out_width + p;
        y2[i] = c.conv2.scale[m] * sum + c.conv2.bias[m];
        if (u.conv2_relu) y2[i] = relu(y2[i]);
        size2[i] = std::abs(c.conv2.scale[m]) * size + std::abs(c.conv2.bias[m]);
      }
    }
    for (int64_t ch = 0; ch < channels; ++ch) {
      for (int64_t p = 0; p < out_height * out_width; ++p) {
        const int64_t row = p / out_width, column = p % out_width;
        double value = 0, size = 0, of_y2 = 0;
        // A channel of conv3, or of the pooled shortcut.
        const int64_t out = ch - (u.shortcut_first && u.concatenates_pool() ? u.in_channels : 0);
        const int64_t pooled = u.shortcut_first ? ch : ch - u.out_channels;
        if (!u.has_conv3()) {
          value = y2[ch * out_height * out_width + p];
          size = size2[ch * out_height * out_width + p];
        } else if (out >= 0 && out < u.out_channels) {
          const int64_t first = out / (u.out_channels / u.groups) * u.slice_channels();
          for (int64_t k = 0; k < u.slice_channels(); ++k) {
            const double weight = c.conv3.weight[out * u.slice_channels() + k];
            const double term = weight * y2[(first + k) * out_height * out_width + p];
            value += term;
            of_y2 += std::abs(c.conv3.scale[out] * term);
            size += std::abs(weight) * size2[(first + k) * out_height * out_width + p];
          }
          value = c.conv3.scale[out] * value + c.conv3.bias[out];
          size = std::abs(c.conv3.scale[out]) * size + std::abs(c.conv3.bias[out]);
          if (u.adds_residual()) value += x(n, ch, row, column);
          value = relu(value);
        } else {
          int64_t inside = 0;
          for (int64_t tap = 0; tap < 9; ++tap) {
            const int64_t in_row = row * 2 - 1 + tap / 3, in_column = column * 2 - 1 + tap % 3;
            if (in_row < 0 || in_row >= u.height || in_column < 0 || in_column >= u.width) continue;
            value += x(n, pooled, in_row, in_column);
            ++inside;
          }
          value /= static_cast<double>(u.pool_count_include_pad ? 9 : inside);
          if (u.shortcut_relu) value = relu(value);
        }
        const int64_t i = offset(n, ch, row, column, channels, out_height, out_width, u.layout);
        expected.value[i] = value;
        expected.magnitude[i] = size + 8;  // x's values are at most 2
        expected.of_y2[i] = of_y2;
      }
    }
  }
  return expected;
}

// ---- The unit, by the kernels -----------------------------------------------------------------------------------------

// Cuts n into random ranges and calls f with each, in random order: none may depend on another.
template <class F>
static void in_shares(int64_t n, int64_t multiple, const F& f) {
  std::vector<Range> shares;
  for (int64_t begin = 0; begin < n;) {
    const int64_t end = uniform(0, 1) ? n : std::min(n, begin + multiple * uniform(1, (n - begin) / multiple + 1));
    shares.push_back({begin, end});
    begin = end;
  }
  std::shuffle(shares.begin(), shares.end(), generator);
  for (const Range& share : shares) f(share);
}

static void run_part(const UnitKernel& kernel, const Unit& unit, const UnitPointers& pointers, Range rows) {
  const Buffer buffers(kernel.buffer_bytes(unit, rows));
  const UnitPart part = {unit, pointers, rows, buffers.get()};
  in_shares(unit.in_channels, 16, [&](Range share) { kernel.copy_in(part, share); });
  in_shares(unit.mid_channels, kernel.mid_multiple(unit), [&](Range share) {
    const Buffer workspace(kernel.workspace_bytes(unit, rows, share.count()));
    kernel.conv1_and_depthwise(part, share, workspace.get());
  });
  if (!unit.has_conv3() && !kernel.is_copied(unit)) return;
  const int64_t channels = unit.has_conv3() ? unit.out_channels : unit.mid_channels;
  in_shares(channels, kernel.channels_per_element(), [&](Range share) {
    const Buffer workspace(kernel.workspace_bytes(unit, rows, 0));
    kernel.conv3(part, share, workspace.get());
  });
}

// Any number of parts, or what the op itself would choose for some number of threads.
static Partition random_partition(const Unit& unit, const UnitKernel& kernel, bool has_strips) {
  if (uniform(0, 1)) return {uniform(1, unit.out_height()), Sharing::whole_parts};
  return choose_partition(unit, kernel, uniform(1, 6), has_strips, false);
}

// Any number of strips; of a large plane often one, so that it is projected some rows at a time.
static Partition random_strips(const Unit& unit) {
  const bool is_large = unit.out_height() > 30;
  return {is_large && uniform(0, 1) ? 1 : uniform(1, unit.out_height()), Sharing::strips};
}

// A strip's planes, cut from an image into memory of their own.
template <class A>
class StripPlanes {
 public:
  // The last plane ends with its last pixel, behind which there may be some slack.
  StripPlanes(int64_t planes, int64_t pixels, int64_t slack_bytes = 0)
      : planes_(planes),
        pixels_(pixels),
        plane_(pixels + uniform(0, 9)),
        data_((planes - 1) * plane_ + pixels + slack_bytes / sizeof(A), std::numeric_limits<A>::quiet_NaN()) {}
  ImageRows rows() { return {data_.data(), plane_}; }
  void copy_from(const A* image, int64_t image_plane) { copy(image, image_plane, data_.data(), plane_); }
  void copy_to(A* image, int64_t image_plane) const { copy(data_.data(), plane_, image, image_plane); }

 private:
  void copy(const A* from, int64_t from_plane, A* to, int64_t to_plane) const {
    for (int64_t c = 0; c < planes_; ++c) std::copy_n(from + c * from_plane, pixels_, to + c * to_plane);
  }
  int64_t planes_, pixels_, plane_;
  Array<A> data_;
};

// The image by strips, in random order, each in memory of its own.
template <class A>
static void run_strips(const UnitKernel& kernel, const Unit& unit, const UnitPointers& pointers,
                       const Partition& partition) {
  const int64_t n = partition.parts, channels = kernel.channels_per_element();
  const int64_t x_planes = unit.in_channels / channels, slack = channels > 1 ? kPairsSlackBytes : 0;
  std::vector<Strip> strips(n);
  std::vector<std::shared_ptr<StripPlanes<A>>> x, above, result;
  const bool in_place = unit.passes_half() && channels == 1;
  std::vector<std::unique_ptr<Buffer>> y1, lent;
  const A* const image = static_cast<const A*>(pointers.x);
  std::vector<int64_t> order;
  for (int64_t i = 0; i < n; ++i) {
    Strip& strip = strips[i];
    strip.rows = partition.rows(unit, i);
    const int64_t first = strip.rows.begin * unit.stride;
    const int64_t last = std::min(strip.rows.end * unit.stride, unit.height);
    x.push_back(std::make_shared<StripPlanes<A>>(x_planes, (last - first) * unit.width, slack));
    x.back()->copy_from(image + first * unit.width, pointers.x_plane);
    strip.x = x.back()->rows();
    const int64_t pixels = strip.rows.count() * unit.out_width();
    result.push_back(in_place ? x.back() : std::make_shared<StripPlanes<A>>(unit.result_channels() / channels, pixels));
    strip.result = result.back()->rows();
    y1.push_back(std::make_unique<Buffer>(kernel.strip_bytes(unit, strip.rows).y1));
    strip.y1 = y1.back()->get();
    lent.push_back(std::make_unique<Buffer>(kernel.strip_bytes(unit, strip.rows).lent));
    strip.lent = lent.back()->get();
    order.push_back(i);
    if (i == 0) continue;
    strip.above = &strips[i - 1];
    strips[i - 1].below = &strip;
    above.push_back(std::make_shared<StripPlanes<A>>(x_planes, unit.width, slack));
    above.back()->copy_from(image + (first - 1) * unit.width, pointers.x_plane);
    strip.x_above = above.back()->rows();
  }
  for (const auto phase : {&UnitKernel::strip_conv1, &UnitKernel::strip_depthwise_and_conv3}) {
    std::shuffle(order.begin(), order.end(), generator);
    for (const int64_t i : order) {
      const Buffer workspace(kernel.strip_bytes(unit, strips[i].rows).workspace);
      (kernel.*phase)(unit, pointers, strips[i], workspace.get());
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    A* const to = static_cast<A*>(pointers.result) + strips[i].rows.begin * unit.out_width();
    result[i]->copy_to(to, pointers.result_plane);
  }
}

// Weights in the accumulator's type, in memory of their exact size.
template <class A>
struct Pointers {
  explicit Pointers(const Weights& w)
      : weight(w.weight.begin(), w.weight.end()),
        scale(w.scale.begin(), w.scale.end()),
        bias(w.bias.begin(), w.bias.end()) {}
  operator Convolution() const { return {weight.data(), scale.data(), bias.data()}; }
  Array<A> weight, scale, bias;
};

template <class A>
static Array<char> native_result(const Case& c, const Isa& isa) {
  const Unit& u = c.unit;
  std::vector<double> ordered(c.x.size());
  for (int64_t i = 0; i < static_cast<int64_t>(c.x.size()); ++i) {
    const int64_t column = i % u.width, row = i / u.width % u.height;
    const int64_t ch = i / (u.width * u.height) % u.in_channels, n = i / (u.width * u.height * u.in_channels);
    ordered[offset(n, ch, row, column, u.in_channels, u.height, u.width, u.layout)] = c.x[i];
  }
  Array<char> x;
  for (const double value : ordered) put(c.dtype, value, x);
  x.shrink_to_fit();
  Array<char> result(u.batch * u.result_channels() * u.out_height() * u.out_width() * size_of(c.dtype), '\xff');

  const Pointers<A> conv1(c.conv1), conv2(c.conv2), conv3(c.conv3);
  UnitPointers pointers;
  pointers.conv1 = conv1;
  pointers.conv2 = conv2;
  pointers.conv3 = conv3;
  pointers.x_plane = u.height * u.width;
  pointers.result_plane = u.out_height() * u.out_width();
  const UnitKernel& kernel = isa.kernels(c.dtype).unit();
  const bool has_strips = u.has_conv3() && !kernel.is_copied(u);
  const int64_t x_bytes = static_cast<int64_t>(x.size()) / u.batch;
  const int64_t result_bytes = static_cast<int64_t>(result.size()) / u.batch;
  Unit image = u;
  image.batch = 1;
  for (int64_t n = 0; n < u.batch; ++n) {
    pointers.x = x.data() + n * x_bytes;
    pointers.result = result.data() + n * result_bytes;
    const Partition partition = random_partition(image, kernel, has_strips);
    for (int64_t i = 0; i < partition.parts; ++i) run_part(kernel, image, pointers, partition.rows(image, i));
    if (!has_strips) continue;
    Array<char> by_strips(result_bytes, '\xff');
    UnitPointers other = pointers;
    other.result = by_strips.data();
    run_strips<A>(kernel, image, other, random_strips(u));
    // NaNs may differ in their bits.
    const A *const got = reinterpret_cast<const A*>(by_strips.data()), *const expected =
                                                                           static_cast<const A*>(pointers.result);
    for (int64_t i = 0; i < result_bytes / static_cast<int64_t>(sizeof(A)); ++i) {
      if (got[i] == expected[i] || (std::isnan(got[i]) && std::isnan(expected[i]))) continue;
      std::fprintf(stderr, "%s: element %lld is %.17g by strips, %.17g by whole parts: ", isa.name(),
                   static_cast<long long>(i), static_cast<double>(got[i]), static_cast<double>(expected[i]));
      fail(c);
    }
  }
  return result;
}

static void check_element(double got, double expected, double tolerance, int64_t i, const Case& c, const Isa& isa) {
  if (agrees(got, expected, tolerance)) return;
  std::fprintf(stderr, "%s: element %lld is %.9g, expected %.9g within %.3g: ", isa.name(), static_cast<long long>(i),
               got, expected, tolerance);
  fail(c);
}

static void check(const Case& c, const Isa& isa) {
  const Expected expected = expected_result(c);
  const bool is_double = c.dtype == Dtype::float64;
  const Array<char> result = is_double ? native_result<double>(c, isa) : native_result<float>(c, isa);
  const double sum_epsilon = epsilon(is_double ? Dtype::float64 : Dtype::float32);
  for (int64_t i = 0; i < static_cast<int64_t>(expected.value.size()); ++i) {
    const double value = expected.value[i];
    check_element(get(c.dtype, result.data(), i), value,
                  epsilon(c.dtype) * std::abs(value) + 32 * sum_epsilon * expected.magnitude[i], i, c, isa);
  }
}

// ---- The unit of a program in bfloat16 ------------------------------------------------------------------------------

// Planes of pairs of channels, each so many pixels behind the one before, and the slack behind them.
static Array<char> pairs_of(const std::vector<double>& values, int64_t channels, int64_t pixels, int64_t plane) {
  Array<char> pairs;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (int64_t c = 0; c < channels; c += 2) {
    for (int64_t i = 0; i < (c + 2 < channels ? plane : pixels); ++i) {
      for (int64_t half = 0; half < 2; ++half) {
        put(Dtype::bfloat16, i < pixels ? values[(c + half) * pixels + i] : nan, pairs);
      }
    }
  }
  pairs.resize(pairs.size() + kPairsSlackBytes, '\xff');
  pairs.shrink_to_fit();
  return pairs;
}

// Rows of an even depth, in bfloat16.
static Array<char> pair_weights(const Weights& w, int64_t depth) {
  Array<char> weights;
  for (int64_t i = 0; i < static_cast<int64_t>(w.weight.size()); ++i) {
    put(Dtype::bfloat16, w.weight[i], weights);
    if (depth % 2 != 0 && (i + 1) % depth == 0) put(Dtype::bfloat16, 0, weights);
  }
  weights.shrink_to_fit();
  return weights;
}

// By parts and by strips, which must agree bit for bit.
static void check_pair_unit(const Case& c, const Isa& isa) {
  const Unit& u = c.unit;
  const UnitKernel& kernel = isa.pair_kernels(Dtype::bfloat16)->unit();
  const int64_t x_pixels = u.height * u.width, pixels = u.out_height() * u.out_width();
  UnitPointers pointers;
  pointers.x_plane = x_pixels + uniform(0, 9);
  pointers.result_plane = pixels + uniform(0, 9);
  const Array<char> x = pairs_of(c.x, u.in_channels, x_pixels, pointers.x_plane);
  const Array<char> weight1 = pair_weights(c.conv1, u.conv1_depth()),
                    weight3 = pair_weights(c.conv3, u.slice_channels());
  const Pointers<float> conv1(c.conv1), conv2(c.conv2), conv3(c.conv3);
  pointers.x = x.data();
  pointers.conv1 = {weight1.data(), nullptr, conv1.bias.data()};
  pointers.conv2 = {conv2.weight.data(), nullptr, conv2.bias.data()};
  pointers.conv3 = {weight3.data(), nullptr, conv3.bias.data()};
  const int64_t elements = 2 * ((u.result_channels() / 2 - 1) * pointers.result_plane + pixels);
  Array<uint16_t> by_parts(elements, 0xffff), by_strips(elements, 0xffff);

  pointers.result = by_parts.data();
  const Partition partition = random_partition(u, kernel, true);
  for (int64_t i = 0; i < partition.parts; ++i) run_part(kernel, u, pointers, partition.rows(u, i));
  pointers.result = by_strips.data();
  run_strips<float>(kernel, u, pointers, random_strips(u));

  const Expected expected = expected_result(c);
  for (int64_t ch = 0; ch < u.result_channels(); ++ch) {
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t i = ch * pixels + p, element = 2 * (ch / 2 * pointers.result_plane + p) + ch % 2;
      const double got = get(Dtype::bfloat16, by_parts.data(), element), value = expected.value[i];
      check_element(get(Dtype::bfloat16, by_strips.data(), element), got, 0, i, c, isa);
      const double tolerance = epsilon(Dtype::bfloat16) * (std::abs(value) + expected.of_y2[i]);
      check_element(got, value, tolerance + 32 * epsilon(Dtype::float32) * expected.magnitude[i], i, c, isa);
    }
  }
}

// ---- Random units -----------------------------------------------------------------------------------------------------

static Weights random_weights(int64_t rows, int64_t depth) {
  std::normal_distribution<double> normal;
  Weights w;
  for (int64_t i = 0; i < rows * depth; ++i) {
    w.weight.push_back(static_cast<float>(normal(generator) / std::sqrt(static_cast<double>(depth))));
  }
  for (int64_t i = 0; i < rows; ++i) w.scale.push_back(static_cast<float>(normal(generator)));
  for (int64_t i = 0; i < rows; ++i) w.bias.push_back(static_cast<float>(normal(generator)));
  return w;
}

static Case random_case() {
  Case c;
  Unit& u = c.unit;
  c.dtype = static_cast<Dtype>(uniform(0, 3));
  u.layout = static_cast<Layout>(uniform(0, 1));
  u.stride = uniform(1, 2);
  u.groups = uniform(1, 8);
  u.conv1_groups = uniform(0, 1) ? u.groups : uniform(1, 8);
  u.conv2_relu = uniform(0, 1);
  u.pool_count_include_pad = uniform(0, 1);
  u.batch = uniform(1, 2);
  const int64_t all_groups = u.groups * u.conv1_groups;
  u.mid_channels = all_groups * uniform(1, std::max<int64_t>(1, 24 / all_groups));
  u.in_channels = all_groups * uniform(1, std::max<int64_t>(1, 40 / all_groups));
  if (u.stride == 2 || uniform(0, 3) == 0) u.in_channels = u.conv1_groups * uniform(1, 20 / u.conv1_groups);
  u.out_channels = u.stride == 1 ? u.in_channels : u.groups * uniform(1, 9);
  if (u.out_channels % u.groups != 0 || uniform(0, 3) == 0) u.out_channels = 0;  // ends after the depthwise convolution
  // Any divisor; now and then the groups, as in the paper.
  do {
    u.shuffle_groups = uniform(0, 1) ? u.groups : uniform(1, u.mid_channels);
  } while (u.mid_channels % u.shuffle_groups != 0);
  u.shortcut_first = uniform(0, 1);
  u.shortcut_relu = uniform(0, 1);
  // Now and then a plane of one row, column or pixel.
  u.height = uniform(0, 5) ? uniform(1, 18) : 1;
  u.width = uniform(0, 5) ? uniform(1, 36) : 1;
  if (uniform(0, 199) == 0) {  // and an image that no L2 cache has room for
    u.height = uniform(70, 110);
    u.width = uniform(100, 140);
  }
  for (int64_t i = 0; i < u.batch * u.in_channels * u.height * u.width; ++i) {
    c.x.push_back(static_cast<double>(uniform(-64, 64)) / 32);
  }
  // Now and then a NaN, which must reach what depends on it and nothing else.
  if (uniform(0, 3) == 0) {
    c.x[uniform(0, static_cast<int64_t>(c.x.size()) - 1)] = std::numeric_limits<double>::quiet_NaN();
  }
  c.conv1 = random_weights(u.mid_channels, u.conv1_depth());
  c.conv2 = random_weights(u.mid_channels, 9);
  if (u.has_conv3()) c.conv3 = random_weights(u.out_channels, u.slice_channels());
  return c;
}

// Weights that bfloat16 represents exactly.
static void round_weights(Weights& w) {
  for (double& weight : w.weight) weight = std::ldexp(std::round(std::ldexp(weight, 4)), -4);
}

// A unit of a program in bfloat16: contiguous, with scales folded into its weights.
static Case random_pair_case() {
  Case c;
  do {
    c = random_case();
  } while (!c.unit.has_conv3() || !has_pairs(c.unit));
  Unit& u = c.unit;
  c.dtype = Dtype::bfloat16;
  u.layout = Layout::contiguous;
  u.batch = 1;
  c.x.resize(u.in_channels * u.height * u.width);
  for (Weights* const w : {&c.conv1, &c.conv2, &c.conv3}) std::fill(w->scale.begin(), w->scale.end(), 1.0);
  round_weights(c.conv1);
  round_weights(c.conv3);
  return c;
}

// ---- Stem and head ----------------------------------------------------------------------------------------------------

static void check_value(double got, double expected, double tolerance, const char* what, int64_t i, const Isa& isa) {
  if (agrees(got, expected, tolerance)) return;
  std::fprintf(stderr, "%s: %s: element %lld is %.9g, expected %.9g within %.3g\n", isa.name(), what,
               static_cast<long long>(i), got, expected, tolerance);
  std::exit(1);
}

// Values that every dtype represents exactly, now and then a NaN among them.
static std::vector<double> random_values(int64_t n) {
  std::vector<double> values;
  for (int64_t i = 0; i < n; ++i) values.push_back(static_cast<double>(uniform(-64, 64)) / 32);
  if (uniform(0, 3) == 0) values[uniform(0, n - 1)] = std::numeric_limits<double>::quiet_NaN();
  return values;
}

struct StemCase {
  Stem stem;
  std::vector<double> values;  // of x, whatever the layout
  Weights weights;
};

static StemCase random_stem() {
  StemCase c;
  Stem& s = c.stem;
  s.in_channels = uniform(1, 5);
  s.out_channels = uniform(1, 20);
  s.kernel_size = uniform(0, 15) ? uniform(1, 5) : uniform(6, kMostKernelSize);
  s.stride = uniform(1, 2);
  s.padding = uniform(0, s.kernel_size - 1);
  const int64_t least = std::max<int64_t>(1, s.kernel_size - 2 * s.padding);
  // Now and then more rows than are computed at once, or rows that are computed one at a time.
  const int64_t shape = uniform(0, 15);
  s.height = least + (shape == 0 ? uniform(40, 90) : shape == 1 ? uniform(0, 5) : uniform(0, 20));
  s.width = least + (shape == 1 ? uniform(200, 600) : uniform(0, 75));
  s.max_pool = uniform(0, 1);
  s.relu = uniform(0, 1);
  s.layout = static_cast<Layout>(uniform(0, 1));
  c.values = random_values(s.in_channels * s.height * s.width);
  c.weights = random_weights(s.out_channels, s.taps());
  return c;
}

// In memory of their exact size, as they lie in a tensor.
static Array<char> image_of(const StemCase& c, Dtype dtype) {
  const Stem& s = c.stem;
  std::vector<double> ordered(c.values.size());
  for (int64_t i = 0; i < s.in_channels; ++i) {
    for (int64_t row = 0; row < s.height; ++row) {
      for (int64_t column = 0; column < s.width; ++column) {
        ordered[offset(0, i, row, column, s.in_channels, s.height, s.width, s.layout)] =
            c.values[(i * s.height + row) * s.width + column];
      }
    }
  }
  Array<char> x;
  for (const double value : ordered) put(dtype, value, x);
  x.shrink_to_fit();
  return x;
}

// The result's elements, planes of so many apart, the last of which ends with its last pixel: get_value(channel, i).
template <class GetValue>
static void check_stem_result(const StemCase& stem_case, int64_t plane, double result_epsilon, double sum_epsilon,
                              const Isa& isa, const GetValue& get_value) {
  const Stem& s = stem_case.stem;
  const Weights& w = stem_case.weights;
  const std::vector<double>& values = stem_case.values;
  const int64_t pixels = s.out_height() * s.out_width();
  for (int64_t c = 0; c < s.out_channels; ++c) {
    std::vector<double> convolved, size;
    for (int64_t row = 0; row < s.conv_height(); ++row) {
      for (int64_t column = 0; column < s.conv_width(); ++column) {
        double sum = w.bias[c], terms = std::abs(sum);
        for (int64_t tap = 0; tap < s.taps(); ++tap) {
          const int64_t channel = tap / (s.kernel_size * s.kernel_size);
          const int64_t in_row = row * s.stride - s.padding + tap / s.kernel_size % s.kernel_size;
          const int64_t in_column = column * s.stride - s.padding + tap % s.kernel_size;
          if (in_row < 0 || in_row >= s.height || in_column < 0 || in_column >= s.width) continue;
          const double term =
              w.weight[c * s.taps() + tap] * values[(channel * s.height + in_row) * s.width + in_column];
          sum += term;
          terms += std::isnan(term) ? 0 : std::abs(term);
        }
        convolved.push_back(s.relu ? relu(sum) : sum);
        size.push_back(terms);
      }
    }
    for (int64_t p = 0; p < (c + 1 < s.out_channels ? plane : pixels); ++p) {
      double expected = std::numeric_limits<double>::quiet_NaN(), terms = 0;  // between planes nothing is written
      if (p < pixels && !s.max_pool) {
        expected = convolved[p];
        terms = size[p];
      } else if (p < pixels) {
        expected = -std::numeric_limits<double>::infinity();
        for (int64_t tap = 0; tap < 9; ++tap) {
          const int64_t row = p / s.out_width() * 2 - 1 + tap / 3, column = p % s.out_width() * 2 - 1 + tap % 3;
          if (row < 0 || row >= s.conv_height() || column < 0 || column >= s.conv_width()) continue;
          const double value = convolved[row * s.conv_width() + column];
          if (!(value <= expected) && !std::isnan(expected)) expected = value;
          terms = std::max(terms, size[row * s.conv_width() + column]);
        }
      }
      const double tolerance = result_epsilon * std::abs(expected) + 32 * sum_epsilon * terms;
      check_value(get_value(c, p), expected, tolerance, "stem", c * plane + p, isa);
    }
  }
}

template <class A>
static void check_stem(Dtype dtype, const Isa& isa) {
  const StemCase c = random_stem();
  const Stem& s = c.stem;
  const Array<char> x = image_of(c, dtype);
  const Pointers<A> conv(c.weights);
  const Convolution pointers = {conv.weight.data(), nullptr, conv.bias.data()};
  const int64_t pixels = s.out_height() * s.out_width(), plane = pixels + uniform(0, 9);
  Array<A> result((s.out_channels - 1) * plane + pixels, std::numeric_limits<A>::quiet_NaN());
  const StemKernel& kernel = isa.kernels(dtype).stem();
  in_shares(s.out_height(), 1, [&](Range rows) {
    const Buffer workspace(kernel.workspace_bytes(s));
    A* const first = result.data() + rows.begin * s.out_width();
    kernel.run(s, pointers, x.data(), rows, first, plane, workspace.get());
  });
  const double sum_epsilon = epsilon(std::is_same_v<A, double> ? Dtype::float64 : Dtype::float32);
  check_stem_result(c, plane, 0, sum_epsilon, isa,
                    [&](int64_t channel, int64_t p) { return static_cast<double>(result[channel * plane + p]); });
}

// The stem of a program in bfloat16, whose result is planes of pairs.
static void check_pair_stem(const Isa& isa) {
  StemCase c = random_stem();
  Stem& s = c.stem;
  s.out_channels = 2 * uniform(1, 20);
  c.weights = random_weights(s.out_channels, s.taps());
  round_weights(c.weights);
  const Dtype dtype = uniform(0, 1) ? Dtype::bfloat16 : Dtype::float32;
  const Array<char> x = image_of(c, dtype);
  const int64_t row_taps = 2 * stem_row_pairs(s);
  Array<char> weights;
  for (int64_t row = 0; row < s.out_channels * s.kernel_size; ++row) {
    for (int64_t tap = 0; tap < row_taps; ++tap) {
      const int64_t channel = tap / s.kernel_size, ky = row % s.kernel_size, kx = tap % s.kernel_size;
      const int64_t filter = (row / s.kernel_size * s.in_channels + channel) * s.kernel_size;
      const bool is_zero = channel == s.in_channels;
      put(Dtype::bfloat16, is_zero ? 0 : c.weights.weight[(filter + ky) * s.kernel_size + kx], weights);
    }
  }
  weights.shrink_to_fit();
  const Array<float> bias(c.weights.bias.begin(), c.weights.bias.end());
  const int64_t pixels = s.out_height() * s.out_width(), plane = pixels + uniform(0, 9);
  Array<uint16_t> result(2 * ((s.out_channels / 2 - 1) * plane + pixels), 0xffff);
  const StemKernel& kernel = isa.pair_kernels(dtype)->stem();
  in_shares(s.out_height(), 1, [&](Range rows) {
    const Buffer workspace(kernel.workspace_bytes(s));
    uint16_t* const first = result.data() + 2 * rows.begin * s.out_width();
    kernel.run(s, {weights.data(), nullptr, bias.data()}, x.data(), rows, first, plane, workspace.get());
  });
  const auto last = [&](int64_t channel, int64_t p) { return channel / 2 == s.out_channels / 2 - 1 && p >= pixels; };
  check_stem_result(c, plane, epsilon(Dtype::bfloat16), epsilon(Dtype::float32), isa, [&](int64_t channel, int64_t p) {
    if (last(channel, p)) return std::numeric_limits<double>::quiet_NaN();
    return get(Dtype::bfloat16, result.data(), 2 * (channel / 2 * plane + p) + channel % 2);
  });
}

static Head random_head(int64_t channels) {
  Head h;
  h.channels = channels;
  h.height = uniform(1, 9);
  h.width = uniform(1, 40);
  h.window_height = uniform(0, 1) ? h.height : uniform(1, h.height);
  h.window_width = uniform(0, 1) ? h.width : uniform(1, h.width);
  h.classes = uniform(1, 20);
  return h;
}

// The mean over the window of each channel.
static std::vector<double> expected_means(const Head& h, const std::vector<double>& x) {
  std::vector<double> means;
  for (int64_t c = 0; c < h.channels; ++c) {
    double sum = 0;
    for (int64_t row = 0; row < h.window_height; ++row) {
      for (int64_t column = 0; column < h.window_width; ++column) sum += x[(c * h.height + row) * h.width + column];
    }
    means.push_back(sum / static_cast<double>(h.window_height * h.window_width));
  }
  return means;
}

template <class A>
static void check_head(Dtype dtype, const Isa& isa) {
  Head h = random_head(uniform(1, 150));
  const int64_t images = uniform(1, 9), pixels = h.height * h.width, plane = pixels + uniform(0, 9);
  h.x_plane = plane;
  const Weights w = random_weights(h.classes, h.channels);
  const Pointers<A> linear(w);
  const HeadKernel& kernel = isa.kernels(dtype).head();
  const double sum_epsilon = epsilon(std::is_same_v<A, double> ? Dtype::float64 : Dtype::float32);

  Array<A> means(images * h.channels);
  for (int64_t image = 0; image < images; ++image) {
    Array<A> x((h.channels - 1) * plane + pixels, std::numeric_limits<A>::quiet_NaN());
    const std::vector<double> values = random_values(h.channels * pixels);
    for (int64_t i = 0; i < h.channels * pixels; ++i) x[i / pixels * plane + i % pixels] = static_cast<A>(values[i]);
    in_shares(h.channels, 1,
              [&](Range share) { kernel.means(h, images, x.data(), share, means.data() + image * h.channels); });
    const std::vector<double> expected = expected_means(h, values);
    for (int64_t c = 0; c < h.channels; ++c) {
      const int64_t i = image * h.channels + c;
      check_value(static_cast<double>(means[i]), expected[c], 32 * sum_epsilon * 2, "means", i, isa);
    }
  }

  Array<char> result(images * h.classes * size_of(dtype), '\xff');
  const Convolution pointers = {linear.weight.data(), nullptr, linear.bias.data()};
  in_shares(h.classes, 1, [&](Range share) { kernel.linear(h, images, pointers, means.data(), share, result.data()); });
  for (int64_t i = 0; i < images * h.classes; ++i) {
    const int64_t row = i % h.classes;
    double expected = w.bias[row], terms = std::abs(expected);
    for (int64_t c = 0; c < h.channels; ++c) {
      const double term = w.weight[row * h.channels + c] * static_cast<double>(means[i / h.classes * h.channels + c]);
      expected += term;
      terms += std::isnan(term) ? 0 : std::abs(term);
    }
    const double tolerance = epsilon(dtype) * std::abs(expected) + 32 * sum_epsilon * terms;
    check_value(get(dtype, result.data(), i), expected, tolerance, "linear", i, isa);
  }
}

// The head of a program in bfloat16, from planes of pairs; its means are pairs as well.
static void check_pair_head(const Isa& isa) {
  Head h = random_head(2 * uniform(1, 75));
  const Dtype dtype = uniform(0, 1) ? Dtype::bfloat16 : Dtype::float32;
  const HeadKernel& kernel = isa.pair_kernels(dtype)->head();
  const int64_t images = uniform(1, 9), pixels = h.height * h.width, plane = pixels + uniform(0, 9);
  h.x_plane = plane;
  Weights w = random_weights(h.classes, h.channels);
  round_weights(w);
  const Array<char> weight = pair_weights(w, h.channels);
  const Pointers<float> linear(w);

  const Buffer means(kernel.means_bytes(h, images));
  std::vector<double> exact;
  for (int64_t image = 0; image < images; ++image) {
    const std::vector<double> values = random_values(h.channels * pixels);
    for (const double mean : expected_means(h, values)) exact.push_back(mean);
    const Array<char> x = pairs_of(values, h.channels, pixels, plane);
    void* const own = static_cast<char*>(means.get()) + image * kernel.means_step(h);
    in_shares(h.channels, 2, [&](Range share) { kernel.means(h, images, x.data(), share, own); });
  }

  Array<char> result(images * h.classes * size_of(dtype), '\xff');
  const Convolution pointers = {weight.data(), nullptr, linear.bias.data()};
  in_shares(h.classes, 1, [&](Range share) { kernel.linear(h, images, pointers, means.get(), share, result.data()); });
  for (int64_t i = 0; i < images * h.classes; ++i) {
    const int64_t row = i % h.classes;
    double expected = w.bias[row], terms = std::abs(expected);
    for (int64_t c = 0; c < h.channels; ++c) {
      const double term = w.weight[row * h.channels + c] * exact[i / h.classes * h.channels + c];
      expected += term;
      terms += std::isnan(term) ? 0 : std::abs(term);
    }
    const double tolerance = epsilon(dtype) * std::abs(expected) + epsilon(Dtype::bfloat16) * terms;
    check_value(get(dtype, result.data(), i), expected, tolerance, "linear of pairs", i, isa);
  }
}

// Images to planes of a format, whose elements are of a dtype, and back, which must be what they were.
static void check_images(Dtype dtype, const Kernels& kernels, Dtype in_planes, const Isa& isa) {
  const ImageKernel& kernel = kernels.image();
  const int64_t together = kernels.unit().channels_per_element();  // channels of an element of a plane
  const Layout layout = uniform(0, 1) ? Layout::contiguous : Layout::channels_last;
  const TensorImage image = {layout, together * uniform(1, 40), uniform(1, 100)};
  const int64_t elements = image.channels * image.pixels;
  const int64_t plane = together > 1 ? image.pixels + uniform(0, 9) : padded_plane(image.pixels);
  Array<char> x;
  for (int64_t i = 0; i < elements; ++i) put(dtype, static_cast<double>(uniform(-128, 128)) / 64, x);
  x.shrink_to_fit();
  Array<char> planes(image.channels * plane * size_of(in_planes) + (together > 1 ? kPairsSlackBytes : 0), '\xff');
  Array<char> back(x.size(), '\xff');
  const Buffer workspace(kernel.workspace_bytes(image));
  const auto each = [&](const auto& convert) {
    in_shares(ceil_div(image.channels, kImageChannels), 1, [&](Range shares) {
      for (int64_t i = shares.begin; i < shares.end; ++i) {
        convert(Range{i * kImageChannels, std::min(image.channels, (i + 1) * kImageChannels)});
      }
    });
  };
  each([&](Range share) { kernel.read(image, x.data(), share, planes.data(), plane, workspace.get()); });
  for (int64_t i = 0; i < elements; ++i) {
    const bool contiguous = layout == Layout::contiguous;
    const int64_t c = contiguous ? i / image.pixels : i % image.channels,
                  p = contiguous ? i % image.pixels : i / image.channels;
    const double got = get(in_planes, planes.data(), together * (c / together * plane + p) + c % together);
    check_value(got, get(dtype, x.data(), i), 0, "image to planes", i, isa);
  }
  each([&](Range share) { kernel.write(image, planes.data(), plane, nullptr, share, back.data(), workspace.get()); });
  for (int64_t i = 0; i < elements; ++i) {
    check_value(get(dtype, back.data(), i), get(dtype, x.data(), i), 0, "planes to image", i, isa);
  }
}

#include "fuzz_v2.h"

static void check_stem_and_head(const Isa& isa) {
  const Dtype dtype = static_cast<Dtype>(uniform(0, 3));
  if (dtype == Dtype::float64) {
    check_stem<double>(dtype, isa);
    check_head<double>(dtype, isa);
  } else {
    check_stem<float>(dtype, isa);
    check_head<float>(dtype, isa);
  }
  check_images(dtype, isa.kernels(dtype), dtype == Dtype::float64 ? dtype : Dtype::float32, isa);
}

#include "fuzz_training.h"

static void check_pairs(const Isa& isa, long units) {
  for (long i = 0; i < units; ++i) {
    check_pair_unit(random_pair_case(), isa);
    check_pair_unit_v2(isa);
    check_pair_last_convolution(isa);
    check_pair_stem(isa);
    check_pair_head(isa);
    const Dtype dtype = uniform(0, 1) ? Dtype::bfloat16 : Dtype::float32;
    check_images(dtype, *isa.pair_kernels(dtype), Dtype::bfloat16, isa);
    TrainingFuzz<float>(Dtype::bfloat16, isa).run();
  }
  std::printf("%s: %ld units, stems, heads, images and passes of training on pairs\n", isa.name(), units);
}

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // a line is out before a crash
  const long units = argc > 1 ? std::atol(argv[1]) : 2000;
  generator.seed(argc > 2 ? std::atol(argv[2]) : 0);
  for (const std::string& name : usable_isas()) {
    select_isa(name);
    for (long i = 0; i < units; ++i) check(random_case(), isa());
    for (long i = 0; i < units; ++i) check_stem_and_head(isa());
    for (long i = 0; i < units; ++i) check_v2(isa());
    for (long i = 0; i < units; ++i) check_training(isa());
    std::printf("%s: %ld units, stems, heads, images and passes of training\n", name.c_str(), units);
    if (isa().pair_kernels(Dtype::bfloat16)) check_pairs(isa(), units);
  }
  check_pairs(plain_pairs, units);
  return 0;
}
