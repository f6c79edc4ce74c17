"""fuse, which swaps a model's units for fused ones, after it has compared both on numbers."""

import copy
import itertools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from shufflenet_ext._backend import use_backend
from shufflenet_ext.modules import FusedShuffleBottleneck, ShuffleBottleneck, has_hooks

_PARTS = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")
# The largest difference of equal units in float64, relative to the largest output. Other units differ by far more.
_TOLERANCE = 1e-9


class FuseWarning(UserWarning):
    """Warns of a unit that :func:`fuse` left as it was."""


def fuse(model: nn.Module) -> nn.Module:
    """Swaps every ShuffleNet unit of ``model`` for a :class:`FusedShuffleBottleneck` that shares its parameters.

    Units are this package's :class:`ShuffleBottleneck` and any module with the original code's attribute names (conv1,
    bn1, conv2, bn2, conv3, bn3, stride). A unit of another class is swapped only if a fused one gives the same results
    on a random float64 input, in eval and in training mode; one that differs is left alone, with a
    :class:`FuseWarning` that names it and the difference. Works on training and eval models.

    Returns the model, swapped in place, or the new unit if ``model`` is a unit itself. Raises TypeError if ``model`` is
    not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    fused: dict[nn.Module, nn.Module] = {}  # a unit used twice stays one unit

    def swap(name: str, module: nn.Module) -> nn.Module:
        if module not in fused:
            fused[module] = _fused_unit(name, module) if _looks_like_unit(module) else module
            if fused[module] is module:
                for child_name, child in list(module._modules.items()):  # named_children() leaves out repeated ones
                    if child is None:
                        continue
                    replacement = swap(f"{name}.{child_name}" if name else child_name, child)
                    if replacement is not child:
                        setattr(module, child_name, replacement)
        return fused[module]

    return swap("", model)


def _looks_like_unit(module: nn.Module) -> bool:
    return all(hasattr(module, part) for part in (*_PARTS, "stride"))


# Below, a unit is typed Any: it is a module of any class that has the attributes which _looks_like_unit asks for.


def _fused_unit(name: str, unit: Any) -> nn.Module:
    """The fused twin of a unit. Where there is none, the unit itself, with a warning."""
    if isinstance(unit, FusedShuffleBottleneck):
        return unit
    cause = _unfit(unit)
    if cause is None:
        if type(unit) is ShuffleBottleneck:
            return _twin(unit, unit.groups, unit.conv2_relu, unit.pool_count_include_pad)
        smallest = float("inf")
        for conv2_relu, include_pad in itertools.product((False, True), (True, False)):
            twin = _twin(unit, unit.conv3.groups, conv2_relu, include_pad)
            difference = _difference(unit, twin)
            if difference <= _TOLERANCE:
                return twin
            smallest = min(smallest, difference)
        cause = f"its results differ from the fused unit's by {smallest:.3g} of the largest"
    warnings.warn(f"fuse left '{name}' ({type(unit).__name__}) as it is: {cause}", FuseWarning, stacklevel=2)
    return unit


def _unfit(unit: Any) -> str | None:
    """Why a unit's parts cannot be those of a FusedShuffleBottleneck; None where they can."""
    if has_hooks(unit):
        return "it has hooks"
    for part in _PARTS:
        module = getattr(unit, part)
        expected = nn.Conv2d if part.startswith("conv") else nn.BatchNorm2d
        if type(module) is not expected:
            return f"{part} is a {type(module).__name__}, not a {expected.__name__}"
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            return f"{part} has a bias"
        if isinstance(module, nn.BatchNorm2d) and not module.affine:
            return f"{part} has no weight and bias"
    if any(True for _ in unit.parameters(recurse=False)):
        return "it has parameters of its own"
    extra = [child for child, module in unit.named_children() if child not in _PARTS and any(module.parameters())]
    if extra:
        return f"{extra[0]} has parameters"
    try:
        shell = _shell(unit, unit.conv3.groups, False, True)
    except (TypeError, ValueError) as error:
        return str(error)
    for part in ("conv1", "conv2", "conv3"):
        got, expected_repr = repr(getattr(unit, part)), repr(getattr(shell, part))
        if got != expected_repr:
            return f"{part} is {got}, not {expected_repr}"
    return None


def _shell(unit: Any, groups: int, conv2_relu: bool, include_pad: bool) -> FusedShuffleBottleneck:
    """A fused unit with the unit's geometry, on the meta device: its tensors have no memory."""
    with torch.device("meta"):
        return FusedShuffleBottleneck(
            unit.conv1.in_channels,
            unit.conv3.out_channels,
            unit.stride,
            groups,
            mid_channels=unit.conv1.out_channels,
            conv1_groups=unit.conv1.groups,
            conv2_relu=conv2_relu,
            pool_count_include_pad=include_pad,
        )


def _twin(unit: Any, groups: int, conv2_relu: bool, include_pad: bool) -> FusedShuffleBottleneck:
    """A fused unit that holds the unit's own convolutions and norms, and its mode."""
    twin = _shell(unit, groups, conv2_relu, include_pad)
    for part in _PARTS:
        setattr(twin, part, getattr(unit, part))
    twin.training = unit.training
    return twin


@torch.no_grad()
def _difference(unit: Any, twin: FusedShuffleBottleneck) -> float:
    """How far copies of both in float64, with random parameters, differ at most: in both modes, on images of two sizes.

    It is relative to the largest output, and infinite where the unit refuses the input or gives another shape.
    """
    generator = torch.Generator().manual_seed(0)
    pair = [copy.deepcopy(module).to(device="cpu", dtype=torch.float64) for module in (unit, twin)]
    for part in _PARTS:
        source, target = getattr(pair[0], part), getattr(pair[1], part)
        for key, value in source.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator, dtype=torch.float64, device="cpu") + 0.5)
                if key == "weight" and value.dim() == 4:
                    value.sub_(1)
        target.load_state_dict(source.state_dict())
    worst = 0.0
    with use_backend("reference"):
        for training, size in itertools.product((False, True), ((6, 7), (5, 4))):
            x = torch.randn((3, twin.conv1.in_channels, *size), generator=generator, dtype=torch.float64, device="cpu")
            try:
                expected, got = (module.train(training)(x) for module in pair)
            except Exception:  # a unit of another class may refuse an input that ours takes
                return float("inf")
            if not isinstance(expected, Tensor) or expected.shape != got.shape:
                return float("inf")
            worst = max(worst, float((expected - got).abs().max() / expected.abs().max().clamp_min(1e-30)))
    return worst
