"""Recognises what stands around the units of a whole model: chains of them, a stem ahead, a head behind."""

from collections.abc import Iterator
from dataclasses import dataclass

from shufflenet_ext._checks import MOST_STEM_SIZE
from shufflenet_ext._graph import Graph, Operation, Parameter, Wire
from shufflenet_ext._match import Found, NearMiss, Stage, expect_in_order, named, pair, past_relu, square, stage, whole
from shufflenet_ext._program import StepKind
from shufflenet_ext._units import unit_ending_in


@dataclass(frozen=True)
class Stem:
    """A dense convolution, with or without a norm, its ReLU and a max pool of 3x3 with stride 2."""

    stage: Stage
    out_channels: int
    size: int
    stride: int
    padding: int
    max_pool: bool
    relu: bool

    @property
    def stages(self) -> tuple[Stage]:
        """Its one stage."""
        return (self.stage,)

    @property
    def step(self) -> list[int]:
        """Its step in a program."""
        numbers = self.out_channels, self.size, self.stride, self.padding, int(self.max_pool), int(self.relu)
        return [StepKind.STEM.value, *numbers]


@dataclass(frozen=True)
class LastConvolution:
    """A dense 1x1 convolution behind the units, with or without a norm, and its ReLU."""

    stage: Stage
    out_channels: int

    @property
    def stages(self) -> tuple[Stage]:
        """Its one stage."""
        return (self.stage,)

    @property
    def step(self) -> list[int]:
        """Its step in a program."""
        return [StepKind.LAST_CONVOLUTION.value, self.out_channels]


@dataclass(frozen=True)
class Head:
    """A mean over pixels and a linear layer."""

    weight: str
    bias: str | None
    classes: int
    window: int  # 0: the mean of all pixels; else of the upper left window x window
    exact: bool  # whether the plane must be as large as the window
    whole: bool  # whether the window was the whole plane when the graph was traced

    @property
    def step(self) -> list[int]:
        """Its step in a program."""
        # Where a window must be the whole plane, the captured graph holds for planes of its size alone.
        return [StepKind.HEAD.value, self.classes, 0 if self.whole and self.exact else self.window]


@dataclass
class Chain:
    """Units one behind the other, with or without a stem, and a last convolution and a head."""

    units: list[Found]
    input: Wire
    end: Wire
    operations: list[Operation]
    stem: Stem | None = None
    last: LastConvolution | None = None
    head: Head | None = None


def chains_of(graph: Graph) -> list[Chain]:
    """The chains of units of a graph, in their order."""
    readers = _Readers(graph)
    found = _units(graph, readers)  # by the wires that they end in
    behind = {unit.input: unit for unit in found.values()}
    chains = []
    for first in found.values():
        if first.input in found and behind[first.input] is first:
            continue  # not the first of its line
        line = [first]
        while line[-1].end in behind:
            line.append(behind[line[-1].end])
        for units in _closed(line, readers):
            operations = [operation for unit in units for operation in unit.operations]
            chain = Chain(units, units[0].input, units[-1].end, operations)
            _add_stem(chain, readers)
            chains += _stem_ahead_of_a_pool(chain, readers)
            _add_last_convolution(chain, readers, graph)
            _add_head(chain, readers, graph)
            chains.append(chain)
    order = {id(operation): number for number, operation in enumerate(graph.operations)}
    return sorted(chains, key=lambda chain: min(order[id(operation)] for operation in chain.operations))


def _units(graph: Graph, readers: "_Readers") -> dict[Wire, Found]:
    """All units that end in a wire which something reads whole, and those ahead of them."""
    found: dict[Wire, Found] = {}
    stack = [wire for wire in readers.wires if any(source.name in ("relu", "avg_pool2d") for source, _ in wire.runs)]
    seen = set(stack)
    stack.reverse()
    while stack:
        wire = stack.pop()
        try:
            unit = unit_ending_in(wire, graph)
        except NearMiss:
            continue
        found[wire] = unit
        if unit.input not in seen:  # in v2 nothing reads it but in halves
            seen.add(unit.input)
            stack.append(unit.input)
    return found


def _closed(line: list[Found], readers: "_Readers") -> Iterator[list[Found]]:
    """The longest runs of a line of units of which nothing but the end is read elsewhere; the others are left out."""
    first = 0
    while first < len(line):
        for last in range(len(line), first, -1):
            units = line[first:last]
            operations = [operation for unit in units for operation in unit.operations]
            same = len({type(unit.unit) for unit in units}) == 1
            if same and readers.are_all_inside(operations, units[-1].end):
                yield units
                break
        else:
            last = first + 1
        first = last


class _Readers:
    """Who reads what."""

    def __init__(self, graph: Graph) -> None:
        self.reads: list[tuple[Operation | None, Wire]] = [
            (None, wire) for wire in graph.outputs if isinstance(wire, Wire)
        ]
        for operation in graph.operations:
            self.reads += [(operation, wire) for wire in operation.wires() if wire is not None]
        self.wires = list(dict.fromkeys(wire for _, wire in self.reads))
        self.of: dict[int, list[tuple[Operation | None, Wire]]] = {}
        for reader, wire in self.reads:
            for source in {id(source): source for source, _ in wire.runs}.values():
                self.of.setdefault(id(source), []).append((reader, wire))

    def are_all_inside(self, inside: list[Operation], end: Wire, of: list[Operation] | None = None) -> bool:
        """Whether whoever reads an operation is one of ``inside``, or reads the whole ``end``."""
        names = {id(operation) for operation in inside}
        return all(
            (reader is not None and id(reader) in names) or wire == end
            for operation in (inside if of is None else of)
            for reader, wire in self.of.get(id(operation), [])
        )


