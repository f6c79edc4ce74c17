"""All distinct units of the paper's networks."""

from benchmarks import peers
from benchmarks.conftest import Compete
from benchmarks.shapes import QUICK_GROUPS, UnitShape


def bench_unit(unit: UnitShape, compete: Compete) -> None:
    module, x = unit.build()
    plain, folded = peers.plain_copy(module), peers.folded_copy(module)
    left_out = {}
    if unit.groups not in QUICK_GROUPS:
        left_out[peers.COMPILED] = f"only in rows at g = {QUICK_GROUPS[0]}"
    compete("units", unit, peers.ours(module, x), plain, folded, x, peers.OF_UNITS, left_out)
