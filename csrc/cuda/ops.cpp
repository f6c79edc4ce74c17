// The ops on CUDA: they turn tensors into kernels' arguments and launch these in torch's current stream. Also the
// Python module _C_cuda, which says what is built in and how the planner cuts a unit. No tensor passes through
// pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>

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

// How a unit runs.
struct UnitPlan {
  Plan plan;
  std::optional<StripLayout> strips;  // where the unit runs by strips
};

// Returns the unit's plan. Making one takes some microseconds, so each thread keeps those that it has made.
std::shared_ptr<const UnitPlan> cached_plan(const Unit& u, Dtype dtype, int device_index) {
  using Key = std::array<int64_t, 14>;
  constexpr size_t kMost = 256;  // bounds the memory that shapes take which change with every call
  thread_local std::map<Key, std::shared_ptr<const UnitPlan>> plans;
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
  UnitPlan made = {plan_unit(u, dtype, device_properties(device_index)), {}};
  if (made.plan.by_strips) made.strips.emplace(sizes_of(u), made.plan.strips.tiling, u.layout, element_bytes(dtype));
  return plans[key] = std::make_shared<const UnitPlan>(std::move(made));
}

// A unit's parameters in the device's memory.
struct UnitParameters {
  ConvolutionPointers conv1, conv2, conv3;
};

// A unit of a call, and how it is cut.
class PlannedUnit {
 public:
  PlannedUnit(const Unit& unit, const Tensor& x, bool allow_tf32)
      : unit_(unit), sizes_(sizes_of(unit)), device_(x.get_device_index()), dtype_(dtype_of("x", x)) {
    if (dtype_ == Dtype::float32 && allow_tf32 && uses_mma(Dtype::tfloat32, device_properties(device_))) {
      dtype_ = Dtype::tfloat32;
    }
    plan_ = cached_plan(unit, dtype_, device_);
    if (!plan_->plan.ok) fail("x: no CUDA kernel can be planned for this unit (", plan_->plan.explanation, ")");
  }

  // Returns how many elements the packed weights take; none are packed where the unit does not run by strips.
  int64_t packed_elements() const {
    if (!plan_->strips) return 0;
    return plan_->strips->packed.fragments(sizes_, slices()) * kBlockBytes / element_bytes(dtype_);
  }

  // Launches what packs the weights, in the device's current stream.
  void pack(const UnitParameters& parameters, void* packed) const {
    if (!plan_->strips) return;
    const PackArguments arguments = {
        sizes_, slices(), plan_->strips->packed, parameters.conv1, parameters.conv2, parameters.conv3, packed};
    launch_pack(arguments, plan_->plan.strips, dtype_, stream());
  }

  // Launches the unit, in the device's current stream. x must be dense. Where `packed` is null, a unit by strips has
  // its weights packed first, into memory that torch lends: its allocator knows that what is freed here is in use until
  // the stream has come so far.
  void launch(const Tensor& x, const UnitParameters& parameters, const void* packed, const Tensor& result) const {
    const auto address = [](const void* p) { return reinterpret_cast<uint64_t>(p); };
    if (plan_->strips && (address(x.const_data_ptr()) | address(result.const_data_ptr())) % 16 == 0) {
      Tensor own;
      if (packed == nullptr) {
        own = empty_like_x<1>(x, {packed_elements()}, {1});
        pack(parameters, own.mutable_data_ptr());
        packed = own.const_data_ptr();
      }
      const StripPlan& plan = plan_->plan.strips;
      launch_strips({sizes_, plan.tiling, *plan_->strips, x.const_data_ptr(), packed, result.mutable_data_ptr()}, plan,
                    dtype_, stream());
      return;
    }
    const Plan& plan = plan_->plan;
    KernelArguments kernel = {
        sizes_,
        plan.tiling,
        SharedLayout(sizes_, plan.tiling, unit_.layout, element_bytes(dtype_), accumulator_bytes(dtype_)),
        x.const_data_ptr(),
        parameters.conv1,
        parameters.conv2,
        parameters.conv3,
        result.mutable_data_ptr()};
    choose_vectors(
        unit_, dtype_, kernel.tiling,
        {address(kernel.x), address(kernel.conv1.weight), address(kernel.conv3.weight), address(kernel.result)});
    cuda::launch(kernel, dtype_, unit_.layout, plan.shared_bytes, stream());
  }

