"""The CPU kernels against the reference: every ISA, dtype and layout, sizes around every edge of the code's tiles."""

import platform

import pytest
import torch
from support import DTYPES, LAYOUTS, OPS, Unit, assert_strides_of_layout, sizes_at_the_tile

from shufflenet_ext import _native

pytestmark = pytest.mark.usefixtures("poison")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
each_stride = pytest.mark.parametrize("stride", [1, 2])
each_op = pytest.mark.parametrize("op", OPS)

# Vectors hold 2 (float64, baseline or NEON) to 16 elements (float32, AVX-512), a tile up to 3 vectors of pixels.
RUNS = sorted({n for lanes in (2, 4, 8, 16) for tile in (lanes, 3 * lanes) for n in (tile - 1, tile, tile + 1)})
PLANES = [(1, n) for n in RUNS] + [(n, 1) for n in (2, 3, 16, 17)]
PLANES += [(2, 2), (3, 3), (7, 7), (6, 5), (3, 16), (5, 17), (4, 33), (13, 11), (14, 14), (28, 28)]


def test_every_isa_of_this_architecture_is_tested():
    expected = {"neon" if platform.machine() in ("aarch64", "arm64") else "baseline"}
    if platform.machine() in ("x86_64", "AMD64"):
        capability = torch.backends.cpu.get_cpu_capability()
        expected |= {"avx2"} if capability in ("AVX2", "AVX512") else set()
        expected |= {"avx512"} if capability == "AVX512" else set()
        expected |= {"avx512_bf16"} if torch.cpu._is_avx512_bf16_supported() else set()
        expected |= {"amx"} if torch.cpu._is_amx_tile_supported() else set()
    isas = _native.cpu_isas()
    assert len(isas) == len(expected)
    assert set(isas) == expected


@each_op
@each_stride
@each_layout
@each_dtype
@pytest.mark.parametrize("groups", range(1, 9))
def test_groups(isa, groups, dtype, layout, stride, op):
    unit = Unit(op, groups=groups, in_channels=8 * groups, mid_channels=3 * groups, stride=stride)
    unit.check(unit.tensors(dtype, layout))


@each_stride
@each_layout
@each_dtype
@pytest.mark.parametrize("plane", PLANES, ids=str)
def test_planes(isa, plane, dtype, layout, stride):
    unit = Unit(plane=plane, stride=stride, in_channels=6, mid_channels=6)
    unit.check(unit.tensors(dtype, layout))


@each_stride
@each_layout
@each_dtype
def test_planes_at_the_tile(isa, dtype, layout, stride):
    for size in sizes_at_the_tile(isa, dtype):
        unit = Unit(plane=(2, stride * size), stride=stride, in_channels=6, mid_channels=6)
        unit.check(unit.tensors(dtype, layout))


@each_stride
@each_layout
@pytest.mark.parametrize("plane", PLANES, ids=str)
def test_planes_without_conv3(isa, plane, layout, stride):
    unit = Unit("pointwise_shuffle_depthwise", plane=plane, stride=stride, in_channels=6, mid_channels=6)
    unit.check(unit.tensors(torch.float32, layout))


@each_op
@each_stride
@each_dtype
def test_a_last_pixel_alone_in_its_vector(isa, dtype, stride, op):
    # 49 pixels are one more than whole vectors of every length; such a pixel is computed along the channels.
    unit = Unit(op, plane=(7, 7) if stride == 1 else (13, 14), stride=stride)
    unit.check(unit.tensors(dtype))


@each_dtype
@each_layout
@pytest.mark.parametrize("slice_channels", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17])
def test_channels_at_the_tile(isa, slice_channels, layout, dtype):
    # A tile takes up to 4 or 8 channels; staging transposes blocks of as many as a vector has lanes.
    unit = Unit(groups=2, in_channels=2 * slice_channels, mid_channels=2 * slice_channels)
    unit.check(unit.tensors(dtype, layout))


# Tiles sum up to 64 terms one behind the other, and more in blocks.
@each_dtype
@pytest.mark.parametrize("depth", [63, 64, 65, 128, 129, 300])
def test_depths_at_the_blocks(isa, depth, dtype):
    unit = Unit(groups=1, in_channels=depth, mid_channels=depth + 1)
    unit.check(unit.tensors(dtype))


