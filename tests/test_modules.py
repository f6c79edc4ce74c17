"""The units as modules: the fused one is the plain one in all but speed."""

import copy
import io
import pickle

import pytest
import torch
from support import LAYOUTS, assert_as_accurate, assert_ran, assert_ran_reference, plain_twin, randomize
from torch import nn

import shufflenet_ext as se
from shufflenet_ext import FusedShuffleBottleneck, ShuffleBottleneck

OP = "shuffle_bottleneck_batch_norm"
CONFIGURATIONS = [
    {"in_channels": 24, "out_channels": 24, "stride": 1, "groups": 3},
    {"in_channels": 24, "out_channels": 216, "stride": 2, "groups": 3},
    {"in_channels": 24, "out_channels": 216, "stride": 2, "groups": 3, "mid_channels": 60},
    {"in_channels": 40, "out_channels": 40, "stride": 1, "groups": 2, "conv1_groups": 5, "mid_channels": 10},
    {"in_channels": 16, "out_channels": 16, "stride": 1, "groups": 4, "conv2_relu": True},
    {"in_channels": 16, "out_channels": 32, "stride": 2, "groups": 8, "pool_count_include_pad": False},
    {"in_channels": 24, "out_channels": 24, "stride": 1, "groups": 3, "mid_channels": 12, "bias": True},
]
# That the native ops cannot express.
VARIANTS = [
    {"in_channels": 24, "out_channels": 24, "stride": 1, "groups": 3, "mid_channels": 12, "shuffle_groups": 4},
    {"in_channels": 16, "out_channels": 32, "stride": 2, "groups": 2, "shortcut_first": True},
    {"in_channels": 16, "out_channels": 32, "stride": 2, "groups": 2, "shuffle_groups": 1, "shortcut_relu": False},
]
each_variant = pytest.mark.parametrize("configuration", VARIANTS, ids=str)
each_configuration = pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)


def fused(configuration=CONFIGURATIONS[0]):
    return randomize(FusedShuffleBottleneck(**configuration)).eval()


def images(unit, batch=2, plane=(7, 9)):
    return torch.randn(batch, unit.conv1.in_channels, *plane)


def assert_equals_plain(unit, x=None):
    """The unit's native result is that of the plain unit with the same state: what a stale copy would not give."""
    x = images(unit).to(unit.conv1.weight.dtype) if x is None else x
    plain = plain_twin(unit)
    with assert_ran(OP):
        got = unit(x)
    assert_as_accurate(got.detach(), plain(x).detach(), copy.deepcopy(plain).double()(x.double()).detach())


@each_configuration
def test_keys_load_strictly_both_ways(configuration):
    keys = ["conv1.weight", "conv2.weight", "conv3.weight"]
    keys += [f"conv{i}.bias" for i in (1, 2, 3) if configuration.get("bias")]
    keys += [f"bn{i}.{k}" for i in (1, 2, 3) for k in ("weight", "bias", "running_mean", "running_var")]
    keys += [f"bn{i}.num_batches_tracked" for i in (1, 2, 3)]
    ours, plain = fused(configuration), ShuffleBottleneck(**configuration)
    assert sorted(ours.state_dict()) == sorted(plain.state_dict()) == sorted(keys)
    plain.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(plain.state_dict(), strict=True)


@each_configuration
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_eval_parity(configuration, dtype, layout):
    unit = fused(configuration).to(dtype)
    assert_equals_plain(unit, images(unit).to(dtype).contiguous(memory_format=layout))


