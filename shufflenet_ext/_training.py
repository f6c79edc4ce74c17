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

from shufflenet_ext._native import memory_format

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
class Affine:
    """A norm as it is applied: ``scale * (y - mean) + bias``."""

    mean: Tensor
    rstd: Tensor
    scale: Tensor
    bias: Tensor

    @staticmethod
    def of(norm: Norm, mean: Tensor, var: Tensor) -> "Affine":
        rstd = torch.rsqrt(var + norm.eps)
        scale = rstd if norm.weight is None else norm.weight.double() * rstd
        return Affine(mean, rstd, scale, torch.zeros_like(mean) if norm.bias is None else norm.bias.double())

    @property
    def shift(self) -> Tensor:
        return self.bias - self.scale * self.mean


def fixed_statistics(norm: Norm, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of a norm that does not use the batch's; 0 and 1 of one that has none."""
    mean, var = norm.running_mean, norm.running_var
    mean = torch.zeros(channels, dtype=torch.float64) if mean is None else mean.double()
    var = torch.ones(channels, dtype=torch.float64) if var is None else var.double()
    return mean if norm.conv_bias is None else mean - norm.conv_bias.double(), var


def summed(processes: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The sums of tensors over all processes that share the norms' statistics."""
    if not processes:
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat, group=process_group(processes))
    parts = flat.split([tensor.numel() for tensor in tensors])
    return tuple(part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True))


def process_group(processes: str) -> Any:
    return distributed.distributed_c10d._resolve_process_group(processes)  # type: ignore[arg-type]  # a str


def share_of(processes: str) -> float:
    """What part of a sum over all processes is one's gradient of a parameter, so that all processes' add up to it."""
    return 1 / distributed.get_world_size(process_group(processes)) if processes else 1


def combined(moments: Tensor, pixels: int, images: Tensor, processes: str) -> tuple[Tensor, Tensor]:
    """Mean and variance of a batch from each image's mean and sum of squared deviations."""
    means, squares = moments
    mean = summed(processes, means.sum(0))[0] / images
    (deviations,) = summed(processes, squares.sum(0) + pixels * (means - mean).square_().sum(0))
    return mean, deviations / (images * pixels)


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def as_planes(x: Tensor) -> Tensor:
    """x in the dtype that sums are in, its planes contiguous."""
    return x.to(compute_dtype(x), memory_format=torch.contiguous_format).contiguous()


def as_matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.reshape(len(weight), -1).to(dtype).contiguous()


