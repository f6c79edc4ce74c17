// Runs the CUDA kernels without torch: `driver check | time | copy | once`. Reads cases from standard input, one a line
// (tests/cuda/case.h), and answers each with a line of JSON.
//
//   check  compares a unit with the naive one, on random data, its result poisoned and guarded on both sides
//   time   times launches over rotating buffers in a CUDA graph, together larger than the L2 cache
//   copy   times copies of as many bytes as the unit has in its input, result and parameters, likewise
//   once   launches the unit once, for a profiler
//
// A case may cut the unit otherwise than the planner would: into windows by `tile_rows`, `slices` and `tile_depth`, or
// into strips by `rows`, `slices`, `warps` and `gap`.
#include <algorithm>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>

#include "card.h"
#include "case.h"
#include "kernels.h"
#include "naive_unit.h"

namespace shufflenet::cuda {
namespace {

constexpr int64_t kGuard = 4096;  // bytes on each side of a result that nothing may write to
constexpr int kPoison = 0xff;     // a NaN in every dtype
constexpr int kReplays = 7;       // of which the median is taken

std::string quoted(const std::string& text) {
  std::string escaped;
  for (char c : text) {
    if (c == '"' || c == '\\') escaped += '\\';
    escaped += c == '\n' ? ' ' : c;
  }
  return '"' + escaped + '"';
}

// Cuts a case's unit into the windows that the case names.
void cut_windows(const Case& c, const Unit& unit, const Device& device, Plan& plan) {
  Tiling& t = plan.tiling;
  t.tile_rows = static_cast<int>(c.number("tile_rows", 0));
  t.tile_columns = static_cast<int>(unit.out_width());
  t.slices = static_cast<int>(c.number("slices", 0));
  t.chunk = static_cast<int>(unit.slice_channels()) * t.slices;
  t.tile_depth = static_cast<int>(c.number("tile_depth", 0));
  const int element = element_bytes(c.dtype()), accumulator = accumulator_bytes(c.dtype());
  const SharedLayout layout(sizes_of(unit), t, unit.layout, element, accumulator);
  plan.by_strips = false;
  plan.shared_bytes = layout.bytes;
  plan.windows = t.windows(sizes_of(unit));
  plan.blocks_per_multiprocessor = blocks_per_multiprocessor(layout.bytes, accumulator, device);
  plan.cycles = predicted_cycles(unit, t, c.dtype(), device, plan.blocks_per_multiprocessor, layout);
}

// Cuts a case's unit into the strips that the case names. Throws std::runtime_error where the kernel has fewer warps.
void cut_strips(const Case& c, const Unit& unit, const Device& device, StripPlan& plan) {
  StripTiling t;
  t.rows = static_cast<int>(c.number("rows", 0));
  t.slices = static_cast<int>(c.number("slices", 0));
  t.warps = static_cast<int>(c.number("warps", 0));
  t.gap = static_cast<int>(c.number("gap", 0));
  const int most = most_strip_warps(device.compute_capability, unit.layout);
  if (t.warps > most) {
    throw std::runtime_error(
        "does not fit: " + std::to_string(t.warps) + " warps, a block has " + std::to_string(most));
  }
  plan = plan_of(unit, t, StripLayout(sizes_of(unit), t, unit.layout, element_bytes(c.dtype())), device);
}

// Cuts a case's unit as the planner does, or as the case says. Throws std::runtime_error where that does not fit.
Plan cut(const Case& c) {
  const Device& device = device_properties(0);
  const Unit unit = c.unit();
  Plan plan = plan_unit(unit, c.dtype(), device);
  if (!plan.ok) throw std::runtime_error(plan.explanation);
  if (c.values.count("tile_rows")) {
    cut_windows(c, unit, device, plan);
  } else if (c.values.count("rows")) {
    if (!plan.strips.ok) throw std::runtime_error("does not fit: " + plan.strips.explanation);
    plan.by_strips = true;
    cut_strips(c, unit, device, plan.strips);
  }
  const int64_t bytes = plan.by_strips ? plan.strips.shared_bytes : plan.shared_bytes;
  if (bytes > device.shared_per_block) {
    throw std::runtime_error("does not fit: " + std::to_string(bytes) + " bytes of shared memory");
  }
  return plan;
}

std::string described(const Plan& plan) {
  std::ostringstream text;
  if (plan.by_strips) {
    const StripTiling& t = plan.strips.tiling;
    text << "\"rows\": " << t.rows << ", \"slices\": " << t.slices << ", \"warps\": " << t.warps
         << ", \"gap\": " << t.gap << ", \"shared_bytes\": " << plan.strips.shared_bytes
         << ", \"windows\": " << plan.strips.blocks << ", \"blocks\": " << plan.strips.blocks_per_multiprocessor
         << ", \"instructions\": " << plan.strips.instructions << ", \"cycles\": " << plan.strips.cycles;
    return text.str();
  }
  const Tiling& t = plan.tiling;
  text << "\"tile_rows\": " << t.tile_rows << ", \"slices\": " << t.slices << ", \"tile_depth\": " << t.tile_depth
       << ", \"shared_bytes\": " << plan.shared_bytes << ", \"windows\": " << plan.windows
       << ", \"blocks\": " << plan.blocks_per_multiprocessor << ", \"cycles\": " << plan.cycles;
  return text.str();
}

// A convolution's parameters in the card's memory.
template <class T, class Norm>
class CardConvolution {
 public:
  explicit CardConvolution(const TestConvolution<T, Norm>& host) : pointers(host.pointers) {
    pointers.weight = keep(host.weight_data, host.pointers.weight);
    pointers.bias.data = keep(host.bias, host.pointers.bias.data);
    pointers.norm_weight.data = keep(host.gamma, host.pointers.norm_weight.data);
    pointers.norm_bias.data = keep(host.beta, host.pointers.norm_bias.data);
    pointers.norm_mean.data = keep(host.mean, host.pointers.norm_mean.data);
    pointers.norm_var.data = keep(host.var, host.pointers.norm_var.data);
  }

