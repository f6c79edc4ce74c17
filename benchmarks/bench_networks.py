"""Whole networks: the paper's at 224², other image sizes and widths of it, the original code's at 32², and others'."""

from functools import lru_cache

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.conftest import Compete
from benchmarks.shapes import FOREIGN, NETWORKS, V2, NetworkShape

_COMPILED_GROUPS = 3
_MOST_PIXELS_OF_EAGER = 1_000_000
_NOT_IN_BFLOAT16 = {
    **dict.fromkeys(peers.OTHERS_OF_PYTORCH, "only in float32 rows; in bfloat16 folded stands for PyTorch"),
    peers.ONNX_RUNTIME: "only in float32 rows: it has no convolution in bfloat16 for CPUs",
    peers.NCNN: "only in float32 rows: in bfloat16 its results were not numbers",
}


def bench_network(network: NetworkShape, precision: torch.dtype, threads: int, compete: Compete) -> None:
    module, plain, folded, x = _built(network)
    left_out = _left_out(network, threads)
    if precision == torch.bfloat16:
        ours, builders = peers.ours_in(precision, module, x), peers.IN_BFLOAT16
        left_out |= _NOT_IN_BFLOAT16
    else:
        ours, builders = peers.ours(module, x), peers.ALL
        if network.suite not in (NETWORKS, FOREIGN, V2):
            ours = {peers.OURS: ours[peers.OURS]}
    compete(network.suite, network, ours, plain, folded, x, builders, left_out, precision)


@lru_cache(maxsize=1)  # rows that differ in threads and precision alone share a module, and so its conversions
def _built(network: NetworkShape) -> tuple[nn.Module, nn.Module, nn.Module, Tensor]:
    module, x = network.build()
    return module, peers.plain_copy(module), peers.folded_copy(module), x


def _left_out(network: NetworkShape, threads: int) -> dict[str, str]:
    """The peers that do not take part in a network's rows, and why."""
    reasons: dict[str, str] = {}
    if network.suite != NETWORKS:
        reason = "of the networks only in rows at width 1 and 224²; elsewhere folded stands for PyTorch"
        reasons |= dict.fromkeys(peers.OTHERS_OF_PYTORCH, reason)
    if network.pixels > _MOST_PIXELS_OF_EAGER:
        reasons[peers.FOLDED] = f"not in rows of more than {_MOST_PIXELS_OF_EAGER} pixels, where it takes seconds"
    if network.suite not in (FOREIGN, V2) and (network.suite != NETWORKS or network.groups != _COMPILED_GROUPS):
        reasons[peers.COMPILED] = f"only in rows of others' networks, and at g = {_COMPILED_GROUPS}, width 1 and 224²"
    if network.batch == 1 or threads == 1:
        reasons[peers.OPENVINO_THROUGHPUT] = "not in rows of one image or one thread, where it has no second stream"
    return reasons