def _empty(like: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    return like.new_empty(like.shape[0], channels, *size)


def empty_moments(n: int, channels: int, wanted: bool) -> Tensor | None:
    return torch.empty(2, n, channels, dtype=torch.float64) if wanted else None


def _slices(result: Tensor, out_channels: int, o: Options) -> tuple[Tensor, Tensor | None]:
    """The channels of conv3 and, with stride 2, those of the pooled shortcut."""
    if o.stride == 1:
        return result, None
    pooled = result.shape[1] - out_channels
    if o.shortcut_first:
        return result[:, pooled:], result[:, :pooled]
    return result[:, :out_channels], result[:, out_channels:]


def _read_by_conv3(y2: Tensor, norm2: Affine, o: Options) -> Tensor:
    if not o.conv2_relu:
        return y2
    scale, shift = (t.to(y2.dtype).view(1, -1, 1, 1) for t in (norm2.scale, norm2.shift))
    return torch.addcmul(shift, y2, scale).relu_()


class _Conv3:
    """What follows from conv3's weights and norm 2: see the module's docstring."""

    def __init__(self, weight: Tensor, norm2: Affine, centre: Tensor, o: Options) -> None:
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


class _Sizes(NamedTuple):
    """Of a unit's tensors."""

    n: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    mid: int
    out_channels: int

    @staticmethod
    def of(x: Tensor, weights: "Weights", o: Options) -> "_Sizes":
        n, _, height, width = x.shape
        out_size = (height - 1) // o.stride + 1, (width - 1) // o.stride + 1
        return _Sizes(n, (height, width), out_size, len(weights[0]), len(weights[2]))


Weights = tuple[Tensor, Tensor, Tensor]
Norms = tuple[Norm, Norm, Norm]


def forward(given: Tensor, weights: Weights, norms: Norms, o: Options) -> Forward:
    """A unit's result, its norms in training mode or not, and what its backward pass needs."""
    x = as_planes(given)
    weight1, weight2, weight3 = (as_matrix(weight, x.dtype) for weight in weights)
    sizes = _Sizes.of(x, weights, o)
    (images,) = summed(o.processes, torch.tensor(float(sizes.n), dtype=torch.float64))

    y1 = _empty(x, sizes.mid, sizes.in_size)
    moments = empty_moments(sizes.n, sizes.mid, norms[0].of_batch)
    _passes.training_pointwise(x, weight1, None, None, y1, moments, groups=o.conv1_groups)
    of_y1 = None if moments is None else combined(moments, y1[0, 0].numel(), images, o.processes)
    mean1, var1 = of_y1 or fixed_statistics(norms[0], sizes.mid)
    norm1 = Affine.of(norms[0], mean1, var1)

    y2 = _empty(x, sizes.mid, sizes.out_size)
    pixels = y2[0, 0].numel()
    moments = empty_moments(sizes.n, sizes.mid, norms[1].of_batch or norms[2].of_batch)
    affine1 = norm1.scale.to(x.dtype), norm1.shift.to(x.dtype)
    _passes.training_depthwise(y1, *affine1, weight2, y2, moments, shuffle_groups=o.shuffle_groups, stride=o.stride)
    of_y2 = None if moments is None else combined(moments, pixels, images, o.processes)
    mean2, var2 = of_y2 if of_y2 is not None and norms[1].of_batch else fixed_statistics(norms[1], sizes.mid)
    norm2 = Affine.of(norms[1], mean2, var2)

    v = _read_by_conv3(y2, norm2, o)
    if not o.conv2_relu:
        centre = (mean2 if of_y2 is None else of_y2[0]).clone()  # as the op's outputs may not be one tensor
    elif norms[2].of_batch:
        centre = summed(o.processes, v.sum((0, 2, 3), dtype=torch.float64))[0] / (images * pixels)
    else:
        centre = torch.zeros_like(mean2)
    conv3 = _Conv3(weight3, norm2, centre, o)
    covariance = torch.empty(0, dtype=torch.float64)
    if norms[2].of_batch:
        covariance = _covariance(v, centre, images * pixels, o)
        mean3 = conv3.mean_at_centre()
        var3 = ((conv3.of_v @ covariance) * conv3.of_v).sum(2).flatten()
    else:
        mean3, var3 = fixed_statistics(norms[2], sizes.out_channels)
    result = _result(x, v, conv3, Affine.of(norms[2], mean3, var3), centre, sizes, o)
    statistics = Statistics(mean1, var1, mean2, var2, mean3, var3, centre, covariance, images)
    return Forward(as_given(result, given), y1.to(given.dtype), y2.to(given.dtype), statistics)


def _covariance(v: Tensor, centre: Tensor, values: Tensor, o: Options) -> Tensor:
    """Of the channels of each group of conv3's input."""
    of_group = v.shape[1] // o.groups
    products = torch.empty(v.shape[1], of_group, dtype=torch.float64)
    _passes.training_products(v, v, centre.to(v.dtype), products, groups=o.groups)
    return summed(o.processes, products)[0].view(o.groups, of_group, of_group) / values


def _result(x: Tensor, v: Tensor, conv3: _Conv3, norm3: Affine, centre: Tensor, sizes: _Sizes, o: Options) -> Tensor:
    """The last pass: conv3 and its norm as one convolution of v, the shortcut and the last ReLU."""
    matrix = conv3.of_v * norm3.scale.view(o.groups, -1, 1)
    bias = norm3.bias + norm3.scale * (conv3.mean_at_centre() - norm3.mean)
    bias = bias - (matrix @ centre.view(o.groups, -1, 1)).flatten()
    result = _empty(x, sizes.out_channels + (x.shape[1] if o.stride == 2 else 0), sizes.out_size)
    main, pooled = _slices(result, sizes.out_channels, o)
    folded = matrix.view(sizes.out_channels, -1).to(x.dtype), bias.to(x.dtype)
    residual = x if o.stride == 1 else None
    _passes.training_pointwise(v, *folded, residual, main, None, groups=o.groups, relu=True)
    if pooled is not None:
        _passes.training_pool(x, pooled, relu=o.shortcut_relu, count_include_pad=o.pool_count_include_pad)
    return result


def as_given(tensor: Tensor, given: Tensor) -> Tensor:
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
    gradient: Tensor, x: Tensor, done: Forward, weights: Weights, norms: Norms, o: Options, depth: int
) -> Gradients:
    """The gradients of the forward pass.

    ``depth`` says how far back they are wanted: 1 to norm 3 and conv3, 2 to norm 2 and conv2, 3 to norm 1 and conv1, 4
    to x.
    """
    run = _Backward(gradient, x, done, weights, norms, o)
    of_conv3 = run.conv3_gradients()
    if depth == 1:
        return Gradients(None, *((None, None, each) for each in of_conv3))
    of_conv2 = run.conv2_gradients()
    of_conv1 = run.conv1_gradients(depth > 2)
    x_gradient = run.x_gradient() if depth == 4 else None
    return Gradients(x_gradient, *zip(of_conv1, of_conv2, of_conv3, strict=True))


