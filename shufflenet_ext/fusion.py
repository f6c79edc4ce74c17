"""fuse: makes a model's units run fused, each one proved on numbers first."""

import copy
import itertools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from shufflenet_ext._chain import FusedSequential, FusedStem, joins
from shufflenet_ext._fused import FusedUnit, adopt, plain_stem, plain_unit, raw_tensors, stage_tensors
from shufflenet_ext._graph import Wire, trace
from shufflenet_ext._match import AnyUnit, NearMiss
from shufflenet_ext._network import Stem, stem_at
from shufflenet_ext._units import unit_of
from shufflenet_ext.modules import FusedShuffleBottleneck, ShuffleBottleneck, has_hooks
from shufflenet_ext.modules_v2 import FusedShuffleUnitV2, ShuffleUnitV2

_TOLERANCE = 1e-9  # of a float64 comparison, relative to the largest output; other units differ by far more
# A unit's convolutions, as their weights: five where one of v2 has a shortcut.
_CONVOLUTIONS = (3, 5)
# What is fused already, and the class that its own plain one becomes.
_FUSED = FusedShuffleBottleneck | FusedShuffleUnitV2 | FusedUnit
_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    ShuffleBottleneck: FusedShuffleBottleneck,
    ShuffleUnitV2: FusedShuffleUnitV2,
}
_MOST_STEM_CHANNELS = 4  # of the images that a stem reads; behind other layers a convolution is PyTorch's own matter


class FuseWarning(UserWarning):
    """A unit, or a whole model, was left as it was."""


def fuse(model: nn.Module) -> nn.Module:
    """Makes every ShuffleNet unit of ``model`` run fused, whatever its class, names and style.

    A unit is recognised by what it computes: a module of three convolutions, or five, is traced (torch.export), and
    its graph compared with the units of :func:`shufflenet_ext.ops.shuffle_bottleneck` and
    :func:`shufflenet_ext.ops.shuffle_unit_v2`, biases, norms and any way to write a shuffle included. It is swapped
    only if that unit then gives the same results on random float64 inputs, in eval and in training mode. The module
    stays the same object, with its tensors, names, hooks and attributes; its class becomes a subclass of the one that
    it has, with another forward for eval mode. A :class:`ShuffleBottleneck` becomes a :class:`FusedShuffleBottleneck`,
    a :class:`ShuffleUnitV2` a :class:`FusedShuffleUnitV2`. Works on training and eval models.

    Where the model has units, a module that is its stem (a convolution of an image with its norm, ReLU and max pool)
    is swapped in the same way, and swapped modules that follow each other in an nn.Sequential run as one op in eval
    mode, on the CPU and where no gradients are wanted.

    Returns the model. TypeError if ``model`` is not a module. A :class:`FuseWarning` names each module that has a
    unit's convolutions and was left all the same, and why. Where no unit was found, it says what came nearest.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    search = _Search()
    # Small float64 convolutions by the hundred: on several threads most of the time would be their start.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.device("cpu"):
            fused = search.visit("", model)
            if search.fused:
                _join(fused)
    finally:
        torch.set_num_threads(threads)
    for message in search.warnings():
        warnings.warn(message, FuseWarning, stacklevel=2)
    return fused


class _Search:
    def __init__(self) -> None:
        self.fused = 0
        self.misses: dict[Any, tuple[str, nn.Module, NearMiss]] = {}  # by the convolutions that they have
        self.seen: dict[int, nn.Module] = {}  # a module used twice stays one
        # Units by how their modules look: those that look alike are traced once. Each is proved all the same.
        self.alike: dict[Any, AnyUnit] = {}

    def visit(self, name: str, module: nn.Module) -> nn.Module:
        """Swaps the units of a module, which may be one itself, and returns what takes its place."""
        if id(module) in self.seen:
            return self.seen[id(module)]
        self.seen[id(module)] = module
        if isinstance(module, _FUSED):
            self.fused += 1
            return module
        if type(module) in _TWINS:
            module.__class__ = _TWINS[type(module)]  # the same object: all else that it has is the same
            self.fused += 1
            return module
        before = self.fused
        for child_name, child in list(module._modules.items()):  # named_children() leaves out repeated ones
            if child is not None:
                replacement = self.visit(f"{name}.{child_name}" if name else child_name, child)
                if replacement is not child:
                    setattr(module, child_name, replacement)
        convolutions = tuple(id(p) for p in module.parameters() if p.dim() == 4)
        if self.fused == before and len(convolutions) in _CONVOLUTIONS:
            try:
                adopt(module, self.proved_unit(module), FusedUnit)
                self.fused += 1
                self._forget_parts(convolutions, 8)
            except NearMiss as miss:
                # A module and one around it are told of once, by what came nearest.
                if convolutions not in self.misses or miss.depth > self.misses[convolutions][2].depth:
                    self._forget_parts(convolutions, miss.depth)
                    self.misses[convolutions] = name, module, miss
        return module

    def _forget_parts(self, convolutions: tuple[int, ...], depth: int) -> None:
        """Drops what came no nearer of a unit's parts, such as its main branch."""
        whole = set(convolutions)
        self.misses = {ids: left for ids, left in self.misses.items() if not set(ids) <= whole or left[2].depth > depth}

    def proved_unit(self, module: nn.Module) -> AnyUnit:
        """The unit that a module is. NearMiss, with the cause, if it is none or its results are not the unit's."""
        copied = _float64_copy(module)
        looks = type(module), repr(module), tuple((name, t.shape) for name, t in copied.state_dict().items())
        unit = self.alike.get(looks)
        if unit is None or _difference(copied, unit, unit.in_channels) > _TOLERANCE:
            unit = self.alike[looks] = _traced_unit(copied)
        tensors = [id(tensor) for stage in raw_tensors(module, unit) for tensor in stage if tensor is not None]
        if len(set(tensors)) < len(tensors):
            raise NearMiss(6, "two of its convolutions or norms share a tensor")
        return unit

    def warnings(self) -> list[str]:
        """What was left, and why."""
        if not self.misses and not self.fused:
            return ["fuse found no ShuffleNet unit: no module of the model holds three convolutions, or five"]
        told = [
            (name, module, miss) for name, module, miss in self.misses.values() if _has_convolutions_of_a_unit(module)
        ]
        if not told and not self.fused:
            told = [max(self.misses.values(), key=lambda left: left[2].depth)]
        return [f"fuse left '{name}' ({type(module).__name__}) as it is: {miss}" for name, module, miss in told]


