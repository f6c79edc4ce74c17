// Makes CUDA kernels of strip_kernel.cuh and pack_kernel.cuh. The files strip_*.cu include this one.
#pragma once

#include "kernels.h"
#include "pack_kernel.cuh"
#include "strip_kernel.cuh"

namespace shufflenet::cuda {

#ifdef __CUDA_ARCH__
inline constexpr int kArchitecture = __CUDA_ARCH__ / 10;
#else
inline constexpr int kArchitecture = 0;  // the host compiles no kernels
#endif

// Before sm_80 the kernel is empty: strip_planner.h plans none there.
template <class T, Layout kLayout>
__global__ void __launch_bounds__(32 * most_strip_warps(kArchitecture, kLayout), 1)
    strip_kernel(const __grid_constant__ StripArguments arguments) {
#if __CUDA_ARCH__ >= 800
  StripBlock<T, kLayout>(arguments).run();
#endif
}

template <class T>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const __grid_constant__ PackArguments arguments) {
  Packer<T>(arguments).run();
}

template <class T>
StripKernels strip_kernels_of() {
  return {reinterpret_cast<const void*>(&strip_kernel<T, Layout::channels_last>),
          reinterpret_cast<const void*>(&strip_kernel<T, Layout::contiguous>),
          reinterpret_cast<const void*>(&pack_kernel<T>)};
}

}  // namespace shufflenet::cuda
