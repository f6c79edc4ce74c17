"""Fused modules one behind the other as one op for inference, which reads their tensors as they are at the call."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shufflenet_ext._backend import fall_back, runs_native, trains_native
from shufflenet_ext._fused import Fused, Snapshot, foldable_unit, own_stage, stage_names
from shufflenet_ext._match import AnyUnit
from shufflenet_ext._network import Head, LastConvolution, Stem
from shufflenet_ext._program import program_of
from shufflenet_ext._stem_training_op import run as train
from shufflenet_ext._stem_training_op import unfit
from shufflenet_ext._training_op import TrainedStage, untrainable
from shufflenet_ext.modules import FusedShuffleBottleneck, has_hooks
from shufflenet_ext.modules_v2 import FusedShuffleUnitV2

# What a module is of a network, and the module whose tensors it names.
Part = tuple[nn.Module, Stem | AnyUnit | LastConvolution | Head]


def is_plain_inference(x: Any) -> bool:
    """Whether a call on x may be one native op of several modules.

    It may not where gradients are wanted, or where PyTorch traces, transforms or casts the call: there each module
    runs on its own, as it does with hooks of all modules and on devices other than the CPU.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x) is Tensor
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._functorch.peek_interpreter_stack() is None
        and not nn.modules.module._has_any_global_hook()
        and x.is_cpu
        and x.dim() == 4
        and runs_native(x, tuple)
    )


