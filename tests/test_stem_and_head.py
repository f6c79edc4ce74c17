"""shuffle_network with a stem and a head, on the CPU, which alone has them: against the reference in float64."""

from dataclasses import replace

import pytest
import torch
from support import DTYPES, LAYOUTS, Network, Unit, autocast, network_op
from torch import Tensor, nn

import shufflenet_ext as se
from shufflenet_ext import reference

pytestmark = pytest.mark.usefixtures("poison")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)

PAPER_STEM, CIFAR_STEM, BARE_STEM = (24, 3, 2, 1, 1), (24, 1, 1, 0, 0), (24, 3, 2, 1, 1, 0)  # the last without ReLU
UNITS = (
    Unit(groups=3, in_channels=24, mid_channels=12, out_channels=36, stride=2, conv1_groups=1),
    Unit(groups=3, in_channels=60, mid_channels=24),
)
NETWORK = Network(UNITS, PAPER_STEM, (10, 0), in_channels=3, plane=(31, 38))


# ---- Accuracy -------------------------------------------------------------------------------------------------------


@each_layout
@pytest.mark.parametrize("plane", [(64, 64), (31, 38), (9, 5), (5, 67)], ids=str)
@pytest.mark.parametrize("stem", [PAPER_STEM, CIFAR_STEM, (24, 3, 1, 1, 0), (24, 5, 2, 2, 1), BARE_STEM], ids=str)
def test_stems(stem, plane, program_dtype, layout):
    network = replace(NETWORK, stem=stem, plane=plane)
    network.check(*network.arguments(program_dtype, layout))


@each_layout
@pytest.mark.parametrize("max_pool", [0, 1])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", range(1, 6))
def test_kernels_paddings_and_tiny_images(isa, size, stride, max_pool, layout):
    for padding in range(min(3, size)):
        least = max(1, size - 2 * padding)
        for plane in ((least, least), (least, least + 1), (least + 2, least), (least + 1, least + 19)):
            network = replace(NETWORK, stem=(24, size, stride, padding, max_pool), plane=plane)
            network.check(*network.arguments(layout=layout))


# Any part of a network: the stem, the units and the head, each there or not.
PARTS = [
    replace(NETWORK, units=units, stem=stem, head=head, in_channels=3 if stem else 24)
    for stem in (None, PAPER_STEM, BARE_STEM)
    for units in ((), UNITS)
    for head in (None, (10, 0))
    if stem or units or head
]


@each_layout
@pytest.mark.parametrize("network", PARTS, ids=lambda n: f"{n.stem}-{len(n.units)}-{n.head}")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_parts_of_a_network(threads, network, program_dtype, layout):
    torch.set_num_threads(1)
    x, weights, program = replace(network, batch=threads + 1).arguments(program_dtype, layout)
    expected = network.check(x, weights, program)
    torch.set_num_threads(threads)
    got = network_op(x, weights, program)
    assert torch.equal(got, expected)
    if got.dim() == 4:
        assert got.stride() == network_op(x.to("meta"), weights.to("meta"), program).stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_odd_number_of_channels_has_no_pairs(dtype):
    for network in (
        Network((), (5, 3, 2, 1, 1, 0), None, in_channels=3),
        Network((), None, (4, 0), in_channels=7),
        Network((), (5, 1, 1, 0, 0), (4, 0), in_channels=3),
    ):
        x, weights, program = network.arguments(dtype)
        network.check(x, weights.bfloat16(), program)


@pytest.mark.parametrize("plane", [(7, 7), (8, 9), (5, 70)], ids=str)
def test_a_max_pool_of_negative_values_takes_nothing_for_its_padding(plane, program_dtype):
    x, weights, program = Network((), BARE_STEM, None, in_channels=3, plane=plane).arguments(program_dtype)
    weights = weights.clone()
    weights[-32:] = -40  # the biases
    got = replace(NETWORK, units=(), stem=BARE_STEM).check(x, weights, program)
    assert (got < -20).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("relu", [0, 1])
def test_a_max_pool_hands_on_nan_and_infinity_of_either_sign(isa, relu, dtype):
    # A convolution of one weight: its result's bits are x's, but for the last of a quiet NaN.
    program, weights = [0, 1, 1, 1, 0, 1, relu], reference.pack_weights([torch.ones(1), torch.zeros(1)]).to(dtype)
    nan = torch.tensor(torch.nan, dtype=dtype)
    for special in (nan, -nan, torch.tensor(torch.inf, dtype=dtype), torch.tensor(-torch.inf, dtype=dtype)):
        for i in range(0, 37, 3):
            x = -torch.rand(1, 1, 5, 37, dtype=dtype) - 1
            x[0, 0, 2, i] = special
            assert torch.equal(x.signbit()[0, 0, 2, i], special.signbit())
            got, expected = network_op(x, weights, program), reference.shuffle_network(x, weights, program)
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        x = torch.full((1, 1, 4, 4), special.item(), dtype=dtype).copysign(special)
        got, expected = network_op(x, weights, program), reference.shuffle_network(x, weights, program)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@each_layout
