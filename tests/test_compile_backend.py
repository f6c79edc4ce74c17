"""torch.compile(model, backend="shufflenet_ext"): units become ops, everything else is inductor's."""

import copy
from importlib import metadata

import pytest
import torch
import torch.nn.functional as F
from support import randomize
from torch import nn

import shufflenet_ext as se
from benchmarks.public_styles import CifarStyle, CifarUnit
from shufflenet_ext._compile import _with_ops, backend


def test_it_is_registered():
    (entry,) = metadata.entry_points(group="torch_dynamo_backends", name="shufflenet_ext")
    assert entry.load() is backend


@pytest.mark.long  # inductor, twice
def test_eval_mode_runs_the_ops():
    model = randomize(CifarStyle()).eval()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    # At its second value dynamo makes a symbol of the batch, and at the third it has one graph for all.
    for batch in (2, 3, 5):
        x = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-4)
            with torch.profiler.profile() as profile:
                compiled(x)
        names = [event.name for event in profile.events()]
        assert names.count("shufflenet_ext::shuffle_bottleneck_batch_norm") == 4


def test_what_depends_on_the_sizes_is_left_to_inductor():
    class Strided(nn.Module):
        """A unit only where images have 6 to 8 rows."""

        def __init__(self):
            super().__init__()
            self.unit = CifarUnit(24, 40, 2, 1)

        def forward(self, x):
            unit, stride = self.unit, x.shape[2] // 3
            y = F.relu(unit.bn1(unit.conv1(x)))
            y = F.relu(unit.bn2(F.conv2d(y, unit.conv2.weight, None, stride, 1, 1, y.shape[1])))
            return F.relu(torch.cat([unit.bn3(unit.conv3(y)), unit.shortcut(x)], 1))

    def ops_alone(graph, example_inputs):
        found.append(len(_with_ops(graph).graph.nodes) < len(graph.graph.nodes))
        return graph.forward

    found = []
    for dynamic in (False, True):
        torch.compiler.reset()
        with torch.no_grad():
            torch.compile(Strided().eval(), backend=ops_alone, dynamic=dynamic)(torch.randn(2, 24, 7, 7))
    assert found == [True, False]


def test_gradients_in_eval_mode():
    model = randomize(CifarStyle()).eval()
    plain = copy.deepcopy(model)
    x = torch.randn(2, 3, 32, 32)
    torch.compile(model, backend=backend)(x).square().sum().backward()
    plain(x).square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-2, msg=name)


@pytest.mark.long  # inductor compiles for most of a minute
def test_training_is_pytorchs():
    model = randomize(CifarStyle())
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)


def test_a_model_without_units():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))


def test_own_units_are_ops_already():
    unit = randomize(se.FusedShuffleBottleneck(24, 24, 1, 3)).eval()
    x = torch.randn(2, 24, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(unit, backend=backend)(x), unit(x))