def stem_at(end: Wire) -> tuple[Stem, Wire, list[Operation]] | None:
    """The stem whose result a wire holds, what it reads and the operations that it is; None where it is none's."""
    operations: list[Operation] = []
    at = end.only()
    relu = max_pool = False
    while at is not None and at.name in ("relu", "max_pool2d", "max_pool2d_with_indices"):
        a = at.arguments
        if at.name == "relu":
            relu = True
        else:
            usual = (
                pair(a["kernel_size"]),
                pair(a["stride"] or a["kernel_size"]),
                pair(a["padding"]),
                pair(a["dilation"]),
            )
            if max_pool or usual != ((3, 3), (2, 2), (1, 1), (1, 1)) or a["ceil_mode"]:
                return None
            max_pool = True
        operations.append(at)
        at = a["self"].only() if isinstance(a["self"], Wire) else None
    norm = None
    if at is not None and at.name == "batch_norm" and not at.arguments["training"]:
        operations.append(at)
        norm = at, list(range(at.channels))
        at = at.arguments["input"].only() if isinstance(at.arguments["input"], Wire) else None
    if at is None or at.name != "conv2d" or at.arguments["groups"] != 1:
        return None
    operations.append(at)
    source = at.arguments["input"]
    try:
        size, stride, padding, dilation = square(at)
        own = Stage(*named(at, norm, "the stem"))
    except NearMiss:
        return None
    if not (1 <= size <= MOST_STEM_SIZE and stride in (1, 2) and 0 <= padding < size and dilation == 1):
        return None
    if not isinstance(source, Wire):
        return None
    return Stem(own, at.channels, size, stride, padding, max_pool, relu), source, operations


def _add_stem(chain: Chain, readers: _Readers) -> None:
    found = stem_at(chain.input)
    if found is not None and readers.are_all_inside([*found[2], *chain.operations], chain.end, found[2]):
        chain.stem, chain.input, operations = found
        chain.operations += operations


def _stem_ahead_of_a_pool(chain: Chain, readers: _Readers) -> list[Chain]:
    """The stem, a chain by itself, between which and the units is a max pool that no program has; or none."""
    pool = chain.input.only()
    if pool is None or pool.name not in ("max_pool2d", "max_pool2d_with_indices"):
        return []
    end = pool.arguments["self"]
    found = stem_at(end) if isinstance(end, Wire) else None
    if found is None or not readers.are_all_inside(found[2], end):
        return []
    own, source, operations = found
    return [Chain([], source, end, operations, own)]


def _add_last_convolution(chain: Chain, readers: _Readers, graph: Graph) -> None:
    for relu in graph.operations:
        if relu.name != "relu":
            continue
        operations: list[Operation] = []
        try:
            conv, norm, order = stage(past_relu(whole(relu.result, 1, "it"), operations), operations)
            expect_in_order(order, "the last convolution's result")
            same = conv.arguments["input"] == chain.end and conv.arguments["groups"] == 1
            if not same or square(conv) != (1, 1, 0, 1) or (norm is not None and norm[1] != sorted(norm[1])):
                continue
            found = LastConvolution(Stage(*named(conv, norm, "the last convolution")), conv.channels)
        except NearMiss:
            continue
        if readers.are_all_inside([*chain.operations, *operations], relu.result):
            chain.last, chain.end = found, relu.result
            chain.operations = [*chain.operations, *operations]
        return


def _add_head(chain: Chain, readers: _Readers, graph: Graph) -> None:
    for linear in graph.operations:
        if linear.name != "linear" or not isinstance(linear.arguments["input"], Wire):
            continue
        pool = linear.arguments["input"].only()
        if pool is None or pool.arguments.get("self") != chain.end:
            continue
        window = _window(pool)
        weight, bias = linear.arguments["weight"], linear.arguments["bias"]
        if window is None or not isinstance(weight, Parameter) or not isinstance(bias, Parameter | None):
            continue
        operations = [*chain.operations, pool, linear]
        if readers.are_all_inside(operations, linear.result):
            chain.head = Head(weight.name, bias.name if bias else None, weight.shape[0], *window)
            chain.operations = operations
            chain.end = linear.result
        return


def _window(pool: Operation) -> tuple[int, bool, bool] | None:
    """Head's window, exact and whole of a mean over pixels; None for anything else."""
    a = pool.arguments
    if pool.name == "adaptive_avg_pool2d":
        return (0, False, True) if pair(a["output_size"]) == (1, 1) else None
    if pool.name == "mean":
        dims = {dim % 4 for dim in a["dim"] or ()}
        return (0, False, True) if dims == {2, 3} and a.get("dtype") is None else None
    if (
        pool.name != "avg_pool2d"
        or set(pair(a["padding"])) != {0}
        or a["ceil_mode"]
        or a["divisor_override"] is not None
    ):
        return None
    size, stride = pair(a["kernel_size"]), pair(a["stride"] or a["kernel_size"])
    whole = size == a["self"].runs[0][0].shape[2:]
    if size[0] == size[1]:
        return size[0], stride != size, whole
    return (0, False, True) if whole else None
