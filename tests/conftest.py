"""Fixtures. Without the native library no test runs: nothing here may pass by falling back to the reference."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import DTYPES, ISAS, Network, Processes, Unit, covering, network_op, selected_isa
from torch import Tensor

from shufflenet_ext import _backend, _native, use_backend

# For what tests share with benchmarks/. Last, so that an installed shufflenet_ext comes before the checkout's.
sys.path.append(str(Path(__file__).parents[1]))

if _native.native_error is not None:
    raise pytest.UsageError(f"the tests need the native library, but {_native.native_error}")


def axes_of(item: pytest.Function) -> list[tuple[int, ...]]:
    """Which values a test was given: of each parametrize, which may name several arguments, and of each fixture."""
    given = {name: id(value) for name, value in item.callspec.params.items()}
    axes = []
    for mark in item.iter_markers("parametrize"):
        names = [mark.args[0]] if isinstance(mark.args[0], str) else mark.args[0]
        axes.append(tuple(given.pop(name) for name in names))
    return axes + [(value,) for value in given.values()]


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what -m names
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as long what the short suite leaves out of the tests' matrices: it takes every pair of two axes' values.

    Where a test says @pytest.mark.covering(1), it takes every value once.
    """
    matrices: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            matrices.setdefault(item.nodeid.split("[")[0], []).append(item)
    for matrix in matrices.values():
        marker = matrix[0].get_closest_marker("covering")
        cases = [axes_of(item) for item in matrix]
        chosen = covering(cases, marker.args[0] if marker else 2)
        for i, item in enumerate(matrix):
            if i not in chosen:
                item.add_marker("long")


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
    torch.default_generator.manual_seed(0)  # torch.manual_seed also asks for the stack, which takes milliseconds


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, no TF32 for float32, PyTorch's included, unless a test asks for it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this processor can run and that has kernels of its own for all ops, selected."""
    with selected_isa(request.param):
        yield request.param


@pytest.fixture(
    params=[
        pytest.param((isa, dtype), id=f"{isa}-{dtype}")
        for isa in _native.cpu_isas()
        for dtype in DTYPES
        if isa in ISAS or dtype == torch.bfloat16
    ]
)
def program_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Each dtype of a program's x and weights, with each instruction set that has kernels of its own for it."""
    isa, dtype = request.param
    with selected_isa(isa):
        yield dtype


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small units, many of them: a thread start would be most of the time. test_threads.py sets other numbers."""
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(previous)


@pytest.fixture(scope="session")
def poisoned() -> tuple[Unit, list[Tensor], tuple[Tensor, Tensor, list[int]]]:
    """A unit with its tensors and a network's arguments whose images are NaN."""
    unit = Unit(groups=1, batch=1, in_channels=16, mid_channels=32, out_channels=16, plane=(24, 24))
    x, *weights = unit.tensors(torch.bfloat16)  # the dtypes that are staged use most scratch memory
    network = Network((replace(unit, groups=2), unit, unit), batch=1, plane=unit.plane)
    images, packed, program = network.arguments(torch.float64)
    return unit, [torch.full_like(x, torch.nan), *weights], (torch.full_like(images, torch.nan), packed, program)


@pytest.fixture
def poison(one_thread: None, poisoned: tuple[Unit, list[Tensor], tuple[Tensor, Tensor, list[int]]]) -> None:
    """Leaves NaN in this thread's scratch memory and in freed memory, for whoever reads what it did not write."""
    unit, tensors, arguments = poisoned
    unit.native(tensors)
    for threads in (2, 1):  # what a thread shares with others, and what it has for itself
        torch.set_num_threads(threads)
        network_op(*arguments)
    blocks = [torch.full((2**exponent,), torch.nan) for exponent in range(4, 13) for _ in range(4)]
    del blocks


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    processes = Processes(tmp_path_factory.mktemp("processes"), 2)
    yield processes
    processes.close()
