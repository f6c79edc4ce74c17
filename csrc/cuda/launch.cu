#include "unit_kernel.cuh"
namespace shufflenet::cuda {
template <class T, Layout kLayout>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerMultiprocessor)
    unit_kernel(const __grid_constant__ KernelArguments arguments) {
  Block<T, kLayout>(arguments).run();
}
template __global__ void unit_kernel<Float16, Layout::channels_last>(const __grid_constant__ KernelArguments);
template __global__ void unit_kernel<Float16, Layout::contiguous>(const __grid_constant__ KernelArguments);
template __global__ void unit_kernel<double, Layout::contiguous>(const __grid_constant__ KernelArguments);
}
