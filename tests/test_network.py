"""shuffle_network, the op behind optimize_for_inference, of units alone: equal to them one by one, bit for bit.

Programs with a stem and a head are in test_stem_and_head.py.
"""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import DTYPES, LAYOUTS, Network, Unit, assert_as_accurate, autocast, network_op

import shufflenet_ext as se
from shufflenet_ext import reference
from shufflenet_ext._program import split_program

pytestmark = pytest.mark.usefixtures("poison")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)

# Strides that halve a plane twice, one unit that takes the place of its input, channels that fit no vector.
MIXED = Network(
    (
        Unit(groups=3, in_channels=24, mid_channels=12, out_channels=36, stride=2),
        Unit(groups=3, in_channels=60, mid_channels=24, conv2_relu=True),
        Unit(groups=2, in_channels=60, mid_channels=6, out_channels=20, stride=2, pool_count_include_pad=False),
    )
)
# Threads cut the planes of such units into strips. The cuts of neighbours match where all heights divide by the number
# of threads; elsewhere some planes are handed on whole.
STRIPS = Network(
    (
        Unit(groups=3, in_channels=24, mid_channels=60, out_channels=36, stride=2, conv1_groups=1),
        Unit(groups=3, in_channels=60, mid_channels=48),
        Unit(groups=2, in_channels=60, mid_channels=60, conv2_relu=True),
        Unit(groups=3, in_channels=60, mid_channels=48, out_channels=60, stride=2),
        Unit(groups=4, in_channels=120, mid_channels=64),
    )
)


def one_by_one(network, dtype, x):
    """Its units' results; for the 16-bit dtypes, which a program computes in float32, those rounded once."""
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    parameters = [parameter.to(accumulator) for parameter in network.parameters(dtype)]
    y = x.to(accumulator)
    for i, unit in enumerate(network.units):
        y = unit.native([y, *parameters[6 * i : 6 * i + 6]])
    return y.to(dtype)


def check_equals_its_units(network, dtype, layout):
    x, weights, program = network.arguments(dtype, layout)
    got = network_op(x, weights, program)
    expected = one_by_one(network, dtype, x)
    assert got.stride() == expected.stride()
    if dtype == torch.bfloat16 and se.build_info()["cpu_isa"] in ("avx512_bf16", "amx"):
        # Dot products of bfloat16 take what they read rounded, unlike the units' own ops; how close they are, others
        # say. Here, that threads and the layout do not matter.
        torch.set_num_threads(1)
        expected = network_op(x.contiguous(), weights, program)
    assert torch.equal(got, expected)


@each_layout
@pytest.mark.parametrize("plane", [(28, 28), (1, 1), (9, 14), (7, 7), (14, 14), (2, 31)], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 2, 5])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_equals_its_units_one_by_one(threads, batch, plane, program_dtype, layout):
    torch.set_num_threads(threads)
    check_equals_its_units(replace(MIXED, batch=batch, plane=plane), program_dtype, layout)


@pytest.mark.parametrize("plane", [(56, 56), (24, 40), (27, 56), (54, 30), (30, 55), (53, 29)], ids=str)
@pytest.mark.parametrize("threads", [2, 3, 4, 7])
def test_strips_equal_its_units_one_by_one(threads, plane, program_dtype):
    torch.set_num_threads(threads)
    check_equals_its_units(replace(STRIPS, batch=1, plane=plane), program_dtype, LAYOUTS[0])


@each_layout
@pytest.mark.parametrize("plane", [(1, 1), (2, 31), (9, 14), (17, 1)], ids=str)
def test_more_threads_than_rows(plane, program_dtype, layout):
    torch.set_num_threads(16)
    for batch in (1, 17):
        check_equals_its_units(replace(MIXED, batch=batch, plane=plane), program_dtype, layout)


@each_layout
@pytest.mark.parametrize("network", [MIXED, STRIPS], ids=["mixed", "strips"])
def test_as_accurate_as_pytorch(network, program_dtype, layout):
    network.check(*network.arguments(program_dtype, layout))


