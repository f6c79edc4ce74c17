"""Properties of the ops for units that hypothesis makes up."""

import math

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import DTYPES, LAYOUTS, OPS, Unit, assert_ran, selected_isa

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
