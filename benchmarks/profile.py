"""Where a call of a network spends its time: each step, and its share of the FMA peak."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import shufflenet_ext as se
from benchmarks.race import settle_and_warm
from benchmarks.shapes import NetworkShape

_FILE = "profile.md"
_REASONS = "## Reasons"  # below this heading the document is written by hand, and kept


@dataclass
class Step:
    """One step. ``seconds`` is the median, over some calls, of the time of the thread that works longest."""

    name: str
    flop: int
    seconds: float


@dataclass
class Profile:
    network: str
    batch: int
    threads: int
    steps: list[Step]


def measure(network: NetworkShape) -> Profile:
    """Measures the steps of a call on torch's current number of threads."""
    module, x = network.build()
    optimized = se.optimize_for_inference(module, example_inputs=(x,))
    settle_and_warm(lambda: optimized(x))
    (explanation,) = optimized.explain(x)
    steps = [Step(step.name, step.flop, step.microseconds / 1e6) for step in explanation.steps]
    return Profile(network.label, network.batch, explanation.threads, steps)


def write(profiles: list[Profile], fma_peaks: Mapping[int, float], folder: Path) -> Path:
    """Writes the document anew, and keeps the reasons in it."""
    path = folder / _FILE
    reasons = path.read_text().partition(_REASONS)[2] if path.is_file() else "\n"
    path.write_text("\n".join(_markdown(profiles, fma_peaks)) + f"\n\n{_REASONS}{reasons}")
    return path


def _markdown(profiles: list[Profile], fma_peaks: Mapping[int, float]) -> Iterator[str]:
    yield "# Where a call of a network spends its time"
    yield ""
    yield (
        "Medians of some calls in float32, by `explain`: microseconds of the thread that works longest in each step, "
        "and the share of the FMA peak of all threads that the step's convolutions or linear layer reach in them. A "
        "step's time includes waiting for the other thread."
    )
    for network, of_network in groupby(profiles, lambda profile: profile.network):
        yield from ("", f"## {network}", "")
        yield from _table(list(of_network), fma_peaks)


def _table(profiles: Sequence[Profile], fma_peaks: Mapping[int, float]) -> Iterator[str]:
    names = [f"batch {profile.batch}, threads {profile.threads}" for profile in profiles]
    columns = [column for name in names for column in (f"{name}: µs", "of peak")]
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
