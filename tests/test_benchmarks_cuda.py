"""The CUDA benchmarks without a GPU: all but the clock, run on the CPU; and the model's counts."""

import json
import time
from dataclasses import dataclass, replace

import pytest
import torch
from support import randomize

import shufflenet_ext as se
from benchmarks import cuda, cuda_race, cuda_report, cuda_toolkit
from benchmarks.cuda_model import LAUNCH_S, Prediction, Unit, count, paper_units, predict
from benchmarks.cuda_race import OURS_CHANNELS_LAST_GRAPH, PRECISIONS, Track
from benchmarks.cuda_toolkit import LAYOUTS, Kernel


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
        prediction = Prediction(units[0], {}, 0, 0, 0, 0, 0, 0, 0, 0, dram=1 - LAUNCH_S, l2=0, multiprocessor=0,
                                arithmetic=0, shared=0)  # fmt: skip
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

KERNEL = Kernel("channels_last", registers=120, spilled_bytes=0, static_shared_bytes=0)


def test_counts_of_a_unit_in_one_window():
    # 8 x 8 pixels, one tile; whole mma steps everywhere, so that nothing is padded.
    unit = Unit(1, 32, 8, 8, mid_channels=16, out_channels=32, conv1_groups=1, groups=1, stride=1)
    plan = {"tile_rows": 8, "tile_columns": 8, "slices": 1, "chunk": 16}
    counts = count(unit, plan, 2, mma=True, layout="channels_last")
    assert counts.multiply_adds == unit.multiply_adds == 64 * (32 * 16 + 9 * 16 + 16 * 32)
    # x and conv1's weights, the constants of 16 channels, conv3's weights, x once more, the result.
    assert counts.l2_elements == 64 * 32 + 32 * 16 + 12 * 16 + 16 * 32 + 2 * 64 * 32
    # Two strips: conv1 is done twice on the rows where they meet, for 40 pixels each, which are padded to 48.
    halves = count(unit, plan | {"tile_rows": 4}, 2, mma=True, layout="channels_last")
    assert halves.multiply_adds == 96 * 32 * 16 + 64 * (9 * 16 + 16 * 32)


def test_slices_read_x_as_often_as_there_are():
    unit = Unit(2, 240, 7, 7, mid_channels=60, out_channels=240, conv1_groups=3, groups=3, stride=1)
    plan = {"tile_rows": 7, "tile_columns": 7, "slices": 3, "chunk": 60}
    whole = count(unit, plan, 2, mma=True, layout="channels_last")
    sliced = count(unit, plan | {"slices": 1, "chunk": 20}, 2, mma=True, layout="channels_last")
    assert sliced.l2_elements - whole.l2_elements == 2 * 2 * 49 * 240
    assert whole.multiply_adds == sliced.multiply_adds  # conv1 has three tiles of 20 rows, or nine of 6 or 7


@pytest.mark.parametrize("dtype", ["float16", "float32", "tfloat32"])
def test_predictions_keep_to_the_bounds(tmp_path, dtype):
    units = [unit for batch in (1, 64) for unit in paper_units(batch).values()]
    planner = cuda_toolkit.build_planner(tmp_path)
    for layout in LAYOUTS:
        plans = cuda_toolkit.plans(planner, [unit.case(dtype, layout, 90) for unit in units])
        for unit, plan in zip(units, plans, strict=True):
            p = predict(unit, dtype, layout, 90, plan, KERNEL)
            assert p.dram_bytes < p.l2_bytes
            assert p.useful_flop < p.executed_flop
            assert p.time > LAUNCH_S + p.dram
            assert 1 <= p.blocks <= 65536 // (120 * 256)
