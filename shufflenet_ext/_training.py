"""A unit's training step on the CPU, by the native passes of csrc/cpu/training.cpp.

conv3's result, the largest intermediate tensor, is neither stored nor computed twice. It is linear in what conv3
reads, so batch norm 3's statistics follow from that tensor's mean and covariance (its Gram matrix within each group),
and all sums that the backward pass needs from its products with the incoming gradient. What is left are passes over the
tensors:

    forward   y1 = conv1(x)    y2 = conv2(shuffle(relu(bn1(y1))))    result = relu(bn3(conv3(bn2(y2))) + x)
    backward  products of the gradient with y2    gradient of y2    gradient of y1    gradient of x

and small vectors and matrices, which are computed here, in float64. Names: ``mean`` and ``rstd`` of a norm are those
that it normalizes by, of the batch or running ones, less the convolution's bias, which y1 and y2 do not have;
``scale = weight * rstd``. What conv3 reads is ``slope * (v - centre) + at_centre``: v is y2, or relu(bn2(y2)) where a
ReLU follows the depthwise convolution.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from shufflenet_ext._native import is_channels_last

_passes: Any = torch.ops.shufflenet_ext


class Options(NamedTuple):
    """A unit's geometry, as the op's keyword arguments have it."""

    conv1_groups: int
    groups: int
    stride: int
    conv2_relu: bool
    pool_count_include_pad: bool
    shuffle_groups: int
    shortcut_first: bool
    shortcut_relu: bool
    processes: str  # the name of the process group that shares the norms' statistics; empty: this process has its own


class Norm(NamedTuple):
    """A convolution's bias, and the batch norm behind it. Without statistics, and with an eps of 0, it does nothing."""

    conv_bias: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float
    of_batch: bool  # whether it normalizes by the batch's statistics


class Statistics(NamedTuple):
    """What the backward pass needs of the forward pass beside its tensors, in float64."""

    mean1: Tensor
    var1: Tensor
    mean2: Tensor
    var2: Tensor
    mean3: Tensor
    var3: Tensor
    centre: Tensor
    covariance: Tensor  # of v within each group; empty where norm 3 does not use the batch's statistics
    images: Tensor  # in the batches of all processes


class Forward(NamedTuple):
    result: Tensor
    y1: Tensor
    y2: Tensor
    statistics: Statistics


@dataclass(frozen=True)
class _Affine:
    """A norm as it is applied: ``scale * (y - mean) + bias``."""

    mean: Tensor
    rstd: Tensor
    scale: Tensor
    bias: Tensor

    @staticmethod
    def of(norm: Norm, mean: Tensor, var: Tensor) -> "_Affine":
        rstd = torch.rsqrt(var + norm.eps)
        scale = rstd if norm.weight is None else norm.weight.double() * rstd
        return _Affine(mean, rstd, scale, torch.zeros_like(mean) if norm.bias is None else norm.bias.double())

    @property
    def shift(self) -> Tensor:
        return self.bias - self.scale * self.mean


def _fixed_statistics(norm: Norm, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of a norm that does not use the batch's; 0 and 1 of one that has none."""
    mean, var = norm.running_mean, norm.running_var
    mean = torch.zeros(channels, dtype=torch.float64) if mean is None else mean.double()
    var = torch.ones(channels, dtype=torch.float64) if var is None else var.double()
    return mean if norm.conv_bias is None else mean - norm.conv_bias.double(), var


def _summed(o: Options, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The sums of tensors over all processes that share the norms' statistics."""
    if not o.processes:
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat, group=process_group(o))
    parts = flat.split([tensor.numel() for tensor in tensors])
    return tuple(part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True))


def process_group(o: Options) -> Any:
    return distributed.distributed_c10d._resolve_process_group(o.processes)  # type: ignore[arg-type]  # a str


