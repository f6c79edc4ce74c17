"""Times training steps: ``python -m benchmarks.training``, from the repository's root.

A step is the forward and the backward pass of units or of a whole network, in turn by the native passes, by eager
PyTorch in both memory formats and by torch.compile, all on copies with the same parameters. The gradient of the first
one, which depends on all others, is compared with float64's before anything is timed. In bfloat16, under autocast,
there are ours and eager PyTorch's. One unit's passes are timed one by one. Memory is that of a second step, each
contender in a process of its own: by how much the resident set grows at its peak, and what autograd keeps between the
two passes, the parameters and the input aside. Writes results/training.md.
"""

import argparse
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import shufflenet_ext as se
from benchmarks import machine, memory, peaks
from benchmarks.peers import plain_copy
from benchmarks.race import settle_and_warm, timings_of
from shufflenet_ext._backend import Backend

_TABLE = Path(__file__).parent / "results" / "training.md"
_OURS, _EAGER, _CHANNELS_LAST, _COMPILED = "ours", "eager", "eager channels_last", "torch.compile"
_WITH_MEMORY = ("3 units of stage 2, g=3", "ShuffleNet 1x, g=3, 224²")


@dataclass(frozen=True)
class Shape:
    label: str
    build: Callable[[], nn.Module]
    x: tuple[int, int, int, int]


def _units(channels: int, groups: int, count: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(se.FusedShuffleBottleneck(channels, channels, 1, groups) for _ in range(count)))


def _stem() -> nn.Module:
    layers = nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    fused = se.fuse(nn.Sequential(nn.Sequential(*layers), se.FusedShuffleBottleneck(24, 24, 1, 3)))
    return fused[0]  # type: ignore[index]  # a Sequential


SHAPES = [
    Shape("the stem, 224²", _stem, (16, 3, 224, 224)),
    Shape("3 units of stage 2, g=3", _units(240, 3, 3), (16, 240, 28, 28)),
    Shape("3 units of stage 3, g=3", _units(480, 3, 3), (16, 480, 14, 14)),
    Shape("3 units of stage 4, g=3", _units(960, 3, 3), (16, 960, 7, 7)),
    Shape("3 units of stage 2, g=1", _units(144, 1, 3), (16, 144, 28, 28)),
    Shape("3 units of stage 2, g=8", _units(384, 8, 3), (16, 384, 28, 28)),
    Shape("ShuffleNet 1x, g=3, 224²", lambda: se.models.shufflenet_v1(groups=3), (16, 3, 224, 224)),
    Shape("ShuffleNetG3, 32²", se.models.ShuffleNetG3, (64, 3, 32, 32)),
]


class Step:
    """A training step, which returns the gradient of the first parameter. That of an image is not computed."""

    def __init__(
        self,
        model: nn.Module,
        run: Callable[[Tensor], Tensor],
        x: Tensor,
        dtype: torch.dtype,
        backend: Backend = "reference",
    ) -> None:
        is_image = x.shape[1] == 3
        self.run, self.dtype, self.backend = run, dtype, backend
        self.x = x.clone(memory_format=torch.preserve_format).requires_grad_(not is_image)
        self.wanted = [*model.parameters(), *([] if is_image else [self.x])]
        self.gradient: Tensor | None = None

    @property
    def inputs(self) -> list[Tensor]:
        return [self.x, *self.wanted]

    def __call__(self) -> Tensor:
        autocast = torch.autocast("cpu", torch.bfloat16) if self.dtype == torch.bfloat16 else nullcontext()
        with se.use_backend(self.backend), autocast:  # that of a network's own stem, which eager copies have as well
            result = self.run(self.x)
        if self.gradient is None:
            self.gradient = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(result)
        return torch.autograd.grad(result, self.wanted, self.gradient)[0]


