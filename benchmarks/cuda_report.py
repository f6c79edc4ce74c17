"""The results of ``make bench-cuda``, and how they are written: cuda.json, cuda.md, a picture for each precision."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

from benchmarks import pictures
from benchmarks.cuda_model import in_us
from benchmarks.cuda_race import ALL_UNITS, COPY, MAX_AUTOTUNE, OURS_CHANNELS_LAST_GRAPH, OURS_GRAPH, UNITS, CudaRow
from benchmarks.cuda_toolkit import LAYOUTS
from benchmarks.peers import FOLDED, OURS, OURS_CHANNELS_LAST
from benchmarks.race import Timing, best_peer
from benchmarks.report import compact_json

FLOOR, PREDICTED = "DRAM floor", "predicted"
MOST_OVER_COPY, LEAST_OVER_COMPILED = 1.4, 3.0  # the targets, on an H100, float16, channels_last, batch 64
_GRAPHS = dict(zip(LAYOUTS, (OURS_GRAPH, OURS_CHANNELS_LAST_GRAPH), strict=True))

# Circles are contiguous tensors, diamonds channels_last.
_STYLES = {
    FLOOR: ("|", "#000000"),
    COPY: ("+", "#000000"),
    PREDICTED: ("x", "#000000"),
    OURS_GRAPH: ("*", "#E69F00"),
    OURS_CHANNELS_LAST_GRAPH: ("*", "#D55E00"),
    OURS: ("o", "#E69F00"),
    OURS_CHANNELS_LAST: ("D", "#D55E00"),
    MAX_AUTOTUNE: ("s", "#009E73"),
    FOLDED: ("o", "#56B4E9"),
    "folded channels_last": ("D", "#56B4E9"),
    "folded graph": ("o", "#0072B2"),
    "folded channels_last graph": ("D", "#0072B2"),
    "eager": ("o", "#999999"),
    "eager channels_last": ("D", "#999999"),
}


@dataclass
class Results:
    """A whole run. ``nothing`` is what the clock shows for a call that does nothing, in seconds."""

    machine: dict[str, str]
    seconds: float
    copy_bandwidth: float
    nothing: float
    no_model: str  # why there are no predictions; empty where there are
    failed: list[str]
    rows: list[CudaRow]


def write(results: Results, folder: Path) -> list[Path]:
    """Writes everything; returns the paths."""
    written = [folder / "cuda.json", folder / "cuda.md"]
    written[0].write_text(compact_json(asdict(results)))
    drawn = [_draw(list(rows), folder) for _, rows in groupby(results.rows, lambda row: row.precision)]
    written[1].write_text("\n".join(_markdown(results, [path.name for path in drawn])) + "\n")
    return written + drawn


def _draw(rows: list[CudaRow], folder: Path) -> Path:
    precision = rows[0].precision

    def with_bounds(row: CudaRow) -> CudaRow:
        bounds = {FLOOR: row.floor, COPY: row.copied}
        if row.predicted:
            bounds[PREDICTED] = row.predicted[LAYOUTS[1]]
        return replace(row, timings=row.timings | {name: Timing(s, s, s, 1, 1, 1) for name, s in bounds.items()})

    title = f"ShuffleNet 1×, g = {rows[0].groups}, on CUDA, {precision}"
    return pictures.save(
        lambda: pictures.latency([with_bounds(row) for row in rows], title, _STYLES), folder / f"cuda_{precision}.png"
    )


def targets(rows: list[CudaRow]) -> Iterator[tuple[str, str, str]]:
    """Yields each target (for an H100), what was measured and whether that meets it, where there are rows for it."""
    for row in rows:
        if (row.precision, row.batch) != ("float16", 64):
            continue
        if row.suite == UNITS and "stage 4" not in row.label:
            got = row.over_copy(OURS_CHANNELS_LAST_GRAPH)
            aim = f"{row.label}: at most {MOST_OVER_COPY}× a copy of as many bytes"
            yield aim, f"{got:.2f}×", "met" if got <= MOST_OVER_COPY else "missed"
        if row.suite == ALL_UNITS and MAX_AUTOTUNE in row.timings:
            got = row.timings[MAX_AUTOTUNE].ratio
            aim = f"{row.label}: at least {LEAST_OVER_COMPILED:g}× faster than {MAX_AUTOTUNE}"
            yield aim, f"{got:.2f}×", "met" if got >= LEAST_OVER_COMPILED else "missed"


def line(row: CudaRow) -> str:
    """A row for the terminal."""
    ours, best = OURS_CHANNELS_LAST_GRAPH, best_peer(row)
    return (
        f"{row.precision:8} {row.suite:15} {row.label:16} batch {row.batch:<3} "
        f"{row.timings[ours].median * 1e6:9.1f} µs  {row.over_copy(ours):6.2f}× {COPY}  "
        f"{row.timings[best].ratio:6.2f}× {best}"
    )


def _markdown(results: Results, drawn: list[str]) -> Iterator[str]:
    yield "# Benchmark results on CUDA"
    yield ""
    yield from (f"- {name}: {value}" for name, value in results.machine.items())
    yield f"- copy in the device's memory: {results.copy_bandwidth / 1e9:.0f} GB/s, bytes read and written"
    yield f"- the clock shows {in_us(results.nothing)} µs for a call that does nothing; it is contained in all times"
    yield f"- {len(results.rows)} rows in {results.seconds:.0f} s"
    yield from (f"- **failed: {name}**" for name in results.failed)
    yield from [f"- no predictions: {results.no_model}"] if results.no_model else []
    yield ""
    yield (
        "Medians of interleaved rounds in µs, by CUDA events, each call behind a read of more than the L2 cache; for "
        f"the graph of ours in channels_last also the quartiles. {COPY.capitalize()}: of as many bytes as the input, "
        f"the result and the parameters of each unit have, as a graph. {FLOOR}: their number by the bandwidth of a "
        "large copy. Of a network both count the units alone, as does what is predicted ([the model](cuda_model.md)). "
        "A ratio to a peer is the median, over the rounds, of its time to that of the graph of ours in channels_last; "
        "the best peer is that of the least median. Outputs were compared first."
    )
    absent = {f"{name}: {reason}" for row in results.rows for name, reason in row.absent.items()}
    if absent:
        yield ""
        yield "Peers that did not take part in every row:"
        yield ""
        yield from (f"- {reason}" for reason in sorted(absent))
    if aims := list(targets(results.rows)):
        yield ""
        yield "## Targets, set for an H100, float16, channels_last, batch 64"
        yield ""
        yield "| target | measured | |"
        yield "|---|--:|---|"
        yield from (f"| {' | '.join(aim)} |" for aim in aims)
    for name in drawn:
        yield ""
        yield f"![{name.removesuffix('.png').replace('_', ' ')}]({name})"
    for (suite, precision), rows in groupby(results.rows, lambda row: (row.suite, row.precision)):
        yield ""
        yield f"## {suite[0].upper()}{suite[1:]}, {precision}"
        yield ""
        yield from _table(list(rows))


def _table(rows: list[CudaRow]) -> Iterator[str]:
    names = list(dict.fromkeys(name for row in rows for name in row.timings if name != OURS_CHANNELS_LAST_GRAPH))
    columns = ["shape", "batch", FLOOR, COPY, *(f"{PREDICTED} {layout}" for layout in LAYOUTS)]
    columns += [OURS_CHANNELS_LAST_GRAPH, *names, *(f"× {COPY} {layout}" for layout in LAYOUTS), "× best peer"]
    yield f"| {' | '.join(columns)} |"
    yield "|---|" + "--:|" * (len(columns) - 1)
    for row in rows:
        ours, best = row.timings[OURS_CHANNELS_LAST_GRAPH], best_peer(row)
        cells = [row.label, str(row.batch), in_us(row.floor), in_us(row.copied)]
        cells += [in_us(row.predicted[layout]) if row.predicted else "–" for layout in LAYOUTS]
        cells += [f"**{in_us(ours.median)}** ({in_us(ours.q1)}–{in_us(ours.q3)})"]
        cells += [in_us(row.timings[name].median) if name in row.timings else "absent" for name in names]
        cells += [f"{row.over_copy(_GRAPHS[layout]):.2f}" for layout in LAYOUTS]
        cells += [f"{row.timings[best].ratio:.2f} ({best})"]
        yield f"| {' | '.join(cells)} |"
