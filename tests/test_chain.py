"""Several modules as one op in eval mode, shuffle_network_batch_norm: whole networks, stems, and Sequentials."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from support import LAYOUTS, Network, Recorder, Unit, assert_as_accurate, autocast, network_op, randomize
from torch import nn

import shufflenet_ext as se
from benchmarks.public_styles import BlocksStyle, MegviiStyle
from shufflenet_ext import reference
from shufflenet_ext._chain import FusedSequential, FusedStem

OP = "shufflenet_ext::shuffle_network_batch_norm"
op = torch.ops.shufflenet_ext.shuffle_network_batch_norm
UNITS = (
    Unit(groups=3, in_channels=24, mid_channels=12, out_channels=36, stride=2, conv1_groups=1),
    Unit(groups=3, in_channels=60, mid_channels=24, shuffle_groups=4),
)
STEM, BARE_STEM = (24, 3, 2, 1, 1), (24, 3, 2, 1, 1, 0)


def arguments(network, dtype=torch.float32, layout=LAYOUTS[0], norm_dtype=None):
    """The op's arguments: every second convolution has a bias, every third no norm, every fifth no affine one."""
    x, _, program = network.arguments(dtype, layout)
    parameters = network.parameters(dtype)
    convolutions = len(parameters) // 2 - (network.head is not None)
    generator, norm_dtype = torch.Generator().manual_seed(3), norm_dtype or dtype
    tensors = []
    for i in range(convolutions):
        weight, bias = parameters[2 * i : 2 * i + 2]
        norm = [torch.rand(len(bias), generator=generator, dtype=torch.float64) + 0.5 for _ in range(4)]
        norm[2] -= 1
        norm = [tensor.to(norm_dtype) for tensor in norm]
        if i % 3 == 2:
            norm = [None] * 4
        elif i % 5 == 4:
            norm[:2] = None, None
        tensors += [weight, bias if i % 2 or i % 3 == 2 else None, *norm]
    return x, tensors + parameters[2 * convolutions :], [10.0 ** -(i % 3 + 1) for i in range(convolutions)], program


def ran(call, *args):
    """What a call returns, and the names of the convolutions and native ops that it ran."""
    with Recorder() as recorder:
        result = call(*args)
    return result, [name for name in recorder.names if name == "aten::convolution" or name.startswith("shufflenet")]


def assert_close(got, expected):
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


# ---- The op ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("head", [None, (10, 0)], ids=str)
@pytest.mark.parametrize("units", [(), UNITS], ids=len)
@pytest.mark.parametrize("stem", [None, STEM, BARE_STEM], ids=str)
def test_as_accurate_as_pytorch(stem, units, head, program_dtype, layout):
    if not (stem or units or head):
        return
    network = Network(units, stem, head, in_channels=3 if stem else 24, plane=(15, 22))
    x, tensors, eps, program = arguments(network, program_dtype, layout)
    exact = reference.shuffle_network_batch_norm(
        x.double(), [t if t is None else t.double() for t in tensors], eps, program
    )
    got = op(x, tensors, eps, program)
    assert got.dtype == x.dtype
    assert_as_accurate(got, reference.shuffle_network_batch_norm(x, tensors, eps, program), exact)
    torch.set_num_threads(2)
    assert torch.equal(op(x, tensors, eps, program), got)


def test_batch_norm_of_float32_beside_16_bit_weights(isa):
    network = Network(UNITS, STEM, (10, 0), in_channels=3)
    x, tensors, eps, program = arguments(network, torch.bfloat16, norm_dtype=torch.float32)
    exact = reference.shuffle_network_batch_norm(
        x.double(), [t if t is None else t.double() for t in tensors], eps, program
    )
    assert_as_accurate(op(x, tensors, eps, program), exact.bfloat16(), exact)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("head", [None, (10, 0)], ids=str)
def test_opcheck(head, layout):
    torch.library.opcheck(
        op.default, arguments(Network(UNITS, STEM, head, in_channels=3, plane=(9, 12)), layout=layout)
    )


