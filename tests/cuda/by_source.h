// Runs a unit's kernel by its source, which is compiled for the CPU (host_device.h).
#pragma once

#include <vector>

#include "case.h"
#include "unit_kernel.cuh"

namespace shufflenet::cuda {

// `blocks` is the size of the grid; `result` what the kernel may write.
template <class T, Layout kLayout>
void launch(const Case& c, const KernelArguments& arguments, int64_t blocks, const void* /*result*/) {
  Machine machine(kThreads, arguments.layout.bytes, c.number("seed", 0));
  machine.launch(blocks, [&] { Block<T, kLayout>(arguments).run(); });
}

}  // namespace shufflenet::cuda
