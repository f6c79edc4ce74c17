"""A unit of any class that runs fused: the module stays the object that it was, and only its class changes."""

import copyreg
import functools
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shufflenet_ext import ops, reference
from shufflenet_ext._backend import allows_tf32, fall_back, runs_native, trains_native
from shufflenet_ext._fold import fold_norm
from shufflenet_ext._match import AnyUnit, Norm, Stage, Unit, UnitV2
from shufflenet_ext._network import Stem
from shufflenet_ext._training_op import TrainedStage, untrainable
from shufflenet_ext._training_op import run as train
from shufflenet_ext._unit_v2 import run_unit_v2
from shufflenet_ext.modules import HOOKS, FusedShuffleBottleneck, has_hooks, leaf_node, unfusable
from shufflenet_ext.modules_v2 import FusedShuffleUnitV2, unfusable_v2

_PLAIN = (int, float, bool, str, tuple, list, type(None))


_Paths = list[list[str] | None]  # of a stage's tensors, as stage_tensors has them
_Orders = list[Tensor | None]


class Snapshot:
    """A module's settings and children at the time of the proof, which must still be there at a call."""

    def __init__(self, module: nn.Module, *, hooks: bool) -> None:
        self.module = module
        self.type: Any = type(module) if hooks else None  # a fused class is made anew where it is unpickled
        values = {name: value for name, value in vars(module).items() if type(value) in _PLAIN}
        self.children = dict(module._modules)
        values |= {"training": False, "_modules": self.children}
        if hooks:  # which change what it computes; those of a unit itself run around its forward
            values |= {name: {} for name in HOOKS}
        self.values = tuple(values.values())
        self.names = tuple(values)
        self.read = operator.itemgetter(*self.names)  # all of a network's in 60 us, one by one they take 300
        self.missing = self._missing()

    def holds(self, *, in_any_mode: bool = False) -> bool:
        """Whether all is as it was; the module was in eval mode then."""
        module, values = self.module, self.values
        if in_any_mode:
            values = tuple(
                module.training if name == "training" else value for name, value in zip(self.names, values, strict=True)
            )
        if self.type is not None and (type(module) is not self.type or "forward" in vars(module)):
            return False
        try:
            if torch.compiler.is_compiling():  # which traces, and then guards, one at a time
                same = all(getattr(module, name) == value for name, value in zip(self.names, values, strict=True))
            else:
                same = self.read(vars(module)) == values
        except (AttributeError, KeyError):  # a setting was deleted
            return False
        return same and self._missing() == self.missing

    def _missing(self) -> list[bool]:
        module = self.module
        return [value is None for tensors in (module._parameters, module._buffers) for value in tensors.values()]


class _Adopted:
    """What a fused module knows of itself as a unit or a stem."""

    def __init__(self, module: nn.Module, part: AnyUnit | Stem) -> None:
        self.part: Any = part
        self.paths = [_paths(stage) for stage in part.stages]
        self.orders = [_orders(stage) for stage in part.stages]
        self.snapshots = [Snapshot(m, hooks=m is not module) for m in module.modules()]

    def training(self) -> bool:
        return any(snapshot.module.training for snapshot in self.snapshots)

    def unchanged(self, *, in_any_mode: bool = False) -> bool:
        return all(snapshot.holds(in_any_mode=in_any_mode) for snapshot in self.snapshots)

    def trained_stages(self, module: nn.Module) -> list[TrainedStage]:
        """The stages of the module, with the norms that a training step is to update."""
        tensors = _read_all(module, self.paths, self.orders)
        return [
            TrainedStage(weight, bias, norm_weight, norm_bias, _norm_of(module, paths), orders[-1])  # type: ignore[arg-type]
            for (weight, bias, norm_weight, norm_bias, *_), paths, orders in zip(
                tensors, self.paths, self.orders, strict=True
            )
        ]

    def take_synced_norms(self) -> None:
        """Takes a SyncBatchNorm in a batch norm's place for the one that was proved: in eval mode they are the same."""
        of = {snapshot.module: snapshot for snapshot in self.snapshots}
        for snapshot in self.snapshots:
            for name, norm in snapshot.children.items():
                synced = snapshot.module._modules.get(name)
                if type(norm) is nn.BatchNorm2d and type(synced) is nn.SyncBatchNorm:
                    snapshot.children[name] = synced
                    of[norm].module, of[norm].type = synced, nn.SyncBatchNorm  # its settings must be the norm's