def _has_convolutions_of_a_unit(module: nn.Module) -> bool:
    kernels = [p.shape for p in module.parameters() if p.dim() == 4]
    wide = [shape for shape in kernels if shape[2] > 1]
    return len(wide) == len(kernels) // 2 and any(shape[1] == 1 for shape in wide)


def _float64_copy(module: nn.Module) -> nn.Module:
    """A copy to trace and to run. NearMiss for a module whose call is more than its class's code."""
    for child in module.modules():
        if child is not module and has_hooks(child):
            raise NearMiss(5, f"its {type(child).__name__} has hooks")
        if isinstance(child, torch.jit.ScriptModule):
            raise NearMiss(0, "it is a ScriptModule")
    groups = [getattr(child, "process_group", None) for child in module.modules()]  # of processes: not copied
    try:
        copied = copy.deepcopy(module, {id(group): group for group in groups if group is not None})
        copied = copied.to(device="cpu", dtype=torch.float64).eval()
    except Exception as error:
        raise NearMiss(0, f"it cannot be copied ({error})") from error
    # Its own hooks are not part of what it computes: they go on around the fused one.
    for hooks in (copied._forward_hooks, copied._forward_pre_hooks, copied._backward_hooks, copied._backward_pre_hooks):
        hooks.clear()
    for child in copied.modules():
        if type(child) is nn.SyncBatchNorm:  # the same in one process; among several it refuses a CPU's tensors
            child.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
    return copied.requires_grad_(False)


