"""explain() of what optimize_for_inference makes: its numbers by hand, its times against the clock."""

import dataclasses
import json
import time

import pytest
import torch
from support import LAYOUTS, randomize
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import shufflenet_ext as se
from shufflenet_ext import _native


def small_unit() -> nn.Module:
    return se.optimize_for_inference(
        randomize(se.FusedShuffleBottleneck(24, 24, 1, 3, mid_channels=12, conv1_groups=3))
    )


@pytest.fixture(scope="module")
def network():
    return randomize(se.models.ShuffleNetG3()).eval()


def test_a_unit_by_hand(isa):
    (explanation,) = small_unit().explain(torch.randn(2, 24, 5, 7))
    (step,) = explanation.steps
    assert (step.name, step.input, step.output) == ("unit 1", (2, 24, 5, 7), (2, 24, 5, 7))
    assert step.flop == 2 * 2 * 5 * 7 * (12 * 8 + 12 * 9 + 24 * 4)
    assert step.weight_bytes == 4 * (12 * (8 + 1) + 12 * (9 + 1) + 24 * (4 + 1))
    (run,) = step.runs
    assert (run.images, run.shared, run.cut) == (2, False, "whole")
    # conv1's groups of 4 rows and conv3's of 8, in tiles of 8 where there are 32 registers; 35 pixels are 3 vectors of
    # 16, or 5 of 8 in two tiles, or 9 of 4 in three.
    assert run.tiles == ((4, 3), ({"baseline": 4, "avx2": 4}.get(isa, 8), 3))
    y1, y2 = 4 * 12 * 7 * 7, 4 * 12 * 5 * 7
    assert y1 + y2 < run.buffer_bytes < 3 * (y1 + y2)
    assert (explanation.part, explanation.dtype, explanation.isa, explanation.threads) == ("", "float32", isa, 1)


@pytest.mark.parametrize("create", [se.models.ShuffleNetG2, lambda: se.models.shufflenet_v1(8, 0.5)], ids=["G2", "v1"])
def test_flop_are_those_that_torch_counts(create):
    network = randomize(create()).eval()
    x = torch.randn(2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), se.use_backend("reference"):
        network(x)
    (explanation,) = se.optimize_for_inference(network).explain(x)
    assert sum(step.flop for step in explanation.steps) == counter.get_total_flops()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (1, 2), (5, 1), (5, 2)])
def test_steps_of_a_network(network, batch, threads, layout):
    torch.set_num_threads(threads)
    (explanation,) = se.optimize_for_inference(network).explain(torch.randn(batch, 3, 32, 32).to(memory_format=layout))
    units = [f"unit {stage}.{i}" for stage, count in enumerate(se.models.REPEATS, 1) for i in range(1, count + 1)]
    assert [step.name for step in explanation.steps] == ["stem", *units, "means", "linear"]
    for before, after in zip(explanation.steps, explanation.steps[1:], strict=False):
        assert before.output == after.input
    assert explanation.shape == explanation.steps[0].input
    assert explanation.steps[-1].output == (batch, 10)
    assert explanation.layout == str(layout).removeprefix("torch.").removesuffix("_format")
    assert explanation.threads == threads
    expected = {(1, 1): [(1, False)], (1, 2): [(1, True)], (5, 1): [(5, False)], (5, 2): [(4, False), (1, True)]}
    for step in explanation.steps:
        assert [(run.images, run.shared) for run in step.runs] == expected[batch, threads]
        assert step.microseconds > 0
        assert step.gflop_per_second == pytest.approx(step.flop / step.microseconds / 1e3)
        assert step.share_of_peak == pytest.approx(step.gflop_per_second / explanation.peak_gflop_per_second)
        assert step.share_of_peak < 1 or threads > 1  # whose peak is low where other processes take turns with them
    weights = sum(parameter.numel() for name, parameter in network.named_parameters() if "bn" not in name)
    biases = sum(module.num_features for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    assert sum(step.weight_bytes for step in explanation.steps) == 4 * (weights + biases)


@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (1, 2), (5, 1), (5, 2)])
def test_times_of_the_steps_make_up_the_call(network, batch, threads):
    torch.set_num_threads(threads)
    optimized, x = se.optimize_for_inference(network), torch.randn(batch, 3, 32, 32)
    shares = []
    for _ in range(10):
        start = time.perf_counter()
        seconds = _native.profile(lambda: optimized(x))
        wall = time.perf_counter() - start
        assert len(seconds) == 1 + sum(se.models.REPEATS) + 2
        assert min(seconds) > 0
        shares.append(sum(seconds) / wall)
    assert max(shares) <= 1
    assert max(shares) > 0.5 or threads > 1  # whose start may take long where other processes take turns with them


def test_a_profile_ends_with_its_call():
    optimized, x = small_unit(), torch.randn(1, 24, 5, 7)
    with pytest.raises(RuntimeError, match="x: got"):
        _native.profile(lambda: optimized(x[0]))
    optimized(x)
    assert _native.profile(lambda: None) == []


