"""Where a call of the 1× network with 3 groups spends its time: each step's, and its share of the FMA peak."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import shufflenet_ext._C as _C
import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.race import settle_and_warm, work
from benchmarks.shapes import NetworkShape

_GROUPS = 3
_CALLS = 51
_FILE = "profile.md"
_REASONS = "## Reasons"  # what stands below this heading is written by hand, and kept


@dataclass
class Step:
    """``seconds`` is the median, over the calls, of what the calling thread spent in the step, waiting included."""

    name: str
    flop: int
    seconds: float


@dataclass
class Profile:
    batch: int
    threads: int
    steps: list[Step]


def measure(batch: int) -> Profile:
    """On torch's current number of threads."""
    module, x = NetworkShape(_GROUPS, batch).build()
    run = peers.ours(module, x)[peers.OURS]
    settle_and_warm(run)
    calls = []
    for _ in range(_CALLS):
        _C.start_profile()
        run()
        calls.append(_C.finish_profile())
    seconds = [median(times) for times in zip(*calls, strict=True)]
    names_and_flop = _steps(peers.folded_copy(module), x)
    steps = [Step(*step, time) for step, time in zip(names_and_flop, seconds, strict=True)]
    return Profile(batch, torch.get_num_threads(), steps)


def _steps(network: nn.Module, x: Tensor) -> Iterator[tuple[str, int]]:
    """Name and FLOP of each step of the native op, in order."""
    children = dict(network.named_children())
    yield "stem", work(children["conv1"], x)[0]
    x = nn.functional.max_pool2d(children["conv1"](x), 3, stride=2, padding=1)
    for stage, name in enumerate(("layer1", "layer2", "layer3"), 2):
        for number, unit in enumerate(children[name].children(), 1):
            yield f"stage {stage}, unit {number}", work(unit, x)[0]
            x = unit(x)
    yield "means", 0
    yield "linear", work(children["linear"], x.mean((2, 3)))[0]


def write(profiles: list[Profile], fma_peaks: Mapping[int, float], folder: Path) -> Path:
    """Writes the document anew, but for the reasons in it."""
    path = folder / _FILE
    reasons = path.read_text().partition(_REASONS)[2] if path.is_file() else "\n"
    path.write_text("\n".join(_markdown(profiles, fma_peaks)) + f"\n\n{_REASONS}{reasons}")
    return path


def _markdown(profiles: list[Profile], fma_peaks: Mapping[int, float]) -> Iterator[str]:
    yield f"# Where a call of ShuffleNet 1× g={_GROUPS} at 224² spends its time"
    yield ""
    yield (
        f"Medians of {_CALLS} calls in float32: microseconds of the calling thread in each step, and the share of the "
        "FMA peak of all threads that the step's convolutions or linear layer reach in them. A step's time includes "
        "waiting for the other thread; when each thread has images of its own, it is that of the calling thread's."
    )
    names = [f"batch {profile.batch}, threads {profile.threads}" for profile in profiles]
    columns = [column for name in names for column in (f"{name}: µs", "of peak")]
    yield ""
    yield f"| step | MFLOP an image | {' | '.join(columns)} |"
    yield "|---|--:|" + "--:|" * len(columns)
    rows = list(zip(*(profile.steps for profile in profiles), strict=True))
    rows.append(tuple(_total(profile) for profile in profiles))
    for row in rows:
        cells = [row[0].name, f"{row[0].flop / profiles[0].batch / 1e6:.2f}"]
        for profile, step in zip(profiles, row, strict=True):
            share = step.flop / step.seconds / fma_peaks[profile.threads]
            cells += [f"{step.seconds * 1e6:.1f}", f"{share:.0%}" if step.flop else "–"]
        yield f"| {' | '.join(cells)} |"


def _total(profile: Profile) -> Step:
    flop, seconds = (sum(getattr(step, name) for step in profile.steps) for name in ("flop", "seconds"))
    return Step("all", flop, seconds)