def _traced_unit(copied: nn.Module) -> AnyUnit:
    """The unit that a module is. NearMiss, with the cause, if it is none or its results are not the unit's."""
    causes: list[NearMiss] = []
    for channels in _possible_channels(copied):
        x = torch.zeros(2, channels, 6, 7, dtype=torch.float64)
        try:
            with torch.random.fork_rng(devices=[]):
                copied(x)  # other channels than its own are refused here at once, and without a word in torch's log
                unit = unit_of(trace(copied, (x,)))
        except NearMiss as miss:
            causes.append(miss)
            continue
        except Exception as error:  # whatever a user's code may raise
            causes.append(NearMiss(0, f"it cannot be traced ({str(error).partition(chr(10))[0]})"))
            continue
        difference = _difference(copied, unit, unit.in_channels)
        if difference <= _TOLERANCE:
            return unit
        causes.append(NearMiss(7, f"its results differ from the fused unit's by {difference:.3g} of the largest"))
    raise max(causes, key=lambda miss: miss.depth) if causes else NearMiss(0, "it has no convolution")


def _join(module: nn.Module) -> None:
    """Makes a stem ahead of the units run fused, and Sequentials run fused modules that follow each other as one."""
    if isinstance(module, _FUSED | FusedStem | nn.Conv2d):
        return
    if sum(p.dim() == 4 for p in module.parameters()) == 1:
        stem = _proved_stem(module)
        if stem is not None:
            adopt(module, stem, FusedStem)
            return
    for child in module.children():
        _join(child)
    if type(module) is nn.Sequential and joins(module):
        module.__class__ = FusedSequential


def _proved_stem(module: nn.Module) -> Stem | None:
    """The stem that a module is, on images; None if it is none, or its results are not the stem's."""
    (channels,) = {p.shape[1] for p in module.parameters() if p.dim() == 4}
    if channels > _MOST_STEM_CHANNELS:
        return None
    try:
        copied = _float64_copy(module)
        with torch.random.fork_rng(devices=[]):
            graph = trace(copied, (torch.zeros(2, channels, 32, 33, dtype=torch.float64),))
    except Exception:  # whatever a user's code may raise
        return None
    found = stem_at(graph.outputs[0]) if len(graph.outputs) == 1 and isinstance(graph.outputs[0], Wire) else None
    if found is None or found[1].only() not in graph.inputs or len(graph.operations) != len(found[2]) + 1:
        return None
    return found[0] if _difference(copied, found[0], channels) <= _TOLERANCE else None


def _possible_channels(module: nn.Module) -> list[int]:
    """How many channels the module's input may have."""
    convolutions = [m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d)]
    if len(convolutions) in _CONVOLUTIONS:  # of v2 with stride 1 the first one reads half of the channels
        return list(dict.fromkeys([*convolutions, *(2 * channels for channels in convolutions)]))
    weights = [p.shape for p in module.parameters() if p.dim() == 4]
    # conv3's rows for stride 1; else conv1's depth times its groups, which divide its rows.
    rows = [shape[0] for shape in weights if shape[1] > 1] or [shape[0] for shape in weights]
    depths = [shape[1] * groups for shape in weights for groups in range(1, shape[0] + 1) if shape[0] % groups == 0]
    doubled = [2 * channels for channels in rows + depths]  # of v2 with stride 1 conv1 reads half of the channels
    return list(dict.fromkeys(rows + depths + doubled))


@torch.no_grad()
def _difference(module: nn.Module, part: AnyUnit | Stem, channels: int) -> float:
    """The largest relative difference between a float64 module and its part, over both modes and some sizes."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = dict(itertools.chain(module.named_parameters(), module.named_buffers()))
    for value in state.values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.5)
            if value.dim() == 4:
                value.sub_(1)
    worst = 0.0
    for training, shape in itertools.product((False, True), ((3, 6, 7), (1, 5, 4), (2, 11, 9))):
        batch, *size = shape
        x = torch.randn((batch, channels, *size), generator=generator, dtype=torch.float64)
        tensors = stage_tensors(module, part)
        if isinstance(part, AnyUnit):
            expected = plain_unit(x, part, tensors, training=training)
        else:
            expected = plain_stem(x, part, tensors, training=training)
        try:
            got: Any = module.train(training)(x.clone())
        except Exception:  # a foreign unit may refuse what ours takes
            return float("inf")
        if not isinstance(got, Tensor) or got.shape != expected.shape:
            return float("inf")
        worst = max(worst, float((expected - got).abs().max() / expected.abs().max().clamp_min(1e-30)))
    return worst
