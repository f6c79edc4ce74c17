"""The unit of ShuffleNet v2 as a module: plain (ShuffleUnitV2) and fused (FusedShuffleUnitV2), of one state_dict."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from shufflenet_ext import reference
from shufflenet_ext._backend import fall_back, runs_native, trains_native
from shufflenet_ext._checks import check_divides, check_int, check_positive, check_tensor
from shufflenet_ext._program import StepKind
from shufflenet_ext._unit_v2 import run_unit_v2
from shufflenet_ext.modules import has_hooks, leaf_node, unfusable


def _pointwise(in_channels: int, out_channels: int, bias: bool) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


def _depthwise(channels: int, stride: int, bias: bool) -> list[nn.Module]:
    conv = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=bias)
    return [conv, nn.BatchNorm2d(channels)]


class ShuffleUnitV2(nn.Module):
    """A ShuffleNet v2 unit in plain PyTorch (arXiv:1807.11164, figure 3 c for stride 1, d for stride 2).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output: in_channels, an even number, for stride 1.
        stride: 1 or 2.
        mid_channels: of the intermediate tensors; by default ``out_channels // 2``.
        shortcut_channels: of the output, those that the shortcut computes with stride 2; by default
            ``out_channels // 2``. With stride 1 half of the channels pass by.
        split_groups: groups of a shuffle of the input's channels, ahead of all else; with ``in_channels // 2``, those
            of even numbers are the half that passes by.
        shuffle_groups: groups of the shuffle at the end; with 1 there is none.
        bias: whether the convolutions have biases.

    Input (N, in_channels, H, W); output (N, out_channels, ceil(H / stride), ceil(W / stride)). Parameters and buffers
    are named as those of torchvision's InvertedResidual: branch1 is the shortcut, empty with stride 1, and branch2 the
    rest.

    Raises TypeError or ValueError, naming the argument, for channels and groups that do not fit each other.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        mid_channels: int | None = None,
        shortcut_channels: int | None = None,
        split_groups: int = 1,
        shuffle_groups: int = 2,
        bias: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("stride", stride)):
            check_positive(name, value)
        if mid_channels is None:
            mid_channels = out_channels // 2
        check_positive("mid_channels", mid_channels)
        if stride not in (1, 2):
            raise ValueError(f"stride: got {stride}, expected 1 or 2")
        if stride == 1:
            if in_channels % 2 != 0 or out_channels != in_channels:
                expected = f"in_channels, {in_channels}, which must be even (with stride 1, half of them pass by)"
                raise ValueError(f"out_channels: got {out_channels}, expected {expected}")
            if shortcut_channels is not None:
                raise ValueError(f"shortcut_channels: got {shortcut_channels} with stride 1, expected None")
            beside = in_channels // 2
        else:
            beside = out_channels // 2 if shortcut_channels is None else shortcut_channels
            check_int("shortcut_channels", beside)
            if not 0 < beside < out_channels:
                expected = f"a positive int less than out_channels, {out_channels}"
                raise ValueError(f"shortcut_channels: got {beside}, expected {expected}")
        check_int("split_groups", split_groups)
        check_int("shuffle_groups", shuffle_groups)
        check_divides("split_groups", split_groups, "in_channels", in_channels)
        check_divides("shuffle_groups", shuffle_groups, "out_channels", out_channels)
        self.stride = stride
        self.split_groups = split_groups
        self.shuffle_groups = shuffle_groups
        shortcut = [*_depthwise(in_channels, 2, bias), *_pointwise(in_channels, beside, bias)] if stride == 2 else []
        self.branch1 = nn.Sequential(*shortcut)
        self.branch2 = nn.Sequential(
            *_pointwise(in_channels if stride == 2 else in_channels // 2, mid_channels, bias),
            *_depthwise(mid_channels, stride, bias),
            *_pointwise(mid_channels, out_channels - beside, bias),
        )
        self.in_channels = in_channels

    def pairs(self) -> list[tuple[Any, Any]]:
        """Each convolution with the batch norm behind it: conv1, conv2 and conv3, and the shortcut's two."""
        main, shortcut = self.branch2, self.branch1
        pairs = [(main[0], main[1]), (main[3], main[4]), (main[5], main[6])]
        return pairs if self.stride == 1 else [*pairs, (shortcut[0], shortcut[1]), (shortcut[2], shortcut[3])]

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Proxy):
            self._check(x)
        elif (node := leaf_node(self, x)) is not None:
            return node
        beside, main = reference.split_halves(x, stride=self.stride, split_groups=self.split_groups)
        # Without a shortcut branch1 is empty, and what passes by is as it was.
        return reference.shuffle_channels(torch.cat([self.branch1(beside), self.branch2(main)], 1), self.shuffle_groups)

    def _check(self, x: Tensor) -> None:
        check_tensor("x", x)
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x: got shape {list(x.shape)}, expected (batch, {self.in_channels}, height, width)")

    def options(self) -> dict[str, int]:
        """The keyword arguments of :func:`shufflenet_ext.ops.shuffle_unit_v2`."""
        return {
            "stride": self.stride,
            "split_groups": self.split_groups,
            "shuffle_groups": self.shuffle_groups,
        }

    def step(self) -> list[int]:
        """Its step in a program."""
        mid, out = self.branch2[0].out_channels, self.branch2[5].out_channels
        beside = self.branch1[2].out_channels if self.stride == 2 else 0
        return [StepKind.UNIT_V2.value, mid, out, beside, *self.options().values()]  # type: ignore[list-item]

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


def unfusable_v2(unit: ShuffleUnitV2) -> str | None:
    """Why the op cannot stand, in eval mode, for what a unit's branches have become; None where it can."""
    lengths = {1: (0, 8), 2: (5, 8)}[unit.stride]
    branches = (unit.branch1, unit.branch2)
    if any(type(branch) is not nn.Sequential or has_hooks(branch) for branch in branches):
        return "a branch was replaced or has hooks"
    if tuple(map(len, branches)) != lengths:
        return "a branch has other modules"
    for relu in (unit.branch2[2], unit.branch2[7], *([unit.branch1[4]] if unit.stride == 2 else [])):
        if type(relu) is not nn.ReLU or has_hooks(relu):
            return f"a ReLU was replaced or has hooks: {relu}"
    return next((cause for pair in unit.pairs() if (cause := unfusable(*pair)) is not None), None)


class FusedShuffleUnitV2(ShuffleUnitV2):
    """The drop-in: a :class:`ShuffleUnitV2` that runs as one native op in eval mode, on the CPU.

    Same arguments, state_dict, results and gradients. In eval mode a call reads the parameters and the statistics as
    they are at that moment. In training mode, and on CUDA, it runs as the plain unit, of which a warning is given once.
    The backend in use (:func:`shufflenet_ext.use_backend`) decides what runs the op.
    """

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return super().forward(x)
        check_tensor("x", x)
        cause = unfusable_v2(self)
        training = self.training if cause is not None else any(norm.training for _, norm in self.pairs())
        if not (trains_native(x, version=2) if training else runs_native(x, tuple, version=2)):
            return super().forward(x)
        if cause is not None:
            fall_back(f"in a FusedShuffleUnitV2 {cause}")
            return super().forward(x)
        self._check(x)
        pairs = self.pairs()
        tensors = [[c.weight, c.bias, n.weight, n.bias, n.running_mean, n.running_var] for c, n in pairs]
        return run_unit_v2(x, tensors, [norm.eps for _, norm in pairs], self.step(), self.options())
