// Launches that run kernels on the CPU, by their source (host_matrices.h).
#pragma once

#ifndef SHUFFLENET_TEST_DEVICE
#define SHUFFLENET_TEST_DEVICE "host_matrices.h"
#endif

#include "pack_kernel.cuh"
#include "strip_kernel.cuh"
#include "strip_planner.h"
#include "unit_kernel.cuh"

namespace shufflenet::cuda {

template <class T>
void launch_on_host(const KernelArguments& arguments, Layout layout, int64_t shared_bytes) {
  Machine machine(kThreads, shared_bytes, 0);
  machine.launch(arguments.tiling.windows(arguments.sizes), [&] {
    if (layout == Layout::channels_last) {
      UnitBlock<T, Layout::channels_last>(arguments).run();
    } else {
      UnitBlock<T, Layout::contiguous>(arguments).run();
    }
  });
}

template <class T>
void launch_pack_on_host(const PackArguments& arguments) {
  Machine machine(kPackThreads, pack_shared_bytes(arguments.sizes, arguments.slices, arguments.layout), 0);
  machine.launch(2, [&] { Packer<T>(arguments).run(); });
}

template <class T>
void launch_strips_on_host(const StripArguments& arguments, const StripPlan& plan) {
  Machine machine(32 * plan.tiling.warps, plan.shared_bytes, 0);
  machine.launch(plan.blocks, [&] {
    if (arguments.layout.packed.by_planes) {
      StripBlock<T, Layout::contiguous>(arguments).run();
    } else {
      StripBlock<T, Layout::channels_last>(arguments).run();
    }
  });
}

}  // namespace shufflenet::cuda
