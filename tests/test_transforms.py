"""torch.func: its transforms, of the ops and of the modules, give what they give of the reference."""

import copy

import pytest
import torch
from support import OPS, Network, Unit, assert_ran, network_op, plain_twin, randomize
from test_fuse import ForeignUnit
from torch.func import functional_call, grad, jacfwd, jvp, vmap

import shufflenet_ext as se
from shufflenet_ext import reference

OP = "shuffle_bottleneck_batch_norm"


@pytest.fixture(autouse=True)
def reference_allowed():
    with se.use_backend("auto"), pytest.warns(se.ReferenceFallbackWarning, match=r"torch\.func transforms the call"):
        yield


def of_unit(call, tensors):
    """A loss of an op's first two tensors, the image and a weight."""
    return lambda x, weight: call([x, weight, *tensors[2:]]).square().sum()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("stride", [1, 2])
def test_transforms_of_the_ops(op, stride):
    unit = Unit(op, stride=stride)
    tensors = unit.tensors(torch.float64)
    x, weight = tensors[:2]
    batches, tangents = torch.randn(3, *x.shape, dtype=x.dtype), (torch.randn_like(x), torch.randn_like(weight))
    results = []
    for call in (unit.native, unit.reference):
        loss = of_unit(call, tensors)
        results.append(
            [
                grad(loss, argnums=(0, 1))(x, weight),
                vmap(loss, in_dims=(0, None))(batches, weight),
                vmap(grad(loss, argnums=1), in_dims=(0, None))(batches, weight),
                grad(lambda x, weight, loss=loss: vmap(loss, in_dims=(0, None))(x, weight).sum())(batches, weight),
                jvp(loss, (x, weight), tangents),
            ]
        )
    torch.testing.assert_close(*results)


def test_public_functions():
    unit = Unit()
    x, weight, *rest = unit.tensors()
    run = lambda namespace: grad(lambda w: namespace.shuffle_bottleneck(x, w, *rest, **unit.options).sum())(weight)  # noqa: E731
    torch.testing.assert_close(run(se.ops), run(reference))


def test_networks():
    images, weights, program = Network((Unit(), Unit(stride=2))).arguments()
    batches = torch.stack([images, 2 * images])
    got = vmap(lambda x: network_op(x, weights, program))(batches)
    torch.testing.assert_close(got, torch.stack([network_op(x, weights, program) for x in batches]))


def fused_and_plain(kind):
    if kind == "own":
        fused = randomize(se.FusedShuffleBottleneck(24, 24, 1, 3)).eval()
        return fused, plain_twin(fused)
    plain = randomize(ForeignUnit(24, 48, 2)).eval()
    return se.fuse(copy.deepcopy(plain)), plain


@pytest.mark.parametrize("kind", ["own", "foreign"])
def test_gradients_of_each_sample(kind):
    def loss(parameters, x, module):
        return functional_call(module, parameters, (x[None],)).square().sum()

    fused, plain = fused_and_plain(kind)
    x = torch.randn(3, 24, 5, 6)
    parameters = {name: parameter.detach() for name, parameter in fused.named_parameters()}
    with assert_ran(OP):
        functional_call(fused, parameters, (x,))  # is no transform: it runs the op
    got, expected = (
        vmap(grad(lambda p, x, m=module: loss(p, x, m)), in_dims=(None, 0))(parameters, x) for module in (fused, plain)
    )
    assert list(got) == list(parameters)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4, msg=name)
        assert got[name].shape == (3, *parameters[name].shape)


def test_jacobians():
    fused, plain = (module.double() for module in fused_and_plain("own"))
    x = torch.randn(1, 24, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(jacfwd(fused)(x), jacfwd(plain)(x))


def test_compiled():
    fused, plain = fused_and_plain("own")
    x = torch.randn(3, 24, 5, 6)
    each = vmap(grad(lambda x: fused(x[None]).square().sum()))
    expected = vmap(grad(lambda x: plain(x[None]).square().sum()))(x)
    torch.testing.assert_close(torch.compile(each, fullgraph=True, backend="aot_eager")(x), expected)


def test_native_refuses():
    unit = Unit()
    x, *rest = unit.tensors()
    loss = lambda x: unit.native([x, *rest]).sum()  # noqa: E731
    with se.use_backend("native"), pytest.raises(RuntimeError, match=r"'native' was asked for, but torch\.func"):
        grad(loss)(x)
    grad(loss)(x)
