"""Times contenders against each other, round by round, so that what the machine does meanwhile meets all of them."""

import time
from collections import deque
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import OURS, Contender

_WARM_S = 10e-3  # to the speed of a loop of calls: after a pause, or others' work, the first ones are slower
_MAX_SETTLE_S = 0.2
# Longer than a tick of the scheduler, by which some systems count a process's time (4 ms).
_IDLE_S = 10e-3
_TOLERANCE = 1e-4  # of float32 outputs, relative to the largest


@dataclass
class Timing:
    """Seconds a call, over the rounds; and the median of the rounds' ratios to ours."""

    median: float
    q1: float
    q3: float
    ratio: float


@dataclass
class Row:
    """One shape's results. ``flop`` counts the convolutions and linear layers, ``traffic`` the bytes of input, output
    and weights, which have to be moved whatever the kernel."""

    suite: str
    label: str
    groups: int
    batch: int
    flop: int
    traffic: int
    copy_bandwidth: float  # of a copy with as much traffic
    rounds: int = 0
    timings: dict[str, Timing] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def work(plain: nn.Module, x: Tensor) -> tuple[int, int]:
    """A row's ``flop`` and ``traffic``."""
    with FlopCounterMode(display=False) as counter:
        y = plain(x)
    return counter.get_total_flops(), sum(tensor.nbytes for tensor in (x, y, *plain.parameters()))


def check(contenders: dict[str, Contender], tolerance: float = _TOLERANCE) -> None:
    """AssertionError, naming the contender, unless all give what ours gives, but for ``tolerance`` of the largest."""
    expected = contenders[OURS]().clone()
    limit = tolerance * expected.abs().max().item()
    for name, run in contenders.items():
        difference = (run() - expected).abs().max().item()
        assert difference <= limit, f"{name} differs from ours by {difference:.3g}, more than {limit:.3g}"


def settle_and_warm(run: Contender) -> None:
    """Waits until the last contender's threads have stopped spinning, then calls the next one until it is warm.

    Thread pools spin for milliseconds after a call (ONNX Runtime's for about 25) and would take processors away.
    """
    deadline = time.perf_counter() + _MAX_SETTLE_S
    while time.perf_counter() < deadline:
        before = time.process_time()
        time.sleep(_IDLE_S)
        if time.process_time() - before < 0.1 * _IDLE_S:
            break
    deadline = time.perf_counter() + _WARM_S
    while True:
        run()
        if time.perf_counter() > deadline:
            return


def timed(run: Contender) -> float:
    """Seconds of one call, as pytest-benchmark takes ours."""
    settle_and_warm(run)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def timings_of(samples: dict[str, list[float]], base: str) -> dict[str, Timing]:
    """What the rounds say of each contender, by its seconds of each; ratios are to the contender named ``base``."""
    timings = {}
    for name, times in samples.items():
        q1, middle, q3 = quantiles(times, method="inclusive")
        ratio = median(t / base_time for t, base_time in zip(times, samples[base], strict=True))
        timings[name] = Timing(*(float(f"{value:.4g}") for value in (middle, q1, q3, ratio)))
    return timings


def race(benchmark: Any, contenders: dict[str, Contender], row: Row, seconds: float) -> None:
    """Times all contenders for about ``seconds`` and fills in ``row``; pytest-benchmark records ours."""
    check(contenders)
    start = time.perf_counter()
    for run in contenders.values():
        timed(run)
    row.rounds = min(50, max(7, int(seconds / (time.perf_counter() - start))))
    others = {name: run for name, run in contenders.items() if name != OURS}
    samples: dict[str, list[float]] = {name: [] for name in others}

    # Each round starts with another peer, so that none, nor ours, always comes behind the same one: a pool's idle
    # threads can leave the scheduler with two busy threads on one core for some milliseconds.
    order = deque(others)

    def others_then_warm() -> None:
        for name in order:
            samples[name].append(timed(others[name]))
        order.rotate(-1)
        settle_and_warm(contenders[OURS])

    benchmark.pedantic(contenders[OURS], setup=others_then_warm, rounds=row.rounds)
    ours = list(benchmark.stats.stats.data)
    row.timings = timings_of({OURS: ours} | samples, OURS)
    benchmark.extra_info.update({name: timing.median for name, timing in row.timings.items()})
