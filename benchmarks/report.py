"""The results of a run, and what is written of them: results.json, results.md and pictures."""

import json
import os
import platform
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
from benchmarks import pictures
from benchmarks.peers import FOLDED, OURS
from benchmarks.race import Row, Timing

_JSON, _MARKDOWN = "results.json", "results.md"


@dataclass
class Results:
    """A whole run. ``fma_peak`` in FLOP/s and ``copy_bandwidth``, from memory, in bytes/s are the machine's."""

    machine: dict[str, str]
    threads: int
    seconds: float
    fma_peak: float
    copy_bandwidth: float
    left_out: list[str]  # peers that were not asked to take part
    failed: list[str]  # benchmarks that gave no row
    rows: list[Row]


def machine() -> dict[str, str]:
    """What ran the benchmarks, and when."""
    info = se.build_info()
    versions = {"torch": str(torch.__version__)}
    for package in ("onnxruntime", "openvino"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores, torch sees {torch.backends.cpu.get_cpu_capability()}",
        "shufflenet_ext": f"{info['version']}, {info['cpu_isa']} kernels, built by {info['compiler']}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def load(folder: Path) -> Results:
    """The results that :func:`write` left in ``folder``."""
    results = json.loads((folder / _JSON).read_text())
    rows = results.pop("rows")
    for row in rows:
        row["timings"] = {name: Timing(**timing) for name, timing in row["timings"].items()}
    return Results(**results, rows=[Row(**row) for row in rows])


def write(results: Results, folder: Path) -> list[Path]:
    """Writes everything; returns the paths."""
    written = [folder / _JSON, folder / _MARKDOWN]
    written[0].write_text(compact_json(asdict(results)))
    drawn = pictures.draw(results.rows, results.fma_peak, folder)
    written[1].write_text("\n".join(_markdown(results, [path.name for path in drawn])) + "\n")
    return written + drawn


def compact_json(results: dict[str, Any]) -> str:
    """JSON with a line a row and a line for each other field, so that two runs can be compared by eye."""
    rows = ",\n".join("  " + json.dumps(row) for row in results["rows"])
    fields = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in results.items() if name != "rows"]
    return "{\n" + ",\n".join([*fields, f' "rows": [\n{rows}\n ]']) + "\n}\n"


def _markdown(results: Results, drawn: list[str]) -> Iterable[str]:
    rounds = [row.rounds for row in results.rows]
    yield "# Benchmark results"
    yield ""
    yield from (f"- {name}: {value}" for name, value in results.machine.items())
    yield f"- float32; threads of every contender: {results.threads}"
    yield f"- {len(results.rows)} rows in {results.seconds:.0f} s"
    yield from (f"- **failed: {name}**" for name in results.failed)
    yield (
        f"- measured peaks: {results.fma_peak / 1e9:.0f} GFLOP/s (a native loop of FMA on registers), "
        f"{results.copy_bandwidth / 1e9:.1f} GB/s (a copy in memory, bytes read and written)"
    )
    yield ""
    yield (
        f"Medians of {min(rounds)} to {max(rounds)} interleaved rounds, in ms; for ours also the quartiles. A ratio is "
        "the median, over the rounds, of a peer's time to ours in the same round: above 1, ours is faster; the best "
        "peer is that of the least median. *FMA* is the share of the peak that ours reaches, counting convolutions and "
        "linear layers; *copy* that of the bandwidth of a copy that moves as many bytes as input, output and weights "
        "have, which for small ones is a cache's, not the memory's."
    )
    absent = {f"{name}: {reason}" for row in results.rows for name, reason in row.absent.items()}
    if absent or results.left_out:
        yield ""
        yield "Peers that did not take part:"
        yield ""
        yield from (f"- {reason}" for reason in sorted(absent))
        yield from (f"- {name}: not asked for (quick run)" for name in results.left_out)
    yield ""
    yield "## Summary"
    yield ""
    yield f"| suite | batch | rows | × {FOLDED}: mean | least | × best peer: mean | least | FMA: mean |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    for (suite, batch), group in groupby(sorted(results.rows, key=_suite_batch), _suite_batch):
        rows = list(group)
        over_folded = [row.timings[FOLDED].ratio for row in rows]
        over_best = [row.timings[best_peer(row)].ratio for row in rows]
        shares = [row.flop / row.timings[OURS].median / results.fma_peak for row in rows]
        yield (
            f"| {suite} | {batch} | {len(rows)} | {geometric_mean(over_folded):.2f} | {min(over_folded):.2f} "
            f"| {geometric_mean(over_best):.2f} | {min(over_best):.2f} | {geometric_mean(shares):.0%} |"
        )
    for name in drawn:
        yield ""
        yield f"![{name.removesuffix('.png').replace('_', ' ')}]({name})"
    for suite, group in groupby(results.rows, lambda row: row.suite):
        yield from _table(suite, list(group), results.fma_peak)


def _table(suite: str, rows: list[Row], fma_peak: float) -> Iterable[str]:
    names = list(dict.fromkeys(name for row in rows for name in row.timings if name != OURS))
    yield ""
    yield f"## {suite[0].upper()}{suite[1:]}"
    yield ""
    columns = ["g", "shape", "batch", OURS, *names, f"× {FOLDED}", "× best peer", "FMA", "copy"]
    yield f"| {' | '.join(columns)} |"
    yield "|--:|---|" + "--:|" * (len(columns) - 2)
    for row in rows:
        ours, best = row.timings[OURS], best_peer(row)
        cells = [
            str(row.groups),
            row.label,
            str(row.batch),
            f"**{_ms(ours.median)}** ({_ms(ours.q1)}–{_ms(ours.q3)})",
            *(_ms(row.timings[name].median) if name in row.timings else "absent" for name in names),
            f"{row.timings[FOLDED].ratio:.2f}",
            f"{row.timings[best].ratio:.2f} ({best})",
            f"{row.flop / ours.median / fma_peak:.0%}",
            f"{row.traffic / ours.median / row.copy_bandwidth:.1%}",
        ]
        yield f"| {' | '.join(cells)} |"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:#.3g}".rstrip(".")


def _suite_batch(row: Row) -> tuple[str, int]:
    return row.suite, row.batch


def best_peer(row: Row) -> str:
    """The fastest contender that is not ours."""
    return min((name for name in row.timings if not name.startswith(OURS)), key=lambda name: row.timings[name].median)