def stage_names(stage: Stage) -> list[str | None]:
    """The names of a stage of :func:`stage_tensors`."""
    norm = stage.norm
    norm_names = [None] * 4 if norm is None else [norm.weight, norm.bias, norm.mean, norm.var]
    return [stage.weight, stage.bias, *norm_names]


def _paths(stage: Stage) -> _Paths:
    return [None if name is None else name.split(".") for name in stage_names(stage)]


def _read(module: Any, path: list[str]) -> Any:
    for name in path[:-1]:
        module = module._modules[name]
    return getattr(module, path[-1])


def raw_tensors(module: nn.Module, unit: AnyUnit | Stem) -> list[list[Tensor | None]]:
    """As :func:`stage_tensors`, each as the module has it."""
    return _read_all(module, [_paths(stage) for stage in unit.stages], [[None] * 6] * len(unit.stages))


def stage_tensors(module: nn.Module, unit: AnyUnit | Stem) -> list[list[Tensor | None]]:
    """Of each convolution: weight, bias, and the norm's weight, bias, mean, variance; in the unit's order."""
    return _read_all(module, [_paths(stage) for stage in unit.stages], [_orders(stage) for stage in unit.stages])


def _read_all(module: nn.Module, paths: list[_Paths], orders: list[_Orders]) -> list[list[Tensor | None]]:
    return [
        [
            None if path is None else _reordered(_read(module, path), order)
            for path, order in zip(stage_paths, stage_orders, strict=True)
        ]
        for stage_paths, stage_orders in zip(paths, orders, strict=True)
    ]


def _orders(stage: Stage) -> _Orders:
    def index(order: tuple[int, ...] | None) -> Tensor | None:
        return None if order is None else torch.tensor(order)

    return [index(stage.order)] * 2 + [index(stage.norm_order)] * 4


def _reordered(tensor: Tensor, order: Tensor | None) -> Tensor:
    return tensor if order is None else tensor[order]


