"""Units in training mode: the native step's results, statistics and gradients are those of the plain unit."""

import contextlib
import copy
import functools
import itertools
from statistics import median

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    ISAS,
    LAYOUTS,
    assert_ran,
    assert_ran_reference,
    assert_refuses_what_does_not_fit,
    assert_strides_of_layout,
    autocast,
    passes_of,
    plain_twin,
    randomize,
    selected_isa,
)
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import shufflenet_ext as se
from shufflenet_ext import _training_op

OP = _training_op.NAME
UNITS = [
    {"in_channels": 24, "out_channels": 24, "stride": 1, "groups": 3},
    {"in_channels": 24, "out_channels": 36, "stride": 2, "groups": 3, "shortcut_relu": False},
    {"in_channels": 16, "out_channels": 16, "stride": 1, "groups": 4, "conv2_relu": True, "bias": True},
    {"in_channels": 16, "out_channels": 32, "stride": 2, "groups": 2, "shuffle_groups": 1, "shortcut_first": True},
    {"in_channels": 12, "out_channels": 20, "stride": 2, "groups": 1, "pool_count_include_pad": False, "bias": True},
]
each_unit = pytest.mark.parametrize("configuration", UNITS, ids=str)


def fused(configuration=UNITS[0], dtype=torch.float32):
    return randomize(se.FusedShuffleBottleneck(**configuration)).to(dtype).train()


def images(unit, batch=3, plane=(7, 9)):
    return torch.randn(batch, unit.conv1.in_channels, *plane, dtype=unit.conv1.weight.dtype)


def draws(dtype):
    """Of how many inputs errors are compared by their medians."""
    return 7 if dtype.itemsize == 2 else 3


def step(unit, x, gradient, op=None):
    """A training step: the result, the buffers, and the gradients of x and of the parameters."""
    x = x.detach().requires_grad_()
    unit.zero_grad()
    with contextlib.nullcontext() if op is None else assert_ran(op):
        result = unit(x)
    result.backward(gradient.to(result.dtype))
    named = {f"grad of {name}": p.grad for name, p in unit.named_parameters() if p.requires_grad}
    return {"result": result.detach(), "grad of x": x.grad, **named, **dict(unit.named_buffers())}


def step_errors(unit, x):
    """By tensor of a step: how far the fused unit's is from float64, how far PyTorch's, and what is no error."""
    plain = plain_twin(unit)
    for ours, theirs in zip(unit.modules(), plain.modules(), strict=True):
        theirs.training = ours.training
        for name in ("momentum", "track_running_stats"):
            if hasattr(ours, name):
                setattr(theirs, name, getattr(ours, name))
    for ours, theirs in zip(unit.parameters(), plain.parameters(), strict=True):
        theirs.requires_grad_(ours.requires_grad)
    exact_unit = copy.deepcopy(plain).double()
    gradient = torch.randn_like(exact_unit(x.double()), dtype=x.dtype)
    exact_unit = copy.deepcopy(plain).double()
    got, expected = step(unit, x, gradient, OP), step(plain, x, gradient)
    exact = step(exact_unit, x.double(), gradient.double())
    eps = torch.finfo(x.dtype).eps
    scale = max(
        value.abs().max() for name, value in exact.items() if name.startswith("grad of conv") or value.dim() == 4
    )
    errors = {}
    for name, value in exact.items():
        assert got[name].dtype == expected[name].dtype, name
        assert got[name].shape == value.shape, name
        assert got[name].isfinite().all(), name
        ours, theirs = ((each[name].double() - value).square().mean().sqrt().item() for each in (got, expected))
        # Sums that cancel, such as the gradient of a bias ahead of a norm, have no digits of their own.
        floor = 4 * eps * value.double().square().mean().sqrt() + eps * scale * value.numel() ** -0.5
        errors[name] = (ours, theirs, floor.item())
    return errors


