"""optimize_for_inference: the same results without training, the source left as it was."""

import copy
import inspect
import pickle

import pytest
import torch
from support import Recorder, randomize
from test_fuse import FiveByFiveUnit, ForeignUnit
from torch import nn

import shufflenet_ext as se


def assert_close(got, expected):
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.fixture
def net():
    return randomize(se.models.ShuffleNetG3())


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("create", [se.models.ShuffleNetG2, se.models.ShuffleNetG3, se.models.shufflenet_v1])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_network_equals_the_reference(create, layout):
    net = randomize(create()).eval()
    size = 32 if create is not se.models.shufflenet_v1 else 64
    images = torch.randn(2, 3, size, size).contiguous(memory_format=layout)
    optimized = se.optimize_for_inference(net)
    with Recorder() as recorder:
        got = optimized(images)
    assert [name for name in recorder.names if name.startswith("shufflenet_ext::")]
    assert not [name for name in recorder.names if "batch_norm" in name]
    with se.use_backend("reference"), torch.no_grad():
        assert_close(got, net(images))
    assert not got.requires_grad


def test_images_of_more_pixels_than_the_heads_window(net):
    net.eval()
    images = torch.randn(2, 3, 36, 36)  # which the units bring to 5 x 5; the window has 4 x 4
    with se.use_backend("reference"), torch.no_grad():
        expected = net(images)
    assert_close(se.optimize_for_inference(net)(images), expected)


def test_every_batch_norm_is_folded_with_its_own_eps(net, images):
    for i, norm in enumerate(module for module in net.eval().modules() if isinstance(module, nn.BatchNorm2d)):
        norm.eps = 0.02 * (i % 5)
    with se.use_backend("reference"), torch.no_grad():
        expected = net(images)
    assert_close(se.optimize_for_inference(net)(images), expected)


def test_source_is_left_as_it_was(net, images):
    state = copy.deepcopy(net.state_dict())
    modules = [type(module) for module in net.modules()]
    optimized = se.optimize_for_inference(net)
    expected = optimized(images)
    assert net.training
    assert [type(module) for module in net.modules()] == modules
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    # And neither sees what happens to the other afterwards.
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(optimized(images), expected)


def test_eval_only(net):
    optimized = se.optimize_for_inference(net)
    assert not any(module.training for module in optimized.modules())
    with pytest.raises(RuntimeError, match="made by optimize_for_inference: it has no training mode"):
        optimized.train()
    assert optimized.eval() is optimized
    assert not any(module.training for module in optimized.modules())


