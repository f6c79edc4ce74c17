"""Checks the ops' arguments for the reference and the fake kernels. csrc/arguments.h does so for the native kernels."""

import torch
from torch import Tensor
from torch.overrides import wrap_torch_function

# Hands a function's call to an argument with a __torch_function__ of its own, as PyTorch's functions do: so torch.fx
# records it as one node.
overridable = wrap_torch_function(lambda *args, **kwargs: (*args, *kwargs.values()))


def check_tensor(name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")


def check_int(name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is an integer. A symbolic one counts as such, a bool does not."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int")


def check_divides(name: str, divisor: int, what: str, value: int) -> None:
    """Raises ValueError unless ``divisor`` is positive and divides ``value``, which the message calls ``what``."""
    if divisor < 1 or value % divisor != 0:
        raise ValueError(f"{name}: got {divisor}, expected a positive divisor of {what}, {value}")


def check_image(x: Tensor) -> None:
    """Raises ValueError unless ``x`` is a batch of images."""
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