 private:
  int slices() const { return plan_->plan.strips.tiling.slices; }
  void* stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return stream;
  }

  Unit unit_;
  Sizes sizes_;
  int32_t device_;
  Dtype dtype_;
  std::shared_ptr<const UnitPlan> plan_;
};

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
  const UnitParameters parameters = {conv1.pointers, conv2.pointers, conv3 ? conv3->pointers : ConvolutionPointers{}};
  PlannedUnit(unit, x, arguments.allow_tf32).launch(x, parameters, nullptr, result);
  return result;
}

// Units one behind the other, whose weights lie in one tensor, for a batch.
class Units {
 public:
  Units(const Tensor& x, const Tensor& weights, const Program& program, bool allow_tf32) : weights_(weights) {
    if (program.stem || program.head) fail("program: got a ", program.stem ? "stem" : "head", ", expected units only");
    if (program.last || program.is_v2()) fail("program: got a step of ShuffleNet v2, expected units of v1 (on CUDA)");
    if (weights.scalar_type() != x.scalar_type()) {
      fail("weights: got dtype ", dtype_name(weights.scalar_type()), ", expected x's, ", dtype_name(x.scalar_type()),
           " (on CUDA)");
    }
    for (const PackedUnit& packed : program.units) {
      Unit unit = packed.unit;  // its batch is 1
      unit.batch = x.size(0);
      units_.push_back({unit, {pointers(packed.conv1), pointers(packed.conv2), pointers(packed.conv3)}, {}, 0});
      if (unit.batch == 0) continue;
      units_.back().planned.emplace(unit, x, allow_tf32);
      units_.back().at = packed_elements_;
      packed_elements_ += units_.back().planned->packed_elements();
    }
  }

  // Returns the packed weights of all units, one behind the other.
  Tensor pack(const Tensor& x) const {
    const Tensor packed = empty_like_x<1>(x, {packed_elements_}, {1});
    for (const Step& unit : units_) {
      if (unit.planned) unit.planned->pack(unit.parameters, const_cast<void*>(packed_of(unit, packed)));
    }
    return packed;
  }

  // Launches the units.
  Tensor run(Tensor x, const std::optional<Tensor>& packed) const {
    if (packed) check(*packed);
    for (const Step& unit : units_) {
      const Tensor result = empty_result(x, unit.unit);
      if (unit.planned) {
        unit.planned->launch(x, unit.parameters, packed ? packed_of(unit, *packed) : nullptr, result);
      }
      x = result;
    }
    return x;
  }

 private:
  struct Step {
    Unit unit;
    UnitParameters parameters;
    std::optional<PlannedUnit> planned;  // none of an empty batch
    int64_t at;                          // where its packed weights begin
  };

  ConvolutionPointers pointers(const PackedConvolution& packed) const {
    const char* const data = static_cast<const char*>(weights_.const_data_ptr());
    const int64_t bytes = static_cast<int64_t>(weights_.element_size());
    ConvolutionPointers convolution;
    convolution.weight = data + packed.weight * bytes;
    convolution.bias = {data + packed.bias * bytes, weights_.scalar_type() == ScalarType::Float};
    return convolution;
  }

  static const void* packed_of(const Step& unit, const Tensor& packed) {
    return static_cast<const char*>(packed.const_data_ptr()) + unit.at * static_cast<int64_t>(packed.element_size());
  }

  void check(const Tensor& packed) const {
    check_like_x("packed", packed, weights_);  // whose dtype is x's
    check_shape("packed", packed, {packed_elements_});
    if (!packed.is_contiguous()) fail("packed: got a tensor with gaps, expected a contiguous one");
    const auto beyond = reinterpret_cast<uint64_t>(packed.const_data_ptr()) % kBlockBytes;
    if (beyond != 0)
      fail("packed: got an address ", beyond, " bytes behind a multiple of ", kBlockBytes, ", expected one");
  }

  Tensor weights_;
  std::vector<Step> units_;
  int64_t packed_elements_ = 0;
};

// Runs the units of a program, each as a launch of its own, or as two where its weights are not packed ahead.
Tensor run_program(const Tensor& x, const Tensor& weights, const Program& program, const std::optional<Tensor>& packed,
                   bool allow_tf32) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const CurrentDevice current(x.get_device_index());
  return Units(x, weights, program, allow_tf32).run(dense(x, program.layout), packed);
}

// Packs the weights of a program's units as calls with an x of this shape, strides and dtype read them.
Tensor pack_network(Tensor x, Tensor weights, std::vector<int64_t> program, bool allow_tf32) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const CurrentDevice current(x.get_device_index());
  return Units(x, weights, read_program(x, weights, program), allow_tf32).pack(x);
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
  m.impl("pack_network", TORCH_BOX(&shufflenet::cuda::pack_network));
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