@each_configuration
def test_the_reference_keeps_channels_last_in_training(configuration):
    unit = fused(configuration).train()
    plain = plain_twin(unit)
    x = images(unit).requires_grad_()
    other = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    shuffled = []
    unit.conv2.register_forward_pre_hook(lambda conv, args: shuffled.append(args[0]))
    with se.use_backend("reference"):
        got, expected = unit(other), plain(x)
    torch.testing.assert_close(got, expected)
    for result in (got, expected):
        result.square().sum().backward()
    torch.testing.assert_close(other.grad, x.grad, rtol=1e-4, atol=1e-4)
    for tensor in (*shuffled, got, other.grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


@each_configuration
def test_eval_gradients(configuration):
    # Fine-tuning with frozen batch norm goes through the native op and back through the reference.
    unit = fused(configuration)
    plain = plain_twin(unit)
    x = images(unit).requires_grad_()
    other = x.detach().clone().requires_grad_()
    with assert_ran(OP):
        got = unit(x)
    got.square().sum().backward()
    plain(other).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(unit.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b[1].grad, rtol=1e-4, atol=1e-3, msg=name)


@each_variant
@pytest.mark.parametrize("training", [False, True])
def test_variants_compute_what_they_say(configuration, training):
    # Written once more, with torch alone.
    unit = randomize(FusedShuffleBottleneck(**configuration)).double().train(training)
    x = images(unit).double()
    with torch.no_grad(), se.use_backend("reference"):
        got = unit(x)
        groups = configuration.get("shuffle_groups", configuration["groups"])
        y = unit.bn1(unit.conv1(x)).relu()
        y = y[:, [c % groups * (y.shape[1] // groups) + c // groups for c in range(y.shape[1])]]
        y = unit.bn3(unit.conv3(unit.bn2(unit.conv2(y))))
        if configuration["stride"] == 1:
            expected = (y + x).relu()
        else:
            pooled = nn.AvgPool2d(3, 2, 1)(x)
            parts = [y.relu(), pooled.relu() if configuration.get("shortcut_relu", True) else pooled]
            expected = torch.cat(parts[::-1] if configuration.get("shortcut_first") else parts, 1)
    torch.testing.assert_close(got, expected)


def test_state_is_never_stale():
    unit = fused()
    assert_equals_plain(unit)
    other = randomize(ShuffleBottleneck(**CONFIGURATIONS[0]), seed=5)
    unit.load_state_dict(other.state_dict())
    x = images(unit)
    torch.testing.assert_close(unit(x), other.eval()(x))

    optimizer = torch.optim.SGD(unit.parameters(), lr=0.1)
    before = unit(x).detach()
    unit(x).square().mean().backward()
    optimizer.step()
    assert_equals_plain(unit)
    assert not torch.allclose(unit(x), before)

    for change in (
        lambda: unit.conv1.weight.data.mul_(1.5),
        lambda: unit.conv3.weight.data.neg_(),
        lambda: unit.bn1.bias.data.add_(1),
        lambda: unit.bn2.running_mean.add_(0.5),
        lambda: unit.bn3.running_var.mul_(3),
        lambda: setattr(unit.bn2, "eps", 0.5),
        lambda: setattr(unit.conv2, "weight", torch.nn.Parameter(torch.randn(6, 1, 3, 3))),
        lambda: setattr(unit, "conv2_relu", True),
        lambda: unit.train()(5 * x + 1) is unit.eval(),
    ):
        before = unit(x).detach()
        change()
        assert_equals_plain(unit)
        assert not torch.allclose(unit(x), before), "the change has no effect: it proves nothing"


def test_copies_have_a_life_of_their_own():
    unit = fused()
    x = images(unit)
    expected = unit(x)
    saved = io.BytesIO()
    torch.save(unit, saved)
    saved.seek(0)
    for twin in (
        copy.deepcopy(unit),
        pickle.loads(pickle.dumps(unit)),
        torch.load(saved, weights_only=False),
    ):
        assert type(twin) is FusedShuffleBottleneck
        assert torch.equal(twin(x), expected)
        twin.conv1.weight.data.zero_()
        twin.bn3.running_mean.add_(1)
        assert_equals_plain(twin)
        assert torch.equal(unit(x), expected)


def test_dtype_conversions():
    unit = fused()
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        unit.to(dtype)
        assert unit(images(unit).to(dtype)).dtype == dtype
        assert_equals_plain(unit)
    with pytest.raises(RuntimeError, match=r"conv1_weight: got dtype float32, expected x's, float64"):
        unit(images(unit).double())


def test_frozen_batch_norm_inside_a_training_unit():
    unit = fused().train()
    for norm in (unit.bn1, unit.bn2, unit.bn3):
        norm.eval()
    assert_equals_plain_modes(unit, OP)
    unit.bn2.train()
    assert_equals_plain_modes(unit, "shuffle_bottleneck_training")


def assert_equals_plain_modes(unit, op):
    plain = plain_twin(unit)
    for ours, theirs in zip(unit.modules(), plain.modules(), strict=True):
        theirs.training = ours.training
    x = images(unit)
    with assert_ran(op):
        got = unit(x)
    torch.testing.assert_close(got, plain(x), rtol=1e-4, atol=1e-4)
    for a, b in zip(unit.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_on_the_unit_run():
    unit, seen = fused(), []
    x = images(unit)
    unit.register_forward_pre_hook(lambda module, args: seen.append("before"))
    unit.register_forward_hook(lambda module, args, output: output * 0)
    with assert_ran(OP):
        assert not unit(x).any()
    assert seen == ["before"]


@pytest.mark.parametrize("part", ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_inside_the_unit_run_or_are_refused(part, kind):
    unit, seen = fused(), []
    x = images(unit).requires_grad_()
    getattr(getattr(unit, part), f"register_{kind}_hook")(lambda *args: seen.append(part))
    with pytest.raises(RuntimeError, match=r"backend 'native' was asked for, but .* hooks"):
        unit(x)
    with se.use_backend("reference"):
        unit(x).sum().backward()
    assert seen == [part]


@pytest.mark.parametrize(
    ("part", "replacement"),
    [
        ("bn2", nn.Identity()),
        ("conv2", nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=12, bias=False)),
        ("conv2", nn.Conv2d(12, 12, 3, padding=1, padding_mode="reflect", groups=12, bias=False)),
    ],
    ids=["identity", "dilation", "padding mode"],
)
def test_a_replaced_part_runs_the_plain_unit_or_is_refused(part, replacement):
    unit = se.FusedShuffleBottleneck(24, 24, 1, 3, mid_channels=12).eval()
    setattr(unit, part, replacement.eval())
    x = images(unit)
    with pytest.raises(RuntimeError, match=r"backend 'native' was asked for, but .* was replaced"):
        unit(x)
    warns = pytest.warns(se.ReferenceFallbackWarning, match="was replaced")
    with se.use_backend("auto"), warns, assert_ran_reference():
        got = unit(x)
    torch.testing.assert_close(got, se.ShuffleBottleneck.forward(unit, x))


def test_empty_batch():
    for configuration in CONFIGURATIONS:
        unit = fused(configuration)
        with assert_ran(OP):
            got = unit(images(unit, batch=0))
        assert got.shape == plain_twin(unit)(images(unit, batch=0)).shape


BAD_ARGUMENTS = [
    ({"in_channels": 0}, ValueError, r"in_channels: got 0, expected a positive int"),
    ({"out_channels": -4}, ValueError, r"out_channels: got -4, expected a positive int"),
    ({"in_channels": 24.0}, TypeError, r"in_channels: got float, expected an int"),
    ({"groups": None}, TypeError, r"groups: got NoneType, expected an int"),
    ({"stride": True}, TypeError, r"stride: got bool, expected an int"),
    ({"stride": 3}, ValueError, r"stride: got 3, expected 1 or 2"),
    ({"groups": 0}, ValueError, r"groups: got 0, expected a positive int"),
    ({"groups": 5}, ValueError, r"groups: got 5, expected a positive divisor of mid_channels, 6"),
    ({"out_channels": 48}, ValueError, r"out_channels: got 48, expected in_channels, 24"),
    ({"mid_channels": 0}, ValueError, r"mid_channels: got 0, expected a positive int"),
    ({"mid_channels": 7}, ValueError, r"groups: got 3, expected a positive divisor of mid_channels, 7"),
    ({"mid_channels": 6.0}, TypeError, r"mid_channels: got float, expected an int"),
    ({"shuffle_groups": 5}, ValueError, r"shuffle_groups: got 5, expected a positive divisor of mid_channels, 6"),
    ({"shuffle_groups": 0}, ValueError, r"shuffle_groups: got 0, expected a positive divisor of mid_channels, 6"),
    ({"shuffle_groups": True}, TypeError, r"shuffle_groups: got bool, expected an int"),
    ({"conv1_groups": 5}, ValueError, r"conv1_groups: got 5, expected a positive divisor of in_channels, 24"),
    ({"conv1_groups": 4}, ValueError, r"conv1_groups: got 4, expected a positive divisor of mid_channels, 6"),
    ({"conv1_groups": 0}, ValueError, r"conv1_groups: got 0, expected a positive divisor"),
    ({"conv1_groups": "1"}, TypeError, r"conv1_groups: got str, expected an int"),
    ({"out_channels": 3, "stride": 2, "groups": 1}, ValueError, r"mid_channels: got 0, expected a positive int"),
    ({"out_channels": 25, "stride": 2}, ValueError, r"groups: got 3, expected a positive divisor of out_channels, 25"),
]


@pytest.mark.parametrize("unit_class", [ShuffleBottleneck, FusedShuffleBottleneck])
@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARGUMENTS, ids=str)
def test_constructor_refuses_with_a_reason(unit_class, changes, error, message):
    with pytest.raises(error, match=message):
        unit_class(**CONFIGURATIONS[0] | changes)


def test_constructor_takes_the_rest_by_name_only():
    with pytest.raises(TypeError):
        FusedShuffleBottleneck(24, 24, 1, 3, 6)
    assert FusedShuffleBottleneck(24, 216, 2, 3).conv1.groups == 1  # 24 channels: the stem's
    assert FusedShuffleBottleneck(240, 240, 1, 3).conv1.groups == 3
    assert FusedShuffleBottleneck(24, 218, 2, 2).conv1.out_channels == 54  # int(218 / 4)


@pytest.mark.parametrize("unit_class", [ShuffleBottleneck, FusedShuffleBottleneck])
def test_forward_refuses_with_a_reason(unit_class):
    unit = unit_class(**CONFIGURATIONS[0]).eval()
    with pytest.raises(TypeError, match=r"x: got list, expected a torch\.Tensor"):
        unit([1])
    for bad in (torch.randn(24, 5, 5), torch.randn(2, 23, 5, 5)):
        with pytest.raises((ValueError, RuntimeError), match=r"\b(x|conv1_weight|conv1_groups): got .*, expected "):
            unit(bad)


def test_variants_do_not_load_into_each_other():
    # Those whose shapes differ: see the table of the design.
    first = {"in_channels": 24, "out_channels": 216, "stride": 2, "groups": 3}
    variants = [first, first | {"mid_channels": 60}, first | {"conv1_groups": 3}]
    for mine in variants:
        for yours in variants:
            target, state = FusedShuffleBottleneck(**mine), ShuffleBottleneck(**yours).state_dict()
            if mine == yours:
                target.load_state_dict(state)
            else:
                with pytest.raises(RuntimeError, match=r"size mismatch for conv1\.weight"):
                    target.load_state_dict(state)