class _Op:
    """Parts of a network, one behind the other, as one op."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.program = program_of(part.step for _, part in parts)
        self.eps: list[float] = []
        # Of each tensor: where it is, its name there, and the order in which it is read.
        self.places: list[tuple[dict[str, Any], str, Tensor | None]] = []
        for module, part in parts:
            if isinstance(part, Head):
                self.places += [_place(module, name, None) for name in (part.weight, part.bias)]
                continue
            self.eps += [0.0 if stage.norm is None else stage.norm.eps for stage in part.stages]
            for stage in part.stages:
                orders = [stage.order] * 2 + [stage.norm_order] * 4
                self.places += [_place(module, *each) for each in zip(stage_names(stage), orders, strict=True)]

    def __call__(self, x: Tensor) -> Tensor:
        tensors = [values.get(name) if order is None else values[name][order] for values, name, order in self.places]
        return torch.ops.shufflenet_ext.shuffle_network_batch_norm(x, tensors, self.eps, self.program)


def _place(module: nn.Module, name: str | None, order: Any) -> tuple[dict[str, Any], str, Tensor | None]:
    if name is None:
        return {}, "", None
    *path, last = name.split(".")
    for child in path:
        module = module._modules[child]  # type: ignore[assignment]
    values = module._parameters if last in module._parameters else module._buffers
    return values, last, None if order is None else torch.tensor(order)


class Plan:
    """How a module's call runs: ops and modules one behind the other. It holds while the modules are what they were."""

    def __init__(self, runs: Sequence[list[Part] | nn.Module], containers: Sequence[nn.Module]) -> None:
        self.steps: list[Callable[[Tensor], Tensor]] = [_Op(run) if isinstance(run, list) else run for run in runs]
        inside = [m for run in runs if isinstance(run, list) for part, _ in run for m in part.modules()]
        snapshots = [Snapshot(m, hooks=True) for m in dict.fromkeys([*containers, *inside])]
        self.modules = [snapshot.module for snapshot in snapshots]
        self.types = [snapshot.type for snapshot in snapshots]
        self.reads = [(snapshot.read, vars(snapshot.module)) for snapshot in snapshots]
        self.values = [snapshot.values for snapshot in snapshots]
        self.missing = self._missing()

    def unchanged(self) -> bool:
        """As Snapshot.holds of each module, at once."""
        try:
            same = [read(values) for read, values in self.reads] == self.values
        except KeyError:  # a setting was deleted
            return False
        return (
            same
            and list(map(type, self.modules)) == self.types
            and not any("forward" in values for _, values in self.reads)
            and self._missing() == self.missing
        )

    def __reduce__(self) -> Any:
        """Copies as a mere object: a copy of the module makes a plan of its own."""
        return object, ()

    def _missing(self) -> list[bool]:
        ops = [step for step in self.steps if isinstance(step, _Op)]
        return [values.get(name) is None for op in ops for values, name, _ in op.places]

    def __call__(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


def run_by_plan(module: nn.Module, x: Any, make: Callable[[], Plan | None]) -> Tensor | None:
    """The result of a module in eval mode by its plan, which it keeps; None where its own code is to run."""
    if not is_plain_inference(x):
        return None
    plan = vars(module).get("_plan")
    if not isinstance(plan, Plan) or not plan.unchanged():
        plan = None if any(m.training for m in module.modules()) else make()
        if plan is None:
            return None
        vars(module)["_plan"] = plan
    return plan(x)


class FusedStem(Fused):
    """The mixin of a stem."""

    def _run(self, x: Tensor) -> Tensor | None:
        def make() -> Plan | None:
            part = part_of(self)
            return None if part is None else Plan([[(self, part)]], [])

        adopted = self._adopted
        if not adopted.training():
            return run_by_plan(self, x, make)
        stem: Stem = adopted.part
        if not trains_native(x):
            return None
        cause = None if stem.relu else "there is no native training step of a stem without a ReLU"
        if not adopted.unchanged(in_any_mode=True):
            cause = f"a fused {type(self).__name__} is not what it was when fuse() proved it"
        stage = None if cause is not None else adopted.trained_stages(self)[0]
        if stage is not None and stage.norm is not None:
            cause = untrainable([stage.norm])
        if cause is not None or stage is None:
            fall_back(str(cause))
            return None
        return train(x, stage, stride=stem.stride, padding=stem.padding, max_pool=stem.max_pool)


def train_stem(network: nn.Module, x: Any, conv: Any, norm: Any, *others: nn.Module, max_pool: bool) -> Tensor | None:
    """The result of a network's own stem in training mode by the native op; None where its code is to run.

    ``others`` are what else is called for the stem.
    """
    is_trained = network.training or (isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) and norm.training)
    if not isinstance(x, Tensor) or not is_trained or not trains_native(x):
        return None
    cause = unfit(conv, norm)
    if cause is None and any(map(has_hooks, (conv, norm, *others))):
        cause = "a module of the stem has hooks"
    if cause is not None:
        fall_back(cause)
        return None
    stage = TrainedStage(conv.weight, conv.bias, norm.weight, norm.bias, norm)
    return train(x, stage, stride=conv.stride[0], padding=conv.padding[0], max_pool=max_pool)


class FusedSequential(nn.Sequential):
    """A Sequential in which fused modules that follow each other run as one op. Made by :func:`shufflenet_ext.fuse`."""

    def forward(self, input: Any) -> Any:  # noqa: A002 (nn.Sequential's name)
        result = run_by_plan(self, input, lambda: sequential_plan(self))
        return super().forward(input) if result is None else result


def sequential_plan(sequential: nn.Sequential) -> Plan | None:
    """How a Sequential runs with modules joined; None where there are no two to join."""
    containers: list[nn.Module] = []
    runs: list[list[Part] | nn.Module] = []
    for leaf in _leaves(sequential, containers):
        part = part_of(leaf)
        if part is None:
            runs.append(leaf)
        elif runs and isinstance(runs[-1], list) and _goes_on(runs[-1], part):
            runs[-1].append((leaf, part))
        else:
            runs.append([(leaf, part)])
    joined = [run if isinstance(run, nn.Module) or len(run) > 1 else run[0][0] for run in runs]
    return Plan(joined, containers) if any(isinstance(run, list) for run in joined) else None


