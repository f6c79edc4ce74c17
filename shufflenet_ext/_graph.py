"""Traces a module, and reduces the graph to what computes.

What only moves channels (views, transpositions, concatenations, slices, ...) is not looked at: it is run, on numbers
that stand for the elements. Wherever an operation reads a tensor, the numbers in it say which channels of which
operations before it are there, however the code that moved them was written.
"""

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

from shufflenet_ext._backend import use_backend

# ATen operations that change no element. They are run on the numbers.
# fmt: off
_MOVES = frozenset((
    "view", "reshape", "_unsafe_view", "view_as", "reshape_as", "permute", "transpose", "t", "movedim",
    "moveaxis", "swapaxes", "swapdims", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as",
    "contiguous", "clone", "detach", "alias", "lift_fresh_copy", "channel_shuffle", "native_channel_shuffle",
    "pixel_shuffle", "pixel_unshuffle", "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "slice",
    "narrow", "select", "index_select", "index", "gather", "take_along_dim", "cat", "concat", "concatenate",
    "stack", "hstack", "roll", "flip", "rot90", "repeat", "as_strided", "copy", "unsafe_chunk", "unsafe_split",
    "unsafe_split_with_sizes",
))
# fmt: on
# Nor do these, but for their result alone: they read shapes, or check something.
_QUERIES = frozenset(("sym_size", "sym_numel", "sym_stride", "size"))
_CHECKS = frozenset(
    (
        "_assert_tensor_metadata",
        "_assert_scalar",
        "_assert_async",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
    )
)


