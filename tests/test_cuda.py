"""The CUDA kernels on a card: `pytest -m cuda`. tests/test_cuda_host.py runs the same source without one.

First all tests of the CPU kernels, with a card as torch's default device; then what only a card has.
"""

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import test_dispatcher
import test_kernels
import test_network
import test_properties
import torch
from support import DTYPES, LAYOUTS, OPS, Network, Unit, assert_as_accurate, autocast, network_op, randomize

import shufflenet_ext as se
from shufflenet_ext import _native

if (cuda_error := _native.build_info()["cuda_error"]) is not None:
    pytest.skip(f"no CUDA kernels: {cuda_error}", allow_module_level=True)

pytestmark = pytest.mark.cuda

OF_THE_CPU = ("test_every_isa_of_this_architecture_is_tested", "test_planes_at_the_tile")
for module in (test_kernels, test_dispatcher, test_network, test_properties):
    for name, test in list(vars(module).items()):
        if name.startswith("test_") and name not in OF_THE_CPU:
            globals()[f"{module.__name__}_{name.removeprefix('test_')}"] = test


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.device("cuda"):
        yield


@pytest.fixture
def isa() -> str:
    """In the place of the CPU's instruction sets, which are many."""
    return "cuda"


@pytest.fixture(params=DTYPES, ids=str)
def program_dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def poison(device: None) -> None:
    """Leaves NaN in shared memory and in freed memory, for whoever reads what it did not write."""
    unit = Unit(batch=1, in_channels=240, mid_channels=60, plane=(14, 14))
    x, *weights = unit.tensors(torch.float16)
    unit.native([torch.full((512, *x.shape[1:]), torch.nan, dtype=x.dtype), *weights])  # every multiprocessor
    blocks = [torch.full((2**exponent,), torch.nan) for exponent in range(6, 23) for _ in range(2)]
    del blocks


each_op = pytest.mark.parametrize("op", OPS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)

# The units of the paper's networks with 3 groups, and units whose channels or planes fit no vector and no tile.
UNITS = [
    Unit(in_channels=24, mid_channels=60, out_channels=216, conv1_groups=1, stride=2, plane=(56, 56)),
    Unit(in_channels=240, mid_channels=60, plane=(28, 28)),
    Unit(in_channels=240, mid_channels=120, stride=2, plane=(28, 28)),
    Unit(in_channels=480, mid_channels=120, plane=(14, 14)),
    Unit(in_channels=480, mid_channels=240, stride=2, plane=(14, 14)),
    Unit(in_channels=960, mid_channels=240, plane=(7, 7)),
    Unit(groups=4, in_channels=272, mid_channels=68, plane=(28, 28)),
    Unit(groups=8, in_channels=384, mid_channels=96, plane=(28, 28)),
    Unit(groups=1, in_channels=144, mid_channels=36, plane=(28, 28)),
    Unit(in_channels=15, mid_channels=9, out_channels=9, stride=2, plane=(1, 1)),
    Unit(in_channels=15, mid_channels=9, plane=(1, 17)),
    Unit(in_channels=30, mid_channels=21, conv1_groups=1, plane=(13, 5)),
]
STAGE_2, STAGE_3 = UNITS[1], UNITS[3]


@each_layout
@each_dtype
@each_op
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: f"{unit.in_channels}x{unit.plane}s{unit.stride}g{unit.groups}")
def test_units(unit, op, dtype, layout):
    unit = replace(unit, op=op)
    got = unit.check(unit.tensors(dtype, layout))
    assert got.is_contiguous(memory_format=layout)


# ---- Sizes ----------------------------------------------------------------------------------------------------------


@each_layout
@pytest.mark.parametrize("batch", [1, 65535, 65536])
def test_batches(batch, layout):
    unit = replace(UNITS[-1], batch=batch)
    x, *weights = unit.tensors(torch.float16, layout)
    got = unit.native([x, *weights])
    assert got.shape[0] == batch
    last = [x[-1:], *weights]
    assert_as_accurate(got[-1:], unit.reference(last), unit.exact(last))