def _goes_on(run: list[Part], part: Stem | AnyUnit) -> bool:
    """Whether a part may follow a run in one op: a unit, behind none of another version."""
    units = [unit for _, unit in run if isinstance(unit, AnyUnit)]
    return isinstance(part, AnyUnit) and all(type(unit) is type(part) for unit in units)


def joins(sequential: nn.Sequential) -> bool:
    """Whether fused modules follow each other in a Sequential, which so can run as one op in eval mode."""
    fused = [isinstance(leaf, Fused | FusedShuffleBottleneck | FusedShuffleUnitV2) for leaf in _leaves(sequential, [])]
    return any(first and second for first, second in itertools.pairwise(fused))


def _leaves(sequential: nn.Sequential, containers: list[nn.Module]) -> Iterator[nn.Module]:
    """The modules that it calls, those of Sequentials inside it included; these are put into ``containers``."""
    containers.append(sequential)
    for child in sequential:
        if type(child) in (nn.Sequential, FusedSequential) and not has_hooks(child):
            yield from _leaves(child, containers)  # type: ignore[arg-type]
        else:
            yield child


def part_of(module: nn.Module) -> Stem | AnyUnit | None:
    """The stem or the unit that a fused module is, where it is no more than its tensors."""
    if isinstance(module, FusedStem):
        return module._adopted.part if not has_hooks(module) and module._adopted.unchanged() else None
    return foldable_unit(module)


def own_parts(
    network: Any,
    layers: Sequence[nn.Module],
    *,
    stem: tuple[str, str],
    last: tuple[str, str] | None,
    linear: str,
    max_pool: bool,
    window: int,
) -> list[Part] | None:
    """The parts of one of this package's networks; None where it is more than them.

    ``stem`` and ``last`` name a convolution and its norm, ``linear`` the linear layer.
    """
    # Hooks of any module first: where there are some, this is asked at each call.
    if any(map(has_hooks, network.modules())) or not {nn.Sequential, FusedSequential}.issuperset(map(type, layers)):
        return None
    classifier = network.get_submodule(linear)
    convolutions = [tuple(map(network.get_submodule, names)) for names in (stem, last) if names is not None]
    if type(classifier) is not nn.Linear or not all(_is_plain(*each) for each in convolutions):
        return None
    conv = convolutions[0][0]
    size, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
    if stride not in (1, 2) or padding >= size:
        return None
    stages = [own_stage(names[0], c, names[1], n) for names, (c, n) in zip((stem, last), convolutions, strict=False)]  # type: ignore[index]
    parts: list[Part] = [(network, Stem(stages[0], conv.out_channels, size, stride, padding, max_pool, relu=True))]
    units = [(unit, part) for layer in layers for unit in layer if (part := part_of(unit)) is not None]  # type: ignore[attr-defined]
    parts += units
    if last is not None:
        pointwise = convolutions[1][0]
        if (pointwise.kernel_size, pointwise.stride, pointwise.padding) != ((1, 1), (1, 1), (0, 0)):
            return None
        parts.append((network, LastConvolution(stages[1], pointwise.out_channels)))
    bias = None if classifier.bias is None else f"{linear}.bias"
    parts.append((network, Head(f"{linear}.weight", bias, classifier.out_features, window, exact=False, whole=False)))
    return parts if len(units) == sum(map(len, layers)) else None  # type: ignore[arg-type]


def _is_plain(conv: Any, norm: Any) -> bool:
    """Whether a convolution and its norm are no more than a square, dense one, and one with running statistics."""
    if type(conv) is not nn.Conv2d or type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm) or norm.running_mean is None:
        return False
    settings = conv.kernel_size, conv.stride, conv.padding
    if any(isinstance(each, str) or len(set(each)) > 1 for each in settings):
        return False
    return conv.groups == 1 and set(conv.dilation) == {1} and conv.padding_mode == "zeros"


def network_plan(parts: list[Part] | None) -> Plan | None:
    """How a network of these parts runs as one op."""
    return None if parts is None else Plan([parts], [])
