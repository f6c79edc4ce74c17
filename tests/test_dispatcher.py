"""The ops as PyTorch's machinery sees them: opcheck, compilation, export, autograd and autocast."""

import pytest
import torch
from support import LAYOUTS, OPS, Recorder, Unit, assert_as_accurate, assert_ran, autocast
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import shufflenet_ext as se

each_op = pytest.mark.parametrize("op", OPS)
each_stride = pytest.mark.parametrize("stride", [1, 2])
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def with_gradients(unit, *args, **kwargs):
    """The unit's tensors, all that get a gradient asking for it. Statistics get none from batch norm."""
    tensors = unit.tensors(*args, **kwargs)
    for name, tensor in zip(unit.names, tensors, strict=True):
        if tensor is not None and not name.endswith(("_mean", "_var")):
            tensor.requires_grad_()
    return tensors


@pytest.mark.covering(1)
@each_op
@each_stride
@each_layout
def test_opcheck(op, stride, layout):
    unit = Unit(op, plane=(4, 5), stride=stride)
    tensors = with_gradients(unit, layout=layout)
    torch.library.opcheck(getattr(torch.ops.shufflenet_ext, op).default, tensors, unit.options)


def small(op, stride, **kwargs):
    return Unit(op, groups=2, in_channels=4, mid_channels=4, batch=1, plane=(3, 4), stride=stride, **kwargs)


@each_op
@each_stride
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(op, stride, bias):
    unit = small(op, stride, conv2_relu=bias, bias=bias, pool_count_include_pad=bias)
    tensors = with_gradients(unit, torch.float64)
    given = [tensor for tensor in tensors if tensor is not None]

    def run(*values):
        values = iter(values)
        return unit.native([None if tensor is None else next(values) for tensor in tensors])

    assert torch.autograd.gradcheck(run, given)


