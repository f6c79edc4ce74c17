"""The suites' options and fixtures."""

from collections.abc import Iterator
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor, nn

import shufflenet_ext as se
from benchmarks import peaks, peers, shapes
from benchmarks.peers import Contender
from benchmarks.race import Row, race, work

_SECONDS, _QUICK_SECONDS = 2.0, 0.7  # of timing a row


class Compete(Protocol):
    """Times ``ours`` against the named peers, which run ``plain`` or ``folded``, on ``x``; reports a row."""

    def __call__(
        self,
        suite: str,
        shape: shapes.UnitShape | shapes.NetworkShape,
        ours: dict[str, Contender],
        plain: nn.Module,
        folded: nn.Module,
        x: Tensor,
        names: tuple[str, ...] = tuple(peers.ALL),
    ) -> None: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="g = 3 only, fewer rounds, only plain PyTorch as peers")
    parser.addoption("--threads", type=int, default=2, help="threads of every contender (default: 2)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    groups = shapes.QUICK_GROUPS if metafunc.config.getoption("quick") else shapes.GROUPS
    if "network" in metafunc.fixturenames:
        metafunc.parametrize("network", shapes.network_shapes(groups), ids=str)
    if "unit" in metafunc.fixturenames:
        metafunc.parametrize("unit", shapes.unit_shapes(groups), ids=str)
    if "op_unit" in metafunc.fixturenames:
        metafunc.parametrize("op_unit", shapes.unit_shapes(shapes.QUICK_GROUPS), ids=str)


@pytest.fixture(autouse=True)
def _conditions(request: pytest.FixtureRequest) -> Iterator[None]:
    """Inference on the threads asked for; a call of ours that is not native raises instead of falling back."""
    torch.set_num_threads(request.config.getoption("threads"))
    torch.manual_seed(0)
    with torch.no_grad(), se.use_backend("native"):
        yield
    torch.compiler.reset()  # else each row's module counts towards the limit of recompilations


@pytest.fixture
def compete(request: pytest.FixtureRequest, benchmark: Any) -> Compete:
    quick = request.config.getoption("quick")

    def run(
        suite: str,
        shape: shapes.UnitShape | shapes.NetworkShape,
        ours: dict[str, Contender],
        plain: nn.Module,
        folded: nn.Module,
        x: Tensor,
        names: tuple[str, ...] = tuple(peers.ALL),
    ) -> None:
        if quick:
            names = tuple(name for name in names if name not in peers.CONVERTED)
        built, absent = peers.build(names, plain, folded, x)
        flop, traffic = work(folded, x)
        bandwidth = peaks.copy_bandwidth(traffic)
        row = Row(suite, shape.label, shape.groups, shape.batch, flop, traffic, bandwidth, absent=absent)
        benchmark.group = suite
        race(benchmark, ours | built, row, _QUICK_SECONDS if quick else _SECONDS)
        request.node.user_properties.append(("row", row))

    return run