def contenders(shape: Shape, dtype: torch.dtype, only: str | None = None) -> dict[str, Step]:
    """All of them, or one, for a training step of a shape."""
    torch.manual_seed(0)
    model = shape.build().train()
    x = torch.randn(shape.x).relu_()

    def step(name: str) -> Step:
        if name == _OURS:
            return Step(model, model, x, dtype, "native")
        plain: nn.Module = plain_copy(model)
        if name == _CHANNELS_LAST:
            plain = plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            return Step(plain, plain, x.to(memory_format=torch.channels_last), dtype)
        return Step(plain, torch.compile(plain) if name == _COMPILED else plain, x, dtype)

    compiled = [_COMPILED] if dtype == torch.float32 else []
    names = [_OURS, _EAGER, _CHANNELS_LAST, *compiled]
    return {name: step(name) for name in names if only in (None, name)}


@cache  # for both dtypes
def _exact_gradient(shape: Shape) -> Tensor:
    """What all contenders' steps return, by eager PyTorch in float64."""
    torch.manual_seed(0)
    model = plain_copy(shape.build().train())
    x = torch.randn(shape.x).relu_()
    model = model.double()
    return Step(model, model, x.double(), torch.float64)()


def _check(steps: dict[str, Step], exact: Tensor) -> None:
    """Fails where a contender's gradient is further from the exact one than eager PyTorch's in its dtype, times 3.

    A ReLU that rounding opens or closes shows as well: eager PyTorch's two formats are up to 4 % apart in float32.
    """
    size = exact.square().mean().sqrt()
    errors = {name: ((step().double() - exact).square().mean().sqrt() / size).item() for name, step in steps.items()}
    for name, error in errors.items():
        most = 3 * errors[_EAGER] + 0.1
        assert error <= most, f"{name}'s gradient has an error of {error:.3g} of its size, over {most:.3g}"


def race(steps: dict[str, Step], rounds: int) -> dict[str, Any]:
    samples: dict[str, list[float]] = defaultdict(list)
    names = list(steps)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            settle_and_warm(steps[name], 0)
            start = time.perf_counter()
            steps[name]()
            samples[name].append(time.perf_counter() - start)
    return timings_of(samples, _OURS)


def kept_bytes(step: Step, inputs: Iterable[Tensor]) -> int:
    """What autograd keeps for the backward pass of a step, its inputs aside."""
    storages = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    return sum(size for at, size in storages.items() if at not in given)


def print_memory(shape: Shape, name: str) -> None:
    """Prints a contender's growth and what it keeps, in bytes."""
    step = contenders(shape, torch.float32, only=name)[name]
    step()
    print(memory.growth(step), kept_bytes(step, step.inputs))


def memory_table(shape: Shape, threads: int) -> list[str]:
    lines = ["| | peak of a step, MB | kept, MB |", "|---|--:|--:|"]
    for name in (_OURS, _EAGER, _CHANNELS_LAST, _COMPILED):
        command = [sys.executable, "-m", "benchmarks.training", "--threads", str(threads), "--memory", name]
        done = subprocess.run([*command, "--only", shape.label], capture_output=True, text=True, check=True)
        peak, kept = (int(count) / 1e6 for count in done.stdout.split()[-2:])
        lines.append(f"| {name} | {peak:.0f} | {kept:.0f} |")
    return lines


_PASSES_OF = "shuffle_bottleneck_training: "  # how the names of a unit's passes begin in PyTorch's profiler


class Pass(NamedTuple):
    """What a pass moves and computes at least: bytes of the tensors that it reads and writes, FLOPs of its products."""

    bytes: int
    flop: int


def passes_of(x: tuple[int, int, int, int], mid: int, groups: int) -> dict[str, Pass]:
    """The passes of a unit of stride 1 on an input of this shape, in float32."""
    n, channels, height, width = x
    outer, inner = n * channels * height * width, n * mid * height * width
    conv, square, taps = 2 * inner * channels // groups, 2 * inner * mid // groups, 18 * inner
    return {
        "conv1": Pass(4 * (outer + inner), conv),
        "conv2": Pass(8 * inner, taps),
        "covariance": Pass(4 * inner, square),
        "conv3": Pass(4 * (2 * outer + inner), conv),
        "gradient of conv3's weight": Pass(4 * (3 * outer + inner), conv),
        "gradient of conv3": Pass(4 * (outer + 2 * inner), conv + square),
        "gradient of conv2": Pass(12 * inner, 2 * taps),
        "gradient of bn1": Pass(12 * inner, 0),
        "gradient of conv1's weight": Pass(4 * (outer + inner), conv),
        "gradient of conv1": Pass(4 * (2 * outer + inner), conv),
    }


