"""fuse: what it swaps, what it leaves alone and says so, and that nothing but the speed changes."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from support import assert_ran, randomize
from torch import nn

import shufflenet_ext as se

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


class DilatedUnit(ForeignUnit):
    def __init__(self):
        super().__init__()
        self.conv2 = nn.Conv2d(6, 6, 3, 1, 2, dilation=2, groups=6, bias=False)


class ParameterUnit(ForeignUnit):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


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
        assert [type(m) for m in net[1]] == [se.FusedShuffleBottleneck] * units
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
    assert net[1][0].conv2_relu == (unit_class is KuangliuUnit)


def test_foreign_unit_whose_pool_leaves_out_the_padding():
    net = net_of(PoolWithoutPaddingUnit(24, 48, 2, 2))
    assert_fuses_all(net, 1)
    assert not net[1][0].pool_count_include_pad


def test_fresh_foreign_units_are_told_apart():
    # Fresh batch norms and small weights must not hide a difference.
    net = nn.Sequential(KuangliuUnit(), ForeignUnit())
    assert [unit.conv2_relu for unit in se.fuse(net)] == [True, False]


@pytest.mark.parametrize(
    ("unit", "difference"),
    [
        (OtherShuffleUnit(), r"results differ .* by \d"),
        (OtherOrderUnit(24, 24, 2, 3), r"results differ .* by \d"),
        (DropoutUnit(), r"results differ .* by \d"),
        (BiasUnit(), r"conv3 has a bias"),
        (DilatedUnit(), r"conv2 is .*dilation"),
        (ParameterUnit(), r"parameters of its own"),
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
    assert type(net[1]) is se.FusedShuffleBottleneck
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
    assert net[1][0] is net[1][2]
    assert type(net[1][0]) is se.FusedShuffleBottleneck


def test_units_that_share_parameters():
    first, second = ForeignUnit(), ForeignUnit()
    second.conv1 = first.conv1
    net = net_of(first, second)
    assert_fuses_all(net, 2)
    assert net[1][0].conv1 is net[1][1].conv1


def test_nested_lists_and_dicts():
    net = nn.ModuleDict({"a": nn.ModuleList([nn.Sequential(ForeignUnit())]), "b": ForeignUnit()})
    se.fuse(net)
    assert type(net["a"][0][0]) is type(net["b"]) is se.FusedShuffleBottleneck


def test_a_unit_itself():
    unit = randomize(ForeignUnit()).eval()
    fused = se.fuse(unit)
    assert type(fused) is se.FusedShuffleBottleneck
    assert not fused.training
    with assert_ran(OP):
        fused(torch.randn(2, 24, 5, 5))


def test_model_without_units():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
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
    assert isinstance(fused, se.FusedShuffleBottleneck)
