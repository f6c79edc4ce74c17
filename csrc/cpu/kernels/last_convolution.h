// The pointwise convolution behind a network's units, on planes of floats.
#pragma once

#include "pointwise.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

template <class T>
class FloatLastConvolution final : public LastConvolutionKernel {
 public:
  using A = accumulator_t<T>;

  int64_t workspace_bytes(const LastConvolution& layer) const override {
    Arena arena(nullptr);
    PointwiseLists<A>(arena, layer.out_channels, layer.in_channels);
    return arena.bytes();
  }

  void run(const LastConvolution& layer, const Convolution& conv, const void* x, Range rows, void* result,
           int64_t result_plane, void* workspace) const override {
    Arena arena(workspace);
    const PointwiseLists<A> lists(arena, layer.out_channels, layer.in_channels);
    grouped_pointwise<A>(
        {conv, kRelu, layer.in_channels, layer.out_channels, layer.x_planes}, rows,
        {static_cast<const A*>(x), layer.x_plane}, layer.pixels(), {}, {static_cast<A*>(result), result_plane},
        rows.begin, has_lone_pixel<A>(layer.pixels(), layer.pixels()), lists, Far::nothing);
  }

  Tile tile(const LastConvolution& layer, int64_t tasks) const override {
    return SHUFFLENET_ISA::tile<A>(ceil_div(layer.out_channels, tasks), layer.pixels(), layer.pixels());
  }
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
