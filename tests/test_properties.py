"""Properties of the ops for units that hypothesis makes up."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import DTYPES, LAYOUTS, OPS, Unit, assert_ran, selected_isa

import shufflenet_ext as se
from shufflenet_ext import _native, ops

# No deadline: what the machine does besides is no property of the ops.
check = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def units(draw, *, ops=OPS):
    op = draw(st.sampled_from(ops))
    groups, conv1_groups = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    stride = draw(st.sampled_from([1, 2]))
    both = math.lcm(groups, conv1_groups)
    in_channels = (both if stride == 1 else conv1_groups) * draw(st.integers(1, 3))
    return Unit(
        op=op,
        groups=groups,
        conv1_groups=conv1_groups,
        in_channels=in_channels,
        mid_channels=both * draw(st.integers(1, 3)),
        out_channels=in_channels if stride == 1 else groups * draw(st.integers(1, 5)),
        batch=draw(st.integers(0, 3)),
        plane=(draw(st.integers(1, 20)), draw(st.integers(1, 40))),
        stride=stride,
        conv2_relu=draw(st.booleans()),
        pool_count_include_pad=draw(st.booleans()),
        bias=draw(st.booleans()),
    )


@check
@given(unit=units(ops=OPS[1:2]), data=st.data())
def test_variants_of_the_reference(unit, data):
    # The parts of the variants are those of the original unit, moved: a shuffle by s is the depthwise weights' matter.
    s = data.draw(st.sampled_from([d for d in range(1, unit.mid_channels + 1) if unit.mid_channels % d == 0]))
    first, relu = data.draw(st.booleans()), data.draw(st.booleans())
    variant = replace(unit, shuffle_groups=s, shortcut_first=first, shortcut_relu=relu)
    x, w1, b1, *rest = variant.tensors(torch.float64)
    got = variant.exact([x, w1, b1, *rest])
    # conv1's rows put in the order that makes the shuffle by ``groups`` bring what the shuffle by s brought.
    by_s, by_groups = (
        se.shuffle_channels(torch.arange(unit.mid_channels).view(1, -1, 1, 1), g) for g in (s, unit.groups)
    )
    order = torch.empty(unit.mid_channels, dtype=torch.long)
    order[by_groups.flatten()] = by_s.flatten()
    dense = torch.zeros(unit.mid_channels, unit.in_channels, 1, 1, dtype=torch.float64)
    for row in range(unit.mid_channels):
        depth = w1.shape[1]
        start = row // (unit.mid_channels // unit.conv1_groups) * depth
        dense[row, start : start + depth] = w1[row]
    plain = replace(unit, conv1_groups=1)
    expected = plain.exact([x, dense[order], None if b1 is None else b1[order], *rest])
    if unit.stride == 2:
        channels = unit.out_channels
        main, pooled = expected[:, :channels], expected[:, channels:]
        if not relu:
            pooled = F.avg_pool2d(x, 3, 2, 1, count_include_pad=unit.pool_count_include_pad)
        expected = torch.cat([pooled, main] if first else [main, pooled], 1)
    torch.testing.assert_close(got, expected)


dtypes, layouts = st.sampled_from(DTYPES), st.sampled_from(LAYOUTS)


@check
@given(unit=units(), dtype=dtypes, layout=layouts, isa=st.sampled_from(_native.cpu_isas()), threads=st.integers(1, 3))
def test_as_accurate_as_pytorch(unit, dtype, layout, isa, threads):
    torch.set_num_threads(threads)
    try:
        with selected_isa(isa):
            unit.check(unit.tensors(dtype, layout))
    finally:
        torch.set_num_threads(1)


@check
@given(unit=units(), dtype=dtypes, first=layouts, second=layouts, data=st.data())
def test_result_does_not_depend_on_the_strides_of_x(unit, dtype, first, second, data):
    x, *weights = unit.tensors(dtype, first)
    before, after = (data.draw(st.tuples(*[st.integers(0, 3)] * 4)) for _ in range(2))
    room = [b + n + a for b, n, a in zip(before, x.shape, after, strict=True)]
    storage = torch.full(room, torch.nan, dtype=dtype).contiguous(memory_format=second)
    view = storage[tuple(slice(b, b + n) for b, n in zip(before, x.shape, strict=True))]
    view.copy_(x)
    assert torch.equal(unit.native([view, *weights]), unit.native([x, *weights]))


@check
@given(unit=units(), dtype=dtypes, layout=layouts)
def test_images_of_a_batch_do_not_mix(unit, dtype, layout):
    x, *weights = unit.tensors(dtype, layout)
    got = unit.native([x, *weights])
    for i in range(unit.batch):
        assert torch.equal(got[i : i + 1], unit.native([x[i : i + 1], *weights]))


@check
@given(unit=units(ops=OPS[:2]), dtype=dtypes)
def test_public_functions_run_the_native_op_and_repeat_it_bit_for_bit(unit, dtype):
    tensors = unit.tensors(dtype)
    with assert_ran(unit.op):
        got = getattr(ops, unit.op)(*tensors, **unit.options)
    assert torch.equal(got, unit.native(tensors))