@each_layout
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("plane", "batch"), [((28, 28), 3), ((56, 56), 1), ((7, 7), 2)], ids=str)
def test_units_in_general(plane, batch, threads, program_dtype, layout):
    # Other shuffles, one of them Megvii's, which is by the rows of a group; the shortcut first, with and without ReLU.
    first = replace(MIXED.units[0], in_channels=24, mid_channels=12, groups=3, conv1_groups=3)
    general = replace(first, stride=2, out_channels=36, shuffle_groups=4, shortcut_first=True, shortcut_relu=False)
    units = (general, replace(first, in_channels=60, out_channels=60, stride=1, shuffle_groups=1))
    units += (replace(general, in_channels=60, shuffle_groups=12, shortcut_relu=True),)
    network = replace(MIXED, units=units, batch=batch, plane=plane)
    arguments = network.arguments(program_dtype, layout)
    torch.set_num_threads(1)
    expected = network.check(*arguments)
    torch.set_num_threads(threads)
    assert torch.equal(network_op(*arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("plane", [(90, 160), (181, 321)], ids=str)
@pytest.mark.parametrize("threads", [2, 3])
def test_large_planes(plane, threads, dtype):
    # Strips of so many rows that they are projected some at a time; planes that are cut, and such that are too large.
    network = replace(STRIPS, batch=1, plane=plane)
    arguments = network.arguments(dtype)
    torch.set_num_threads(1)
    expected = network_op(*arguments)
    torch.set_num_threads(threads)
    assert torch.equal(network_op(*arguments), expected)
    network.check(*arguments)


@each_layout
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_propagate_as_in_the_reference(isa, special, layout):
    torch.set_num_threads(2)
    x, weights, program = replace(STRIPS, batch=1, plane=(56, 56)).arguments(layout=layout)
    for position in ((0, 5, 28, 9), (0, 0, 0, 0), (0, 23, 27, 55), (0, 11, 55, 0)):
        given = x.clone(memory_format=torch.preserve_format)
        given[position] = special
        got, expected = network_op(given, weights, program), reference.shuffle_network(given, weights, program)
        assert not expected.isfinite().all()
        assert expected.isfinite().any()
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(got), kind(expected)), kind.__name__


@each_dtype
def test_any_strides_of_x(dtype):
    x, weights, program = MIXED.arguments(dtype)
    expected = network_op(x, weights, program)
    room = torch.full((3, 25, 16, 17), torch.nan, dtype=dtype)
    for storage in (room, room.contiguous(memory_format=torch.channels_last)):
        view = storage[1:, 1:, 1:15, 2:16]
        view.copy_(x)
        assert torch.equal(network_op(view, weights, program), expected)
    expanded = x[:1, :1, :, :1].expand_as(x)
    assert torch.equal(network_op(expanded, weights, program), network_op(expanded.clone(), weights, program))


@pytest.mark.parametrize("stride", [1, 2])
def test_the_unit_before_again(stride):
    first = Unit(groups=3, in_channels=24, mid_channels=12, stride=stride, out_channels=24 if stride == 2 else None)
    units = [replace(first, in_channels=channels) for channels in ((24, 24, 24) if stride == 1 else (24, 48, 72))]
    x, weights, program = Network(tuple(units)).arguments()
    short = [*program[:8], 3, 2]
    expected = network_op(x, weights, program)
    assert torch.equal(network_op(x, weights, short), expected)
    assert torch.equal(reference.shuffle_network(x, weights, short), reference.shuffle_network(x, weights, program))
    assert network_op(x.to("meta"), weights.to("meta"), short).shape == expected.shape


# ---- PyTorch's machinery --------------------------------------------------------------------------------------------


@each_layout
def test_opcheck(layout):
    torch.library.opcheck(network_op.default, replace(MIXED, plane=(9, 7)).arguments(layout=layout))


@pytest.mark.covering(1)
@each_layout
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_whole_graph(backend, layout):
    torch._dynamo.reset()
    x, weights, program = MIXED.arguments(layout=layout)
    compiled = torch.compile(lambda x, weights: network_op(x, weights, program) * 2, fullgraph=True, backend=backend)
    got, expected = compiled(x, weights), network_op(x, weights, program) * 2
    assert torch.equal(got, expected)
    assert got.stride() == expected.stride()


def test_compile_with_dynamic_shapes():
    torch._dynamo.reset()
    graphs = 0

    def backend(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(lambda *args: network_op(*args), fullgraph=True, dynamic=True, backend=backend)
    for batch, plane in ((2, (8, 12)), (3, (6, 9)), (4, (16, 7))):
        arguments = replace(MIXED, batch=batch, plane=plane).arguments()
        assert torch.equal(compiled(*arguments), network_op(*arguments))
    assert graphs == 1


def test_autocast():
    x, weights, program = MIXED.arguments()
    with autocast(torch.bfloat16):
        got = network_op(x, weights, program)
    assert torch.equal(got, network_op(x.bfloat16(), weights.bfloat16(), program))
    x, weights = x.double(), weights.double()
    with autocast(torch.bfloat16):
        assert network_op(x, weights, program).dtype == torch.float64


def test_inference_mode():
    arguments = MIXED.arguments()
    with torch.inference_mode():
        got = network_op(*arguments)
        assert torch.equal(network_op(*MIXED.arguments()), got)
    assert torch.equal(network_op(*arguments), got)


@pytest.mark.parametrize("wanted", [0, 1], ids=["x", "weights"])
def test_there_is_no_gradient_and_backward_says_so(wanted):
    x, weights, program = MIXED.arguments()
    leaf = (x, weights)[wanted].requires_grad_()
    got = network_op(x, weights, program)
    with pytest.warns(UserWarning, match="shuffle_network: an autograd kernel was not registered"):
        got.sum().backward()
    assert leaf.grad is None


# ---- Errors ---------------------------------------------------------------------------------------------------------

UNIT = [1, 12, 36, 3, 3, 2, 0, 1]  # on 24 channels
HUGE = (2**31, 2**62, 2**63 - 1, -(2**62), -(2**63))


def fake(x, weights, program):
    metas = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in (x, weights)]
    return network_op(*metas, program)


each_way = pytest.mark.parametrize(
    "run", [network_op, reference.shuffle_network, fake], ids=["op", "reference", "fake"]
)


def program_cases():
    """Malformed programs, and what their message says."""
    kinds = r"expected 0 \(stem\) first, 1, 4 or 5 \(unit\), 3 \(again\) behind a unit, 6"
    stem, head = [0, 24, 3, 2, 1, 1, 1], [2, 10, 0]
    yield [], r"program: got (no|0) elements, expected one (step|unit) at least"
    for kind in (7, -1, *HUGE):
        yield [kind], rf"program: got step {kind} at element 0, {kinds}"
        yield [*UNIT, kind, 1, 2, 3], rf"program: got step {kind} at element 8, {kinds}"
    yield [3, 1, *UNIT], rf"program: got step 3 at element 0, {kinds}"
    yield [*UNIT, 3], r"program: got 0 elements for its last step, expected 1"
    for times in (0, -1, *HUGE):
        message = rf"program: got times {times}, expected a positive number"
        yield [*UNIT, 3, times], rf"{message}|weights: got \d+ elements, expected|got 60, expected a positive divisor"
    yield [*UNIT, *stem], rf"program: got step 0 at element 8, {kinds}"
    for length in range(1, 8):
        yield UNIT[:length], rf"program: got {length - 1} elements for its last step, expected 7"
        yield UNIT + UNIT[:length], rf"program: got {length - 1} elements for its last step, expected 7"
    for length in range(1, 7):
        yield stem[:length], rf"program: got {length - 1} elements for its last step, expected 6"
    for length in (1, 2):
        yield UNIT + head[:length], rf"program: got {length - 1} elements for its last step, expected 2"
    for value in (0, -1, *HUGE):
        for i, name in ((1, "mid_channels"), (2, "out_channels")):
            message = rf"program: got {name} {value}, expected a positive number|weights: got \d+ elements, expected"
            message += rf"|program: (conv1_)?groups: got 3, expected a positive divisor of .*{value}"
            yield [*UNIT[:i], value, *UNIT[i + 1 :]], message
        for i, name in ((3, "conv1_groups"), (4, "groups")):
            message = rf"program: {name}: got {value}, expected a positive divisor"
            yield [*UNIT[:i], value, *UNIT[i + 1 :]], message
        yield [*UNIT[:5], value, *UNIT[6:]], rf"program: got stride {value}, expected 1 or 2"
        message = rf"program: got classes {value}, expected a positive number|weights: got \d+ elements, expected"
        yield [*UNIT, 2, value, 0], message
    for i, name, bad in ((3, "conv1_groups", 5), (3, "conv1_groups", 8), (4, "groups", 5), (4, "groups", 12)):
        good = [1, 12, 33, 3, 3, 2, 0, 1]
        yield (
            [*good[:i], bad, *good[i + 1 :]],
            rf"program: {name}: got {bad}, expected a positive divisor of .*(24|12|33)",
        )
    yield [1, 12, 36, 3, 3, 1, 0, 1], r"program: got 36 out_channels, expected 24"


@each_way
@pytest.mark.parametrize(("program", "message"), list(program_cases()))
def test_malformed_programs(program, message, run):
    x, weights, _ = replace(MIXED, units=MIXED.units[:1], plane=(5, 4)).arguments()
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(x, weights, program)


@each_way
def test_bad_x(run):
    x, weights, program = MIXED.arguments()
    for bad in (torch.zeros(()), x[0], x[None], x[:, :0], x[:, :, :0], x[..., :0]):
        with pytest.raises((ValueError, RuntimeError), match=r"x: got shape \[.*\], expected"):
            run(bad, weights, program)
    for bad in (x.int(), x.to(torch.complex64), x.bool()):
        with pytest.raises((ValueError, RuntimeError), match=r"x: got dtype .*, expected"):
            run(bad, weights.to(bad.dtype), program)
    # The first unit's conv1_groups do not divide 25 channels, and with 27 the second unit has more than it adds to.
    for channels, message in ((25, "program: conv1_groups: got 3, expected"), (27, "program: got 60 out_channels")):
        with pytest.raises((ValueError, RuntimeError), match=message):
            run(torch.zeros(1, channels, 4, 4), weights, program)


@each_way
def test_bad_weights(run):
    x, weights, program = MIXED.arguments()
    for bad in (weights[:-1], weights[:-16], torch.cat([weights, weights[:16]]), weights[:1], weights[:0]):
        with pytest.raises((ValueError, RuntimeError), match=rf"(weights: got|the) {len(bad)} elements"):
            run(x, bad, program)
    for bad in (weights[None], weights.view(-1, 16), weights[0], weights.repeat_interleave(2)[::2]):
        with pytest.raises((ValueError, RuntimeError), match=r"weights: got shape \[.*\], expected one contiguous dim"):
            run(x, bad, program)
    for bad in (weights.double(), weights.half(), weights.int()):
        with pytest.raises((ValueError, RuntimeError), match=r"weights: got dtype .*, expected .*x's, .*float32"):
            run(x, bad, program)


def test_weights_on_another_device():
    x, weights, program = MIXED.arguments()
    for run in (network_op, reference.shuffle_network):
        with pytest.raises((ValueError, RuntimeError), match=r"meta|device"):
            run(x, weights.to("meta"), program)


@pytest.mark.parametrize("arguments", [(3, None, None), (None, "w", None), (None, None, 1.5), (None, None, ["a"])])
def test_wrong_types(arguments):
    given = [bad if bad is not None else good for bad, good in zip(arguments, MIXED.arguments(), strict=True)]
    with pytest.raises((TypeError, RuntimeError), match=r"x|weights|program"):
        network_op(*given)


numbers = st.one_of(st.integers(0, 8), st.sampled_from([12, 24, -1, *HUGE]))


@st.composite
def programs(draw):
    """Channels and steps for them; of half of the programs a number is another, or the end lacks."""
    in_channels = channels = draw(st.sampled_from([1, 4, 8, 12]))
    program = []
    if draw(st.booleans()):
        channels, size = 4 * draw(st.integers(1, 3)), draw(st.integers(1, 3))
        program += [0, channels, size, draw(st.integers(1, 2)), draw(st.integers(0, size - 1))]
        program += [draw(st.integers(0, 1)), draw(st.integers(0, 1))]
    is_v2 = draw(st.integers(0, 2)) == 0
    for _ in range(draw(st.integers(0, 3))):
        stride, mid = draw(st.integers(1, 2)), 4 * draw(st.integers(1, 3))
        if is_v2:
            stride = 2 if channels % 2 else stride
            out = channels // 2 if stride == 1 else draw(st.integers(1, 6))
            beside = out if stride == 1 else draw(st.sampled_from([out, out, draw(st.integers(1, 6))]))
            split, shuffle = (
                draw(st.sampled_from([n for n in (1, 2, 3, of // 2 or 1) if of % n == 0]))
                for of in (channels, out + beside)
            )
            program += [5, mid, out, beside if stride == 2 else 0, stride, split, shuffle]
            channels = out + beside
            if stride == 1 and draw(st.booleans()):
                program += [3, draw(st.integers(1, 2))]
            continue
        out = channels if stride == 1 else 4 * draw(st.integers(1, 3))
        conv1_groups, groups = (
            draw(st.sampled_from([n for n in (1, 2, 3, 4) if mid % n == of % n == 0])) for of in (channels, out)
        )
        program += [1, mid, out, conv1_groups, groups, stride, draw(st.integers(0, 1)), draw(st.integers(0, 1))]
        channels = out if stride == 1 else out + channels
        if stride == 1 and draw(st.booleans()):
            program += [3, draw(st.integers(1, 2))]
    if draw(st.integers(0, 3)) == 0:
        program += [6, draw(st.integers(1, 12))]
    if draw(st.booleans()) or not program:
        program += [2, draw(st.integers(1, 12)), draw(st.sampled_from([0, 0, 0, 1, 2]))]
    if draw(st.booleans()):
        program[draw(st.integers(0, len(program) - 1))] = draw(numbers)
    return in_channels, program[: len(program) - draw(st.sampled_from([0, 0, 0, 1]))]


def guarded(values):
    """The same values, with NaN in the memory around them."""
    n = values.numel()
    storage = torch.full((n + 128,), torch.nan, dtype=values.dtype)
    storage[64 : 64 + n] = values.flatten()
    return storage[64 : 64 + n].view(values.shape)


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    given=st.one_of(programs(), programs(), st.tuples(st.just(4), st.lists(numbers, max_size=24))),
    plane=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    threads=st.integers(1, 3),
)
def test_any_list_of_numbers_is_an_error_or_a_result(given, plane, threads):
    channels, program = given
    torch.set_num_threads(threads)
    x = guarded(torch.randn(2, channels, *plane))
    weights = torch.randn(4096) / 4
    kinds = []
    try:
        kinds += [kind for kind, _ in itertools.islice(split_program(program), 1000)]
    except ValueError:
        kinds.clear()
    whole = bool(kinds)
    for _ in range(2):
        try:
            got = network_op(x, guarded(weights), program)
        except RuntimeError as error:
            message = str(error)
            assert re.search(r"(x|weights|program): .*got .*[,;] expected", message), message
            if whole:
                with pytest.raises(ValueError, match=r"(x|weights|program): .*got .*, expected"):
                    reference.shuffle_network(x, weights, program)
            fits = re.search(r"expected (\d+) for this program", message)
            if fits is None:
                return
            weights = torch.randn(int(fits[1])) / 4
        else:
            assert whole
            expected, exact = (
                reference.shuffle_network(x.to(dtype), weights.to(dtype), program)
                for dtype in (torch.float32, torch.float64)
            )
            assert_as_accurate(got, expected, exact)
            return
