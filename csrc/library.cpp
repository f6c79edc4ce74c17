// The op schemas, and the pybind11 module: what is built in, and which ISA runs. No tensor passes through pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include "cpu/isa/isa.h"
#include "cpu/schedule/phases.h"
#include "cpu/schedule/plan.h"

// Every op of inference ends in allow_tf32, which the Python layer fills from torch's setting: whether float32 tensors
// on CUDA may be multiplied as TF32. It changes nothing else.
STABLE_TORCH_LIBRARY(shufflenet_ext, m) {
  m.def(
      "pointwise_shuffle_depthwise(Tensor x, Tensor conv1_weight, Tensor? conv1_bias, Tensor conv2_weight, "
      "Tensor? conv2_bias, *, int conv1_groups, int shuffle_groups, int stride=1, bool conv2_relu=False, "
      "bool allow_tf32=False) -> Tensor");
  m.def(
      "shuffle_bottleneck(Tensor x, Tensor conv1_weight, Tensor? conv1_bias, Tensor conv2_weight, Tensor? conv2_bias, "
      "Tensor conv3_weight, Tensor? conv3_bias, *, int conv1_groups, int groups, int stride=1, bool conv2_relu=False, "
      "bool pool_count_include_pad=True, int? shuffle_groups=None, bool shortcut_first=False, bool shortcut_relu=True, "
      "bool allow_tf32=False) -> Tensor");
  // A unit of ShuffleNet v2. The shortcut's convolutions are given with stride 2.
  m.def(
      "shuffle_unit_v2(Tensor x, Tensor conv1_weight, Tensor? conv1_bias, Tensor conv2_weight, Tensor? conv2_bias, "
      "Tensor conv3_weight, Tensor? conv3_bias, Tensor? shortcut1_weight=None, Tensor? shortcut1_bias=None, "
      "Tensor? shortcut2_weight=None, Tensor? shortcut2_bias=None, *, int stride=1, int split_groups=1, "
      "int shuffle_groups=2, bool allow_tf32=False) -> Tensor");
  // A network or a part of one, for inference: see program.h. On CUDA, `packed` is what pack_network made of the
  // weights for an x of the same shape, strides and dtype, and the same setting of TF32; without it each call packs
  // them.
  m.def(
      "shuffle_network(Tensor x, Tensor weights, int[] program, *, Tensor? packed=None, bool allow_tf32=False) "
      "-> Tensor");
  m.def("pack_network(Tensor x, Tensor weights, int[] program, *, bool allow_tf32=False) -> Tensor");
  // shuffle_network from a model's own tensors: of each convolution weight and bias, and weight, bias, mean and
  // variance of its batch norm in inference mode; of the linear layer weight and bias. Nothing is folded ahead of a
  // call.
  m.def(
      "shuffle_network_batch_norm(Tensor x, Tensor?[] tensors, float[] eps, int[] program, *, bool allow_tf32=False) "
      "-> Tensor");
  // The unit with its batch norms in inference mode: nothing is folded ahead of a call, so nothing can be stale.
  m.def(
      "shuffle_bottleneck_batch_norm(Tensor x, "
      "Tensor conv1_weight, Tensor? conv1_bias, Tensor? bn1_weight, Tensor? bn1_bias, Tensor bn1_mean, "
      "Tensor bn1_var, "
      "Tensor conv2_weight, Tensor? conv2_bias, Tensor? bn2_weight, Tensor? bn2_bias, Tensor bn2_mean, "
      "Tensor bn2_var, "
      "Tensor conv3_weight, Tensor? conv3_bias, Tensor? bn3_weight, Tensor? bn3_bias, Tensor bn3_mean, "
      "Tensor bn3_var, *, "
      "float bn1_eps, float bn2_eps, float bn3_eps, int conv1_groups, int groups, int stride=1, "
      "bool conv2_relu=False, bool pool_count_include_pad=True, int? shuffle_groups=None, bool shortcut_first=False, "
      "bool shortcut_relu=True, bool allow_tf32=False) -> Tensor");
  // A unit's training step; see cpu/training/unit.cpp.
  m.def(
      "training_unit(Tensor x, Tensor?[] tensors, float[] eps, bool[] of_batch, *, int conv1_groups, int groups, "
      "int stride, bool conv2_relu, bool pool_count_include_pad, int shuffle_groups, bool shortcut_first, "
      "bool shortcut_relu, str processes) -> Tensor[]");
  m.def(
      "training_unit_backward(Tensor gradient, Tensor x, Tensor result, Tensor y1, Tensor y2, Tensor statistics, "
      "Tensor?[] tensors, float[] eps, bool[] of_batch, *, int depth, int conv1_groups, int groups, int stride, "
      "bool conv2_relu, bool pool_count_include_pad, int shuffle_groups, bool shortcut_first, bool shortcut_relu, "
      "str processes) -> Tensor[]");
  // A stem's; see cpu/training/stem.cpp.
  m.def(
      "training_stem(Tensor x, Tensor?[] tensors, float eps, bool of_batch, *, int stride, int padding, bool max_pool, "
      "str processes) -> Tensor[]");
  m.def(
      "training_stem_backward(Tensor gradient, Tensor x, Tensor y, Tensor statistics, Tensor?[] tensors, "
      "bool[] wanted, float eps, bool of_batch, *, int stride, int padding, bool max_pool, "
      "str processes) -> Tensor[]");
}

