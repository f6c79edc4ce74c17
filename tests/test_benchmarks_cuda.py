"""The CUDA benchmarks without a GPU: all but the clock, run on the CPU; and the model's counts."""

import json
import time
from dataclasses import dataclass, replace

import pytest
import torch
from support import randomize

import shufflenet_ext as se
from benchmarks import cuda, cuda_race, cuda_report, cuda_toolkit
from benchmarks.cuda_counts import Count
from benchmarks.cuda_model import LAUNCH_S, Card, Cut, Model, Prediction, predict
from benchmarks.cuda_race import OURS_CHANNELS_LAST_GRAPH, PRECISIONS, Track
from benchmarks.cuda_toolkit import LAYOUTS
from benchmarks.cuda_units import Unit, paper_units


@dataclass(frozen=True)
class Small:
    """A network of two units; stride 2 first, as in a stage."""

    groups: int = 3
    batch: int = 64
    label: str = "stage 2 stride 1"

    def build(self):
        units = (
            se.FusedShuffleBottleneck(24, 36, 2, self.groups, mid_channels=12),
            se.FusedShuffleBottleneck(60, 60, 1, self.groups),
        )
        return randomize(torch.nn.Sequential(*units)).eval(), torch.randn(self.batch, 24, 8, 8)


class FixedModel:
    """A second for each unit."""

    def predict(self, units, dtype, layout, sm):
        prediction = Prediction(units[0], CUT, 0, 0, 0, dram=1 - LAUNCH_S, l2=0, shared=0, issue=0)
        return [replace(prediction, unit=unit) for unit in units]


def clock(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def track(**changes):
    builders = cuda_race.builders(lambda run: run)
    del builders[cuda_race.MAX_AUTOTUNE]  # takes a minute
    return Track("cpu", clock, lambda run: run, builders, 1e9, rounds=3, **changes)


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda precision: precision.name)
def test_a_row(precision):
    switches = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    row = track().measure("units", Small(batch=2), precision)
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == switches
    assert row.absent == {}
    assert len(row.timings) == 4 + 6
    assert row.timings[OURS_CHANNELS_LAST_GRAPH].ratio == 1
    # x, the result of each unit, which is the next one's input, and the parameters: conv1's, conv2's and conv3's.
    elements = 2 * (24 * 64 + 60 * 16 + 60 * 16 + 60 * 16)
    elements += 12 * (24 + 1) + 12 * 10 + 36 * 5 + 15 * (20 + 1) + 15 * 10 + 60 * 6
    assert row.traffic == elements * precision.dtype.itemsize
    assert 0 < row.over_copy(OURS_CHANNELS_LAST_GRAPH) == row.timings[OURS_CHANNELS_LAST_GRAPH].median / row.copied
    assert row.predicted is None


def test_contenders_that_differ_are_refused():
    wrong = {"eager": lambda plain, folded, x: lambda: folded(x) + 1}
    with pytest.raises(AssertionError, match="eager differs from ours by"):
        replace(track(), builders=wrong).measure("units", Small(), PRECISIONS[-1])


def test_a_whole_report(tmp_path):
    class Console:
        def print(self, *args, **kwargs):
            pass

    shapes = [("units", Small()), ("network's units", Small(label="16 units")), ("networks", Small(groups=5))]
    precisions = (PRECISIONS[0], PRECISIONS[3])
    rows, failed = cuda.race(shapes, precisions, track(model=FixedModel(), sm=90), Console())
    assert len(rows) == 4
    assert len(failed) == 2
    assert rows[0].predicted == dict.fromkeys(LAYOUTS, 2)
    compiled = replace(rows[1].timings["eager"], ratio=3.5)
    rows[1].timings[cuda_race.MAX_AUTOTUNE] = compiled
    results = cuda_report.Results({"card": "none"}, 1.0, 1e9, 1e-6, "", failed, rows)
    written = cuda_report.write(results, tmp_path)
    assert [path.name for path in written] == ["cuda.json", "cuda.md", "cuda_float16.png", "cuda_float32.png"]
    assert all(path.stat().st_size for path in written)
    assert len(json.loads(written[0].read_text())["rows"]) == 4
    text = written[1].read_text()
    assert "| 16 units: at least 3× faster than torch.compile max-autotune | 3.50× | met |" in text
    assert "| stage 2 stride 1: at most 1.4× a copy of as many bytes |" in text
    assert "**failed: float16 networks" in text


