// The pointwise convolution behind a network's units, on planes of pairs.
#pragma once

#include "format_pairs.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

class PairLastConvolution final : public LastConvolutionKernel {
 public:
  int64_t workspace_bytes(const LastConvolution&) const override { return 0; }

  void run(const LastConvolution& layer, const Convolution& conv, const void* x, Range rows, void* result,
           int64_t result_plane, void*) const override {
    const RowRange range = {rows.begin, rows.count(), 0};
    Products products;
    const Planes<Pair> y = {static_cast<Pair*>(result), result_plane};
    FinishPairs finish = {{conv, kRelu}, {}, y.from(-rows.begin / 2), {}};  // which counts its planes from row 0 on
    const bool has_lone = has_lone_pair(layer.pixels(), layer.pixels());
    multiply({conv, layer.in_channels / 2, &range, 1, layer.pixels(), has_lone},
             {static_cast<const Pair*>(x), layer.x_plane}, products, finish);
  }

  Tile tile(const LastConvolution& layer, int64_t tasks) const override {
    return PairFormat::tile(ceil_div(layer.out_channels, tasks), layer.pixels(), layer.pixels());
  }
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
