"""The pictures: latency against the peers, ratios to the best one, and the share of the machine's peak."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from benchmarks import peers
from benchmarks.peers import OURS
from benchmarks.race import Row, best_peer
from benchmarks.shapes import BATCHES, CIFAR, FOREIGN, NETWORKS, SIZES, THREADS

# Each has a marker, and a colour of Okabe and Ito's, which all kinds of colour vision tell apart.
_STYLES = {
    OURS: ("*", "#D55E00"),
    peers.EAGER: ("o", "#999999"),
    "eager channels_last": ("D", "#999999"),
    peers.FOLDED: ("o", "#56B4E9"),
    "folded channels_last": ("D", "#56B4E9"),
    peers.COMPILED: ("s", "#009E73"),
    peers.ONNX_RUNTIME: ("^", "#E69F00"),
    peers.OPENVINO: ("v", "#CC79A7"),
    peers.OPENVINO_THROUGHPUT: ("P", "#CC79A7"),
    peers.NCNN: ("X", "#0072B2"),
}
_UNITS_GROUPS = 3


def draw(rows: list[Row], share_of_peak: Callable[[Row, str], float], folder: Path) -> list[Path]:
    """Writes the pictures for which there are rows; returns their paths."""
    threads = THREADS[-1]
    in_float32 = [row for row in rows if row.precision == "float32" and row.threads == threads]
    units = [row for row in in_float32 if row.suite == "units"]
    g3_units = [row for row in units if row.groups == _UNITS_GROUPS]
    networks = [row for row in rows if row.suite in (NETWORKS, SIZES, CIFAR, FOREIGN)]
    paper = [row for row in in_float32 if row.suite == NETWORKS]
    drawn = []
    for name, chosen, paint in (
        ("ratio_networks", networks, lambda: _ratios(networks)),
        ("latency_units", g3_units, lambda: latency(g3_units, f"Units of 1× g={_UNITS_GROUPS}, {threads} threads")),
        ("latency_networks", paper, lambda: latency(paper, f"Whole networks, float32, {threads} threads")),
        ("share_of_peak", units + paper, lambda: _share(units + paper, share_of_peak)),
    ):
        if chosen:
            drawn.append(save(paint, folder / f"{name}.png"))
    return drawn


def save(paint: Callable[[], Any], path: Path) -> Path:
    figure = paint()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _labels(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.label for row in rows))


def latency(rows: Sequence[Row], title: str, styles: Mapping[str, tuple[str, str]] = _STYLES) -> Any:
    """One panel for each batch size, one line for each shape. A marker is a contender's median, its bar the quartiles.

    ``styles`` has the marker and the colour of each contender to be shown; stars are drawn larger.
    """
    labels, batches = _labels(rows), sorted({row.batch for row in rows})
    size = (max(11, 4 * len(batches)), 2 + 0.75 * len(labels))
    figure, panels = plt.subplots(1, len(batches), figsize=size, sharey=True, squeeze=False, layout="constrained")
    lanes = dict(zip(styles, np.linspace(-0.36, 0.36, len(styles)), strict=True))  # so that no marker hides another
    for panel, batch in zip(panels[0], batches, strict=True):
        for row in (row for row in rows if row.batch == batch):
            for name, (marker, colour) in styles.items():
                if timing := row.timings.get(name):
                    x = timing.median * 1e3
                    spread = [[x - timing.q1 * 1e3], [timing.q3 * 1e3 - x]]
                    line = labels.index(row.label) + lanes[name]
                    marker_size = 9 if marker == "*" else 6
                    panel.errorbar(x, line, xerr=spread, fmt=marker, color=colour, ms=marker_size, label=name)
        panel.set(xscale="log", title=f"batch {batch}", xlabel="ms a call, logarithmic: left is faster")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        _finish(panel, labels)
    _legend(figure, panels[0][0], "outside lower center", columns=4)
    figure.suptitle(title)
    return figure


def _finish(panel: Any, labels: list[str]) -> None:
    """Names the lines, sets every other one off by a band, and draws a grid."""
    for band in range(0, len(labels), 2):
        panel.axhspan(band - 0.5, band + 0.5, color="#F4F4F4", zorder=0)
    panel.set_yticks(range(len(labels)), labels)
    panel.set_ylim(len(labels) - 0.5, -0.5)
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", color="#DDDDDD")
    panel.set_axisbelow(True)


def _legend(figure: Any, panel: Any, place: str, columns: int) -> None:
    handles = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))  # one of each label
    figure.legend(handles.values(), handles, loc=place, ncols=columns, frameon=False)


def _ratios(rows: list[Row]) -> Any:
    """One panel for each precision and batch size, one line for each network, one marker for each number of threads.

    A bar is between quartiles. The colour says which peer is best; a hollow marker is one thread.
    """
    labels, batches = _labels(rows), sorted({row.batch for row in rows})
    precisions = list(dict.fromkeys(row.precision for row in rows))
    size = (5 * len(batches) + 2, len(precisions) * (1 + 0.3 * len(labels)) + 1)
    figure, panels = plt.subplots(
        len(precisions), len(batches), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    lanes = dict(zip(THREADS, np.linspace(-0.2, 0.2, len(THREADS)), strict=True))
    handles = {}
    for row in rows:
        panel = panels[precisions.index(row.precision)][batches.index(row.batch)]
        best = best_peer(row)
        timing, (marker, colour) = row.timings[best], _STYLES[best]
        spread = [[timing.ratio - timing.ratio_q1], [timing.ratio_q3 - timing.ratio]]
        line, fill = labels.index(row.label) + lanes[row.threads], colour if row.threads > 1 else "white"
        handles[f"{best}, threads {row.threads}"] = panel.errorbar(
            timing.ratio, line, xerr=spread, fmt=marker, color=colour, mfc=fill, ms=6
        )
    for precision, line_of_panels in zip(precisions, panels, strict=True):
        for batch, panel in zip(batches, line_of_panels, strict=True):
            panel.set(xscale="log", title=f"{precision}, batch {batch}")
            panel.xaxis.set_major_locator(LogLocator(subs=(0.5, 0.7, 1, 1.5, 2, 3, 5)))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.axvline(1, color="black", lw=1)
            _finish(panel, labels)
    for panel in panels[-1]:
        panel.set_xlabel("best peer's time to ours in the same round: right of 1, ours is faster")
    figure.legend(
        [handles[name] for name in sorted(handles)],
        sorted(handles),
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    figure.suptitle("Whole networks against the best peer of each row: median and quartiles of the rounds' ratios")
    return figure


def _share(rows: list[Row], share_of_peak: Callable[[Row, str], float]) -> Any:
    """One panel for each number of groups, one line for each unit, one marker for each batch size.

    A hollow marker is the best peer.
    """

    def line_of(row: Row) -> str:
        return "whole network" if row.suite == NETWORKS else row.label

    labels, groups = list(dict.fromkeys(map(line_of, rows))), sorted({row.groups for row in rows})
    size = (max(8, 2 + 2.1 * len(groups)), 1.8 + 0.4 * len(labels))
    figure, panels = plt.subplots(1, len(groups), figsize=size, sharey=True, squeeze=False, layout="constrained")
    styles = dict(zip(BATCHES, (("o", "#D55E00", -0.14), ("s", "#0072B2", 0.14)), strict=True))
    for panel, g in zip(panels[0], groups, strict=True):
        for row in (row for row in rows if row.groups == g):
            marker, colour, shift = styles[row.batch]
            line = labels.index(line_of(row)) + shift
            shares = [share_of_peak(row, name) for name in (best_peer(row), OURS)]
            panel.plot(shares, [line, line], color=colour, lw=1, zorder=1)
            for share, fill, who in zip(shares, ("white", colour), ("best peer", OURS), strict=True):
                panel.plot(share, line, marker, color=colour, mfc=fill, ms=6.5, label=f"{who}, batch {row.batch}")
        panel.set(title=f"g = {g}", xlim=(0, 1), xticks=(0.2, 0.4, 0.6, 0.8), xlabel="% of peak")
        panel.xaxis.set_major_formatter(PercentFormatter(1, symbol=""))
        _finish(panel, labels)
    _legend(figure, panels[0][0], "outside lower center", columns=2 if len(groups) < 4 else 4)
    figure.suptitle("Share of the measured FMA peak (0 to 100 %): units, and whole networks at 224²")
    return figure