# Of a convolution's weight and bias, and its norm's.
_StageGradients = tuple[Tensor | None, Tensor, Tensor, Tensor]


class _Backward:
    """The backward pass of a unit, whose methods are called in their order."""

    def __init__(self, gradient: Tensor, x: Tensor, done: Forward, weights: Weights, norms: Norms, o: Options) -> None:
        self.given, self.x, self.o, self.norms = x, as_planes(x), o, norms
        self.shapes = [weight.shape for weight in weights]
        self.weight1, self.weight2, weight3 = (as_matrix(weight, self.x.dtype) for weight in weights)
        self.y1, self.y2 = as_planes(done.y1), as_planes(done.y2)
        self.s = s = done.statistics
        self.norm1, self.norm2, self.norm3 = (
            Affine.of(norm, mean, var)
            for norm, mean, var in zip(norms, (s.mean1, s.mean2, s.mean3), (s.var1, s.var2, s.var3), strict=True)
        )
        self.v = _read_by_conv3(self.y2, self.norm2, o)
        self.conv3 = _Conv3(weight3, self.norm2, s.centre, o)
        self.main, self.pooled = _slices(as_planes(done.result), len(weight3), o)
        self.main_gradient, self.pooled_gradient = _slices(as_planes(gradient), len(weight3), o)
        self.values = s.images * self.y2[0, 0].numel()  # that norms 2 and 3 have of a channel
        self.share = share_of(o.processes)

    def _grouped(self, vector: Tensor) -> Tensor:
        return vector.view(self.o.groups, -1, 1)

    def _shared(self, *gradients: Tensor) -> Any:
        return tuple(self.share * gradient for gradient in gradients)

    def conv3_gradients(self) -> _StageGradients:
        # Of conv3's result before its norm, dy3 = scale3 * (dz - total / values - rstd3 * y3 * with_y3 / values).
        o, conv3, norm3 = self.o, self.conv3, self.norm3
        self.dz = torch.empty_like(self.main, memory_format=torch.contiguous_format)
        products = torch.empty(len(norm3.mean), conv3.weight.shape[2], dtype=torch.float64)
        total, centre = torch.empty_like(norm3.mean), self.s.centre.to(self.x.dtype)
        _passes.training_relu_backward(
            self.main, self.main_gradient, self.dz, self.v, centre, products, total, groups=o.groups
        )
        products, self.total = summed(o.processes, products.view_as(conv3.of_v), total)
        self.with_y3 = norm3.rstd * (conv3.of_v * products).sum(2).flatten()
        if self.norms[2].of_batch:
            products = products - conv3.of_v @ self.s.covariance * self._grouped(self.with_y3 * norm3.rstd)
            self.sum3, of_scale = torch.zeros_like(total), self.with_y3
        else:
            above_mean = conv3.mean_at_centre() - self.s.mean3
            self.sum3, of_scale = norm3.scale * self.total, self.with_y3 + norm3.rstd * self.total * above_mean
        self.products = products * self._grouped(norm3.scale)  # of dy3 with v
        of_weight = conv3.times_slope(self.products) + self._grouped(self.sum3) * conv3.at_centre
        gradients: _StageGradients = self._shared(of_weight.view(self.shapes[2]), self.sum3, of_scale, self.total)
        return gradients

    def conv2_gradients(self) -> _StageGradients:
        o, norm1, of_batch = self.o, self.norm1, self.norms[1].of_batch
        self._find_y2_gradient()
        if o.conv2_relu:
            self._pass_relu_and_norm2()
        of_scale = self.norm2.rstd * self.with_y2
        if not o.conv2_relu:
            of_scale = of_scale + self.norm2.rstd * self.sum2 * (self.s.centre - self.s.mean2)
        of_bias = torch.zeros_like(self.sum2) if of_batch else self.norm2.scale * self.sum2

        self.y1_gradient = torch.empty_like(self.y1)
        sums = torch.empty(len(self.x), len(self.weight1), 11, dtype=torch.float64)
        vectors = (vector.to(self.x.dtype) for vector in (self.s.mean1, norm1.scale, norm1.shift))
        _passes.training_depthwise_backward(
            self.y2_gradient,
            self.y1,
            *vectors,
            self.weight2,
            self.y1_gradient,
            sums,
            shuffle_groups=o.shuffle_groups,
            stride=o.stride,
        )
        sums = sums.sum(0)
        before_shuffle = sums[:, :2].view(-1, o.shuffle_groups, 2).transpose(0, 1).reshape(-1, 2)
        self.sum1, self.with_y1 = summed(o.processes, before_shuffle)[0].unbind(1)
        return (sums[:, 2:].reshape(self.shapes[1]), *self._shared(of_bias, of_scale, self.sum2))

    def _find_y2_gradient(self) -> None:
        """That of v, which is y2's own without a ReLU: matrix @ dz - b @ (v - centre) - c."""
        o, conv3, norm2 = self.o, self.conv3, self.norm2
        matrix = conv3.times_slope(conv3.weight * self._grouped(self.norm3.scale)).transpose(1, 2)
        self.sum2 = (conv3.weight * self._grouped(self.sum3)).sum(1).flatten()
        self.with_y2 = (conv3.weight * self.products).sum(1).flatten()
        mid, depth = len(self.sum2), conv3.weight.shape[2]
        b, c = torch.zeros(o.groups, depth, depth, dtype=torch.float64), torch.zeros_like(self.sum2)
        if self.norms[2].of_batch:
            b = matrix @ (conv3.of_v * self._grouped(self.with_y3 * self.norm3.rstd / self.values))
            c = (matrix @ self._grouped(self.total / self.values)).flatten()
        if self.norms[1].of_batch and not o.conv2_relu:
            diagonal = norm2.scale * norm2.rstd.square() * self.with_y2 / self.values
            b = b + torch.diag_embed(diagonal.view(o.groups, -1))
            c = c + norm2.scale * self.sum2 / self.values
        self.y2_gradient, added = torch.empty_like(self.y2), None
        if self.norms[1].of_batch or self.norms[2].of_batch:
            added = self.y2_gradient
            constant = (b @ self._grouped(self.s.centre)).flatten() - c
            of_v = -b.reshape(mid, -1).to(self.x.dtype), constant.to(self.x.dtype)
            _passes.training_pointwise(self.v, *of_v, None, added, None, groups=o.groups)
        matrix = matrix.reshape(mid, -1).to(self.x.dtype).contiguous()
        _passes.training_pointwise(self.dz, matrix, None, added, self.y2_gradient, None, groups=o.groups)

    def _pass_relu_and_norm2(self) -> None:
        """Takes the gradient of v to y2, and finds the sums between the two."""
        total, norm, gradient = torch.empty_like(self.norm2.mean), self.norm2, self.y2_gradient
        _passes.training_relu_backward(self.v, gradient, gradient, None, None, None, total)
        deviation = self.y2 - norm.mean.to(self.y2.dtype).view(1, -1, 1, 1)
        with_y2 = (gradient * deviation).sum((2, 3)).sum(0, dtype=torch.float64)
        self.sum2, self.with_y2 = summed(self.o.processes, total, with_y2)
        _norm_backward(norm, self.norms[1].of_batch, self.y2, gradient, self.sum2, self.with_y2, self.s.images)

    def conv1_gradients(self, with_weight: bool) -> _StageGradients:
        o, norm1, of_batch = self.o, self.norm1, self.norms[0].of_batch
        of_bias = torch.zeros_like(self.sum1) if of_batch else norm1.scale * self.sum1
        gradients = self._shared(of_bias, self.with_y1 * norm1.rstd, self.sum1)
        if not with_weight:
            return (None, *gradients)
        _norm_backward(norm1, of_batch, self.y1, self.y1_gradient, self.sum1, self.with_y1, self.s.images)
        # Turned about, as the planes of the first operand are read but once.
        turned = torch.empty(self.x.shape[1], len(self.weight1) // o.conv1_groups, dtype=torch.float64)
        _passes.training_products(self.x, self.y1_gradient, None, turned, groups=o.conv1_groups)
        of_weight = turned.view(o.conv1_groups, -1, turned.shape[1]).transpose(1, 2)
        return (of_weight.reshape(self.shapes[0]).contiguous(), *gradients)

    def x_gradient(self) -> Tensor:
        o, gradient = self.o, self.dz
        if self.pooled is not None and self.pooled_gradient is not None:
            pooled_gradient = self.pooled_gradient
            if o.shortcut_relu:
                pooled_gradient = torch.empty_like(self.pooled, memory_format=torch.contiguous_format)
                unused = torch.empty(self.x.shape[1], dtype=torch.float64)
                _passes.training_relu_backward(
                    self.pooled, self.pooled_gradient, pooled_gradient, None, None, None, unused
                )
            gradient = torch.empty_like(self.x)
            _passes.training_pool_backward(pooled_gradient, gradient, count_include_pad=o.pool_count_include_pad)
        weight = self.weight1
        turned = weight.view(o.conv1_groups, -1, weight.shape[1]).transpose(1, 2).reshape(self.x.shape[1], -1)
        _passes.training_pointwise(
            self.y1_gradient, turned.contiguous(), None, gradient, gradient, None, groups=o.conv1_groups
        )
        return as_given(gradient, self.given)


def norm_coefficients(norm: Affine, of_batch: bool, values: Tensor, total: Tensor, with_y: Tensor) -> Tensor:
    """What training_norm_backward makes the gradient of a norm's input of: scales, slopes, means and shifts.

    ``total`` is the sum of the gradient of the norm's result, ``with_y`` that of it times y - mean, over ``values``.
    """
    slope, shift = torch.zeros_like(total), torch.zeros_like(total)
    if of_batch:
        slope = norm.scale * norm.rstd.square() * with_y / values
        shift = norm.scale * total / values
    return torch.stack((norm.scale, slope, norm.mean, shift))


def _norm_backward(
    norm: Affine, of_batch: bool, y: Tensor, gradient: Tensor, total: Tensor, with_y: Tensor, images: Tensor
) -> None:
    """Replaces the gradient of a norm's result by that of its input."""
    values = images * (y.shape[2] * y.shape[3])
    _passes.training_norm_backward(gradient, y, norm_coefficients(norm, of_batch, values, total, with_y))
