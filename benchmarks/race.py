"""Times contenders in turn, round by round, so that a change of the machine's speed meets all of them."""

import copy
import time
from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import median, quantiles
from typing import Any

import shufflenet_ext._C as _C
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import EAGER, OURS, Contender, eager_in

_LONG_S = 0.1  # a call of this length needs no warming up
_WARM_S = 10e-3  # of calls before one is timed: the first ones after a pause, or after others' work, are slower
_MAX_SETTLE_S = 0.2
# Longer than a tick of the scheduler, by which some systems count a process's time (4 ms).
_IDLE_S = 10e-3
# How far outputs may differ, relative to the largest: peers round intermediate results where ours does not.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 50
_PROFILED_CALLS = 51


@dataclass
class Timing:
    """Seconds a call and the ratio to ours in the same round: median and quartiles over the rounds."""

    median: float
    q1: float
    q3: float
    ratio: float
    ratio_q1: float
    ratio_q3: float


@dataclass
class Row:
    """One shape's results. ``flop`` counts the convolutions and linear layers; ``traffic`` the bytes of input, output
    and weights, which every kernel has to move; ``errors`` are the largest ones against float64, relative to the
    largest output; ``outside`` is the share of a call of ours that is spent in none of its steps, where that was
    measured."""

    suite: str
    label: str
    groups: int
    batch: int
    flop: int
    traffic: int
    copy_bandwidth: float  # that of a copy with as much traffic
    rounds: int = 0
    timings: dict[str, Timing] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    precision: str = "float32"
    threads: int = 1
    errors: dict[str, float] = field(default_factory=dict)
    outside: float | None = None


def best_peer(row: Row) -> str:
    """The peer with the smallest ratio to ours."""
    return min((name for name in row.timings if not name.startswith(OURS)), key=lambda name: row.timings[name].ratio)


def work(plain: nn.Module, x: Tensor) -> tuple[int, int]:
    """A row's ``flop`` and ``traffic``."""
    with FlopCounterMode(display=False) as counter:
        y = plain(x)
    return counter.get_total_flops(), sum(tensor.nbytes for tensor in (x, y, *plain.parameters()))


def check(contenders: dict[str, Contender], expected: Tensor, tolerance: float, source: str) -> dict[str, float]:
    """How far each contender's output is at most from the ``expected`` one, relative to the largest output.

    Raises AssertionError, which names the contender and ``source``, where ``expected`` is from, if one is more than
    ``tolerance``.
    """
    largest = expected.abs().max().item()
    errors = {name: (run() - expected).abs().max().item() / largest for name, run in contenders.items()}
    for name, error in errors.items():
        assert error <= tolerance, f"{name} differs from {source} by {error:.3g} of the largest, more than {tolerance}"
    return errors


@lru_cache(maxsize=1)
def exact(module: nn.Module, x: Tensor) -> Tensor:
    """The module's output in float64. It is kept for the next row, which often has the same module and input."""
    result: Tensor = copy.deepcopy(module).double()(x.double())
    return result


def outside_of_steps(run: Contender) -> float:
    """The share of a call of ours in which its calling thread is in none of the steps: Python, dispatch, the start."""
    shares = []
    for _ in range(_PROFILED_CALLS):
        _C.start_profile()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        shares.append(1 - sum(_C.finish_profile()) / seconds)
    return median(shares)


def settle_and_warm(run: Contender, warm_s: float = _WARM_S) -> None:
    """Waits until the last contender's threads have stopped spinning, then calls the next one for ``warm_s``.

    Thread pools spin for milliseconds after a call (ONNX Runtime's for about 25) and would take processors away.
    """
    deadline = time.perf_counter() + _MAX_SETTLE_S
    while time.perf_counter() < deadline:
        before = time.process_time()
        time.sleep(_IDLE_S)
        if time.process_time() - before < 0.1 * _IDLE_S:
            break
    deadline = time.perf_counter() + warm_s
    while time.perf_counter() < deadline:
        run()


def timed(run: Contender, warm_s: float = _WARM_S) -> float:
    """Seconds of one call, as pytest-benchmark takes ours."""
    settle_and_warm(run, warm_s)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def timings_of(samples: dict[str, list[float]], base: str) -> dict[str, Timing]:
    """Sums up each contender's seconds of each round; ratios are to the contender named ``base``."""
    timings = {}
    for name, times in samples.items():
        q1, middle, q3 = quantiles(times, method="inclusive")
        ratios = [t / base_time for t, base_time in zip(times, samples[base], strict=True)]
        ratio_q1, ratio, ratio_q3 = quantiles(ratios, method="inclusive")
        values = (middle, q1, q3, ratio, ratio_q1, ratio_q3)
        timings[name] = Timing(*(float(f"{value:.4g}") for value in values))
    return timings


def race(
    benchmark: Any,
    contenders: dict[str, Contender],
    plain: nn.Module,
    x: Tensor,
    dtype: torch.dtype,
    row: Row,
    seconds: float,
) -> None:
    """Compares all contenders' outputs, times them for about ``seconds`` and fills in ``row``.

    pytest-benchmark records ours. Raises AssertionError where outputs differ.
    """
    with_eager = contenders if EAGER in contenders else contenders | {EAGER: eager_in(dtype, plain, x)}
    row.errors = check(with_eager, exact(plain, x), _TOLERANCES[dtype], "float64")
    start = time.perf_counter()
    fastest = min(timed(run) for run in contenders.values())
    warm_s = _WARM_S if fastest < _LONG_S else 0
    row.rounds = min(_MOST_ROUNDS, max(_LEAST_ROUNDS, int(seconds / (time.perf_counter() - start))))
    others = {name: run for name, run in contenders.items() if name != OURS}
    samples: dict[str, list[float]] = {name: [] for name in others}

    # Each round starts with another peer, so that none, nor ours, always comes behind the same one: a pool's idle
    # threads can leave the scheduler with two busy threads on one core for some milliseconds.
    order = deque(others)

    def others_then_warm() -> None:
        for name in order:
            samples[name].append(timed(others[name], warm_s))
        order.rotate(-1)
        settle_and_warm(contenders[OURS], warm_s)

    benchmark.pedantic(contenders[OURS], setup=others_then_warm, rounds=row.rounds)
    ours = list(benchmark.stats.stats.data)
    row.timings = timings_of({OURS: ours} | samples, OURS)
    benchmark.extra_info.update({name: timing.median for name, timing in row.timings.items()})