def test_description_is_for_the_threads_that_it_is_asked_for(network):
    part = se.optimize_for_inference(network).model
    x = torch.randn(9, 3, 32, 32)
    cuts = {}
    for threads in (1, 2, 4):
        description = _native.describe(x, part.weights, part.program, threads)
        left = 9 % threads
        assert description["images"] == {"alone": 9 - left, "shared": left}
        cuts[threads] = [step["shared"]["cut"] for step in description["steps"]]
    assert cuts[1][1] == "whole"
    assert cuts[2][1] == "2 strips"
    assert cuts[4][-2] == "4 channel shares"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes(dtype):
    x = torch.randn(1, 24, 5, 7)
    (single,) = small_unit().explain(x)
    (explanation,) = small_unit().to(dtype).explain(x.to(dtype))
    assert explanation.dtype == str(dtype).removeprefix("torch.")
    (unit,) = (step for step in explanation.steps if step.name == "unit 1")
    assert unit.weight_bytes == single.steps[0].weight_bytes * dtype.itemsize // 4
    # Vectors of doubles are half as long; sums of bfloat16 are float32.
    factor = single.peak_gflop_per_second / explanation.peak_gflop_per_second
    assert 1.3 < factor < 3 if dtype == torch.float64 else 0.6 < factor < 1.6


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        (explanation,) = small_unit().explain(torch.randn(1, 24, 5, 7))
    assert explanation.dtype == "bfloat16"


def test_table(network):
    torch.set_num_threads(2)
    explanations = se.optimize_for_inference(network).explain(torch.randn(5, 3, 32, 32))
    title, header, *rows = str(explanations).split("\n")
    assert title.startswith("5×3×32×32, float32, contiguous; threads: 2, ")
    assert title.endswith("images: 4 on one thread each | 1 shared by all threads")
    (explanation,) = explanations
    names = [*(step.name for step in explanation.steps), "all steps", "call"]
    assert [row[: len(name)] for row, name in zip(rows, names, strict=True)] == names
    for step, row in zip(explanation.steps, rows, strict=False):
        column = header.index("MFLOP")
        assert float(row[column : column + len("MFLOP")]) == round(step.flop / 1e6, 2)
        assert row[: header.index("µs") + 2].endswith(f"{step.microseconds:.1f}")
    assert "whole | 2 strips" in rows[1]
    assert "240×16×16 → 240×16×16" in rows[2]


def test_machine_readable():
    (explanation,) = small_unit().explain(torch.randn(1, 24, 5, 7))
    document = json.loads(json.dumps(dataclasses.asdict(explanation)))
    assert document["steps"][0]["runs"][0]["cut"] == "whole"


def test_parts_of_a_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage = nn.Sequential(se.FusedShuffleBottleneck(24, 24, 1, 3), se.FusedShuffleBottleneck(24, 24, 1, 3))
            self.unit = se.FusedShuffleBottleneck(24, 24, 2, 3)
            self.unused = se.FusedShuffleBottleneck(24, 24, 1, 3)

        def forward(self, x, *, times):
            for _ in range(times):
                x = self.stage(x)
            return self.unit(x)

    optimized = se.optimize_for_inference(randomize(Model()))
    x = torch.randn(1, 24, 6, 6)
    explanations = optimized.explain(x, times=2)
    assert [(e.part, len(e.steps)) for e in explanations] == [("stage", 2), ("stage", 2), ("unit", 1)]
    assert explanations[2].steps[0].output == (1, 48, 3, 3)
    assert str(explanations).split("\n\n") == [str(e) for e in explanations]
    with pytest.warns(se.FuseWarning, match="no ShuffleNet unit"):
        linear = se.optimize_for_inference(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="explain: the call ran no part that optimize_for_inference made one op of"):
        linear.explain(torch.randn(1, 2))
    assert not any(module._forward_pre_hooks for module in optimized.modules())


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(0, 24, 5, 7), ValueError, "x: got a batch of 0, expected at least one image"),
        (torch.randn(1, 23, 5, 7), RuntimeError, "program: conv1_groups: got 3, expected a positive divisor of the 23"),
        (torch.randn(24, 5, 7), RuntimeError, r"x: got shape \[24, 5, 7\], expected 4 dimensions"),
        (torch.randn(1, 24, 5, 7).double(), RuntimeError, "weights: got dtype float32, expected x's, float64"),
        ([1], TypeError, "x: got list, expected a torch.Tensor"),
        (torch.randn(1, 24, 5, 7, device="meta"), ValueError, "x: got a tensor on 'meta', expected one on 'cpu'"),
    ],
)
def test_refuses(x, error, message):
    with pytest.raises(error, match=message):
        small_unit().model.explain(x)


def test_refuses_the_reference():
    with se.use_backend("reference"), pytest.raises(RuntimeError, match="explain: the call ran the reference"):
        small_unit().explain(torch.randn(1, 24, 5, 7))
