// The ops on CUDA: they turn tensors into KernelArguments and launch one kernel in torch's current stream. Also the
// Python module _C_cuda, which says what is built in and how the planner cuts a unit. No tensor passes through
// pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <array>
#include <map>

#include "../ops.h"
#include "kernels.h"

namespace shufflenet::cuda {
namespace {

// Holds the tensors that the kernel reads of a convolution: the arguments, or contiguous copies of those that are not.
class ConvolutionData {
 public:
  explicit ConvolutionData(const ConvolutionArguments& conv) {
    pointers.weight = keep(conv.weight).data;
    if (conv.bias) pointers.bias = keep(*conv.bias);
    if (!conv.norm) return;
    if (conv.norm->weight) pointers.norm_weight = keep(*conv.norm->weight);
    if (conv.norm->bias) pointers.norm_bias = keep(*conv.norm->bias);
    pointers.norm_mean = keep(conv.norm->running_mean);
    pointers.norm_var = keep(conv.norm->running_var);
    pointers.eps = conv.norm->eps;
  }

  ConvolutionPointers pointers;

 private:
  Parameter keep(const Tensor& tensor) {
    kept_.push_back(torch::stable::contiguous(tensor));
    return {kept_.back().const_data_ptr(), tensor.scalar_type() == ScalarType::Float};
  }

