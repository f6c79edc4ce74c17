"""torch.compile(model, backend="shufflenet_ext"): units become ops, everything else is inductor's."""

import copy
from importlib import metadata

import pytest
import torch
from support import randomize
from torch import nn

import shufflenet_ext as se
from benchmarks.public_styles import CifarStyle
from shufflenet_ext._compile import backend


def test_it_is_registered():
    (entry,) = metadata.entry_points(group="torch_dynamo_backends", name="shufflenet_ext")
    assert entry.load() is backend


@pytest.mark.long  # inductor, twice
def test_eval_mode_runs_the_ops():
    model = randomize(CifarStyle()).eval()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-4)
        with torch.profiler.profile() as profile:
            compiled(x)
        names = [event.name for event in profile.events()]
        assert names.count("shufflenet_ext::shuffle_bottleneck_batch_norm") == 4
        x = torch.randn(3, 3, 32, 32)  # which makes the batch a symbol, with which nothing is replaced
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-4)


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