@pytest.mark.parametrize(("in_channels", "out_channels"), [(1, 1), (2, 7), (5, 9), (17, 25)])
def test_channels_of_the_stem(in_channels, out_channels, layout, program_dtype):
    unit = Unit(groups=1, in_channels=out_channels, mid_channels=5)
    network = Network((unit,), (out_channels, 3, 2, 1, 1), (10, 0), in_channels=in_channels, plane=(13, 35))
    network.check(*network.arguments(program_dtype, layout))


@pytest.mark.parametrize("plane", [(4, 4), (7, 5), (4, 7)], ids=str)
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("classes", [1, 10, 33])
def test_heads(classes, window, plane, program_dtype):
    network = Network(UNITS[1:], (60, 1, 1, 0, 0), (classes, window), in_channels=3, plane=plane)
    network.check(*network.arguments(program_dtype))


@pytest.mark.parametrize("channels", [1, 3, 15, 16, 17, 63, 64, 65, 131])
def test_channels_of_the_head(channels, program_dtype):
    # The linear layer takes whole vectors of channels, then the rest of one, for four images at a time, then for one.
    network = Network((Unit(groups=1, in_channels=channels, mid_channels=2),), (channels, 1, 1, 0, 0), (7, 0), 3, 5)
    network = replace(network, plane=(3, 3))
    network.check(*network.arguments(program_dtype))


def test_the_head_takes_no_pixel_outside_its_window(isa):
    network = Network(UNITS[1:], (60, 1, 1, 0, 0), (10, 4), in_channels=3, plane=(7, 6))
    x, weights, program = network.arguments()
    changed = x.clone()
    changed[:, :, 5:] = torch.nan  # row 4 is in the reach of the unit's window
    changed[..., 5:] = torch.nan
    assert torch.equal(network_op(changed, weights, program), network_op(x, weights, program))


# ---- Bits -----------------------------------------------------------------------------------------------------------


@each_layout
@pytest.mark.parametrize("plane", [(1, 1), (2, 31), (31, 38), (112, 96), (107, 90)], ids=str)
@pytest.mark.parametrize("stem", [PAPER_STEM, (24, 3, 1, 1, 0)], ids=str)
def test_results_depend_on_neither_threads_nor_batch(stem, plane, program_dtype, layout):
    network = Network((*UNITS, replace(UNITS[1], conv2_relu=True)), stem, (10, 0), batch=5, in_channels=3, plane=plane)
    x, weights, program = network.arguments(program_dtype, layout)
    expected = network_op(x, weights, program)
    for threads in (1, 2, 3, 5, 16):
        torch.set_num_threads(threads)
        for begin, end in ((0, 5), (0, 3), (3, 5)):
            assert torch.equal(network_op(x[begin:end], weights, program), expected[begin:end])
        if threads < 4:
            for i in range(5):
                assert torch.equal(network_op(x[i : i + 1], weights, program), expected[i : i + 1])


@each_layout
def test_empty_batch(layout):
    x, weights, program = replace(NETWORK, batch=0).arguments(layout=layout)
    got = network_op(x, weights, program)
    assert got.shape == (0, 10)
    assert got.shape == reference.shuffle_network(x, weights, program).shape


@each_dtype
def test_any_strides_of_x(dtype):
    x, weights, program = NETWORK.arguments(dtype)
    expected = network_op(x, weights, program)
    room = torch.full((3, 5, 34, 41), torch.nan, dtype=dtype)
    for storage in (room, room.contiguous(memory_format=torch.channels_last)):
        view = storage[1:, 1:4, 2:33, 3:]
        view.copy_(x)
        assert torch.equal(network_op(view, weights, program), expected)
    assert torch.equal(network_op(x.transpose(2, 3).contiguous().transpose(2, 3), weights, program), expected)
    assert torch.equal(network_op(x[:1].expand_as(x), weights, program), expected[:1].expand_as(expected))


# ---- NaN and infinity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("stem", [(24, 3, 2, 1, 1), (24, 3, 2, 0, 1), (24, 3, 1, 1, 1), (24, 1, 1, 0, 0)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_nan_and_inf_propagate_as_in_the_reference(isa, threads, stem, special, dtype):
    # An image for each position of the special number: the head's window ends where some of them no longer reach it.
    torch.set_num_threads(threads)
    size = {1: 7, 2: 13, 4: 27}[stem[2] * (1 + stem[4])]
    positions = [(row, row + 1) for row in range(size - 1)] + [(row, 0) for row in range(size)]
    network = Network(UNITS[1:], (60, *stem[1:]), (10, 4), batch=len(positions), in_channels=2, plane=(size, size))
    x, weights, program = network.arguments(dtype)
    for i, (row, column) in enumerate(positions):
        x[i, i % 2, row, column] = special
    got, expected = network_op(x, weights, program), reference.shuffle_network(x, weights, program)
    assert not expected.isfinite().all()
    assert expected.isfinite().any()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(got), kind(expected)), kind.__name__


