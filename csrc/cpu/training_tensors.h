// What the passes of training ask of their tensors, and how they share tasks.
#pragma once

#include "../arguments.h"
#include "schedule/step.h"

namespace shufflenet::cpu {

inline void check_float(const char* name, const Tensor& tensor, ScalarType type) {
  if (tensor.scalar_type() != type || !tensor.is_cpu()) {
    fail(name, ": got dtype ", dtype_name(tensor.scalar_type()), tensor.is_cpu() ? "" : " on another device",
         ", expected ", dtype_name(type), " on the CPU");
  }
}

// A contiguous array of these sizes.
inline const char* array(const char* name, const Tensor& tensor, ScalarType type, const std::vector<int64_t>& sizes) {
  check_shape(name, tensor, sizes);
  check_float(name, tensor, type);
  if (!tensor.is_contiguous()) fail(name, ": got a tensor that is not contiguous, expected a contiguous one");
  return static_cast<const char*>(tensor.const_data_ptr());
}
inline double* doubles(const char* name, const Tensor& tensor, const std::vector<int64_t>& sizes) {
  return const_cast<double*>(reinterpret_cast<const double*>(array(name, tensor, ScalarType::Double, sizes)));
}

// Shares tasks among torch's threads.
template <class Run>
void each_task(int64_t tasks, const Run& run) {
  torch::stable::parallel_for(0, tasks, 1, [&run](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) run(task);
  });
}

}  // namespace shufflenet::cpu