def bad_arguments():
    network = Network(UNITS[:1], STEM, (10, 0), in_channels=3)
    x, tensors, eps, program = arguments(network)
    yield (x, tensors[:-1], eps, program), r"tensors: got 25, expected 6 for each of the 4 eps"
    yield (x, tensors, eps[:-1], program), r"tensors: got 26, expected 6 for each of the 3 eps"
    yield (x, tensors, eps, program[:-3]), r"weights: got \d+ elements, expected|got those of 5"
    yield (x, tensors[6:], eps[1:], program[7:]), r"program: conv1_groups|weights: got|got \[|conv"
    yield (x, [None, *tensors[1:]], eps, program), r"tensors: got None for a weight, at 0|tensors: got NoneType"
    yield (x, [tensors[0][:, :2], *tensors[1:]], eps, program), r"conv1_weight: got shape|weights: got"
    yield (x, [*tensors[:2], tensors[2][:5], *tensors[3:]], eps, program), r"bn1_weight: got shape \[5\]"
    yield (
        (x, [*tensors[:4], None, *tensors[5:]], eps, program),
        r"tensors: got a batch norm without its mean",
    )
    yield (x, [*tensors[:4], None, None, *tensors[6:]], eps, program), r"tensors: got a batch norm without its mean"
    yield (x, [tensors[0].double(), *tensors[1:]], eps, program), r"conv1_weight: got dtype float64"
    yield (x[0], tensors, eps, program), r"x: got shape"


@pytest.mark.parametrize(("bad", "message"), list(bad_arguments()))
def test_errors(bad, message):
    with pytest.raises(RuntimeError, match=message):
        op(*bad)


@pytest.mark.parametrize("missing", [(4,), (5,), (4, 5)], ids=str)
def test_the_reference_refuses_half_a_norm(missing):
    x, tensors, eps, program = arguments(Network(UNITS[:1], STEM, None, in_channels=3))
    for i in missing:
        tensors[i] = None
    with pytest.raises(ValueError, match="tensors: got a batch norm without its mean or variance, at 0, expected both"):
        reference.shuffle_network_batch_norm(x, tensors, eps, program)


# ---- This package's networks ----------------------------------------------------------------------------------------


@pytest.fixture
def net():
    return randomize(se.models.ShuffleNetG2()).eval()


images = torch.linspace(-2, 2, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32)


def check(net, expected_ops=(OP,)):
    """The network's result, which must be the reference's of its present state, and by these ops."""
    with torch.no_grad():
        got, names = ran(net, images)
        with se.use_backend("reference"):
            expected = net(images)
    assert_close(got, expected)
    assert names == list(expected_ops)


UNIT_BY_UNIT = ["aten::convolution"] + ["shufflenet_ext::shuffle_bottleneck_batch_norm"] * 16


def test_nothing_is_stale(net):
    check(net)
    for tensor in [*net.parameters(), *net.buffers()]:
        if tensor.is_floating_point():
            tensor.data.mul_(1.01)
    check(net)
    net.layer2[3].conv1.weight = nn.Parameter(net.layer2[3].conv1.weight * 2)
    net.bn1.running_mean = net.bn1.running_mean + 1
    check(net)
    net.bn1.eps = 0.1
    net.layer1[0].bn2.eps = 0.5
    check(net)
    net.load_state_dict(randomize(se.models.ShuffleNetG2(), seed=1).state_dict())
    check(net)
    net.linear = nn.Linear(800, 7, bias=False).eval()
    check(net)
    net.conv1 = nn.Conv2d(3, 24, 5, padding=2).eval()
    check(net)
    net.layer3[1] = randomize(se.FusedShuffleBottleneck(800, 800, 1, 4)).eval()
    check(net)
    net.train()(images)
    check(net.eval())
    check(copy.deepcopy(net))
    check(pickle.loads(pickle.dumps(net)))


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.register_forward_hook(lambda module, args, y: y * 2),
        lambda net: net.layer2.register_forward_hook(lambda module, args, y: y * 2),
        lambda net: net.layer2[1].register_forward_hook(lambda module, args, y: y * 2),
        lambda net: net.bn1.register_forward_hook(lambda module, args, y: y * 2),
        lambda net: setattr(net.conv1, "forward", lambda x: nn.Conv2d.forward(net.conv1, 2 * x)),
        lambda net: setattr(net, "bn1", nn.Identity()),
        lambda net: setattr(net.conv1, "padding_mode", "circular"),
    ],
    ids=["net", "stage", "unit", "norm", "forward", "replaced", "padding"],
)
def test_a_network_that_is_more_than_its_parts_runs_module_by_module(net, change):
    check(net)
    change(net)
    check(net, UNIT_BY_UNIT)


