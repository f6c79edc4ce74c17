"""optimize_for_inference: an eval-only copy of a model, batch norm folded ahead."""

import copy
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx import Proxy

from shufflenet_ext import reference
from shufflenet_ext._backend import implementation
from shufflenet_ext._capture import capture
from shufflenet_ext._chain import FusedSequential, Part
from shufflenet_ext._checks import check_tensor
from shufflenet_ext._fused import foldable_unit, folded, tensor_of
from shufflenet_ext._match import AnyUnit
from shufflenet_ext._native import UnitSizes
from shufflenet_ext._network import Chain, Head, LastConvolution, Stem
from shufflenet_ext._packed import PackedWeights
from shufflenet_ext._program import program_of
from shufflenet_ext._steps import Explanation, Explanations, explain_steps
from shufflenet_ext.fusion import fuse
from shufflenet_ext.models import ShuffleNetCifar, ShuffleNetV1, ShuffleNetV2
from shufflenet_ext.modules import has_hooks, leaf_node


class _EvalOnly(nn.Module):
    def train(self, mode: bool = True) -> "_EvalOnly":
        if mode:
            raise RuntimeError("this module was made by optimize_for_inference: it has no training mode")
        return super().train(False)


class _Steps:
    """Steps of a program and their weights; see :func:`reference.shuffle_network`."""

    def __init__(self, parts: Sequence[Part], dtype: torch.dtype | None) -> None:
        """``dtype`` is that of the weights; None: each tensor's."""
        self.program = program_of(part.step for _, part in parts)
        self.tensors = [tensor for part in parts for tensor in _weights_of(*part, dtype)]
        units = [part for _, part in parts if isinstance(part, AnyUnit)]
        self.sizes = [sizes for unit in units for sizes in unit.sizes]
        self.count = len(units)
        self.version = max((unit.version for unit in units), default=1)

    def packed(self) -> Tensor:
        return reference.pack_weights(self.tensors)


def _weights_of(
    module: nn.Module, part: Stem | AnyUnit | LastConvolution | Head, dtype: torch.dtype | None
) -> Iterator[Tensor]:
    if isinstance(part, Head):
        weight = tensor_of(module, part.weight)
        bias = weight.new_zeros(len(weight)) if part.bias is None else tensor_of(module, part.bias)
        yield from (tensor.detach().to(dtype or tensor.dtype) for tensor in (weight, bias))
    else:
        for stage in part.stages:
            yield from folded(module, stage, dtype)


class InferenceUnits(_EvalOnly):
    """Units one behind the other for inference: one op on packed weights. Made by :func:`optimize_for_inference`."""

    weights: Tensor

    def __init__(self, units: Iterable[tuple[nn.Module, AnyUnit]], dtype: torch.dtype | None) -> None:
        super().__init__()
        steps = _Steps(list(units), dtype)
        self.register_buffer("weights", steps.packed())
        self.program = steps.program
        self.sizes, self.version, self.count = steps.sizes, steps.version, steps.count
        self.packed = PackedWeights()
        super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy) and (node := leaf_node(self, x)) is not None:
            return node
        check_tensor("x", x)
        weights = _weights(self)
        if x.is_cuda:
            return _run_on_cuda(self, x, weights, self.program)
        return _run(x, weights, self.program, self.sizes, self.version)

    def explain(self, x: Tensor) -> Explanation:
        """How each unit runs on x, on the CPU; see :meth:`InferenceModel.explain`."""
        return explain_steps(self, x, [f"unit {i}" for i in range(1, self.count + 1)])


def _captured(model: nn.Module, chain: Chain, dtype: torch.dtype | None) -> nn.Module:
    """What takes the place of a chain of a captured model: one op."""
    parts: list[Part] = [(model, found.unit) for found in chain.units]
    names = [f"unit {i}" for i in range(1, len(parts) + 1)]
    if chain.stem is not None:
        parts.insert(0, (model, chain.stem))
    if chain.last is not None:
        parts.append((model, chain.last))
    if chain.head is not None:
        parts.append((model, chain.head))
    return InferenceNetwork(parts, names, dtype)