def test_copies(net, images):
    optimized = se.optimize_for_inference(net)
    expected = optimized(images)
    for twin in (copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        assert torch.equal(twin(images), expected)
    other = se.optimize_for_inference(randomize(copy.deepcopy(net), seed=3))
    assert not torch.allclose(other(images), expected)
    other.load_state_dict(optimized.state_dict())
    assert torch.equal(other(images), expected)


def test_dtypes(net, images):
    optimized = se.optimize_for_inference(net)
    assert_close(optimized.double()(images.double()).float(), net.eval()(images))
    assert optimized.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


def test_compile(net, images):
    optimized = se.optimize_for_inference(net)
    compiled = torch.compile(optimized, fullgraph=True, backend="aot_eager")
    assert_close(compiled(images), optimized(images))


def test_a_unit_itself():
    for unit, size in ((se.ShuffleBottleneck(24, 24, 1, 3), 6), (ForeignUnit(24, 48, 2, 3), 7)):
        randomize(unit).eval()
        x = torch.randn(2, 24, size, size)
        assert_close(se.optimize_for_inference(unit)(x), unit(x))


def test_units_that_cannot_be_fused_stay():
    net = randomize(nn.Sequential(ForeignUnit(), FiveByFiveUnit())).eval()
    with pytest.warns(se.FuseWarning, match="FiveByFiveUnit"):
        optimized = se.optimize_for_inference(net)
    x = torch.randn(2, 24, 6, 6)
    assert_close(optimized(x), net(x))


def test_a_unit_used_twice():
    unit = ForeignUnit()
    net = randomize(nn.Sequential(unit, nn.ReLU(), unit)).eval()
    optimized = se.optimize_for_inference(net)
    x = torch.randn(2, 24, 6, 6)
    assert_close(optimized(x), net(x))
    assert optimized.model[0] is optimized.model[2]


def test_batch_norm_ahead_of_a_convolution_is_not_folded_into_it():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn1 = nn.BatchNorm2d(24)
            self.conv1 = nn.Conv2d(24, 24, 3, padding=1, bias=False)

        def forward(self, x):
            return self.conv1(self.bn1(x).relu())

    net = randomize(nn.Sequential(PreActivation(), ForeignUnit())).eval()
    x = torch.randn(2, 24, 6, 6)
    assert_close(se.optimize_for_inference(net)(x), net(x))


def test_model_that_other_code_wraps(net, images):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = net

        def forward(self, x, scale=1.0):
            return {"logits": self.backbone(x) * scale}

    model = Wrapped().eval()
    got = se.optimize_for_inference(model)(images, scale=2.0)["logits"]
    assert_close(got, model(images, scale=2.0)["logits"])


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.unit = ForeignUnit()

    def forward(self, image, scale=1.0):
        return self.unit(image) * scale


def test_forward_takes_the_models_own_arguments():
    model = randomize(Scaled()).eval()
    x = torch.randn(2, 24, 6, 6)
    for optimized in (se.optimize_for_inference(model), se.optimize_for_inference(model, example_inputs=(x, 2.0))):
        assert list(inspect.signature(optimized.forward).parameters) == ["image", "scale"]
        for twin in (optimized, pickle.loads(pickle.dumps(optimized)), copy.deepcopy(optimized)):
            assert_close(twin(x, 2.0), model(x, 2.0))
            assert list(inspect.signature(twin.forward).parameters) == ["image", "scale"]
        batch = torch.export.Dim("batch", min=2, max=64)
        exported = torch.export.export(optimized, (x, 2.0), dynamic_shapes={"image": {0: batch}, "scale": None})
        assert_close(exported.module()(x[:1].repeat(5, 1, 1, 1), 2.0), model(x[:1].repeat(5, 1, 1, 1), 2.0))


@pytest.mark.parametrize("model", [None, torch.zeros(2), "net"])
def test_not_a_module(model):
    with pytest.raises(TypeError, match=r"model: got \w+, expected a torch\.nn\.Module"):
        se.optimize_for_inference(model)


class Doubled(se.FusedShuffleBottleneck):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(_):
    return Doubled(24, 24, 1, 3, mid_channels=12)


def hooked(unit):
    unit.register_forward_hook(lambda module, args, y: 3 * y)
    return unit


def hooked_inside(unit):
    unit.conv2.register_forward_hook(lambda module, args, y: 3 * y)
    return unit


def hooked_around(unit):
    stage = nn.Sequential(unit)
    stage.register_forward_hook(lambda module, args, y: 3 * y)
    return stage


def replaced(unit):
    unit.bn2 = nn.Identity()
    return unit


@pytest.mark.parametrize("change", [doubled, hooked, hooked_inside, hooked_around, replaced])
def test_units_that_are_more_than_their_weights_are_not_folded(change):
    unit = randomize(change(se.FusedShuffleBottleneck(24, 24, 1, 3, mid_channels=12))).eval()
    x = torch.randn(1, 24, 6, 6)
    with se.use_backend("auto"), torch.no_grad():
        assert_close(se.optimize_for_inference(unit)(x), unit(x))


def dilated_stem(net):
    net.conv1 = nn.Conv2d(3, 24, 3, stride=2, padding=2, dilation=2, bias=True)


def hooked_stem(net):
    net.bn1.register_forward_hook(lambda module, args, y: y + 1)


def hooked_stage(net):
    net.layer2.register_forward_hook(lambda module, args, y: 3 * y)


@pytest.mark.parametrize("change", [dilated_stem, hooked_stem, hooked_stage])
def test_changed_networks(change):
    net = se.models.shufflenet_v1(3)
    change(net)
    randomize(net).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert_close(se.optimize_for_inference(net)(images), net(images))
