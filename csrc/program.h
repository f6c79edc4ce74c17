// A network for inference, or a part of one, as the op shuffle_network takes it: integers that say what the steps are,
// and their weights and biases one behind the other in one tensor. The format is described in
// shufflenet_ext/_program.py.
#pragma once

#include "arguments.h"

namespace shufflenet {

// Offsets into the weights, where each array is padded to a whole multiple of kPackedAlignment elements.
struct PackedConvolution {
  int64_t weight = 0, bias = 0;
};
inline constexpr int64_t kPackedAlignment = 16;

struct PackedUnit {
  Unit unit;  // of one image
  PackedConvolution conv1, conv2, conv3;
  PackedConvolution shortcut1, shortcut2;  // of v2 with stride 2

  int64_t convolutions() const { return unit.convolves_shortcut() ? 5 : 3; }
};

struct PackedStem {
  Stem stem;
  PackedConvolution conv;
};

struct PackedLastConvolution {
  LastConvolution layer;
  PackedConvolution conv;
};

struct PackedHead {
  Head head;
  PackedConvolution linear;
};

// The first integer of each step.
enum class StepKind : int64_t {
  stem = 0,
  unit = 1,
  head = 2,
  again = 3,
  general_unit = 4,
  unit_v2 = 5,
  last_convolution = 6
};

struct Program {
  std::optional<PackedStem> stem;
  std::vector<PackedUnit> units;  // all of one version
  std::optional<PackedLastConvolution> last;
  std::optional<PackedHead> head;
  Layout layout;              // of x
  Sizes x, sizes;             // of x, and of what the head, or else the caller, gets
  bool copies_parts = false;  // of one unit that is run in parts, each of which copies what it needs of x

  // Counts linear layers as well.
  int64_t convolutions() const {
    int64_t count = stem.has_value() + last.has_value() + head.has_value();
    for (const PackedUnit& packed : units) count += packed.convolutions();
    return count;
  }
  bool is_v2() const { return !units.empty() && units[0].unit.is_v2(); }
};

class ProgramReader {
 public:
  // Reads a program for x of these sizes, and so many elements of weights.
  ProgramReader(const Sizes& x, Layout layout, int64_t weights, const std::vector<int64_t>& program)
      : x_(x), layout_(layout), weights_(weights), program_(program), sizes_(x) {}

  Program read() {
    Program result;
    result.layout = layout_;
    result.x = x_;
    result.units.reserve(16);            // the paper's
    const int64_t* last_unit = nullptr;  // its integers
    StepKind last_kind{};                // what kind of a unit it is
    while (!result.head && at_ < program_.size()) {
      const StepKind kind{program_[at_]};
      if (kind == StepKind::stem && at_ == 0) {
        result.stem = read_stem();
      } else if (is_unit(kind) && !result.last) {
        last_kind = kind;
        last_unit = take(kind == StepKind::unit_v2 ? 6 : kind == StepKind::general_unit ? 10 : 7);
        result.units.push_back(read_unit(last_unit, kind));
        if (result.units.back().unit.is_v2() != result.is_v2()) {
          fail("program: got units of ShuffleNet v1 and v2, expected units of one version");
        }
      } else if (kind == StepKind::again && last_unit && !result.last) {
        const int64_t times = positive("times", take(1)[0]);
        for (int64_t i = 0; i < times; ++i) {
          result.units.push_back(read_unit(last_unit, last_kind));
          if (used_ > weights_) fail("weights: got ", weights_, " elements, expected more for ", times, " more units");
        }
      } else if (kind == StepKind::last_convolution && !result.last) {
        result.last = read_last_convolution();
      } else if (kind == StepKind::head) {
        result.head = read_head();
      } else {
        fail("program: got step ", program_[at_], " at element ", at_,
             ", expected 0 (stem) first, 1, 4 or 5 (unit), 3 (again) behind a unit, 6 (last convolution) behind units "
             "or 2 (head) last");
      }
    }
    if (program_.empty() || at_ != program_.size()) {
      fail("program: got ", program_.size(), " elements, expected one step at least, and nothing behind a head");
    }
    if (used_ != weights_) {
      fail("weights: got ", weights_, " elements, expected ", used_, " for this program and x");
    }
    result.sizes = sizes_;
    return result;
  }

