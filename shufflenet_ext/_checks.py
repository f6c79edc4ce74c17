"""Checks the ops' arguments for the reference and the fake kernels. csrc/arguments.h does so for the native kernels."""

import torch
from torch import Tensor
from torch.overrides import wrap_torch_function

MOST_STEM_SIZE = 11  # of a kernel; csrc/network.h

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


def check_positive(name: str, value: int) -> None:
    """Raises TypeError or ValueError unless ``value`` is an integer of at least 1."""
    check_int(name, value)
    if value < 1:
        raise ValueError(f"{name}: got {value}, expected a positive int")


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


def _check_rows(name: str, weight: Tensor | None, expected: str) -> int:
    check_tensor(name, weight)
    assert weight is not None
    if weight.dim() != 4 or weight.shape[0] < 1:
        raise ValueError(f"{name}: got shape {list(weight.shape)}, expected {expected}")
    return weight.shape[0]


def check_unit_v2(
    x: Tensor,
    conv1: tuple[Tensor, Tensor | None],
    conv2: tuple[Tensor, Tensor | None],
    conv3: tuple[Tensor, Tensor | None],
    shortcut1: tuple[Tensor | None, Tensor | None],
    shortcut2: tuple[Tensor | None, Tensor | None],
    *,
    stride: int,
    split_groups: int,
    shuffle_groups: int,
) -> None:
    """TypeError or ValueError, naming the argument, unless the arguments describe a unit of ShuffleNet v2."""
    check_tensor("x", x)
    for name, number in (("stride", stride), ("split_groups", split_groups), ("shuffle_groups", shuffle_groups)):
        check_int(name, number)
    check_image(x)
    if stride not in (1, 2):
        raise ValueError(f"stride: got {stride}, expected 1 or 2")
    channels = x.shape[1]
    if stride == 1 and channels % 2 != 0:
        expected = "an even number of channels (with stride 1, half of them pass by)"
        raise ValueError(f"x: got shape {list(x.shape)}, expected {expected}")
    mid = _check_rows("conv1_weight", conv1[0], "[mid_channels, the channels that it reads, 1, 1]")
    out = _check_rows("conv3_weight", conv3[0], "[out_channels, mid_channels, 1, 1]")
    check_tensor("conv2_weight", conv2[0])
    _check_convolution("conv1", *conv1, (mid, channels // 2 if stride == 1 else channels, 1, 1), x)
    _check_convolution("conv2", *conv2, (mid, 1, 3, 3), x)
    _check_convolution("conv3", *conv3, (out, mid, 1, 1), x)
    if stride == 1 and out != channels // 2:
        expected = f"{channels // 2} (with stride 1, half of x passes by, and the other half's place is taken)"
        raise ValueError(f"conv3_weight: got {out} rows, expected {expected}")
    for name, (weight, _) in (("shortcut1_weight", shortcut1), ("shortcut2_weight", shortcut2)):
        if (weight is not None) != (stride == 2):
            got, expected = ("None", "a tensor") if stride == 2 else ("a tensor", "None")
            raise ValueError(f"{name}: got {got} with stride {stride}, expected {expected}")
    joined = out + channels // 2
    if stride == 2:
        shortcut_channels = _check_rows("shortcut2_weight", shortcut2[0], "[shortcut_channels, x's channels, 1, 1]")
        check_tensor("shortcut1_weight", shortcut1[0])
        assert shortcut1[0] is not None
        assert shortcut2[0] is not None
        _check_convolution("shortcut1", shortcut1[0], shortcut1[1], (channels, 1, 3, 3), x)
        _check_convolution("shortcut2", shortcut2[0], shortcut2[1], (shortcut_channels, channels, 1, 1), x)
        joined = out + shortcut_channels
    check_divides("split_groups", split_groups, "x's channels", channels)
    check_divides("shuffle_groups", shuffle_groups, "the result's channels", joined)


def check_stem(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, stride: int, padding: int) -> None:
    """TypeError or ValueError, naming the argument, unless they describe a stem's convolution of a batch of images."""
    check_int("stride", stride)
    check_int("padding", padding)
    expected = "[out_channels, x's channels, kernel_size, kernel_size]"
    rows = _check_rows("conv_weight", weight, expected)
    assert weight is not None
    size = weight.shape[2]
    _check_convolution("conv", weight, bias, (rows, x.shape[1], size, size), x)
    if not 1 <= size <= MOST_STEM_SIZE:
        raise ValueError(f"conv_weight: got kernel_size {size}, expected 1 to {MOST_STEM_SIZE}")
    if stride not in (1, 2):
        raise ValueError(f"stride: got {stride}, expected 1 or 2")
    if not 0 <= padding < size:
        raise ValueError(f"padding: got {padding}, expected 0 to {size - 1}")
    if min(x.shape[2:]) + 2 * padding < size:
        raise ValueError(f"x: got shape {list(x.shape)}, expected images that a window of {size} fits into")


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
