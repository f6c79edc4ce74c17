"""optimize_for_inference: an eval-only copy of a model, batch norm folded ahead."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shufflenet_ext._backend import implementation
from shufflenet_ext._checks import check_tensor
from shufflenet_ext.fusion import fuse
from shufflenet_ext.models import ShuffleNetCifar, ShuffleNetV1
from shufflenet_ext.modules import FusedShuffleBottleneck, has_hooks, unfusable


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


class InferenceUnits(_EvalOnly):
    """Units one behind the other for inference: one op on folded weights. Made by :func:`optimize_for_inference`."""

    def __init__(self, units: Iterable[FusedShuffleBottleneck]) -> None:
        super().__init__()
        self.options: list[int] = []
        for i, unit in enumerate(units):
            for part, (conv, norm) in enumerate(unit.pairs(), 1):
                weight, bias = _folded(conv, norm)
                self.register_buffer(f"unit{i}_conv{part}_weight", weight)
                self.register_buffer(f"unit{i}_conv{part}_bias", bias)
            self.options += [unit.conv1.groups, unit.groups, unit.stride, unit.conv2_relu, unit.pool_count_include_pad]
        super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        check_tensor("x", x)
        run, settings = implementation(x)
        return run.shuffle_bottleneck_chain(x, list(self._buffers.values()), self.options, **settings)


class InferenceNetwork(_EvalOnly):
    """One of this package's networks for inference. Made by :func:`optimize_for_inference`.

    PyTorch's stem is several times faster in channels_last, the units are faster on contiguous tensors: the stem's
    result is converted between them.
    """

    def __init__(self, network: ShuffleNetCifar | ShuffleNetV1, units: Iterable[FusedShuffleBottleneck]) -> None:
        super().__init__()
        weight, bias = _folded(network.conv1, network.bn1)
        self.stem = network.conv1
        self.stem.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
        self.stem.bias = nn.Parameter(bias, requires_grad=False)
        self.units = InferenceUnits(units)
        self.linear = network.linear
        self.for_cifar = isinstance(network, ShuffleNetCifar)
        super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if not self.for_cifar:
            x = F.max_pool2d(x, 3, stride=2, padding=1)  # before the ReLU, which then has a quarter to do: they commute
        x = self.units(x.relu_().contiguous())
        x = F.avg_pool2d(x, 4) if self.for_cifar else F.adaptive_avg_pool2d(x, 1)
        return self.linear(x.flatten(1))


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

    Every unit that :func:`shufflenet_ext.fuse` swaps becomes one op on folded weights; this package's networks become
    a chain of a folded stem, those ops and the linear layer. ``model`` itself is left as it is. The copy computes no
    gradients; its ``train()`` raises RuntimeError. TypeError if ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    copied = fuse(copy.deepcopy(model).eval())
    return InferenceModel(_inference_twin(copied, {}))


def _inference_twin(module: nn.Module, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    """What takes the module's place; ``twins`` has those made so far, as a module used twice stays one."""
    if module in twins:
        return twins[module]
    units = _chain(module)
    # Only what these classes' own code does between the modules is known; a subclass may do something else.
    if type(module) is ShuffleNetCifar or type(module) is ShuffleNetV1:
        stages = [_chain(stage) for stage in (module.layer1, module.layer2, module.layer3)]
        stem = (module.conv1, module.bn1)
        plain = tuple(map(type, stem)) == (nn.Conv2d, nn.BatchNorm2d) and not any(map(has_hooks, (module, *stem)))
        if plain and all(stages):
            twins[module] = InferenceNetwork(module, [unit for stage in stages for unit in stage])
            return twins[module]
    elif units:
        twins[module] = InferenceUnits(units)
        return twins[module]
    twins[module] = module
    for name, child in list(module._modules.items()):
        if child is not None:
            setattr(module, name, _inference_twin(child, twins))
    return module


def _chain(module: nn.Module) -> list[FusedShuffleBottleneck]:
    """The units that the module is: itself, or those of a Sequential of nothing else; none for other modules."""
    children = list(module) if type(module) is nn.Sequential and not has_hooks(module) else [module]
    units = [child for child in children if type(child) is FusedShuffleBottleneck and _foldable(child)]
    return units if len(units) == len(children) else []


def _foldable(unit: FusedShuffleBottleneck) -> bool:
    """Whether the unit is no more than its folded weights. What is not stays a module of its own."""
    return not has_hooks(unit) and all(unfusable(conv, norm) is None for conv, norm in unit.pairs())
