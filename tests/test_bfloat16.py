"""optimize_for_inference(dtype=torch.bfloat16) and the program op in bfloat16: accuracy, dtypes, threads, every ISA."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support import LAYOUTS, Network, Unit, each_isa_for_bfloat16, randomize

import shufflenet_ext as se
from shufflenet_ext import reference

shuffle_network = torch.ops.shufflenet_ext.shuffle_network

UNITS = {
    "even": Unit(groups=3, in_channels=24, mid_channels=12),
    "wide": Unit(groups=3, in_channels=240, mid_channels=60, plane=(9, 11)),
    "one conv1 group": Unit(groups=3, conv1_groups=1, in_channels=24, mid_channels=60, out_channels=72, stride=2),
    "odd slices": Unit(groups=2, in_channels=100, mid_channels=50, conv2_relu=True),
    "rows of a group odd": Unit(groups=4, conv1_groups=1, in_channels=6, mid_channels=24, out_channels=60, stride=2),
    "no padding counted": Unit(groups=2, in_channels=44, mid_channels=20, stride=2, pool_count_include_pad=False),
    "a deep group": Unit(groups=1, in_channels=140, mid_channels=70, plane=(3, 3)),
    "odd depth": Unit(groups=3, in_channels=27, mid_channels=12),  # not as pairs
    "odd result": Unit(groups=1, in_channels=8, mid_channels=6, out_channels=7, stride=2),  # not as pairs
}


def program(unit, dtype):
    """The unit's x, weights and program, for the program op."""
    x, *arrays = unit.tensors(torch.float64)
    o = unit.options
    out = unit.out_channels or unit.in_channels
    steps = [1, unit.mid_channels, out, o["conv1_groups"], o["groups"], o["stride"]]
    return (
        x.to(dtype),
        reference.pack_weights(arrays).bfloat16(),
        [*steps, unit.conv2_relu, unit.pool_count_include_pad],
    )


def error(got, expected):
    return float((got.double() - expected).abs().max() / expected.abs().max())


@each_isa_for_bfloat16
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plane", [(1, 1), (7, 7), (13, 1), (20, 33)], ids=str)
@pytest.mark.parametrize("name", UNITS)
def test_unit_is_as_accurate_as_eager(isa, poison, name, plane, dtype, layout):
    x, weights, steps = program(replace(UNITS[name], batch=3, plane=plane), dtype)
    x = x.contiguous(memory_format=layout)
    expected = reference.shuffle_network(x.double(), weights.double(), steps)
    eager = error(reference.shuffle_network(x, weights, steps), expected)
    results = []
    for threads in (1, 2, 5):  # shares of images, of strips and of channels
        torch.set_num_threads(threads)
        results.append(shuffle_network(x, weights, steps))
    got = results[0]
    assert (got.dtype, got.shape) == (dtype, expected.shape)
    assert got.stride() == shuffle_network(x.float(), weights.float(), steps).stride()
    assert error(got, expected) <= max(1.5 * eager, torch.finfo(torch.bfloat16).eps)
    assert all(torch.equal(result, got) for result in results[1:])


@each_isa_for_bfloat16
@pytest.mark.parametrize("name", UNITS)
def test_nan_reaches_what_depends_on_it(isa, name):
    x, weights, steps = program(UNITS[name], torch.bfloat16)
    x[0, 3, 2, 2] = torch.nan
    expected = reference.shuffle_network(x.double(), weights.double(), steps).isnan()
    assert torch.equal(shuffle_network(x, weights, steps).isnan(), expected)


# out_channels, kernel_size, stride, padding, max_pool
STEMS = (
    (24, 3, 2, 1, 1),
    (24, 1, 1, 0, 0),
    (34, 3, 1, 1, 1),
    (6, 5, 2, 2, 0),
    (20, 2, 2, 0, 1),
    (24, 7, 2, 3, 1),
    (6, 11, 2, 5, 0),
)


@each_isa_for_bfloat16
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plane", [(7, 7), (31, 38), (8, 131)], ids=str)
@pytest.mark.parametrize("in_channels", [1, 3, 4])
@pytest.mark.parametrize("stem", STEMS, ids=str)
def test_stem_is_as_accurate_as_eager(isa, poison, stem, in_channels, plane, dtype, layout):
    network = Network((Unit(groups=1, in_channels=stem[0], mid_channels=4),), stem, (10, 0), 3, in_channels, plane)
    x, weights, steps = network.arguments(torch.float64, layout)
    x, weights = x.to(dtype), weights.bfloat16()
    expected = reference.shuffle_network(x.double(), weights.double(), steps)
    eager = error(reference.shuffle_network(x.bfloat16(), weights, steps), expected)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(shuffle_network(x, weights, steps))
    assert error(results[0], expected) <= max(1.5 * eager, torch.finfo(torch.bfloat16).eps)
    assert all(torch.equal(result, results[0]) for result in results[1:])


