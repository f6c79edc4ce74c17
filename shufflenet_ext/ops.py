"""The fused ops: what a user calls, and what PyTorch's machinery knows of them. csrc/library.cpp has the schemas."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch.utils.flop_counter import register_flop_formula

from shufflenet_ext import _native, _stem_training_op, _training_op, reference
from shufflenet_ext._backend import fall_back, implementation, unit_variant
from shufflenet_ext._checks import check_int, check_tensor, overridable


@overridable
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
    """Grouped 1×1 convolution, ReLU, channel shuffle and depthwise 3×3 convolution in one pass.

    Computes ``conv2(shuffle(relu(conv1(x))))`` (ShuffleNet, arXiv:1707.01083, figure 2 up to its second convolution),
    with padding 1 of zeros around the shuffled tensor. Differentiable, and usable under torch.compile, torch.export and
    autocast.

    Args:
        x: (N, C, H, W); float32, float64, bfloat16 or float16; any strides.
        conv1_weight: (M, C / conv1_groups, 1, 1), of x's dtype, as all that follow.
        conv1_bias: (M,) or None.
        conv2_weight: (M, 1, 3, 3).
        conv2_bias: (M,) or None.
        conv1_groups: groups of the 1×1 convolution; a divisor of C and M.
        shuffle_groups: groups of the shuffle; a divisor of M.
        stride: of the depthwise convolution, 1 or 2.
        conv2_relu: whether a ReLU follows the depthwise convolution.

    Returns (N, M, ceil(H / stride), ceil(W / stride)) in x's dtype and memory format.

    Raises TypeError, ValueError or RuntimeError, which name the argument, for arguments that are not as above.
    """
    _check_types(
        {"x": x, "conv1_weight": conv1_weight, "conv2_weight": conv2_weight},
        {"conv1_bias": conv1_bias, "conv2_bias": conv2_bias},
        {"conv1_groups": conv1_groups, "shuffle_groups": shuffle_groups, "stride": stride},
    )
    run, settings = implementation(
        x, lambda: [(*conv1_weight.shape, conv1_groups, shuffle_groups, stride, shuffle_groups)]
    )
    return run.pointwise_shuffle_depthwise(
        x,
        conv1_weight,
        conv1_bias,
        conv2_weight,
        conv2_bias,
        conv1_groups=conv1_groups,
        shuffle_groups=shuffle_groups,
        stride=stride,
        conv2_relu=conv2_relu,
        **settings,
    )


@overridable
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
    """A whole ShuffleNet unit in one pass, batch norm folded into its weights and biases.

    With ``y = conv3(conv2(shuffle(relu(conv1(x)))))`` computes ``relu(y + x)`` for stride 1 and
    ``relu(cat([y, avg_pool2d(x, 3, stride=2, padding=1)], 1))`` for stride 2 (ShuffleNet, arXiv:1707.01083, figure 2 b
    and c). Differentiable, and usable under torch.compile, torch.export and autocast.

    Args:
        x: (N, C, H, W); float32, float64, bfloat16 or float16; any strides.
        conv1_weight: (M, C / conv1_groups, 1, 1), of x's dtype, as all that follow.
        conv1_bias: (M,) or None.
        conv2_weight: (M, 1, 3, 3).
        conv2_bias: (M,) or None.
        conv3_weight: (K, M / groups, 1, 1); K = C where stride is 1.
        conv3_bias: (K,) or None.
        conv1_groups: groups of the first convolution; a divisor of C and M.
        groups: groups of the last convolution; a divisor of M and K.
        stride: 1 or 2.
        conv2_relu: whether a ReLU follows the depthwise convolution.
        pool_count_include_pad: as in avg_pool2d, for stride 2.
        shuffle_groups: groups of the shuffle, a divisor of M; by default ``groups``.
        shortcut_first: whether the pooled x comes first in the concatenation, for stride 2.
        shortcut_relu: whether the pooled x goes through the last ReLU too, for stride 2.

    Returns (N, K, H, W) for stride 1, (N, K + C, ceil(H / 2), ceil(W / 2)) for stride 2, in x's dtype and memory
    format.

    Raises TypeError, ValueError or RuntimeError, which name the argument, for arguments that are not as above.
    """
    shuffled = groups if shuffle_groups is None else shuffle_groups
    _check_types(
        {"x": x, "conv1_weight": conv1_weight, "conv2_weight": conv2_weight, "conv3_weight": conv3_weight},
        {"conv1_bias": conv1_bias, "conv2_bias": conv2_bias, "conv3_bias": conv3_bias},
        {
            "conv1_groups": conv1_groups,
            "groups": groups,
            "stride": stride,
            "shuffle_groups": shuffled,
        },
    )
    run, settings = implementation(
        x, lambda: [(*conv1_weight.shape, *conv3_weight.shape, conv1_groups, groups, stride, shuffled)]
    )
    return run.shuffle_bottleneck(
        x,
        conv1_weight,
        conv1_bias,
        conv2_weight,
        conv2_bias,
        conv3_weight,
        conv3_bias,
        conv1_groups=conv1_groups,
        groups=groups,
        stride=stride,
        conv2_relu=conv2_relu,
        pool_count_include_pad=pool_count_include_pad,
        **unit_variant(groups, shuffle_groups, shortcut_first, shortcut_relu, stride),
        **settings,
    )


@overridable
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
    """A whole ShuffleNet v2 unit in one pass, batch norm folded into its weights and biases.

    With ``main = relu(conv3(conv2(relu(conv1(.)))))``, where conv2 is a depthwise 3×3 convolution with padding 1 and
    the others are dense 1×1 convolutions, computes ``shuffle(cat([beside, main], 1))`` (ShuffleNet v2,
    arXiv:1807.11164, figure 3 c and d). With stride 1, x's channels are split in halves: the first is ``beside`` as it
    is, and conv1 reads the second. With stride 2 conv1 reads all of x, and ``beside = relu(shortcut2(shortcut1(x)))``,
    a depthwise 3×3 convolution of stride 2 and a dense 1×1 one. Differentiable, and usable under torch.compile,
    torch.export and autocast. It runs natively on the CPU.

    Args:
        x: (N, C, H, W); float32, float64, bfloat16 or float16; any strides. C is even where stride is 1.
        conv1_weight: (M, C / 2, 1, 1) for stride 1, (M, C, 1, 1) for stride 2, of x's dtype, as all that follow.
        conv1_bias: (M,) or None.
        conv2_weight: (M, 1, 3, 3).
        conv2_bias: (M,) or None.
        conv3_weight: (K, M, 1, 1); K = C / 2 where stride is 1.
        conv3_bias: (K,) or None.
        shortcut1_weight: (C, 1, 3, 3) for stride 2; None for stride 1, as those of the shortcut that follow.
        shortcut1_bias: (C,) or None.
        shortcut2_weight: (L, C, 1, 1).
        shortcut2_bias: (L,) or None.
        stride: 1 or 2.
        split_groups: groups of a shuffle of x's channels ahead of all else, a divisor of C; with C / 2, those of even
            numbers are the first half.
        shuffle_groups: groups of the shuffle behind the concatenation, a divisor of the result's channels; with 1 there
            is none.

    Returns (N, C, H, W) for stride 1, (N, K + L, ceil(H / 2), ceil(W / 2)) for stride 2, in x's dtype and memory
    format.

    Raises TypeError, ValueError or RuntimeError, which name the argument, for arguments that are not as above.
    """
    biases = {"conv1_bias": conv1_bias, "conv2_bias": conv2_bias, "conv3_bias": conv3_bias}
    shortcut = {
        "shortcut1_weight": shortcut1_weight,
        "shortcut1_bias": shortcut1_bias,
        "shortcut2_weight": shortcut2_weight,
        "shortcut2_bias": shortcut2_bias,
    }
    _check_types(
        {"x": x, "conv1_weight": conv1_weight, "conv2_weight": conv2_weight, "conv3_weight": conv3_weight},
        {**biases, **shortcut},
        {"stride": stride, "split_groups": split_groups, "shuffle_groups": shuffle_groups},
    )
    run, settings = implementation(x, tuple, version=2)
    return run.shuffle_unit_v2(
        x,
        conv1_weight,
        conv1_bias,
        conv2_weight,
        conv2_bias,
        conv3_weight,
        conv3_bias,
        *shortcut.values(),
        stride=stride,
        split_groups=split_groups,
        shuffle_groups=shuffle_groups,
        **settings,
    )


def _check_types(tensors: dict[str, object], optional_tensors: dict[str, object], ints: dict[str, object]) -> None:
    for name, value in tensors.items():
        check_tensor(name, value)
    for name, value in optional_tensors.items():
        if value is not None:
            check_tensor(name, value)
    for name, value in ints.items():
        check_int(name, value)


def _plain(name: str) -> Callable[..., Tensor]:
    """An op's reference, which takes the op's own arguments."""
    run_reference: Callable[..., Tensor] = getattr(reference, name)

    def plain(x: Tensor, *args: Any, allow_tf32: bool = False, packed: Tensor | None = None, **kwargs: Any) -> Tensor:
        return run_reference(x, *args, **kwargs)  # whose convolutions read torch's setting of TF32 themselves

    return plain


def _register_autograd(name: str) -> None:
    """Gives an op the backward pass of the reference of its name, or a native one where there is one.

    All its positional arguments must be tensors.
    """
    plain = _plain(name)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.options = keyword_only_inputs

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Only the inputs were kept, so the intermediate tensors are computed again.
        inputs = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        gradients = _training_op.frozen_gradients(name, grad, inputs, wanted, ctx.options)
        if gradients is not None:
            return gradients

        def run(*values: Tensor) -> Tensor:
            replaced = dict(zip(wanted, values, strict=True))
            return plain(*(replaced.get(i, given) for i, given in enumerate(inputs)), **ctx.options)

        vjp = torch.func.vjp(run, *(inputs[i] for i in wanted))[1]
        grads = dict(zip(wanted, vjp(grad), strict=True))
        return tuple(grads.get(i) for i in range(len(inputs)))

    torch.library.register_autograd(f"shufflenet_ext::{name}", backward, setup_context=setup_context)


def _register_transforms(name: str) -> None:
    """Makes torch.func's transforms (grad, vmap, jvp and those made of them) see an op as its reference.

    They differentiate and batch PyTorch's own operations, and there can be several around a call.
    """
    plain = _plain(name)

    def transformed(*args: Any, **kwargs: Any) -> Tensor:
        fall_back("torch.func transforms the call, and there is no native kernel of a transformed one")
        return plain(*args, **kwargs)

    _library.impl(name, transformed, "FuncTorchDynamicLayerFrontMode")  # where a call meets the outermost transform


def _memory_format(x: Tensor, dims: int) -> torch.memory_format:
    """The format that the kernels write a result of so many dimensions in."""
    return _native.memory_format(x) if dims == 4 else torch.contiguous_format


def _register_fake(name: str) -> None:
    plain = _plain(name)

    def fake(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        _keep_in_inductor(name)
        shape = plain(x, *args, **kwargs).shape
        return x.new_empty(shape).to(memory_format=_memory_format(x, len(shape)))

    torch.library.register_fake(f"shufflenet_ext::{name}", fake)


def _keep_in_inductor(name: str) -> None:
    """Tells inductor, where it is at work, to call an op as it is.

    It does so by itself, unless CI is set in the environment: then it raises for an op that has a decomposition.
    """
    inductor = sys.modules.get("torch._inductor.lowering")  # not imported here, as that takes a second
    op = getattr(torch.ops.shufflenet_ext, name).default
    if inductor is not None and op not in inductor.lowerings:
        inductor.make_fallback(op, inductor.constrain_to_fake_tensors, warn=False)


def _register_decomposition(name: str) -> None:
    """Tells exporters that know PyTorch's operations alone, such as torch.onnx.export, what an op is made of."""
    plain = _plain(name)

    def decomposed(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = plain(x, *args, **kwargs)
        return y.contiguous(memory_format=_memory_format(x, y.dim()))  # fake tensors of symbolic sizes come here too

    register_decomposition(getattr(torch.ops.shufflenet_ext, name))(decomposed)


def _register_flop_formula(name: str) -> None:
    register_flop_formula(getattr(torch.ops.shufflenet_ext, name), get_raw=True)(_training_op.flops_of(_plain(name)))


def _register_autocast(name: str) -> None:
    op = getattr(torch.ops.shufflenet_ext, name)
    # Batch norm keeps its own dtype under autocast, as in PyTorch.
    is_norms = [argument.name.startswith("bn") for argument in op.default._schema.arguments]

    def autocast(*args: Any, **kwargs: Any) -> Tensor:
        # The same as for torch's convolutions: float32 and 16-bit tensors are cast to the dtype in force, float64 not.
        device = args[0].device.type
        dtype = torch.get_autocast_dtype(device)

        def cast(value: Any, keeps_dtype: bool) -> Any:
            is_cast = isinstance(value, Tensor) and value.dtype != torch.float64 and not keeps_dtype
            return value.to(dtype) if is_cast else value

        with torch.autocast(device, enabled=False):
            return op(*map(cast, args, is_norms), **kwargs)

    for key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl(name, autocast, key)


if _native.native_error is None:
    _library = torch.library.Library("shufflenet_ext", "FRAGMENT")
    _UNIT_OPS = (
        "pointwise_shuffle_depthwise",
        "shuffle_bottleneck",
        "shuffle_bottleneck_batch_norm",
        "shuffle_unit_v2",
    )
    for _name in _UNIT_OPS:
        _register_autograd(_name)  # networks are for inference, and have no backward pass
    for _name in (
        *_UNIT_OPS,
        "shuffle_network",
        "shuffle_network_batch_norm",
    ):
        if _name != "shuffle_network_batch_norm":  # which is not called under autocast: see _chain.py
            _register_autocast(_name)
        _register_fake(_name)
        _register_transforms(_name)
        _register_decomposition(_name)
        _register_flop_formula(_name)
    _register_autocast(_training_op.NAME)
    _register_autocast(_stem_training_op.NAME)