def test_hooks_of_all_modules_see_every_one(net):
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module)):
        check(net, UNIT_BY_UNIT)
    assert net.layer1[2] in seen


def test_a_plan_does_not_keep_its_network_alive():
    net = randomize(se.models.ShuffleNetG2()).eval()
    check(net)
    net.layer1[0].tag = 3
    check(net)
    del net.layer1[0].tag
    check(net)
    kept = weakref.ref(net.layer1[0])
    del net
    gc.collect()
    assert kept() is None


def test_modules_of_a_network_in_training_mode(net):
    check(net)
    net.layer1[2].bn3.train()
    with torch.no_grad():
        _, names = ran(net, images)
    assert names.count("shufflenet_ext::shuffle_bottleneck_batch_norm") == 15


def test_gradients_autocast_and_tracing_take_it_module_by_module(net):
    x = images.clone().requires_grad_()
    _, names = ran(net, x)
    assert names == UNIT_BY_UNIT
    (got,) = torch.autograd.grad(net(x).square().sum(), x)
    with se.use_backend("reference"):
        (expected,) = torch.autograd.grad(net(x).square().sum(), x)
    assert_close(got, expected)
    with torch.no_grad(), autocast(torch.bfloat16):
        _, names = ran(net, images)
        assert OP not in names
    with torch.no_grad():
        traced = torch.jit.trace(net, images)
        _, names = ran(traced, images)
        assert OP not in names
        assert_close(traced(images), net(images))
        nodes = [str(node.target) for node in torch.export.export(net, (images,)).graph.nodes]
        assert nodes.count("shufflenet_ext.shuffle_bottleneck_batch_norm.default") == 16
        weights = {name: tensor * 1.1 for name, tensor in net.named_parameters()}
        got = torch.func.functional_call(net, weights, (images,))
        with se.use_backend("reference"):
            assert_close(got, torch.func.functional_call(net, weights, (images,)))


def test_a_unit_used_twice():
    unit = se.FusedShuffleBottleneck(24, 24, 1, 3)
    twice = randomize(se.fuse(nn.Sequential(unit, unit, se.ShuffleBottleneck(24, 24, 1, 3)))).eval()
    x = torch.randn(2, 24, 9, 9)
    with torch.no_grad():
        got, names = ran(twice, x)
        assert names == [OP]
        with se.use_backend("reference"):
            assert_close(got, twice(x))


def test_unsupported_dtypes_and_the_reference(net):
    with torch.no_grad(), se.use_backend("reference"):
        _, names = ran(net, images)
        assert set(names) == {"aten::convolution"}
    for dtype in (torch.float64, torch.bfloat16):
        with torch.no_grad():
            got, names = ran(copy.deepcopy(net).to(dtype), images.to(dtype))
            assert names == [OP]
            assert got.dtype == dtype
            assert (got - net(images)).abs().max() <= 0.1 * got.abs().max()


def test_channels_last_and_other_sizes():
    net = randomize(se.models.shufflenet_v1(8, 0.25)).eval()
    with torch.no_grad():
        for size in ((64, 64), (33, 97)):
            x = torch.randn(3, 3, *size)
            expected, names = ran(net, x)
            assert names == [OP]
            assert_close(net(x.contiguous(memory_format=torch.channels_last)), expected)
            with se.use_backend("reference"):
                assert_close(expected, net(x))


