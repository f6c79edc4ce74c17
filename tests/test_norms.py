"""Norms of every kind, in units of our own and of others: native where they keep statistics, right always."""

import copy

import pytest
import torch
from support import Recorder, assert_as_accurate, assert_ran, assert_ran_reference, randomize
from test_fuse import ForeignUnit
from torch import nn

import shufflenet_ext as se

UNIT, CHAIN = "shuffle_bottleneck_batch_norm", "shuffle_network_batch_norm"


def without_affine(channels):
    return nn.BatchNorm2d(channels, affine=False)


def cumulative(channels):
    return nn.BatchNorm2d(channels, momentum=None)


def without_statistics(channels):
    return nn.BatchNorm2d(channels, track_running_stats=False)


class ScaledNorm(nn.BatchNorm2d):
    """A batch norm in name alone."""

    def forward(self, x):
        return 2 * super().forward(x)


each_kind = pytest.mark.parametrize("kind", [without_affine, cumulative, nn.SyncBatchNorm])
each_unit = pytest.mark.parametrize("unit_class", [se.ShuffleBottleneck, ForeignUnit])


def with_norms(model, kind):
    """The model with norms of a kind in the place of its batch norms."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, kind(child.num_features))
    return randomize(model)


def units(unit_class, kind):
    return with_norms(nn.Sequential(unit_class(24, 24, 1, 3), unit_class(24, 48, 2, 3)), kind).eval()


def images(batch=2):
    return torch.randn(batch, 24, 7, 6)


def assert_native(fused, plain, op=CHAIN):
    x = images()
    with torch.no_grad():
        with assert_ran(op, 1):
            got = fused(x)
        assert_as_accurate(got, plain(x), copy.deepcopy(plain).double()(x.double()))


@each_kind
@each_unit
def test_norms_with_statistics_are_native(unit_class, kind):
    plain = units(unit_class, kind)
    fused = se.fuse(copy.deepcopy(plain))
    assert_native(fused, plain)
    assert_native(se.optimize_for_inference(fused), plain, "shuffle_network")


@each_kind
@each_unit
def test_training_is_that_of_the_plain_model(unit_class, kind):
    plain = units(unit_class, kind).train()
    fused = se.fuse(copy.deepcopy(plain))
    for _ in range(2):
        x = images(3)
        got, expected = fused(x), plain(x)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        for result in (got, expected):
            result.square().sum().backward()
    for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)
    for a, b in zip(fused.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert_native(fused.eval(), plain.eval())


@pytest.mark.parametrize("which", ["bn1", "bn2", "bn3"])
def test_without_statistics_our_own_unit_is_the_plain_one(which):
    plain = randomize(se.ShuffleBottleneck(24, 24, 1, 3)).eval()
    setattr(plain, which, without_statistics(getattr(plain, which).num_features))
    fused = se.fuse(copy.deepcopy(plain.eval())).eval()
    x = images()
    with pytest.raises(RuntimeError, match=r"backend 'native' was asked for, but .* has no running statistics"):
        fused(x)
    with torch.no_grad(), se.use_backend("auto"), assert_ran_reference():
        with pytest.warns(se.ReferenceFallbackWarning, match="has no running statistics"):
            got = fused(x)
        torch.testing.assert_close(got, plain(x))
        torch.testing.assert_close(se.optimize_for_inference(fused)(x), plain(x))
    with assert_ran("shuffle_bottleneck_training"):
        got = fused.train()(x)
    torch.testing.assert_close(got, plain.train()(x), rtol=1e-4, atol=1e-4)


def test_without_statistics_a_foreign_unit_is_left_alone():
    plain = units(ForeignUnit, without_statistics)
    fused = copy.deepcopy(plain)
    with pytest.warns(se.FuseWarning, match="a batch norm has no running statistics"):
        se.fuse(fused)
    x = images()
    assert torch.equal(fused(x), plain(x))
    with torch.no_grad(), se.use_backend("auto"):
        optimized = se.optimize_for_inference(plain, example_inputs=(x,))
        torch.testing.assert_close(optimized(x), plain(x))


@pytest.mark.parametrize("norm", [ScaledNorm, nn.InstanceNorm2d, lambda channels: nn.GroupNorm(1, channels)])
def test_what_only_looks_like_a_batch_norm_is_not_taken_for_one(norm):
    unit = randomize(se.FusedShuffleBottleneck(24, 24, 1, 3)).eval()
    unit.bn2 = norm(6).eval()
    with pytest.raises(RuntimeError, match=r"backend 'native' was asked for, but .* batch norm was replaced"):
        unit(images())


@each_unit
def test_norms_converted_behind_fuse(unit_class):
    plain = units(unit_class, nn.BatchNorm2d)
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(se.fuse(copy.deepcopy(plain)))
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in fused.modules()) == 6
    assert_native(fused, plain)
    assert_native(copy.deepcopy(fused), plain)
    assert_native(se.optimize_for_inference(fused), plain, "shuffle_network")
    x = images(3)
    torch.testing.assert_close(fused.train()(x), plain.train()(x), rtol=1e-4, atol=1e-4)
    # What changes in a converted norm is seen as in any other.
    for model in (fused, plain):
        model.eval()[0].bn1.eps = 0.5
    with se.use_backend("auto"):
        if unit_class is ForeignUnit:
            with pytest.warns(se.ReferenceFallbackWarning, match="not what it was when fuse"):
                fused(images())
        got, expected = (model(x) for model in (fused, plain))
    torch.testing.assert_close(got, expected)


def test_norms_converted_into_others_are_not_taken():
    unit = se.fuse(randomize(ForeignUnit())).eval()
    norm = nn.SyncBatchNorm(6, eps=0.5).eval()
    unit.add_module("bn1", norm)
    with pytest.raises(RuntimeError, match="not what it was when fuse"):
        unit(images())


class Processes:
    """Stands for a process group, which cannot be copied."""

    def __deepcopy__(self, memo):
        raise TypeError("cannot copy a process group")


@pytest.fixture
def distributed():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("distributed")
def test_fuse_amid_distributed_training():
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(ForeignUnit(), Processes())
    with pytest.raises(ValueError, match="expected input tensor to be on"):
        plain(images())  # in distributed training it takes no tensors of a CPU
    fused = se.fuse(plain).eval()
    assert type(fused.bn1) is nn.SyncBatchNorm
    with assert_ran(UNIT):
        fused(images())


class Classifier(nn.Module):
    def __init__(self, unit_class, kind):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.units = nn.Sequential(unit_class(24, 24, 1, 3), unit_class(24, 48, 2, 3))
        self.linear = nn.Linear(72, 5)
        with_norms(self, kind)

    def forward(self, x):
        return self.linear(self.units(self.bn1(self.conv1(x)).relu()).mean((2, 3)))


@each_kind
@each_unit
def test_whole_models(unit_class, kind):
    model = Classifier(unit_class, kind).eval()
    x = torch.randn(2, 3, 17, 15)
    for source in (model, se.fuse(copy.deepcopy(model))):
        optimized = se.optimize_for_inference(source, example_inputs=(x,))
        with torch.no_grad(), assert_ran("shuffle_network"):
            got = optimized(x)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [without_affine, cumulative, nn.SyncBatchNorm, without_statistics])
def test_own_networks(kind):
    net = with_norms(se.models.shufflenet_v1(width=0.25), kind).eval()
    x = torch.randn(2, 3, 33, 32)
    with torch.no_grad(), Recorder() as recorder:
        if kind is without_statistics:
            with se.use_backend("auto"), pytest.warns(se.ReferenceFallbackWarning, match="no running statistics"):
                got = se.optimize_for_inference(net)(x)
        else:
            got = se.optimize_for_inference(net)(x)
    assert recorder.names.count("shufflenet_ext::shuffle_network") == (kind is not without_statistics)
    with torch.no_grad(), se.use_backend("reference"):
        torch.testing.assert_close(got, net(x), rtol=1e-3, atol=1e-3)
