"""The checks of the ops' arguments for the reference and the fake kernels; csrc/arguments.h holds the kernels' own."""

from collections.abc import Iterator

import torch
from torch import Tensor


def check_tensor(name: str, value: object) -> None:
    """TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")


def check_int(name: str, value: object) -> None:
    """TypeError unless ``value`` is an integer (a symbolic one counts, a bool does not)."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int")


def check_divides(name: str, divisor: int, what: str, value: int) -> None:
    """ValueError unless ``divisor`` is positive and divides ``value``, described by ``what``."""
    if divisor < 1 or value % divisor != 0:
        raise ValueError(f"{name}: got {divisor}, expected a positive divisor of {what}, {value}")


def check_image(x: Tensor) -> None:
    """ValueError unless ``x`` is a batch of images."""
    if x.dim() != 4 or any(size < 1 for size in x.shape[1:]):
        raise ValueError(
            f"x: got shape {list(x.shape)}, expected (batch, channels, height, width), not empty but for batch"
        )
    if not x.dtype.is_floating_point:
        raise ValueError(f"x: got dtype {x.dtype}, expected a floating-point dtype")


def _check_convolution(name: str, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    for suffix, tensor, expected in (("weight", weight, shape), ("bias", bias, shape[:1])):
        if tensor is None and suffix == "bias":
            continue
        check_tensor(f"{name}_{suffix}", tensor)
        assert tensor is not None
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name}_{suffix}: got shape {list(tensor.shape)}, expected shape {list(expected)}")
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name}_{suffix}: got dtype {tensor.dtype}, expected x's, {x.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}_{suffix}: got device {tensor.device}, expected x's, {x.device}")


