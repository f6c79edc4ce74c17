"""The results of a run, and how they are written: results.json, results.md, profile.md and pictures."""

import json
import os
import platform
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from itertools import groupby
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

import shufflenet_ext as se
from benchmarks import memory, pictures, profile
from benchmarks.machine import processor
from benchmarks.memory import Growth
from benchmarks.peers import EAGER, FOLDED, OURS
from benchmarks.profile import Profile, Step
from benchmarks.race import Row, Timing, best_peer

_JSON, _MARKDOWN = "results.json", "results.md"


@dataclass
class Results:
    """A whole run. ``fma_peaks``, in FLOP/s by the number of threads, and ``copy_bandwidth``, of memory, in bytes/s,
    are the machine's."""

    machine: dict[str, str]
    seconds: float
    fma_peaks: dict[int, float]
    copy_bandwidth: float
    left_out: list[str]  # peers that were not asked to take part
    failed: list[str]  # benchmarks that gave no row
    rows: list[Row]
    memory: list[Growth]
    profiles: list[Profile]

    def share_of_peak(self, row: Row, name: str = OURS) -> float:
        """The share of the float32 FMA peak of the row's threads that its convolutions and linear layers reach."""
        return row.flop / row.timings[name].median / self.fma_peaks[row.threads]


def machine() -> dict[str, str]:
    """What ran the benchmarks, and when."""
    info = se.build_info()
    versions = {"torch": str(torch.__version__)}
    for package in ("onnxruntime", "openvino", "ncnn"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "processor": f"{processor()}, {os.cpu_count()} cores, torch sees {torch.backends.cpu.get_cpu_capability()}",
        "shufflenet_ext": f"{info['version']}, {info['cpu_isa']} kernels, built by {info['compiler']}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def load(folder: Path) -> Results:
    """The results that :func:`write` left in ``folder``."""
    results = json.loads((folder / _JSON).read_text())
    for row in results["rows"]:
        row["timings"] = {name: Timing(**timing) for name, timing in row["timings"].items()}
    for measured in results["profiles"]:
        measured["steps"] = [Step(**step) for step in measured["steps"]]
    for name, kind in (("rows", Row), ("memory", Growth), ("profiles", Profile)):
        results[name] = [kind(**values) for values in results[name]]
    results["fma_peaks"] = {int(threads): peak for threads, peak in results["fma_peaks"].items()}
    return Results(**results)


def write(results: Results, folder: Path) -> list[Path]:
    """Writes everything; returns the paths."""
    written = [folder / _JSON, folder / _MARKDOWN]
    written[0].write_text(compact_json(asdict(results)))
    drawn = pictures.draw(results.rows, results.share_of_peak, folder)
    written[1].write_text("\n".join(_markdown(results, [path.name for path in drawn])) + "\n")
    if results.profiles:
        written.append(profile.write(results.profiles, results.fma_peaks, folder))
    return written + drawn


def compact_json(results: dict[str, Any]) -> str:
    """JSON with one line for each row and for each other field, so that two runs can be compared by eye."""
    rows = ",\n".join("  " + json.dumps(row) for row in results["rows"])
    fields = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in results.items() if name != "rows"]
    return "{\n" + ",\n".join([*fields, f' "rows": [\n{rows}\n ]']) + "\n}\n"


def _markdown(results: Results, drawn: list[str]) -> Iterable[str]:
    peaks = ", ".join(f"{peak / 1e9:.0f} GFLOP/s on {threads}" for threads, peak in results.fma_peaks.items())
    yield "# Benchmark results"
    yield ""
    yield from (f"- {name}: {value}" for name, value in results.machine.items())
    yield f"- {len(results.rows)} rows in {results.seconds:.0f} s"
    yield from (f"- **failed: {name}**" for name in results.failed)
    yield (
        f"- measured peaks: {peaks} threads (a native loop of FMA on registers in float32), "
        f"{results.copy_bandwidth / 1e9:.1f} GB/s (a copy in memory, bytes read and written)"
    )
    if results.profiles:
        yield "- [where a call spends its time, step by step](profile.md)"
    if results.rows:
        yield from _of_rows(results, drawn)
    if results.memory:
        yield from _of_memory(results.memory)