# ---- PyTorch's machinery --------------------------------------------------------------------------------------------


@each_layout
def test_opcheck(layout):
    torch.library.opcheck(network_op.default, replace(NETWORK, plane=(9, 12)).arguments(layout=layout))


class Model(nn.Module):
    def __init__(self, weights: Tensor, program: list[int]) -> None:
        super().__init__()
        self.register_buffer("weights", weights)
        self.program = program

    def forward(self, x: Tensor) -> Tensor:
        return network_op(x, self.weights, self.program).softmax(1)


@pytest.mark.covering(1)
@each_layout
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_whole_graph(backend, layout):
    torch._dynamo.reset()
    x, weights, program = NETWORK.arguments(layout=layout)
    model = Model(weights, program)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=backend)(x), model(x))


def test_export_with_a_dynamic_batch():
    x, weights, program = NETWORK.arguments()
    model = Model(weights, program)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    assert [str(node.target) for node in exported.graph.nodes].count("shufflenet_ext.shuffle_network.default") == 1
    for given in (x, torch.cat([x, x, x])):
        assert torch.equal(exported.module()(given), model(given))


def test_autocast():
    x, weights, program = NETWORK.arguments()
    with autocast(torch.bfloat16):
        got = network_op(x, weights, program)
    assert torch.equal(got, network_op(x.bfloat16(), weights.bfloat16(), program))


def test_inference_mode_and_gradients_of_a_whole_network():
    net = se.optimize_for_inference(se.models.shufflenet_v1(3, 0.25))
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = net(x)
    assert torch.equal(net(x), expected)
    assert not net(x.requires_grad_()).requires_grad


# ---- Errors ---------------------------------------------------------------------------------------------------------

STEM, UNIT, HEAD = [0, 24, 3, 2, 1, 1, 1], [1, 12, 36, 1, 3, 2, 0, 1], [2, 10, 0]
HUGE = (2**31, 2**62, 2**63 - 1, -(2**62), -(2**63))


def fake(x, weights, program):
    return network_op(x.to("meta"), weights.to("meta"), program)


each_way = pytest.mark.parametrize(
    "run", [network_op, reference.shuffle_network, fake], ids=["op", "reference", "fake"]
)


def program_cases():
    """Malformed programs, and what their message says."""
    kinds = r"expected 0 \(stem\) first, 1, 4 or 5 \(unit\), 3 \(again\) behind a unit, 6"
    whole = [*STEM, *UNIT, *HEAD]
    yield [*STEM, 3, 1, *UNIT, *HEAD], rf"program: got step 3 at element 7, {kinds}"
    for step in ([0], [1], [2], [3, 1], HEAD, STEM, UNIT):
        message = (
            rf"program: got step {step[0]} at element 18, {kinds}|program: got {18 + len(step)} elements, expected"
        )
        yield whole + step, message
    for value in (0, -1, *HUGE):
        too_large = r"weights: got \d+ elements, expected|at most the \d+ elements of weights"
        for i, name in ((1, "out_channels"), (16, "classes")):
            message = rf"program: got {name} {value}, expected a positive number|{too_large}"
            yield [*whole[:i], value, *whole[i + 1 :]], message
        yield [*whole[:2], value, *whole[3:]], rf"program: got kernel_size {value}, expected 1 to 11"
        yield [*whole[:3], value, *whole[4:]], rf"program: got stride {value}, expected 1 or 2"
        if value != 0:
            message = rf"program: got padding {value}, expected at least 0 and less than kernel_size, 3"
            yield [*whole[:4], value, *whole[5:]], message
            yield [*whole[:17], value], rf"x: got .* expected one window of {value} x {value}"
    yield [*whole[:2], 12, *whole[3:]], r"program: got kernel_size 12, expected 1 to 11"
    yield [*whole[:4], 3, *whole[5:]], r"program: got padding 3, expected at least 0 and less than kernel_size, 3"
    for window in (1, 2, 5):  # of the 4 x 4 pixels that the unit leaves: more than one window, or none
        yield [*whole[:17], window], rf"x: got .* expected one window of {window} x {window}"


@each_way
@pytest.mark.parametrize(("program", "message"), list(program_cases()))
def test_malformed_programs(program, message, run):
    x, weights, _ = Network(UNITS[:1], PAPER_STEM, (10, 0), in_channels=3, plane=(32, 32)).arguments()
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(x, weights, program)


@each_way
def test_images_too_small_for_the_stem(run):
    x, weights, program = replace(NETWORK, stem=(24, 5, 1, 1, 0)).arguments()
    for plane in ((2, 9), (9, 2), (1, 1)):
        with pytest.raises(
            (ValueError, RuntimeError), match=r"x: got .*, expected at least 3 x 3 pixels|at least 3 x 3"
        ):
            run(x[:, :, : plane[0], : plane[1]].contiguous(), weights, program)
