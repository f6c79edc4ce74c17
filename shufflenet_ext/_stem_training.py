"""A stem's training step on the CPU, by the native passes of csrc/cpu/stem_training.cpp.

    forward   y = conv(x)    result = max_pool(relu(norm(y)))
    backward  gradient of norm(y), from y and the result's    gradient of the weight    gradient of x

Of what lies between, y alone is kept: the backward pass finds anew which of a window's values was the largest. Images
seldom want a gradient of their own, so that one is PyTorch's. Names are those of ``_training.py``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from shufflenet_ext._native import is_channels_last, memory_format
from shufflenet_ext._training import (
    Affine,
    Norm,
    as_given,
    as_matrix,
    as_planes,
    combined,
    compute_dtype,
    empty_moments,
    fixed_statistics,
    norm_coefficients,
    share_of,
    summed,
)

_passes: Any = torch.ops.shufflenet_ext


class Options(NamedTuple):
    """A stem's geometry, as the op's keyword arguments have it."""

    stride: int
    padding: int
    max_pool: bool
    processes: str  # as a unit's


class Kept(NamedTuple):
    """What the backward pass needs of the forward pass: ``mean`` and ``var`` are those that the norm normalizes by."""

    y: Tensor  # of the dtype that sums are in, its planes contiguous
    mean: Tensor  # as all that follows in float64
    var: Tensor
    images: Tensor  # in the batches of all processes


def convolved_size(x: Tensor, weight: Tensor, o: Options) -> tuple[Any, Any]:
    """The height and width of the convolution's result."""
    height, width = ((size + 2 * o.padding - weight.shape[2]) // o.stride + 1 for size in x.shape[2:])
    return height, width


def result_size(size: tuple[Any, Any], o: Options) -> tuple[Any, Any]:
    """The height and width of a stem's result, of those of its convolution's."""
    return ((size[0] - 1) // 2 + 1, (size[1] - 1) // 2 + 1) if o.max_pool else size


def _image(x: Tensor) -> Tensor:
    """x as the passes read it: dense, in one of the two formats."""
    return x.contiguous(memory_format=memory_format(x)) if is_channels_last(x) else x.contiguous()


def _of_convolution(weight: Tensor, o: Options) -> dict[str, int]:
    return {"kernel_size": weight.shape[2], "stride": o.stride, "padding": o.padding}


def forward(given: Tensor, weight: Tensor, norm: Norm, o: Options) -> tuple[Tensor, Kept]:
    """A stem's result, its norm in training mode or not, and what its backward pass needs."""
    n, channels, dtype = len(given), len(weight), compute_dtype(given)
    (images,) = summed(o.processes, torch.tensor(float(n), dtype=torch.float64))
    y = given.new_empty((n, channels, *convolved_size(given, weight, o)), dtype=dtype)
    moments = empty_moments(n, channels, norm.of_batch)
    _passes.training_stem(_image(given), as_matrix(weight, dtype), y, moments, **_of_convolution(weight, o))
    pixels = y.shape[2] * y.shape[3]
    if moments is None:
        mean, var = (each.clone() for each in fixed_statistics(norm, channels))  # no outputs that are inputs
    else:
        mean, var = combined(moments, pixels, images, o.processes)
    affine = Affine.of(norm, mean, var)
    result = y.new_empty(n, channels, *result_size((y.shape[2], y.shape[3]), o))
    _passes.training_stem_norm(y, affine.scale, affine.shift, result, max_pool=o.max_pool)
    return as_given(result, given), Kept(y, mean, var, images)


class Gradients(NamedTuple):
    """Of a stem's inputs; None for those that nobody wants."""

    x: Tensor | None
    weight: Tensor | None
    conv_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


def backward(
    gradient: Tensor, given: Tensor, kept: Kept, weight: Tensor, norm: Norm, o: Options, wanted: tuple[bool, bool]
) -> Gradients:
    """The gradients of the forward pass, those of x and of the weight where they are wanted."""
    y, affine = kept.y, Affine.of(norm, kept.mean, kept.var)
    of_norm, sums = torch.empty_like(y), torch.empty(2, len(weight), dtype=torch.float64)
    vectors = kept.mean, affine.scale, affine.shift
    _passes.training_stem_norm_backward(as_planes(gradient), y, *vectors, of_norm, sums, max_pool=o.max_pool)
    total, with_y = summed(o.processes, *sums)
    coefficients = norm_coefficients(affine, norm.of_batch, kept.images * (y.shape[2] * y.shape[3]), total, with_y)
    of_x = of_weight = None
    if wanted[1]:
        of_weight = torch.empty(len(weight), weight[0].numel(), dtype=torch.float64)
        _passes.training_stem_weight_backward(
            _image(given), of_norm, y, coefficients, of_weight, **_of_convolution(weight, o)
        )
        of_weight = of_weight.view(weight.shape)
    if wanted[0]:
        if norm.of_batch:
            _passes.training_norm_backward(of_norm, y, coefficients)
        else:
            of_norm *= affine.scale.to(y.dtype).view(1, -1, 1, 1)
        of_x = _x_gradient(of_norm, given, weight, o)
    share = share_of(o.processes)
    of_bias = torch.zeros_like(total) if norm.of_batch else affine.scale * total
    return Gradients(of_x, of_weight, share * of_bias, share * affine.rstd * with_y, share * total)


def _x_gradient(y_gradient: Tensor, given: Tensor, weight: Tensor, o: Options) -> Tensor:
    geometry = [o.stride] * 2, [o.padding] * 2, [1, 1], False, [0, 0], 1
    x, matrix = as_planes(given), weight.to(y_gradient.dtype)
    of_x = torch.ops.aten.convolution_backward(y_gradient, x, matrix, None, *geometry, [True, False, False])[0]
    return as_given(of_x, given)