# ---- Other people's networks ----------------------------------------------------------------------------------------


class Stem(nn.Module):
    def __init__(self, activation=nn.ReLU, channels=3, bias=False):
        super().__init__()
        self.conv = nn.Conv2d(channels, 24, 3, stride=2, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(24)
        self.activation = activation()
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x):
        return self.pool(self.activation(self.norm(self.conv(x))))


def model(stem):
    units = MegviiStyle().features[:2]
    units[0] = se.ShuffleBottleneck(24, 24, 2, 3)
    return randomize(nn.Sequential(stem, nn.Sequential(units[0], se.ShuffleBottleneck(48, 48, 1, 3)))).eval()


def check_fused(plain, expected_ops, x=None):
    x = torch.randn(2, 3, 37, 41) if x is None else x
    fused = se.fuse(copy.deepcopy(plain))
    assert list(fused.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        for twin in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            got, names = ran(twin, x)
            assert_close(got, plain(x))
            assert names == expected_ops
    return fused


@pytest.mark.parametrize("bias", [False, True])
def test_a_stem_and_units_are_one_op(bias):
    fused = check_fused(model(Stem(bias=bias)), [OP])
    assert isinstance(fused[0], FusedStem)
    assert type(fused) is type(fused[1]) is FusedSequential
    x = torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        got, names = ran(fused[0], x)
        assert names == [OP]
        assert_close(got, F.max_pool2d(F.relu(fused[0].norm(fused[0].conv(x))), 3, 2, 1))


def test_training_goes_on():
    plain = model(Stem())
    fused = se.fuse(copy.deepcopy(plain)).train()
    plain.train()
    x = torch.randn(2, 3, 32, 32)
    for module in (plain, fused):
        module(x).square().sum().backward()
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-3)  # of biases ahead of norms: zero
    plain.eval()
    with torch.no_grad():
        got, names = ran(fused.eval(), x)
    assert names == [OP]
    assert_close(got, plain(x))


@pytest.mark.parametrize(
    "stem", [Stem(nn.ReLU6), Stem(nn.Identity, bias=True), nn.Sequential(Stem(), nn.Dropout2d(0.5))], ids=str
)
def test_near_misses_of_a_stem(stem):
    # A stem without ReLU is one, a ReLU6 and a dropout are not; the units behind it run as one op in any case.
    has_stem = isinstance(stem, Stem) and isinstance(stem.activation, nn.Identity)
    fused = se.fuse(model(stem))
    assert isinstance(fused[0], FusedStem) == has_stem


def test_a_convolution_of_features_is_no_stem():
    x = torch.randn(1, 5, 32, 32)
    check_fused(model(Stem(channels=5)), ["aten::convolution", OP], x)


def test_what_is_changed_after_fuse_runs_its_own_code():
    x = torch.randn(1, 3, 40, 40)
    for change in (
        lambda m: setattr(m[0], "activation", nn.GELU()),
        lambda m: setattr(m[0].pool, "kernel_size", 2),
        lambda m: m[0].norm.register_forward_hook(lambda module, args, y: y + 1),
        lambda m: m[0].register_forward_hook(lambda module, args, y: y + 1),
    ):
        plain = model(Stem())
        fused = se.fuse(copy.deepcopy(plain))
        with torch.no_grad():
            fused(x)
            for each in (plain, fused):
                change(each)
            got, names = ran(fused, x)
            assert_close(got, plain(x))
            assert "aten::convolution" in names or len(names) == 2


def test_the_styles():
    with torch.no_grad():
        for style, size in ((BlocksStyle, 16), (MegviiStyle, 64)):
            plain = randomize(style()).eval()
            check_fused(plain, [OP] * 2, torch.randn(2, 3, size, size))  # the stem, and all units


def test_a_program_of_tensors_equals_that_of_packed_weights(net):
    optimized = se.optimize_for_inference(net).model
    with torch.no_grad():
        assert_close(net(images), network_op(images, optimized.weights, optimized.program))
