"""explain() of what optimize_for_inference makes. It says how each step of a call runs, and how long it takes."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shufflenet_ext import _native

_WARM_UP_CALLS, _CALLS = 3, 21


@dataclass(frozen=True)
class Run:
    """How some images of a batch go through a step."""

    images: int
    shared: bool  # whether all threads work on one image; else each thread has images of its own
    cut: str  # the pieces that the work on an image is cut into
    tiles: tuple[tuple[int, int], ...]  # the largest tile of each 1×1 convolution: channels, and vectors of pixels
    buffer_bytes: int  # memory that a thread works in, beside weights, input and result


@dataclass(frozen=True)
class Step:
    """A step of a call on a batch."""

    name: str
    input: tuple[int, ...]
    output: tuple[int, ...]
    flop: int  # what torch.utils.flop_counter counts for convolutions and linear layers: two for a multiply-add
    weight_bytes: int  # those of weights and biases
    runs: tuple[Run, ...]
    microseconds: float  # on the thread that works longest; the median of some calls
    gflop_per_second: float
    share_of_peak: float


@dataclass(frozen=True)
class Explanation:
    """How a call runs, step by step. Prints as a table; ``dataclasses.asdict`` makes a dict of it."""

    part: str  # the part's name in the model; "" for the model itself
    shape: tuple[int, ...]  # that of the input
    dtype: str
    layout: str  # "contiguous" or "channels_last"
    isa: str
    threads: int
    peak_gflop_per_second: float  # the most that the threads do, measured by multiply-adds on registers
    call_microseconds: float  # a whole call, seen from Python; the median
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        images = _joined(
            f"{run.images} {'shared by all threads' if run.shared else 'on one thread each'}"
            for run in self.steps[0].runs
        )
        flop, microseconds = sum(step.flop for step in self.steps), sum(step.microseconds for step in self.steps)
        weight_bytes = sum(step.weight_bytes for step in self.steps)
        rows = [("", "input → output", "MFLOP", "weights", "cut", "tiles", "buffers", "µs", "GFLOP/s", "of peak")]
        rows += [
            (
                step.name,
                f"{_sizes(step.input[1:])} → {_sizes(step.output[1:])}",
                f"{step.flop / 1e6:.2f}",
                _kib(step.weight_bytes),
                _joined(run.cut for run in step.runs),
                _joined(" ".join(map(_sizes, run.tiles)) for run in step.runs),
                _joined(_kib(run.buffer_bytes) for run in step.runs),
                *self._speed(step.flop, step.microseconds),
            )
            for step in self.steps
        ]
        for name, time_taken in (("all steps", microseconds), ("call", self.call_microseconds)):
            speed = self._speed(flop, time_taken)
            rows.append((name, "", f"{flop / 1e6:.2f}", _kib(weight_bytes), "", "", "", *speed))
        title = (
            f"{self.part + ': ' if self.part else ''}{_sizes(self.shape)}, {self.dtype}, {self.layout}; "
            f"threads: {self.threads}, {self.isa}, at most {self.peak_gflop_per_second:.0f} GFLOP/s; images: {images}"
        )
        return "\n".join([title, *_aligned(rows, right={2, 3, 6, 7, 8, 9})])

    __repr__ = __str__

    def _speed(self, flop: int, microseconds: float) -> tuple[str, str, str]:
        if flop == 0:
            return f"{microseconds:.1f}", "", ""
        gflop_per_second = flop / microseconds / 1e3
        share = gflop_per_second / self.peak_gflop_per_second
        return f"{microseconds:.1f}", f"{gflop_per_second:.1f}", f"{share:.0%}"


class Explanations(tuple[Explanation, ...]):
    """The explanations of a model's parts, in the order in which they are called. Prints as their tables."""

    def __str__(self) -> str:
        return "\n\n".join(map(str, self))

    __repr__ = __str__


def _joined(texts: Iterable[str]) -> str:
    return " | ".join(dict.fromkeys(texts))


def _sizes(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))


def _kib(n: int) -> str:
    return f"{n / 1024:.1f} KiB" if n else ""


def _aligned(rows: Sequence[Sequence[str]], right: set[int]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


class _NetworkOp(TorchDispatchMode):
    """Records the arguments that reach the native op, after autocast."""

    arguments: tuple[Tensor, Tensor, list[int]] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.shufflenet_ext.shuffle_network.default:
            self.arguments = args
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def explain_steps(call: Callable[[Tensor], Tensor], x: Tensor, names: Sequence[str]) -> Explanation:
    """Explains a call that is one native op. ``names`` are those of its steps that have none of their own."""
    if isinstance(x, Tensor) and x.device.type != "cpu":
        raise ValueError(
            f"x: got a tensor on {str(x.device)!r}, expected one on 'cpu', whose kernels alone have steps "
            "(shufflenet_ext.explain says how a unit runs on CUDA)"
        )
    with _NetworkOp() as op:
        call(x)  # which also checks x
    if op.arguments is None:
        raise RuntimeError("explain: the call ran the reference, which has no steps; expected it to run the kernels")
    x, weights, program = op.arguments
    if x.shape[0] == 0:
        raise ValueError("x: got a batch of 0, expected at least one image, to take the time of")
    for _ in range(_WARM_UP_CALLS):
        call(x)
    call_times, step_times = [], []
    for _ in range(_CALLS):
        start = time.perf_counter()
        step_times.append(_native.profile(lambda: call(x)))
        call_times.append(time.perf_counter() - start)
    threads = torch.get_num_threads()
    peak = _native.measure_peak(x.dtype) / 1e9
    description = _native.describe(x, weights, program, threads)
    images = description["images"]

    def explained(name: str, step: dict[str, Any], times: tuple[float, ...]) -> Step:
        seconds = statistics.median(times)
        flop = 2 * step["multiply_adds"] * x.shape[0]
        return Step(
            name,
            (x.shape[0], *step["input"]),
            (x.shape[0], *step["output"]),
            flop,
            step["weights_and_biases"] * weights.element_size(),
            tuple(Run(count, how == "shared", **step[how]) for how, count in images.items() if count),
            1e6 * seconds,
            flop / seconds / 1e9,
            flop / seconds / 1e9 / peak,
        )

    times_by_step = zip(*step_times, strict=True)
    own_names = iter(names)
    all_names = [step["name"] or next(own_names) for step in description["steps"]]
    return Explanation(
        "",
        tuple(x.shape),
        str(x.dtype).removeprefix("torch."),
        "channels_last" if _native.is_channels_last(x) else "contiguous",
        str(_native.cpu_isa()),
        threads,
        peak,
        1e6 * statistics.median(call_times),
        tuple(explained(*step) for step in zip(all_names, description["steps"], times_by_step, strict=True)),
    )
