// The unit as one fused pass over a window of an image (tiling.h), written once for every dtype, layout and device:
// with device.cuh it is a CUDA kernel, with tests/cuda/host_device.h the same code runs on the CPU.
//
//   conv1      keeps its weights in shared memory. Each warp copies tiles of x into buffers of its own, multiplies them
//              by the weights, applies bias or batch norm and ReLU, and writes y1. The shuffle takes no step of its
//              own: it is the column of y1 that a row of conv1 writes to.
//   depthwise  makes y2 of y1, which has a halo of zeros. Each thread computes two channels.
//   conv3      multiplies y2 by weights in shared memory. The sums go from registers to the result, with the residual
//              added, in accesses of up to 16 bytes. Where a unit has no conv3, y2 is written as the result.
//
// y1 and y2 have x's dtype, as in PyTorch. Sums, biases and what else is done to sums have the accumulator's.
#pragma once

#include "common.cuh"
#include "tiling.h"
#include "unit_conv1.cuh"
#include "unit_conv3.cuh"
#include "unit_depthwise.cuh"
#include "unit_pool.cuh"
#include "unit_result.cuh"
#include "unit_staging.cuh"
#include "unit_window.cuh"

namespace shufflenet::cuda {

template <class T, Layout kLayout>
struct UnitBlock {
  SHUFFLENET_DEVICE explicit UnitBlock(const KernelArguments& arguments)
      : staging(arguments), s(arguments.sizes), t(arguments.tiling) {}

  SHUFFLENET_DEVICE void run() const {
    const int64_t windows = t.windows(s);
    for (int64_t index = block_index(); index < windows; index += block_count()) {
      const Window window(s, t, index);
      const int channel_begin = window.slice_begin * s.slice_channels,
                channel_end = window.slice_end * s.slice_channels;
      for (int begin = channel_begin; begin < channel_end; begin += t.chunk) {
        make_y2(window, begin, channel_begin, channel_end);
      }
      if (s.out_channels) UnitConv3<T, kLayout>(staging, window).run();
      if (s.out_channels && s.stride == 2) UnitPool<T, kLayout>(staging, window).run();
    }
  }

 private:
  // Makes y2 of a chunk: of the block's channels, [channel_begin, channel_end), those from `begin` on. Where a unit has
  // no conv3, it is written as the result.
  SHUFFLENET_DEVICE void make_y2(const Window& window, int begin, int channel_begin, int channel_end) const {
    const int channels = least(t.chunk, channel_end - begin);
    barrier();  // all threads have finished reading what is overwritten now
    const int run_count = staging.find_runs(begin, begin + channels);
    staging.load_taps(begin, channels);
    if (s.out_channels && begin == channel_begin) staging.load_affine3(window);
    staging.clear_halo(window, channels);
    barrier();  // all threads see the runs
    staging.stage_weights1(run_count);
    barrier();  // all threads see weights and taps
    UnitConv1<T, kLayout>(staging, window, run_count).run();
    barrier();
    if (s.out_channels && begin == channel_begin) {
      staging.clear_y2();  // now, as tiles of x may have been in its place until here
      barrier();
    }
    UnitDepthwise<T, kLayout>(staging, window).run(begin - channel_begin, channels);
    if (!s.out_channels) {
      barrier();
      UnitResult<T, kLayout>(staging, window).write_y2(begin, channels);
    }
  }

  const UnitStaging<T> staging;
  const Sizes& s;
  const Tiling& t;
};

}  // namespace shufflenet::cuda