 private:
  static bool is_unit(StepKind kind) {
    return kind == StepKind::unit || kind == StepKind::general_unit || kind == StepKind::unit_v2;
  }

  // The integers of a step behind its kind.
  const int64_t* take(size_t count) {
    if (program_.size() - at_ < count + 1) {
      fail("program: got ", program_.size() - at_ - 1, " elements for its last step, expected ", count);
    }
    const int64_t* const first = &program_[at_ + 1];
    at_ += count + 1;
    return first;
  }

  int64_t positive(const char* name, int64_t value) {
    // Every channel has a bias among the weights: what is more cannot be right, and might overflow.
    if (value < 1 || value > weights_) {
      fail("program: got ", name, " ", value, ", expected a positive number, at most the ", weights_,
           " elements of weights");
    }
    return value;
  }

  int64_t stride(int64_t value) {
    if (value != 1 && value != 2) fail("program: got stride ", value, ", expected 1 or 2");
    return value;
  }

  int64_t array(int64_t elements) {
    const int64_t offset = used_;
    used_ += ceil_div(elements, kPackedAlignment) * kPackedAlignment;
    return offset;
  }

  PackedConvolution convolution(int64_t rows, int64_t depth) {
    if (depth > weights_ / rows) {
      fail("weights: got ", weights_, " elements, expected ", rows, " x ", depth, " for one convolution alone");
    }
    PackedConvolution packed;
    packed.weight = array(rows * depth);
    packed.bias = array(rows);
    return packed;
  }

  PackedStem read_stem() {
    const int64_t* const o = take(6);
    Stem stem;
    stem.in_channels = sizes_[1];
    stem.height = sizes_[2];
    stem.width = sizes_[3];
    stem.out_channels = positive("out_channels", o[0]);
    stem.kernel_size = o[1];
    if (stem.kernel_size < 1 || stem.kernel_size > kMostKernelSize) {
      fail("program: got kernel_size ", stem.kernel_size, ", expected 1 to ", kMostKernelSize);
    }
    stem.stride = stride(o[2]);
    stem.padding = o[3];
    stem.max_pool = o[4] != 0;
    stem.relu = o[5] != 0;
    stem.layout = layout_;
    if (stem.padding < 0 || stem.padding >= stem.kernel_size) {
      fail(
          "program: got padding ", stem.padding, ", expected at least 0 and less than kernel_size, ", stem.kernel_size);
    }
    if (std::min(stem.height, stem.width) + 2 * stem.padding < stem.kernel_size) {
      const int64_t least = stem.kernel_size - 2 * stem.padding;
      fail("x: got ", shape_of(x_), ", expected at least ", least, " x ", least, " pixels");
    }
    if (stem.in_channels > weights_ / (stem.kernel_size * stem.kernel_size)) {
      fail("weights: got ", weights_, " elements, expected more: a row of the stem alone has more");
    }
    sizes_ = {sizes_[0], stem.out_channels, stem.out_height(), stem.out_width()};
    return {stem, convolution(stem.out_channels, stem.taps())};
  }