def assert_as_accurate_steps(unit, *inputs, factor=2.0):
    """Fails where the fused unit's step is further from float64 than PyTorch's in the unit's dtype, times a factor.

    Of several inputs the medians are compared: a ReLU that rounding opens or closes, here or there, which 16 bits do
    now and then, is an error a hundred times as large as all others.
    """
    steps = [step_errors(unit, x) for x in inputs]
    for name in steps[0]:
        ours, theirs, floor = (median(values) for values in zip(*(errors[name] for errors in steps), strict=True))
        most = factor * theirs + floor
        if inputs[0].dtype == torch.float64:
            most = 1e-9 / torch.finfo(torch.float64).eps * floor
        assert ours <= most, f"{name}: error {ours:.3g}, PyTorch's {theirs:.3g}"


@each_unit
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_steps(configuration, dtype, layout):
    unit = fused(configuration, dtype)
    inputs = [images(unit).contiguous(memory_format=layout) for _ in range(draws(dtype))]
    assert_as_accurate_steps(unit, *inputs, factor=3)
    x = inputs[0].requires_grad_()
    result = unit(x)
    assert_strides_of_layout(result, layout)
    result.sum().backward()
    assert_strides_of_layout(x.grad, layout)
    assert unit.bn2.num_batches_tracked == len(inputs) + 1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_unit
def test_isas(isa, configuration, dtype):
    unit = fused(configuration, dtype)
    with selected_isa(isa):
        assert_as_accurate_steps(unit, *(images(unit, plane=(5, 13)) for _ in range(draws(dtype))), factor=3)


@pytest.mark.covering(3)
@each_unit
@pytest.mark.parametrize("frozen", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("has_statistics", [False, True])
def test_norms_in_eval_mode_or_without_statistics(configuration, frozen, has_statistics):
    unit = fused(configuration, torch.float64)
    for norm, is_frozen in zip((unit.bn1, unit.bn2, unit.bn3), frozen, strict=True):
        norm.train(not is_frozen)
        if not is_frozen and not has_statistics:
            norm.register_buffer("running_mean", None)
            norm.register_buffer("running_var", None)
            norm.register_buffer("num_batches_tracked", None)
            norm.track_running_stats = False
    if all(frozen):
        return  # the op of inference
    plain = plain_step_unit(unit)
    x = images(unit)
    got, expected = (step(each, x, torch.ones_like(plain(x))) for each in (unit, plain_step_unit(unit)))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-8, msg=name)