  std::vector<Tensor> kept_;
};

// Returns the unit's plan. Making one takes some microseconds, so each thread keeps those that it has made.
Plan cached_plan(const Unit& u, Dtype dtype, int device_index) {
  using Key = std::array<int64_t, 12>;
  constexpr size_t kMost = 256;  // bounds the memory that shapes take which change with every call
  thread_local std::map<Key, Plan> plans;
  const Key key = {
      u.batch,
      u.in_channels,
      u.height,
      u.width,
      u.mid_channels,
      u.out_channels,
      u.conv1_groups,
      u.groups,
      u.stride,
      static_cast<int64_t>(u.layout),
      static_cast<int64_t>(dtype),
      device_index};
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  if (plans.size() >= kMost) plans.clear();
  return plans[key] = plan_unit(u, dtype, device_properties(device_index));
}

// Refuses what the kernel does not know of a unit in general.
void check_is_plain(const Unit& unit) {
  const bool is_shuffled = unit.shuffle_groups != unit.groups;
  if (!is_shuffled && !(unit.concatenates_pool() && (unit.shortcut_first || !unit.shortcut_relu))) return;
  fail(is_shuffled           ? "shuffle_groups"
       : unit.shortcut_first ? "shortcut_first"
                             : "shortcut_relu",
       ": got a unit that is not the paper's, expected that one (on CUDA)");
}

// A unit's parameters in the device's memory.
struct UnitParameters {
  ConvolutionPointers conv1, conv2, conv3;
};

// Launches the unit on the device of x, in that device's current stream. x must be dense.
void launch_unit(const Unit& unit, const Tensor& x, const UnitParameters& parameters, bool allow_tf32,
                 const Tensor& result) {
  check_is_plain(unit);
  const int32_t device = x.get_device_index();
  Dtype dtype = dtype_of("x", x);
  if (dtype == Dtype::float32 && allow_tf32 && uses_mma(Dtype::tfloat32, device_properties(device))) {
    dtype = Dtype::tfloat32;
  }
  const Plan plan = cached_plan(unit, dtype, device);
  if (!plan.ok) fail("x: no CUDA kernel can be planned for this unit (", plan.explanation, ")");

  KernelArguments kernel = {
      sizes_of(unit),
      plan.tiling,
      SharedLayout(sizes_of(unit), plan.tiling, unit.layout, element_bytes(dtype), accumulator_bytes(dtype)),
      x.const_data_ptr(),
      parameters.conv1,
      parameters.conv2,
      parameters.conv3,
      result.mutable_data_ptr()};
  const auto address = [](const void* p) { return reinterpret_cast<uint64_t>(p); };
  choose_vectors(
      unit, dtype, kernel.tiling,
      {address(kernel.x), address(kernel.conv1.weight), address(kernel.conv3.weight), address(kernel.result)});
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  launch(kernel, dtype, unit.layout, plan.shared_bytes, stream);
}

Tensor run(const UnitArguments& arguments) {
  const Unit unit = check_unit(arguments);
  const torch::stable::accelerator::DeviceGuard guard(arguments.x.get_device_index());
  const Tensor x = dense(arguments.x, unit.layout);
  const Tensor result = empty_result(x, unit);
  if (unit.batch == 0) return result;
  const ConvolutionData conv1(arguments.conv1), conv2(arguments.conv2);
  std::optional<ConvolutionData> conv3;
  if (arguments.conv3) conv3.emplace(*arguments.conv3);
  launch_unit(unit, x, {conv1.pointers, conv2.pointers, conv3 ? conv3->pointers : ConvolutionPointers{}},
              arguments.allow_tf32, result);
  return result;
}

// Runs the units of a program, each as a launch of its own.
Tensor run_program(const Tensor& given_x, const Tensor& weights, const Program& program, bool allow_tf32) {
  if (program.stem || program.head) fail("program: got a ", program.stem ? "stem" : "head", ", expected units only");
  if (program.last || program.is_v2()) fail("program: got a step of ShuffleNet v2, expected units of v1 (on CUDA)");
  if (weights.scalar_type() != given_x.scalar_type()) {
    fail("weights: got dtype ", dtype_name(weights.scalar_type()), ", expected x's, ",
         dtype_name(given_x.scalar_type()), " (on CUDA)");
  }
  const torch::stable::accelerator::DeviceGuard guard(given_x.get_device_index());
  const char* const data = static_cast<const char*>(weights.const_data_ptr());
  const auto pointers = [&](const PackedConvolution& packed) {
    const int64_t bytes = static_cast<int64_t>(weights.element_size());
    ConvolutionPointers convolution;
    convolution.weight = data + packed.weight * bytes;
    convolution.bias = {data + packed.bias * bytes, weights.scalar_type() == ScalarType::Float};
    return convolution;
  };
  Tensor x = dense(given_x, program.layout);
  for (const PackedUnit& packed : program.units) {
    Unit unit = packed.unit;  // its batch is 1
    unit.batch = x.size(0);
    const Tensor result = empty_result(x, unit);
    if (unit.batch > 0) {
      launch_unit(
          unit, x, {pointers(packed.conv1), pointers(packed.conv2), pointers(packed.conv3)}, allow_tf32, result);
    }
    x = result;
  }
  return x;
}

// Returns the unit that `sizes` describes: the shape of conv1's weight, that of conv3's (left out where the unit has no
// conv3), then conv1_groups, groups and stride. Throws std::invalid_argument where they describe none.
Unit unit_of(const std::vector<int64_t>& x, const std::vector<int64_t>& sizes, bool channels_last) {
  const auto positive = [](int64_t n) { return n > 0; };
  const bool has_conv3 = sizes.size() == 11;
  if (x.size() != 4 || x[0] < 0 || !std::all_of(x.begin() + 1, x.end(), positive) ||
      (sizes.size() != 7 && !has_conv3) || !std::all_of(sizes.begin(), sizes.end(), positive)) {
    throw std::invalid_argument("sizes: these are no unit's");
  }
  const int64_t* const options = &sizes[sizes.size() - 3];
  Unit unit;
  unit.batch = x[0];
  unit.in_channels = x[1];
  unit.height = x[2];
  unit.width = x[3];
  unit.mid_channels = sizes[0];
  unit.out_channels = has_conv3 ? sizes[4] : 0;
  unit.conv1_groups = options[0];
  unit.groups = options[1];
  unit.stride = options[2];
  unit.layout = channels_last ? Layout::channels_last : Layout::contiguous;
  if (unit.stride > 2 || unit.in_channels % unit.conv1_groups != 0 || unit.mid_channels % unit.conv1_groups != 0 ||
      unit.mid_channels % unit.groups != 0 || unit.out_channels % unit.groups != 0) {
    throw std::invalid_argument("sizes: these are no unit's");
  }
  return unit;
}

// Returns a card of this compute capability, which need not be in this machine. Throws std::invalid_argument where the
// planner knows none.
Device named_device(int sm) {
  const Device device = device_of(sm);
  if (device.compute_capability != 0) return device;
  std::string known;
  for (int other = 0; other < 1000; ++other) {
    if (device_of(other).compute_capability != 0) known += (known.empty() ? "" : ", ") + std::to_string(other);
  }
  throw std::invalid_argument("sm: got " + std::to_string(sm) + ", expected one of " + known);
}

// Says how a unit is cut on the device of this index or, where `sm` is given, on a card of that compute capability.
// Throws std::invalid_argument where the sizes describe no unit.
pybind11::dict plan(const std::vector<int64_t>& x, const std::vector<int64_t>& sizes, bool channels_last,
                    const std::string& dtype, int index, std::optional<int> sm) {
  const Unit unit = unit_of(x, sizes, channels_last);
  const Device device = sm ? named_device(*sm) : device_properties(index);
  const Plan plan = plan_unit(unit, dtype_named(dtype), device);
  pybind11::dict answer;
  answer["ok"] = plan.ok;
  answer["explanation"] = plan.explanation;
  answer["tile_rows"] = plan.tiling.tile_rows;
  answer["tile_columns"] = plan.tiling.tile_columns;
  answer["slices"] = plan.tiling.slices;
  answer["chunk"] = plan.tiling.chunk;
  answer["tile_depth"] = plan.tiling.tile_depth;
  answer["shared_bytes"] = plan.shared_bytes;
  answer["windows"] = plan.windows;
  answer["blocks_per_multiprocessor"] = plan.blocks_per_multiprocessor;
  answer["multiprocessors"] = device.multiprocessors;
  answer["cycles"] = plan.cycles;
  answer["result_shape"] =
      pybind11::make_tuple(unit.batch, unit.result_channels(), unit.out_height(), unit.out_width());
  return answer;
}

}  // namespace
}  // namespace shufflenet::cuda

STABLE_TORCH_LIBRARY_IMPL(shufflenet_ext, CUDA, m) {
  shufflenet::Ops<shufflenet::cuda::run, shufflenet::cuda::run_program>::implement(m);
}

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA library of shufflenet_ext: importing it registers the ops' CUDA kernels.";
  m.attr("cuda_archs") = SHUFFLENET_EXT_CUDA_ARCHS;
  m.def("plan", &shufflenet::cuda::plan, pybind11::arg("x"), pybind11::arg("sizes"), pybind11::arg("channels_last"),
        pybind11::arg("dtype"), pybind11::arg("index") = 0, pybind11::arg("sm") = std::nullopt);
  m.def("device_error", &shufflenet::cuda::device_error, pybind11::arg("index"));
}