def _of_rows(results: Results, drawn: list[str]) -> Iterable[str]:
    rounds = [row.rounds for row in results.rows]
    yield ""
    yield (
        f"Medians of {min(rounds)} to {max(rounds)} interleaved rounds, in ms; for ours also the quartiles. A ratio is "
        "that of a peer's time to ours in the same round: above 1, ours is faster. The machine's speed may change from "
        "round to round, which ratios do not see: what counts is their median and, in parentheses, their quartiles. "
        "The best peer is that of the least median ratio. *FMA* is the share that ours reaches of the float32 peak of "
        "its threads, counting convolutions and linear layers; *copy* that of the bandwidth of a copy that moves as "
        "many bytes as input, output and weights have, which for small ones is a cache's, not the memory's. *error* is "
        "the largest against float64, relative to the largest output: of ours, and of eager PyTorch in the same dtype, "
        "of which a network of ours may have twice as much at most, or 4.8e-7. *outside* is the share of a call in "
        "which the calling thread is in none of the native op's steps: Python, dispatch and starting threads; a median."
    )
    reasons = Counter((name, reason) for row in results.rows for name, reason in row.absent.items())
    if reasons or results.left_out:
        yield ""
        yield "Peers that did not take part in some rows:"
        yield ""
        yield from (f"- {name}: {reason} ({count} rows)" for (name, reason), count in sorted(reasons.items()))
        yield from (f"- {name}: not asked for (quick run)" for name in results.left_out)
    yield ""
    yield "## Summary"
    yield ""
    yield f"| suite | precision | batch | threads | rows | × {FOLDED}: mean | least | × best peer: mean | least | FMA |"
    yield "|---|---|" + "--:|" * 8
    for (suite, precision, batch, threads), group in groupby(sorted(results.rows, key=_kind), _kind):
        rows = list(group)
        over_folded = [row.timings[FOLDED].ratio for row in rows if FOLDED in row.timings]
        over_best = [row.timings[best_peer(row)].ratio for row in rows]
        shares = [results.share_of_peak(row) for row in rows]
        folded = f"{geometric_mean(over_folded):.2f} | {min(over_folded):.2f}" if over_folded else "absent | absent"
        yield (
            f"| {suite} | {precision} | {batch} | {threads} | {len(rows)} | {folded} "
            f"| {geometric_mean(over_best):.2f} | {min(over_best):.2f} | {geometric_mean(shares):.0%} |"
        )
    for name in drawn:
        yield ""
        yield f"![{name.removesuffix('.png').replace('_', ' ')}]({name})"
    for (suite, precision), group in groupby(sorted(results.rows, key=_suite), _suite):
        yield from _table(f"{suite[0].upper()}{suite[1:]}, {precision}", list(group), results)


def _table(title: str, rows: list[Row], results: Results) -> Iterable[str]:
    names = list(dict.fromkeys(name for row in rows for name in row.timings if name != OURS))
    yield ""
    yield f"## {title}"
    yield ""
    columns = ["g", "shape", "batch", "threads", OURS, *names, f"× {FOLDED}", "× best peer", "FMA", "copy", "error"]
    if any(row.outside is not None for row in rows):
        columns.append("outside")
    yield f"| {' | '.join(columns)} |"
    yield "|--:|---|" + "--:|" * (len(columns) - 2)
    for row in rows:
        ours, best = row.timings[OURS], best_peer(row)
        cells = [
            str(row.groups),
            row.label,
            str(row.batch),
            str(row.threads),
            f"**{_ms(ours.median)}** ({_ms(ours.q1)}–{_ms(ours.q3)})",
            *(_ms(row.timings[name].median) if name in row.timings else "absent" for name in names),
            f"{row.timings[FOLDED].ratio:.2f}" if FOLDED in row.timings else "absent",
            f"{_ratio(row.timings[best])} {best}",
            f"{results.share_of_peak(row):.0%}",
            f"{row.traffic / ours.median / row.copy_bandwidth:.1%}",
            f"{row.errors[OURS]:.1e}, {EAGER} {row.errors[EAGER]:.1e}",
        ]
        if "outside" in columns:
            cells.append("" if row.outside is None else f"{row.outside:.1%}")
        yield f"| {' | '.join(cells)} |"


def _of_memory(growths: list[Growth]) -> Iterable[str]:
    yield ""
    yield "## Memory"
    yield ""
    yield (
        f"By how much one call of {memory.SHAPE.label}, batch {memory.SHAPE.batch}, lets the peak of resident memory "
        "grow over what was resident before it: of the first call of each, in a process of its own, as later ones "
        "would not show what a runtime keeps. What is allocated while a model is loaded is not counted."
    )
    yield ""
    yield "| contender | threads | MiB |"
    yield "|---|--:|--:|"
    for growth in sorted(growths, key=lambda growth: growth.peak):
        yield f"| {growth.name} | {growth.threads} | {growth.peak / 2**20:.1f} |"


def _ratio(timing: Timing) -> str:
    return f"{timing.ratio:.2f} ({timing.ratio_q1:.2f}–{timing.ratio_q3:.2f})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:#.3g}".rstrip(".")


def _kind(row: Row) -> tuple[str, str, int, int]:
    return row.suite, row.precision, row.batch, row.threads


def _suite(row: Row) -> tuple[str, str]:
    return row.suite, row.precision
