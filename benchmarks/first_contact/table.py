"""The end of a first contact: one short table. Only the standard library is imported."""

from collections.abc import Iterable, Iterator
from itertools import product
from statistics import geometric_mean
from typing import Any

from benchmarks.first_contact.cases import LAYOUTS, PaperUnit, line
from benchmarks.first_contact.runner import Outcome, Row

_DTYPE = "float16"  # what there are targets for, at batch 64


def _rows(outcomes: Iterable[Outcome], name: str) -> list[Row]:
    return [row for outcome in outcomes if outcome.name == name for row in outcome.rows]


def _by_case(rows: list[Row]) -> dict[str, Row]:
    return {row["case"]: row for row in rows if row.get("ok") and "case" in row}


def _by_unit(rows: list[Row]) -> dict[tuple[Any, ...], Row]:
    return {(row["unit"], row["dtype"], row["layout"], row["batch"]): row for row in rows if "batch" in row}


def _us(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _ratio(value: float | None, to: float | None) -> str:
    return "–" if not value or not to else f"{value / to:.2f}"


def _best_plan(plans: dict[str, Row], case: str) -> float | None:
    return min((row["us"] for cut, row in plans.items() if cut.startswith(case + " ")), default=None)


def lines(
    machine: dict[str, str], outcomes: list[Outcome], seconds: float, units: Iterable[PaperUnit], batch: int
) -> Iterator[str]:
    """Yields the table: each step's end, what was wrong, and the float16 units' times at a batch with their ratios."""
    yield "# First contact"
    yield ""
    yield from (f"- {name}: {value}" for name, value in machine.items())
    yield f"- {seconds:.0f} s in all"
    yield ""
    yield "| step | | rows | seconds |"
    yield "|---|---|--:|--:|"
    for outcome in outcomes:
        cause = f": {outcome.cause}" if outcome.cause else ""
        yield f"| {outcome.name} | {outcome.status}{cause} | {len(outcome.rows)} | {outcome.seconds:.1f} |"
    yield ""
    wrong = [(outcome.name, row) for outcome in outcomes for row in outcome.rows if row.get("ok") is False]
    rows = sum(len(outcome.rows) for outcome in outcomes)
    yield f"**{len(wrong)} of {rows} rows are wrong.**" if wrong else f"Nothing is wrong in {rows} rows."
    yield from (f"- {name}: {row}" for name, row in wrong[:10])
    yield ""
    yield from _times(outcomes, units, batch)


def _times(outcomes: list[Outcome], units: Iterable[PaperUnit], batch: int) -> Iterator[str]:
    times, copies = (_by_case(_rows(outcomes, f"driver: {name}")) for name in ("times", "copies"))
    plans = _by_case(_rows(outcomes, "driver: plans"))
    torch, model = (_by_unit(_rows(outcomes, name)) for name in ("torch: times", "model"))
    compiled = _by_unit(_rows(outcomes, "torch: torch.compile"))
    yield (
        f"{_DTYPE}, batch {batch}, µs: the kernel alone and a copy of as many bytes by the driver; the rest by torch. "
        "Ratios are to ours beside them. Best plan: the fastest of all, against the planner's."
    )
    yield ""
    columns = ["unit", "layout", "kernel", "× copy", "× model", "best plan", "ours", "eager", "folded", "torch.compile"]
    yield f"| {' | '.join(columns)} |"
    yield "|---|---|" + "--:|" * (len(columns) - 2)
    for layout, unit in product(LAYOUTS, units):
        case, key = line(unit.case(_DTYPE, layout, batch)), (unit.label, _DTYPE, layout, batch)
        kernel, copied = times.get(case, {}).get("us"), copies.get(case, {}).get("us")
        row = torch.get(key, {})
        ours = row.get("ours")
        cells = [unit.label, layout, _us(kernel), _ratio(kernel, copied)]
        cells += [
            _ratio(kernel, model.get(key, {}).get("predicted")),
            _ratio(_best_plan(plans, case), kernel),
            _us(ours),
        ]
        cells += [_ratio(row.get(name), ours) for name in ("eager", "folded")]
        cells += [_ratio(compiled.get(key, {}).get("compiled"), ours)]
        yield f"| {' | '.join(cells)} |"
    ratios: dict[str, list[float]] = {}
    for case, row in times.items():
        if case in copies:
            words = dict(word.split("=") for word in case.split())
            ratios.setdefault(f"{words['dtype']} {words['layout']} batch {words['n']}", []).append(
                row["us"] / copies[case]["us"]
            )
    if ratios:
        yield ""
        yield "Kernels against a copy of as many bytes, geometric means over the units:"
        yield ""
        yield from (f"- {name}: {geometric_mean(values):.2f}" for name, values in ratios.items())
    for row in _rows(outcomes, "torch: torch.compile"):
        if "max_autotune" in row:
            yield ""
            yield f"16 units: ours {row['ours']:.0f} µs, torch.compile max-autotune {row['max_autotune']:.0f} µs."
