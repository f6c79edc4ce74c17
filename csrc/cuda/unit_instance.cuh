// Makes CUDA kernels of unit_kernel.cuh. Each unit_*.cu includes this file and instantiates the kernels of one dtype.
#pragma once

#include "kernels.h"
#include "unit_kernel.cuh"

namespace shufflenet::cuda {

template <class T, Layout kLayout>
__global__ void __launch_bounds__(kThreads, blocks_by_registers(sizeof(accumulator_t<T>)))
    unit_kernel(const __grid_constant__ KernelArguments arguments) {
  UnitBlock<T, kLayout>(arguments).run();
}

template <class T>
const void* kernel_of(Layout layout) {
  return layout == Layout::channels_last ? reinterpret_cast<const void*>(&unit_kernel<T, Layout::channels_last>)
                                         : reinterpret_cast<const void*>(&unit_kernel<T, Layout::contiguous>);
}

}  // namespace shufflenet::cuda
