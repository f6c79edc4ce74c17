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
  using Key = std::array<int64_t, 14>;
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
      u.shuffle_groups,
      u.shortcut_first,
      u.stride,
      static_cast<int64_t>(u.layout),
      static_cast<int64_t>(dtype),
      device_index};
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  if (plans.size() >= kMost) plans.clear();
  return plans[key] = plan_unit(u, dtype, device_properties(device_index));
}

// A unit's parameters in the device's memory.
struct UnitParameters {
  ConvolutionPointers conv1, conv2, conv3;
};

// Launches the unit by strips. The weights are packed by each call into memory that torch lends: its allocator knows
// that what is freed here is in use until the stream has come so far.
void launch_by_strips(const Unit& unit, const StripPlan& plan, const Tensor& x, const UnitParameters& parameters,
                      Dtype dtype, const Tensor& result, void* stream) {
  const Sizes s = sizes_of(unit);
  const StripLayout layout(s, plan.tiling, unit.layout);
  const int64_t fragments = int64_t{layout.packed.part} * plan.tiling.parts(s);
  const Tensor packed = empty_like_x<1>(x, {fragments * kBlockBytes / element_bytes(dtype)}, {1});
  const PackArguments pack = {
      s,
      plan.tiling.slices,
      layout.packed,
      parameters.conv1,
      parameters.conv2,
      parameters.conv3,
      packed.mutable_data_ptr()};
  const StripArguments arguments = {
      s, plan.tiling, layout, x.const_data_ptr(), packed.const_data_ptr(), result.mutable_data_ptr()};
  launch_strips(pack, arguments, plan, dtype, stream);
}

// Launches the unit on the device of x, in that device's current stream. x must be dense.
void launch_unit(const Unit& unit, const Tensor& x, const UnitParameters& parameters, bool allow_tf32,
                 const Tensor& result) {
  const int32_t device = x.get_device_index();
  Dtype dtype = dtype_of("x", x);
  if (dtype == Dtype::float32 && allow_tf32 && uses_mma(Dtype::tfloat32, device_properties(device))) {
    dtype = Dtype::tfloat32;
  }
  const Plan plan = cached_plan(unit, dtype, device);
  if (!plan.ok) fail("x: no CUDA kernel can be planned for this unit (", plan.explanation, ")");

  const auto address = [](const void* p) { return reinterpret_cast<uint64_t>(p); };
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  if (plan.by_strips && (address(x.const_data_ptr()) | address(result.const_data_ptr())) % 16 == 0) {
    launch_by_strips(unit, plan.strips, x, parameters, dtype, result, stream);
    return;
  }
  KernelArguments kernel = {
      sizes_of(unit),
      plan.tiling,
      SharedLayout(sizes_of(unit), plan.tiling, unit.layout, element_bytes(dtype), accumulator_bytes(dtype)),
      x.const_data_ptr(),
      parameters.conv1,
      parameters.conv2,
      parameters.conv3,
      result.mutable_data_ptr()};
  choose_vectors(
      unit, dtype, kernel.tiling,
      {address(kernel.x), address(kernel.conv1.weight), address(kernel.conv3.weight), address(kernel.result)});
  launch(kernel, dtype, unit.layout, plan.shared_bytes, stream);
}

Tensor run(const UnitArguments& arguments) {
  const Unit unit = check_unit(arguments);
  const torch::stable::accelerator::DeviceGuard guard(arguments.x.get_device_index());
  const CurrentDevice current(arguments.x.get_device_index());
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
  const CurrentDevice current(given_x.get_device_index());
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
// conv3), then conv1_groups, groups, stride and shuffle_groups. Throws std::invalid_argument where they describe none.
Unit unit_of(const std::vector<int64_t>& x, const std::vector<int64_t>& sizes, bool channels_last) {
  const auto positive = [](int64_t n) { return n > 0; };
  const bool has_conv3 = sizes.size() == 12;
  if (x.size() != 4 || x[0] < 0 || !std::all_of(x.begin() + 1, x.end(), positive) ||
      (sizes.size() != 8 && !has_conv3) || !std::all_of(sizes.begin(), sizes.end(), positive)) {
    throw std::invalid_argument("sizes: these are no unit's");
  }
  const int64_t* const options = &sizes[sizes.size() - 4];
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
  unit.shuffle_groups = options[3];
  unit.layout = channels_last ? Layout::channels_last : Layout::contiguous;
  if (unit.stride > 2 || unit.in_channels % unit.conv1_groups != 0 || unit.mid_channels % unit.conv1_groups != 0 ||
      unit.mid_channels % unit.groups != 0 || unit.mid_channels % unit.shuffle_groups != 0 ||
      unit.out_channels % unit.groups != 0) {
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
  const StripPlan& strips = plan.strips;
  const bool by_strips = plan.by_strips;  // windows of all columns, with all of their channels at once
  answer["ok"] = plan.ok;
  answer["explanation"] = by_strips ? strips.explanation : plan.explanation;
  const int64_t width = unit.out_width(), depth = unit.conv1_depth();
  answer["tile_rows"] = by_strips ? strips.tiling.rows : plan.tiling.tile_rows;
  answer["tile_columns"] = by_strips ? width : plan.tiling.tile_columns;
  answer["slices"] = by_strips ? strips.tiling.slices : plan.tiling.slices;
  answer["chunk"] = by_strips ? strips.tiling.slices * unit.slice_channels() : plan.tiling.chunk;
  answer["tile_depth"] = by_strips ? depth : plan.tiling.tile_depth;
  answer["shared_bytes"] = by_strips ? strips.shared_bytes : plan.shared_bytes;
  answer["windows"] = by_strips ? strips.blocks : plan.windows;
  answer["blocks_per_multiprocessor"] = by_strips ? strips.blocks_per_multiprocessor : plan.blocks_per_multiprocessor;
  answer["multiprocessors"] = device.multiprocessors;
  answer["cycles"] = by_strips ? strips.cycles : plan.cycles;
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
  m.attr("cuda_version") = shufflenet::cuda::runtime_version();
  m.def("plan", &shufflenet::cuda::plan, pybind11::arg("x"), pybind11::arg("sizes"), pybind11::arg("channels_last"),
        pybind11::arg("dtype"), pybind11::arg("index") = 0, pybind11::arg("sm") = std::nullopt);
  m.def("driver_version", &shufflenet::cuda::driver_version);
  m.def("device_error", &shufflenet::cuda::device_error, pybind11::arg("index"));
}
