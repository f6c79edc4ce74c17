"""A stem's training step as an op, and what PyTorch's machinery knows of it; see ``_training_op.py`` for units'.

csrc/cpu/training/stem.cpp computes it. The op takes the convolution's weight and bias, its batch norm's weight and bias
and, where that does not normalize by the batch, its running mean and variance; where there is no norm, all four are
None and eps is 0.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from shufflenet_ext import _native
from shufflenet_ext._checks import check_image, check_stem
from shufflenet_ext._training_op import (
    TrainedStage,
    flops_of,
    in_plain_pytorch,
    make_differentiable,
    plain_gradients,
    processes_of,
    raising_what_failed,
    untrainable,
    update_running_statistics,
    uses_batch,
)

_TENSORS = "Tensor conv_weight, Tensor? conv_bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? bn_mean, Tensor? bn_var"
_OPTIONS = "float eps, bool of_batch, int stride, int padding, bool max_pool, str processes"
_TRAINED = 5  # inputs, x and the first of the tensors, that have gradients
_INPUTS = 7

NAME, BACKWARD_NAME = "stem_training", "stem_training_backward"


def _check(x: Tensor, tensors: Sequence[Tensor | None], options: dict[str, Any]) -> None:
    """Raises TypeError or ValueError for arguments that describe no stem, or a norm that does not fit it."""
    check_image(x)
    weight, bias, *norm = tensors
    check_stem(x, weight, bias, stride=options["stride"], padding=options["padding"])
    assert weight is not None
    for name, tensor in zip(("weight", "bias", "mean", "var"), norm, strict=True):
        if tensor is not None and tuple(tensor.shape) != (len(weight),):
            raise ValueError(f"bn_{name}: got shape {list(tensor.shape)}, expected [{len(weight)}]")
    if (norm[2] is None) != (norm[3] is None):
        raise ValueError("bn_mean and bn_var: got one of them, expected both or none")


def plain(x: Tensor, *tensors: Tensor | None, eps: float, of_batch: bool, **options: Any) -> tuple[Tensor, ...]:
    """The op in plain PyTorch, which can differentiate and transform it."""
    _check(x, tensors, options)
    weight, bias, gamma, beta, mean, var = tensors
    assert weight is not None
    y = convolved = F.conv2d(x, weight, stride=options["stride"], padding=options["padding"])
    with torch.no_grad():
        of_y = y.double()
        found = torch.var_mean(of_y, (0, 2, 3), correction=1)[::-1] if of_batch else (mean, var)
    y = y if bias is None else y + bias.view(1, -1, 1, 1)
    if of_batch or mean is not None:
        y = F.batch_norm(y, mean, var, gamma, beta, of_batch, 0.0, eps)
    y = F.relu(y)
    result = F.max_pool2d(y, 3, stride=2, padding=1) if options["max_pool"] else y
    statistics = (of_y.new_zeros(len(weight)) if each is None else each.double() for each in found)
    return result, convolved, torch.cat([*statistics])


def _native_forward(
    x: Tensor, *tensors: Tensor | None, eps: float, of_batch: bool, **options: Any
) -> tuple[Tensor, ...]:
    with raising_what_failed():
        return tuple(torch.ops.shufflenet_ext.training_stem(x, tensors, eps, of_batch, **options))


def _convolved_size(x: Tensor, weight: Tensor, stride: int, padding: int) -> list[Any]:
    return [(size + 2 * padding - weight.shape[2]) // stride + 1 for size in x.shape[2:]]


def _fake_forward(x: Tensor, *tensors: Tensor | None, eps: float, of_batch: bool, **options: Any) -> tuple[Tensor, ...]:
    _check(x, tensors, options)
    weight = tensors[0]
    assert weight is not None
    size = _convolved_size(x, weight, options["stride"], options["padding"])
    pooled = [(each - 1) // 2 + 1 for each in size] if options["max_pool"] else size
    result = x.new_empty(len(x), len(weight), *pooled).to(memory_format=_native.memory_format(x))
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32  # that sums are in
    y = x.new_empty((len(x), len(weight), *size), dtype=dtype)
    return result, y, x.new_empty(3 * len(weight) + 2, dtype=torch.float64)


def _native_backward(
    gradient: Tensor,
    x: Tensor,
    kept: list[Tensor],
    *tensors: Tensor | None,
    wanted: list[bool],
    eps: float,
    of_batch: bool,
    **options: Any,
) -> list[Tensor]:
    weight = tensors[0]
    assert weight is not None
    with raising_what_failed():
        y_gradient, *others = torch.ops.shufflenet_ext.training_stem_backward(
            gradient, x, *kept, tensors, wanted[:2], eps, of_batch, **options
        )
    found = [x.new_empty(0), *others]
    if wanted[0]:
        found[0] = _x_gradient(y_gradient, x, weight, options["stride"], options["padding"])
    return [each if is_wanted else x.new_empty(0) for each, is_wanted in zip(found, wanted, strict=True)]


def _x_gradient(y_gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """That of an image, which PyTorch computes in the dtype of y: few ask for it."""
    geometry = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1
    planes = x.to(y_gradient.dtype, memory_format=torch.contiguous_format).contiguous()
    of_x: Tensor = torch.ops.aten.convolution_backward(
        y_gradient, planes, weight.to(y_gradient.dtype), None, *geometry, [True, False, False]
    )[0]
    return of_x.to(x.dtype, memory_format=_native.memory_format(x))


def _fake_backward(
    gradient: Tensor, x: Tensor, kept: list[Tensor], *tensors: Tensor | None, wanted: list[bool], **options: Any
) -> list[Tensor]:
    formats = [_native.memory_format(x), *[torch.contiguous_format] * (_TRAINED - 1)]
    return [
        torch.empty_like(like, memory_format=torch.contiguous_format).to(memory_format=memory_format)
        if like is not None and is_wanted
        else x.new_empty(0)
        for like, is_wanted, memory_format in zip((x, *tensors[: _TRAINED - 1]), wanted, formats, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    inputs, kept = ctx.saved_tensors[:_INPUTS], ctx.saved_tensors[_INPUTS:]
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
    found: list[Tensor | None] = [None] * _INPUTS
    if gradient is None:
        return tuple(found)
    if torch.is_grad_enabled():  # the gradients are to be differentiated themselves, which PyTorch's operations can be
        if ctx.options["processes"]:
            raise RuntimeError("gradients of gradients: got a batch norm of several processes, expected one of one")
        return plain_gradients(plain, gradient, inputs, wanted, ctx.options)
    op = getattr(torch.ops.shufflenet_ext, BACKWARD_NAME)
    is_wanted = [i in wanted for i in range(_TRAINED)]
    gradients = op(gradient, inputs[0], list(kept), *inputs[1:], wanted=is_wanted, **ctx.options)
    for i in wanted:
        found[i] = gradients[i]
    return tuple(found)


_flops = flops_of(plain)


def _backward_flops(
    gradient: Tensor, x: Tensor, kept: Any, *tensors: Any, wanted: list[bool], out_val: Any, **kwargs: Any
) -> int:
    """The convolution's again for its weight's gradient and for x's."""
    return sum(wanted[:2]) * _flops(x, *tensors, out_val=None, **kwargs)


