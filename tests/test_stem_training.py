"""Stems in training mode: the native step's results, statistics and gradients are those of the plain modules."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    ISAS,
    LAYOUTS,
    Recorder,
    assert_ran,
    assert_refuses_what_does_not_fit,
    assert_strides_of_layout,
    autocast,
    passes_of,
    randomize,
    selected_isa,
    sizes_at_the_tile,
)
from torch import distributed, nn
from torch.utils.flop_counter import FlopCounterMode

import shufflenet_ext as se
from shufflenet_ext import _stem_training_op
from shufflenet_ext._chain import train_stem

OP = _stem_training_op.NAME


class Stem(nn.Module):
    """A convolution, its norm, a ReLU and a max pool or none."""

    def __init__(self, in_channels=3, out_channels=24, size=3, stride=2, padding=1, bias=False, max_pool=True):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, size, stride, padding, bias=bias)
        self.bn = nn.BatchNorm2d(out_channels)
        self.max_pool = max_pool

    def forward(self, x):
        result = train_stem(self, x, self.conv, self.bn, max_pool=self.max_pool)
        if result is not None:
            return result
        y = F.relu(self.bn(self.conv(x)))
        return F.max_pool2d(y, 3, stride=2, padding=1) if self.max_pool else y


STEMS = [
    {},
    {"size": 1, "stride": 1, "padding": 0, "max_pool": False},
    {"in_channels": 4, "out_channels": 7, "stride": 1, "bias": True},
    {"in_channels": 1, "out_channels": 10, "size": 5, "padding": 2, "bias": True, "max_pool": False},
]
each_stem = pytest.mark.parametrize("configuration", STEMS, ids=str)


def stem(configuration=STEMS[0], dtype=torch.float32):
    return randomize(Stem(**configuration)).to(dtype).train()


def images(module, batch=3, plane=(13, 18)):
    return torch.randn(batch, module.conv.in_channels, *plane, dtype=module.conv.weight.dtype)


def plain(module, x):
    with se.use_backend("reference"):
        return module(x)


def step(module, x, gradient=None, run=plain):
    """A training step: the result, the buffers, and the gradients of x and of the parameters."""
    module, x = copy.deepcopy(module), x.detach().requires_grad_()
    result = run(module, x)
    result.backward(torch.ones_like(result) if gradient is None else gradient.to(result.dtype))
    named = {f"grad of {name}": p.grad for name, p in module.named_parameters() if p.requires_grad}
    return {"result": result.detach(), "grad of x": x.grad, **named, **dict(module.named_buffers())}


def native(module, x):
    with assert_ran(OP):
        return module(x)


def assert_equal_steps(module, x, gradient=None, tolerance=1e-9):
    got, expected = step(module, x, gradient, native), step(module, x, gradient)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        # Statistics of few values can make a norm steep, and its gradients large.
        scale = 1 + max(each.abs().max() for each in expected.values() if each.is_floating_point()).item()
        torch.testing.assert_close(got[name], value, rtol=1e-7, atol=tolerance * scale, msg=lambda m, n=name: n + m)


def assert_as_accurate_steps(module, x):
    """Fails where the step is further from float64 than PyTorch's in the module's dtype, times a factor."""
    gradient = torch.randn_like(plain(copy.deepcopy(module), x))
    got, expected = step(module, x, gradient, native), step(module, x, gradient)
    exact = step(copy.deepcopy(module).double(), x.double(), gradient.double())
    eps = torch.finfo(x.dtype).eps
    scale = max(value.abs().max() for name, value in exact.items() if "conv" in name or value.dim() == 4)
    for name, value in exact.items():
        assert got[name].dtype == expected[name].dtype, name
        assert got[name].shape == value.shape, name
        assert got[name].isfinite().all(), name
        errors = [(each[name].double() - value).square().mean().sqrt() for each in (got, expected)]
        # Sums that cancel, such as the gradient of a bias ahead of a norm, have no digits of their own.
        floor = 4 * eps * value.double().square().mean().sqrt() + eps * scale * value.numel() ** -0.5
        factor = 2 if value.dim() == 4 else 3
        assert errors[0] <= factor * errors[1] + floor, f"{name}: error {errors[0]:.3g}, PyTorch's {errors[1]:.3g}"


@each_stem
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_steps(configuration, dtype, layout):
    module = stem(configuration, dtype)
    x = images(module).contiguous(memory_format=layout)
    assert_as_accurate_steps(module, x)
    x = x.requires_grad_()
    result = native(module, x)
    result.sum().backward()
    if module.conv.in_channels > 1:  # else x is contiguous as well
        assert_strides_of_layout(result, layout)
        assert_strides_of_layout(x.grad, layout)


@each_stem
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_steps_in_float64(configuration, layout):
    module = stem(configuration, torch.float64)
    assert_equal_steps(module, images(module).contiguous(memory_format=layout))


@pytest.mark.parametrize("isa", ISAS)
@each_stem
def test_isas(isa, configuration):
    with selected_isa(isa):
        assert_as_accurate_steps(stem(configuration), images(stem(configuration), plane=(21, 37)))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("max_pool", [False, True])
def test_small_planes(stride, max_pool):
    module = stem({"out_channels": 5, "stride": stride, "max_pool": max_pool}, torch.float64)
    for plane in itertools.product(range(1, 10), range(1, 10)):
        for batch in (1, 2) if max(plane) > stride else (3,):
            assert_equal_steps(module, images(module, batch, plane))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_planes_at_the_tile(isa, dtype):
    with selected_isa(isa):
        for width in sizes_at_the_tile(isa, dtype):
            for max_pool in (False, True):
                # Of the convolution's rows, then of the pool's.
                module = stem({"stride": 1, "out_channels": 9, "max_pool": max_pool}, dtype)
                x = images(module, 2, (4, 2 * width if max_pool else width))
                if dtype == torch.float64:
                    assert_equal_steps(module, x)
                else:
                    assert_as_accurate_steps(module, x)


def test_images_of_several_strips():
    module = stem({"stride": 1, "out_channels": 3}, torch.float64)
    assert_equal_steps(module, images(module, 2, (101, 90)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_stems(data):
    draw = lambda *choices: data.draw(st.sampled_from(choices))  # noqa: E731
    size = draw(1, 2, 3, 3, 4, 7)
    configuration = {
        "in_channels": draw(1, 2, 3, 5),
        "out_channels": draw(1, 3, 8, 9, 24),
        "size": size,
        "stride": draw(1, 2),
        "padding": data.draw(st.integers(0, size - 1)),
        "bias": draw(False, True),
        "max_pool": draw(False, True),
    }
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    module = stem(configuration, torch.float64)
    module.bn.train(draw(False, True, True))
    x = images(module, draw(2, 3), (size + draw(0, 1, 6, 30), size + draw(1, 2, 9, 40)))
    gradient = torch.randn_like(plain(copy.deepcopy(module), x))
    assert_equal_steps(module, x.contiguous(memory_format=draw(*LAYOUTS)), gradient)


def plain_norm(module):
    """Makes the norm one that changes nothing, so that values are the convolution's own."""
    module.bn = nn.BatchNorm2d(len(module.conv.weight), eps=0.0, affine=False).to(module.conv.weight.dtype).eval()
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_of_equal_values_the_first_gets_the_gradient(dtype):
    module = plain_norm(Stem(1, 2, 1, 1, 0)).to(dtype).requires_grad_(False)
    with torch.no_grad():
        module.conv.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
    for plane in [(9, 11), (8, 36), (1, 5)]:
        x = torch.randint(-1, 2, (4, 1, *plane)).to(dtype)
        gradient = torch.randint(1, 9, plain(module, x).shape).to(dtype)  # whose sums are exact
        got, expected = step(module, x, gradient, native), step(module, x, gradient)
        assert torch.equal(got["result"], expected["result"])
        assert torch.equal(got["grad of x"], expected["grad of x"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("max_pool", [False, True])
def test_values_that_are_not_finite(value, max_pool):
    # Where they are among the norm's results, as where a norm is frozen; the batch's statistics make all of them NaN.
    module = plain_norm(Stem(1, 1, 1, 1, 0, max_pool=max_pool)).requires_grad_(False)
    with torch.no_grad():
        module.conv.weight.fill_(1)
    for count in (1, 2, 9, 40):
        x = torch.randn(2, 1, 7, 10)
        x.view(-1)[torch.randperm(x.numel())[:count]] = value
        gradient = torch.randint(1, 9, plain(module, x).shape).float()
        got, expected = step(module, x, gradient, native), step(module, x, gradient)
        for name in ("result", "grad of x"):
            torch.testing.assert_close(got[name], expected[name], equal_nan=True, rtol=0, atol=0, msg=name)
    module.bn.train().eps = 1e-5
    got, expected = step(module, x, run=native), step(module, x)
    assert torch.equal(got["result"].isnan(), expected["result"].isnan())
    for name in ("bn.running_mean", "bn.running_var"):
        assert not (got[name].isfinite() | expected[name].isfinite()).any(), name


def test_a_mean_far_above_the_deviation():
    module = stem({"padding": 0})
    assert_as_accurate_steps(module, images(module, 4, (33, 35)) + 30)


def settings_of_norm(norm, of):
    if of == "frozen":
        norm.eval()
    elif of == "momentum":
        norm.momentum = None
    elif of == "untracked":
        norm.track_running_stats = False
    elif of == "no statistics":
        norm.track_running_stats = False
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            norm.register_buffer(name, None)
        norm.eval()
    elif of == "no affine":
        norm.register_parameter("weight", None)
        norm.register_parameter("bias", None)


@each_stem
@pytest.mark.parametrize("of", ["frozen", "momentum", "untracked", "no statistics", "no affine"])
def test_settings_of_norms(configuration, of):
    module = stem(configuration, torch.float64)
    settings_of_norm(module.bn, of)
    twin = copy.deepcopy(module)
    for _ in range(3):
        x = images(module)
        assert_equal_steps(module, x)
        native(module, x)
        plain(twin, x)
    for (name, ours), theirs in zip(module.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_statistics_without_gradients():
    module = stem()
    twin, x = copy.deepcopy(module), images(module)
    with torch.no_grad():
        torch.testing.assert_close(native(module, x), plain(twin, x), rtol=1e-5, atol=1e-5)
    for (name, ours), theirs in zip(module.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    assert module.bn.num_batches_tracked == 1


def test_one_value_a_channel_is_refused_as_pytorch_refuses_it():
    module = stem()
    for run in (native, plain):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got input size"):
            run(module, images(module, 1, (2, 1)))


NORM = {"gradient of bn, ReLU and pool"}
PASSES = {  # of the backward pass, by what is wanted
    "bn.weight": NORM,
    "conv.weight": {*NORM, "gradient of conv's weight"},
    "x": {*NORM, "gradient of bn"},
}


@pytest.mark.parametrize("wanted", PASSES)
def test_only_what_is_wanted_is_computed(wanted):
    module = stem()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == wanted)
    x = images(module).requires_grad_(wanted == "x")
    result = native(module, x)
    assert passes_of(result.sum().backward) == PASSES[wanted]


@pytest.mark.parametrize("count", range(1, 5))
def test_some_gradients(count):
    module = stem(STEMS[2], torch.float64)
    names = [name for name, _ in module.named_parameters()]
    x = images(module)
    for some in itertools.combinations([*names, "x"], count):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in some)
        found = []
        for run in (native, plain):
            each = copy.deepcopy(module)
            inputs = [p for p in each.parameters() if p.requires_grad]
            of_x = x.clone().requires_grad_("x" in some)
            inputs += [of_x] if "x" in some else []
            found.append(torch.autograd.grad(run(each, of_x).square().sum(), inputs))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_inputs_and_gradients_of_all_strides(layout):
    module = stem(dtype=torch.float64)
    x = images(module).contiguous(memory_format=layout)
    expected = step(module, x, run=native)
    padded = F.pad(x, (1, 2, 0, 1))[:, :, :-1, 1:-2]
    for given_x in (padded, x.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)):
        got = step(module, given_x, torch.ones(1, 1, 1, 1).expand_as(expected["result"]), native)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, msg=name)