# Arguments of convolutions, norms and linear layers that are parameters.
_WEIGHTS = frozenset(("weight", "bias", "running_mean", "running_var"))


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer of the module, or a constant of its code."""

    name: str  # in the module's state; of a constant, export's
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Wire:
    """What a tensor holds: runs of channels, each of one operation."""

    runs: tuple[tuple["Operation", tuple[int, ...]], ...]

    def whole(self) -> tuple["Operation", list[int]] | None:
        """The operation whose channels these are, each once, and their order; None where it is not so."""
        if len(self.runs) != 1:
            return None
        ((source, order),) = self.runs
        return (source, list(order)) if sorted(order) == list(range(source.channels)) else None

    def channels(self) -> list[tuple["Operation", int]]:
        """Each channel as the operation whose it is, and its number there."""
        return [(source, channel) for source, order in self.runs for channel in order]

    def only(self) -> "Operation | None":
        """The operation whose result this is, unmoved."""
        return self.runs[0][0] if self.runs and self == self.runs[0][0].result else None


def wire_of(channels: Sequence[tuple["Operation", int]]) -> Wire:
    """The wire that holds these channels."""
    runs = itertools.groupby(channels, key=lambda channel: id(channel[0]))
    grouped = [list(run) for _, run in runs]
    return Wire(tuple((run[0][0], tuple(channel for _, channel in run)) for run in grouped))


@dataclass(eq=False)
class Operation:
    """A call that computes, or an input of the graph (named "input")."""

    name: str
    node: torch.fx.Node
    shape: tuple[int, ...]  # of the result
    arguments: dict[str, Any] = field(
        default_factory=dict
    )  # by their names in the schema; tensors as Wire or Parameter

    @property
    def channels(self) -> int:
        return self.shape[1] if len(self.shape) > 1 else 1

    @property
    def result(self) -> Wire:
        return Wire(((self, tuple(range(self.channels))),))

    def wires(self) -> list[Wire | None]:
        """Tensors that it reads, parameters left out; None for one that is not made of whole channels."""
        flat = [a for value in self.arguments.values() for a in (value if isinstance(value, list | tuple) else [value])]
        return [a if isinstance(a, Wire) else None for a in flat if isinstance(a, Wire | _Scrambled)]


class _Scrambled:
    """Stands for a tensor that is not made of whole channels in their places."""


class TraceError(Exception):
    """The graph has something in it that cannot be followed."""


@dataclass
class Graph:
    """A traced module."""

    operations: list[Operation]  # in the order of their calls
    outputs: list[Any]  # a Wire for each tensor; other things as they are
    program: Any  # the ExportedProgram
    holders: dict[Wire, list[torch.fx.Node]]  # the nodes whose tensors hold a wire, in their order

    @property
    def inputs(self) -> list[Operation]:
        return [operation for operation in self.operations if operation.name == "input"]


def trace(module: nn.Module, args: tuple[Any, ...], *, training_too: bool = True) -> Graph:
    """The graph of ``module`` called with ``args``, in the mode that it is in.

    With ``training_too=False`` a dropout that drops nothing is taken for what it then is.

    TraceError for a graph that cannot be followed; else whatever torch.export raises for a module that it refuses.
    """
    with use_backend("reference"):  # units that are fused already are traced as what they compute
        program = torch.export.export(module, args, strict=False)
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    constants = {**program.constants, **program.state_dict}

    def placeholder(node: torch.fx.Node) -> Any:
        spec, value = specs[node.name], node.meta.get("val")
        if not isinstance(value, Tensor) or spec.kind == InputKind.USER_INPUT:
            return None
        if not value.is_floating_point() and spec.target in constants and spec.target not in program.state_dict:
            return constants[spec.target]  # an index that the code made: it cannot be loaded anew, as a buffer can
        return Parameter(spec.target, _sizes(value))

    return _Tracer(placeholder, training_too).run(program.graph, program)


def graph_of(module: torch.fx.GraphModule) -> Graph:
    """The graph of a module of ATen operations, as make_fx returns it, whose inputs are images and parameters alike.

    Parameters are named as the inputs that they are.
    """
    return _Tracer(None, training_too=False).run(module.graph, None)


class _Tracer:
    def __init__(self, placeholder: Callable[[torch.fx.Node], Any] | None, training_too: bool) -> None:
        self.placeholder = placeholder  # what an input is, if it is not data; None: it is what it is used as
        self.training_too = training_too
        self.given: dict[int, Parameter] = {}  # data of the graph as parameters, by its numbers' id
        self.operations: list[Operation] = []
        self.starts: list[int] = []  # of the operations' numbers
        self.next = 0

    def run(self, graph: torch.fx.Graph, program: Any) -> Graph:
        env: dict[torch.fx.Node, Any] = {}
        outputs: list[Any] = []
        for node in graph.nodes:
            if node.op == "placeholder":
                env[node] = self._placeholder(node)
            elif node.op == "output":
                outputs = [self._seen(value) for value in _values(node.args[0], env)]
            elif node.op == "call_function":
                args, kwargs = _values(node.args, env), _values(node.kwargs, env)
                env[node] = self._call(node, args, kwargs)
            else:
                env[node] = node
        holders: dict[Wire, list[torch.fx.Node]] = {}
        for node, value in env.items():
            # Numbers that were written into are by now what the last writer has put there.
            wire = self._wire(value) if isinstance(value, Tensor) else None
            if isinstance(wire, Wire) and len(wire.runs[0][0].shape) == value.dim():
                holders.setdefault(wire, []).append(node)
        return Graph(self.operations, outputs, program, holders)

    def _placeholder(self, node: torch.fx.Node) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return _hint(value)
        known = self.placeholder(node) if self.placeholder is not None else None
        if known is not None:
            return known
        numbers = self._compute("input", node, {}, _sizes(value))
        if self.placeholder is None:
            self.given[id(numbers)] = Parameter(node.name, _sizes(value))
        return numbers

    def _compute(self, name: str, node: torch.fx.Node, arguments: dict[str, Any], shape: tuple[int, ...]) -> Tensor:
        """Numbers for an operation's result, which no other operation has."""
        operation = Operation(name, node, shape, arguments)
        self.operations.append(operation)
        self.starts.append(self.next)
        count = torch.Size(shape).numel()
        numbers = torch.arange(self.next, self.next + count).view(shape)
        self.next += max(count, 1)
        return numbers

    def _call(self, node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            if target is operator.getitem or not _tensors((args, kwargs)):
                return target(*args, **kwargs)  # type: ignore[operator]  # a function of numbers
            raise TraceError(f"it calls {target}")
        name = target._schema.name.split("::")[1]
        base = name.removesuffix("_")
        if base in _CHECKS:
            return None
        if base in _QUERIES:
            return target(*args, **kwargs)
        if base in ("to", "_to_copy", "type_as") and not _changes_dtype(node):
            return args[0]
        if base in ("dropout", "feature_dropout") and not self.training_too and not args[2]:
            return args[0]
        if base == "arange" and not node.meta["val"].is_floating_point():
            return target(*args, **kwargs)  # an index, not numbers
        moves = base in _MOVES and not any(isinstance(a, Parameter) for a in _leaves((args, kwargs)))
        if moves and not _changes_dtype(node):
            try:
                return target(*args, **kwargs)
            except (RuntimeError, IndexError):  # a view that the strides of the numbers do not have
                if base == "view":
                    return args[0].reshape(*args[1:])
                raise TraceError(f"{name} cannot be followed") from None
        return self._operation(node, base, target, args, kwargs)

    def _operation(self, node: torch.fx.Node, base: str, target: Any, args: Any, kwargs: Any) -> Any:
        schema = target._schema.arguments
        arguments = {a.name: a.default_value for a in schema if a.has_default_value()}
        arguments |= {a.name: value for a, value in zip(schema, args, strict=False)} | kwargs
        for weight in _WEIGHTS & arguments.keys():
            arguments[weight] = self.given.get(id(arguments[weight]), arguments[weight])
        mutated = [a.name for a in schema if a.is_write]
        seen = {name: self._seen(value) for name, value in arguments.items()}
        name, seen = _normalised(base, seen)
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            numbers = self._compute(name, node, seen, _sizes(value))
            for written in mutated:
                if not isinstance(arguments[written], Tensor):
                    raise TraceError(f"{base} writes into a parameter or buffer")
                # Views of it are views of its numbers: whoever reads them later reads the result.
                arguments[written].copy_(numbers.view(arguments[written].shape))
            return arguments[mutated[0]] if mutated else numbers
        if mutated:
            raise TraceError(f"{base} writes into a tensor")
        if isinstance(value, list | tuple):
            return [self._compute(name, node, seen, _sizes(v)) if isinstance(v, Tensor) else v for v in value]
        self._compute(name, node, seen, ())
        return value

    def _seen(self, value: Any) -> Any:
        """Numbers as the wire that they are; anything else as it is."""
        if isinstance(value, list | tuple):
            return [self._seen(v) for v in value]
        return self._wire(value) if isinstance(value, Tensor) else value

    def _wire(self, numbers: Tensor) -> "Wire | _Scrambled":
        if numbers.dtype != torch.int64 or numbers.dim() < 2 or numbers.numel() == 0:
            return _Scrambled()
        flat = numbers.reshape(*numbers.shape[:2], -1)
        batch, _, pixels = flat.shape
        first = flat[0, :, 0].contiguous()
        indices = torch.searchsorted(torch.tensor(self.starts), first, right=True) - 1
        sources = [self.operations[index] for index in indices.tolist()]
        for source in set(sources):
            if len(source.shape) < 2 or source.shape[0] != batch or torch.Size(source.shape[2:]).numel() != pixels:
                return _Scrambled()
            if len(source.shape) == numbers.dim() and source.shape[2:] != numbers.shape[2:]:
                return _Scrambled()
        places = first - torch.tensor(self.starts)[indices]
        channels = places // pixels
        counts = torch.tensor([source.channels for source in sources])
        images = torch.arange(batch).view(-1, 1) * (counts * pixels) + first
        whole = channels * pixels == places
        if not bool((whole & (channels < counts)).all()):
            return _Scrambled()
        if not torch.equal(flat, images.unsqueeze(2) + torch.arange(pixels)):
            return _Scrambled()
        return wire_of(list(zip(sources, channels.tolist(), strict=True)))


def _normalised(name: str, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """One name for what has several in ATen."""
    if name == "convolution" and not arguments["transposed"]:
        return "conv2d", arguments
    if name in ("clamp", "clamp_min") and arguments.get("min") == 0 and arguments.get("max") is None:
        return "relu", {"self": arguments["self"]}
    if name == "threshold" and arguments["threshold"] == arguments["value"] == 0:
        return "relu", {"self": arguments["self"]}
    return name, arguments


def _values(arguments: Any, env: dict[torch.fx.Node, Any]) -> Any:
    return torch.fx.node.map_arg(arguments, lambda node: env[node])


def _leaves(value: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(value)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(value) if isinstance(leaf, Tensor)]


def _sizes(value: Tensor) -> tuple[int, ...]:
    """The shape with which the graph was traced."""
    return tuple(_hint(size) for size in value.shape)


def _hint(value: Any) -> Any:
    """A symbolic number as the one with which the graph was traced; nothing is guarded by it."""
    return value.node.hint if isinstance(value, torch.SymInt) else value


def _changes_dtype(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    before = [arg.meta.get("val") for arg in node.all_input_nodes]
    dtypes = {v.dtype for v in [value, *before] if isinstance(v, Tensor) and v.is_floating_point()}
    return len(dtypes) > 1