def profile(shape: Shape, repeats: int) -> list[str]:
    """A table of the passes of one unit's step."""
    step = contenders(shape, torch.float32)[_OURS]
    unit: Any = next(module for module in shape.build().modules() if isinstance(module, se.FusedShuffleBottleneck))
    expected = passes_of(shape.x, unit.conv1.out_channels, unit.groups)
    step()
    milliseconds, totals = defaultdict(list), []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        totals.append((time.perf_counter() - start) * 1e3)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            step()
        for event in found.key_averages():
            if event.key.startswith(_PASSES_OF):
                milliseconds[event.key.removeprefix(_PASSES_OF)].append(event.cpu_time_total / 1e3)
    assert milliseconds.keys() == expected.keys(), f"got passes {[*milliseconds]}, expected {[*expected]}"
    lines = ["| pass | ms | GB/s | GFLOP/s |", "|---|--:|--:|--:|"]
    medians = {name: median(samples) for name, samples in milliseconds.items()}
    for name, (moved, flop) in expected.items():
        lines.append(
            f"| {name} | {medians[name]:.2f} | {moved / medians[name] / 1e6:.1f} | {flop / medians[name] / 1e6:.0f} |"
        )
    rest = median(totals) - sum(medians.values())
    return [*lines, f"| small vectors and matrices, and all else | {rest:.2f} | | |"]


def time_table(shapes: Iterable[Shape], rounds: int) -> Iterator[str]:
    yield "| | dtype | ours | eager | eager channels_last | torch.compile | to the best |"
    yield "|---|---|--:|--:|--:|--:|--:|"
    for dtype, shape in product((torch.float32, torch.bfloat16), shapes):
        steps = contenders(shape, dtype)
        _check(steps, _exact_gradient(shape))
        timings = race(steps, rounds)
        cells = []
        for name in (_EAGER, _CHANNELS_LAST, _COMPILED):
            timing = timings.get(name)
            cells.append(f"{timing.median * 1e3:.1f} ({timing.ratio:.2f})" if timing else "")
        best = min(timing.ratio for name, timing in timings.items() if name != _OURS)
        label = f"{shape.label}, batch {shape.x[0]} | {str(dtype).removeprefix('torch.')}"
        yield f"| {label} | {timings[_OURS].median * 1e3:.1f} | {' | '.join(cells)} | {best:.2f} |"
        torch.compiler.reset()


def report(shapes: Sequence[Shape], rounds: int, threads: int) -> Iterator[str]:
    yield from ("# Training steps", "", f"{machine.processor()}, {threads} threads, torch {torch.__version__}", "")
    yield from (f"Milliseconds a step; in brackets the ratio to ours. Medians of {rounds} rounds.", "")
    yield from time_table(shapes, rounds)
    one = Shape("one unit of stage 2, g=3", _units(240, 3, 1), (16, 240, 28, 28))
    copied, fma = peaks.copy_bandwidth(2**25) / 1e9, peaks.fma_peak(threads) / 1e9
    yield from ("", f"## Passes of {one.label}", "")
    yield from (f"A copy of 32 MiB moves {copied:.1f} GB/s, a loop of FMA does {fma:.0f} GFLOP/s.", "")
    yield from profile(one, rounds)
    for shape in shapes:
        if shape.label in _WITH_MEMORY:
            yield from ("", f"## Memory of {shape.label}, batch {shape.x[0]}, float32", "")
            yield from memory_table(shape, threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="a part of the labels of the shapes that are wanted")
    parser.add_argument("--memory", metavar="CONTENDER", help="only print what a contender's step takes, in bytes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = [shape for shape in SHAPES if options.only in shape.label]
    with se.use_backend("native"):
        if options.memory:
            print_memory(shapes[0], options.memory)
            return
        lines = []
        for line in report(shapes, options.rounds, options.threads):
            print(line, flush=True)
            lines.append(line)
    _TABLE.write_text("\n".join(lines) + "\n")
    print(f"wrote {_TABLE}")


if __name__ == "__main__":
    main()
