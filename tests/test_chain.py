"""shuffle_bottleneck_chain, the op behind optimize_for_inference: equal to its units one by one, bit for bit."""

from dataclasses import replace

import pytest
import torch
from support import DTYPES, LAYOUTS, Unit, autocast

from shufflenet_ext import reference

UNITS = [
    Unit(groups=3, in_channels=24, mid_channels=12, out_channels=36, stride=2),
    Unit(groups=3, in_channels=60, mid_channels=24, conv2_relu=True),
    Unit(groups=2, in_channels=60, mid_channels=6, out_channels=20, stride=2, pool_count_include_pad=False),
]
chain_op = torch.ops.shufflenet_ext.shuffle_bottleneck_chain


def chain(dtype=torch.float32):
    """The parameters and options of UNITS."""
    parameters, options = [], []
    for unit in UNITS:
        parameters += unit.tensors(dtype)[1:]
        o = unit.options
        options += [o["conv1_groups"], o["groups"], o["stride"], o["conv2_relu"], o["pool_count_include_pad"]]
    return parameters, [int(option) for option in options]


def images(batch, plane, dtype=torch.float32, layout=torch.contiguous_format):
    return replace(UNITS[0], batch=batch, plane=plane).tensors(dtype, layout)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plane", [(28, 28), (1, 1), (9, 14)], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 2, 5])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_equals_its_units_one_by_one(isa, threads, batch, plane, dtype, layout):
    torch.set_num_threads(threads)
    x = images(batch, plane, dtype, layout)
    parameters, options = chain(dtype)
    got = chain_op(x, parameters, options)
    expected = x
    for i, unit in enumerate(UNITS):
        expected = unit.native([expected, *parameters[6 * i : 6 * i + 6]])
    assert torch.equal(got, expected)
    assert got.stride() == expected.stride()


def test_equals_the_reference():
    x = images(2, (14, 14))
    torch.testing.assert_close(chain_op(x, *chain()), reference.shuffle_bottleneck_chain(x, *chain()))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_opcheck(layout):
    torch.library.opcheck(chain_op.default, (images(2, (9, 7), layout=layout), *chain()))


def test_autocast():
    with autocast(torch.bfloat16):
        got = chain_op(images(1, (8, 8)), *chain())
    parameters, options = chain()
    halves = [tensor.bfloat16() for tensor in parameters]
    assert torch.equal(got, chain_op(images(1, (8, 8)).bfloat16(), halves, options))


@pytest.mark.parametrize("run", [chain_op, reference.shuffle_bottleneck_chain])
def test_bad_arguments(run):
    x = images(1, (8, 8))
    parameters, options = chain()
    for bad in ([], options[:-1], options[:5]):
        with pytest.raises((RuntimeError, ValueError), match=r"parameters, options: got .* expected 6 and 5 for each"):
            run(x, parameters, bad)
    # The unit takes 60 channels, not 24.
    with pytest.raises((RuntimeError, ValueError), match=r"conv1_weight: got shape \[24, 20, 1, 1\], expected"):
        run(x, parameters[6:], options[5:])
