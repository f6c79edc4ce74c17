"""ShuffleNet v2 of other people's: every unit is found, whatever its style, and nothing else is."""

import copy
import importlib.util
import pickle
import sys
import warnings

import fuzz_match
import pytest
import pytorchcv.models.shufflenetv2
import pytorchcv.models.shufflenetv2b
import styles_v2
import torch
from support import (
    ISAS,
    Recorder,
    assert_as_accurate,
    assert_ran,
    each_isa_for_bfloat16,
    randomize,
    selected_isa,
)
from torch import nn
from units_v2 import UNITS, Detector, FunctionalUnit, MegviiUnit, Network

import shufflenet_ext as se
from benchmarks.public_styles import TorchvisionUnit, TorchvisionV2, shuffled_by_view
from shufflenet_ext._compile import _with_ops
from shufflenet_ext._fused import FusedUnit
from shufflenet_ext.models import V2_CHANNELS

each_unit = pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.__name__)


def assert_same(got, model, x):
    with torch.no_grad():
        assert_as_accurate(got(x), model(x), copy.deepcopy(model).double()(x.double()))


def calls(optimized):
    return [node.target for node in optimized.model.graph.nodes if node.op in ("call_module", "call_function")]


def fused_quietly(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error", se.FuseWarning)
        return se.fuse(model)


# ---- fuse -----------------------------------------------------------------------------------------------------------


@each_unit
@pytest.mark.parametrize("stride", [1, 2])
def test_fuse_takes_a_unit(stride, unit):
    plain = randomize(unit(12, 12 if stride == 1 else 20, stride)).eval()
    fused = fused_quietly(copy.deepcopy(plain))
    assert isinstance(fused, FusedUnit)
    assert list(fused.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 12, 9, 7)
    with torch.no_grad(), assert_ran("shuffle_network_batch_norm"):
        fused(x)
    assert_same(fused, plain, x)
    assert_same(pickle.loads(pickle.dumps(fused)), plain, x)
    results = []
    for each in (fused, plain):
        for mode in ("native", "reference"):  # in eval mode, and in training mode, which is PyTorch's
            given = x.clone().requires_grad_()
            with se.use_backend(mode):
                y = each.train(mode == "reference")(given)
            y.square().sum().backward()
            results += [y, given.grad]
    torch.testing.assert_close(results[:4], results[4:], rtol=1e-3, atol=1e-3)


@each_unit
def test_fuse_takes_a_network(unit):
    plain = randomize(Network(unit)).eval()
    fused = fused_quietly(copy.deepcopy(plain))
    assert sum(isinstance(module, FusedUnit) for module in fused.modules()) == 5
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad(), Recorder() as recorder:
        fused(x)
    # A stage is one op, and so is the stem.
    assert recorder.names.count("shufflenet_ext::shuffle_network_batch_norm") == 3
    assert_same(fused, plain, x)


def test_units_of_both_versions_follow_each_other():
    plain = randomize(
        nn.Sequential(se.ShuffleBottleneck(12, 12, 1, 3, mid_channels=6), TorchvisionUnit(12, 12, 1))
    ).eval()
    x = torch.randn(2, 12, 9, 7)
    assert_same(se.fuse(copy.deepcopy(plain)), plain, x)
    assert_same(se.optimize_for_inference(plain), plain, x)
    assert_same(se.optimize_for_inference(plain, example_inputs=(x,)), plain, x)


# ---- Whole models ---------------------------------------------------------------------------------------------------


@each_unit
def test_a_whole_model_is_one_op(unit):
    model = randomize(Network(unit)).eval()
    optimized = se.optimize_for_inference(model, example_inputs=(torch.randn(1, 3, 64, 48),))
    assert calls(optimized) == ["chain0"]
    for shape in ((2, 3, 64, 48), (1, 3, 97, 64)):
        x = torch.randn(shape)
        with torch.no_grad(), assert_ran("shuffle_network"):
            optimized(x)
        assert_same(optimized, model, x)
    assert_same(pickle.loads(pickle.dumps(optimized)), model, torch.randn(2, 3, 64, 48))


@pytest.mark.covering(1)
@each_isa_for_bfloat16
@each_unit
def test_in_bfloat16(unit, isa):
    model = randomize(Network(unit)).eval()
    x = torch.randn(2, 3, 64, 48)
    optimized = se.optimize_for_inference(model, torch.bfloat16, example_inputs=(x,))
    with torch.no_grad():
        exact, plain = copy.deepcopy(model).double()(x.double()), copy.deepcopy(model).bfloat16()(x.bfloat16())
        assert_as_accurate(optimized(x).bfloat16(), plain, exact)


@each_unit
def test_a_backbone_of_which_several_results_are_wanted(unit):
    model = randomize(Detector(unit)).eval()
    x = torch.randn(2, 3, 64, 96)
    optimized = se.optimize_for_inference(model, example_inputs=(x,))
    assert [call for call in calls(optimized) if isinstance(call, str)] == ["chain0", "chain1"]
    for shape in ((2, 3, 64, 96), (1, 3, 32, 64)):
        x = torch.randn(shape)
        with torch.no_grad():
            got, expected, exact = optimized(x), model(x), copy.deepcopy(model).double()(x.double())
        for key, value in exact.items():
            assert_as_accurate(got[key], expected[key], value)


@pytest.mark.parametrize("unit", [TorchvisionUnit, MegviiUnit], ids=lambda unit: unit.__name__)
def test_compile_backend(unit):
    torch._dynamo.reset()
    model = randomize(nn.Sequential(unit(8, 20, 2), unit(20, 20, 1), unit(20, 20, 1))).eval()
    # Without inductor, which takes its time.
    compiled = torch.compile(model, backend=lambda graph, inputs: _with_ops(graph).forward)
    x = torch.randn(2, 8, 9, 7)
    with torch.no_grad():
        assert_as_accurate(compiled(x), model(x), copy.deepcopy(model).double()(x.double()))
        with torch.profiler.profile() as profile:
            compiled(x)
    names = [event.name for event in profile.events()]
    assert names.count("shufflenet_ext::shuffle_network_batch_norm") == 3
    assert "aten::convolution" not in names


@pytest.mark.long  # inductor
def test_compile_backend_with_inductor():
    torch._dynamo.reset()
    model = randomize(nn.Sequential(TorchvisionUnit(8, 20, 2), MegviiUnit(20, 20, 1))).eval()
    compiled = torch.compile(model, backend="shufflenet_ext")
    x = torch.randn(2, 8, 9, 7)
    for ctx in (torch.no_grad(), torch.enable_grad()):
        with ctx:
            assert_as_accurate(compiled(x), model(x), copy.deepcopy(model).double()(x.double()))


NETWORKS = {
    f"torchvision's {width}x": lambda channels=channels: TorchvisionV2(*channels)
    for width, channels in V2_CHANNELS.items()
} | {
    f"{style}_{width}": getattr(getattr(pytorchcv.models, style), f"{style}_{width}")
    for style in ("shufflenetv2", "shufflenetv2b")
    for width in ("wd2", "w1", "w3d2", "w2")
}


@pytest.mark.parametrize(
    "name", [name if name == "shufflenetv2b_wd2" else pytest.param(name, marks=pytest.mark.long) for name in NETWORKS]
)
def test_networks(name):
    model = randomize(NETWORKS[name]()).eval()
    x = torch.randn(1, 3, 224, 224)
    optimized = se.optimize_for_inference(model, example_inputs=(x,))
    with torch.no_grad():
        plain, exact = model(x), model.double()(x.double())
        for isa in ISAS:
            with selected_isa(isa):
                torch.set_num_threads(1)
                with Recorder() as recorder:
                    got = optimized(x)
                assert "aten::convolution" not in recorder.names
                assert_as_accurate(got, plain, exact)
                for threads in range(2, 9):
                    torch.set_num_threads(threads)
                    assert torch.equal(optimized(x), got), f"{isa}, {threads} threads"


def torchvision_models():
    """Its models, without its compiled part where that is of another torch. Skips the test where there is none."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError:
        for op in ("nms", "qnms"):  # which that part would define
            torch.library.define(f"torchvision::{op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        return importlib.import_module("torchvision.models")


@pytest.mark.long
@pytest.mark.parametrize("name", ["x0_5", "x1_0", "x1_5", "x2_0"])
def test_torchvision(name):
    models = torchvision_models()
    model = randomize(getattr(models, f"shufflenet_v2_{name}")()).eval()
    own = se.models.shufflenet_v2(float(name[1:].replace("_", "."))).eval()
    own.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 224, 224)
    optimized = se.optimize_for_inference(model, example_inputs=(x,))
    assert calls(optimized) == ["chain0"]
    for run in (optimized, own):
        assert_same(run, model, x)


# ---- Near misses ----------------------------------------------------------------------------------------------------


class Changed(TorchvisionUnit):
    """A unit that is none, by one change."""

    def __init__(self, change: str, stride: int) -> None:
        super().__init__(12, 12 if stride == 1 else 20, stride)
        self.change = change
        half = 6 if stride == 1 else 10
        if change == "leaky relu":
            self.branch2[2] = nn.LeakyReLU(0.1)
        elif change == "relu6":
            self.branch2[7] = nn.ReLU6()
        elif change == "no last relu":
            self.branch2[7] = nn.Identity()
        elif change == "relu behind the depthwise convolution":
            self.branch2[4] = nn.Sequential(self.branch2[4], nn.ReLU())
        elif change == "grouped":
            self.branch2[5] = nn.Conv2d(half, half, 1, groups=2)
        elif change == "5x5":
            self.branch2[3] = nn.Conv2d(half, half, 5, stride, 2, groups=half)
        elif change == "dilated":
            self.branch2[3] = nn.Conv2d(half, half, 3, stride, 2, dilation=2, groups=half)
        elif change == "squeeze and excite":
            self.branch2.append(Gate())
        elif change == "other shortcut":
            self.branch1[0] = nn.Conv2d(12, 12, 3, 2, 1, groups=6)
        elif change == "shuffled between":
            self.branch2[5] = nn.Sequential(nn.ChannelShuffle(2), self.branch2[5])

    def forward(self, x):
        if self.change == "main first":
            x1, x2 = x.chunk(2, dim=1)
            return shuffled_by_view(torch.cat((self.branch2(x2), x1), dim=1), 2)
        if self.change == "residual":
            x1, x2 = x.chunk(2, dim=1)
            return shuffled_by_view(torch.cat((x1, self.branch2(x2) + x2), dim=1), 2)
        if self.change == "thirds":
            return shuffled_by_view(torch.cat((x[:, :6], self.branch2(x[:, 4:10])), dim=1), 2)
        if self.change == "other order":
            return super().forward(x)[:, [3, 0, 1, 2, *range(4, 12)]]
        if self.change == "other tensor":
            return shuffled_by_view(torch.cat((self.branch1(x.flip(1)), self.branch2(x)), dim=1), 2)
        return super().forward(x)


class Gate(nn.Module):
    def forward(self, x):
        return x * x.mean((2, 3), keepdim=True).sigmoid()


@pytest.mark.parametrize(
    ("change", "stride", "cause"),
    [
        ("leaky relu", 1, "leaky_relu stands ahead of the depthwise convolution, expected relu"),
        ("relu6", 2, "ends in hardtanh"),
        ("no last relu", 1, "ends in batch_norm, expected a ReLU"),
        ("relu behind the depthwise convolution", 1, "relu stands where a convolution, or its batch norm"),
        ("grouped", 2, "not a dense 1x1 convolution"),
        ("5x5", 1, "kernel_size 5"),
        ("dilated", 1, "dilation 2"),
        ("squeeze and excite", 1, "ends in mul"),
        ("other shortcut", 2, "not depthwise"),
        ("shuffled between", 1, "the depthwise convolution's result is shuffled"),
        ("main first", 1, ""),
        ("residual", 1, "ends in add"),
        ("thirds", 1, "are not the halves of one tensor"),
        ("other order", 1, ""),
        ("other tensor", 2, "do not read the same tensor"),
    ],
)
def test_near_misses_are_left_and_told_of(change, stride, cause):
    unit = randomize(Changed(change, stride)).eval()
    plain = copy.deepcopy(unit)
    with pytest.warns(se.FuseWarning, match=f"as it is.*{cause}"):
        se.fuse(unit)
    assert not any(isinstance(module, FusedUnit) for module in unit.modules())
    x = torch.randn(2, 12, 9, 7)
    optimized = se.optimize_for_inference(plain, example_inputs=(x,))
    assert not [call for call in calls(optimized) if isinstance(call, str)]
    torch.testing.assert_close(optimized(x), plain(x))


def test_random_styles():
    for seed in range(0, 24, 2):
        assert fuzz_match.check(seed, version=2) == (None, True)


@pytest.mark.parametrize("near_miss", styles_v2.NEAR_MISSES)
def test_random_near_misses(near_miss):
    for seed in (101, 102):
        unit = styles_v2.random_unit(styles_v2.random_style(seed, near_miss))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", se.FuseWarning)
            assert not isinstance(se.fuse(unit), FusedUnit)


def test_a_half_that_somebody_else_reads():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.units = nn.Sequential(TorchvisionUnit(8, 24, 2), FunctionalUnit(24, 24, 1), MegviiUnit(24, 24, 1))

        def forward(self, x):
            y = self.units[1](self.units[0](x))
            return self.units[2](y), y[:, 12:] * 2

    model = randomize(Model()).eval()
    x = torch.randn(2, 8, 9, 7)
    optimized = se.optimize_for_inference(model, example_inputs=(x,))
    torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-4)
