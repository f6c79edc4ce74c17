"""Models of other people's: every unit is found, whatever its style, and nothing else is."""

import copy
import pickle
import warnings

import fuzz_match
import pytest
import pytorchcv.models.shufflenet
import torch
from styles import NEAR_MISSES, random_style, random_unit
from support import Recorder, assert_as_accurate, each_isa_for_bfloat16, randomize
from torch import nn

import shufflenet_ext as se
from benchmarks.public_styles import STYLES, BiasedStyle, BlocksStyle
from shufflenet_ext._fused import FusedUnit
from shufflenet_ext._graph import trace
from shufflenet_ext._match import NearMiss
from shufflenet_ext._units import unit_of
from shufflenet_ext.inference import InferenceNetwork

SHORT = ("shufflenet_g1_wd4", "shufflenet_g3_w1", "shufflenet_g8_w1")  # of which the short suite makes do
PYTORCHCV = sorted(name for name in dir(pytorchcv.models.shufflenet) if name.startswith("shufflenet_g"))


@pytest.fixture(autouse=True)
def any_backend():
    """Units that the native ops do not have yet run the reference."""
    with se.use_backend("auto"), warnings.catch_warnings():
        warnings.simplefilter("ignore", se.ReferenceFallbackWarning)
        yield


def fused_units(model):
    return [module for module in model.modules() if isinstance(module, FusedUnit)]


def assert_same(model, plain, x):
    with torch.no_grad():
        assert_as_accurate(model(x), plain(x), copy.deepcopy(plain).double()(x.double()))


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
def test_fuse_takes_every_style(style):
    size, units = STYLES[style]
    model = randomize(style()).eval()
    plain, keys = copy.deepcopy(model), list(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error", se.FuseWarning)
        se.fuse(model)
    assert len(fused_units(model)) == units
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters
    x = torch.randn(2, 3, size, size)
    assert_same(model, plain, x)
    assert_same(pickle.loads(pickle.dumps(model)), plain, x)
    torch.manual_seed(0)
    with Recorder() as recorder:
        model.double().train()(x.double()).square().sum().backward()
    assert recorder.names.count("shufflenet_ext::shuffle_bottleneck_training") == units
    torch.manual_seed(0)
    plain.double().train()(x.double()).square().sum().backward()
    for (name, got), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-7, atol=1e-7, msg=name)
    for (name, got), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, expected, msg=name)


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in PYTORCHCV]
)
def test_fuse_takes_pytorchcv(name):
    model = randomize(getattr(pytorchcv.models.shufflenet, name)()).eval()
    plain, keys = copy.deepcopy(model), list(model.state_dict())
    se.fuse(model)
    assert len(fused_units(model)) == 16
    assert list(model.state_dict()) == keys
    assert_same(model, plain, torch.randn(1, 3, 224, 224))


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
def test_whole_models(style):
    size, _ = STYLES[style]
    model = randomize(style()).eval()
    optimized = se.optimize_for_inference(model, example_inputs=(torch.randn(1, 3, size, size),))
    called = [node.target for node in optimized.model.graph.nodes if node.op in ("call_module", "call_function")]
    # One call of one op, and what is behind the network.
    assert called[0] == "chain0"
    assert isinstance(optimized.model.chain0, InferenceNetwork)
    assert optimized.called == [optimized.model if style is BiasedStyle else optimized.model.chain0]
    assert called[1:] == ([torch.ops.aten.log_softmax.int] if style is BiasedStyle else [])
    for batch in (1, 3):
        assert_same(optimized, model, torch.randn(batch, 3, size, size))
    x = torch.randn(2, 3, size + 32, size + 16)
    try:
        model(x)
    except RuntimeError:
        with pytest.raises(ValueError, match=r"got|expected"):
            optimized(x)
    else:
        assert_same(optimized, model, x)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(optimized)))
    assert_same(twin, model, torch.randn(2, 3, size, size))
    assert twin.called == [twin.model if style is BiasedStyle else twin.model.chain0]


@each_isa_for_bfloat16
@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
def test_whole_models_in_bfloat16(style, isa):
    size, _ = STYLES[style]
    model = randomize(style()).eval()
    x = torch.randn(2, 3, size, size)
    optimized = se.optimize_for_inference(model, torch.bfloat16, example_inputs=(x,))
    with torch.no_grad():
        exact, plain = copy.deepcopy(model).double()(x.double()), copy.deepcopy(model).bfloat16()(x.bfloat16())
        for given in (x, x.bfloat16()):
            got = optimized(given)
            assert got.dtype == given.dtype
            assert_as_accurate(got.bfloat16(), plain, exact)


@pytest.mark.parametrize("name", ["shufflenet_g1_wd4", "shufflenet_g8_w1"])
def test_whole_pytorchcv(name):
    model = randomize(getattr(pytorchcv.models.shufflenet, name)()).eval()
    optimized = se.optimize_for_inference(model, example_inputs=(torch.randn(1, 3, 224, 224),))
    assert [node.op for node in optimized.model.graph.nodes] == ["placeholder", "call_module", "output"]
    assert_same(optimized, model, torch.randn(2, 3, 224, 224))
    with pytest.raises(ValueError, match=r"input 0: got shape \[1, 3, 256, 256\], expected \[any, 3, 224, 224\]"):
        optimized(torch.randn(1, 3, 256, 256))


def test_a_model_of_which_a_part_is_known():
    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = BlocksStyle().stages[2:]
            self.stem = nn.Conv2d(3, 48, 5, 2, 2)
            self.decoder = nn.Conv2d(96, 5, 3, padding=1)

        def forward(self, image, scale, *, flip=False):
            low = self.stem(image).relu_()
            high = self.backbone(low)
            logits = nn.functional.interpolate(self.decoder(high), scale_factor=2.0)
            return {"logits": logits * scale, "low": low.mean((2, 3))}

    model = randomize(Segmenter()).eval()
    arguments = torch.randn(2, 3, 16, 24), 2.0
    optimized = se.optimize_for_inference(model, example_inputs=arguments)
    calls = [node.target for node in optimized.model.graph.nodes if node.op == "call_module"]
    assert calls == ["chain0"]
    with pytest.raises(TypeError, match="flip"):
        optimized(*arguments, flip=True)  # the graph was captured without it
    for x in (torch.randn(2, 3, 16, 24), torch.randn(1, 3, 16, 24)):
        with torch.no_grad():
            got, expected = optimized(x, 2.0), model(x, 2.0)
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-4)


def test_random_styles():
    for seed in range(0, 40, 2):
        assert fuzz_match.check(seed) == (None, True)


@pytest.mark.parametrize("near_miss", NEAR_MISSES)
def test_near_misses(near_miss):
    for seed in (101, 102):
        unit = random_unit(random_style(seed, near_miss))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", se.FuseWarning)
            assert not isinstance(se.fuse(unit), FusedUnit)


@pytest.mark.parametrize(
    ("near_miss", "cause"),
    [
        ("5x5", "kernel_size 5"),
        ("dilated", "dilation 2"),
        ("no shuffle", "an order that is no shuffle"),
        ("max pool", "not put together of a pooled input"),
        ("no relu", "expected relu"),
        ("norm of the batch", "no running statistics"),
    ],
)
def test_causes_are_named(near_miss, cause):
    unit = random_unit(random_style(7, near_miss))
    x = torch.zeros(2, unit.style.in_channels, 6, 7, dtype=torch.float64)
    with pytest.raises(NearMiss, match=cause):
        unit_of(trace(unit, (x,)))