def check_unit(
    x: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor | None,
    conv2_weight: Tensor,
    conv2_bias: Tensor | None,
    *,
    conv1_groups: int,
    shuffle_groups: int,
    stride: int,
    groups: int | None = None,
    conv3_weight: Tensor | None = None,
    conv3_bias: Tensor | None = None,
) -> None:
    """TypeError or ValueError, naming the argument, unless the arguments describe a unit.

    Without ``groups`` it ends ahead of conv3.
    """
    for name, value in (("x", x), ("conv1_weight", conv1_weight), ("conv2_weight", conv2_weight)):
        check_tensor(name, value)
    # The shuffle's groups come last: where they were left out they are conv3's, which is what an error then names.
    divisors = {} if groups is None else {"groups": groups}
    divisors["shuffle_groups"] = shuffle_groups
    for name, number in {"conv1_groups": conv1_groups, "stride": stride, **divisors}.items():
        check_int(name, number)
    check_image(x)
    if stride not in (1, 2):
        raise ValueError(f"stride: got {stride}, expected 1 or 2")
    if conv1_weight.dim() != 4 or conv1_weight.shape[0] < 1:
        expected = "[mid_channels, in_channels / conv1_groups, 1, 1]"
        raise ValueError(f"conv1_weight: got shape {list(conv1_weight.shape)}, expected {expected}")
    in_channels, mid_channels = x.shape[1], conv1_weight.shape[0]
    check_divides("conv1_groups", conv1_groups, "x's channels", in_channels)
    check_divides("conv1_groups", conv1_groups, "conv1_weight's rows", mid_channels)
    for name, number in divisors.items():
        check_divides(name, number, "conv1_weight's rows", mid_channels)
    _check_convolution("conv1", conv1_weight, conv1_bias, (mid_channels, in_channels // conv1_groups, 1, 1), x)
    _check_convolution("conv2", conv2_weight, conv2_bias, (mid_channels, 1, 3, 3), x)
    if groups is None:
        return
    check_tensor("conv3_weight", conv3_weight)
    assert conv3_weight is not None
    if conv3_weight.dim() != 4 or conv3_weight.shape[0] < 1:
        expected = "[out_channels, mid_channels / groups, 1, 1]"
        raise ValueError(f"conv3_weight: got shape {list(conv3_weight.shape)}, expected {expected}")
    out_channels = conv3_weight.shape[0]
    check_divides("groups", groups, "conv3_weight's rows", out_channels)
    _check_convolution("conv3", conv3_weight, conv3_bias, (out_channels, mid_channels // groups, 1, 1), x)
    if stride == 1 and out_channels != in_channels:
        raise ValueError(
            f"conv3_weight: got {out_channels} rows, expected x's {in_channels} channels (with stride 1, x is added)"
        )


_MOST_KERNEL_SIZE = 11  # of a stem; csrc/network.h
# How many integers follow the kind of a step: a stem, a unit, a head, the unit before again.
_STEP_LENGTHS = {0: 5, 1: 7, 2: 2, 3: 1}


def split_program(program: list[int]) -> Iterator[tuple[int, list[int]]]:
    """The kinds and the integers of a program's steps, units that it has again among them.

    ValueError unless it is made of whole steps in their order.
    """
    at, kind = 0, None
    unit: list[int] = []
    while at < len(program):
        before, kind = kind, program[at]
        if kind not in _STEP_LENGTHS or (kind == 0 and at > 0) or (kind == 3 and not unit) or before == 2:
            expected = "0 (stem) first, 1 (unit), 3 (again) behind a unit or 2 (head) last"
            raise ValueError(f"program: got step {kind} at element {at}, expected {expected}")
        step = program[at + 1 : at + 1 + _STEP_LENGTHS[kind]]
        if len(step) < _STEP_LENGTHS[kind]:
            raise ValueError(f"program: got {len(step)} elements for its last step, expected {_STEP_LENGTHS[kind]}")
        if kind == 3:
            _check_positive(times=step[0])
            for _ in range(step[0]):
                yield 1, unit
        else:
            unit = step if kind == 1 else unit
            yield kind, step
        at += 1 + len(step)
    if kind is None:
        raise ValueError("program: got no elements, expected one step at least")


def check_step(kind: int, step: list[int], channels: int, height: int, width: int) -> None:
    """ValueError unless a program's step fits images of these sizes."""
    if kind == 0:
        out_channels, size, stride, padding, _ = step
        _check_positive(out_channels=out_channels)
        if not 1 <= size <= _MOST_KERNEL_SIZE:
            raise ValueError(f"program: got kernel_size {size}, expected 1 to {_MOST_KERNEL_SIZE}")
        if stride not in (1, 2):
            raise ValueError(f"program: got stride {stride}, expected 1 or 2")
        if not 0 <= padding < size:
            raise ValueError(f"program: got padding {padding}, expected at least 0 and less than kernel_size, {size}")
        if min(height, width) + 2 * padding < size:
            least = size - 2 * padding
            raise ValueError(f"x: got {height} x {width} pixels, expected at least {least} x {least}")
    elif kind == 1:
        mid_channels, out_channels, conv1_groups, groups, stride = step[:5]
        _check_positive(mid_channels=mid_channels, out_channels=out_channels)
        if stride not in (1, 2):
            raise ValueError(f"program: got stride {stride}, expected 1 or 2")
        check_divides("program: conv1_groups", conv1_groups, "the unit's input channels", channels)
        check_divides("program: conv1_groups", conv1_groups, "mid_channels", mid_channels)
        check_divides("program: groups", groups, "mid_channels", mid_channels)
        check_divides("program: groups", groups, "out_channels", out_channels)
        if stride == 1 and out_channels != channels:
            expected = f"{channels} (with stride 1, the unit's input is added to its result)"
            raise ValueError(f"program: got {out_channels} out_channels, expected {expected}")
    else:
        classes, window = step
        _check_positive(classes=classes)
        if window != 0 and not (window > 0 and height // window == width // window == 1):
            raise ValueError(
                f"x: got {height} x {width} pixels ahead of the head, expected one window of {window} x {window}"
            )


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"program: got {name} {number}, expected a positive number")
