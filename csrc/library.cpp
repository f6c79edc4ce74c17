// The op schemas, and the pybind11 module: what is built in, and which ISA runs. No tensor passes through pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include "cpu/kernels.h"

// Every op ends in allow_tf32, which the Python layer fills from torch's setting: whether float32 tensors on CUDA may
// be multiplied as TF32. It changes nothing else.
STABLE_TORCH_LIBRARY(shufflenet_ext, m) {
  m.def(
      "pointwise_shuffle_depthwise(Tensor x, Tensor conv1_weight, Tensor? conv1_bias, Tensor conv2_weight, "
      "Tensor? conv2_bias, *, int conv1_groups, int shuffle_groups, int stride=1, bool conv2_relu=False, "
      "bool allow_tf32=False) -> Tensor");
  m.def(
      "shuffle_bottleneck(Tensor x, Tensor conv1_weight, Tensor? conv1_bias, Tensor conv2_weight, Tensor? conv2_bias, "
      "Tensor conv3_weight, Tensor? conv3_bias, *, int conv1_groups, int groups, int stride=1, bool conv2_relu=False, "
      "bool pool_count_include_pad=True, bool allow_tf32=False) -> Tensor");
  // Units one behind the other, for inference. Of each unit: conv1's, conv2's and conv3's weight and bias;
  // conv1_groups, groups, stride, conv2_relu and pool_count_include_pad.
  m.def("shuffle_bottleneck_chain(Tensor x, Tensor[] parameters, int[] options, *, bool allow_tf32=False) -> Tensor");
  // The unit with its batch norms in inference mode: nothing is folded ahead of a call, so nothing can be stale.
  m.def(
      "shuffle_bottleneck_batch_norm(Tensor x, "
      "Tensor conv1_weight, Tensor bn1_weight, Tensor bn1_bias, Tensor bn1_mean, Tensor bn1_var, "
      "Tensor conv2_weight, Tensor bn2_weight, Tensor bn2_bias, Tensor bn2_mean, Tensor bn2_var, "
      "Tensor conv3_weight, Tensor bn3_weight, Tensor bn3_bias, Tensor bn3_mean, Tensor bn3_var, *, "
      "float bn1_eps, float bn2_eps, float bn3_eps, int conv1_groups, int groups, int stride=1, "
      "bool conv2_relu=False, bool pool_count_include_pad=True, bool allow_tf32=False) -> Tensor");
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native library of shufflenet_ext: importing it registers the ops' schemas and CPU kernels.";
  m.attr("torch_version") = SHUFFLENET_EXT_TORCH_VERSION;
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "gcc " __VERSION__;
#endif
  shufflenet::cpu::isa();  // an unusable SHUFFLENET_EXT_CPU_ISA is an error here, not in the first call
  m.def("cpu_isa", [] { return shufflenet::cpu::isa().name; });
  m.def("cpu_isas", &shufflenet::cpu::usable_isas);
  m.def("select_cpu_isa", &shufflenet::cpu::select_isa, pybind11::arg("isa"));
}
