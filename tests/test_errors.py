"""Every bad argument is refused with a message that says which, what was got and what was expected."""

import re

import pytest
import torch
from support import OPS, Unit

import shufflenet_ext as se

TENSORS = {op: Unit(op).names for op in OPS}

# Ways to call an op: the public function, the reference, the native op, and the native op's fake kernel.
PUBLIC, REFERENCE, NATIVE, FAKE = "ops", "reference", "torch.ops", "fake"


def call(way, op, arguments):
    if way == FAKE:
        arguments = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    namespace = {PUBLIC: se.ops, REFERENCE: se.reference}.get(way, torch.ops.shufflenet_ext)
    positional = [arguments.pop(name) for name in TENSORS[op]]
    with se.use_backend("auto"):
        return getattr(namespace, op)(*positional, **arguments)


def arguments_of(op, **changes):
    unit = Unit(op, in_channels=24, mid_channels=12, groups=3)
    return dict(zip(TENSORS[op], unit.tensors(), strict=True)) | unit.options | changes


def ways(op):
    return [REFERENCE, NATIVE, FAKE] + [PUBLIC] * hasattr(se.ops, op)


def cases():
    """Of each op: a name, the changes to good arguments, and which argument the message must name."""
    zeros = torch.zeros
    for op in OPS:
        groups = "shuffle_groups" if op == "pointwise_shuffle_depthwise" else "groups"
        values = {
            "x": [zeros(shape) for shape in ((), (24, 5, 7), (2, 24, 5, 7, 1))],
            "conv1_weight": [zeros(12, 8, *kernel) for kernel in ((), (1,), (3, 3), (1, 1, 1))],
            "conv2_weight": [zeros(12, 1, *kernel) for kernel in ((), (9,), (3, 1), (5, 5), (3, 3, 1))],
            "conv3_weight": [zeros(24, 4, *kernel) for kernel in ((), (1,), (3, 3), (1, 1, 1))],
            "conv1_groups": [0, -3, 5, 9, -(2**63), 2**63 - 1],
            groups: [0, -3, 5, 9, -(2**63), 2**63 - 1],
            "stride": [0, -1, 3, 2**62],
        }
        values["x"] += [zeros(shape) for shape in ((2, 0, 5, 7), (2, 24, 0, 7), (2, 24, 5, 0))]
        values["x"] += [zeros(2, 24, 5, 7, dtype=dtype) for dtype in (torch.int32, torch.bool, torch.complex64)]
        values["conv1_weight"] += [zeros(12, 7, 1, 1), zeros(12, 24, 1, 1), zeros(0, 8, 1, 1)]
        values["conv2_weight"] += [zeros(11, 1, 3, 3), zeros(12, 2, 3, 3), zeros(0, 1, 3, 3)]
        values["conv3_weight"] += [zeros(24, 3, 1, 1), zeros(0, 4, 1, 1)]
        for name in TENSORS[op][1:]:
            good = arguments_of(op)[name]
            values.setdefault(name, [good[:-1], torch.cat([good, good]), good[:, None], good[0]])
            values[name] += [good.double(), good.half(), good.int(), good.to(torch.complex64)]
        for name, bad in values.items():
            for value in bad if name in arguments_of(op) else []:
                described = f"{list(value.shape)}-{value.dtype}" if isinstance(value, torch.Tensor) else value
                yield pytest.param(op, name, value, id=f"{op}-{name}-{described}")


@pytest.mark.parametrize(("op", "name", "value"), list(cases()))
@pytest.mark.filterwarnings("ignore::shufflenet_ext.ReferenceFallbackWarning")
def test_bad_value(op, name, value):
    # The reference leaves the checks of a batch norm's tensors to PyTorch's own.
    for way in [NATIVE] if name.startswith("bn") else ways(op):
        with pytest.raises((ValueError, RuntimeError)) as error:
            call(way, op, arguments_of(op, **{name: value}))
        message = str(error.value)
        assert re.search(rf"\b{name}: got .*, expected ", message), f"{way}: {message}"


@pytest.mark.parametrize("op", OPS[1:])
def test_results_that_do_not_fit_x_or_the_groups(op):
    for rows, message in (
        (27, r"conv3_weight: got 27 rows, expected .*24"),
        (25, r"groups: got 3, expected a positive divisor of .*25"),
    ):
        changes = {name: torch.ones(rows) for name in TENSORS[op] if name.endswith("bias") and "3" in name}
        changes |= {name: torch.ones(rows) for name in TENSORS[op] if name.startswith("bn3")}
        for way in ways(op):
            with pytest.raises((ValueError, RuntimeError), match=message):
                call(way, op, arguments_of(op, conv3_weight=torch.ones(rows, 4, 1, 1), **changes))


@pytest.mark.parametrize("op", OPS)
def test_shapes_that_would_read_out_of_bounds(op):
    # Every vector may be one element short or long, whatever its strides say.
    for name, good in arguments_of(op).items():
        if not isinstance(good, torch.Tensor) or good.dim() != 1:
            continue
        for bad in (good[:1].expand(len(good) - 1), good[:1].expand(2 * len(good))):
            message = rf"{name}: got shape \[{len(bad)}\], expected shape \[{len(good)}\]"
            with pytest.raises(RuntimeError, match=message):
                call(NATIVE, op, arguments_of(op, **{name: bad}))


