"""optimize_for_inference: an eval-only copy of a model, batch norm folded ahead."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from shufflenet_ext import ops
from shufflenet_ext.fusion import fuse
from shufflenet_ext.models import ShuffleNetCifar, ShuffleNetV1
from shufflenet_ext.modules import ShuffleBottleneck


class _EvalOnly(nn.Module):
    def train(self, mode: bool = True) -> "_EvalOnly":
        if mode:
            raise RuntimeError("this module was made by optimize_for_inference: it has no training mode")
        return super().train(False)


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals conv followed by norm in eval mode, computed in float64."""
    weight, bias = torch.nn.utils.fuse_conv_bn_weights(
        conv.weight.double(),
        None if conv.bias is None else conv.bias.double(),
        _required(norm.running_mean).double(),
        _required(norm.running_var).double(),
        norm.eps,
        None if norm.weight is None else norm.weight.double(),
        None if norm.bias is None else norm.bias.double(),
    )
    return weight.detach().to(conv.weight.dtype), bias.detach().to(conv.weight.dtype)


def _required(statistics: Tensor | None) -> Tensor:
    if statistics is None:
        raise ValueError("model: a batch norm has no running statistics, so it cannot be folded")
    return statistics


class InferenceUnit(_EvalOnly):
    """A unit for inference: one op on folded weights. Made by :func:`optimize_for_inference`."""

    conv1_weight: Tensor
    conv1_bias: Tensor
    conv2_weight: Tensor
    conv2_bias: Tensor
    conv3_weight: Tensor
    conv3_bias: Tensor

    def __init__(self, unit: ShuffleBottleneck) -> None:
        super().__init__()
        for i, (conv, norm) in enumerate(((unit.conv1, unit.bn1), (unit.conv2, unit.bn2), (unit.conv3, unit.bn3)), 1):
            weight, bias = _folded(conv, norm)
            self.register_buffer(f"conv{i}_weight", weight)
            self.register_buffer(f"conv{i}_bias", bias)
        self.options: dict[str, Any] = {
            "conv1_groups": unit.conv1.groups,
            "groups": unit.groups,
            "stride": unit.stride,
            "conv2_relu": unit.conv2_relu,
            "pool_count_include_pad": unit.pool_count_include_pad,
        }
        super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        return ops.shuffle_bottleneck(
            x,
            self.conv1_weight,
            self.conv1_bias,
            self.conv2_weight,
            self.conv2_bias,
            self.conv3_weight,
            self.conv3_bias,
            **self.options,
        )


class InferenceModel(_EvalOnly):
    """A model for inference. Made by :func:`optimize_for_inference`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.model(*args, **kwargs)


def optimize_for_inference(model: nn.Module) -> nn.Module:
    """An eval-only copy of ``model`` whose units have their batch norm folded into their weights.

    Every unit that :func:`shufflenet_ext.fuse` swaps becomes one op on folded weights; so does the batch norm behind
    the stem of this package's networks. ``model`` itself is left as it is. The copy computes no gradients; its
    ``train()`` raises RuntimeError. TypeError if ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    copied = fuse(copy.deepcopy(model).eval())
    return InferenceModel(_inference_twin(copied, {}))


def _inference_twin(module: nn.Module, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    """What takes the module's place; ``twins`` has those made so far, as a module used twice stays one."""
    if module in twins:
        return twins[module]
    if isinstance(module, ShuffleBottleneck):
        twins[module] = InferenceUnit(module)
        return twins[module]
    twins[module] = module
    for name, child in list(module._modules.items()):
        if child is not None:
            setattr(module, name, _inference_twin(child, twins))
    # Of a network of another class only its code knows whether bn1 comes behind conv1.
    if isinstance(module, (ShuffleNetCifar, ShuffleNetV1)) and isinstance(module.bn1, nn.BatchNorm2d):
        weight, bias = _folded(module.conv1, module.bn1)
        module.conv1.weight, module.conv1.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
        module._modules["bn1"] = nn.Identity()
    return module
