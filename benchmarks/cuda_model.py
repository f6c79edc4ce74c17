"""A model of the CUDA kernels' speed, for the first GPU to refute: ``python -m benchmarks.cuda_model``; needs nvcc.

It is made of what launches execute, counted by running the kernels' PTX as the planner cuts each unit for each card
(benchmarks/cuda_counts.py). A launch takes

    time = launch + the longest of: DRAM, L2, shared memory, and issuing the instructions

of which the first is what any kernel needs that reads x and writes the result.
"""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import product
from pathlib import Path

from benchmarks import cuda_counts, cuda_toolkit
from benchmarks.cuda_counts import Count
from benchmarks.cuda_toolkit import LAYOUTS, Case, Plan
from benchmarks.cuda_units import GROUPS, Unit, paper_units
from benchmarks.shapes import IMAGE_SIZE

BATCHES = (1, 16, 64, 256)
ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "tfloat32": 4}
LAUNCH_S = 2.5e-6  # from a kernel's end to its successor's start in a CUDA graph; 2 to 3 µs have been measured
_OUTPUT = Path(__file__).parent / "results" / "cuda_model.md"
# What the planners assume of every device, by the names of device.h.
_ASSUMED = cuda_toolkit.constants("device.h")
_WAITS = 2  # for x, and for the first operands of weights, which a block does in turn
_WINDOW_WARPS = int(cuda_toolkit.constants("tiling.h")["kThreads"]) // 32


@dataclass(frozen=True)
class Card:
    """What a card's maker states. ``l2_per_cycle`` is stated for the A100 alone, and assumed for the others."""

    name: str
    multiprocessors: int
    clock: float  # Hz, boost
    dram: float  # bytes a second
    l2_per_cycle: int
    source: str


CARDS = {
    80: Card("A100 SXM", 108, 1.41e9, 2.039e12, 5120, "A100 data sheet and white paper"),
    89: Card("L40S", 142, 2.52e9, 0.864e12, 2048, "L40S data sheet; L2 assumed"),
    90: Card("H100 SXM", 132, 1.83e9, 3.35e12, 5120, "H100 data sheet; L2 assumed as A100's"),
    100: Card("B200", 148, 1.85e9, 8.0e12, 5120, "HGX B200 data sheet; L2 assumed as A100's"),
}


@dataclass(frozen=True)
class Cut:
    """How the planner cuts a unit: by strips or by windows, into how many blocks of so many warps."""

    by_strips: bool
    blocks: int
    warps: int
    busy: float  # the share of the warps that work at a time
    side_by_side: int  # blocks on a multiprocessor
    tiling: Mapping[str, int]  # by the names of a case

    @classmethod
    def of(cls, plan: Plan) -> "Cut":
        number = {key: value for key, value in plan.items() if isinstance(value, int)}
        if not number["by_strips"]:
            names = ("tile_rows", "tile_columns", "slices", "chunk", "tile_depth")
            tiling = {name: number[name] for name in names}
            return cls(False, number["windows"], _WINDOW_WARPS, 1, number["blocks"], tiling)
        tiling = {name: number[f"strip_{name}"] for name in ("rows", "slices", "warps", "gap")}
        busy = number["strip_busy_percent"] / 100
        return cls(True, number["strips"], tiling["warps"], busy, number["strip_blocks"], tiling)


@dataclass(frozen=True)
class Prediction:
    """Times in seconds, of one launch, and what it executes."""

    unit: Unit
    cut: Cut
    instructions: int
    dram_bytes: int
    l2_bytes: int
    dram: float
    l2: float
    shared: float
    issue: float

    @property
    def time(self) -> float:
        return LAUNCH_S + max(self.dram, self.l2, self.shared, self.issue)

    @property
    def bound(self) -> str:
        return max((self.dram, "DRAM"), (self.l2, "L2"), (self.shared, "shared memory"), (self.issue, "issue"))[1]

    @property
    def ratio(self) -> float:
        return self.time / self.dram


