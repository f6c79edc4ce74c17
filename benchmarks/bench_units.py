"""All distinct units of the paper's networks."""

from benchmarks import peers
from benchmarks.conftest import Compete
from benchmarks.shapes import UnitShape


def bench_unit(unit: UnitShape, compete: Compete) -> None:
    module, x = unit.build()
    compete("units", unit, peers.ours(module, x), peers.plain_copy(module), peers.folded_copy(module), x)