  ConvolutionPointers pointers;

 private:
  template <class U>
  const void* keep(const Buffer<U>& buffer, const void* used) {
    if (used == nullptr) return nullptr;
    const int64_t bytes = buffer.size * static_cast<int64_t>(sizeof(U));
    kept_.push_back(std::make_unique<card::Memory>(bytes));
    kept_.back()->write(0, buffer.data, bytes);
    return kept_.back()->data;
  }

  std::vector<std::unique_ptr<card::Memory>> kept_;
};

// A case's unit on the card, with its parameters there, packed ahead where it runs by strips. `problem` may have
// another batch.
template <class T, class Norm>
class CardUnit {
 public:
  CardUnit(const Case& c, const Problem<T, Norm>& problem)
      : plan(cut(c)), dtype_(c.dtype()), unit_(c.unit()), conv1_(problem.conv1), conv2_(problem.conv2) {
    if (problem.conv3) conv3_.reset(new CardConvolution<T, Norm>(*problem.conv3));
    if (!plan.by_strips) return;
    const Sizes sizes = sizes_of(unit_);
    const StripLayout layout(sizes, plan.strips.tiling, unit_.layout, element_bytes(dtype_));
    const int slices = plan.strips.tiling.slices;
    packed_ = std::make_unique<card::Memory>(layout.packed.fragments(sizes, slices) * kBlockBytes);
    card::run([&](void* stream) {
      launch_pack({sizes, slices, layout.packed, conv1_.pointers, conv2_.pointers, conv3(), packed_->data}, plan.strips,
                  dtype_, stream);
    });
  }

  void launch(const void* x, void* result, void* stream) const {
    const Sizes sizes = sizes_of(unit_);
    const auto address = [](const void* p) { return reinterpret_cast<uint64_t>(p); };
    if (packed_ && (address(x) | address(result)) % 16 == 0) {  // as ops.cpp does
      const StripLayout layout(sizes, plan.strips.tiling, unit_.layout, element_bytes(dtype_));
      launch_strips({sizes, plan.strips.tiling, layout, x, packed_->data, result}, plan.strips, dtype_, stream);
      return;
    }
    Tiling tiling = plan.tiling;
    choose_vectors(
        unit_, dtype_, tiling, {address(x), address(conv1_.pointers.weight), address(conv3().weight), address(result)});
    const SharedLayout layout(sizes, tiling, unit_.layout, element_bytes(dtype_), accumulator_bytes(dtype_));
    cuda::launch({sizes, tiling, layout, x, conv1_.pointers, conv2_.pointers, conv3(), result}, dtype_, unit_.layout,
                 plan.shared_bytes, stream);
  }

