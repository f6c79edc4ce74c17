"""Times training steps: ``python -m benchmarks.training``, from the repository's root.

A step is the forward and the backward pass of units or of a whole network, in turn by the native passes, by eager
PyTorch in both memory formats and by torch.compile, all on copies with the same parameters. The gradients of the first
one, which depend on all others, are compared before anything is timed. In bfloat16, under autocast, it is ours and
eager PyTorch's. Writes results/training.md.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import shufflenet_ext as se
from benchmarks import machine, peaks
from benchmarks.peers import plain_copy
from benchmarks.race import settle_and_warm, timings_of
from shufflenet_ext import _training

_TABLE = Path(__file__).parent / "results" / "training.md"
_OURS, _EAGER, _CHANNELS_LAST, _COMPILED = "ours", "eager", "eager channels_last", "torch.compile"
_TOLERANCES = {torch.float32: 2e-2, torch.bfloat16: 0.5}  # a ReLU that rounding opens or closes shows in gradients


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

Step = Callable[[], Tensor]


def _step(
    model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype, backend: Any = "reference"
) -> Step:
    """A training step, which returns the gradient of the first parameter. That of an image is not computed."""
    generator = torch.Generator().manual_seed(0)
    is_image = x.shape[1] == 3
    x = x.clone(memory_format=torch.preserve_format).requires_grad_(not is_image)
    inputs = [*model.parameters(), *([] if is_image else [x])]
    gradient: Tensor | None = None

    def step() -> Tensor:
        nonlocal gradient
        autocast = torch.autocast("cpu", torch.bfloat16) if dtype == torch.bfloat16 else nullcontext()
        with se.use_backend(backend), autocast:
            result = run(x)
        if gradient is None:
            gradient = torch.randn(result.shape, generator=generator).to(result)
        return torch.autograd.grad(result, inputs, gradient)[0]

    return step


def contenders(shape: Shape, dtype: torch.dtype) -> dict[str, Step]:
    torch.manual_seed(0)
    model = shape.build().train()
    x = torch.randn(shape.x).relu_()
    plain, last = plain_copy(model), plain_copy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = {_OURS: _step(model, model, x, dtype, "native"), _EAGER: _step(plain, plain, x, dtype)}
    steps[_CHANNELS_LAST] = _step(last, last, x.to(memory_format=torch.channels_last), dtype)
    if dtype == torch.float32:
        compiled = plain_copy(model)
        steps[_COMPILED] = _step(compiled, torch.compile(compiled), x, dtype)
    return steps


def _check(steps: dict[str, Step], tolerance: float) -> None:
    expected = steps[_EAGER]()
    size = expected.square().mean().sqrt()
    for name, step in steps.items():
        error = ((step() - expected).square().mean().sqrt() / size).item()
        assert error <= tolerance, f"{name}'s gradients differ from eager PyTorch's by {error:.3g}, over {tolerance}"


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


@contextmanager
def timed_passes() -> Iterator[list[tuple[str, float, int]]]:
    """Notes each pass that runs meanwhile: its name, its seconds, and the bytes of the tensors that it is given."""
    passes, found = _training._passes, []

    class Timed:
        def __getattr__(self, name: str) -> Callable[..., None]:
            run = getattr(passes, name)

            def timed(*args: Any, **kwargs: Any) -> None:
                start = time.perf_counter()
                run(*args, **kwargs)
                tensors = {arg.data_ptr(): arg.nbytes for arg in args if isinstance(arg, Tensor)}
                found.append((name.removeprefix("training_"), time.perf_counter() - start, sum(tensors.values())))

            return timed

    _training._passes = Timed()
    try:
        yield found
    finally:
        _training._passes = passes


def profile(shape: Shape, repeats: int) -> list[str]:
    """A table of the passes of one unit's step."""
    step = contenders(shape, torch.float32)[_OURS]
    step()
    by_pass: dict[int, list[tuple[str, float, int]]] = defaultdict(list)
    totals = []
    for _ in range(repeats):
        with timed_passes() as found:
            start = time.perf_counter()
            step()
            totals.append(time.perf_counter() - start)
        for i, each in enumerate(found):
            by_pass[i].append(each)
    lines = ["| pass | ms | GB/s |", "|---|--:|--:|"]
    rest = median(totals)
    for samples in by_pass.values():
        seconds = median(each[1] for each in samples)
        rest -= seconds
        lines.append(f"| {samples[0][0]} | {seconds * 1e3:.2f} | {samples[0][2] / seconds / 1e9:.1f} |")
    return [*lines, f"| small vectors and matrices, and all else | {rest * 1e3:.2f} | |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="a part of the labels of the shapes that are wanted")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = ["# Training steps", "", f"{machine.processor()}, {options.threads} threads, torch {torch.__version__}", ""]
    lines += [f"Milliseconds a step; in brackets the ratio to ours. Medians of {options.rounds} rounds.", ""]
    lines += ["| | dtype | ours | eager | eager channels_last | torch.compile | to the best |"]
    lines += ["|---|---|--:|--:|--:|--:|--:|"]
    print("\n".join(lines), flush=True)
    with se.use_backend("native"):
        for dtype in (torch.float32, torch.bfloat16):
            for shape in SHAPES:
                if options.only not in shape.label:
                    continue
                steps = contenders(shape, dtype)
                _check(steps, _TOLERANCES[dtype])
                timings = race(steps, options.rounds)
                cells = []
                for name in (_EAGER, _CHANNELS_LAST, _COMPILED):
                    timing = timings.get(name)
                    cells.append(f"{timing.median * 1e3:.1f} ({timing.ratio:.2f})" if timing else "")
                best = min(timing.ratio for name, timing in timings.items() if name != _OURS)
                ours = f"{timings[_OURS].median * 1e3:.1f}"
                label = f"{shape.label}, batch {shape.x[0]} | {str(dtype).removeprefix('torch.')}"
                row = f"| {label} | {ours} | {' | '.join(cells)} | {best:.2f} |"
                print(row, flush=True)
                lines.append(row)
                torch.compiler.reset()
        one = Shape("one unit of stage 2, g=3", _units(240, 3, 1), (16, 240, 28, 28))
        copied = peaks.copy_bandwidth(2**25)
        lines += ["", f"## Passes of {one.label}", ""]
        lines += [f"A copy of 32 MiB moves {copied / 1e9:.1f} GB/s.", "", *profile(one, options.rounds)]
    _TABLE.write_text("\n".join(lines) + "\n")
    print("\n".join(lines[-14:]), f"\nwrote {_TABLE}")


if __name__ == "__main__":
    main()