def test_the_shapes_are_the_papers():
    shapes = list(cuda_race.shapes((2,)))
    assert [suite for suite, _ in shapes] == ["units"] * 6 + ["network's units", "networks"]
    labels = [shape.label for _, shape in shapes]
    assert labels[:6] == list(paper_units(2))
    module, x = shapes[6][1].build()
    assert tuple(x.shape) == (2, 24, 56, 56)
    units = cuda_race.units_of(module, x)
    assert len(units) == 16
    assert set(units) == set(paper_units(2).values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert cuda.main([]) == 1
    assert "need a GPU and this package's CUDA kernels: " in capsys.readouterr().err


# ---- The model ------------------------------------------------------------------------------------------------------

CARD = Card("a card", multiprocessors=10, clock=1e9, dram=1e12, l2_per_cycle=1000, source="")
DTYPES = ("float16", "float32")  # by strips, by windows
CUT = Cut(by_strips=True, blocks=20, warps=8, busy=0.75, side_by_side=1, tiling={})
ONE = Unit(10, 8, 4, 4, mid_channels=8, out_channels=8, conv1_groups=1, groups=1, stride=1)


def test_a_prediction_is_made_of_counts():
    # Two blocks an image, two rounds of 10 blocks; six of eight warps have work, and issue an instruction a cycle.
    count = Count(executed=4000, shared_wavefronts=600, global_sectors=100)
    p = predict(ONE, 2, CARD, CUT, count)
    assert p.instructions == 40_000
    assert p.issue == pytest.approx(2 * (2000 + 2 * 1000) / 1e9)
    assert p.shared == pytest.approx(2 * 300 / 1e9)
    assert p.l2 == pytest.approx(10 * 100 * 32 / 1000 / 1e9)
    assert p.dram == pytest.approx(2 * (10 * 2 * 8 * 16 + 8 * 9 + 8 * 10 + 8 * 9) / 1e12)
    assert (p.bound, p.time) == ("issue", LAUNCH_S + p.issue)


def test_what_a_prediction_is_bound_by():
    # So many warps side by side issue three instructions a cycle, and no more.
    crowded = replace(CUT, side_by_side=4, blocks=40)
    busy = Count(executed=3_000_000, shared_wavefronts=600, global_sectors=100)
    assert predict(ONE, 2, CARD, crowded, busy).issue == pytest.approx((1_000_000 + 2 * 1000) / 1e9)
    assert predict(ONE, 2, CARD, CUT, replace(busy, executed=1, shared_wavefronts=10**7)).bound == "shared memory"
    assert predict(ONE, 2, CARD, CUT, replace(busy, executed=1, global_sectors=10**7)).bound == "L2"
    assert predict(replace(ONE, height=1000, width=1000), 2, CARD, CUT, Count()).bound == "DRAM"


def test_cuts_are_the_planners(tmp_path):
    planner = cuda_toolkit.build_planner(tmp_path)
    unit = paper_units(64)["stage 2 stride 1"]
    half, single = (cuda_toolkit.plans(planner, [unit.case(dtype, "contiguous", 90)])[0] for dtype in DTYPES)
    by_strips, by_windows = Cut.of(half), Cut.of(single)
    assert by_strips.by_strips
    assert by_strips.tiling.keys() == {"rows", "slices", "warps", "gap"}
    assert 0.5 < by_strips.busy <= 1
    assert by_strips.blocks * by_strips.tiling["rows"] * by_strips.tiling["slices"] >= 64 * 28 * 3
    assert not by_windows.by_strips
    assert by_windows.warps == 8
    assert by_windows.blocks * by_windows.tiling["tile_rows"] * by_windows.tiling["slices"] >= 64 * 28 * 3


@pytest.mark.skipif(cuda_toolkit.nvcc() is None, reason="needs nvcc (on PATH, or by CUDA_HOME)")
@pytest.mark.long  # compiles PTX
def test_predictions_keep_to_the_bounds(tmp_path):
    model = Model(tmp_path)
    for dtype, layout in zip(DTYPES, LAYOUTS, strict=True):
        units = [replace(paper_units(batch)["stage 4 stride 1"], height=5, width=5) for batch in (1, 2, 64)]
        one, two, many = model.predict(units, dtype, layout, 90)
        assert one.dram < one.l2 < one.time
        assert two.cut.tiling != one.cut.tiling or two.instructions == 2 * one.instructions
        assert 8 * one.instructions < many.instructions <= 64 * one.instructions  # in larger strips or as many
