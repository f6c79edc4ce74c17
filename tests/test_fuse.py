"""fuse: what it swaps, what it leaves alone and says so, and that nothing but the speed changes."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from support import assert_ran, randomize
from torch import nn

import shufflenet_ext as se
from shufflenet_ext._fused import FusedUnit

OP = "shuffle_bottleneck_batch_norm"


class ForeignUnit(nn.Module):
    """A user's own unit: the original code's attribute names, a class that this package does not know."""

    def __init__(self, in_channels=24, out_channels=24, stride=1, groups=3):
        super().__init__()
        mid_channels = int(out_channels / 4)
        self.stride = stride
        self.shuffle_groups = groups
        first_groups = 1 if in_channels == 24 else groups
        self.conv1 = nn.Conv2d(in_channels, mid_channels, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(mid_channels)
        self.conv2 = nn.Conv2d(mid_channels, mid_channels, 3, stride, 1, groups=mid_channels, bias=False)
        self.bn2 = nn.BatchNorm2d(mid_channels)
        self.conv3 = nn.Conv2d(mid_channels, out_channels, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential(*[nn.AvgPool2d(3, stride=2, padding=1)] * (stride == 2))

    def shuffle(self, y):
        n, c, h, w = y.shape
        return y.view(n, self.shuffle_groups, c // self.shuffle_groups, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)

    def middle(self, y):
        return self.bn2(self.conv2(self.shuffle(F.relu(self.bn1(self.conv1(y))))))

    def forward(self, x):
        y = self.bn3(self.conv3(self.middle(x)))
        shortcut = self.shortcut(x)
        return F.relu(torch.cat([y, shortcut], 1) if self.stride == 2 else y + shortcut)


class KuangliuUnit(ForeignUnit):
    """With a ReLU behind the depthwise convolution."""

    def middle(self, y):
        return F.relu(super().middle(y))


class PoolWithoutPaddingUnit(ForeignUnit):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.shortcut = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)


class OtherShuffleUnit(ForeignUnit):
    """Shuffles the other way round: (n, g) instead of (g, n)."""

    def shuffle(self, y):
        n, c, h, w = y.shape
        return y.view(n, c // self.shuffle_groups, self.shuffle_groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class OtherOrderUnit(ForeignUnit):
    def forward(self, x):
        return torch.cat([self.shortcut(x), self.bn3(self.conv3(self.middle(x)))], 1).relu()


class DropoutUnit(ForeignUnit):
    """Differs in training mode only."""

    def forward(self, x):
        return F.dropout(super().forward(x), training=self.training)


class BiasUnit(ForeignUnit):
    def __init__(self):
        super().__init__()
        self.conv3 = nn.Conv2d(6, 24, 1, groups=3)


class FiveByFiveUnit(ForeignUnit):
    def __init__(self):
        super().__init__()
        self.conv2 = nn.Conv2d(6, 6, 5, 1, 2, groups=6, bias=False)


class DilatedUnit(ForeignUnit):
    def __init__(self):
        super().__init__()
        self.conv2 = nn.Conv2d(6, 6, 3, 1, 2, dilation=2, groups=6, bias=False)


class ParameterUnit(ForeignUnit):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


def is_fused(module):
    return isinstance(module, (se.FusedShuffleBottleneck, FusedUnit))


def net_of(*units):
    net = nn.Sequential(nn.Conv2d(3, 24, 3), nn.Sequential(*units), nn.ReLU())
    return randomize(net).eval()


def assert_fuses_all(net, units):
    """Every unit is swapped without a word, shares its parameters, and results stay what they were."""
    x = torch.randn(2, 3, 9, 11)
    with torch.no_grad():
        expected = net(x)
        state = {key: value.clone() for key, value in net.state_dict().items()}
        parameters = list(net.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert se.fuse(net) is net
        assert [is_fused(m) for m in net[1]] == [True] * units
        assert [id(p) for p in net.parameters()] == [id(p) for p in parameters]
        assert list(net.state_dict()) == list(state)
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)


def test_own_units():
    net = net_of(
        se.ShuffleBottleneck(24, 24, 1, 3),
        se.ShuffleBottleneck(24, 48, 2, 2, mid_channels=8, conv1_groups=4),
        se.ShuffleBottleneck(72, 8, 2, 4, mid_channels=8, conv2_relu=True, pool_count_include_pad=False),
    )
    assert_fuses_all(net, 3)
    assert net[1][2].conv2_relu
    assert not net[1][2].pool_count_include_pad
    assert se.fuse(net)[1][0] is net[1][0]


@pytest.mark.parametrize("unit_class", [ForeignUnit, KuangliuUnit])
def test_foreign_units(unit_class):
    net = net_of(unit_class(), unit_class(24, 48, 2, 2), unit_class(72, 72, 1, 6))
    assert_fuses_all(net, 3)
    assert net[1][0].fused_unit.conv2_relu == (unit_class is KuangliuUnit)
    assert isinstance(net[1][0], unit_class)


@pytest.mark.parametrize(
    ("unit", "what"),
    [
        (OtherShuffleUnit(24, 48, 2, 3), {"shuffle_groups": 4}),
        (OtherOrderUnit(24, 24, 2, 3), {"shortcut_first": True}),
        (BiasUnit(), {}),
        (ParameterUnit(), {}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_variants_are_units_too(unit, what):
    net = net_of(unit)
    with se.use_backend("auto"), warnings.catch_warnings():
        warnings.simplefilter("ignore", se.ReferenceFallbackWarning)
        x, expected = torch.randn(2, 24, 9, 11), None
        with torch.no_grad():
            expected = net[1](x)
            se.fuse(net)
            torch.testing.assert_close(net[1](x), expected)
    assert is_fused(unit)
    assert {name: getattr(unit.fused_unit, name) for name in what} == what


def test_foreign_unit_whose_pool_leaves_out_the_padding():
    net = net_of(PoolWithoutPaddingUnit(24, 48, 2, 2))
    assert_fuses_all(net, 1)
    assert not net[1][0].fused_unit.pool_count_include_pad


def test_fresh_foreign_units_are_told_apart():
    # Fresh batch norms and small weights must not hide a difference.
    net = nn.Sequential(KuangliuUnit(), ForeignUnit())
    assert [unit.fused_unit.conv2_relu for unit in se.fuse(net)] == [True, False]


@pytest.mark.parametrize(
    ("unit", "difference"),
    [
        (DropoutUnit(), r"ends in dropout"),
        (DilatedUnit(), r"depthwise convolution has .*dilation 2"),
        (FiveByFiveUnit(), r"depthwise convolution has kernel_size 5"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_unit_that_differs_is_left_alone_with_a_warning(unit, difference):
    net = nn.Sequential(nn.Sequential(randomize(unit)), ForeignUnit())
    state = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.warns(se.FuseWarning, match=rf"'0\.0' \({type(unit).__name__}\).*{difference}") as caught:
        se.fuse(net)
    assert len(caught) == 1
    assert net[0][0] is unit
    assert is_fused(net[1])
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_training_models_train_on():
    unit = randomize(ForeignUnit(24, 48, 2, 3))
    twin = ForeignUnit(24, 48, 2, 3)
    twin.load_state_dict(unit.state_dict())
    optimizer = torch.optim.SGD(unit.parameters(), lr=0.1)
    fused = se.fuse(unit)
    assert fused.training
    assert all(module.training for module in fused.modules())
    assert unit.bn1.num_batches_tracked == 0, "the proof must leave statistics alone"
    for _ in range(2):
        x = torch.randn(3, 24, 6, 7)
        got, expected = fused(x), twin(x)
        torch.testing.assert_close(got, expected)
        optimizer.zero_grad()
        twin.zero_grad()
        got.square().mean().backward()
        expected.square().mean().backward()
        optimizer.step()  # built before fuse, it holds the same parameters
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter -= 0.1 * parameter.grad
    for (name, a), b in zip(fused.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_proof_leaves_the_random_generator_alone():
    unit = ForeignUnit()
    before = torch.get_rng_state()
    se.fuse(unit)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_unit_used_twice_stays_one():
    unit = ForeignUnit()
    net = net_of(unit, nn.Identity(), unit)
    se.fuse(net)
    assert net[1][0] is net[1][2] is unit
    assert is_fused(unit)


def test_units_that_share_parameters():
    first, second = ForeignUnit(), ForeignUnit()
    second.conv1 = first.conv1
    net = net_of(first, second)
    assert_fuses_all(net, 2)
    assert net[1][0].conv1 is net[1][1].conv1


def test_nested_lists_and_dicts():
    net = nn.ModuleDict({"a": nn.ModuleList([nn.Sequential(ForeignUnit())]), "b": ForeignUnit()})
    se.fuse(net)
    assert is_fused(net["a"][0][0])
    assert is_fused(net["b"])


def test_a_unit_itself():
    unit = randomize(ForeignUnit()).eval()
    fused = se.fuse(unit)
    assert fused is unit
    assert is_fused(unit)
    assert not fused.training
    with assert_ran(OP):
        fused(torch.randn(2, 24, 5, 5))


def test_model_without_units():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.warns(se.FuseWarning, match="no ShuffleNet unit: no module of the model holds three convolutions"):
        assert se.fuse(net) is net
    net = nn.Sequential(nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))))
    with pytest.warns(se.FuseWarning, match=r"'0' \(Sequential\) as it is: it ends in conv2d, expected"):
        assert se.fuse(net) is net


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(dtype):
    fused = se.fuse(randomize(ForeignUnit()).eval().to(dtype))
    assert fused.conv1.weight.dtype == dtype
    with assert_ran(OP):
        assert fused(torch.randn(2, 24, 5, 5, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("model", [None, torch.zeros(2), "net", se.ShuffleBottleneck])
def test_not_a_module(model):
    with pytest.raises(TypeError, match=r"model: got \w+, expected a torch\.nn\.Module"):
        se.fuse(model)


def test_the_default_device_does_not_matter():
    unit = ForeignUnit(24, 24, 1, 3)
    with torch.device("meta"):
        (fused,) = se.fuse(nn.Sequential(unit))
    assert is_fused(fused)


def test_the_module_stays_what_it_is():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.unit = unit

        def forward(self, x):
            return self.unit(x) * self.unit.scale

    unit, seen = randomize(ForeignUnit()).eval(), []
    unit.scale = 2
    unit.register_forward_pre_hook(lambda module, args: seen.append("before"))
    unit.register_forward_hook(lambda module, args, y: seen.append("after"))
    net = Net()
    se.fuse(net)
    assert not seen, "the proof must not run the hooks"
    with assert_ran(OP):
        net(torch.randn(1, 24, 5, 5))
    assert net.unit is unit
    assert seen == ["before", "after"]


def test_copies():
    unit = se.fuse(randomize(ForeignUnit()).eval())
    x = torch.randn(1, 24, 5, 5)
    for twin in (copy.deepcopy(unit), pickle.loads(pickle.dumps(unit))):
        assert type(twin) is type(unit)
        with assert_ran(OP, times=2):
            assert torch.equal(twin(x), unit(x))
        twin.bn1.eps = 1.0
        with pytest.raises(RuntimeError, match="not what it was"):
            twin(x)
        with assert_ran(OP):
            unit(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda unit: setattr(unit.bn2, "eps", 0.5),
        lambda unit: setattr(unit, "shuffle_groups", 2),
        lambda unit: setattr(unit.conv2, "padding", (0, 0)),
        lambda unit: setattr(unit, "bn3", nn.Identity()),
        lambda unit: setattr(unit.conv1, "bias", nn.Parameter(torch.ones(6))),
        lambda unit: unit.conv3.register_forward_hook(lambda module, args, y: y * 2),
    ],
)
def test_a_unit_that_was_changed_runs_its_own_code(change):
    unit, twin = (randomize(ForeignUnit(24, 24, 2)).eval() for _ in range(2))
    se.fuse(unit)
    x = torch.randn(1, 24, 7, 7)
    before = unit(x)
    for module in (unit, twin):
        change(module)
    with pytest.raises(RuntimeError, match="not what it was when fuse"):
        unit(x)
    with se.use_backend("auto"), warnings.catch_warnings():
        warnings.simplefilter("ignore", se.ReferenceFallbackWarning)
        try:
            expected = twin(x)
        except RuntimeError:
            return  # no unit any more
        got = unit(x)
    torch.testing.assert_close(got, expected)
    assert got.shape != before.shape or not torch.allclose(got, before), "the change has no effect: it proves nothing"


def test_new_values_and_tensors_are_seen():
    unit, twin = (randomize(ForeignUnit(), seed=s).eval() for s in (0, 1))
    se.fuse(unit)
    x = torch.randn(1, 24, 7, 7)
    unit.load_state_dict(twin.state_dict())
    with assert_ran(OP):
        got = unit(x)
    torch.testing.assert_close(got, twin(x))
    for module in (unit, twin):
        module.conv2.weight = nn.Parameter(torch.ones(6, 1, 3, 3))
    with assert_ran(OP):
        got = unit(x)
    torch.testing.assert_close(got, twin(x))


def test_compiled_units_see_what_changes():
    unit, twin = (randomize(ForeignUnit()).eval() for _ in range(2))
    se.fuse(unit)
    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 24, 7, 7)
    torch.testing.assert_close(compiled(x), twin(x))
    for change in (
        lambda module: module.train(),
        lambda module: module.eval(),
        lambda module: setattr(module.bn1, "eps", 0.5),
        lambda module: setattr(module, "bn3", nn.Identity()),
    ):
        for module in (unit, twin):
            change(module)
        with se.use_backend("auto"), warnings.catch_warnings():
            warnings.simplefilter("ignore", se.ReferenceFallbackWarning)
            torch.testing.assert_close(compiled(x), twin(x))
