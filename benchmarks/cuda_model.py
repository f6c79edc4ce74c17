"""A model of the CUDA kernels' speed, for the first GPU to refute: ``python -m benchmarks.cuda_model``; needs nvcc.

From the planner's choice and what ptxas says, it counts what a launch of each unit moves and computes, and predicts

    time = launch + the longest of: DRAM, L2, and the planner's own estimate of a multiprocessor's work

The last cannot be below what tensor cores (or FMA) and shared memory need. These bounds are shown as well.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import product
from pathlib import Path

import torch

import shufflenet_ext as se
from benchmarks import cuda_toolkit
from benchmarks.cuda_toolkit import LAYOUTS, Case, Kernel
from benchmarks.shapes import IMAGE_SIZE

GROUPS = 3
BATCHES = (1, 16, 64, 256)
ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "tfloat32": 4}
LAUNCH_S = 2.5e-6  # from a kernel's end to its successor's start in a CUDA graph; 2 to 3 µs have been measured
_OUTPUT = Path(__file__).parent / "results" / "cuda_model.md"
_TILES = cuda_toolkit.tile_constants()


@dataclass(frozen=True)
class Card:
    """What a card's maker states, without sparsity. ``tensor_flop`` (of 16 bits, with float32 sums) and ``fma_flop``
    (of float32) are those of a multiprocessor in one cycle. ``l2_per_cycle`` is stated for the A100 alone, and assumed
    for the others."""

    name: str
    multiprocessors: int
    threads_per_multiprocessor: int
    clock: float  # Hz, boost
    dram: float  # bytes a second
    l2_per_cycle: int
    tensor_flop: int
    fma_flop: int
    source: str


# Tensor-core rates are those of the fastest instructions; on sm_90 and sm_100 mma.sync, which the kernels use, reaches
# about 60 % and less of them. Clocks follow from the stated rates.
CARDS = {
    80: Card("A100 SXM", 108, 2048, 1.41e9, 2.039e12, 5120, 2048, 128, "A100 data sheet and white paper"),
    89: Card("L40S", 142, 1536, 2.52e9, 0.864e12, 2048, 1024, 256, "L40S data sheet; L2 assumed"),
    90: Card("H100 SXM", 132, 2048, 1.83e9, 3.35e12, 5120, 4096, 256, "H100 data sheet; L2 assumed as A100's"),
    100: Card("B200", 148, 2048, 1.85e9, 8.0e12, 5120, 8192, 256, "HGX B200 data sheet; L2 assumed as A100's"),
}


@dataclass(frozen=True)
class Unit:
    batch: int
    in_channels: int
    height: int
    width: int
    mid_channels: int
    out_channels: int
    conv1_groups: int
    groups: int
    stride: int

    @classmethod
    def of(cls, module: se.ShuffleBottleneck, x: torch.Tensor) -> "Unit":
        mid, out = module.conv1.out_channels, module.conv3.out_channels
        batch, in_channels, height, width = x.shape
        return cls(batch, in_channels, height, width, mid, out, module.conv1.groups, module.groups, module.stride)

    @property
    def out_size(self) -> tuple[int, int]:
        return (self.height - 1) // self.stride + 1, (self.width - 1) // self.stride + 1

    @property
    def slice_channels(self) -> int:
        return self.mid_channels // self.groups

    @property
    def pool_channels(self) -> int:
        return self.in_channels if self.stride == 2 else 0

    @property
    def weights(self) -> int:
        depths = self.in_channels // self.conv1_groups + 1, 9 + 1
        return self.mid_channels * sum(depths) + self.out_channels * (self.slice_channels + 1)

    @property
    def elements(self) -> int:
        """How many elements have to be moved: x, the result and the parameters, each once."""
        height, width = self.out_size
        results = (self.out_channels + self.pool_channels) * height * width
        return self.batch * (self.in_channels * self.height * self.width + results) + self.weights

    @property
    def multiply_adds(self) -> int:
        pixels, results = self.height * self.width, self.out_size[0] * self.out_size[1]
        conv1 = pixels * self.mid_channels * self.in_channels // self.conv1_groups
        return self.batch * (conv1 + results * (9 * self.mid_channels + self.out_channels * self.slice_channels))

    def case(self, dtype: str, layout: str, sm: int) -> Case:
        return {
            **{"n": self.batch, "in": self.in_channels, "h": self.height, "w": self.width, "mid": self.mid_channels},
            **{"out": self.out_channels, "g1": self.conv1_groups, "g": self.groups, "stride": self.stride},
            **{"dtype": dtype, "layout": "nhwc" if layout == "channels_last" else "nchw", "sm": sm},
        }


@dataclass
class Counts:
    """What the blocks of a launch do: elements read from L2 or written to it; multiply-adds, those on padding and halo
    included; and wavefronts, which are cycles of shared memory if no access meets a bank conflict."""

    l2_elements: int = 0
    multiply_adds: int = 0
    wavefronts: int = 0

    def add(self, other: "Counts", times: int) -> None:
        self.l2_elements += other.l2_elements * times
        self.multiply_adds += other.multiply_adds * times
        self.wavefronts += other.wavefronts * times


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(n: int, multiple: int) -> int:
    return _ceil_div(n, multiple) * multiple


def _next_rows(n: int) -> int:
    """The same as next_rows in unit_kernel.cuh."""
    return min(n, _round_up(_ceil_div(n, _ceil_div(n, _TILES["kTileRows"])), 8))


def _conv1_tiles(unit: Unit, begin: int, end: int) -> Iterator[int]:
    """The rows of each tile that computes shuffled channels [begin, end): the same as find_runs in unit_kernel.cuh."""
    group_rows = unit.mid_channels // unit.conv1_groups
    for r in range(unit.groups):
        row = r * unit.slice_channels + _ceil_div(begin - r, unit.groups)
        run_end = r * unit.slice_channels + _ceil_div(end - r, unit.groups)
        while row < run_end:
            rows = _next_rows(min(run_end, (row // group_rows + 1) * group_rows) - row)
            yield rows
            row += rows


def _product(lines: int, places: int, depth: int, element: int, mma: bool, depth_major: bool = False) -> Counts:
    """Counts Engine::multiply in unit_kernel.cuh for all tiles of 16 lines: loading fragments, and their product."""
    tiles, eights = _ceil_div(lines, 16), _ceil_div(places, 8)
    step = (_TILES["kStepBytes"] if mma else 8) // element  # the depth that is loaded at a time
    steps = _ceil_div(depth, step)
    # Loads of 128 bytes each: of matrices for tensor cores, of 8 bytes a row for FMA.
    loads = 4 + 4 * _ceil_div(eights, 2) if mma else 2 * (step if depth_major else 1) + 2 * eights
    return Counts(multiply_adds=tiles * 16 * eights * 8 * steps * step, wavefronts=tiles * steps * loads)


def _window(
    unit: Unit, in_pixels: int, out_pixels: int, chunks: list[list[int]], element: int, mma: bool, planes: bool
) -> Counts:
    """Counts a block's work on one window. ``chunks`` has, for each chunk of channels, the rows of conv1's tiles."""
    counts = Counts()
    slices = sum(map(sum, chunks)) // unit.slice_channels
    depth, group_rows = unit.in_channels // unit.conv1_groups, unit.out_channels // unit.groups

    def stage(elements: int) -> None:
        counts.l2_elements += elements
        counts.wavefronts += _ceil_div(elements * element, 128)

    for tiles in chunks:
        channels = sum(tiles)
        stage(channels * depth)
        for rows in tiles:
            stage(in_pixels * depth)
            counts.add(_product(in_pixels, rows, depth, element, mma, depth_major=planes), 1)
        counts.l2_elements += 12 * channels
        counts.multiply_adds += 9 * channels * out_pixels
        # Warps write 32 values of y1; by pairs, each result's column reads three times y1, and y2 is written.
        pairs = channels * out_pixels * (3 * unit.stride + 1)
        counts.wavefronts += _ceil_div(channels * in_pixels, 32) + _ceil_div(pairs * element, 128)
    lines, elements = (group_rows, out_pixels) if planes else (out_pixels, group_rows)
    for _ in range(slices):
        stage(group_rows * unit.slice_channels)
        places = _TILES["kElements"]
        counts.add(_product(lines, places, unit.slice_channels, element, mma), _ceil_div(elements, places))
        counts.l2_elements += out_pixels * group_rows * (2 if unit.stride == 1 else 1)  # the result; x to be added
    counts.l2_elements += unit.pool_channels * slices // unit.groups * (in_pixels + out_pixels)
    return counts


def count(unit: Unit, plan: dict[str, int | str], element: int, mma: bool, layout: str) -> Counts:
    """Counts a whole launch, window by window as the kernel cuts them; those of one size are counted together."""

    def sizes(length: int, out_length: int, tile: int) -> Counter[tuple[int, int]]:
        """How many windows there are of each (input, output) length along one side."""
        found: Counter[tuple[int, int]] = Counter()
        for begin in range(0, out_length, tile):
            out = min(tile, out_length - begin)
            first = begin * unit.stride - 1
            found[min(first + (out - 1) * unit.stride + 3, length) - max(first, 0), out] += 1
        return found

    def chunks(first_slice: int, slices: int) -> list[list[int]]:
        end = (first_slice + slices) * unit.slice_channels
        begins = range(first_slice * unit.slice_channels, end, int(plan["chunk"]))
        return [list(_conv1_tiles(unit, begin, min(begin + int(plan["chunk"]), end))) for begin in begins]

    height, width = unit.out_size
    rows, columns = (
        sizes(length, out, int(plan[tile])).items()
        for length, out, tile in ((unit.height, height, "tile_rows"), (unit.width, width, "tile_columns"))
    )
    total = Counts()
    for begin in range(0, unit.groups, int(plan["slices"])):
        part = chunks(begin, min(int(plan["slices"]), unit.groups - begin))
        for ((in_rows, out_rows), n), ((in_columns, out_columns), m) in product(rows, columns):
            window = _window(
                unit, in_rows * in_columns, out_rows * out_columns, part, element, mma, layout == "contiguous"
            )
            total.add(window, unit.batch * n * m)
    return total


@dataclass(frozen=True)
class Prediction:
    """Times in seconds, of one launch."""

    unit: Unit
    plan: dict[str, int | str]
    registers: int
    blocks: int  # on a multiprocessor
    occupancy: float
    waves: float
    dram_bytes: int
    l2_bytes: int
    useful_flop: int
    executed_flop: int
    dram: float
    l2: float
    multiprocessor: float  # by the planner's estimate
    arithmetic: float
    shared: float

    @property
    def time(self) -> float:
        return LAUNCH_S + max(self.dram, self.l2, self.multiprocessor)

    @property
    def bound(self) -> str:
        return max((self.dram, "DRAM"), (self.l2, "L2"), (self.multiprocessor, "SM"))[1]

    @property
    def ratio(self) -> float:
        return self.time / self.dram


def predict(unit: Unit, dtype: str, layout: str, sm: int, plan: dict[str, int | str], kernel: Kernel) -> Prediction:
    """Predicts one launch on ``CARDS[sm]``."""
    card, element = CARDS[sm], ELEMENT_BYTES[dtype]
    mma = "tensor cores" in str(plan["explanation"])
    counts = count(unit, plan, element, mma, layout)
    flop = card.tensor_flop * 2 // element if mma else card.fma_flop
    per_block = _round_up(kernel.registers, 8) * _TILES["kThreads"]
    blocks = min(int(plan["blocks"]), 65536 // per_block)
    dram_bytes, l2_bytes = element * unit.elements, element * counts.l2_elements
    cycles_a_second = card.multiprocessors * card.clock
    return Prediction(
        unit=unit,
        plan=plan,
        registers=kernel.registers,
        blocks=blocks,
        occupancy=blocks * _TILES["kThreads"] / card.threads_per_multiprocessor,
        waves=int(plan["windows"]) / (card.multiprocessors * blocks),
        dram_bytes=dram_bytes,
        l2_bytes=l2_bytes,
        useful_flop=2 * unit.multiply_adds,
        executed_flop=2 * counts.multiply_adds,
        dram=dram_bytes / card.dram,
        l2=l2_bytes / card.l2_per_cycle / card.clock,
        multiprocessor=int(plan["cycles"]) / card.clock,
        arithmetic=2 * counts.multiply_adds / flop / cycles_a_second,
        shared=counts.wavefronts / cycles_a_second,
    )


class Model:
    """Compiles the planner, and the kernels of each dtype and architecture as they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._planner = cuda_toolkit.build_planner(folder)
        self._kernels: dict[tuple[str, int], list[Kernel]] = {}

    def compile(self, dtypes: Iterable[str], archs: Iterable[int]) -> None:
        wanted = [pair for pair in product(dtypes, archs) if pair not in self._kernels]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            built = pool.map(lambda pair: cuda_toolkit.compile_kernels(pair[0], str(pair[1]), self._folder)[1], wanted)
            self._kernels.update(zip(wanted, built, strict=True))

    def kernel(self, dtype: str, layout: str, sm: int) -> Kernel:
        self.compile([dtype], [sm])
        return next(kernel for kernel in self._kernels[dtype, sm] if kernel.layout == layout)

    def predict(self, units: list[Unit], dtype: str, layout: str, sm: int) -> list[Prediction]:
        plans = cuda_toolkit.plans(self._planner, [unit.case(dtype, layout, sm) for unit in units])
        kernel = self.kernel(dtype, layout, sm)
        return [predict(unit, dtype, layout, sm, plan, kernel) for unit, plan in zip(units, plans, strict=True)]


