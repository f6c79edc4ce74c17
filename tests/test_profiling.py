"""PyTorch's own tools see the ops: torch.utils.flop_counter counts them, torch.profiler names them."""

import pytest
import torch
from support import OPS, Network, Unit, network_op, plain_twin, randomize
from test_chain import STEM, UNITS, arguments
from torch.utils.flop_counter import FlopCounterMode

import shufflenet_ext as se
from shufflenet_ext import reference


def flop(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("stride", [1, 2])
def test_flop_of_the_ops(op, stride):
    unit = Unit(op, stride=stride, shuffle_groups=4 if op == OPS[1] else None)
    tensors = unit.tensors()
    got = flop(lambda: unit.native(tensors))
    assert got == flop(lambda: unit.reference(tensors)) > 0
    by_hand = 2 * 2 * (35 * 12 * 8 + (35 if stride == 1 else 12) * 12 * 9)  # two images, an addition a multiplication
    if op == OPS[0]:
        assert got == by_hand


def test_flop_of_a_network():
    network = Network((Unit(), Unit(stride=2, shortcut_first=True)), stem=(24, 3, 2, 1, 1), head=(5, 0), in_channels=3)
    arguments = network.arguments()
    got = flop(lambda: network_op(*arguments))
    assert got == flop(lambda: reference.shuffle_network(*arguments)) > 0


def test_flop_of_modules():
    unit = randomize(se.FusedShuffleBottleneck(24, 48, 2, 3)).eval()
    x = torch.randn(2, 24, 9, 7)
    with FlopCounterMode(display=False) as counter:
        unit(x)
    assert counter.get_total_flops() == flop(lambda: plain_twin(unit)(x)) > 0
    (counts,) = (counts for module, counts in counter.get_flop_counts().items() if "Bottleneck" in module)
    assert list(counts) == [torch.ops.shufflenet_ext.shuffle_bottleneck_batch_norm]
    optimized = se.optimize_for_inference(unit)
    assert flop(lambda: optimized(x)) == counter.get_total_flops()


def test_flop_of_a_backward_pass():
    # Frozen, it computes the unit once more, which is counted: it is done. Then it goes twice through each convolution,
    # for the gradients of its weight and of its input.
    unit = randomize(se.FusedShuffleBottleneck(24, 24, 1, 3)).eval()
    plain, x = plain_twin(unit), torch.randn(2, 24, 9, 7, requires_grad=True)
    assert flop(lambda: unit(x).sum().backward()) == 4 * flop(lambda: plain(x))
    assert flop(lambda: unit.train()(x).sum().backward()) == 3 * flop(lambda: plain(x))


def test_the_profiler_names_the_ops():
    units = [Unit(op) for op in OPS]
    tensors = [unit.tensors() for unit in units]
    arguments = Network((Unit(),)).arguments()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for unit, given in zip(units, tensors, strict=True):
            unit.native(given)
        network_op(*arguments)
    names = [event.name for event in profile.events()]
    for op in (*OPS, "shuffle_network"):
        assert names.count(f"shufflenet_ext::{op}") == 1


def test_flop_of_fused_networks():
    net = randomize(se.models.shufflenet_v1(width=0.25)).eval()
    x = torch.randn(2, 3, 33, 32)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            net(x)
        # By the hooks of all modules that it counts each one's with, so the network runs module by module.
        assert list(counter.get_flop_counts()["ShuffleNetV1.layer1.0"]) == [
            torch.ops.shufflenet_ext.shuffle_bottleneck_batch_norm
        ]
        with se.use_backend("reference"):
            assert counter.get_total_flops() == flop(lambda: net(x)) > 0


def test_flop_of_networks_as_one_op():
    given = arguments(Network(UNITS, STEM, (10, 0), in_channels=3))
    expected = flop(lambda: reference.shuffle_network_batch_norm(*given))
    assert flop(lambda: torch.ops.shufflenet_ext.shuffle_network_batch_norm(*given)) == expected > 0
