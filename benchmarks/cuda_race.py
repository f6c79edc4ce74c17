"""The rows of ``make bench-cuda``: what is measured, against whom, and how.

What touches the device is :class:`EventClock` and :func:`graphed`; both are handed in, so that the rest runs anywhere.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Protocol

import torch
from torch import Tensor, nn

import shufflenet_ext as se
from benchmarks import peers
from benchmarks.cuda_model import BATCHES, Model
from benchmarks.cuda_toolkit import LAYOUTS
from benchmarks.cuda_units import GROUPS, Unit
from benchmarks.peers import FOLDED, OURS, OURS_CHANNELS_LAST, Builder, Contender, eager, eager_channels_last
from benchmarks.race import Row, check, timings_of, work
from benchmarks.shapes import IMAGE_SIZE, NetworkShape, UnitShape, with_statistics

OURS_GRAPH = "ours graph"
OURS_CHANNELS_LAST_GRAPH = "ours channels_last graph"
MAX_AUTOTUNE = "torch.compile max-autotune"
COPY = "copy"
UNITS, ALL_UNITS, NETWORKS = "units", "network's units", "networks"
_ROUNDS = 50
_COPIED_BYTES = 2**29  # beyond every card's L2 cache
_FLUSHED_BYTES = 2**28  # beyond every card's L2 cache, too

# Returns the seconds of one call.
Clock = Callable[[Contender], float]
Wrapper = Callable[[Contender], Contender]


@dataclass(frozen=True)
class Precision:
    """A dtype, and whether float32 may be multiplied as TF32. ``tolerance`` is how far results of contenders may be
    apart, relative to the largest: peers round intermediate results where the fused unit does not."""

    name: str
    dtype: torch.dtype
    allow_tf32: bool
    tolerance: float

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Sets the switches that PyTorch's own convolutions and products obey, and the fused units with them."""
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.allow_tf32
        try:
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=self.allow_tf32):
                yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


PRECISIONS = (
    Precision("float16", torch.float16, False, 1e-2),
    Precision("bfloat16", torch.bfloat16, False, 5e-2),
    Precision("tfloat32", torch.float32, True, 1e-2),
    Precision("float32", torch.float32, False, 1e-4),
)