def predict(unit: Unit, element_bytes: int, card: Card, cut: Cut, count: Count) -> Prediction:
    """Predicts one launch, of which each image of the batch executes ``count``.

    Blocks run in rounds of as many as the card has room for. In a round a multiprocessor issues the instructions of its
    blocks, each warp that has work one in so many cycles, and each block waits for memory some times with nothing else
    to do.
    """
    rounds = math.ceil(cut.blocks / (cut.side_by_side * card.multiprocessors))
    busy_warps = cut.side_by_side * cut.warps * cut.busy
    a_cycle = min(_ASSUMED["kMostInstructions"], busy_warps / _ASSUMED["kWarpInterval"])
    of_round = cut.side_by_side * unit.batch / cut.blocks  # images, or parts of them
    issue = rounds * (of_round * count.executed / a_cycle + _WAITS * _ASSUMED["kLatency"])
    dram_bytes = element_bytes * unit.elements
    l2_bytes = cuda_counts.SECTOR_BYTES * unit.batch * count.global_sectors
    return Prediction(
        unit=unit,
        cut=cut,
        instructions=unit.batch * count.executed,
        dram_bytes=dram_bytes,
        l2_bytes=l2_bytes,
        dram=dram_bytes / card.dram,
        l2=l2_bytes / card.l2_per_cycle / card.clock,
        shared=rounds * of_round * count.shared_wavefronts / card.clock,
        issue=issue / card.clock,
    )


class Model:
    """Compiles the planner and the programs that count, and the kernels' PTX as it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._planner = cuda_toolkit.build_planner(folder)
        self._runners = cuda_counts.build_runners(folder)
        self._counts: dict[str, Count] = {}

    def compile(self, dtypes: Iterable[str], archs: Iterable[int]) -> None:
        """Compiles all that is asked for later, side by side."""
        kernels = {
            f"{kind}_{dtype}" for dtype in dtypes for kind in ("unit", "strip") if (kind, dtype) != ("strip", "float32")
        }
        wanted = sorted(product(kernels, {cuda_toolkit.ptx_arch(arch) for arch in archs}))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda one: cuda_toolkit.compile_ptx(*one), wanted))

    def predict(self, units: list[Unit], dtype: str, layout: str, sm: int) -> list[Prediction]:
        """Predicts a launch of each unit. Raises RuntimeError where a kernel's result is not right."""
        self.compile([dtype], [sm])
        plans = cuda_toolkit.plans(self._planner, [unit.case(dtype, layout, sm) for unit in units])
        cuts = [Cut.of(plan) for plan in plans]
        ones = [replace(unit, batch=1).case(dtype, layout, sm) for unit in units]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            counts = list(pool.map(self._count, ones, cuts))
        return [
            predict(unit, ELEMENT_BYTES[dtype], CARDS[sm], cut, count)
            for unit, cut, count in zip(units, cuts, counts, strict=True)
        ]

    def _count(self, one: Case, cut: Cut) -> Count:
        """What one image executes, cut as its batch is."""
        case = {**one, **cut.tiling}
        key = repr(sorted((case | {"sm": cuda_toolkit.ptx_arch(int(case["sm"]))}).items()))
        if key not in self._counts:
            kind = "strip" if cut.by_strips else "unit"
            counted = cuda_counts.count({kind: self._runners[kind]}, case)
            self._counts[key] = sum(counted.values(), Count())
        return self._counts[key]


# ---- The report -----------------------------------------------------------------------------------------------------


def in_us(seconds: float) -> str:
    """Formats a time in µs: with three digits, or from 1000 on as a whole number."""
    value = seconds * 1e6
    return f"{value:.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


def _table(columns: list[str], rows: Iterable[list[str]], left: int) -> Iterator[str]:
    yield ""
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * left + "--:|" * (len(columns) - left)
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _detail(model: Model, dtype: str, layout: str, sm: int) -> Iterator[str]:
    columns = ["unit", "batch", "blocks", "on an SM", "warp instructions", "DRAM MB", "L2 MB"]
    columns += ["DRAM", "L2", "shared", "issue", "predicted", "× DRAM"]
    rows = []
    for batch in BATCHES:
        units = paper_units(batch)
        for label, p in zip(units, model.predict(list(units.values()), dtype, layout, sm), strict=True):
            cells = [label, str(batch), str(p.cut.blocks), f"{p.cut.side_by_side} × {p.cut.warps} warps"]
            cells += [f"{p.instructions / 1e6:.2f} M", f"{p.dram_bytes / 1e6:.3g}", f"{p.l2_bytes / 1e6:.3g}"]
            cells += [in_us(time) for time in (p.dram, p.l2, p.shared, p.issue)]
            rows.append([*cells, f"**{in_us(p.time)}** ({p.bound})", f"{p.ratio:.2f}"])
    yield from _table(columns, rows, 1)