class InferenceNetwork(_EvalOnly):
    """A network, or a part of one, for inference: one op on packed weights. Made by :func:`optimize_for_inference`.

    On a GPU the units are one op; the stem and the head are PyTorch's.
    """

    weights: Tensor

    def __init__(self, network: Sequence[Part], unit_names: Sequence[str], dtype: torch.dtype | None) -> None:
        """``network`` is units, with or without a stem ahead, and a last convolution and a head behind."""
        super().__init__()
        kinds = Stem, AnyUnit, LastConvolution | Head
        parts = [_Steps([part for part in network if isinstance(part[1], kind)], dtype) for kind in kinds]
        self.programs = [part.program for part in parts]
        names: dict[Any, list[str]] = {Stem: ["stem"], LastConvolution: ["last convolution"], Head: ["means", "linear"]}
        around = [(type(part), names[type(part)]) for _, part in network if type(part) in names]
        self.step_names = [name for kind, own in around if kind is Stem for name in own]
        self.step_names += [*unit_names, *(name for kind, own in around if kind is not Stem for name in own)]
        packed = [part.packed() if part.tensors else None for part in parts]
        self.register_buffer("weights", torch.cat([weights for weights in packed if weights is not None]))
        self.program = [number for part in parts for number in part.program]
        self.lengths = [0 if weights is None else len(weights) for weights in packed]
        self.sizes, self.version = parts[1].sizes, parts[1].version
        self.packed = PackedWeights()
        super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy) and (node := leaf_node(self, x)) is not None:
            return node
        check_tensor("x", x)
        if not x.is_cuda:
            return _run(x, _weights(self), self.program, self.sizes, self.version)
        stem, units, head = zip(self.weights.split(self.lengths), self.programs, strict=True)
        y = _for_cuda(x, self.weights)
        if stem[1]:
            y = reference.shuffle_network(y, *stem)
        if units[1]:
            y = _run_on_cuda(self, y, *units)
        if head[1]:
            y = reference.shuffle_network(y, *head)
        return y.to(x.dtype)

    def explain(self, x: Tensor) -> Explanation:
        """How each step runs on x, on the CPU; see :meth:`InferenceModel.explain`."""
        return explain_steps(self, x, self.step_names)


def _for_cuda(x: Tensor, weights: Tensor) -> Tensor:
    """x as an op takes it on CUDA: of the weights' dtype."""
    return x.bfloat16() if x.dtype == torch.float32 and weights.dtype == torch.bfloat16 else x


# A call of a network takes a millisecond, in which the processor's caches forget all of Python and PyTorch: what is
# passed through on the way to the op then costs ten times what a loop of it shows. So modules' attributes are read
# where they are, not by nn.Module.__getattr__ (15 us each), and nothing is entered or converted without need (30 us).
def _weights(module: InferenceUnits | InferenceNetwork) -> Tensor:
    weights = module._buffers["weights"]
    assert weights is not None
    return weights


def _run(x: Tensor, weights: Tensor, program: list[int], sizes: list[UnitSizes], version: int) -> Tensor:
    run, settings = implementation(x, lambda: sizes, version)
    y: Tensor = run.shuffle_network(x, weights, program, **settings)
    return y


def _run_on_cuda(module: InferenceUnits | InferenceNetwork, x: Tensor, weights: Tensor, program: list[int]) -> Tensor:
    """Runs units, by weights that are the module's or a part of them."""
    run, settings = implementation(x, lambda: module.sizes, module.version)
    given = _for_cuda(x, weights)
    if run is torch.ops.shufflenet_ext:
        packed = module.packed.of(given, weights, program, _weights(module), settings)
        if packed is not None:
            settings = {**settings, "packed": packed}
    y: Tensor = run.shuffle_network(given, weights, program, **settings)
    return y.to(x.dtype)