def plain_step_unit(unit):
    """The plain unit with copies of a fused one's own modules."""
    plain = copy.deepcopy(unit)
    plain.__class__ = se.ShuffleBottleneck
    return plain


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_units(data):
    draw = lambda *choices: data.draw(st.sampled_from(choices))  # noqa: E731
    conv1_groups, groups, stride = draw(1, 2, 3, 4), draw(1, 2, 3, 5), draw(1, 2)
    mid = conv1_groups * groups * draw(1, 2, 3) * draw(1, 4)
    in_channels = conv1_groups * groups * draw(1, 3, 4)
    divisors = [n for n in range(1, mid + 1) if mid % n == 0]
    configuration = {
        "in_channels": in_channels,
        "out_channels": in_channels if stride == 1 else groups * draw(1, 2, 7),
        "stride": stride,
        "groups": groups,
        "mid_channels": mid,
        "conv1_groups": conv1_groups,
        "shuffle_groups": draw(*divisors),
        **{name: draw(False, True) for name in ("conv2_relu", "pool_count_include_pad", "shortcut_first", "bias")},
        "shortcut_relu": draw(False, True),
    }
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    unit = fused(configuration, torch.float64)
    frozen = [draw(False, False, True) for _ in range(3)]
    for norm, is_frozen in zip((unit.bn1, unit.bn2, unit.bn3), frozen, strict=True):
        norm.train(not is_frozen)
    if all(frozen):
        unit.bn1.train()
    x = images(unit, batch=draw(1, 2, 5), plane=(draw(2, 3, 7, 16), draw(3, 5, 8, 17)))
    gradient = torch.randn_like(plain_step_unit(unit)(x))
    got, expected = (step(each, x, gradient) for each in (copy.deepcopy(unit), plain_step_unit(unit)))
    for name, value in expected.items():
        # Statistics of few values can make a norm steep, and its gradients large.
        scale = 1 + max(each.abs().max() for each in expected.values() if each.is_floating_point()).item()
        torch.testing.assert_close(got[name], value, rtol=1e-7, atol=1e-9 * scale, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mean_far_above_the_deviation(dtype):
    unit = fused(dtype=dtype)
    assert_as_accurate_steps(unit, *(images(unit, batch=4) + 30 for _ in range(draws(dtype))))


def test_means_behind_the_last_norm_where_conv3_reads_large_means():
    # Weights of conv3 with its norm are rounded to bfloat16. What they do to the mean, its bias must make up for.
    unit = fused({"in_channels": 96, "out_channels": 96, "stride": 1, "groups": 3}, torch.bfloat16)
    with torch.no_grad():
        unit.bn1.bias.fill_(30)
        unit.bn3.bias.fill_(16)  # so that the last ReLU changes nothing
        x = images(unit, 8, (16, 16))
        means = (unit(x).float() - x.float()).mean((0, 2, 3))
    torch.testing.assert_close(means, unit.bn3.bias.float(), rtol=0, atol=5e-3)


@pytest.mark.parametrize("plane", [(1, 1), (1, 6), (6, 1), (4, 4), (7, 7), (3, 16), (2, 33)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_planes(plane, stride):
    configuration = {"in_channels": 24, "out_channels": 24 if stride == 1 else 12, "stride": stride, "groups": 3}
    unit = fused(configuration, torch.float64)
    assert_as_accurate_steps(unit, images(unit, 5, plane))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_planes_that_are_worked_on_in_parts(stride, layout, dtype):
    unit = fused({"in_channels": 40, "out_channels": 40, "stride": stride, "groups": 2}, dtype)
    x = [images(unit, 1, (50, 51)).contiguous(memory_format=layout) for _ in range(draws(dtype))]
    assert_as_accurate_steps(unit, *x)


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_few_values_of_16_bits(batch):
    # Rows of conv3 may then have next to no variance, which must not come out less than none.
    for seed in range(20):
        torch.manual_seed(seed)
        unit = fused({"in_channels": 240, "out_channels": 240, "stride": 1, "groups": 3}, torch.bfloat16)
        x = images(unit, batch, (1, 1)).requires_grad_()
        result = unit(x)
        result.sum().backward()
        assert result.isfinite().all()
        assert x.grad.isfinite().all()
        assert (unit.bn3.running_var >= 0).all()


@each_unit
def test_gradients_by_differences(configuration):
    unit = fused(configuration, torch.float64)
    names = [name for name, _ in unit.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(unit, dict(zip(names, values, strict=True)), (x,))

    inputs = [images(unit, 2, (3, 4)).requires_grad_(), *(p.detach().requires_grad_() for p in unit.parameters())]
    # The gradient of a bias ahead of a norm is zero, where differences have nothing but rounding.
    torch.autograd.gradcheck(run, inputs, fast_mode=True, atol=1e-4)


@each_unit
@pytest.mark.parametrize("is_folded", [False, True])
def test_frozen_statistics(configuration, is_folded):
    # Fine-tuning: the inference op forward, which keeps nothing, and the native passes back.
    unit = fused(configuration).eval()
    plain, x = plain_step_unit(unit), images(unit)
    modules = [unit, plain]
    if is_folded:
        pairs = [(conv.weight, torch.randn(len(conv.weight))) for conv, _ in unit.pairs()]
        tensors = [tensor.detach().requires_grad_() for pair in pairs for tensor in pair]
        names = ("groups", "stride", "conv2_relu", "pool_count_include_pad", "shuffle_groups", "shortcut_first")
        options = {name: getattr(unit, name) for name in (*names, "shortcut_relu")}
        options["conv1_groups"] = unit.conv1.groups
        modules = [lambda x, run=run: run.shuffle_bottleneck(x, *tensors, **options) for run in (se.ops, se.reference)]
    steps = []
    for module in modules:
        of_x = x.clone().requires_grad_()
        parameters = tensors if is_folded else list(module.parameters())
        with assert_ran(_training_op.BACKWARD_NAME) if module is modules[0] else contextlib.nullcontext():
            steps.append(torch.autograd.grad(module(of_x).square().sum(), [of_x, *parameters]))
    for got, expected in zip(*steps, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-2)


def test_gradients_of_gradients():
    unit = fused(UNITS[1], torch.float64)
    plain, x = plain_step_unit(unit), images(unit).requires_grad_()

    def twice(module):
        (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, module.conv1.weight, module.bn3.weight))

    for got, expected in zip(twice(unit), twice(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@each_unit
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_threads_do_not_change_a_bit(configuration, dtype, layout):
    unit, threads = fused(configuration, dtype), torch.get_num_threads()
    x = images(unit, 5, (9, 11)).contiguous(memory_format=layout)
    gradient = torch.randn_like(unit(x))
    steps = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            steps.append(step(copy.deepcopy(unit), x, gradient))
    finally:
        torch.set_num_threads(threads)
    for name, value in steps[0].items():
        assert all(torch.equal(value, other[name]) for other in steps[1:]), name


@pytest.mark.parametrize("of", ["momentum", "untracked", "buffers", "affine"])
def test_settings_of_norms(of):
    unit = fused()
    for norm in (unit.bn1, unit.bn2, unit.bn3):
        if of == "momentum":
            norm.momentum = None
        elif of == "untracked":
            norm.track_running_stats = False
        elif of == "affine":
            norm.register_parameter("weight", None)
            norm.register_parameter("bias", None)
    plain = plain_step_unit(unit)
    for _ in range(3):
        x = images(unit)
        got, expected = (step(each, x, torch.ones(3, 24, 7, 9)) for each in (unit, plain))
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-3, msg=name)


def test_one_value_a_channel_is_refused_as_pytorch_refuses_it():
    unit = fused()
    for module in (unit, plain_step_unit(unit)):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got input size"):
            module(images(unit, 1, (1, 1)))
        assert module.bn1.num_batches_tracked == 0 or type(module) is se.ShuffleBottleneck


def test_statistics_without_gradients():
    unit = fused()
    plain, x = plain_step_unit(unit), images(unit)
    with torch.no_grad():
        expected = plain(x)
        with assert_ran(OP):
            torch.testing.assert_close(unit(x), expected, rtol=1e-4, atol=1e-4)
    for (name, ours), theirs in zip(unit.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


CONV3 = {"gradient of conv3's weight"}
CONV2 = {*CONV3, "gradient of conv3", "gradient of conv2"}
CONV1 = {*CONV2, "gradient of bn1", "gradient of conv1's weight"}
PASSES = {  # of the backward pass, by what is wanted
    "bn3.weight": CONV3,
    "conv3.weight": CONV3,
    "bn2.bias": CONV2,
    "conv2.weight": CONV2,
    "bn1.weight": CONV2,
    "conv1.weight": CONV1,
}


@pytest.mark.parametrize("wanted", PASSES)
def test_only_what_is_wanted_is_computed(wanted):
    unit = fused()
    for name, parameter in unit.named_parameters():
        parameter.requires_grad_(name == wanted)
    result = unit(images(unit))
    assert passes_of(result.sum().backward) == PASSES[wanted]
    for name, parameter in unit.named_parameters():
        assert (parameter.grad is not None) == (name == wanted)


@pytest.mark.parametrize("some", [{"x"}, {"conv2.weight", "bn1.bias"}, {"bn3.bias", "x"}], ids=str)
def test_some_gradients(some):
    unit = fused(UNITS[2])
    for name, parameter in unit.named_parameters():
        parameter.requires_grad_(name in some)
    plain, x = plain_step_unit(unit), images(unit)
    for module in (unit, plain):
        module.zero_grad()
    inputs = [x.clone().requires_grad_("x" in some) for _ in range(2)]
    for module, of_x in zip((unit, plain), inputs, strict=True):
        module(of_x).square().sum().backward()
    tensors = [(inputs[0], inputs[1]), *zip(unit.parameters(), plain.parameters(), strict=True)]
    for ours, theirs in tensors:
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-2)


def test_gradients_of_all_strides_and_graphs_that_are_kept():
    unit = fused()
    x = images(unit).requires_grad_()
    result = unit(x)
    expected = torch.autograd.grad(result, x, torch.ones_like(result), retain_graph=True)[0]
    for gradient in (torch.ones(1, 1, 1, 1).expand_as(result), torch.ones(9, 7, 24, 3).permute(3, 2, 1, 0)):
        assert torch.equal(torch.autograd.grad(result, x, gradient, retain_graph=True)[0], expected)
    assert torch.equal(torch.autograd.grad(result.sum(), x)[0], expected)


def test_checkpoints_and_copies_in_the_middle():
    unit = fused()
    copied, x = copy.deepcopy(unit), images(unit)
    expected = step(copied, x, torch.ones(3, 24, 7, 9))
    of_x = x.clone().requires_grad_()
    checkpoint(unit, of_x, use_reentrant=False).sum().backward()
    assert torch.equal(of_x.grad, expected["grad of x"])
    again = copy.deepcopy(copied)
    assert type(again) is se.FusedShuffleBottleneck
    steps = [step(each, x, torch.ones(3, 24, 7, 9)) for each in (again, copied)]
    for name, value in steps[0].items():
        assert torch.equal(value, steps[1][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype):
    unit = fused()
    plain, x = plain_step_unit(unit), images(unit).to(dtype)
    exact = step(plain_step_unit(unit).double(), x.double(), torch.ones(3, 24, 7, 9))
    with autocast(torch.bfloat16):
        got, expected = (step(each, x, torch.ones(3, 24, 7, 9)) for each in (unit, plain))
    assert got["result"].dtype == torch.bfloat16
    for name, value in exact.items():
        if not value.is_floating_point():
            continue
        errors = [(each[name].double() - value).norm() for each in (got, expected)]
        floor = 0.02 * value.norm() + 0.02
        assert errors[0] <= 3 * errors[1] + floor, f"{name}: error {errors[0]:.3g}, PyTorch's {errors[1]:.3g}"


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    torch._dynamo.reset()
    unit = fused()
    eager = copy.deepcopy(unit)
    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (3, 4):
        x = images(unit, batch)
        got, expected = (step(each, x, torch.ones(batch, 24, 7, 9)) for each in (compiled, eager))
        for name in ("result", "grad of x"):
            torch.testing.assert_close(got[name], expected[name], msg=name)
    for (name, ours), theirs in zip(unit.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    for (name, ours), theirs in zip(unit.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("configuration", UNITS[3:], ids=str)
def test_the_op_is_what_pytorch_expects(configuration):
    unit = fused(configuration)
    op = getattr(torch.ops.shufflenet_ext, OP)
    for layout in LAYOUTS:
        x = images(unit).contiguous(memory_format=layout).requires_grad_()
        tensors, options = arguments(unit, x)
        torch.library.opcheck(op, tensors, options | {"eps": [1e-5] * 3, "of_batch": [True] * 3, "processes": ""})


def test_it_counts_as_the_plain_unit():
    unit = fused(UNITS[3])
    x, counts = images(unit), []
    for module in (unit, plain_step_unit(unit)):
        with FlopCounterMode(display=False) as counter:
            module(x.clone().requires_grad_())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    with FlopCounterMode(display=False) as counter:
        unit(x.clone().requires_grad_()).sum().backward()
    assert counter.get_total_flops() == 3 * counts[0]


def test_a_chain_keeps_half_of_what_pytorch_keeps():
    def kept(units):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(2, 240, 14, 14, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = units(x)
        parameters = {p.untyped_storage().data_ptr() for p in units.parameters()}
        assert result.requires_grad
        return sum(size for at, size in storages.items() if at not in parameters)

    chain = nn.Sequential(*(randomize(se.FusedShuffleBottleneck(240, 240, 1, 3)) for _ in range(4)))
    plain = nn.Sequential(*map(plain_step_unit, chain))
    assert kept(chain) <= 0.55 * kept(plain)


def test_what_does_not_train_natively_says_so():
    unit = fused()
    unit.conv2.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"backend 'native' was asked for, but .* has hooks"):
        unit(images(unit))
    with (
        se.use_backend("auto"),
        assert_ran_reference(),
        pytest.warns(se.ReferenceFallbackWarning, match="has hooks"),
    ):
        unit(images(unit))
    plain = fused()
    with se.use_backend("reference"), assert_ran_reference():
        plain(images(plain))
    with pytest.raises(RuntimeError, match="empty batch"):
        plain(images(plain, 0))
    with pytest.raises(ValueError, match="x: got shape"):
        plain(torch.randn(2, 5, 7, 7))


def test_functional_transforms_run_the_reference():
    unit = fused()
    x = images(unit)
    for norm in (unit.bn1, unit.bn2, unit.bn3):
        norm.track_running_stats = False
    parameters = dict(unit.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(unit, parameters, (x,)).square().sum()

    with pytest.raises(RuntimeError, match="backend 'native' was asked for, but torch"):
        torch.func.grad(loss)(parameters)
    with se.use_backend("auto"), pytest.warns(se.ReferenceFallbackWarning, match="torch.func"):
        got = torch.func.grad(loss)(parameters)
    for name, gradient in zip(got, torch.autograd.grad(loss(parameters), list(parameters.values())), strict=True):
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-2, msg=name)


def arguments(unit, x):
    """The tensors and options of the op for a unit in training mode."""
    tensors = []
    for conv, norm in unit.pairs():
        tensors += [conv.weight, conv.bias, norm.weight, norm.bias, None, None]
    names = ("groups", "stride", "conv2_relu", "pool_count_include_pad", "shuffle_groups", "shortcut_first")
    options = {name: getattr(unit, name) for name in (*names, "shortcut_relu")} | {"conv1_groups": unit.conv1.groups}
    return [x, *tensors], options


PRESENT = [0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15]  # of the op's tensors, where norms use the batch's statistics


def spread(tensors):
    """The op's tensors from those that are present."""
    return [tensors[PRESENT.index(i)] if i in PRESENT else None for i in range(18)]


def test_it_refuses_what_does_not_fit():
    unit = fused(UNITS[4]).requires_grad_(False)
    (x, *tensors), options = arguments(unit, images(unit))
    op = functools.partial(getattr(torch.ops.shufflenet_ext, OP), eps=[1e-5] * 3, of_batch=[True] * 3, processes="")
    given = [tensors[i] for i in PRESENT]

    def run(*tensors, **options):
        return op(x, *spread(tensors), **options)

    assert_refuses_what_does_not_fit(run, given, options, wrong=7, says="{}: got")
    for other in (x[0], x[:, :-1], x[:, :, :0], x.to(torch.int64), x.double()):
        with pytest.raises(RuntimeError, match="got"):
            op(other, *tensors, **options)
    for wrong in ({"eps": [1e-5] * 2}, {"of_batch": [True] * 4}):
        with pytest.raises(RuntimeError, match=f"{next(iter(wrong))}: got"):
            op(x, *tensors, **options | wrong)


def test_its_backward_pass_refuses_what_does_not_fit():
    unit = fused(UNITS[4]).requires_grad_(False)
    (x, *tensors), options = arguments(unit, images(unit))
    of_batch = {"eps": [1e-5] * 3, "of_batch": [True] * 3, "processes": ""}
    kept = getattr(torch.ops.shufflenet_ext, OP)(x, *tensors, **options, **of_batch)
    op = getattr(torch.ops.shufflenet_ext, _training_op.BACKWARD_NAME)

    def run(gradient, x, result, y1, y2, statistics, *tensors, **options):
        return op(gradient, x, [result, y1, y2, statistics], *spread(tensors), **options, **of_batch)

    given = [torch.randn_like(kept[0]), x, *kept, *(tensors[i] for i in PRESENT)]
    assert_refuses_what_does_not_fit(run, given, options | {"depth": 4}, wrong=7, says="{}: got")


@each_unit
def test_processes_of_equal_batches(configuration, monkeypatch):
    # Two, of which this is one: sums over both are twice its own.
    unit = fused(configuration, torch.float64)
    x = images(unit)
    gradient = torch.randn_like(plain_step_unit(unit)(x))
    expected = step(plain_step_unit(unit), torch.cat([x, x]), torch.cat([gradient, gradient]))
    monkeypatch.setattr(_training_op, "processes_of", lambda _: "both")
    monkeypatch.setattr(distributed.distributed_c10d, "_resolve_process_group", lambda name: name)
    monkeypatch.setattr(distributed, "all_reduce", lambda numbers, group: numbers.mul_({"both": 2}[group]))
    for name, got in step(unit, x, gradient, OP).items():
        if name in ("result", "grad of x"):
            value = expected[name][: len(x)]
        else:
            value = expected[name] / 2 if name.startswith("grad of") else expected[name]
        torch.testing.assert_close(got, value, rtol=1e-8, atol=1e-8, msg=name)


class PeerIsGoneError(Exception):
    pass


def test_what_fails_between_processes_comes_through(monkeypatch):
    are_there = True

    def all_reduce(numbers, group):
        if not are_there:
            raise PeerIsGoneError

    unit = fused()
    x = images(unit)
    monkeypatch.setattr(_training_op, "processes_of", lambda _: "both")
    monkeypatch.setattr(distributed.distributed_c10d, "_resolve_process_group", lambda name: name)
    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    loss = unit(x).sum()
    are_there = False
    with pytest.raises(PeerIsGoneError):
        unit(x)
    with pytest.raises(PeerIsGoneError):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_statistics_of_float32_beside_convolutions_of_16_bits(dtype):
    unit = fused({**UNITS[4]})
    for conv, norm in unit.pairs():
        conv.to(dtype)
        norm.momentum = 1.0
    with torch.no_grad():
        unit.conv1.weight.mul_(3000)  # a variance that float16 does not hold
    plain, x = plain_step_unit(unit), images(unit, batch=5)
    for module in (unit, plain):
        module(x)
    assert unit.bn1.running_var.max() > 70_000
    for (name, ours), theirs in zip(unit.named_buffers(), plain.buffers(), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02, msg=name)
    mean = unit.bn1.running_mean
    assert not torch.equal(mean, mean.to(dtype).float())


def train_in_processes(rank, unit, x, gradient):
    unit = nn.SyncBatchNorm.convert_sync_batchnorm(unit)
    of_rank = slice(0, 3) if rank == 0 else slice(3, 5)  # batches of other sizes
    of_x = x[of_rank].clone().requires_grad_()
    with se.use_backend("native"):
        result = unit(of_x)
    result.backward(gradient[of_rank])
    # DistributedDataParallel refuses a SyncBatchNorm on a CPU, so this does what it does.
    gradients = {name: parameter.grad for name, parameter in unit.named_parameters()}
    for each in gradients.values():
        distributed.all_reduce(each)
    return {"result": result.detach(), "x": of_x.grad, **gradients, **dict(unit.named_buffers())}


def train_parallel(rank, unit, x, gradient):
    parallel = nn.parallel.DistributedDataParallel(unit)
    with se.use_backend("native"):
        parallel(x[rank : rank + 1]).backward(gradient[rank : rank + 1])
    return {name: parameter.grad for name, parameter in unit.named_parameters()}


@pytest.mark.long
def test_data_parallel_training_is_pytorchs(two_processes):
    unit = fused(UNITS[0], torch.float64)
    x, gradient = images(unit, 2), torch.randn(2, 24, 7, 9, dtype=torch.float64)
    gradients = two_processes.run(train_parallel, unit, x, gradient)
    parts = [step(plain_step_unit(unit), x[i : i + 1], gradient[i : i + 1]) for i in range(2)]
    for of_process in gradients:
        for name, value in of_process.items():
            expected = sum(part[f"grad of {name}"] for part in parts) / 2
            torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-8, msg=name)


def fail_in_the_first(rank):
    if rank == 0:
        raise ValueError("failed on purpose")
    distributed.barrier()


@pytest.mark.long
def test_a_process_that_fails_alone_holds_up_nobody(two_processes):
    with pytest.raises(ValueError, match="failed on purpose"):
        two_processes.run(fail_in_the_first)
    unit = fused(UNITS[0], torch.float64)
    two_processes.run(train_parallel, unit, images(unit, 2), torch.randn(2, 24, 7, 9, dtype=torch.float64))


@pytest.mark.long
@each_unit
def test_two_processes_are_one_with_the_whole_batch(configuration, two_processes):
    unit = fused(configuration, torch.float64)
    x = images(unit, 5)
    gradient = torch.randn_like(plain_step_unit(unit)(x))
    states = two_processes.run(train_in_processes, unit, x, gradient)
    expected = step(plain_step_unit(unit), x, gradient)
    for name, of_both in (("result", "result"), ("x", "grad of x")):
        torch.testing.assert_close(torch.cat([state[name] for state in states]), expected[of_both])
    for state in states:
        for name in state.keys() - {"result", "x"}:
            value = expected.get(f"grad of {name}", expected.get(name))
            torch.testing.assert_close(state[name], value, rtol=1e-8, atol=1e-8, msg=name)


def train_parallel_with_shared_statistics(rank, unit, x, gradient, is_autocast):
    if is_autocast:
        unit, x, gradient = unit.float(), x.float(), gradient.float()
    parallel = nn.parallel.DistributedDataParallel(unit)
    nn.SyncBatchNorm.convert_sync_batchnorm(unit)  # behind it, as it refuses to be made with one on a CPU
    with se.use_backend("native"), autocast(torch.bfloat16) if is_autocast else contextlib.nullcontext():
        result = parallel(x[2 * rank : 2 * rank + 2])
    result.backward(gradient[2 * rank : 2 * rank + 2].to(result.dtype))
    gradients = {f"grad of {name}": parameter.grad for name, parameter in unit.named_parameters()}
    return {"result": result.detach(), **gradients, **dict(unit.named_buffers())}


@pytest.mark.long
@pytest.mark.parametrize("configuration", [UNITS[0], UNITS[1], UNITS[4]], ids=str)
@pytest.mark.parametrize("is_autocast", [False, True])
def test_data_parallel_training_with_shared_statistics_is_one_process_with_the_whole_batch(
    configuration, is_autocast, two_processes
):
    unit = fused(configuration, torch.float64)
    x = images(unit, 4)
    gradient = torch.randn_like(plain_step_unit(unit)(x))
    states = two_processes.run(train_parallel_with_shared_statistics, unit, x, gradient, is_autocast)
    if is_autocast:
        with autocast(torch.bfloat16):
            expected = step(unit.float(), x.float(), gradient.float(), OP)
    else:
        expected = step(plain_step_unit(unit), x, gradient)
    result = torch.cat([state["result"] for state in states])
    assert result.dtype == (torch.bfloat16 if is_autocast else torch.float64)
    # One ulp of bfloat16, where the order of float32's sums of statistics decides how a value is rounded.
    close = {"rtol": 2e-2, "atol": 2e-2} if is_autocast else {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(result, expected["result"], **close)
    for state in states:
        for name in state.keys() - {"result"}:
            value = expected[name] / 2 if name.startswith("grad") else expected[name]  # it takes the mean
            scale = value.abs().max().item() if is_autocast and name.startswith("grad") else 1
            torch.testing.assert_close(state[name], value, rtol=close["rtol"], atol=close["atol"] * scale, msg=name)