def _overview(model: Model, batch: int) -> Iterator[str]:
    units = paper_units(batch)
    rows = []
    for sm, dtype, layout in product(CARDS, ELEMENT_BYTES, LAYOUTS):
        predictions = model.predict(list(units.values()), dtype, layout, sm)
        cells = [f"{in_us(p.time)} ({p.ratio:.2f}, {p.bound})" for p in predictions]
        kinds = sorted({"strips" if p.cut.by_strips else "windows" for p in predictions})
        rows.append([CARDS[sm].name, dtype, layout, " and ".join(kinds), *cells])
    yield from _table(["card", "dtype", "layout", "by", *units], rows, 4)


def report(model: Model) -> Iterator[str]:
    """Yields the lines of the report, in Markdown."""
    model.compile(ELEMENT_BYTES, CARDS)
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    yield "# What the CUDA kernels should take: a model"
    yield ""
    yield (
        f"Written by `python -m benchmarks.cuda_model` on {date} with CUDA {cuda_toolkit.toolkit_version()}. **No GPU "
        "has seen these numbers**: they are a prediction, made so that the first card can refute it; `make bench-cuda` "
        f"puts it beside what it measures. Units of ShuffleNet 1×, g = {GROUPS}, at {IMAGE_SIZE}²."
    )
    yield ""
    yield (
        "All is made of [counts](cuda_counts.md): the kernels' PTX, run on the CPU as the planner cuts each unit for "
        "the card. Times in µs: of DRAM for x, the result and the parameters, once each; of L2 for the sectors that "
        "all accesses of global memory touch; of shared memory for its wavefronts, bank conflicts included; *issue*, "
        f"of the instructions. Predicted is the sum of {LAUNCH_S * 1e6:g} µs for the launch and the longest of these. "
        "What packs weights for strips, once or by each call, is not in it."
    )
    yield ""
    yield "What a card must check first, as the rest stands on it:"
    yield ""
    yield (
        f"- A warp issues an instruction in {_ASSUMED['kWarpInterval']:g} cycles, and the warps of a multiprocessor at "
        f"most {_ASSUMED['kMostInstructions']:g} a cycle. At 8 warps on a multiprocessor the first decides."
    )
    yield "- An instruction of PTX is one of the machine's. ptxas drops some and splits others."
    yield f"- A block waits {_WAITS} times for memory, {_ASSUMED['kLatency']:g} cycles each, with nothing else to do."
    yield "- L2's bandwidth, which makers do not state, and clocks, which are those of the boost."
    cards = []
    for sm, card in CARDS.items():
        cells = [card.name, f"sm_{sm}", str(card.multiprocessors), f"{card.clock / 1e9:g}", f"{card.dram / 1e12:g}"]
        cards.append([*cells, f"{card.l2_per_cycle * card.clock / 1e12:.3g}", card.source])
    yield from _table(["card", "", "SMs", "GHz", "DRAM TB/s", "L2 TB/s", "source"], cards, 2)
    for layout in reversed(LAYOUTS):
        yield ""
        yield f"## {CARDS[90].name}, float16, {layout}"
        yield from _detail(model, "float16", layout, 90)
    for batch in (64, 256):
        yield ""
        yield f"## Every card at batch {batch}: µs (times the DRAM floor, bound)"
        yield from _overview(model, batch)


def main(arguments: list[str] | None = None) -> int:
    """Writes the report; returns an exit code, 1 where there is no nvcc."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_model", description=__doc__)
    parser.add_argument("--output", type=Path, default=_OUTPUT, help="the report (default: %(default)s)")
    options = parser.parse_args(arguments)
    if cuda_toolkit.nvcc() is None:
        print("the model needs nvcc (on PATH, or by CUDA_HOME), for the kernels' PTX", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        lines = list(report(Model(Path(folder))))
    options.output.write_text("\n".join(lines) + "\n")
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