def paper_units(batch: int) -> dict[str, Unit]:
    """The distinct units of the paper's network, by label."""
    units = {}
    with torch.device("meta"):
        network = se.models.shufflenet_v1(GROUPS)
        for stage, stride in product((2, 3, 4), (2, 1)):
            module = getattr(network, f"layer{stage - 1}")[0 if stride == 2 else 1]
            size = IMAGE_SIZE // 2**stage // (1 if stride == 2 else 2)
            x = torch.empty(batch, module.conv1.in_channels, size, size)
            units[f"stage {stage} stride {stride}"] = Unit.of(module, x)
    return units


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
    columns = ["unit", "batch", "rows × slices × depth", "blocks", "on an SM", "waves", "DRAM MB", "L2 MB"]
    columns += ["MFLOP", "executed", "DRAM", "L2", "SM", "arithmetic", "shared", "predicted", "× DRAM"]
    rows = []
    for batch in BATCHES:
        units = paper_units(batch)
        predictions = model.predict(list(units.values()), dtype, layout, sm)
        for label, p in zip(units, predictions, strict=True):
            plan = p.plan
            cells = [label, str(batch), f"{plan['tile_rows']} × {plan['slices']} × {plan['tile_depth']}"]
            cells += [str(plan["windows"]), f"{p.blocks} ({p.occupancy:.0%})", f"{p.waves:.2g}"]
            cells += [f"{p.dram_bytes / 1e6:.3g}", f"{p.l2_bytes / 1e6:.3g}", f"{p.useful_flop / 1e6:.0f}"]
            cells += [
                f"{p.executed_flop / p.useful_flop:.2f}×",
                in_us(p.dram),
                in_us(p.l2),
                in_us(p.multiprocessor),
            ]
            cells += [
                in_us(p.arithmetic),
                in_us(p.shared),
                f"**{in_us(p.time)}** ({p.bound})",
                f"{p.ratio:.2f}",
            ]
            rows.append(cells)
    yield from _table(columns, rows, 1)


