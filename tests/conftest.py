"""Fixtures. Without the native library no test runs: nothing here may pass by falling back to the reference."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import Network, Unit, network_op

from shufflenet_ext import _backend, _native, use_backend

# For what tests share with benchmarks/. Last, so that an installed shufflenet_ext comes before the checkout's.
sys.path.append(str(Path(__file__).parents[1]))

if _native.native_error is not None:
    raise pytest.UsageError(f"the tests need the native library, but {_native.native_error}")


@pytest.fixture(autouse=True)
def native_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A call that would fall back to the reference is an error, unless a test asks for another backend.

    No cause has been warned of yet, whatever tests ran before.
    """
    monkeypatch.setattr(_backend, "_warned", set())
    with use_backend("native"):
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, no TF32 for float32, PyTorch's included, unless a test asks for it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=_native.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set with kernels that this processor can run, selected."""
    previous = _native.build_info()["cpu_isa"]
    _native.select_cpu_isa(request.param)
    assert _native.build_info()["cpu_isa"] == request.param
    yield request.param
    _native.select_cpu_isa(previous)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small units, many of them: a thread start would be most of the time. test_threads.py sets other numbers."""
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(previous)


@pytest.fixture
def poison(one_thread: None) -> None:
    """Leaves NaN in this thread's scratch memory and in freed memory, for whoever reads what it did not write."""
    unit = Unit(groups=1, batch=1, in_channels=16, mid_channels=32, out_channels=16, plane=(24, 24))
    x, *weights = unit.tensors(torch.bfloat16)  # the dtypes that are staged use most scratch memory
    unit.native([torch.full_like(x, torch.nan), *weights])
    network = Network((replace(unit, groups=2), unit, unit), batch=1, plane=unit.plane)
    x, packed, program = network.arguments(torch.float64)
    for threads in (2, 1):  # what a thread shares with others, and what it has for itself
        torch.set_num_threads(threads)
        network_op(torch.full_like(x, torch.nan), packed, program)
    blocks = [torch.full((2**exponent,), torch.nan) for exponent in range(4, 13) for _ in range(4)]
    del blocks
