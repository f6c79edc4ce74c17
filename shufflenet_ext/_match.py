"""Recognises ShuffleNet units in a traced graph: by what is computed, whatever its names and style."""

from dataclasses import dataclass, field
from typing import Any

from shufflenet_ext._backend import unit_variant
from shufflenet_ext._graph import Graph, Operation, Parameter, Wire
from shufflenet_ext._native import UnitSizes
from shufflenet_ext._program import StepKind

Order = tuple[int, ...]


@dataclass(frozen=True)
class Norm:
    """A batch norm: its tensors by their names in the module's state."""

    weight: str | None
    bias: str | None
    mean: str
    var: str
    eps: float


@dataclass(frozen=True)
class Stage:
    """A convolution and the norm behind it."""

    weight: str
    bias: str | None
    norm: Norm | None
    # The rows of the convolution, and the channels of the norm, in the order in which the unit has them; None: as they
    # are. They differ where the shuffle comes behind the depthwise convolution, or ahead of a norm.
    order: Order | None = None
    norm_order: Order | None = None


@dataclass(frozen=True)
class Unit:
    """A unit of a graph: its geometry, and which tensors it has. The names are those of FusedShuffleBottleneck."""

    in_channels: int
    mid_channels: int
    out_channels: int
    conv1_groups: int
    groups: int
    shuffle_groups: int
    stride: int
    conv2_relu: bool
    pool_count_include_pad: bool
    shortcut_first: bool
    shortcut_relu: bool
    stages: tuple[Stage, Stage, Stage]

    @property
    def sizes(self) -> UnitSizes:
        """The unit for the planner."""
        conv1 = (self.mid_channels, self.in_channels // self.conv1_groups, 1, 1)
        conv3 = (self.out_channels, self.mid_channels // self.groups, 1, 1)
        return (*conv1, *conv3, self.conv1_groups, self.groups, self.stride, self.shuffle_groups)

    @property
    def variant(self) -> dict[str, Any]:
        """The op's arguments that set the unit apart from the original code's."""
        return unit_variant(self.groups, self.shuffle_groups, self.shortcut_first, self.shortcut_relu, self.stride)

    @property
    def step(self) -> list[int]:
        """Its step in a program."""
        numbers = [self.mid_channels, self.out_channels, self.conv1_groups, self.groups, self.stride]
        numbers += [int(self.conv2_relu), int(self.pool_count_include_pad)]
        if not self.variant:
            return [StepKind.UNIT.value, *numbers]
        general = self.shuffle_groups, int(self.shortcut_first), int(self.shortcut_relu)
        return [StepKind.GENERAL_UNIT.value, *numbers, *general]

    @property
    def op_options(self) -> dict[str, Any]:
        """The native ops' keyword arguments."""
        names = "conv1_groups groups stride conv2_relu pool_count_include_pad"
        return {name: getattr(self, name) for name in names.split()} | self.variant

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of :func:`shufflenet_ext.ops.shuffle_bottleneck`."""
        names = (
            "conv1_groups groups shuffle_groups stride conv2_relu pool_count_include_pad shortcut_first shortcut_relu"
        )
        return {name: getattr(self, name) for name in names.split()}


@dataclass
class Found:
    """A unit in a graph."""

    unit: Unit
    input: Wire
    end: Wire
    operations: list[Operation] = field(default_factory=list)  # all that it takes the place of


class NearMiss(Exception):  # noqa: N818 (it is no error)
    """What was looked at is no unit; ``depth`` tells how near it came."""

    def __init__(self, depth: int, cause: str) -> None:
        super().__init__(cause)
        self.depth = depth


def unit_of(graph: Graph) -> Unit:
    """The unit that a traced module is. NearMiss, with the cause, where it is none."""
    if len(graph.outputs) != 1 or not isinstance(graph.outputs[0], Wire):
        raise NearMiss(0, "it does not return one tensor made of whole channels")
    if len(graph.inputs) != 1:
        raise NearMiss(0, "it does not take one tensor")
    found = unit_at(graph.outputs[0])
    if found.input.only() is not graph.inputs[0]:
        raise NearMiss(6, "its first convolution does not read its input as it is")
    taken = {id(operation) for operation in [*found.operations, *graph.inputs]}
    for operation in graph.operations:
        if id(operation) not in taken:
            raise NearMiss(6, f"it computes more than a unit: {operation.name}")
    return found.unit


def unit_at(end: Wire) -> Found:
    """The unit whose result a wire holds. NearMiss where it is none's."""
    main, shortcut, operations, options = _end(end)
    conv3, norm3, order3 = _stage(main, operations)
    _expect_in_order(order3, "the last convolution's result")
    stage3 = named(conv3, norm3, "the last convolution")
    behind = _whole(conv3.arguments["input"], 2, "what the last convolution reads")
    conv2_relu = behind[0].name == "relu"
    conv2, norm2, order2 = _stage(_past_relu(behind, operations), operations)
    # order2: which channel of conv2 each input of conv3 is, norm2[1] of them which each channel of the norm is
    stride = _depthwise_stride(conv2)
    between = _whole(conv2.arguments["input"], 4, "what the depthwise convolution reads")
    if between[0].name != "relu":
        raise NearMiss(
            4, f"{between[0].name} stands between the first convolution and the depthwise one, expected relu"
        )
    conv1, norm1, order1 = _stage(_past_relu(between, operations), operations)
    stage1 = named(conv1, norm1, "the first convolution")
    for conv, which in ((conv1, "first"), (conv3, "last")):
        if square(conv) != (1, 1, 0, 1):
            raise NearMiss(5, f"the {which} convolution is not 1x1 with stride 1 and no padding")
    mid = conv2.channels
    shuffle = tuple(order1[channel] for channel in order2)
    shuffle_groups = _shuffle_groups(shuffle)
    x = conv1.arguments["input"]
    if not isinstance(x, Wire) or x != shortcut:
        raise NearMiss(6, "the first convolution and the shortcut do not read the same tensor")
    if options["stride"] != stride:
        raise NearMiss(6, f"a depthwise convolution of stride {stride} does not go with {options['end']}")
    stage2 = named(conv2, norm2, "the depthwise convolution")
    unit = Unit(
        in_channels=sum(len(channels) for _, channels in x.runs),
        mid_channels=mid,
        out_channels=conv3.channels,
        conv1_groups=conv1.arguments["groups"],
        groups=conv3.arguments["groups"],
        shuffle_groups=shuffle_groups,
        stride=stride,
        conv2_relu=conv2_relu,
        pool_count_include_pad=options.get("count_include_pad", True),
        shortcut_first=options.get("shortcut_first", False),
        shortcut_relu=options.get("shortcut_relu", True),
        stages=(
            Stage(*stage1, None, _composed(_inverse(norm1), None)),
            Stage(*stage2, _none_if_same(order2), _composed(_inverse(norm2), order2)),
            Stage(*stage3, None, _composed(_inverse(norm3), None)),
        ),
    )
    return Found(unit, x, end, operations)


_NormAt = tuple[Operation, list[int]]  # a batch norm, and which channel of the convolution each of its channels is


def _end(end: Wire) -> tuple[Wire, Wire, list[Operation], dict[str, Any]]:
    """The main branch, the unit's input as the shortcut reads it, what was passed on the way, and options."""
    operations: list[Operation] = []
    relus = [end] if len(end.runs) == 1 else []
    if relus:
        last = end.only()
        if last is None or last.name != "relu":
            name = "a shuffle" if last is None else last.name
            raise NearMiss(0, f"it ends in {name}, expected the ReLU of a sum, or a concatenation")
        operations.append(last)
        inside = last.arguments["self"]
        if not isinstance(inside, Wire):
            raise NearMiss(0, "the last ReLU reads something that is not made of whole channels")
        total = inside.only()
        if total is not None:
            if total.name != "add" or total.arguments.get("alpha", 1) != 1:
                raise NearMiss(0, f"the last ReLU reads {total.name}, expected a sum or a concatenation")
            operations.append(total)
            parts = [total.arguments["self"], total.arguments["other"]]
            if not all(isinstance(part, Wire) for part in parts):
                raise NearMiss(0, "the last sum is not one of two tensors")
            # The main branch is the one with the convolution in it.
            first_is_main = _is_normed_convolution(parts[0]) and not (
                _is_normed_convolution(parts[1]) and _reaches(parts[0], parts[1])
            )
            main, shortcut = parts if first_is_main else parts[::-1]
            return main, shortcut, operations, {"stride": 1, "end": "a sum"}
        end = inside
    if len(end.runs) != 2:
        raise NearMiss(0, f"its result is put together of {len(end.runs)} tensors, expected 2")
    halves = [Wire((run,)) for run in end.runs]
    pools = [_pool(half, operations, peel=not relus) for half in halves]
    if sum(pool is not None for pool in pools) != 1:
        raise NearMiss(0, "its result is not put together of a pooled input and another tensor")
    first = pools[0] is not None
    main = halves[first]
    pool, pool_relu = pools[0] or pools[1] or (None, False)
    assert pool is not None
    if not relus:
        last = main.only()
        if last is None or last.name != "relu":
            raise NearMiss(1, "no ReLU follows the last convolution")
        operations.append(last)
        main = last.arguments["self"]
    shortcut = pool.arguments["self"]
    if not isinstance(main, Wire) or not isinstance(shortcut, Wire):
        raise NearMiss(1, "its last part is not made of whole channels")
    return (
        main,
        shortcut,
        operations,
        {
            "stride": 2,
            "end": "a concatenation",
            "shortcut_first": first,
            "shortcut_relu": bool(relus) or pool_relu,
            "count_include_pad": pool.arguments["count_include_pad"],
        },
    )


def _pool(half: Wire, operations: list[Operation], *, peel: bool) -> tuple[Operation, bool] | None:
    """The average pool of stride 2 that a part of a concatenation is, and whether a ReLU of its own follows it."""
    pool, own_relu = half.only(), False
    if peel and pool is not None and pool.name == "relu" and isinstance(pool.arguments["self"], Wire):
        inner = pool.arguments["self"].only()
        if inner is not None and inner.name == "avg_pool2d":
            relu, pool, own_relu = pool, inner, True
    if pool is None or pool.name != "avg_pool2d":
        return None
    a = pool.arguments
    size, stride, padding = pair(a["kernel_size"]), pair(a["stride"] or a["kernel_size"]), pair(a["padding"])
    if (size, stride, padding) != ((3, 3), (2, 2), (1, 1)) or a["ceil_mode"] or a["divisor_override"] is not None:
        raise NearMiss(1, "its average pool is not 3x3 with stride 2, padding 1, floor mode and the usual divisor")
    operations += [relu, pool] if own_relu else [pool]
    return pool, own_relu


def _is_normed_convolution(wire: Wire) -> bool:
    operation = wire.only()
    return operation is not None and operation.name in ("conv2d", "batch_norm")


def _reaches(wire: Wire, target: Wire) -> bool:
    """Whether ``target`` is computed from ``wire``."""
    start, seen = {id(source) for source, _ in wire.runs}, set[int]()
    stack = [source for source, _ in target.runs]
    while stack:
        operation = stack.pop()
        if id(operation) in start:
            return True
        if id(operation) not in seen:
            seen.add(id(operation))
            stack += [source for w in operation.wires() if w is not None for source, _ in w.runs]
    return False


def _whole(wire: Any, depth: int, what: str) -> tuple[Operation, list[int]]:
    whole = wire.whole() if isinstance(wire, Wire) else None
    if whole is None:
        raise NearMiss(depth, f"{what} is not a permutation of one tensor's channels")
    return whole


def _past_relu(at: tuple[Operation, list[int]], operations: list[Operation]) -> Wire:
    """What a ReLU reads, in the order in which its result is read; the result itself where it is no ReLU."""
    operation, order = at
    if operation.name != "relu":
        return Wire(((operation, tuple(order)),))
    operations.append(operation)
    source, before = _whole(operation.arguments["self"], 3, "what a ReLU reads")
    return Wire(((source, tuple(before[channel] for channel in order)),))


def _stage(wire: Wire, operations: list[Operation]) -> tuple[Operation, _NormAt | None, list[int]]:
    """The convolution, with or without a norm, that a wire holds, and which of its channels each channel is."""
    operation, order = _whole(wire, 2, "what is behind a convolution")
    norm: _NormAt | None = None
    if operation.name == "batch_norm":
        operations.append(operation)
        if operation.arguments["training"]:
            raise NearMiss(3, "a batch norm has no running statistics")
        source, before = _whole(operation.arguments["input"], 3, "what a batch norm reads")
        norm = operation, before
        operation, order = source, [before[channel] for channel in order]
    if operation.name != "conv2d":
        raise NearMiss(3, f"{operation.name} stands where a convolution, or its batch norm, was expected")
    operations.append(operation)
    return operation, norm, order


def _depthwise_stride(conv: Operation) -> int:
    weight = conv.arguments["weight"]
    size, stride, padding, dilation = square(conv)
    depthwise = isinstance(weight, Parameter) and conv.arguments["groups"] == conv.channels == weight.shape[0]
    if not depthwise or weight.shape[1] != 1:
        raise NearMiss(4, "the second convolution is not depthwise")
    if (size, padding, dilation) != (3, 1, 1) or stride not in (1, 2):
        geometry = f"kernel_size {size}, stride {stride}, padding {padding}, dilation {dilation}"
        raise NearMiss(4, f"the depthwise convolution has {geometry}, expected 3, 1 or 2, 1, 1")
    return stride


def square(conv: Operation) -> tuple[int, int, int, int]:
    """Kernel size, stride, padding and dilation of a convolution; -1 for one that differs by direction."""
    weight, a = conv.arguments["weight"], conv.arguments
    if not isinstance(weight, Parameter) or len(weight.shape) != 4:
        raise NearMiss(3, "a convolution's weight is not a parameter or buffer")
    padding = a["padding"]
    if isinstance(padding, str):
        same = [(size - 1) * d // 2 for size, d in zip(weight.shape[2:], pair(a["dilation"]), strict=True)]
        padding = same if padding == "same" else [0, 0]
    pairs = [weight.shape[2:], pair(a["stride"]), pair(padding), pair(a["dilation"])]
    size, stride, padding, dilation = (pair[0] if pair[0] == pair[1] else -1 for pair in pairs)
    return size, stride, padding, 1 if size == 1 else dilation


def pair(value: Any) -> tuple[int, ...]:
    """One number for both directions, or one for each, as two."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * 2 if len(values) == 1 else values


def named(conv: Operation, norm: _NormAt | None, what: str) -> tuple[str, str | None, Norm | None]:
    """The names of a convolution's weight and bias, and its norm. NearMiss for tensors that have none."""

    def name(value: Any) -> str | None:
        if value is None:
            return None
        if not isinstance(value, Parameter):
            raise NearMiss(5, f"{what}, or its norm, has a tensor that is not a parameter or buffer")
        return value.name

    weight = name(conv.arguments["weight"])
    assert weight is not None
    if norm is None:
        return weight, name(conv.arguments["bias"]), None
    a = norm[0].arguments
    mean, var = name(a["running_mean"]), name(a["running_var"])
    if mean is None or var is None:
        raise NearMiss(5, "a batch norm has no running statistics")
    return weight, name(conv.arguments["bias"]), Norm(name(a["weight"]), name(a["bias"]), mean, var, a["eps"])


def _shuffle_groups(order: Order) -> int:
    """The groups of the shuffle that an order of channels is: see reference.shuffle_channels."""
    mid = len(order)
    for groups in range(1, mid + 1):
        if mid % groups == 0 and all(
            source == c % groups * (mid // groups) + c // groups for c, source in enumerate(order)
        ):
            return groups
    raise NearMiss(5, "between its first and last convolution the channels are in an order that is no shuffle")


def _expect_in_order(order: list[int], what: str) -> None:
    if order != sorted(order):
        raise NearMiss(2, f"{what} is shuffled")


def _none_if_same(order: list[int]) -> Order | None:
    return None if order == sorted(order) else tuple(order)


def _inverse(norm: _NormAt | None) -> list[int] | None:
    """Which channel of the norm each channel of its convolution goes to."""
    if norm is None:
        return None
    inverse = [0] * len(norm[1])
    for channel, source in enumerate(norm[1]):
        inverse[source] = channel
    return inverse


def _composed(inverse: list[int] | None, order: list[int] | None) -> Order | None:
    if inverse is None:
        return None
    return _none_if_same(inverse if order is None else [inverse[channel] for channel in order])
