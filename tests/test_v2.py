"""ShuffleNet v2: the unit's op, programs, modules and networks. Other people's are in test_match_v2.py."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from support import (
    DTYPES,
    LAYOUTS,
    Recorder,
    assert_as_accurate,
    assert_ran,
    assert_strides_of_layout,
    autocast,
    network_op,
    randomize,
    sizes_at_the_tile,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from units_v2 import UnitV2

import shufflenet_ext as se
from benchmarks.public_styles import TorchvisionUnit
from shufflenet_ext import reference

pytestmark = pytest.mark.usefixtures("poison")
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
op = torch.ops.shufflenet_ext.shuffle_unit_v2

STRIDE2 = UnitV2(stride=2, in_channels=9, mid_channels=8, out_channels=10, shortcut_channels=6)
CASES = {
    "torchvision": UnitV2(),
    "torchvision, stride 2": UnitV2(stride=2, in_channels=6, mid_channels=11, out_channels=10),
    "megvii": UnitV2(split_groups=6, shuffle_groups=1),
    "megvii, stride 2": replace(STRIDE2, shuffle_groups=1),
    "unequal, shuffled": STRIDE2,
    "other shuffles": UnitV2(in_channels=24, split_groups=3, shuffle_groups=8),
    "wide": UnitV2(in_channels=116, mid_channels=58, plane=(28, 28)),
    "wide, stride 2": UnitV2(stride=2, in_channels=24, mid_channels=58, out_channels=58, plane=(29, 30)),
}
each_case = pytest.mark.parametrize("unit", CASES.values(), ids=CASES)


# ---- The op ---------------------------------------------------------------------------------------------------------


@each_layout
@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_pytorch(dtype, unit, layout, isa):
    tensors = unit.tensors(dtype, layout)
    got = unit.native(tensors)
    assert got.dtype == dtype
    assert_strides_of_layout(got, layout)
    assert_as_accurate(got, unit.reference(tensors), unit.exact(tensors))


@pytest.mark.covering(1)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("plane", [(1, 1), (1, 9), (8, 1), (2, 2), (7, 7), (3, 50)], ids=str)
def test_planes(plane, stride, isa):
    unit = replace(CASES["torchvision" if stride == 1 else "unequal, shuffled"], plane=plane)
    tensors = unit.tensors()
    assert_as_accurate(unit.native(tensors), unit.reference(tensors), unit.exact(tensors))


def test_channels_at_the_tile(isa):
    for size in sizes_at_the_tile(isa, torch.float32):
        for unit in (UnitV2(in_channels=2 * size, mid_channels=size), replace(STRIDE2, out_channels=size)):
            unit = replace(unit, plane=(3, size), batch=1, shuffle_groups=1)
            tensors = unit.tensors()
            assert_as_accurate(unit.native(tensors), unit.reference(tensors), unit.exact(tensors))


@each_case
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_change_nothing(threads, unit):
    for batch, plane in ((1, (28, 28)), (3, (9, 14)), (2, (1, 1)), (1, (90, 160)), (0, (4, 4))):
        tensors = replace(unit, batch=batch, plane=plane).tensors()
        torch.set_num_threads(1)
        expected = unit.native(tensors)
        torch.set_num_threads(threads)
        assert torch.equal(unit.native(tensors), expected)


def test_x_is_left_as_it_is_whatever_its_strides():
    for unit in CASES.values():
        x, *rest = unit.tensors()
        before = x.clone()
        expected = unit.native([x, *rest])
        assert torch.equal(x, before)
        room = torch.full((x.shape[0] + 1, x.shape[1] + 1, x.shape[2] + 2, x.shape[3] + 2), torch.nan)
        view = room[1:, 1:, 1:-1, 2:]
        view.copy_(x)
        assert torch.equal(unit.native([view, *rest]), expected)


@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_nan_and_inf_reach_what_depends_on_them(special):
    for unit in CASES.values():
        x, *rest = unit.tensors()
        for channel in (0, x.shape[1] - 1):
            given = x.clone()
            given[0, channel, 2, 3] = special
            got, expected = unit.native([given, *rest]), unit.reference([given, *rest])
            for kind in (torch.isnan, torch.isinf):
                assert torch.equal(kind(got), kind(expected))


@pytest.mark.covering(1)
@each_layout
@pytest.mark.parametrize("unit", [CASES["torchvision"], STRIDE2])
def test_opcheck(unit, layout):
    torch.library.opcheck(op.default, tuple(unit.tensors(layout=layout)), unit.options)


@pytest.mark.parametrize("unit", [CASES["torchvision"], STRIDE2, CASES["megvii"]])
def test_gradients(unit):
    tensors = [t.requires_grad_() for t in replace(unit, batch=1, plane=(3, 4)).tensors(torch.float64)]
    assert torch.autograd.gradcheck(lambda *tensors: unit.native(list(tensors)), tensors)


def test_compiled_whole():
    torch._dynamo.reset()
    unit = CASES["torchvision, stride 2"]
    tensors = unit.tensors()
    compiled = torch.compile(
        lambda *tensors: se.ops.shuffle_unit_v2(*tensors, **unit.options) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*tensors), 2 * unit.native(tensors))


def test_transforms_run_the_reference():
    unit = CASES["torchvision"]
    x, *rest = unit.tensors()
    batches = torch.stack([x, 2 * x])
    with se.use_backend("auto"), pytest.warns(se.ReferenceFallbackWarning, match=r"torch\.func transforms"):
        got = torch.func.vmap(lambda x: unit.native([x, *rest]))(batches)
    torch.testing.assert_close(got, torch.stack([unit.reference([x, *rest]) for x in batches]))


def test_autocast_and_flop():
    for unit in CASES.values():
        tensors = unit.tensors()
        with autocast(torch.bfloat16):
            got = unit.native(tensors)
        assert torch.equal(got, unit.native([t.bfloat16() for t in tensors]))
        counts = []
        for run in (unit.native, unit.reference):
            with FlopCounterMode(display=False) as counter:
                run(tensors)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0


def bad_arguments():
    """A unit, which arguments are others, and what the message says."""
    one, two = CASES["torchvision"], STRIDE2
    zeros = torch.zeros
    yield one, {0: zeros(2, 11, 5, 7)}, r"x: got .*\[2, 11, 5, 7\], expected an even number"
    yield one, {0: zeros(12, 5, 7)}, r"x: got shape \[12, 5, 7\], expected"
    yield one, {0: zeros(2, 12, 5, 7, dtype=torch.int32)}, r"x: got dtype .*(int32|ScalarType\(3\)), expected"
    yield one, {1: zeros(7, 12, 1, 1)}, r"conv1_weight: got shape \[7, 12, 1, 1\], expected shape \[7, 6, 1, 1\]"
    yield one, {1: zeros(7, 6)}, r"conv1_weight: got shape \[7, 6\], expected"
    yield one, {2: zeros(6)}, r"conv1_bias: got shape \[6\], expected shape \[7\]"
    yield one, {3: zeros(7, 7, 3, 3)}, r"conv2_weight: got shape \[7, 7, 3, 3\], expected shape \[7, 1, 3, 3\]"
    yield one, {5: zeros(5, 7, 1, 1), 6: None}, r"conv3_weight: got 5 rows, expected 6"
    yield one, {5: zeros(6, 8, 1, 1)}, r"conv3_weight: got shape \[6, 8, 1, 1\], expected shape \[6, 7, 1, 1\]"
    yield one, {5: zeros(6, 7, 1, 1).double()}, r"conv3_weight: got dtype .*float64, expected x's, .*float32"
    yield one, {7: zeros(12, 1, 3, 3)}, r"shortcut1_weight: got a tensor with stride 1, expected None"
    yield two, {7: None}, r"shortcut1_weight: got None with stride 2, expected a tensor"
    yield two, {9: None}, r"shortcut2_weight: got None with stride 2, expected a tensor"
    yield two, {7: zeros(9, 1, 1, 1)}, r"shortcut1_weight: got shape \[9, 1, 1, 1\], expected shape \[9, 1, 3, 3\]"
    yield two, {9: zeros(6, 8, 1, 1)}, r"shortcut2_weight: got shape \[6, 8, 1, 1\], expected shape \[6, 9, 1, 1\]"
    for stride in (0, 3, -1, 2**62):
        yield one, {"stride": stride}, rf"stride: got {stride}, expected 1 or 2"
    for groups in (0, -2, 5, 2**62):
        yield one, {"shuffle_groups": groups}, rf"shuffle_groups: got {groups}, expected a positive divisor"
        yield one, {"split_groups": groups}, rf"split_groups: got {groups}, expected a positive divisor"


@pytest.mark.parametrize(("unit", "changes", "message"), list(bad_arguments()), ids=lambda value: None)
def test_bad_arguments_are_named(unit, changes, message):
    tensors = [*unit.tensors(), None, None, None, None][:11]
    options = unit.options | {name: value for name, value in changes.items() if isinstance(name, str)}
    tensors = [changes.get(i, tensor) for i, tensor in enumerate(tensors)]
    metas = [None if tensor is None else tensor.to("meta") for tensor in tensors]
    for run, given in (
        (op, tensors),
        (op, metas),
        (se.ops.shuffle_unit_v2, tensors),
        (reference.shuffle_unit_v2, tensors),
    ):
        backend = "reference" if run is se.ops.shuffle_unit_v2 and not given[0].is_floating_point() else "native"
        with se.use_backend(backend), pytest.raises((ValueError, RuntimeError), match=message):
            run(*given, **options)


def test_wrong_types_are_named():
    x, *rest = CASES["torchvision"].tensors()
    with pytest.raises(TypeError, match="conv1_weight: got str"):
        se.ops.shuffle_unit_v2(x, "w", *rest[1:])
    with pytest.raises(TypeError, match="shuffle_groups: got float"):
        se.ops.shuffle_unit_v2(x, *rest, shuffle_groups=2.0)


# ---- Programs -------------------------------------------------------------------------------------------------------

# Stages of torchvision's kind, whose halves of 10 and 22 channels do not halve evenly; of Megvii's, with unequal
# parts; and one that begins with a half that passes by.
PROGRAMS = {
    "torchvision": (
        UnitV2(stride=2, in_channels=8, mid_channels=10, out_channels=10),
        *[UnitV2(in_channels=20, mid_channels=10)] * 4,
        UnitV2(stride=2, in_channels=20, mid_channels=22, out_channels=22),
        *[UnitV2(in_channels=44, mid_channels=22)] * 3,
    ),
    "megvii": (
        UnitV2(stride=2, in_channels=8, mid_channels=10, out_channels=12, shortcut_channels=8, shuffle_groups=1),
        *[UnitV2(in_channels=20, mid_channels=10, split_groups=10, shuffle_groups=1)] * 3,
    ),
    "pytorchcv, the other": (
        UnitV2(stride=2, in_channels=8, mid_channels=10, out_channels=12, shortcut_channels=8),
        *[UnitV2(in_channels=20, mid_channels=10)] * 2,
    ),
    "halves first": (*[UnitV2(in_channels=24, mid_channels=58)] * 3,),
}


def arguments(units, dtype, *, last=None, classes=None, stem=None, batch=2, plane=(14, 14), layout=LAYOUTS[0]):
    """x, weights and program of units, with or without what is around them."""
    generator = torch.Generator().manual_seed(3)

    def layer(rows, *depth):
        weight = torch.randn((rows, *depth), generator=generator, dtype=torch.float64)
        return [weight / torch.tensor(depth).prod() ** 0.5, torch.randn(rows, generator=generator).double()]

    channels = 3 if stem else units[0].in_channels
    x = torch.randn((batch, channels, *plane), generator=generator).to(dtype).contiguous(memory_format=layout)
    tensors, program = [], []
    if stem:
        program += [0, units[0].in_channels, *stem]
        tensors += layer(units[0].in_channels, 3, stem[0], stem[0])
    for unit in units:
        program += unit.step
        tensors += unit.tensors(torch.float64)[1:]
    channels = units[-1].result_channels
    if last:
        program += [6, last]
        tensors += layer(last, channels, 1, 1)
        channels = last
    if classes:
        program += [2, classes, 0]
        tensors += layer(classes, channels)
    return x, reference.pack_weights([tensor.to(dtype) for tensor in tensors]), program


def check(x, weights, program):
    got = network_op(x, weights, program)
    assert got.dtype == x.dtype
    exact = reference.shuffle_network(x.double(), weights.double(), program)
    assert_as_accurate(got, reference.shuffle_network(x, weights, program), exact)
    return got


each_program = pytest.mark.parametrize("units", PROGRAMS.values(), ids=PROGRAMS)


@each_layout
@each_program
@pytest.mark.parametrize("around", [{}, {"classes": 7}, {"last": 30, "classes": 7}, {"last": 31}], ids=str)
def test_programs_as_accurate_as_pytorch(around, units, layout, program_dtype):
    check(*arguments(units, program_dtype, layout=layout, **around))


@each_program
@pytest.mark.parametrize("threads", [2, 3, 4, 7])
@pytest.mark.parametrize("plane", [(56, 56), (27, 30), (7, 7), (1, 1), (53, 29)], ids=str)
def test_threads_change_no_program(plane, threads, units, program_dtype):
    for batch in (1, 3):
        given = arguments(units, program_dtype, batch=batch, plane=plane, last=30, classes=5)
        torch.set_num_threads(1)
        expected = network_op(*given)
        torch.set_num_threads(threads)
        assert torch.equal(network_op(*given), expected)


@each_layout
@each_program
def test_equal_their_units_one_by_one(units, layout):
    for dtype in (torch.float32, torch.float64):
        x, weights, program = arguments(units, dtype, layout=layout)
        y = x
        for unit in units:
            y = unit.native([y, *unit.tensors(dtype)[1:]])
        assert torch.equal(network_op(x, weights, program), y)


# Threads that share an image of smaller planes hand on strips, but not what the conversion ahead of the units has made.
@pytest.mark.parametrize("plane", [(181, 321), (88, 88)], ids=str)
def test_large_planes_stay_in_place(plane):
    units = *PROGRAMS["halves first"], UnitV2(stride=2, in_channels=24, mid_channels=58)
    given = arguments(units, torch.float32, batch=1, plane=plane)
    torch.set_num_threads(1)
    expected = check(*given)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(network_op(*given), expected)


@each_layout
def test_stem_last_convolution_and_head(layout, program_dtype):
    stem = (3, 2, 1, 1, 1)
    given = arguments(
        PROGRAMS["torchvision"], program_dtype, stem=stem, last=64, classes=9, plane=(65, 50), layout=layout
    )
    check(*given)


def test_the_last_convolution_behind_v1_and_alone():
    x, w = torch.randn(2, 24, 9, 7), []
    w += [torch.randn(12, 8, 1, 1), torch.randn(12), torch.randn(12, 1, 3, 3), torch.randn(12)]
    w += [torch.randn(24, 4, 1, 1), torch.randn(24), torch.randn(30, 24, 1, 1) / 5, torch.randn(30)]
    check(x, reference.pack_weights(w), [1, 12, 24, 3, 3, 1, 0, 1, 6, 30])
    check(x, reference.pack_weights(w[-2:]), [6, 30])


def test_again():
    units = PROGRAMS["halves first"]
    x, weights, program = arguments(units, torch.float32)
    assert torch.equal(network_op(x, weights, [*units[0].step, 3, 2]), network_op(x, weights, program))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ([5, 7, 6, 0, 1, 1], r"program: got 5 elements for its last step, expected 6"),
        ([5, 0, 6, 0, 1, 1, 2], r"program: got mid_channels 0, expected a positive number"),
        ([5, 7, -1, 0, 1, 1, 2], r"program: got out_channels -1, expected a positive number"),
        ([5, 7, 5, 0, 1, 1, 2], r"program: got 12 input channels, 5 out_channels and 0 shortcut_channels, expected"),
        ([5, 7, 6, 6, 1, 1, 2], r"program: got 12 input channels, 6 out_channels and 6 shortcut_channels, expected"),
        ([5, 7, 6, 0, 2, 1, 2], r"program: got shortcut_channels 0, expected a positive number"),
        ([5, 7, 6, 0, 3, 1, 2], r"program: got stride 3, expected 1 or 2"),
        ([5, 7, 6, 0, 1, 5, 2], r"program: split_groups: got 5, expected a positive divisor"),
        ([5, 7, 6, 0, 1, 1, 0], r"program: shuffle_groups: got 0, expected a positive divisor"),
        ([5, 7, 6, 0, 1, 1, 2, 1, 4, 12, 1, 1, 1, 0, 1], r"program: got units of ShuffleNet v1 and v2, expected"),
        ([1, 4, 12, 1, 1, 1, 0, 1, 5, 7, 6, 0, 1, 1, 2], r"program: got units of ShuffleNet v1 and v2, expected"),
        ([6, 0], r"program: got out_channels 0, expected a positive number"),
        ([6, 5, 6, 5], r"program: got step 6 at element 2, expected 0 \(stem\) first"),
        ([6, 12, 5, 7, 6, 0, 1, 1, 2], r"program: got step 5 at element 2, expected 0 \(stem\) first"),
        ([5, 2**62, 6, 0, 1, 1, 2], r"program: got mid_channels \d+, expected|weights: got \d+ elements, expected"),
    ],
)
def test_malformed_programs(program, message):
    x, weights = torch.randn(1, 12, 5, 4), torch.randn(1024)
    for run in (network_op, reference.shuffle_network):
        with pytest.raises((ValueError, RuntimeError), match=message):
            run(x, weights, program)


# ---- Modules --------------------------------------------------------------------------------------------------------


def twins(stride, **options):
    fused = randomize(se.FusedShuffleUnitV2(12, 12 if stride == 1 else 20, stride, **options)).eval()
    plain = se.ShuffleUnitV2(12, 12 if stride == 1 else 20, stride, **options).eval()
    plain.load_state_dict(fused.state_dict())
    return fused, plain


@pytest.mark.parametrize("stride", [1, 2])
def test_the_module_is_a_drop_in_for_torchvisions(stride):
    foreign = randomize(TorchvisionUnit(12, 12 if stride == 1 else 20, stride)).eval()
    fused, _ = twins(stride)
    fused.load_state_dict(foreign.state_dict())
    foreign.load_state_dict(fused.state_dict())
    x = torch.randn(2, 12, 9, 7)
    with torch.no_grad(), assert_ran("shuffle_network_batch_norm"):
        got = fused(x)
    assert_as_accurate(got, foreign(x), copy.deepcopy(foreign).double()(x.double()))
    assert_as_accurate(pickle.loads(pickle.dumps(fused))(x), foreign(x), copy.deepcopy(foreign).double()(x.double()))


@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"mid_channels": 5}, {"split_groups": 6, "shuffle_groups": 1}], ids=str
)
@pytest.mark.parametrize("stride", [1, 2])
def test_the_module_in_each_mode(stride, options, isa):
    options = options | ({"shortcut_channels": 8} if stride == 2 else {})
    fused, plain = twins(stride, **options)
    x = torch.randn(2, 12, 9, 7)
    exact = copy.deepcopy(plain).double()(x.double())
    with torch.no_grad():
        assert_as_accurate(fused(x), plain(x), exact)
        half = [copy.deepcopy(unit).bfloat16()(x.bfloat16()) for unit in (fused, plain)]
        assert_as_accurate(*half, exact)
    results = []
    for unit in (fused, plain):
        for mode in ("native", "reference"):  # in eval mode, and in training mode, which is PyTorch's
            given = x.clone().requires_grad_()
            with se.use_backend(mode):
                y = unit.train(mode == "reference")(given)
            y.square().sum().backward()
            results.append([y, given.grad, *(p.grad.clone() for p in unit.parameters())])
            unit.zero_grad()
    torch.testing.assert_close(results[:2], results[2:], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fused.state_dict(), plain.state_dict())  # the norms' statistics of the training step


def test_eval_with_gradients_runs_the_op():
    fused, plain = twins(1)
    x = torch.randn(2, 12, 9, 7, requires_grad=True)
    with assert_ran("shuffle_unit_v2"):
        got = fused(x)
    torch.testing.assert_close(got, plain(x))


def test_what_became_another_module_runs_its_own_code():
    for change in (
        lambda unit: unit.branch2[2].register_forward_hook(lambda module, args, y: y + 1),
        lambda unit: unit.branch2.__setitem__(2, nn.LeakyReLU(0.1)),
        lambda unit: unit.branch2.__setitem__(1, nn.Identity()),
        lambda unit: setattr(unit, "branch2", nn.Sequential(unit.branch2)),
    ):
        fused, plain = twins(1)
        x = torch.randn(2, 12, 9, 7)
        for unit in (fused, plain):
            change(unit)
        with pytest.raises(RuntimeError, match="backend 'native' was asked for, but in a FusedShuffleUnitV2"):
            fused(x)
        with se.use_backend("auto"), pytest.warns(se.ReferenceFallbackWarning, match="FusedShuffleUnitV2"):
            assert torch.equal(fused(x), plain(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((12, 14, 1), r"out_channels: got 14, expected in_channels, 12"),
        ((11, 11, 1), r"out_channels: got 11, expected in_channels, 11, which must be even"),
        ((12, 12, 3), r"stride: got 3, expected 1 or 2"),
        ((0, 12, 2), r"in_channels: got 0, expected a positive int"),
        ((12, 12, 1, {"shortcut_channels": 6}), r"shortcut_channels: got 6 with stride 1, expected None"),
        ((12, 12, 2, {"shortcut_channels": 12}), r"shortcut_channels: got 12, expected a positive int less than"),
        ((12, 12, 1, {"shuffle_groups": 5}), r"shuffle_groups: got 5, expected a positive divisor"),
        ((12, 12, 1, {"split_groups": 0}), r"split_groups: got 0, expected a positive divisor"),
        ((12, 12, 1, {"mid_channels": 0}), r"mid_channels: got 0, expected a positive int"),
    ],
)
def test_bad_arguments_of_the_module(arguments, message):
    *positional, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(ValueError, match=message):
        se.ShuffleUnitV2(*positional, **options)


def test_bad_x_of_the_module():
    for unit in twins(1):
        with pytest.raises(ValueError, match=r"x: got shape \[2, 14, 5, 5\], expected \(batch, 12, height, width\)"):
            unit(torch.randn(2, 14, 5, 5))
        with pytest.raises(TypeError, match="x: got int, expected"):
            unit(3)


# ---- Networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "millions", "torchvisions"), [(0.5, 41, 40), (1.0, 146, 145), (1.5, 299, 296), (2.0, 591, 583)]
)
@pytest.mark.parametrize("style", ["paper", "torchvision"])
def test_multiply_adds_of_table_5(style, width, millions, torchvisions):
    with torch.device("meta"):
        net = se.models.shufflenet_v2(width).eval()
        if style == "paper":  # whose authors leave a shortcut as wide as what it reads, where torchvision halves
            first = net.stage2[0]
            channels = first.branch2[5].out_channels * 2
            net.stage2[0] = se.FusedShuffleUnitV2(24, channels, 2, shortcut_channels=24).eval()
        else:
            millions = torchvisions
        counter = FlopCounterMode(display=False)
        with se.use_backend("reference"), counter, torch.no_grad():
            net(torch.randn(1, 3, 224, 224))
    # Table 5 counts the linear layer too; its 41 are 40.5.
    assert abs(counter.get_total_flops() / 2e6 - millions) < 0.6


def test_keys_are_torchvisions():
    net = se.models.shufflenet_v2()
    keys = set(net.state_dict())
    state = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.0.weight", "conv5.0.weight", "fc.weight", "fc.bias"}
    expected |= {f"{conv}.1.{k}" for conv in ("conv1", "conv5") for k in state}
    for stage, repeats in (("stage2", 4), ("stage3", 8), ("stage4", 4)):
        for i in range(repeats):
            convolutions = ["branch2.0", "branch2.3", "branch2.5", *(["branch1.0", "branch1.2"] if i == 0 else [])]
            norms = ["branch2.1", "branch2.4", "branch2.6", *(["branch1.1", "branch1.3"] if i == 0 else [])]
            expected |= {f"{stage}.{i}.{conv}.weight" for conv in convolutions}
            expected |= {f"{stage}.{i}.{norm}.{k}" for norm in norms for k in state}
    assert keys == expected


@pytest.mark.parametrize("width", [0.5, pytest.param(2.0, marks=pytest.mark.long)])
def test_the_network_runs_as_one_op(width, isa):
    net = randomize(se.models.shufflenet_v2(width, 11)).eval()
    optimized, exact = se.optimize_for_inference(net), copy.deepcopy(net).double()
    x = torch.randn(2, 3, 64, 97)
    with torch.no_grad():
        with se.use_backend("reference"):
            plain, truth = net(x), exact(x.double())
        for images in (x, x.contiguous(memory_format=torch.channels_last)):
            with Recorder() as recorder:
                got = net(images)
            assert recorder.names == ["shufflenet_ext::shuffle_network_batch_norm"]
            assert_as_accurate(got, plain, truth)
            assert_as_accurate(optimized(images), plain, truth)


def test_the_network_in_bfloat16(program_dtype):
    net = randomize(se.models.shufflenet_v2(0.5, 11)).eval()
    x = torch.randn(2, 3, 64, 64)
    optimized = se.optimize_for_inference(net, torch.bfloat16)
    with torch.no_grad(), se.use_backend("reference"):
        exact, plain = copy.deepcopy(net).double()(x.double()), copy.deepcopy(net).bfloat16()(x.bfloat16())
    assert_as_accurate(optimized(x).bfloat16(), plain, exact)


def test_explain_names_the_steps():
    net = se.models.shufflenet_v2(0.5, 11).eval()
    (explanation,) = se.optimize_for_inference(net).explain(torch.randn(1, 3, 64, 64))
    names = [step.name for step in explanation.steps]
    assert names[0] == "stem"
    assert names[-3:] == ["last convolution", "means", "linear"]
    assert len(names) == 1 + 16 + 3
    counter = FlopCounterMode(display=False)
    with se.use_backend("reference"), counter, torch.no_grad():
        net(torch.randn(1, 3, 64, 64))
    assert sum(step.flop for step in explanation.steps) == counter.get_total_flops()
    weights = sum(step.weight_bytes for step in explanation.steps) // 4
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert weights == sum(m.weight.numel() + len(m.weight) for m in convolutions)


def test_training_a_network_is_the_plain_ones():
    net = randomize(se.models.shufflenet_v2(0.5, 5)).train()
    plain = copy.deepcopy(net)
    for module in plain.modules():
        if type(module) is se.FusedShuffleUnitV2:
            module.__class__ = se.ShuffleUnitV2
    x = torch.randn(3, 3, 64, 64)
    with pytest.raises(RuntimeError, match="there is no native training step of units of ShuffleNet v2"):
        copy.deepcopy(net)(x)
    with se.use_backend("auto"), pytest.warns(se.ReferenceFallbackWarning, match="there is no native training step"):
        net(x).square().sum().backward()
    plain(x).square().sum().backward()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0.7,), ValueError, r"width: got 0\.7, expected one of \[0\.5, 1\.0, 1\.5, 2\.0\]"),
        (("1",), TypeError, r"width: got str, expected a float"),
        ((1.0, 0), ValueError, r"num_classes: got 0, expected a positive int"),
        ((1.0, 2.5), TypeError, r"num_classes: got float, expected an int"),
    ],
)
def test_bad_arguments_of_the_network(arguments, error, message):
    with pytest.raises(error, match=message):
        se.models.shufflenet_v2(*arguments)