@each_op
@each_stride
@each_layout
def test_gradients_equal_the_references(op, stride, layout):
    unit = Unit(op, stride=stride)
    native, plain = (with_gradients(unit, layout=layout) for _ in range(2))
    got, expected = unit.native(native), unit.reference(plain)
    grad = torch.randn_like(expected)
    got.backward(grad)
    expected.backward(grad)
    for a, b in zip(native, plain, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_no_gradient_is_computed_for_what_needs_none():
    unit = Unit()
    tensors = unit.tensors()
    assert not unit.native(tensors).requires_grad
    tensors[3].requires_grad_()
    unit.native(tensors).sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == [False, False, False, True, False, False, False]


@pytest.mark.covering(1)
@each_op
@each_stride
@each_layout
def test_compile_whole_graph(op, stride, layout):
    unit = Unit(op, stride=stride)
    tensors = unit.tensors(layout=layout)
    compiled = torch.compile(lambda *t: unit.native(t) * 2, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*tensors), unit.native(tensors) * 2
    assert torch.equal(got, expected)
    assert got.stride() == expected.stride()


def test_compile_with_inductor_and_gradients():
    def step(x, *weights):
        return se.ops.shuffle_bottleneck(x, *weights, **unit.options).square().sum()

    unit = Unit()
    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        tensors = with_gradients(unit)
        loss = function(*tensors)
        loss.backward()
        results.append([loss, *(tensor.grad for tensor in tensors)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_compile_with_dynamic_shapes():
    options = Unit(stride=2).options
    calls = 0

    def backend(graph, inputs):
        nonlocal calls
        calls += 1
        return graph.forward

    function = lambda x, *weights: torch.ops.shufflenet_ext.shuffle_bottleneck(x, *weights, **options)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for batch, plane in ((2, (5, 7)), (3, (6, 9)), (4, (16, 8))):
        tensors = Unit(stride=2, batch=batch, plane=plane).tensors()
        assert torch.equal(compiled(*tensors), function(*tensors))
    assert calls == 1


@each_op
@each_layout
def test_strides_of_symbolic_sizes(op, layout):
    # Weights in channels last make PyTorch's convolutions, but not the kernels, write their result so.
    unit = Unit(op, plane=(6, 8))
    tensors = [unit.tensors(layout=layout)[0]]
    tensors += [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in unit.tensors()[1:]]
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [mode.from_tensor(tensor) for tensor in tensors]
    with mode:
        fake = unit.native(fakes)
    assert isinstance(fake.shape[0], torch.SymInt)
    assert tuple(map(int, fake.stride())) == unit.native(tensors).stride()


def test_compile_of_a_module_and_of_a_network():
    unit = se.FusedShuffleBottleneck(24, 24, 1, 3).eval()
    x = torch.randn(2, 24, 8, 8)
    net = se.models.ShuffleNetG3().eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for module, given, op in (
            (unit, x, "shuffle_bottleneck_batch_norm"),
            (net, images, "shuffle_network_batch_norm"),
        ):
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            expected = module(given)
            compiled(given)
            with Recorder() as recorder:
                got = module(given)
            assert recorder.names.count(f"shufflenet_ext::{op}") == 1
            torch.testing.assert_close(got, expected)
            torch.testing.assert_close(compiled(given), expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_export(stride):
    class Model(torch.nn.Module):
        def forward(self, x, *weights):
            return se.ops.shuffle_bottleneck(x, *weights, **Unit(stride=stride).options)

    tensors = Unit(stride=stride).tensors()
    program = torch.export.export(Model(), tuple(tensors))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("shufflenet_ext.shuffle_bottleneck.default") == 1
    assert torch.equal(program.module()(*tensors), Model()(*tensors))


def test_export_with_a_dynamic_batch():
    unit = se.FusedShuffleBottleneck(24, 24, 1, 3).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(unit, (torch.randn(2, 24, 6, 6),), dynamic_shapes=({0: batch},))
    for n in (2, 5):
        x = torch.randn(n, 24, 6, 6)
        torch.testing.assert_close(program.module()(x), unit(x))


@each_op
@each_layout
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_for_convolutions(op, dtype, layout):
    unit = Unit(op)
    tensors = unit.tensors(layout=layout)
    with autocast(dtype):
        with assert_ran(op):
            got = unit.native(tensors)
        assert got.dtype == torch.nn.functional.conv2d(tensors[0], tensors[1], groups=3).dtype == dtype
    cast = [t if name.startswith("bn") else t.to(dtype) for name, t in zip(unit.names, tensors, strict=True)]
    assert torch.equal(got, unit.native(cast))
    assert_as_accurate(got, unit.reference(cast), unit.exact(cast))


@each_op
def test_autocast_leaves_float64_alone(op):
    tensors = Unit(op).tensors(torch.float64)
    with autocast(torch.bfloat16):
        got = Unit(op).native(tensors)
        assert torch.nn.functional.conv2d(tensors[0], tensors[1], groups=3).dtype == torch.float64
    assert got.dtype == torch.float64
    assert torch.equal(got, Unit(op).native(tensors))


def test_autocast_nested():
    unit = Unit()
    tensors = unit.tensors()
    with autocast(torch.bfloat16):
        with autocast(enabled=False):
            assert unit.native(tensors).dtype == torch.float32
        with autocast(torch.float16):
            assert unit.native(tensors).dtype == torch.float16
        assert unit.native(tensors).dtype == torch.bfloat16
    assert unit.native(tensors).dtype == torch.float32


def test_autocast_gradients_have_the_dtypes_of_the_parameters():
    tensors = with_gradients(Unit())
    with autocast(torch.bfloat16):
        got = Unit().native(tensors)
    got.float().sum().backward()
    plain = with_gradients(Unit())
    Unit().reference(plain).sum().backward()
    for a, b in zip(tensors, plain, strict=True):
        assert a.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() <= 0.1 * b.grad.norm()