  PackedUnit read_unit(const int64_t* o, StepKind kind) {
    if (kind == StepKind::unit_v2) return read_unit_v2(o);
    const bool is_general = kind == StepKind::general_unit;
    PackedUnit packed;
    Unit& unit = packed.unit;
    unit.batch = 1;
    unit.in_channels = sizes_[1];
    unit.height = sizes_[2];
    unit.width = sizes_[3];
    unit.mid_channels = positive("mid_channels", o[0]);
    unit.out_channels = positive("out_channels", o[1]);
    unit.conv1_groups = o[2];
    unit.groups = o[3];
    unit.stride = stride(o[4]);
    unit.conv2_relu = o[5] != 0;
    unit.pool_count_include_pad = o[6] != 0;
    unit.shuffle_groups = is_general ? o[7] : unit.groups;
    unit.shortcut_first = is_general && o[8] != 0;
    unit.shortcut_relu = !is_general || o[9] != 0;
    unit.layout = layout_;
    check_divides("program: conv1_groups", unit.conv1_groups, "input channels", unit.in_channels);
    check_divides("program: conv1_groups", unit.conv1_groups, "mid_channels", unit.mid_channels);
    check_divides("program: groups", unit.groups, "mid_channels", unit.mid_channels);
    check_divides("program: groups", unit.groups, "out_channels", unit.out_channels);
    check_divides("program: shuffle_groups", unit.shuffle_groups, "mid_channels", unit.mid_channels);
    if (unit.stride == 1 && unit.out_channels != unit.in_channels) {
      fail("program: got ", unit.out_channels, " out_channels, expected ", unit.in_channels,
           " (with stride 1, the unit's input is added to its result)");
    }
    packed.conv1 = convolution(unit.mid_channels, unit.conv1_depth());
    packed.conv2 = convolution(unit.mid_channels, 9);
    packed.conv3 = convolution(unit.out_channels, unit.slice_channels());
    sizes_ = {sizes_[0], unit.result_channels(), unit.out_height(), unit.out_width()};
    return packed;
  }

  PackedUnit read_unit_v2(const int64_t* o) {
    PackedUnit packed;
    Unit& unit = packed.unit;
    unit.version = Version::v2;
    unit.batch = 1;
    unit.in_channels = sizes_[1];
    unit.height = sizes_[2];
    unit.width = sizes_[3];
    unit.mid_channels = positive("mid_channels", o[0]);
    unit.out_channels = positive("out_channels", o[1]);
    unit.stride = stride(o[3]);
    if (unit.stride == 2) unit.shortcut_channels = positive("shortcut_channels", o[2]);
    unit.split_groups = o[4];
    unit.join_groups = o[5];
    unit.layout = layout_;
    if (unit.stride == 1 && (o[2] != 0 || unit.in_channels % 2 != 0 || unit.out_channels != unit.in_channels / 2)) {
      fail(
          "program: got ", unit.in_channels, " input channels, ", unit.out_channels, " out_channels and ", o[2],
          " shortcut_channels, expected an even number, its half and 0 (with stride 1, half of the unit's input passes "
          "by)");
    }
    check_divides("program: split_groups", unit.split_groups, "input channels", unit.in_channels);
    check_divides("program: shuffle_groups", unit.join_groups, "joined channels", unit.result_channels());
    packed.conv1 = convolution(unit.mid_channels, unit.conv1_depth());
    packed.conv2 = convolution(unit.mid_channels, 9);
    packed.conv3 = convolution(unit.out_channels, unit.mid_channels);
    if (unit.convolves_shortcut()) {
      packed.shortcut1 = convolution(unit.in_channels, 9);
      packed.shortcut2 = convolution(unit.shortcut_channels, unit.in_channels);
    }
    sizes_ = {sizes_[0], unit.result_channels(), unit.out_height(), unit.out_width()};
    return packed;
  }

  PackedLastConvolution read_last_convolution() {
    LastConvolution layer = {sizes_[1], sizes_[2], sizes_[3], positive("out_channels", take(1)[0])};
    sizes_[1] = layer.out_channels;
    return {layer, convolution(layer.out_channels, layer.in_channels)};
  }

  PackedHead read_head() {
    const int64_t* const o = take(2);
    Head head;
    head.channels = sizes_[1];
    head.height = sizes_[2];
    head.width = sizes_[3];
    head.classes = positive("classes", o[0]);
    const int64_t window = o[1];
    // As avg_pool2d(window), which must leave one pixel.
    const auto fits = [window](int64_t n) { return window == 0 || (window > 0 && n / window == 1); };
    if (!fits(head.height) || !fits(head.width)) {
      fail("x: got ", shape_of(x_), ", of which ", head.height, " x ", head.width,
           " pixels are left; expected one window of ", window, " x ", window);
    }
    head.window_height = window ? window : head.height;
    head.window_width = window ? window : head.width;
    return {head, convolution(head.classes, head.channels)};
  }