  Plan plan;

 private:
  ConvolutionPointers conv3() const { return conv3_ ? conv3_->pointers : ConvolutionPointers{}; }

  Dtype dtype_;
  Unit unit_;
  CardConvolution<T, Norm> conv1_, conv2_;
  std::unique_ptr<CardConvolution<T, Norm>> conv3_;
  std::unique_ptr<card::Memory> packed_;  // weights, where the unit is cut into strips
};

template <class T, class Norm>
std::string check(const Case& c) {
  Problem<T, Norm> problem(c);
  const CardUnit<T, Norm> unit(c, problem);
  const int64_t shift = c.number("shift", 0) * static_cast<int64_t>(sizeof(T));
  const int64_t x_bytes = problem.x.size * static_cast<int64_t>(sizeof(T));
  const int64_t result_bytes = problem.result_elements() * static_cast<int64_t>(sizeof(T));
  card::Memory x(x_bytes + shift), result(kGuard + shift + result_bytes + kGuard);
  x.write(shift, problem.x.data, x_bytes);
  result.fill(kPoison);
  card::run([&](void* stream) { unit.launch(x.data + shift, result.data + kGuard + shift, stream); });
  const std::vector<char> bytes = result.read();
  const char* const begin = bytes.data() + kGuard + shift;
  const auto is_poison = [](char byte) { return byte == static_cast<char>(kPoison); };
  const bool is_guarded = std::all_of(bytes.data(), begin, is_poison) &&
                          std::all_of(begin + result_bytes, bytes.data() + bytes.size(), is_poison);
  std::vector<T> values(static_cast<size_t>(problem.result_elements()));
  std::memcpy(values.data(), begin, static_cast<size_t>(result_bytes));
  const Difference difference = problem.compare(values.data());
  std::ostringstream answer;
  answer << "\"ok\": " << (difference.is_small() && is_guarded ? "true" : "false")
         << ", \"units\": " << difference.units << ", \"where\": "
         << quoted(is_guarded ? difference.where : "written outside of the result") << ", " << described(unit.plan);
  return answer.str();
}

std::string timed(const std::vector<double>& seconds, int64_t launches, int64_t bytes) {
  std::vector<double> sorted = seconds;
  std::sort(sorted.begin(), sorted.end());
  const double to_us = 1e6 / static_cast<double>(launches);
  std::ostringstream answer;
  answer << "\"ok\": true, \"us\": " << sorted[sorted.size() / 2] * to_us << ", \"least_us\": " << sorted[0] * to_us
         << ", \"bytes\": " << bytes << ", \"launches\": " << launches;
  return answer.str();
}

// How many sets of buffers of so many bytes do not fit into the L2 cache together, by far, and how many launches rotate
// over them.
struct Rotation {
  explicit Rotation(int64_t bytes)
      : sets(std::min(kMost, std::max(kLeast, 2 * card::l2_bytes() / bytes + 1))),
        launches(std::max(sets, card::least_launches())) {}
  static constexpr int64_t kLeast = 2, kMost = 512;
  int64_t sets, launches;
};

// What a launch of a case has to move, at least: its input, its result and its parameters once each. Images are alike,
// so that one is drawn.
template <class T, class Norm>
struct Traffic {
  explicit Traffic(const Case& c) : problem(of_one_image(c)) {
    const int64_t images = c.number("n", 1);
    int64_t parameters = problem.conv1.weight.size() + problem.conv2.weight.size();
    if (problem.conv3) parameters += problem.conv3->weight.size();
    parameters += 2 * problem.sizes.mid_channels + problem.sizes.out_channels;  // biases
    image_bytes = problem.x.size * kElement;
    x_bytes = images * image_bytes;
    result_bytes = images * problem.result_elements() * kElement;
    bytes = x_bytes + result_bytes + parameters * kElement;
  }

  static Case of_one_image(Case c) {
    c.values["n"] = "1";
    return c;
  }