@each_stem
@pytest.mark.parametrize("is_frozen", [False, True])
def test_gradients_by_differences(configuration, is_frozen):
    module = stem(configuration, torch.float64)
    module.bn.train(not is_frozen)
    names = [name for name, _ in module.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    inputs = [images(module, 2, (5, 7)).requires_grad_(), *(p.detach().requires_grad_() for p in module.parameters())]
    torch.autograd.gradcheck(run, inputs, fast_mode=True, atol=1e-4)


def test_gradients_of_gradients():
    module = stem(dtype=torch.float64)
    x = images(module).requires_grad_()

    def twice(run):
        (first,) = torch.autograd.grad(run(module, x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, module.conv.weight, module.bn.weight))

    for got, expected in zip(twice(native), twice(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@each_stem
def test_the_threads_do_not_change_a_bit(configuration):
    module, threads = stem(configuration), torch.get_num_threads()
    x, steps = images(module, 3, (120, 101)), []
    gradient = torch.randn_like(plain(module, x))
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            steps.append(step(module, x, gradient, native))
    finally:
        torch.set_num_threads(threads)
    for name, value in steps[0].items():
        if name == "grad of x":
            continue  # PyTorch's
        assert all(torch.equal(value, other[name]) for other in steps[1:]), name


@each_stem
def test_all_that_is_returned_was_written(configuration):
    module = stem(configuration)
    x = images(module)
    expected = step(module, x, run=native)
    torch.use_deterministic_algorithms(True)  # by which new memory is NaN
    try:
        assert torch.empty(1).isnan()
        got = step(module, x, run=native)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_autocast():
    module = stem()
    x = images(module)
    exact = step(copy.deepcopy(module).double(), x.double())
    with autocast(torch.bfloat16):
        got, expected = step(module, x, run=native), step(module, x)
    assert got["result"].dtype == torch.bfloat16
    for name, value in exact.items():
        assert got[name].dtype == expected[name].dtype, name
        errors = [(each[name].double() - value).norm() for each in (got, expected)]
        assert errors[0] <= 3 * errors[1] + 0.02 * value.double().norm() + 0.02, f"{name}: {errors}"


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    torch._dynamo.reset()
    module = stem()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    eager = copy.deepcopy(module)
    for batch in (3, 4):
        x = images(module, batch)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        results = [run(of_x) for run, of_x in zip((compiled, eager), inputs, strict=True)]
        torch.testing.assert_close(*results)
        for result in results:
            result.square().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for (name, ours), theirs in zip(module.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    for (name, ours), theirs in zip(module.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("of_batch", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_op_is_what_pytorch_expects(of_batch, dtype):
    module = stem(STEMS[2], dtype)
    conv, norm = module.conv, module.bn
    statistics = (None, None) if of_batch else (norm.running_mean, norm.running_var)
    options = {"eps": 1e-5, "of_batch": of_batch, "stride": 1, "padding": 1, "max_pool": True, "processes": ""}
    op = getattr(torch.ops.shufflenet_ext, OP)
    for layout in LAYOUTS:
        x = images(module, plane=(6, 7)).contiguous(memory_format=layout).requires_grad_()
        torch.library.opcheck(op, (x, conv.weight, conv.bias, norm.weight, norm.bias, *statistics), options)


def test_it_counts_as_the_plain_modules():
    module = stem()
    x, counts = images(module), []
    for run in (native, plain):
        for of_x in (x, x.clone().requires_grad_()):
            with FlopCounterMode(display=False) as counter:
                run(module, of_x).sum().backward()
            counts.append(counter.get_total_flops())
    assert counts[:2] == counts[2:]


NETWORKS = {
    "v1": lambda: se.models.shufflenet_v1(8, 0.25, 10),
    "G2": se.models.ShuffleNetG2,
    "v2": lambda: se.models.shufflenet_v2(0.5, 10),
}


def of_first_unit(net, x, backend):
    """What a network's first unit gets, how often the stem's op ran, and the gradient of the stem's weight."""
    first = next(m for m in net.modules() if isinstance(m, se.FusedShuffleBottleneck | se.FusedShuffleUnitV2))
    inputs = []
    handle = first.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with se.use_backend(backend), Recorder() as recorder, warnings.catch_warnings():
        warnings.simplefilter("ignore", se.ReferenceFallbackWarning)  # units of v2
        net(x)
    handle.remove()
    weight = next(p for p in net.parameters() if p.dim() == 4)
    gradient = torch.autograd.grad(inputs[0].square().sum(), weight)[0] if weight.requires_grad else None
    return inputs[0], recorder.names.count(f"shufflenet_ext::{OP}"), gradient


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("is_fused", [False, True])
def test_networks_train_their_stems_natively(make, is_fused):
    net = randomize(make()).train()
    twin, x = copy.deepcopy(net), torch.randn(2, 3, 32, 32)
    if is_fused:
        net = se.fuse(net)
    got, runs, gradient = of_first_unit(net, x, "auto")
    expected, plain_runs, plain_gradient = of_first_unit(twin, x, "reference")
    assert (runs, plain_runs) == (1, 0)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, plain_gradient, rtol=1e-3, atol=1e-3 * plain_gradient.abs().max().item())
    for (name, ours), theirs in zip(net.named_buffers(), twin.buffers(), strict=True):
        if name.startswith(("bn1", "conv1")):
            torch.testing.assert_close(ours, theirs, msg=name)


class Foreign(nn.Module):
    """A network of another class, whose stem fuse() finds."""

    def __init__(self, relu=True):
        super().__init__()
        layers = [nn.Conv2d(3, 24, 3, 2, 1), nn.BatchNorm2d(24), *[nn.ReLU()] * relu, nn.MaxPool2d(3, 2, 1)]
        self.features = nn.Sequential(nn.Sequential(*layers), se.FusedShuffleBottleneck(24, 24, 1, 3))

    def forward(self, x):
        return self.features(x)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_stem_that_was_fused_trains_natively(is_frozen):
    plain_net = randomize(Foreign()).train()
    net = se.fuse(copy.deepcopy(plain_net))
    for each in (net, plain_net):
        each.features[0][1].train(not is_frozen)
    x = torch.randn(2, 3, 21, 30)
    got, runs, gradient = of_first_unit(net, x, "native")
    expected, _, plain_gradient = of_first_unit(plain_net, x, "reference")
    assert runs == 1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, plain_gradient, rtol=1e-3, atol=1e-3)


def with_hook(net):
    net.bn1.register_forward_hook(lambda *_: None)


def with_groups(net):
    net.conv1 = nn.Conv2d(3, 24, 3, 2, 1, groups=3)


def with_other_norm(net):
    net.bn1 = nn.InstanceNorm2d(24)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (with_hook, "has hooks"),
        (with_groups, "a module of the stem was replaced"),
        (with_other_norm, "with a InstanceNorm2d"),
    ],
)
def test_what_does_not_train_natively_says_so(change, cause):
    net = se.models.shufflenet_v1(8, 0.25, 10).train()
    change(net)
    x = torch.randn(2, 3, 32, 32)
    with pytest.raises(RuntimeError, match=f"backend 'native' was asked for, but .*{cause}"):
        net(x)
    with se.use_backend("auto"), pytest.warns(se.ReferenceFallbackWarning, match=cause), Recorder() as recorder:
        net(x)
    assert f"shufflenet_ext::{OP}" not in recorder.names


@pytest.mark.parametrize("part", ["conv1", "maxpool"])
def test_a_stem_of_v2_of_other_modules_says_so(part):
    net = se.models.shufflenet_v2(0.5, 10).train()
    setattr(net, part, {"conv1": nn.Conv2d(3, 24, 3, 2, 1), "maxpool": nn.AvgPool2d(2)}[part])
    with pytest.raises(RuntimeError, match="a module of the stem was replaced"):
        net(torch.randn(2, 3, 32, 32))


def test_a_fused_stem_that_does_not_train_natively_says_so():
    x = torch.randn(2, 3, 32, 32)
    without_relu = se.fuse(Foreign(relu=False)).train()
    with pytest.raises(RuntimeError, match="a stem without a ReLU"):
        without_relu(x)
    changed = se.fuse(Foreign()).train()
    changed.features[0][2].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="is not what it was"):
        changed(x)


def test_functional_transforms_run_the_reference():
    module = stem()
    module.bn.track_running_stats = False
    x, parameters = images(module), dict(module.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    with pytest.raises(RuntimeError, match="backend 'native' was asked for, but torch"):
        torch.func.grad(loss)(parameters)
    with se.use_backend("auto"), pytest.warns(se.ReferenceFallbackWarning, match=r"torch\.func"):
        got = torch.func.grad(loss)(parameters)
    for name, gradient in zip(got, torch.autograd.grad(loss(parameters), list(parameters.values())), strict=True):
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-2, msg=name)


def test_its_backward_pass_refuses_what_does_not_fit():
    module = stem(STEMS[2]).requires_grad_(False)
    x, tensors = images(module), [module.conv.weight, module.conv.bias, module.bn.weight, module.bn.bias]
    options = {"stride": 1, "padding": 1, "max_pool": True}
    of_norm = {"eps": 1e-5, "of_batch": True, "processes": ""}
    kept = getattr(torch.ops.shufflenet_ext, OP)(x, *tensors, None, None, **options, **of_norm)
    op = getattr(torch.ops.shufflenet_ext, _stem_training_op.BACKWARD_NAME)

    def run(gradient, x, y, statistics, *tensors, **options):
        return op(gradient, x, [y, statistics], *tensors, None, None, wanted=[True] * 5, **options, **of_norm)

    assert_refuses_what_does_not_fit(run, [torch.randn_like(kept[0]), x, *kept[1:], *tensors], options, wrong=17)


def test_bad_arguments_are_named():
    module = stem()
    op, x = getattr(torch.ops.shufflenet_ext, OP), images(module)
    options = {"eps": 1e-5, "of_batch": True, "stride": 2, "padding": 1, "max_pool": True, "processes": ""}
    weight, none = module.conv.weight, [None] * 5
    for change, cause in (({"stride": 3}, "stride: got 3"), ({"padding": 3}, "padding: got 3")):
        with pytest.raises(RuntimeError, match=cause):
            op(x, weight, *none, **options | change)
    for bad, cause in (
        ((x, weight[:, :2], *none), "conv_weight: got shape"),
        ((x, weight, torch.ones(2), *none[1:]), "conv_bias: got shape"),
        ((x, weight, None, torch.ones(2), *none[2:]), "bn_weight: got shape"),
        ((x.double(), weight, *none), "conv_weight: got dtype"),
        ((x[:, :, :0], weight, *none), "x: got shape"),
        ((x, weight, *none[:3], torch.ones(24), None), "bn_mean and bn_var"),
    ):
        with pytest.raises(RuntimeError, match=cause):
            op(*bad, **options)


def train_in_processes(rank, module, x, gradient):
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    of_rank = slice(0, 3) if rank == 0 else slice(3, 5)  # batches of other sizes
    of_x = x[of_rank].clone().requires_grad_()
    with se.use_backend("native"):
        result = module(of_x)
    result.backward(gradient[of_rank])
    gradients = {f"grad of {name}": parameter.grad for name, parameter in module.named_parameters()}
    for each in gradients.values():
        distributed.all_reduce(each)
    return {"result": result.detach(), "grad of x": of_x.grad, **gradients, **dict(module.named_buffers())}


@pytest.mark.long
def test_two_processes_are_one_with_the_whole_batch(two_processes):
    module = stem(STEMS[2], torch.float64)
    x = images(module, 5)
    gradient = torch.randn_like(plain(copy.deepcopy(module), x))
    states = two_processes.run(train_in_processes, module, x, gradient)
    expected = step(module, x, gradient)
    for name in ("result", "grad of x"):
        torch.testing.assert_close(torch.cat([state.pop(name) for state in states]), expected[name])
    for state in states:
        for name, value in state.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-8, msg=name)