def _overview(model: Model, batch: int) -> Iterator[str]:
    units = paper_units(batch)
    rows = []
    for sm, dtype, layout in product(CARDS, ELEMENT_BYTES, LAYOUTS):
        predictions = model.predict(list(units.values()), dtype, layout, sm)
        cells = [f"{in_us(p.time)} ({p.ratio:.2f}, {p.bound})" for p in predictions]
        rows.append([CARDS[sm].name, dtype, layout, str(model.kernel(dtype, layout, sm).registers), *cells])
    yield from _table(["card", "dtype", "layout", "registers", *units], rows, 3)


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
        "Depth: channels of x that a warp multiplies at a time. Bytes from DRAM are x, the result and the parameters, "
        "once each; bytes through L2 count every reading of them: x with halos, and once for each run of conv1's rows "
        "that a tile multiplies. FLOP are the convolutions' own; executed ones, as a multiple of these, "
        "have halos and the padding to tiles. Registers are ptxas'. Times in µs: of DRAM and L2 at their bandwidths; "
        "*SM*, the estimate by which the planner chose (its cycles at the boost clock); floors of tensor cores (in "
        "float32: FMA; tfloat32 is float32 multiplied as TF32) and of shared memory without bank conflicts. "
        f"Predicted is the sum of {LAUNCH_S * 1e6:g} µs for the launch and the longest of DRAM, L2 and SM."
    )
    cards = []
    for sm, card in CARDS.items():
        cells = [card.name, f"sm_{sm}", str(card.multiprocessors), f"{card.clock / 1e9:g}", f"{card.dram / 1e12:g}"]
        cells += [
            f"{card.l2_per_cycle * card.clock / 1e12:.3g}",
            str(card.tensor_flop),
            str(card.fma_flop),
            card.source,
        ]
        cards.append(cells)
    columns = ["card", "", "SMs", "GHz", "DRAM TB/s", "L2 TB/s", "FLOP/cycle/SM, 16 bits", "float32", "source"]
    yield from _table(columns, cards, 2)
    yield ""
    yield f"## {CARDS[90].name}, float16, channels_last"
    yield from _detail(model, "float16", "channels_last", 90)
    yield ""
    yield "## Every card at batch 64: µs (times the DRAM floor, bound)"
    yield from _overview(model, 64)


def main(arguments: list[str] | None = None) -> int:
    """Writes the report; returns an exit code, 1 where there is no nvcc."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_model", description=__doc__)
    parser.add_argument("--output", type=Path, default=_OUTPUT, help="the report (default: %(default)s)")
    options = parser.parse_args(arguments)
    if cuda_toolkit.nvcc() is None:
        print("the model needs nvcc (on PATH, or by CUDA_HOME), for ptxas' figures", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        lines = list(report(Model(Path(folder))))
    options.output.write_text("\n".join(lines) + "\n")
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