@each_isa_for_bfloat16
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("stem", [(24, 3, 2, 1, 1), (24, 3, 2, 0, 1), (24, 3, 1, 1, 1), (24, 1, 1, 0, 0)], ids=str)
def test_nan_and_inf_reach_what_depends_on_them(isa, stem, special):
    # As test_stem_and_head's: an image for each position, some of them outside of what the head's window sees.
    size = {1: 7, 2: 13, 4: 27}[stem[2] * (1 + stem[4])]
    positions = [(row, row + 1) for row in range(size - 1)] + [(row, 0) for row in range(size)]
    unit = Unit(groups=1, in_channels=24, mid_channels=4)
    network = Network((unit,), stem, (10, 4), batch=len(positions), in_channels=2, plane=(size, size))
    x, weights, steps = network.arguments(torch.bfloat16)
    for i, (row, column) in enumerate(positions):
        x[i, i % 2, row, column] = special
    got = shuffle_network(x, weights, steps)
    expected = reference.shuffle_network(x.double(), weights.double(), steps)
    assert not expected.isfinite().all()
    assert expected.isfinite().any()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(got), kind(expected)), kind.__name__


@each_isa_for_bfloat16
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_network_is_as_accurate_as_eager(isa, groups, dtype):
    net = randomize(se.models.shufflenet_v1(groups)).eval()
    images = torch.randn(3, 3, 64, 64)
    expected = se.optimize_for_inference(net.double())(images.double())
    optimized = se.optimize_for_inference(net, dtype=torch.bfloat16)
    with se.use_backend("reference"):
        eager = error(optimized(images.bfloat16()), expected)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(optimized(images.to(dtype)))
    assert results[0].dtype == dtype
    assert error(results[0], expected) <= 1.5 * eager
    assert all(torch.equal(result, results[0]) for result in results[1:])
    assert torch.equal(optimized(images[:1].to(dtype)), results[0][:1])


def test_weights_are_rounded_once():
    net = randomize(se.models.ShuffleNetG3()).eval()
    exact = se.optimize_for_inference(copy.deepcopy(net).double())
    optimized = se.optimize_for_inference(net, dtype=torch.bfloat16)
    (got,), (expected,) = optimized.buffers(), exact.buffers()
    assert torch.equal(got, expected.bfloat16())
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}


def test_the_rest_of_a_model_stays_in_its_dtype():
    unit = randomize(se.FusedShuffleBottleneck(24, 24, 1, 3, mid_channels=12))
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 24, 3), unit).eval()
    images = torch.randn(2, 3, 12, 12)
    got = se.optimize_for_inference(model, dtype=torch.bfloat16)(images)
    expected = se.optimize_for_inference(model)(images)
    assert got.dtype == torch.float32
    assert 0 < error(got, expected.double()) <= 4 * torch.finfo(torch.bfloat16).eps


def test_compile():
    optimized = se.optimize_for_inference(randomize(se.models.ShuffleNetG3()).eval(), dtype=torch.bfloat16)
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(optimized, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), optimized(images))


def test_explain_names_conversions():
    unit = randomize(se.FusedShuffleBottleneck(24, 24, 1, 3, mid_channels=12)).eval()
    optimized = se.optimize_for_inference(unit, dtype=torch.bfloat16)
    (explanation,) = optimized.explain(torch.randn(1, 24, 8, 8))
    assert [step.name for step in explanation.steps if step.name != "conversion"] == ["unit 1"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8])
def test_other_dtypes(dtype):
    with pytest.raises(ValueError, match=rf"dtype: got {dtype}, expected torch\.bfloat16 or None"):
        se.optimize_for_inference(se.models.ShuffleNetG3(), dtype=dtype)
    with pytest.raises(TypeError, match=r"dtype: got str, expected torch\.bfloat16 or None"):
        se.optimize_for_inference(se.models.ShuffleNetG3(), dtype="bfloat16")


def test_weights_of_another_dtype():
    x, weights, steps = program(UNITS["even"], torch.float64)
    with pytest.raises(RuntimeError, match="weights: got dtype bfloat16, expected x's, float64"):
        shuffle_network(x, weights, steps)
    with pytest.raises(RuntimeError, match=r"weights: got dtype float16, expected x's, float32 \(or bfloat16\)"):
        shuffle_network(x.float(), weights.half(), steps)


@pytest.fixture(scope="module")
def trained():
    """A small network trained on digits, and digits that it has not seen, with their labels."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(digits.target)[order]
    torch.manual_seed(0)
    stem = (torch.nn.Conv2d(1, 24, 3, padding=1, bias=False), torch.nn.BatchNorm2d(24), torch.nn.ReLU())
    units = (se.FusedShuffleBottleneck(24, 36, 2, 3), se.FusedShuffleBottleneck(60, 60, 1, 3))
    head = (torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(60, 10))
    model = torch.nn.Sequential(*stem, *units, *head)
    torch.set_num_threads(1)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=10 * 23)
    with se.use_backend("reference"):
        for _ in range(10):
            for batch in (360 + torch.randperm(len(images) - 360)).split(64):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval(), images[:360], labels[:360]


@each_isa_for_bfloat16
def test_a_trained_network_answers_the_same(isa, trained):
    model, images, labels = trained
    exact = se.optimize_for_inference(model)(images).argmax(1)
    got = se.optimize_for_inference(model, dtype=torch.bfloat16)(images).argmax(1)
    assert int((exact == labels).sum()) >= 340
    assert int((got != exact).sum()) <= 1