@each_layout
@pytest.mark.parametrize(("batch", "plane"), [(1368, (256, 256)), (1, (9472, 9472))])
def test_more_than_2_31_elements(batch, plane, layout):
    unit = Unit(batch=batch, plane=plane)
    elements = unit.in_channels * batch * plane[0] * plane[1]
    assert elements > 2**31
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 5 * elements:  # x and the result, 2 bytes each
        pytest.skip("needs more memory on the card")
    _, *weights = replace(unit, batch=1, plane=(1, 1)).tensors(torch.float16)
    x = torch.empty(batch, unit.in_channels, *plane, dtype=torch.float16, memory_format=layout).normal_()
    got = unit.native([x, *weights])
    for image in (0, batch - 1):
        # Nine rows at the end give the last eight of the result.
        end = [x[image : image + 1, :, -9:].clone(), *weights]
        plain, exact = (result[:, :, 1:] for result in (unit.reference(end), unit.exact(end)))
        assert_as_accurate(got[image : image + 1, :, -8:], plain, exact)


# ---- Streams, graphs, devices ---------------------------------------------------------------------------------------


def test_a_stream_of_its_own():
    unit = replace(STAGE_2, batch=64)
    x, *weights = unit.tensors(torch.float16, torch.channels_last)
    later = torch.full_like(x, torch.nan)
    busy = torch.randn(4096, 4096)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(20):
            busy = (busy @ busy).clamp(-1, 1)
        later.copy_(x)  # what runs in another stream comes before this
        got = unit.native([later, *weights])
    torch.cuda.current_stream().wait_stream(stream)
    assert_as_accurate(got, unit.reference([x, *weights]), unit.exact([x, *weights]))


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_cuda_graphs(op, dtype):
    unit = replace(STAGE_2, op=op)
    x, *weights = unit.tensors(dtype, torch.channels_last)
    unit.native([x, *weights])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = unit.native([x, *weights])
    for changed in (x.flip(0), x.flip(2), torch.zeros_like(x)):
        x.copy_(changed)
        graph.replay()
        assert torch.equal(got, unit.native([changed, *weights]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@each_op
def test_another_device_than_the_current(op):
    unit = replace(STAGE_2, op=op)
    tensors = [tensor.to("cuda:1") for tensor in unit.tensors(torch.float16)]
    got = unit.check(tensors)
    assert got.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    with pytest.raises(RuntimeError, match="conv1_weight: got a tensor on another device than x's"):
        unit.native([tensors[0], *(tensor.to("cuda:0") for tensor in tensors[1:])])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_on_a_fresh_thread():
    unit = replace(STAGE_2, batch=1)
    tensors = [tensor.to("cuda:1") for tensor in unit.tensors(torch.float16)]
    got = []
    thread = threading.Thread(target=lambda: got.append(unit.native(tensors)))
    thread.start()
    thread.join()
    assert_as_accurate(got[0], unit.reference(tensors), unit.exact(tensors))
    assert torch.cuda.current_device() == 0


# ---- Compilation and networks ---------------------------------------------------------------------------------------


@each_layout
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_compile_with_graphs(mode, layout):
    module = randomize(se.FusedShuffleBottleneck(240, 240, 1, 3).cpu()).cuda().eval()
    compiled = torch.compile(module, mode=mode, fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(2, 240, 28, 28).contiguous(memory_format=layout)
            torch.testing.assert_close(compiled(x).clone(), module(x))


@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("create", "size"), [(se.models.ShuffleNetG3, 32), (se.models.shufflenet_v1, 224)])
def test_networks(create, size, dtype, layout):
    network = randomize(create().cpu()).cuda().eval()
    images = torch.randn(2, 3, size, size).contiguous(memory_format=layout)
    optimized = se.optimize_for_inference(network).to(dtype)
    with se.use_backend("reference"), torch.no_grad():
        exact = network.double()(images.double())
        plain = network.to(dtype)(images.to(dtype))
    assert_as_accurate(optimized(images.to(dtype)), plain, exact)


@each_layout
def test_a_network_with_packed_weights_in_a_graph(layout):
    optimized = se.optimize_for_inference(randomize(se.models.ShuffleNetG3().cpu()).cuda().half().eval())
    x = torch.randn(2, 3, 32, 32).half().contiguous(memory_format=layout)
    optimized(x)
    (packed,) = [module.packed for module in optimized.modules() if hasattr(module, "packed")]
    assert [entry.weights is not None for entry in packed._packed.values()] == [True]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = optimized(x)
    for changed in (x.flip(0), x.flip(2)):
        x.copy_(changed)
        graph.replay()
        assert torch.equal(got, optimized(changed))
    for buffer in optimized.buffers():
        buffer.mul_(0.5)
    expected = optimized(x)
    graph.replay()
    assert torch.equal(got, expected)


def test_a_stem_and_a_head_are_for_the_cpu():
    network = Network((Unit(groups=1),), (24, 3, 1, 1, 0), (10, 0), in_channels=3)
    with pytest.raises(RuntimeError, match="stem"):
        network_op(*network.arguments())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_of_a_module_keeps_batch_norm_in_float32(dtype):
    module = randomize(se.FusedShuffleBottleneck(240, 240, 1, 3).cpu()).cuda().eval()
    x = torch.randn(2, 240, 28, 28)
    with torch.no_grad():
        exact = module(x).double()
        with autocast(dtype):
            got = module(x)
            with se.use_backend("reference"):
                plain = module(x)
    assert got.dtype == dtype
    assert_as_accurate(got, plain.to(dtype), exact)


# ---- TF32 -----------------------------------------------------------------------------------------------------------


@each_layout
@pytest.mark.parametrize("unit", [STAGE_2, STAGE_3, UNITS[-1]], ids=["stage 2", "stage 3", "odd"])
def test_tf32_only_where_it_is_allowed(unit, layout, monkeypatch):
    tensors = unit.tensors(torch.float32, layout)
    full = unit.check(tensors)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    got, exact = unit.native(tensors), unit.exact(tensors)
    # TF32 leaves operands the 10 bits of mantissa that float16 has.
    rounded = [tensor.half().float() for tensor in tensors]
    error, rounding = ((result - exact).abs().max() for result in (got.double(), unit.exact(rounded)))
    assert error <= 4 * rounding
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert torch.equal(unit.native(tensors), full)


@pytest.mark.skipif(torch.cuda.get_device_capability() < (8, 0), reason="the card has no TF32")
def test_tf32_is_used_where_it_is_allowed(monkeypatch):
    tensors = STAGE_3.tensors()
    full = STAGE_3.native(tensors)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert not torch.equal(STAGE_3.native(tensors), full)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_tf32_changes_nothing_for_other_dtypes(dtype, monkeypatch):
    tensors = STAGE_3.tensors(dtype)
    expected = STAGE_3.native(tensors)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert torch.equal(STAGE_3.native(tensors), expected)


# ---- Errors ---------------------------------------------------------------------------------------------------------


@each_op
def test_tensors_that_lie_elsewhere_or_are_of_another_dtype(op):
    unit = Unit(op)
    tensors = unit.tensors()
    for i in range(1, len(tensors)):
        for bad, message in (
            (tensors[i].cpu(), r"\w+: got a tensor on another device than x's"),
            (tensors[i].int(), r"\w+: got dtype"),
            (tensors[i][:-1], r"\w+: got .*, expected "),
        ):
            with pytest.raises(RuntimeError, match=message):
                unit.native([*tensors[:i], bad, *tensors[i + 1 :]])


def test_a_unit_that_no_block_can_hold():
    unit = Unit(groups=1, in_channels=8, mid_channels=200_000, batch=1, plane=(1, 1))
    with pytest.raises(RuntimeError, match=r"x: no CUDA kernel can be planned for this unit \(.*200000 intermediate"):
        unit.native(unit.tensors(torch.float64))
    assert torch.ones(3).sum() == 3  # nothing was launched, and nothing is left behind