class Shape(Protocol):
    @property
    def groups(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def label(self) -> str: ...
    def build(self) -> tuple[nn.Module, Tensor]: ...


@dataclass(frozen=True)
class AllUnits:
    """The units of the paper's network, one behind the other, without stem and head."""

    groups: int
    batch: int
    label = "16 units"

    def build(self) -> tuple[nn.Module, Tensor]:
        network = se.models.shufflenet_v1(self.groups)
        units = nn.Sequential(*network.layer1, *network.layer2, *network.layer3)
        size = IMAGE_SIZE // 4
        return with_statistics(units), torch.randn(self.batch, network.conv1.out_channels, size, size)


def shapes(batches: tuple[int, ...] = BATCHES) -> Iterator[tuple[str, Shape]]:
    """Yields each suite's name with a shape that it measures."""
    for stage, stride, batch in product((2, 3, 4), (2, 1), batches):
        yield UNITS, UnitShape(GROUPS, stage, stride, batch)
    for batch in batches:
        yield ALL_UNITS, AllUnits(GROUPS, batch)
    for batch in batches:
        yield NETWORKS, NetworkShape(GROUPS, batch)


# ---- The device -----------------------------------------------------------------------------------------------------


class EventClock:
    """Times a call by CUDA events, after a read that clears the L2 cache of the call's data.

    The read takes so long that a few launches are queued behind it meanwhile, and are not waited for. A write would
    clear the cache too, but leave it full of what is still to be written to memory, in the time of the call.
    """

    def __init__(self) -> None:
        self._flushed = torch.zeros(_FLUSHED_BYTES // 4, device="cuda")

    def __call__(self, run: Contender) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.sum()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def graphed(run: Contender) -> Contender:
    """Records a call as a CUDA graph, and returns what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def copy_of(traffic: int, device: str) -> Contender:
    """A copy in the device's memory that reads and writes so many bytes together."""
    source = torch.zeros(traffic // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copy_bandwidth(clock: Clock, device: str, traffic: int = _COPIED_BYTES) -> float:
    """Bytes a second, read and written, of a copy in the device's memory: the best of the rounds."""
    copy_all = copy_of(traffic, device)
    return traffic / min(clock(copy_all) for _ in range(_ROUNDS))


# ---- Contenders -----------------------------------------------------------------------------------------------------


def max_autotune(module: nn.Module, x: Tensor) -> Contender:
    """torch.compile at its best: with its own CUDA graphs, and in channels_last, which spares it conversions."""
    copied = copy.deepcopy(module).to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]
    return peers.compiled(copied, peers.channels_last(x), mode="max-autotune")


def builders(graph: Wrapper) -> dict[str, Builder]:
    """The peers. Those that are not compiled are also run as a CUDA graph, as ours is."""
    return {
        "eager": lambda plain, folded, x: eager(plain, x),
        "eager channels_last": lambda plain, folded, x: eager_channels_last(plain, x),
        FOLDED: lambda plain, folded, x: eager(folded, x),
        "folded channels_last": lambda plain, folded, x: eager_channels_last(folded, x),
        "folded graph": lambda plain, folded, x: graph(eager(folded, x)),
        "folded channels_last graph": lambda plain, folded, x: graph(eager_channels_last(folded, x)),
        MAX_AUTOTUNE: lambda plain, folded, x: max_autotune(folded, x),
    }


def ours(module: nn.Module, x: Tensor, graph: Wrapper) -> dict[str, Contender]:
    """This package, optimized for inference, in both memory formats, each called directly and as a CUDA graph."""
    run, run_last = eager(module, x), eager(module, peers.channels_last(x))
    return {OURS: run, OURS_CHANNELS_LAST: run_last, OURS_GRAPH: graph(run), OURS_CHANNELS_LAST_GRAPH: graph(run_last)}


# ---- Rows -----------------------------------------------------------------------------------------------------------


@dataclass
class CudaRow(Row):
    """A row on CUDA. ``traffic`` counts the units alone, also in a network: the input, result and parameters of each,
    once. ``copied`` has the seconds of a copy of as many bytes, timed in the same rounds. ``predicted`` has the model's
    seconds of the units for each layout, where there is a model for the card."""

    copied: float = 0
    predicted: dict[str, float] | None = None

    @property
    def floor(self) -> float:
        """Seconds that memory alone needs."""
        return self.traffic / self.copy_bandwidth

    def over_copy(self, name: str) -> float:
        return self.timings[name].median / self.copied


def units_of(module: nn.Module, x: Tensor) -> list[Unit]:
    """The units that a call of ``module`` runs, in order."""
    found: list[Unit] = []
    inside = [unit for unit in module.modules() if isinstance(unit, se.ShuffleBottleneck)]
    hooks = [unit.register_forward_pre_hook(lambda unit, args: found.append(Unit.of(unit, *args))) for unit in inside]
    module(x)
    for hook in hooks:
        hook.remove()
    return found


@dataclass(frozen=True)
class Track:
    """The device that a race runs on, and what times it. Without a model there is no prediction."""

    device: str
    clock: Clock
    graph: Wrapper
    builders: Mapping[str, Builder]
    bandwidth: float
    model: Model | None = None
    sm: int = 0
    rounds: int = _ROUNDS

    def predict(self, units: list[Unit], precision: Precision) -> dict[str, float] | None:
        if self.model is None:
            return None
        return {
            layout: sum(p.time for p in self.model.predict(units, precision.name, layout, self.sm))
            for layout in LAYOUTS
        }

    def measure(self, suite: str, shape: Shape, precision: Precision) -> CudaRow:
        """Measures a row: compares outputs, then times rounds. Raises AssertionError where outputs differ."""
        torch.manual_seed(0)
        module, x = shape.build()
        x = x.to(self.device, precision.dtype)
        # For all of them batch norm is folded in float32, before the weights are rounded.
        plain, folded, optimized = (
            made.to(self.device, precision.dtype)
            for made in (peers.plain_copy(module), peers.folded_copy(module), se.optimize_for_inference(module))
        )
        with precision.in_force(), torch.no_grad(), se.use_backend("native"):
            units = units_of(plain, x)
            built, absent = peers.build(self.builders, plain, folded, x)
            contenders = ours(optimized, x, self.graph) | built
            check(contenders, contenders[OURS]().clone(), precision.tolerance, OURS)
            traffic = x.element_size() * sum(unit.elements for unit in units)
            # As a graph, like ours: its launch is in both times.
            samples = self._rounds(contenders | {COPY: self.graph(copy_of(traffic, self.device))})
            copied = median(samples.pop(COPY))
            flop = work(folded, x)[0]
        torch.compiler.reset()  # otherwise each row's module counts towards the limit of recompilations
        return CudaRow(
            suite,
            shape.label,
            shape.groups,
            shape.batch,
            flop,
            traffic,
            self.bandwidth,
            rounds=self.rounds,
            timings=timings_of(samples, OURS_CHANNELS_LAST_GRAPH),
            absent=absent,
            precision=precision.name,
            copied=copied,
            predicted=self.predict(units, precision),
        )

    def _rounds(self, contenders: dict[str, Contender]) -> dict[str, list[float]]:
        """Times all in turn. Each round starts with another, so that none always comes behind the same one."""
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        order = deque(contenders)
        for run in contenders.values():
            self.clock(run)
        for _ in range(self.rounds):
            for name in order:
                samples[name].append(self.clock(contenders[name]))
            order.rotate(-1)
        return samples