  static constexpr int64_t kElement = sizeof(T);
  Problem<T, Norm> problem;
  int64_t image_bytes, x_bytes, result_bytes, bytes;
};

template <class T, class Norm>
std::string time_launches(const Case& c) {
  const Traffic<T, Norm> traffic(c);
  const CardUnit<T, Norm> unit(c, traffic.problem);
  const Rotation rotation(traffic.bytes);
  const int64_t x_step = round_up(traffic.x_bytes, 256), result_step = round_up(traffic.result_bytes, 256);
  const card::Memory result(rotation.sets * result_step);
  card::Memory x(rotation.sets * x_step);
  for (int64_t at = 0; at < traffic.x_bytes; at += traffic.image_bytes) {
    x.write(at, traffic.problem.x.data, traffic.image_bytes);
  }
  card::run([&](void* stream) {
    for (int64_t set = 1; set < rotation.sets; ++set) {
      card::copy(x.data + set * x_step, x.data, traffic.x_bytes, stream);
    }
  });
  const card::Work work = [&](void* stream) {
    for (int64_t i = 0; i < rotation.launches; ++i) {
      const int64_t set = i % rotation.sets;
      unit.launch(x.data + set * x_step, result.data + set * result_step, stream);
    }
  };
  return timed(card::time(work, kReplays), rotation.launches, traffic.bytes) + ", " + described(unit.plan);
}

template <class T, class Norm>
std::string time_copies(const Case& c) {
  const Traffic<T, Norm> traffic(c);
  const Rotation rotation(traffic.bytes);
  const int64_t half = traffic.bytes / 2, step = round_up(half, 256);
  card::Memory from(rotation.sets * step);
  const card::Memory to(rotation.sets * step);
  from.fill(0);
  const card::Work copies = [&](void* stream) {
    for (int64_t i = 0; i < rotation.launches; ++i) {
      const int64_t at = i % rotation.sets * step;
      card::copy(to.data + at, from.data + at, half, stream);
    }
  };
  return timed(card::time(copies, kReplays), rotation.launches, traffic.bytes);
}

template <class T, class Norm>
std::string launch_once(const Case& c) {
  const Traffic<T, Norm> traffic(c);
  const CardUnit<T, Norm> unit(c, traffic.problem);
  card::Memory x(traffic.x_bytes);
  const card::Memory result(traffic.result_bytes);
  for (int64_t at = 0; at < x.bytes; at += traffic.image_bytes) {
    x.write(at, traffic.problem.x.data, traffic.image_bytes);
  }
  card::run([&](void* stream) { unit.launch(x.data, result.data, stream); });
  return "\"ok\": true, " + described(unit.plan);
}

template <class T, class Norm = T>
std::string answer(const std::string& mode, const Case& c) {
  if (mode == "check") return check<T, Norm>(c);
  if (mode == "time") return time_launches<T, Norm>(c);
  if (mode == "copy") return time_copies<T, Norm>(c);
  if (mode == "once") return launch_once<T, Norm>(c);
  throw std::runtime_error("mode: got " + mode + ", expected check, time, copy or once");
}

// Norms have the dtype that they have in practice: float32 beside float32 and bfloat16.
std::string answer(const std::string& mode, const std::string& line) {
  const Case c(line);
  switch (c.dtype()) {
    case Dtype::float64: return answer<double>(mode, c);
    case Dtype::bfloat16: return answer<BFloat16, float>(mode, c);
    case Dtype::float16: return answer<Float16>(mode, c);
    case Dtype::tfloat32: return answer<TFloat32, float>(mode, c);
    default: return answer<float>(mode, c);
  }
}

}  // namespace
}  // namespace shufflenet::cuda

int main(int count, char** arguments) {
  using namespace shufflenet::cuda;
  const std::string mode = count > 1 ? arguments[1] : "";
  for (std::string line; std::getline(std::cin, line);) {
    std::string said;
    bool is_usable = true;
    try {
      said = answer(mode, line);
    } catch (const std::exception& error) {
      said = "\"ok\": false, \"what\": " + quoted(error.what());
      try {  // An error of a kernel stays with the process: no launch succeeds behind it.
        card::run([](void*) {});
      } catch (const std::exception&) {
        is_usable = false;
      }
    }
    std::cout << "{\"case\": " << quoted(line) << ", " << said << "}" << std::endl;
    if (!is_usable) return 3;
  }
}
