"""The CUDA kernels on a card: `pytest -m cuda`. tests/test_cuda_host.py runs the same source without one."""

import pytest
import torch
from torch import Tensor

import shufflenet_ext as se
from shufflenet_ext import _native

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(_native.cuda_error is not None, reason=f"no CUDA kernels: {_native.cuda_error}"),
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
# (in_channels, mid_channels, out_channels, conv1_groups, groups, stride, height, width)
UNITS = [
    (240, 60, 240, 3, 3, 1, 28, 28),
    (480, 120, 480, 3, 3, 1, 14, 14),
    (960, 240, 960, 3, 3, 1, 7, 7),
    (24, 54, 216, 1, 3, 2, 56, 56),
    (240, 60, 240, 3, 3, 2, 28, 28),
    (272, 68, 272, 4, 4, 1, 28, 28),
    (384, 96, 384, 8, 8, 1, 28, 28),
    (144, 36, 144, 1, 1, 1, 28, 28),
    (15, 9, 9, 3, 3, 2, 1, 1),
    (15, 9, 15, 3, 3, 1, 1, 17),
    (30, 21, 30, 1, 3, 1, 13, 5),
]


def arguments(unit: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, batch: int = 2) -> list[Tensor]:
    inputs, mid, out, conv1_groups, groups, _, height, width = unit
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to("cuda", dtype)

    depth1, depth3 = inputs // conv1_groups, mid // groups
    return [
        normal(batch, inputs, height, width).contiguous(memory_format=layout),
        normal(mid, depth1, 1, 1, scale=depth1**-0.5),
        normal(mid),
        normal(mid, 1, 3, 3, scale=1 / 3),
        normal(mid),
        normal(out, depth3, 1, 1, scale=depth3**-0.5),
        normal(out),
    ]


def options(unit: tuple[int, ...]) -> dict[str, int]:
    return {"conv1_groups": unit[3], "groups": unit[4], "stride": unit[5]}


def native(tensors: list[Tensor], unit: tuple[int, ...]) -> Tensor:
    return torch.ops.shufflenet_ext.shuffle_bottleneck(*tensors, **options(unit))


def assert_right(got: Tensor, tensors: list[Tensor], unit: tuple[int, ...]) -> None:
    """Not further from float64 than twice PyTorch's own error, with a rounding or two to spare."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        exact = se.reference.shuffle_bottleneck(*(tensor.double() for tensor in tensors), **options(unit))
        plain = se.reference.shuffle_bottleneck(*tensors, **options(unit))
    error, plain_error = ((result.double() - exact).abs().max() for result in (got, plain))
    floor = torch.finfo(got.dtype).eps * exact.abs().max() * (1 if got.element_size() == 2 else 8)
    assert got.shape == exact.shape
    assert error <= 2 * plain_error + floor


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", UNITS)
def test_units(unit: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    tensors = arguments(unit, dtype, layout)
    got = native(tensors, unit)
    assert_right(got, tensors, unit)
    assert got.is_contiguous(memory_format=layout)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="needs sm_80")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("unit", UNITS)
def test_tf32(unit: tuple[int, ...], layout: torch.memory_format) -> None:
    tensors = arguments(unit, torch.float32, layout)
    exact = se.reference.shuffle_bottleneck(*(tensor.double() for tensor in tensors), **options(unit))
    with se.use_backend("native"):
        with torch.backends.cudnn.flags(allow_tf32=False):
            precise = se.ops.shuffle_bottleneck(*tensors, **options(unit))
        with torch.backends.cudnn.flags(allow_tf32=True):
            rounded = se.ops.shuffle_bottleneck(*tensors, **options(unit))
    assert torch.equal(precise, native(tensors, unit))
    error = (rounded - exact).abs().max() / exact.abs().max()
    assert 2**-20 <= error <= 4 * 2**-11  # of operands with 10 bits behind the point


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pointwise_shuffle_depthwise(dtype: torch.dtype, layout: torch.memory_format) -> None:
    tensors = arguments(UNITS[0], dtype, layout)[:5]
    kwargs = {"conv1_groups": 3, "shuffle_groups": 3}
    got = torch.ops.shufflenet_ext.pointwise_shuffle_depthwise(*tensors, **kwargs)
    exact = se.reference.pointwise_shuffle_depthwise(*(tensor.double() for tensor in tensors), **kwargs)
    assert (got.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("batch", [0, 1, 65536])
def test_batches(batch: int) -> None:
    tensors = arguments(UNITS[-1], torch.float16, torch.channels_last, batch)
    got = native(tensors, UNITS[-1])
    assert got.shape[0] == batch
    if batch:
        last = [tensors[0][-1:], *tensors[1:]]
        assert_right(got[-1:], last, UNITS[-1])


def test_batch_norm_in_float32_under_16_bit_convolutions() -> None:
    with se.use_backend("native"), torch.no_grad():
        unit = se.FusedShuffleBottleneck(240, 240, 1, 3).cuda().eval()
        x = torch.randn(2, 240, 28, 28, device="cuda")
        expected = unit(x)
        with torch.autocast("cuda", dtype=torch.float16):
            got = unit(x)
    assert got.dtype == torch.float16
    assert (got - expected).abs().max() <= 0.01 * expected.abs().max()


def test_a_stream_of_its_own() -> None:
    tensors = arguments(UNITS[0], torch.float16, torch.channels_last, 64)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        tensors[0] = tensors[0] * 0.5  # in the same stream, just before
        got = native(tensors, UNITS[0])
    torch.cuda.current_stream().wait_stream(stream)
    assert_right(got, tensors, UNITS[0])


def test_cuda_graphs() -> None:
    tensors = arguments(UNITS[0], torch.float16, torch.channels_last)
    graph = torch.cuda.CUDAGraph()
    native(tensors, UNITS[0])
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        got = native(tensors, UNITS[0])
    tensors[0].copy_(tensors[0].flip(0))
    graph.replay()
    assert_right(got, tensors, UNITS[0])


def test_torch_compile_with_graphs() -> None:
    with se.use_backend("native"), torch.no_grad():
        unit = se.FusedShuffleBottleneck(240, 240, 1, 3).cuda().eval()
        compiled = torch.compile(unit, mode="reduce-overhead", fullgraph=True)
        x = torch.randn(2, 240, 28, 28, device="cuda")
        for _ in range(3):
            torch.testing.assert_close(compiled(x).clone(), unit(x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current() -> None:
    tensors = [tensor.to("cuda:1") for tensor in arguments(UNITS[0], torch.float32, torch.contiguous_format)]
    got = native(tensors, UNITS[0])
    assert torch.cuda.current_device() == 0
    assert_right(got, tensors, UNITS[0])


def test_opcheck() -> None:
    tensors = arguments(UNITS[-1], torch.float32, torch.channels_last)
    torch.library.opcheck(torch.ops.shufflenet_ext.shuffle_bottleneck.default, tuple(tensors), options(UNITS[-1]))