def _combined(moments: Tensor, pixels: int, images: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """Mean and variance of a batch from each image's mean and sum of squared deviations."""
    means, squares = moments
    mean = _summed(o, means.sum(0))[0] / images
    (deviations,) = _summed(o, squares.sum(0) + pixels * (means - mean).square_().sum(0))
    return mean, deviations / (images * pixels)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _planes(x: Tensor) -> Tensor:
    """x in the dtype that sums are in, its planes contiguous."""
    return x.to(_compute_dtype(x), memory_format=torch.contiguous_format).contiguous()


def _matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.reshape(len(weight), -1).to(dtype).contiguous()


def _empty(like: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    return like.new_empty(like.shape[0], channels, *size)


def _moments(n: int, channels: int, wanted: bool) -> Tensor | None:
    return torch.empty(2, n, channels, dtype=torch.float64) if wanted else None


def _slices(result: Tensor, out_channels: int, o: Options) -> tuple[Tensor, Tensor | None]:
    """The channels of conv3 and, with stride 2, those of the pooled shortcut."""
    if o.stride == 1:
        return result, None
    pooled = result.shape[1] - out_channels
    if o.shortcut_first:
        return result[:, pooled:], result[:, :pooled]
    return result[:, :out_channels], result[:, out_channels:]


def _read_by_conv3(y2: Tensor, norm2: _Affine, o: Options) -> Tensor:
    if not o.conv2_relu:
        return y2
    scale, shift = (t.to(y2.dtype).view(1, -1, 1, 1) for t in (norm2.scale, norm2.shift))
    return torch.addcmul(shift, y2, scale).relu_()


class _Conv3:
    """What follows from conv3's weights and norm 2: see the module's docstring."""

    def __init__(self, weight: Tensor, norm2: _Affine, centre: Tensor, o: Options) -> None:
        rows, depth = len(weight), weight.shape[1]
        self.weight = weight.double().view(o.groups, rows // o.groups, depth)
        self.slope = None if o.conv2_relu else norm2.scale.view(o.groups, 1, depth)
        self.of_v = self.weight if self.slope is None else self.weight * self.slope
        at_centre = centre if o.conv2_relu else norm2.scale * (centre - norm2.mean) + norm2.bias
        self.at_centre = at_centre.view(o.groups, 1, depth)

    def times_slope(self, matrix: Tensor) -> Tensor:
        return matrix if self.slope is None else matrix * self.slope

    def mean_at_centre(self) -> Tensor:
        return (self.weight * self.at_centre).sum(2).flatten()


def forward(x: Tensor, weights: tuple[Tensor, Tensor, Tensor], norms: tuple[Norm, Norm, Norm], o: Options) -> Forward:
    given, x = x, _planes(x)
    dtype, (n, _, height, width) = x.dtype, x.shape
    weight1, weight2, weight3 = (_matrix(weight, dtype) for weight in weights)
    mid, out_channels = len(weight1), len(weight3)
    out_size = (height - 1) // o.stride + 1, (width - 1) // o.stride + 1

    (images,) = _summed(o, torch.tensor(float(n), dtype=torch.float64))
    y1 = _empty(x, mid, (height, width))
    moments = _moments(n, mid, norms[0].of_batch)
    _passes.training_pointwise(x, weight1, None, None, y1, moments, groups=o.conv1_groups)
    of_y1 = None if moments is None else _combined(moments, height * width, images, o)
    mean1, var1 = of_y1 or _fixed_statistics(norms[0], mid)
    norm1 = _Affine.of(norms[0], mean1, var1)

    y2 = _empty(x, mid, out_size)
    pixels = out_size[0] * out_size[1]
    moments = _moments(n, mid, norms[1].of_batch or norms[2].of_batch)
    scale, shift = norm1.scale.to(dtype), norm1.shift.to(dtype)
    _passes.training_depthwise(y1, scale, shift, weight2, y2, moments, shuffle_groups=o.shuffle_groups, stride=o.stride)
    of_y2 = None if moments is None else _combined(moments, pixels, images, o)
    mean2, var2 = of_y2 if of_y2 is not None and norms[1].of_batch else _fixed_statistics(norms[1], mid)
    norm2 = _Affine.of(norms[1], mean2, var2)

    v = _read_by_conv3(y2, norm2, o)
    if o.conv2_relu:
        centre = torch.zeros_like(mean2)
        if norms[2].of_batch:
            centre = _summed(o, v.sum((0, 2, 3), dtype=torch.float64))[0] / (images * pixels)
    else:
        centre = (mean2 if of_y2 is None else of_y2[0]).clone()  # as the op's outputs may not be one tensor
    conv3 = _Conv3(weight3, norm2, centre, o)
    covariance = torch.empty(0, dtype=torch.float64)
    if norms[2].of_batch:
        covariance = torch.empty(mid, mid // o.groups, dtype=torch.float64)
        _passes.training_products(v, v, centre.to(dtype), covariance, groups=o.groups)
        covariance = _summed(o, covariance)[0].view(o.groups, -1, mid // o.groups) / (images * pixels)
        mean3 = conv3.mean_at_centre()
        var3 = ((conv3.of_v @ covariance) * conv3.of_v).sum(2).flatten()
    else:
        mean3, var3 = _fixed_statistics(norms[2], out_channels)
    norm3 = _Affine.of(norms[2], mean3, var3)

    matrix = (conv3.of_v * norm3.scale.view(o.groups, -1, 1)).view(out_channels, -1)
    bias = norm3.bias + norm3.scale * (conv3.mean_at_centre() - mean3)
    bias = bias - (matrix.view_as(conv3.of_v) @ centre.view(o.groups, -1, 1)).flatten()
    result = _empty(x, out_channels + (given.shape[1] if o.stride == 2 else 0), out_size)
    main, pooled = _slices(result, out_channels, o)
    residual = x if o.stride == 1 else None
    _passes.training_pointwise(v, matrix.to(dtype), bias.to(dtype), residual, main, None, groups=o.groups, relu=True)
    if pooled is not None:
        _passes.training_pool(x, pooled, relu=o.shortcut_relu, count_include_pad=o.pool_count_include_pad)
    statistics = Statistics(mean1, var1, mean2, var2, mean3, var3, centre, covariance, images)
    return Forward(_as_given(result, given), y1.to(given.dtype), y2.to(given.dtype), statistics)


def memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def _as_given(tensor: Tensor, given: Tensor) -> Tensor:
    return tensor.to(given.dtype, memory_format=memory_format(given))


_Three = tuple[Tensor | None, Tensor | None, Tensor | None]


class Gradients(NamedTuple):
    """Of the forward pass's tensors; None for those that nobody wants."""

    x: Tensor | None
    weights: _Three
    conv_biases: _Three
    norm_weights: _Three
    norm_biases: _Three


def backward(
    gradient: Tensor,
    x: Tensor,
    forward_pass: Forward,
    weights: tuple[Tensor, Tensor, Tensor],
    norms: tuple[Norm, Norm, Norm],
    o: Options,
    depth: int,
) -> Gradients:
    """The gradients of the forward pass.

    ``depth`` says how far back they are wanted: 1 to norm 3 and conv3, 2 to norm 2 and conv2, 3 to norm 1 and conv1, 4
    to x.
    """
    given, x = x, _planes(x)
    dtype, (n, in_channels, *_) = x.dtype, x.shape
    weight1, weight2, weight3 = (_matrix(weight, dtype) for weight in weights)
    mid, out_channels = len(weight1), len(weight3)
    result, gradient = _planes(forward_pass.result), _planes(gradient)
    y1, y2 = _planes(forward_pass.y1), _planes(forward_pass.y2)
    s = forward_pass.statistics
    norm1, norm2 = _Affine.of(norms[0], s.mean1, s.var1), _Affine.of(norms[1], s.mean2, s.var2)
    norm3 = _Affine.of(norms[2], s.mean3, s.var3)
    v = _read_by_conv3(y2, norm2, o)
    conv3 = _Conv3(weight3, norm2, s.centre, o)
    values = s.images * (y2.shape[2] * y2.shape[3])
    # Sums over all processes give each of them its part of a parameter's gradient: those of the parts add up to it.
    share = 1 / distributed.get_world_size(process_group(o)) if o.processes else 1

    def grouped(vector: Tensor) -> Tensor:
        return vector.view(o.groups, -1, 1)

    # Of conv3's result before its norm, dy3 = scale3 * (dz - total / values - rstd3 * y3 * of_scale3 / values).
    main, pooled = _slices(result, out_channels, o)
    main_gradient, pooled_gradient = _slices(gradient, out_channels, o)
    dz = _empty(x, out_channels, (y2.shape[2], y2.shape[3]))
    products, total = (torch.empty(out_channels, *size, dtype=torch.float64) for size in ((mid // o.groups,), ()))
    _passes.training_relu_backward(main, main_gradient, dz, v, s.centre.to(dtype), products, total, groups=o.groups)
    products, total = _summed(o, products.view_as(conv3.of_v), total)
    with_y3 = norm3.rstd * (conv3.of_v * products).sum(2).flatten()
    if norms[2].of_batch:
        correction = conv3.of_v @ s.covariance * grouped(with_y3 * norm3.rstd)
        products = (products - correction) * grouped(norm3.scale)
        sum3, of_scale3 = torch.zeros_like(total), with_y3
    else:
        products = products * grouped(norm3.scale)
        sum3, of_scale3 = norm3.scale * total, with_y3 + norm3.rstd * total * (conv3.mean_at_centre() - s.mean3)
    of_weight3 = (conv3.times_slope(products) + grouped(sum3) * conv3.at_centre).view(weights[2].shape)
    of_conv3 = [share * each for each in (of_weight3, sum3, of_scale3, total)]
    if depth == 1:
        return Gradients(None, *((None, None, each) for each in of_conv3))

    # Of v: matrix @ dz - b @ (v - centre) - c.
    matrix = conv3.times_slope(conv3.weight * grouped(norm3.scale)).transpose(1, 2)
    sum2 = (conv3.weight * grouped(sum3)).sum(1).flatten()
    with_y2 = (conv3.weight * products).sum(1).flatten()
    b, c = torch.zeros(o.groups, 1, 1, dtype=torch.float64), torch.zeros_like(sum2)
    if norms[2].of_batch:
        b = matrix @ (conv3.of_v * grouped(with_y3 * norm3.rstd / values))
        c = (matrix @ grouped(total / values)).flatten()
    if norms[1].of_batch and not o.conv2_relu:
        b = b + torch.diag_embed((norm2.scale * norm2.rstd.square() * with_y2 / values).view(o.groups, -1))
        c = c + norm2.scale * sum2 / values
    y2_gradient = torch.empty_like(y2)
    added = None
    if norms[1].of_batch or norms[2].of_batch:
        b = b.expand(o.groups, mid // o.groups, mid // o.groups)
        constant = (b @ s.centre.view(o.groups, -1, 1)).flatten() - c
        added = y2_gradient
        _passes.training_pointwise(
            v, -b.reshape(mid, -1).to(dtype), constant.to(dtype), None, added, None, groups=o.groups
        )
    matrix = matrix.reshape(mid, -1).to(dtype).contiguous()
    _passes.training_pointwise(dz, matrix, None, added, y2_gradient, None, groups=o.groups)
    if o.conv2_relu:
        sum2, with_y2 = _relu_norm_backward(v, y2, y2_gradient, norm2, norms[1].of_batch, s.images, o)
    of_scale2 = norm2.rstd * (with_y2 if o.conv2_relu else with_y2 + sum2 * (s.centre - s.mean2))
    conv2_bias = torch.zeros_like(sum2) if norms[1].of_batch else norm2.scale * sum2

    y1_gradient = torch.empty_like(y1)
    sums = torch.empty(n, mid, 11, dtype=torch.float64)
    scale, shift = norm1.scale.to(dtype), norm1.shift.to(dtype)
    _passes.training_depthwise_backward(
        y2_gradient,
        y1,
        s.mean1.to(dtype),
        scale,
        shift,
        weight2,
        y1_gradient,
        sums,
        shuffle_groups=o.shuffle_groups,
        stride=o.stride,
    )
    sums = sums.sum(0)
    before_shuffle = sums[:, :2].view(mid // o.shuffle_groups, o.shuffle_groups, 2).transpose(0, 1).reshape(mid, 2)
    sum1, with_y1 = _summed(o, before_shuffle)[0].unbind(1)
    conv1_bias = torch.zeros_like(sum1) if norms[0].of_batch else norm1.scale * sum1
    gradients = Gradients(
        None,
        (None, sums[:, 2:].reshape(weights[1].shape), of_conv3[0]),
        (share * conv1_bias, share * conv2_bias, of_conv3[1]),
        (share * with_y1 * norm1.rstd, share * of_scale2, of_conv3[2]),
        (share * sum1, share * sum2, of_conv3[3]),
    )
    if depth == 2:
        return gradients

    _norm_backward(norm1, norms[0].of_batch, y1, y1_gradient, sum1, with_y1, s.images)
    # Turned about, as the planes of the first operand are read but once.
    turned = torch.empty(in_channels, mid // o.conv1_groups, dtype=torch.float64)
    _passes.training_products(x, y1_gradient, None, turned, groups=o.conv1_groups)
    of_weight1 = turned.view(o.conv1_groups, -1, turned.shape[1]).transpose(1, 2).reshape(weights[0].shape).contiguous()
    gradients = gradients._replace(weights=(of_weight1, *gradients.weights[1:]))
    if depth == 3:
        return gradients

    transposed = weight1.view(o.conv1_groups, -1, weight1.shape[1]).transpose(1, 2).reshape(in_channels, -1)
    x_gradient = dz
    if pooled is not None:
        assert pooled_gradient is not None
        if o.shortcut_relu:
            kept = torch.empty_like(pooled)
            unused = torch.empty(in_channels, dtype=torch.float64)
            _passes.training_relu_backward(pooled, pooled_gradient, kept, None, None, None, unused)
            pooled_gradient = kept
        x_gradient = torch.empty_like(x)
        _passes.training_pool_backward(pooled_gradient, x_gradient, count_include_pad=o.pool_count_include_pad)
    _passes.training_pointwise(
        y1_gradient, transposed.contiguous(), None, x_gradient, x_gradient, None, groups=o.conv1_groups
    )
    return gradients._replace(x=_as_given(x_gradient, given))


def _norm_backward(
    norm: _Affine, of_batch: bool, y: Tensor, gradient: Tensor, total: Tensor, with_y: Tensor, images: Tensor
) -> None:
    """Replaces the gradient of a norm's result by that of its input."""
    values = images * (y.shape[2] * y.shape[3])
    slope, shift = torch.zeros_like(total), torch.zeros_like(total)
    if of_batch:
        slope = norm.scale * norm.rstd.square() * with_y / values
        shift = norm.scale * total / values
    _passes.training_norm_backward(gradient, y, torch.stack((norm.scale, slope, norm.mean, shift)))


def _relu_norm_backward(
    v: Tensor, y2: Tensor, gradient: Tensor, norm: _Affine, of_batch: bool, images: Tensor, o: Options
) -> tuple[Tensor, Tensor]:
    """Takes a gradient from behind the ReLU that follows norm 2 to y2, where it lies.

    Returns the sums between the two: of the gradient, and of it times what y2 lies above its mean.
    """
    total = torch.empty_like(norm.mean)
    _passes.training_relu_backward(v, gradient, gradient, None, None, None, total)
    deviation = y2 - norm.mean.to(y2.dtype).view(1, -1, 1, 1)
    total, with_y = _summed(o, total, (gradient * deviation).sum((2, 3)).sum(0, dtype=torch.float64))
    _norm_backward(norm, of_batch, y2, gradient, total, with_y, images)
    return total, with_y