@pytest.mark.parametrize("op", OPS[:2])
@pytest.mark.parametrize("way", [PUBLIC, REFERENCE])
def test_wrong_type(op, way):
    numbers = [name for name, value in arguments_of(op).items() if type(value) is int]
    for name in TENSORS[op]:
        for wrong in (3, "x", [1.0], *([] if name.endswith("bias") else [None])):
            with pytest.raises(TypeError, match=rf"\b{name}: got {type(wrong).__name__}, expected a torch.Tensor"):
                call(way, op, arguments_of(op, **{name: wrong}))
    for name in numbers:
        for wrong in (1.0, "1", None, True, torch.ones(2)):
            with pytest.raises(TypeError, match=rf"\b{name}: got {type(wrong).__name__}, expected an int"):
                call(way, op, arguments_of(op, **{name: wrong}))


@pytest.mark.parametrize("op", OPS)
def test_wrong_type_to_the_native_op(op):
    for name, value in arguments_of(op).items():
        with pytest.raises((TypeError, RuntimeError), match=name):
            call(NATIVE, op, arguments_of(op, **{name: "wrong" if value is not None else 3}))


@pytest.mark.parametrize("op", OPS)
def test_missing_and_unknown_arguments(op):
    for way in ways(op):
        arguments = arguments_of(op)
        del arguments["conv1_groups"]
        with pytest.raises((TypeError, RuntimeError), match="conv1_groups"):
            call(way, op, arguments)
        with pytest.raises((TypeError, RuntimeError), match=r"padding|at most \d+ argument"):
            call(way, op, arguments_of(op, padding=1))


@pytest.mark.parametrize(
    "x", [torch.tensor(1.0), torch.randn(8)[::2], torch.randn(4, 6).t()], ids=["0-d", "1-d", "2-d"]
)
def test_x_of_few_dimensions_to_the_native_op(x):
    weights = (torch.randn(12, 8, 1, 1), None, torch.randn(12, 1, 3, 3), None)
    with pytest.raises(RuntimeError, match=r"x: got shape \[.*\], expected 4 dimensions"):
        torch.ops.shufflenet_ext.pointwise_shuffle_depthwise(x, *weights, conv1_groups=3, shuffle_groups=3)


def test_weights_on_another_device():
    for op in OPS:
        for name in TENSORS[op][1:]:
            bad = arguments_of(op)[name].to("meta")
            with pytest.raises((ValueError, RuntimeError)) as error:
                call(NATIVE, op, arguments_of(op, **{name: bad}))
            assert re.search(r"device|meta", str(error.value))


def test_shuffle_groups_that_do_not_divide():
    with pytest.raises(ValueError, match=r"shuffle_groups: got 5, expected a positive divisor"):
        call(REFERENCE, "shuffle_bottleneck", arguments_of("shuffle_bottleneck", shuffle_groups=5))
    for way in (PUBLIC, REFERENCE):
        with pytest.raises(TypeError, match=r"shuffle_groups: got str, expected an int"):
            call(way, "shuffle_bottleneck", arguments_of("shuffle_bottleneck", shuffle_groups="5"))


@pytest.mark.parametrize("shape", [(2, 6, 3, 4), (1, 6, 5, 1), (2, 6, 1, 1)])
def test_shuffle_channels_keeps_the_memory_format(shape):
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()
    shuffled = se.shuffle_channels(x, 2)
    assert shuffled.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(shuffled, se.shuffle_channels(x.contiguous(), 2))
    shuffled.backward(shuffled.detach())
    torch.testing.assert_close(x.grad, x)


def test_shuffle_channels():
    x = torch.randn(2, 6, 3, 4)
    shuffled = se.shuffle_channels(x, 3)
    for c in range(6):
        assert torch.equal(shuffled[:, c], x[:, (c % 3) * 2 + c // 3])
    for groups in (0, -1, 4, 7):
        with pytest.raises(ValueError, match=rf"groups: got {groups}, expected a positive divisor of x's channels, 6"):
            se.shuffle_channels(x, groups)
    with pytest.raises(ValueError, match=r"x: got shape \[6, 3, 4\], expected \(batch, channels, height, width\)"):
        se.shuffle_channels(x[0], 3)
    with pytest.raises(TypeError, match=r"x: got list, expected a torch\.Tensor"):
        se.shuffle_channels([1], 3)
    with pytest.raises(TypeError, match="groups: got float, expected an int"):
        se.shuffle_channels(x, 3.0)


@pytest.mark.parametrize("name", [name for name in TENSORS["shuffle_bottleneck_batch_norm"] if name.startswith("bn")])
def test_norms_of_float32_go_with_16_bit_images_only(name):
    unit = Unit("shuffle_bottleneck_batch_norm")
    tensors = dict(zip(TENSORS[unit.op], unit.tensors(torch.float64), strict=True))
    tensors[name] = tensors[name].float()
    with pytest.raises(RuntimeError, match=f"{name}: got dtype float32, expected x's, float64"):
        unit.native(list(tensors.values()))
