"""The demonstration: trains a small ShuffleNet on real handwritten digits and compares the three ways to run it.

Needs the extra ``demo``; nothing else of the package imports this module.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from shufflenet_ext import build_info, models, optimize_for_inference, use_backend
from shufflenet_ext._backend import Backend
from shufflenet_ext.digits import HELD_OUT, Digits, load, shifted

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine

BATCH = 64
LEARNING_RATE = 3e-3
LARGEST_SHIFT = 2  # pixels of 32, of the training images
LOWEST_ACCURACY = 0.95
LARGEST_DIFFERENCE = 1e-4  # of two logits, relative to the largest logit: float32 through 17 layers
LATENCY_ROUNDS = {1: 60, 64: 12}  # by batch size


@dataclass
class Way:
    """One way to run the trained network, and what was measured of it."""

    name: str
    run: Callable[[Tensor], Tensor]
    logits: Tensor
    accuracy: float
    milliseconds: dict[int, float]

    def difference(self, other: "Way") -> float:
        return float((self.logits - other.logits).abs().max())


def train(digits: Digits, epochs: int, console: Console) -> nn.Module:
    """ShuffleNetG3 of fused units, trained with fixed seeds; in eval mode."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = models.ShuffleNetG3().train()
    steps = len(digits.train_labels) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * steps)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=epochs * steps, loss=float("nan"))
        for _ in range(epochs):
            order = torch.randperm(len(digits.train_labels), generator=generator)
            for batch in order[: steps * BATCH].split(BATCH):
                top, left = torch.randint(2 * LARGEST_SHIFT + 1, (2,), generator=generator).tolist()
                logits = model(shifted(digits.train_images[batch], top, left, LARGEST_SHIFT))
                loss = F.cross_entropy(logits, digits.train_labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update(task, advance=1, loss=loss.item())
    return model.eval()


def _through(
    model: nn.Module, backend: Backend, memory_format: torch.memory_format = torch.contiguous_format
) -> Callable[[Tensor], Tensor]:
    def run(images: Tensor) -> Tensor:
        with torch.no_grad(), use_backend(backend):
            return model(images.contiguous(memory_format=memory_format))

    return run


def compare(model: nn.Module, digits: Digits, console: Console) -> list[Way]:
    """The ways to run the model, the reference first: what they answer on the held-out part, and how fast."""
    # The weights too: the shuffle's copy is contiguous, and only they bring channels_last back.
    channels_last = copy.deepcopy(model)
    channels_last.to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]
    runs = {
        "reference": _through(model, "reference"),
        "reference, channels_last": _through(channels_last, "reference", torch.channels_last),
        "fused units": _through(model, "native"),
        "optimize_for_inference": _through(optimize_for_inference(model), "native"),
    }
    ways = []
    for name, run in runs.items():
        logits = torch.cat([run(images) for images in digits.test_images.split(BATCH)])
        accuracy = float((logits.argmax(1) == digits.test_labels).float().mean())
        ways.append(Way(name, run, logits, accuracy, {}))
    with console.status("measuring latency"):
        for batch, rounds in LATENCY_ROUNDS.items():
            images = digits.test_images[:batch]
            seconds: list[list[float]] = [[] for _ in ways]
            for i in range(rounds + 2):  # two to warm up; interleaved, so that all see the same disturbances
                for way, measured in zip(ways, seconds, strict=True):
                    start = time.perf_counter()
                    way.run(images)
                    if i >= 2:
                        measured.append(time.perf_counter() - start)
            for way, measured in zip(ways, seconds, strict=True):
                way.milliseconds[batch] = 1e3 * statistics.median(measured)
    return ways


def _table(ways: list[Way]) -> Table:
    title = f"ShuffleNetG3 on {HELD_OUT} held-out digits, float32, {torch.get_num_threads()} threads"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("through", no_wrap=True)
    table.add_column("accuracy", justify="right")
    table.add_column("logits\ndiffer by", justify="right")
    for batch in LATENCY_ROUNDS:
        table.add_column(f"batch {batch}\nms, faster", justify="right")
    reference = ways[0]
    for way in ways:
        difference = "" if way is reference else f"{way.difference(reference):.1e}"
        row = [way.name, f"{way.accuracy:.2%}", difference]
        for batch, milliseconds in way.milliseconds.items():
            row.append(f"{milliseconds:.2f}  {reference.milliseconds[batch] / milliseconds:4.1f}×")
        table.add_row(*row)
    return table


INK, MUTED, BARS, GOOD, BAD = "#1b1f24", "#6b7280", ("#b6bcc6", "#8b939f", "#4c8bd6", "#0b57a4"), "#1a7f37", "#c62828"


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(length=0, colors=INK)


def _latency_bars(axes: Axes, ways: list[Way], batch: int) -> None:
    milliseconds = [way.milliseconds[batch] for way in ways]
    bars = axes.barh(range(len(ways)), milliseconds, color=BARS, height=0.68)
    labels = [f"{ms:.2f} ms   {milliseconds[0] / ms:.1f}×" for ms in milliseconds]
    axes.bar_label(bars, labels, padding=5, color=INK, fontsize=9)
    axes.set_yticks(range(len(ways)), [way.name for way in ways])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.38 * max(milliseconds))
    axes.set_xticks([])
    axes.set_title(f"Latency at batch {batch}, and how much faster", loc="left", fontsize=11, color=INK)
    _plain(axes)


