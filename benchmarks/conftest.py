"""The suites' options and fixtures."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor, nn

import shufflenet_ext as se
from benchmarks import memory, peaks, peers, shapes
from benchmarks.peers import Builder, Contender
from benchmarks.race import Row, outside_of_steps, race, work

QUICK = "g = 3 and two threads only, fewer rounds, only plain PyTorch as peer"
_SECONDS, _QUICK_SECONDS = 1.5, 0.7  # that a row is timed for
# The error of a network of ours may be so many times that of eager PyTorch in the same dtype. It may always be as large
# as the second number, as eager's ten outputs of a CIFAR network are now and then exact by luck.
_MOST_ERROR, _LEAST_LIMIT = 2, 4 * torch.finfo(torch.float32).eps


class Compete(Protocol):
    """Times ``ours`` against peers, which are built from ``plain`` or ``folded``, on ``x``; reports a row.

    ``left_out`` names those of ``builders`` that are not to take part, and why.
    """

    def __call__(
        self,
        suite: str,
        shape: shapes.UnitShape | shapes.NetworkShape,
        ours: dict[str, Contender],
        plain: nn.Module,
        folded: nn.Module,
        x: Tensor,
        builders: Mapping[str, Builder],
        left_out: Mapping[str, str] = {},
        precision: torch.dtype = torch.float32,
    ) -> None: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help=QUICK)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("quick")
    groups = shapes.QUICK_GROUPS if quick else shapes.GROUPS
    threads: tuple[int, ...] = shapes.THREADS[-1:]
    if "network" in metafunc.fixturenames:
        metafunc.parametrize("network", shapes.network_shapes(groups), ids=str)
        metafunc.parametrize("precision", (torch.float32, torch.bfloat16), ids=shapes.name_of)
        threads = threads if quick else shapes.THREADS
    if "unit" in metafunc.fixturenames:
        metafunc.parametrize("unit", shapes.unit_shapes(groups), ids=str)
    if "op_unit" in metafunc.fixturenames:
        metafunc.parametrize("op_unit", shapes.unit_shapes(shapes.QUICK_GROUPS), ids=str)
    if "profiled" in metafunc.fixturenames:
        metafunc.parametrize("profiled", shapes.profiled_shapes(), ids=str)
        threads = shapes.THREADS
    if "resident" in metafunc.fixturenames:
        left_out = peers.CONVERTED if quick else ()
        metafunc.parametrize("resident", [name for name in memory.CONTENDERS if name not in left_out])
    metafunc.parametrize("threads", threads, ids="threads{}".format)


@pytest.fixture(autouse=True)
def _conditions(threads: int) -> Iterator[None]:
    """Runs a row as inference on its threads. A call of ours that would not run native kernels raises."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with torch.no_grad(), se.use_backend("native"):
        yield
    torch.compiler.reset()  # otherwise each row's module counts towards the limit of recompilations


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
        builders: Mapping[str, Builder],
        left_out: Mapping[str, str] = {},
        precision: torch.dtype = torch.float32,
    ) -> None:
        passed_over = {*left_out, *(peers.CONVERTED if quick else ())}
        chosen = {name: builder for name, builder in builders.items() if name not in passed_over}
        built, absent = peers.build(chosen, plain, folded, x)
        if not built:
            pytest.skip("no peer takes part")
        flop, traffic = work(folded, x)
        row = Row(suite, shape.label, shape.groups, shape.batch, flop, traffic, peaks.copy_bandwidth(traffic))
        row.absent = {**left_out, **absent}
        row.precision, row.threads = shapes.name_of(precision), torch.get_num_threads()
        benchmark.group = suite
        race(benchmark, ours | built, plain, x, precision, row, _QUICK_SECONDS if quick else _SECONDS)
        is_network = isinstance(shape, shapes.NetworkShape)
        if is_network and shape.batch == 1:
            row.outside = outside_of_steps(ours[peers.OURS])
        request.node.user_properties.append(("row", row))
        error, limit = row.errors[peers.OURS], max(_MOST_ERROR * row.errors[peers.EAGER], _LEAST_LIMIT)
        assert error <= limit or not is_network, f"error: ours is {error:.3g}, expected at most {limit:.3g}"

    return run
