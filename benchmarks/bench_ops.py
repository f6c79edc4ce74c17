"""The two ops on the units of the paper's network with 3 groups, against the same in plain PyTorch."""

from typing import Any

from torch import Tensor

import shufflenet_ext as se
from benchmarks import peers
from benchmarks.conftest import Compete
from benchmarks.shapes import UnitShape


def bench_pointwise_shuffle_depthwise(op_unit: UnitShape, compete: Compete) -> None:
    unit, x = op_unit.build()
    folded = peers.FoldedDepthwise(unit)
    conv1, conv2 = folded.conv1, folded.conv2

    def op(x: Tensor) -> Tensor:
        return se.ops.pointwise_shuffle_depthwise(
            x,
            conv1.weight,
            conv1.bias,
            conv2.weight,
            conv2.bias,
            conv1_groups=conv1.groups,
            shuffle_groups=unit.groups,
            stride=unit.stride,
        )

    _compete("op pointwise_shuffle_depthwise", op_unit, op, folded, x, compete)


def bench_shuffle_bottleneck(op_unit: UnitShape, compete: Compete) -> None:
    unit, x = op_unit.build()
    folded = peers.FoldedUnit(unit)
    conv1, conv2, conv3 = folded.conv1, folded.conv2, folded.conv3

    def op(x: Tensor) -> Tensor:
        return se.ops.shuffle_bottleneck(
            x,
            conv1.weight,
            conv1.bias,
            conv2.weight,
            conv2.bias,
            conv3.weight,
            conv3.bias,
            conv1_groups=conv1.groups,
            groups=unit.groups,
            stride=unit.stride,
        )

    _compete("op shuffle_bottleneck", op_unit, op, folded, x, compete)


def _compete(suite: str, shape: UnitShape, op: Any, folded: peers.FoldedDepthwise, x: Tensor, compete: Compete) -> None:
    x_last = peers.channels_last(x)
    ours = {peers.OURS: lambda: op(x), peers.OURS_CHANNELS_LAST: lambda: op(x_last)}
    compete(suite, shape, ours, folded, folded, x, peers.OF_OPS)