class InferenceModel(_EvalOnly):
    """A model for inference, which takes the arguments of the one that it was made from.

    Made by :func:`optimize_for_inference`.
    """

    def __init__(
        self,
        model: nn.Module,
        sizes: Sequence[tuple[int | None, ...]] | None = None,
        whole: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.sizes = sizes  # that the tensors of a call must have, None for any; None where the model knows itself
        # What is called: a module of the model that is all of it, as to go through a graph takes a tenth of the time of
        # a small network. In a list, so that it is no second child.
        self.called = [whole or model]
        super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (model,) = self.called
        if self.sizes is not None:
            _check_sizes(args, kwargs, self.sizes)
        if not torch.is_grad_enabled():
            return model(*args, **kwargs)
        with torch.no_grad():
            return model(*args, **kwargs)

    def explain(self, *args: Any, **kwargs: Any) -> Explanations:
        """How the parts of the model that are native ops run, step by step, on the CPU. Some calls are run and timed.

        Args:
            As for a call of the model.

        Returns an explanation for each call of a part, which has its name in the model (``part``; "" for one of this
        package's networks, which is one op as a whole). They print as tables; their ``steps`` have, for programs: a
        name, the input's and output's shapes, useful floating-point operations, the bytes of weights, how threads share
        the work, tiles and buffers, microseconds, and what that is of the most that these threads can do.

        RuntimeError if no such part was called, or one ran the reference. ValueError if one was called on another
        device, or on an empty batch.
        """
        parts = {
            part: name
            for name, part in self.model.named_modules()
            if isinstance(part, (InferenceUnits, InferenceNetwork))
        }
        calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        hooks = [part.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True) for part in parts]
        try:
            self(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        if not calls:
            raise RuntimeError("explain: the call ran no part that optimize_for_inference made one op of")
        return Explanations(
            replace(part.explain(*part_args, **part_kwargs), part=parts[part]) for part, part_args, part_kwargs in calls
        )


def _with_arguments_of(model: nn.Module, optimized: InferenceModel, count: int | None = None) -> InferenceModel:
    """Gives an InferenceModel the arguments of the model it was made from: all, or those that it was captured with."""
    parameters = [*inspect.signature(model.forward).parameters.values()][:count]
    optimized.__class__ = _class_with(tuple((p.name, p.kind, p.default is p.empty, p.default) for p in parameters))
    return optimized


class _Name(str):
    """An argument's default value in source code, by the name that stands for it."""

    __slots__ = ()
    __repr__ = str.__str__


def _class_with(parameters: tuple[tuple[Any, ...], ...]) -> type[InferenceModel]:
    """The class whose forward has these parameters.

    As in dataclasses, the function is made from source: torch.export asks for a function's signature, but torch.fx
    looks at its code.
    """
    namespace: dict[str, Any] = {"_InferenceModel": InferenceModel}
    declared, passed = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)], ["self"]
    for number, (name, kind, required, default) in enumerate(parameters):
        namespace[f"_default{number}"] = default
        stands_for = inspect.Parameter.empty if required else _Name(f"_default{number}")
        declared.append(inspect.Parameter(name, kind, default=stands_for))
        before = {kind.VAR_POSITIONAL: "*", kind.VAR_KEYWORD: "**", kind.KEYWORD_ONLY: f"{name}="}.get(kind, "")
        passed.append(before + name)
    exec(
        f"def forward{inspect.Signature(declared)}: return _InferenceModel.forward({', '.join(passed)})",
        namespace,
    )

    def reduce(self: InferenceModel, protocol: Any) -> Any:
        reduced: Any = InferenceModel.__reduce_ex__(self, protocol)
        return _new_with, (parameters,), *reduced[2:]

    members = {"forward": namespace["forward"], "__reduce_ex__": reduce, "__doc__": InferenceModel.__doc__}
    return type("InferenceModel", (InferenceModel,), members)


def _new_with(parameters: tuple[tuple[Any, ...], ...]) -> InferenceModel:
    created = _class_with(parameters)
    return created.__new__(created)


