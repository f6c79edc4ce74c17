"""Recognises what stands around the units of a whole model: chains of them, a stem ahead, a head behind."""

from dataclasses import dataclass

from shufflenet_ext._graph import Graph, Operation, Parameter, Wire
from shufflenet_ext._match import Found, NearMiss, Stage, named, pair, square, unit_at
from shufflenet_ext._program import StepKind

_MOST_STEM_SIZE = 11  # of a kernel; csrc/network.h


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
    """Units one behind the other, with or without a stem and a head."""

    units: list[Found]
    input: Wire
    end: Wire
    operations: list[Operation]
    stem: Stem | None = None
    head: Head | None = None


def chains_of(graph: Graph) -> list[Chain]:
    """The chains of units of a graph, in their order."""
    readers = _Readers(graph)
    found: dict[Wire, Found] = {}  # by the wires that they end in
    for wire in readers.wires:
        if any(source.name in ("relu", "avg_pool2d") for source, _ in wire.runs):
            try:
                unit = unit_at(wire)
            except NearMiss:
                continue
            if readers.are_all_inside(unit.operations, wire):
                found[wire] = unit
    behind = {unit.input: (end, unit) for end, unit in found.items()}
    chains = []
    for unit in found.values():
        before = found.get(unit.input)
        if before is not None and readers.are_all_inside(
            [*before.operations, *unit.operations], None, before.operations
        ):
            continue  # not the first of its chain
        units, operations = [unit], list(unit.operations)
        end = next(wire for wire, other in found.items() if other is unit)
        while end in behind and readers.are_all_inside([*operations, *behind[end][1].operations], None, operations):
            end, unit = behind[end]
            units.append(unit)
            operations += unit.operations
        chain = Chain(units, units[0].input, end, operations)
        _add_stem(chain, readers)
        _add_head(chain, readers, graph)
        chains.append(chain)
    return chains


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

    def are_all_inside(self, inside: list[Operation], end: Wire | None, of: list[Operation] | None = None) -> bool:
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
        stage = Stage(*named(at, norm, "the stem"))
    except NearMiss:
        return None
    if not (1 <= size <= _MOST_STEM_SIZE and stride in (1, 2) and 0 <= padding < size and dilation == 1):
        return None
    if not isinstance(source, Wire):
        return None
    return Stem(stage, at.channels, size, stride, padding, max_pool, relu), source, operations


def _add_stem(chain: Chain, readers: _Readers) -> None:
    found = stem_at(chain.input)
    if found is not None and readers.are_all_inside([*found[2], *chain.operations], chain.end, found[2]):
        chain.stem, chain.input, operations = found
        chain.operations += operations


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