def unfit(conv: Any, norm: Any) -> str | None:
    """Why the op cannot stand for a stem of this convolution and this norm, or None; None where it can."""
    if type(conv) is not nn.Conv2d or conv.groups != 1 or set(conv.dilation) != {1} or conv.padding_mode != "zeros":
        return "a module of the stem was replaced"
    settings: Any = conv.kernel_size, conv.stride, conv.padding
    is_square = all(not isinstance(each, str) and len(set(each)) == 1 for each in settings)
    if not is_square or settings[1][0] not in (1, 2) or settings[2][0] >= settings[0][0]:
        return "a module of the stem was replaced"
    return untrainable([norm])


def run(x: Tensor, stage: TrainedStage, *, stride: int, padding: int, max_pool: bool) -> Tensor:
    """A stem's training step by the native op, on the norm's running statistics as well.

    Raises ValueError where the norm would normalize single values, as nn.BatchNorm2d does.
    """
    norm, of_batch = stage.norm, uses_batch(stage.norm)
    processes = processes_of(norm) if of_batch else ""
    check_image(x)
    check_stem(x, stage.weight, stage.bias, stride=stride, padding=padding)
    height, width = _convolved_size(x, stage.weight, stride, padding)
    if of_batch and not processes and x.shape[0] * height * width == 1:
        size = [x.shape[0], len(stage.weight), 1, 1]
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
    statistics = [None, None] if of_batch else stage.running_statistics()
    tensors = stage.weight, stage.bias, stage.norm_weight, stage.norm_bias, *statistics
    eps = 0.0 if norm is None else norm.eps
    op = getattr(torch.ops.shufflenet_ext, NAME)
    options = {"stride": stride, "padding": padding, "max_pool": max_pool, "processes": processes}
    result, _, statistics = op(x, *tensors, eps=eps, of_batch=of_batch, **options)
    update_running_statistics([stage], [of_batch], statistics)
    return result


if _native.native_error is None:
    _library = torch.library.Library("shufflenet_ext", "FRAGMENT")
    _library.define(f"{NAME}(Tensor x, {_TENSORS}, *, {_OPTIONS}) -> (Tensor, Tensor, Tensor)")
    _library.define(
        f"{BACKWARD_NAME}(Tensor gradient, Tensor x, Tensor[] kept, {_TENSORS}, *, bool[] wanted, {_OPTIONS}) "
        "-> Tensor[]"
    )
    _library.impl(NAME, _native_forward, "CPU")
    _library.impl(BACKWARD_NAME, _native_backward, "CPU")
    _library.impl(NAME, in_plain_pytorch(plain), "FuncTorchDynamicLayerFrontMode")
    torch.library.register_fake(f"shufflenet_ext::{NAME}", _fake_forward)
    torch.library.register_fake(f"shufflenet_ext::{BACKWARD_NAME}", _fake_backward)
    make_differentiable(_library, NAME, _setup_context, _backward)
    register_flop_formula(getattr(torch.ops.shufflenet_ext, NAME), get_raw=True)(_flops)
    register_flop_formula(getattr(torch.ops.shufflenet_ext, BACKWARD_NAME), get_raw=True)(_backward_flops)