namespace {

namespace py = pybind11;
using namespace shufflenet;

py::dict to_dict(const cpu::PassDescription& pass) {
  py::list tiles;
  for (const cpu::Tile& tile : pass.tiles) tiles.append(py::make_tuple(tile.channels, tile.vectors));
  return py::dict(py::arg("cut") = pass.cut, py::arg("tiles") = py::tuple(tiles), py::arg("buffer_bytes") = pass.bytes);
}

// Says how shuffle_network would run on x of these sizes with so many elements of weights.
py::dict describe(const Sizes& x, bool channels_last, const std::string& dtype, int64_t weights,
                  const std::string& weights_dtype, const std::vector<int64_t>& program, int64_t threads) {
  const Layout layout = channels_last ? Layout::channels_last : Layout::contiguous;
  const Program read = ProgramReader(x, layout, weights, program).read();
  const cpu::Call call = {nullptr, nullptr, dtype_named(dtype), x[0]};
  const cpu::Description description = cpu::describe_program(read, dtype_named(weights_dtype), call, threads);
  py::list steps;
  for (const cpu::StepDescription& step : description.steps) {
    steps.append(py::dict(
        py::arg("name") = step.name, py::arg("input") = py::tuple(py::cast(step.input)),
        py::arg("output") = py::tuple(py::cast(step.output)), py::arg("multiply_adds") = step.multiply_adds,
        py::arg("weights_and_biases") = step.weights_and_biases, py::arg("alone") = to_dict(step.alone),
        py::arg("shared") = to_dict(step.shared)));
  }
  return py::dict(py::arg("images") = py::dict(
                      py::arg("alone") = description.images.alone, py::arg("shared") = description.images.shared),
                  py::arg("steps") = steps);
}

double measure_peak(const std::string& dtype) { return cpu::measure_peak(dtype_named(dtype)); }

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native library of shufflenet_ext: importing it registers the ops' schemas and CPU kernels.";
  m.attr("torch_version") = SHUFFLENET_EXT_TORCH_VERSION;
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "gcc " __VERSION__;
#endif
  shufflenet::cpu::isa();  // an unusable SHUFFLENET_EXT_CPU_ISA is an error here, not in the first call
  m.def("cpu_isa", [] { return shufflenet::cpu::isa().name(); });
  m.def("cpu_isas", &shufflenet::cpu::usable_isas);
  m.def("describe", &describe, py::arg("x"), py::arg("channels_last"), py::arg("dtype"), py::arg("weights"),
        py::arg("weights_dtype"), py::arg("program"), py::arg("threads"));
  m.def("measure_peak", &measure_peak, py::arg("dtype"), py::call_guard<py::gil_scoped_release>());
  // Between the two calls, the calling thread's ops add up the seconds that each of their steps takes.
  static thread_local shufflenet::cpu::Profile profile;
  m.def("start_profile", [] {
    profile = {};
    shufflenet::cpu::current_profile = &profile;
  });
  m.def("finish_profile", [] {
    shufflenet::cpu::current_profile = nullptr;
    return profile.seconds;
  });
  m.def("select_cpu_isa", &shufflenet::cpu::select_isa, pybind11::arg("isa"));
}
