"""The units that a first contact runs, as lines of tests/cuda/case.h. Only the standard library is imported."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from benchmarks.cuda_toolkit import Case

BATCHES = (1, 16, 64, 256)
DTYPES = ("float16", "bfloat16", "float32", "tfloat32", "float64")
TIMED_DTYPES = DTYPES[:-1]
LAYOUTS = {"channels_last": "nhwc", "contiguous": "nchw"}
_TILE_DEPTH_BYTES = (160, 64, 32)  # kTileDepthBytes in planner.h
_STRIP_WARPS, _STRIP_GAPS = (12, 10, 8, 6, 4, 2), (8, 1)  # as in strip_planner.h, of the cards that have most


@dataclass(frozen=True)
class PaperUnit:
    """A unit of ShuffleNet 1x with three groups at 224 x 224; ``size`` is its input's height and width."""

    label: str
    in_channels: int
    mid_channels: int
    out_channels: int
    conv1_groups: int
    stride: int
    size: int

    def case(self, dtype: str, layout: str, batch: int) -> Case:
        return {
            **{"n": batch, "in": self.in_channels, "h": self.size, "w": self.size, "mid": self.mid_channels},
            **{"out": self.out_channels, "g1": self.conv1_groups, "g": 3, "stride": self.stride},
            **{"dtype": dtype, "layout": LAYOUTS[layout]},
        }


UNITS = (
    PaperUnit("stage 2 stride 2", 24, 60, 216, 1, 2, 56),
    PaperUnit("stage 2 stride 1", 240, 60, 240, 3, 1, 28),
    PaperUnit("stage 3 stride 2", 240, 120, 240, 3, 2, 28),
    PaperUnit("stage 3 stride 1", 480, 120, 480, 3, 1, 14),
    PaperUnit("stage 4 stride 2", 480, 240, 480, 3, 2, 14),
    PaperUnit("stage 4 stride 1", 960, 240, 960, 3, 1, 7),
)
# In their place in a rehearsal, with the dtypes that it has kernels for.
TINY_UNITS = (
    PaperUnit("stage 2 stride 2", 12, 9, 12, 1, 2, 4),
    PaperUnit("stage 2 stride 1", 24, 12, 24, 3, 1, 3),
)
TINY_DTYPES = ("float16", "float32")


def line(case: Case) -> str:
    return " ".join(f"{key}={value}" for key, value in case.items())


def random_units(seed: int, count: int, dtypes: tuple[str, ...]) -> Iterable[Case]:
    """Units of all kinds and odd sizes."""
    rng = random.Random(seed)
    for i in range(count):
        groups = rng.choice([1, 2, 3, 4, 8])
        conv1_groups = rng.choice([1, groups])
        stride = rng.choice([1, 2])
        inputs = conv1_groups * rng.choice([1, 3, 5, 8, 10, 16, 17, 24, 33, 40])
        outputs = groups * rng.choice([0, 1, 4, 7, 8, 65 if groups < 3 else 9])
        if stride == 1 and outputs:
            inputs = outputs = groups * rng.choice([1, 2, 3, 8, 11])
        yield {
            **{"n": rng.choice([1, 2, 3]), "in": inputs, "mid": groups * rng.choice([1, 2, 3, 5, 8, 9])},
            **{"h": rng.choice([1, 2, 3, 5, 7, 8, 9, 14, 17]), "w": rng.choice([1, 2, 3, 6, 7, 8, 13, 16, 33])},
            **{"out": outputs, "g1": conv1_groups, "g": groups, "stride": stride},
            **{"relu": rng.randint(0, 1), "pad": rng.randint(0, 1), "norm": rng.randint(0, 2)},
            **{"shift": rng.choice([0, 0, 0, 1, 4]), "seed": i},
            **{"dtype": rng.choice(dtypes), "layout": rng.choice(list(LAYOUTS.values()))},
        }


def checked(rehearse: bool) -> Iterable[Case]:
    """The paper's units, and random ones, in all dtypes and layouts."""
    units, dtypes = (TINY_UNITS, TINY_DTYPES) if rehearse else (UNITS, DTYPES)
    for unit, dtype, layout in product(units, dtypes, LAYOUTS):
        yield {**unit.case(dtype, layout, 2 if dtype == "float16" else 1), "norm": 1}
    yield from random_units(0, 4 if rehearse else 250, dtypes)


def sanitized(rehearse: bool) -> Iterable[Case]:
    """A dozen small units: whole vectors and tiles, and neither."""
    dtypes = TINY_DTYPES if rehearse else ("float16", "float32", "bfloat16")
    for dtype, layout, stride in product(dtypes, LAYOUTS, (1, 2)):
        odd = stride == 2
        sizes = {"in": 15, "mid": 9, "out": 9} if odd else {"in": 48, "mid": 24, "out": 48}
        plane = {"h": 7, "w": 5} if odd else {"h": 9, "w": 8}
        yield {"n": 2, **sizes, **plane, "stride": stride, "dtype": dtype, "layout": LAYOUTS[layout], "norm": 1}


def timed(rehearse: bool) -> Iterable[Case]:
    """The paper's units in all dtypes but float64, layouts and batches."""
    units, dtypes, batches = (TINY_UNITS, TINY_DTYPES, (1,)) if rehearse else (UNITS, TIMED_DTYPES, BATCHES)
    # The batch first: should there be no time for all, what there are targets for is there.
    for batch, dtype, layout, unit in product(sorted(batches, key=lambda n: n != 64), dtypes, LAYOUTS, units):
        yield unit.case(dtype, layout, batch)


def planned(rehearse: bool) -> Iterable[Case]:
    """Every way to cut the paper's float16 units at batch 64 that the planners consider; some fit no card."""
    units, batch = (TINY_UNITS[1:], 1) if rehearse else (UNITS, 64)
    depths, warps, gaps = ((32,), (4,), (1,)) if rehearse else (_TILE_DEPTH_BYTES, _STRIP_WARPS, _STRIP_GAPS)
    for layout, unit in product(LAYOUTS, units):
        case = unit.case("float16", layout, batch)
        out_height = (unit.size - 1) // unit.stride + 1
        rows = sorted({-(-out_height // strips) for strips in range(1, out_height + 1)})
        for strip_rows, slices, warp_count, gap in product(rows, (1, 3), warps, gaps if unit.stride == 1 else (1,)):
            yield {**case, "rows": strip_rows, "slices": slices, "warps": warp_count, "gap": gap}
        for tile_rows, slices, depth in product(rows, (1, 2, 3), depths):
            yield {**case, "tile_rows": tile_rows, "slices": slices, "tile_depth": depth // 2}


def profiled(rehearse: bool) -> Iterable[Case]:
    """The stride-1 units in float16 and channels_last at batch 64."""
    units = TINY_UNITS if rehearse else UNITS
    return (unit.case("float16", "channels_last", 64) for unit in units if unit.stride == 1)


SETS = {"checked": checked, "sanitized": sanitized, "timed": timed, "planned": planned, "profiled": profiled}