def test_rounding_errors_of_deep_sums_do_not_grow_with_the_depth(isa):
    unit = Unit("pointwise_shuffle_depthwise", groups=1, in_channels=4096, bias=False)
    tensors = unit.tensors()
    tensors[1:] = [tensor if tensor is None else tensor.abs() for tensor in tensors[1:]]  # nothing cancels out
    tensors[0] = tensors[0].abs()
    exact = unit.exact(tensors)
    error = (unit.native(tensors).double() / exact - 1).square().mean().sqrt()
    assert error < 2 * torch.finfo(torch.float32).eps  # 0.6; as one sum, 4.0


@each_op
@each_stride
@pytest.mark.parametrize(("conv1_groups", "groups"), [(1, 3), (3, 1), (2, 3), (3, 2), (6, 4), (4, 6), (12, 1), (1, 12)])
def test_conv1_groups_differ_from_groups(isa, conv1_groups, groups, stride, op):
    unit = Unit(op, groups=groups, conv1_groups=conv1_groups, in_channels=24, mid_channels=12, stride=stride)
    unit.check(unit.tensors())


@each_dtype
@each_layout
@pytest.mark.parametrize(("in_channels", "mid_channels", "out_channels"), [(24, 54, 216), (5, 6, 9), (1, 3, 3)])
def test_stride_2_concatenates(isa, in_channels, mid_channels, out_channels, layout, dtype):
    channels = {"in_channels": in_channels, "mid_channels": mid_channels, "out_channels": out_channels}
    unit = Unit(**channels, conv1_groups=1, stride=2)
    got = unit.check(unit.tensors(dtype, layout))
    assert got.shape[1] == out_channels + in_channels


@each_stride
@each_dtype
@each_layout
@pytest.mark.parametrize("shuffle_groups", [1, 2, 4, 6, 12])
@pytest.mark.parametrize("shortcut_first", [False, True])
@pytest.mark.parametrize("shortcut_relu", [False, True])
def test_units_in_general(isa, shortcut_relu, shortcut_first, shuffle_groups, layout, dtype, stride):
    general = {"shuffle_groups": shuffle_groups, "shortcut_first": shortcut_first, "shortcut_relu": shortcut_relu}
    unit = Unit(stride=stride, out_channels=24 if stride == 1 else 15, plane=(7, 7), **general)
    unit.check(unit.tensors(dtype, layout))


@each_dtype
@each_layout
@pytest.mark.parametrize("plane", [(1, 1), (1, 5), (4, 1), (4, 6), (5, 35)], ids=str)
@pytest.mark.parametrize("include_pad", [True, False])
def test_pool_counts_padding(isa, include_pad, plane, layout, dtype):
    unit = Unit(stride=2, pool_count_include_pad=include_pad, plane=plane)
    unit.check(unit.tensors(dtype, layout))


