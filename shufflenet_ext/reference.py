"""The ops in plain PyTorch: the fallback, and the ground truth of the equivalence tests.

The unit is that of ShuffleNet (Zhang et al. 2017, arXiv:1707.01083, section 3.2 and figure 2) or ShuffleNet v2 (Ma et
al. 2018, arXiv:1807.11164, section 3 and figure 3). Functions that take no batch norm expect it to be folded into the
weights and biases.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from shufflenet_ext._checks import (
    check_divides,
    check_image,
    check_int,
    check_tensor,
    check_unit,
    check_unit_v2,
    overridable,
)
from shufflenet_ext._native import is_channels_last
from shufflenet_ext._program import StepKind, check_step, split_program


@overridable
def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Channel shuffle (section 3.1): channel c of the result is ``(c % groups) * (C // groups) + c // groups`` of x.

    Args:
        x: (N, C, H, W), any dtype.
        groups: a divisor of C.

    Returns a tensor of x's shape and memory format; TypeError or ValueError for arguments that are not as above.
    """
    check_tensor("x", x)
    check_int("groups", groups)
    if x.dim() != 4:
        raise ValueError(f"x: got shape {list(x.shape)}, expected (batch, channels, height, width)")
    check_divides("groups", groups, "x's channels", x.shape[1])
    n, c, h, w = x.shape
    if is_channels_last(x):
        y = x.permute(0, 2, 3, 1).unflatten(3, (groups, c // groups)).transpose(3, 4).flatten(3)
        return y.permute(0, 3, 1, 2)
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def pointwise_shuffle_depthwise(
    x: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor | None,
    conv2_weight: Tensor,
    conv2_bias: Tensor | None,
    *,
    conv1_groups: int,
    shuffle_groups: int,
    stride: int = 1,
    conv2_relu: bool = False,
) -> Tensor:
    """:func:`shufflenet_ext.ops.pointwise_shuffle_depthwise` in plain PyTorch."""
    check_unit(
        x,
        conv1_weight,
        conv1_bias,
        conv2_weight,
        conv2_bias,
        conv1_groups=conv1_groups,
        shuffle_groups=shuffle_groups,
        stride=stride,
    )
    y = F.relu(F.conv2d(x, conv1_weight, conv1_bias, groups=conv1_groups))
    y = shuffle_channels(y, shuffle_groups)
    y = F.conv2d(y, conv2_weight, conv2_bias, stride=stride, padding=1, groups=conv2_weight.shape[0])
    return F.relu(y) if conv2_relu else y


def shuffle_bottleneck(
    x: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor | None,
    conv2_weight: Tensor,
    conv2_bias: Tensor | None,
    conv3_weight: Tensor,
    conv3_bias: Tensor | None,
    *,
    conv1_groups: int,
    groups: int,
    stride: int = 1,
    conv2_relu: bool = False,
    pool_count_include_pad: bool = True,
    shuffle_groups: int | None = None,
    shortcut_first: bool = False,
    shortcut_relu: bool = True,
) -> Tensor:
    """:func:`shufflenet_ext.ops.shuffle_bottleneck` in plain PyTorch."""
    check_int("groups", groups)
    shuffle_groups = groups if shuffle_groups is None else shuffle_groups
    check_unit(
        x,
        conv1_weight,
        conv1_bias,
        conv2_weight,
        conv2_bias,
        conv1_groups=conv1_groups,
        shuffle_groups=shuffle_groups,
        stride=stride,
        groups=groups,
        conv3_weight=conv3_weight,
        conv3_bias=conv3_bias,
    )
    y = pointwise_shuffle_depthwise(
        x,
        conv1_weight,
        conv1_bias,
        conv2_weight,
        conv2_bias,
        conv1_groups=conv1_groups,
        shuffle_groups=shuffle_groups,
        stride=stride,
        conv2_relu=conv2_relu,
    )
    y = F.conv2d(y, conv3_weight, conv3_bias, groups=groups)
    return add_shortcut(
        y,
        x,
        stride=stride,
        pool_count_include_pad=pool_count_include_pad,
        shortcut_first=shortcut_first,
        shortcut_relu=shortcut_relu,
    )


def shuffle_unit_v2(
    x: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor | None,
    conv2_weight: Tensor,
    conv2_bias: Tensor | None,
    conv3_weight: Tensor,
    conv3_bias: Tensor | None,
    shortcut1_weight: Tensor | None = None,
    shortcut1_bias: Tensor | None = None,
    shortcut2_weight: Tensor | None = None,
    shortcut2_bias: Tensor | None = None,
    *,
    stride: int = 1,
    split_groups: int = 1,
    shuffle_groups: int = 2,
) -> Tensor:
    """:func:`shufflenet_ext.ops.shuffle_unit_v2` in plain PyTorch."""
    check_unit_v2(
        x,
        (conv1_weight, conv1_bias),
        (conv2_weight, conv2_bias),
        (conv3_weight, conv3_bias),
        (shortcut1_weight, shortcut1_bias),
        (shortcut2_weight, shortcut2_bias),
        stride=stride,
        split_groups=split_groups,
        shuffle_groups=shuffle_groups,
    )
    beside, y = split_halves(x, stride=stride, split_groups=split_groups)
    if shortcut1_weight is not None and shortcut2_weight is not None:
        beside = F.conv2d(beside, shortcut1_weight, shortcut1_bias, stride=2, padding=1, groups=x.shape[1])
        beside = F.relu(F.conv2d(beside, shortcut2_weight, shortcut2_bias))
    y = F.relu(F.conv2d(y, conv1_weight, conv1_bias))
    y = F.conv2d(y, conv2_weight, conv2_bias, stride=stride, padding=1, groups=conv2_weight.shape[0])
    y = F.relu(F.conv2d(y, conv3_weight, conv3_bias))
    return shuffle_channels(torch.cat([beside, y], 1), shuffle_groups)


def split_halves(x: Tensor, *, stride: int, split_groups: int) -> tuple[Tensor, Tensor]:
    """What passes by, or the shortcut reads, in a unit of v2, and what its first convolution reads."""
    if split_groups != 1:
        x = shuffle_channels(x, split_groups)
    if stride == 2:
        return x, x
    passing, main = x.chunk(2, 1)
    return passing, main


def shuffle_network(x: Tensor, weights: Tensor, program: list[int]) -> Tensor:
    """Runs a network (Table 1) or a part of one, its steps one behind the other, for inference.

    Args:
        x: (N, C, H, W).
        weights: the steps' weights and biases with batch norm folded in, one behind the other; see
            :func:`pack_weights`. Of x's dtype; or of bfloat16, for an x of float32 and a result of float32.
        program: what the steps are; see ``shufflenet_ext._program``.

    Raises ValueError for arguments that are not as above.
    """
    check_tensor("x", x)
    check_tensor("weights", weights)
    check_image(x)
    dtype = x.dtype
    if (dtype, weights.dtype) == (torch.float32, torch.bfloat16):
        x = x.bfloat16()
    if weights.dtype != x.dtype or weights.device != x.device:
        got, expected = (f"dtype {tensor.dtype} on {tensor.device}" for tensor in (weights, x))
        raise ValueError(f"weights: got {got}, expected as x's, {expected}")
    if weights.dim() != 1 or not weights.is_contiguous():
        raise ValueError(f"weights: got shape {list(weights.shape)}, expected one contiguous dimension")
    packed = _Packed(weights)
    for kind, step in split_program(program):
        channels = int(x.shape[1])  # a number in a traced graph too, as the weights are for so many
        check_step(kind, step, channels, *x.shape[2:])
        if kind is StepKind.STEM:
            out_channels, size, stride, padding, max_pool, relu = step
            x = F.conv2d(x, *packed.take(out_channels, channels, size, size), stride=stride, padding=padding)
            if max_pool:
                x = F.max_pool2d(x, 3, stride=2, padding=1)  # the same as behind the ReLU, which then has less to do
            if relu:
                x = F.relu(x)
        elif kind in (StepKind.UNIT, StepKind.GENERAL_UNIT):
            mid, out, conv1_groups, groups, stride, conv2_relu, include_pad = step[:7]
            shuffle_groups, shortcut_first, shortcut_relu = step[7:] or (groups, False, True)
            x = shuffle_bottleneck(
                x,
                *packed.take(mid, channels // conv1_groups, 1, 1),
                *packed.take(mid, 1, 3, 3),
                *packed.take(out, mid // groups, 1, 1),
                conv1_groups=conv1_groups,
                groups=groups,
                stride=stride,
                conv2_relu=bool(conv2_relu),
                pool_count_include_pad=bool(include_pad),
                shuffle_groups=shuffle_groups,
                shortcut_first=bool(shortcut_first),
                shortcut_relu=bool(shortcut_relu),
            )
        elif kind is StepKind.UNIT_V2:
            mid, out, shortcut_channels, stride, split_groups, shuffle_groups = step
            x = shuffle_unit_v2(
                x,
                *packed.take(mid, channels if stride == 2 else channels // 2, 1, 1),
                *packed.take(mid, 1, 3, 3),
                *packed.take(out, mid, 1, 1),
                *(packed.take(channels, 1, 3, 3) if stride == 2 else ()),
                *(packed.take(shortcut_channels, channels, 1, 1) if stride == 2 else ()),
                stride=stride,
                split_groups=split_groups,
                shuffle_groups=shuffle_groups,
            )
        elif kind is StepKind.LAST_CONVOLUTION:
            x = F.relu(F.conv2d(x, *packed.take(step[0], channels, 1, 1)))
        else:
            classes, window = step
            x = F.avg_pool2d(x, window) if window else F.adaptive_avg_pool2d(x, 1)
            x = F.linear(x.flatten(1), *packed.take(classes, channels))
    packed.check_all_taken()
    return x.to(dtype)


def shuffle_network_batch_norm(x: Tensor, tensors: list[Tensor | None], eps: list[float], program: list[int]) -> Tensor:
    """:func:`shuffle_network` from a model's own tensors, with its batch norms in inference mode.

    Args:
        x: (N, C, H, W).
        tensors: of each convolution, in the steps' order: weight and bias, then weight, bias, mean and variance of its
            batch norm, None for what it has not; of the linear layer, weight and bias.
        eps: of each convolution's batch norm.
        program: what the steps are; see ``shufflenet_ext._program``.

    Raises ValueError for arguments that are not as above.
    """
    check_tensor("x", x)
    if len(tensors) - 6 * len(eps) not in (0, 2):
        expected = f"6 for each of the {len(eps)} eps, and 2 for a linear layer behind them"
        raise ValueError(f"tensors: got {len(tensors)}, expected {expected}")
    folded: list[Tensor] = []
    for i in range(0, len(tensors), 6):
        weight, bias, gamma, beta, mean, var = [*tensors[i : i + 6], None, None, None, None][:6]
        check_tensor("tensors", weight)
        assert weight is not None
        shift = weight.new_zeros(len(weight)) if bias is None else bias
        if any(given is not None for given in (gamma, beta, mean, var)):
            if mean is None or var is None:
                raise ValueError(f"tensors: got a batch norm without its mean or variance, at {i}, expected both")
            scale = torch.rsqrt(var + eps[i // 6])
            scale = scale if gamma is None else gamma * scale
            shift = (shift - mean) * scale if beta is None else beta + (shift - mean) * scale
            weight = weight * scale.to(weight.dtype).view(-1, 1, 1, 1)
        folded += [weight, shift.to(weight.dtype)]
    return shuffle_network(x, pack_weights(folded), program)


# Packed arrays are padded to a multiple of so many elements, as in csrc/program.h.
_PACKED_ALIGNMENT = 16


def pack_weights(tensors: list[Tensor]) -> Tensor:
    """Packs tensors for :func:`shuffle_network`: one behind the other, each padded with zeros to a multiple of 16."""
    return torch.cat([F.pad(tensor.flatten(), (0, -tensor.numel() % _PACKED_ALIGNMENT)) for tensor in tensors])


class _Packed:
    """Takes weights and biases out of their packed form, one after the other."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self.at = 0

    def take(self, *shape: int) -> tuple[Tensor, Tensor]:
        return self._array(*shape), self._array(shape[0])

    def check_all_taken(self) -> None:
        if self.at != self.weights.numel():
            raise ValueError(f"weights: got {self.weights.numel()} elements, expected {self.at} for this program and x")

    def _array(self, *shape: int) -> Tensor:
        size = math.prod(shape)
        if self.at + size > self.weights.numel():
            raise ValueError(f"weights: got {self.weights.numel()} elements, expected {self.at + size} at least")
        array = self.weights.narrow(0, self.at, size).view(shape)
        self.at += size + -size % _PACKED_ALIGNMENT
        return array


def add_shortcut(
    y: Tensor, x: Tensor, *, stride: int, pool_count_include_pad: bool, shortcut_first: bool, shortcut_relu: bool
) -> Tensor:
    """The unit's end (figure 2 b and c): the sum with x for stride 1, concatenation with the pooled x for stride 2."""
    if stride == 1:
        return F.relu(y + x)
    pooled = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=pool_count_include_pad)
    parts = [F.relu(y), F.relu(pooled) if shortcut_relu else pooled]
    return torch.cat(parts[::-1] if shortcut_first else parts, 1)


def shuffle_bottleneck_batch_norm(
    x: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor | None,
    bn1_weight: Tensor | None,
    bn1_bias: Tensor | None,
    bn1_mean: Tensor,
    bn1_var: Tensor,
    conv2_weight: Tensor,
    conv2_bias: Tensor | None,
    bn2_weight: Tensor | None,
    bn2_bias: Tensor | None,
    bn2_mean: Tensor,
    bn2_var: Tensor,
    conv3_weight: Tensor,
    conv3_bias: Tensor | None,
    bn3_weight: Tensor | None,
    bn3_bias: Tensor | None,
    bn3_mean: Tensor,
    bn3_var: Tensor,
    *,
    bn1_eps: float,
    bn2_eps: float,
    bn3_eps: float,
    conv1_groups: int,
    groups: int,
    stride: int = 1,
    conv2_relu: bool = False,
    pool_count_include_pad: bool = True,
    shuffle_groups: int | None = None,
    shortcut_first: bool = False,
    shortcut_relu: bool = True,
) -> Tensor:
    """The unit with its batch norms in inference mode: what a FusedShuffleBottleneck in eval mode runs."""
    check_int("groups", groups)
    shuffle_groups = groups if shuffle_groups is None else shuffle_groups
    check_unit(
        x,
        conv1_weight,
        conv1_bias,
        conv2_weight,
        conv2_bias,
        conv1_groups=conv1_groups,
        shuffle_groups=shuffle_groups,
        stride=stride,
        groups=groups,
        conv3_weight=conv3_weight,
        conv3_bias=conv3_bias,
    )
    y = F.conv2d(x, conv1_weight, conv1_bias, groups=conv1_groups)
    y = F.relu(F.batch_norm(y, bn1_mean, bn1_var, bn1_weight, bn1_bias, eps=bn1_eps))
    y = shuffle_channels(y, shuffle_groups)
    y = F.conv2d(y, conv2_weight, conv2_bias, stride=stride, padding=1, groups=conv2_weight.shape[0])
    y = F.batch_norm(y, bn2_mean, bn2_var, bn2_weight, bn2_bias, eps=bn2_eps)
    if conv2_relu:
        y = F.relu(y)
    y = F.conv2d(y, conv3_weight, conv3_bias, groups=groups)
    y = F.batch_norm(y, bn3_mean, bn3_var, bn3_weight, bn3_bias, eps=bn3_eps)
    return add_shortcut(
        y,
        x,
        stride=stride,
        pool_count_include_pad=pool_count_include_pad,
        shortcut_first=shortcut_first,
        shortcut_relu=shortcut_relu,
    )