  Sizes x_;
  Layout layout_;
  int64_t weights_;
  const std::vector<int64_t>& program_;
  Sizes sizes_;
  size_t at_ = 0;
  int64_t used_ = 0;
};

// The arguments of shuffle_network_batch_norm's convolutions, the last of which may be a linear layer, and how many
// elements they would have if they were packed.
inline std::pair<std::vector<ConvolutionArguments>, int64_t> network_arguments(
    const std::vector<std::optional<Tensor>>& tensors, const std::vector<double>& eps) {
  constexpr size_t kOfConvolution = 6, kOfLinear = 2;
  const size_t of_all = kOfConvolution * eps.size();
  if (tensors.size() != of_all && tensors.size() != of_all + kOfLinear) {
    fail("tensors: got ", tensors.size(), ", expected 6 for each of the ", eps.size(),
         " eps, and 2 for a linear layer behind them");
  }
  std::vector<ConvolutionArguments> arguments;
  arguments.reserve(eps.size() + 1);
  int64_t elements = 0;
  const auto add_padded = [&](int64_t n) { elements += ceil_div(n, kPackedAlignment) * kPackedAlignment; };
  for (size_t i = 0; i < tensors.size(); i += kOfConvolution) {
    const auto* const t = &tensors[i];
    if (!t[0]) fail("tensors: got None for a weight, at ", i);
    ConvolutionArguments& conv =
        arguments.emplace_back(ConvolutionArguments{"conv" + std::to_string(arguments.size() + 1), *t[0], t[1], {}});
    if (i < of_all && (t[2] || t[3] || t[4] || t[5])) {
      if (!t[4] || !t[5]) fail("tensors: got a batch norm without its mean or variance, at ", i, ", expected both");
      conv.norm = BatchNorm{t[2], t[3], *t[4], *t[5], eps[i / kOfConvolution]};
    }
    add_padded(conv.weight.numel());
    add_padded(conv.weight.size(0));
  }
  return {std::move(arguments), elements};
}

// Refuses arguments that are not those of a program's convolutions.
inline void check_network(const Program& program, const std::vector<ConvolutionArguments>& arguments, const Tensor& x) {
  if (static_cast<int64_t>(arguments.size()) != program.convolutions()) {
    fail("tensors: got those of ", arguments.size(), " convolutions and linear layers, expected ",
         program.convolutions());
  }
  const ConvolutionArguments* next = arguments.data();
  if (program.stem) {
    const Stem& stem = program.stem->stem;
    check_convolution(*next++, x, {stem.out_channels, stem.in_channels, stem.kernel_size, stem.kernel_size});
  }
  for (const PackedUnit& packed : program.units) {
    const Unit& unit = packed.unit;
    check_convolution(*next++, x, {unit.mid_channels, unit.conv1_depth(), 1, 1});
    check_convolution(*next++, x, {unit.mid_channels, 1, 3, 3});
    check_convolution(*next++, x, {unit.out_channels, unit.slice_channels(), 1, 1});
    if (unit.convolves_shortcut()) {
      check_convolution(*next++, x, {unit.in_channels, 1, 3, 3});
      check_convolution(*next++, x, {unit.shortcut_channels, unit.in_channels, 1, 1});
    }
  }
  if (program.last) {
    const LastConvolution& layer = program.last->layer;
    check_convolution(*next++, x, {layer.out_channels, layer.in_channels, 1, 1});
  }
  if (program.head) check_convolution(*next, x, {program.head->head.classes, program.head->head.channels});
}

inline Program read_program(const Tensor& x, const Tensor& weights, const std::vector<int64_t>& program) {
  const Sizes sizes = check_x(x);
  const bool is_float = x.scalar_type() == ScalarType::Float;
  check_like_x("weights", weights, x, is_float ? std::optional(ScalarType::BFloat16) : std::nullopt);
  if (weights.dim() != 1 || !weights.is_contiguous()) {
    fail("weights: got ", shape_of(weights), ", expected one contiguous dimension");
  }
  return ProgramReader(sizes, layout_of(x), weights.numel(), program).read();
}

}  // namespace shufflenet