@each_op
@each_stride
@pytest.mark.parametrize("conv2_relu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_relu_and_bias(isa, bias, conv2_relu, stride, op):
    unit = Unit(op, stride=stride, conv2_relu=conv2_relu, bias=bias)
    tensors = unit.tensors()
    got = unit.check(tensors)
    if op == "pointwise_shuffle_depthwise":
        assert (got.min() >= 0) == conv2_relu


@each_stride
@each_dtype
@pytest.mark.parametrize(("groups", "channels", "size"), [(3, 240, 28), (8, 768, 14), (1, 144, 56)])
def test_units_of_the_networks(groups, channels, size, dtype, stride):
    # The sizes at which a unit is cut into strips and slices, for the ISA that users get.
    unit = Unit(groups=groups, in_channels=channels, mid_channels=channels // 4, stride=stride, plane=(size, size))
    unit.check(unit.tensors(dtype))


@each_layout
@each_stride
def test_batch_norm_of_float32_beside_16_bit_weights(isa, stride, layout):
    unit = Unit("shuffle_bottleneck_batch_norm", stride=stride)
    for dtype in (torch.bfloat16, torch.float16):
        tensors = unit.tensors(dtype, layout)
        unit.check([t.float() if name.startswith("bn") else t for name, t in zip(unit.names, tensors, strict=True)])


@each_dtype
@pytest.mark.parametrize(("bias", "affine"), [(True, False), (False, True), (False, False)])
def test_batch_norm_without_weights_and_biases(dtype, bias, affine):
    unit = Unit("shuffle_bottleneck_batch_norm", bias=bias, affine=affine)
    unit.check(unit.tensors(dtype))


@each_op
@each_stride
@each_dtype
@each_layout
def test_result_has_the_layout_and_strides_of_the_fake_kernel(op, stride, dtype, layout):
    units = [Unit(op, plane=plane, stride=stride) for plane in ((4, 5), (1, 1), (2, 2), (1, 6), (6, 1))]
    units += [Unit(op, batch=0, stride=stride), Unit(op, groups=1, in_channels=1, mid_channels=1, stride=stride)]
    for unit in units:
        tensors = unit.tensors(dtype, layout)
        got, fake = unit.native(tensors), unit.native([tensor.to("meta") for tensor in tensors])
        assert (got.shape, got.stride(), got.dtype) == (fake.shape, fake.stride(), fake.dtype)
        x = tensors[0]
        # A tensor of one channel or one pixel lies the same way in both layouts, and counts as contiguous.
        assert_strides_of_layout(got, LAYOUTS[0] if x.is_contiguous() else layout)


@each_op
@each_stride
@each_layout
@each_dtype
def test_empty_batch(isa, dtype, layout, stride, op):
    unit = Unit(op, batch=0, stride=stride)
    got = unit.native(unit.tensors(dtype, layout))
    assert got.shape == unit.reference(unit.tensors(dtype, layout)).shape
    assert got.dtype == dtype


def strided_views(x):
    """Views with x's values (or, expanded, some of them) and strides of every kind, NaN in the memory around them."""
    n, c, h, w = x.shape

    def inside(*shape, index, order=(0, 1, 2, 3)):
        view = torch.full(shape, torch.nan, dtype=x.dtype)[index].permute(order)
        view.copy_(x)
        return view

    each = slice(None)
    nhwc = {"order": (0, 3, 1, 2)}
    return {
        "window": inside(n, c, h + 2, w + 3, index=(..., slice(1, h + 1), slice(2, w + 2))),
        "every second channel": inside(n, 2 * c, h, w, index=(each, slice(1, None, 2))),
        "every second image": inside(2 * n, c, h, w, index=slice(0, None, 2)),
        "images from the middle": inside(n + 2, c, h, w, index=slice(1, n + 1)),
        "every third column": inside(n, c, h, 3 * w, index=(..., slice(0, None, 3))),
        "transposed planes": inside(n, c, w, h, index=each, order=(0, 1, 3, 2)),
        "transposed channels": inside(c, n, h, w, index=each, order=(1, 0, 2, 3)),
        "channels_last window": inside(n, h + 1, w + 2, c, index=(each, slice(1, None), slice(1, w + 1)), **nhwc),
        "channels_last, some channels": inside(n, h, w, c + 3, index=(..., slice(2, c + 2)), **nhwc),
        "channels_last, images from the middle": inside(n + 2, h, w, c, index=slice(1, n + 1), **nhwc),
        "expanded image": x[:1].expand(n, c, h, w),
        "expanded channel": x[:, :1].expand(n, c, h, w),
        "expanded pixel": x[..., :1, :1].expand(n, c, h, w),
    }


@each_op
@each_stride
@each_dtype
def test_any_strides_of_x(isa, dtype, stride, op):
    unit = Unit(op, stride=stride)
    x, *weights = unit.tensors(dtype)
    for name, view in strided_views(x).items():
        storage = torch.empty(0, dtype=dtype).set_(view.untyped_storage())
        before = storage.clone()
        got = unit.native([view, *weights])
        # Copied beforehand, x gives the same bits; and reading was all that was done to its storage.
        layout = LAYOUTS[1] if view.stride(1) == 1 and not view.is_contiguous() else LAYOUTS[0]
        expected = unit.check([view.clone(memory_format=layout), *weights])
        assert torch.equal(got, expected), name
        assert got.stride() == expected.stride(), name
        torch.testing.assert_close(storage, before, rtol=0, atol=0, equal_nan=True, msg=name)


@each_op
@each_dtype
def test_any_strides_of_weights(isa, dtype, op):
    unit = Unit(op)
    x, *weights = unit.tensors(dtype)
    expected = unit.check([x, *weights])
    spread = []
    for weight in weights:
        storage = torch.full((*weight.shape, 2), torch.nan, dtype=dtype)
        spread.append(storage[..., 1])
        spread[-1].copy_(weight)
        assert not spread[-1].is_contiguous()
    assert torch.equal(unit.native([x, *spread]), expected)
    reordered = [w.contiguous(memory_format=LAYOUTS[1]) if w.dim() == 4 else w for w in weights]
    assert torch.equal(unit.native([x, *reordered]), expected)


@each_op
@each_stride
@each_layout
@each_dtype
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_propagate_as_in_the_reference(isa, special, dtype, layout, stride, op):
    unit = Unit(op, plane=(9, 18), stride=stride, batch=1)
    for position in ((0, 5, 4, 9), (0, 0, 0, 0), (0, 23, 8, 17), (0, 11, 3, 0)):
        tensors = unit.tensors(dtype, layout)
        tensors[0][position] = special
        got, expected = unit.native(tensors), unit.reference(tensors)
        assert not expected.isfinite().all()
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(got), kind(expected)), kind.__name__


@each_dtype
@each_layout
def test_largest_and_smallest_numbers_are_converted_exactly(isa, layout, dtype):
    # With weights of one and a centre tap alone the stride-1 unit gives relu(relu(x) + x): rounding and range are the
    # dtype's own, subnormals and overflow included.
    info = torch.finfo(dtype)
    values = [info.max, info.max / 2, info.max * 0.75, info.tiny, info.tiny / 2, info.smallest_normal / 4, 1 + info.eps]
    values += [info.smallest_normal * info.eps, 3 * info.smallest_normal * info.eps, 0.0, -0.0, 1.0, -1.0, -info.tiny]
    x = torch.tensor(values, dtype=dtype).reshape(1, 1, 2, -1).contiguous(memory_format=layout)
    one = torch.ones(1, 1, 1, 1, dtype=dtype)
    tap = torch.zeros(1, 1, 3, 3, dtype=dtype)
    tap[..., 1, 1] = 1
    got = torch.ops.shufflenet_ext.shuffle_bottleneck(x, one, None, tap, None, one, None, conv1_groups=1, groups=1)
    assert torch.equal(got, (x.relu() + x).relu())


@each_dtype
def test_16_bit_results_round_to_nearest_even(isa, dtype):
    # Sums that fall between two numbers of the dtype, many of them half-way.
    eps = torch.finfo(dtype).eps
    x = (1 + eps * torch.arange(64, dtype=torch.float64)).to(dtype).reshape(1, 1, 8, 8)
    bias = torch.tensor([1.0], dtype=dtype)
    one = torch.ones(1, 1, 1, 1, dtype=dtype)
    tap = torch.zeros(1, 1, 3, 3, dtype=dtype)
    tap[..., 1, 1] = 1
    got = torch.ops.shufflenet_ext.pointwise_shuffle_depthwise(
        x, one, bias, tap, None, conv1_groups=1, shuffle_groups=1
    )
    assert torch.equal(got, (x.double() + 1).to(dtype))


def test_halo_is_zero_after_the_bias(isa):
    # Padding comes after bn1 and ReLU: beyond the edge there is 0, not relu(bias).
    x, one = torch.zeros(1, 1, 3, 3), torch.ones(1, 1, 1, 1)
    got = torch.ops.shufflenet_ext.pointwise_shuffle_depthwise(
        x, one, torch.ones(1), torch.ones(1, 1, 3, 3), None, conv1_groups=1, shuffle_groups=1
    )
    assert got.flatten().tolist() == [4, 6, 4, 6, 9, 6, 4, 6, 4]