def _difference_histogram(axes: Axes, ways: list[Way]) -> None:
    reference = ways[0]
    for way, colour in zip(ways[2:], BARS[2:], strict=True):
        differences = (way.logits - reference.logits).abs().flatten().clamp_min(1e-8).log10().numpy()
        axes.hist(differences, bins=48, range=(-8, -3), histtype="step", linewidth=1.6, color=colour, label=way.name)
    axes.set_ylim(top=1.4 * axes.get_ylim()[1])  # room for the legend
    limit = torch.tensor(LARGEST_DIFFERENCE * float(reference.logits.abs().max())).log10().item()
    axes.axvline(limit, color=BAD, linewidth=1.2)
    axes.text(limit, 0.98, " limit", color=BAD, fontsize=9, va="top", transform=axes.get_xaxis_transform())
    axes.set_xticks(range(-8, -2), [f"$10^{{{power}}}$" for power in range(-8, -2)])
    axes.set_yticks([])
    axes.set_title("Differences from the reference's logits", loc="left", fontsize=11, color=INK)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    _plain(axes)


def draw(ways: list[Way], digits: Digits, path: Path) -> None:
    """The picture: latencies and differences above, classified digits below, the wrongly classified ones first."""
    rows, columns = 3, 12
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
    figure = plt.figure(figsize=(13, 8), facecolor="white", layout=layout)
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.5)).flat
    top.suptitle(
        "ShuffleNetG3 on handwritten digits: the same network, four ways to run it",
        fontsize=14,
        color=INK,
        x=0.01,
        ha="left",
    )
    latency1, latency64, difference = top.subplots(1, 3, width_ratios=(1.35, 1, 1.1))
    _latency_bars(latency1, ways, 1)
    _latency_bars(latency64, ways, 64)
    latency64.set_yticks([])
    _difference_histogram(difference, ways)

    fused = ways[-1]
    probabilities, predictions = fused.logits.softmax(1).max(1)
    right = predictions == digits.test_labels
    wrong = (~right).nonzero().flatten().tolist()
    shown = [*wrong, *right.nonzero().flatten().tolist()][: rows * columns]
    bottom.suptitle(
        f"{fused.name}: {int(right.sum())} of {len(right)} held-out digits right ({fused.accuracy:.1%}), "
        "wrong ones first; above each its prediction, below the probability",
        fontsize=11,
        color=INK,
        x=0.01,
        ha="left",
    )
    for axes, i in zip(bottom.subplots(rows, columns).flat, shown, strict=True):
        axes.imshow(digits.test_images[i, 0], cmap="gray_r", interpolation="nearest")
        answer = f"{int(predictions[i])}" if right[i] else f"{int(predictions[i])}, is {int(digits.test_labels[i])}"
        axes.set_title(answer, fontsize=11, color=GOOD if right[i] else BAD, fontweight="bold", pad=3)
        axes.set_xlabel(f"{probabilities[i]:.0%}", fontsize=8, color=MUTED, labelpad=2)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color(BAD if not right[i] else "#d5d9df")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def faults(ways: list[Way]) -> list[str]:
    """What is wrong with the results; empty if they are good."""
    reference = ways[0]
    limit = LARGEST_DIFFERENCE * float(reference.logits.abs().max())
    found = []
    for way in ways:
        if not way.accuracy > LOWEST_ACCURACY:
            found.append(f"{way.name}: accuracy {way.accuracy:.2%}, expected over {LOWEST_ACCURACY:.0%}")
    for i, way in enumerate(ways):
        for other in ways[:i]:
            if not way.difference(other) <= limit:
                pair = f"{way.name} and {other.name}"
                found.append(f"{pair}: logits differ by {way.difference(other):.2e}, expected at most {limit:.2e}")
    return found


def run(output: Path, epochs: int) -> int:
    """Runs the demonstration, writes its picture to ``output`` and returns the exit status: 1 if a result is bad."""
    console = Console()
    info = build_info()
    if info["native_error"]:
        console.print(f"The demo compares native kernels with the reference, but {info['native_error']}.")
        return 1
    start = time.perf_counter()
    digits = load()
    console.print(
        f"{len(digits.train_labels)} digits to train on, {HELD_OUT} held out; "
        f"{torch.get_num_threads()} threads, kernels for {info['cpu_isa']}"
    )
    model = train(digits, epochs, console)
    ways = compare(model, digits, console)
    console.print(_table(ways))
    largest = max(way.difference(other) for way in ways for other in ways)
    console.print(f"Largest difference between any two: {largest:.2e}; largest logit {ways[0].logits.abs().max():.1f}")
    draw(ways, digits, output)
    console.print(f"Picture: {output.resolve()}", soft_wrap=True)
    console.print(f"Took {time.perf_counter() - start:.0f} s")
    found = faults(ways)
    for fault in found:
        console.print(f"BAD: {fault}", soft_wrap=True)
    return 1 if found else 0