def fold(stage: Stage, tensors: list[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the convolution that equals a stage in eval mode."""
    return fold_norm(tensors, None if stage.norm is None else stage.norm.eps)


def folded(module: nn.Module, stage: Stage, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a stage of the module in eval mode: computed in float64, rounded once to dtype or its own."""
    (tensors,) = _read_all(module, [_paths(stage)], [_orders(stage)])
    assert tensors[0] is not None
    weight, bias = fold(stage, [None if tensor is None else tensor.detach().double() for tensor in tensors])
    dtype = dtype or tensors[0].dtype
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return weight.to(dtype), bias.to(dtype)


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name in the module's state."""
    tensor = _read(module, name.split("."))
    assert isinstance(tensor, Tensor)
    return tensor


def plain_stem(x: Tensor, stem: Stem, tensors: list[list[Tensor | None]], *, training: bool) -> Tensor:
    """What a stem computes, in plain PyTorch, with or without its batch norm in training mode."""
    ((weight, bias, gamma, beta, mean, var),), norm = tensors, stem.stage.norm
    assert weight is not None
    y = F.conv2d(x, weight, bias, stride=stem.stride, padding=stem.padding)
    y = y if norm is None else F.batch_norm(y, mean, var, gamma, beta, training, 0.0, norm.eps)
    y = F.relu(y) if stem.relu else y
    return F.max_pool2d(y, 3, stride=2, padding=1) if stem.max_pool else y


def plain_unit(x: Tensor, unit: AnyUnit, tensors: list[list[Tensor | None]], *, training: bool) -> Tensor:
    """What a unit computes, in plain PyTorch, with or without its batch norms in training mode."""

    def stage(y: Tensor, index: int, **options: Any) -> Tensor:
        (weight, bias, gamma, beta, mean, var), norm = tensors[index], unit.stages[index].norm
        assert weight is not None
        y = F.conv2d(y, weight, bias, **options)
        return y if norm is None else F.batch_norm(y, mean, var, gamma, beta, training, 0.0, norm.eps)

    if isinstance(unit, UnitV2):
        beside, y = reference.split_halves(x, stride=unit.stride, split_groups=unit.split_groups)
        if unit.stride == 2:
            beside = stage(beside, 3, stride=2, padding=1, groups=unit.in_channels)
            beside = F.relu(stage(beside, 4))
        y = F.relu(stage(y, 0))
        y = F.relu(stage(stage(y, 1, stride=unit.stride, padding=1, groups=unit.mid_channels), 2))
        return reference.shuffle_channels(torch.cat([beside, y], 1), unit.shuffle_groups)
    y = F.relu(stage(x, 0, groups=unit.conv1_groups))
    y = reference.shuffle_channels(y, unit.shuffle_groups)
    y = stage(y, 1, stride=unit.stride, padding=1, groups=unit.mid_channels)
    y = stage(F.relu(y) if unit.conv2_relu else y, 2, groups=unit.groups)
    return reference.add_shortcut(
        y,
        x,
        stride=unit.stride,
        pool_count_include_pad=unit.pool_count_include_pad,
        shortcut_first=unit.shortcut_first,
        shortcut_relu=unit.shortcut_relu,
    )


def run_unit(x: Tensor, unit: AnyUnit, tensors: list[list[Tensor | None]]) -> Tensor:
    """A unit, with its norms in eval mode, by the native op; tensors as :func:`stage_tensors` has them."""
    norms = [stage.norm for stage in unit.stages]
    if isinstance(unit, UnitV2):
        return run_unit_v2(x, tensors, [None if norm is None else norm.eps for norm in norms], unit.step, unit.options)
    if None not in norms:
        eps = {f"bn{i}_eps": norm.eps for i, norm in enumerate(norms, 1) if norm is not None}
        flat = [tensor for stage in tensors for tensor in stage]
        op = torch.ops.shufflenet_ext.shuffle_bottleneck_batch_norm
        return op(x, *flat, **eps, **unit.op_options, allow_tf32=allows_tf32(x))
    folded = [tensor for stage, t in zip(unit.stages, tensors, strict=True) for tensor in fold(stage, t)]
    return ops.shuffle_bottleneck(x, *folded, **unit.options)


def _norm_of(module: nn.Module, paths: _Paths) -> Any:
    """The module of a stage's norm, None where it has none."""
    mean = paths[-2]
    if mean is None:
        return None
    for name in mean[:-1]:
        module = module._modules[name]  # type: ignore[assignment]  # it is there
    return module


class Fused(nn.Module):
    """A mixin by which :func:`shufflenet_ext.fuse` makes a module of any class run fused.

    Wherever the module is not what it was at the time of :func:`shufflenet_ext.fuse`, it runs its own class's code.
    """

    _adopted: _Adopted

    def _run(self, x: Tensor) -> Tensor | None:
        """The module's result by the native op; None where its own code is to run."""
        raise NotImplementedError

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Does what every module's does; convert_sync_batchnorm calls it for each child."""
        super().add_module(name, module)
        self._adopted.take_synced_norms()

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        if reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        mixin, base = type(self).__bases__
        return _new, (mixin, base, *reduced[1][1:]), *reduced[2:]


class FusedUnit(Fused):
    """The mixin of a unit."""

    @property
    def fused_unit(self) -> AnyUnit:
        """The unit that it is: its geometry, and which of its tensors are whose."""
        unit: AnyUnit = self._adopted.part
        return unit

    def _run(self, x: Tensor) -> Tensor | None:
        adopted, unit = self._adopted, self.fused_unit
        is_trained = not adopted.unchanged()
        if is_trained and not (adopted.training() and adopted.unchanged(in_any_mode=True)):
            fall_back(f"a fused {type(self).__name__} is not what it was when fuse() proved it")
            return None
        if not (trains_native(x, unit.version) if is_trained else runs_native(x, lambda: unit.sizes, unit.version)):
            return None
        if not is_trained:
            return run_unit(x, unit, _read_all(self, adopted.paths, adopted.orders))
        stages = adopted.trained_stages(self)
        if (cause := untrainable([stage.norm for stage in stages])) is not None:
            fall_back(cause)
            return None
        return train(x, stages, **unit.options)


def _new(mixin: type[Fused], base: Any, *args: Any) -> nn.Module:
    created: nn.Module = copyreg.__newobj__(_fused_class(mixin, base), *args)  # type: ignore[attr-defined]
    return created


_fused_classes: dict[Any, type[nn.Module]] = {}  # by the mixins and the classes that they were made from


def _fused_class(mixin: type[Fused], base: Any) -> type[nn.Module]:
    """The class whose objects are those of ``base``, fused."""
    if (mixin, base) in _fused_classes:
        return _fused_classes[mixin, base]

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].dim() == 4:
            result = self._run(args[0])
            if result is not None:
                return result
        elif (node := leaf_node(self, *args, **kwargs)) is not None:
            return node
        return base.forward(self, *args, **kwargs)

    namespace = {"__module__": base.__module__, "__doc__": base.__doc__, "forward": forward}
    created = type(f"Fused{base.__name__}", (mixin, base), namespace)
    return _fused_classes.setdefault((mixin, base), created)


def adopt(module: nn.Module, part: AnyUnit | Stem, mixin: type[Fused]) -> None:
    """Makes a module run fused. It keeps its tensors, children, hooks and everything else that it has."""
    module.__class__ = _fused_class(mixin, type(module))
    adopted = _Adopted(module, part)
    object.__setattr__(module, "_adopted", adopted)


def foldable_unit(module: nn.Module) -> AnyUnit | None:
    """The unit that a fused module is, where it is no more than its tensors; None where it is not."""
    if has_hooks(module):
        return None
    if isinstance(module, FusedUnit):
        return module.fused_unit if module._adopted.unchanged() else None
    if type(module) is FusedShuffleUnitV2:
        return None if unfusable_v2(module) is not None else _own_unit_v2(module)
    if type(module) is not FusedShuffleBottleneck:
        return None
    pairs = module.pairs()
    if any(unfusable(conv, norm) is not None for conv, norm in pairs):
        return None
    stages = tuple(own_stage(f"conv{i}", conv, f"bn{i}", norm) for i, (conv, norm) in enumerate(pairs, 1))
    return Unit(
        in_channels=module.conv1.in_channels,
        mid_channels=module.conv1.out_channels,
        out_channels=module.conv3.out_channels,
        conv1_groups=module.conv1.groups,
        groups=module.groups,
        shuffle_groups=module.shuffle_groups,
        stride=module.stride,
        conv2_relu=module.conv2_relu,
        pool_count_include_pad=module.pool_count_include_pad,
        shortcut_first=module.shortcut_first,
        shortcut_relu=module.shortcut_relu,
        stages=stages,  # type: ignore[arg-type]  # three of them
    )


def own_stage(conv_name: str, conv: Any, norm_name: str, norm: Any) -> Stage:
    """A convolution and a norm of a module, which have these names in it, as a stage."""
    return Stage(
        f"{conv_name}.weight",
        None if conv.bias is None else f"{conv_name}.bias",
        Norm(
            None if norm.weight is None else f"{norm_name}.weight",
            None if norm.bias is None else f"{norm_name}.bias",
            f"{norm_name}.running_mean",
            f"{norm_name}.running_var",
            norm.eps,
        ),
    )


def _own_unit_v2(unit: FusedShuffleUnitV2) -> UnitV2:
    names = [("branch2", 0, 1), ("branch2", 3, 4), ("branch2", 5, 6), ("branch1", 0, 1), ("branch1", 2, 3)]
    pairs = unit.pairs()
    return UnitV2(
        in_channels=unit.in_channels,
        mid_channels=pairs[0][0].out_channels,
        out_channels=pairs[2][0].out_channels,
        shortcut_channels=pairs[4][0].out_channels if unit.stride == 2 else 0,
        **unit.options(),
        stages=tuple(
            own_stage(f"{branch}.{i}", conv, f"{branch}.{j}", norm)
            for (branch, i, j), (conv, norm) in zip(names, pairs, strict=False)
        ),
    )
