"""Trains on digits by the native passes and by the reference: ``python -m benchmarks.curves``, from the root.

The runs of one seed differ in the backend alone: both start from the same parameters and see the same images. What
differs then is rounding, which training amplifies, so that single runs part; the question is whether accuracies and
losses do. Each run is one of examples/train.py. Writes results/curves.json, curves.md and curves.png.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import matplotlib

import shufflenet_ext as se
from benchmarks import machine, pictures
from examples import train

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter

_RESULTS = Path(__file__).parent / "results"
_SEEDS = (0, 1, 2)
_NETWORK = ["--model=v1", "--groups=3", "--width=0.5"]  # the paper's 16 units, small enough for minutes on a CPU
_STYLES = {"reference": ("#999999", "-", 3.5), "native": ("#D55E00", "--", 1.3)}  # native is drawn over the reference
_ACCURACY, _SPEED = "held-out accuracy", "images a second"

Histories = dict[str, dict[int, list[dict[str, float]]]]  # by backend and seed


def run(arguments: list[str]) -> Histories:
    """Trains with each seed by each backend, in turn, so that all see the same disturbances."""
    histories: Histories = {backend: {} for backend in _STYLES}
    for seed in _SEEDS:
        for backend, of_seed in histories.items():
            with tempfile.TemporaryDirectory() as folder:
                train.main([f"--output={folder}", f"--seed={seed}", f"--backend={backend}", *arguments])
                of_seed[seed] = json.loads((Path(folder) / "history.json").read_text())
    return histories


def draw(histories: Histories) -> Any:
    """Losses and accuracies by epoch: a colour for each backend, a panel for each seed and quantity."""
    figure, panels = plt.subplots(2, len(_SEEDS), figsize=(12, 6), sharex=True, sharey="row", layout="constrained")
    for row, quantity in zip(panels, ("training loss", _ACCURACY), strict=True):
        for panel, seed in zip(row, _SEEDS, strict=True):
            for backend, (colour, line, width) in _STYLES.items():
                history = histories[backend][seed]
                epochs, values = [each["epoch"] for each in history], [each[quantity] for each in history]
                panel.plot(epochs, values, color=colour, linestyle=line, linewidth=width, label=backend)
            panel.grid(color="#DDDDDD")
            panel.set_title(f"{quantity}, seed {seed}")
    panels[1][0].yaxis.set_major_formatter(PercentFormatter(1))
    for panel in panels[1]:
        panel.set_xlabel("epoch")
    panels[0][0].legend(frameon=False)
    figure.suptitle("Training on digits by the native passes, over the reference")
    return figure


def table(histories: Histories, command: str, seconds: float) -> str:
    """The accuracies at the end and the speeds, as Markdown."""
    lines = [
        "# Training by the native passes and by the reference",
        "",
        f"{machine.processor()}, {se.build_info()['cpu_isa']} kernels, {seconds:.0f} s for all runs of",
        f"`{command}`.",
        "",
        "Accuracy on the 360 digits that are held out, after the last epoch; images a second, the median of epochs.",
        "Planes of 8×8 to 1×1 are too small for the native passes to gain by: most of a step goes to calls.",
        "",
        "| seed | reference | native | reference, images a second | native |",
        "|---|--:|--:|--:|--:|",
    ]
    ends = {backend: [of[seed][-1][_ACCURACY] for seed in _SEEDS] for backend, of in histories.items()}
    for i, seed in enumerate(_SEEDS):
        accuracies = " | ".join(f"{ends[backend][i]:.2%}" for backend in histories)
        speeds = " | ".join(f"{median(row[_SPEED] for row in of[seed]):.0f}" for of in histories.values())
        lines.append(f"| {seed} | {accuracies} | {speeds} |")
    means = " | ".join(f"{mean(each):.2%} ± {stdev(each):.2%}" for each in ends.values())
    lines += [f"| mean ± deviation | {means} | | |", "", "![Losses and accuracies by epoch](curves.png)", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=train.positive, default=6, help="(%(default)s)")
    parser.add_argument("--threads", type=train.positive, default=1, help="(%(default)s)")
    options = parser.parse_args()
    arguments = [*_NETWORK, f"--epochs={options.epochs}", f"--threads={options.threads}"]
    start = time.perf_counter()
    histories = run(arguments)
    command = f"examples/train.py {' '.join(arguments)}"
    text = table(histories, command, time.perf_counter() - start)
    (_RESULTS / "curves.json").write_text(json.dumps(histories, indent=1) + "\n")
    (_RESULTS / "curves.md").write_text(text)
    pictures.save(lambda: draw(histories), _RESULTS / "curves.png")
    print(text)


if __name__ == "__main__":
    main()