# Where torch.fx traces an InferenceModel, the check is in its graph too.
@torch.fx.has_side_effect
def _check_sizes(args: Any, kwargs: Any, sizes: Sequence[tuple[int | None, ...]]) -> None:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if len(tensors) != len(sizes):
        raise ValueError(f"got {len(tensors)} tensors, expected {len(sizes)}, as in example_inputs")
    for number, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
        if len(size) != tensor.dim() or any(e not in (None, got) for e, got in zip(size, tensor.shape, strict=True)):
            expected = ", ".join("any" if e is None else str(e) for e in size)
            raise ValueError(f"input {number}: got shape {list(tensor.shape)}, expected [{expected}]")


torch.fx.wrap("_check_sizes")


def optimize_for_inference(
    model: nn.Module, dtype: torch.dtype | None = None, *, example_inputs: tuple[Any, ...] | None = None
) -> InferenceModel:
    """An eval-only copy of ``model`` whose units have their batch norm folded into their weights.

    Every unit that :func:`shufflenet_ext.fuse` swaps becomes one op on folded weights; this package's networks become
    a chain of a folded stem, those ops and the linear layer. ``model`` itself is left as it is. The copy computes no
    gradients; its ``train()`` raises RuntimeError.

    With ``dtype=torch.bfloat16`` these ops have weights of bfloat16, rounded once, and compute in it: products are
    summed in float32, what is handed from layer to layer is rounded. They take images of float32 or bfloat16, and
    return the same. All else in the model stays in its own dtype.

    With ``example_inputs``, the arguments of a call as torch.export takes them, the whole model is looked through:
    stems, units of any class one behind the other, and heads become native ops across the borders of its modules. Batch
    and image size stay free where the model allows it; a call with other sizes than the graph holds for raises
    ValueError.

    TypeError if ``model`` is not a module, ``dtype`` no torch.dtype or ``example_inputs`` no tuple; ValueError if
    ``dtype`` is another than bfloat16.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if not isinstance(dtype, torch.dtype | None):
        raise TypeError(f"dtype: got {type(dtype).__name__}, expected torch.bfloat16 or None")
    if dtype not in (torch.bfloat16, None):
        raise ValueError(f"dtype: got {dtype}, expected torch.bfloat16 or None")
    if not isinstance(example_inputs, tuple | None):
        raise TypeError(f"example_inputs: got {type(example_inputs).__name__}, expected a tuple or None")
    if example_inputs is not None:
        captured = capture(
            copy.deepcopy(model).eval(), example_inputs, lambda module, chain: _captured(module, chain, dtype)
        )
        return _with_arguments_of(
            model, InferenceModel(captured.module, captured.sizes, captured.whole), len(example_inputs)
        )
    copied = fuse(copy.deepcopy(model).eval())
    return _with_arguments_of(model, InferenceModel(_inference_twin(copied, dtype, {})))


def _inference_twin(module: nn.Module, dtype: torch.dtype | None, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    """What takes the module's place; ``twins`` has those made so far, as a module used twice stays one."""
    if module in twins:
        return twins[module]
    units = _chain(module)
    # Only what these classes' own code does between the modules is known; a subclass may do something else.
    if type(module) in (ShuffleNetCifar, ShuffleNetV1, ShuffleNetV2):
        parts = module.parts()  # type: ignore[operator]  # of these classes
        if parts is not None:
            layers = enumerate(module.layers(), 1)  # type: ignore[operator]
            names = [f"unit {i}.{j}" for i, layer in layers for j in range(1, len(layer) + 1)]
            twins[module] = InferenceNetwork(parts, names, dtype)
            return twins[module]
    elif units:
        twins[module] = InferenceUnits(units, dtype)
        return twins[module]
    twins[module] = module
    for name, child in list(module._modules.items()):
        if child is not None:
            setattr(module, name, _inference_twin(child, dtype, twins))
    return module


def _chain(module: nn.Module) -> list[tuple[nn.Module, AnyUnit]]:
    """The units that the module is: itself, or those of a Sequential of nothing else; none for other modules."""
    children: list[nn.Module] = [module]
    if isinstance(module, nn.Sequential) and type(module) in (nn.Sequential, FusedSequential) and not has_hooks(module):
        children = list(module)
    units = [(child, unit) for child in children if (unit := foldable_unit(child)) is not None]
    same = len({type(unit) for _, unit in units}) == 1
    return units if same and len(units) == len(children) else []
