"""``make first-contact``: what a card shows within eight minutes. See docs/first-contact.md.

Only the standard library is imported: what needs torch runs in processes of its own.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.cuda_toolkit import ROOT
from benchmarks.first_contact import build, cases, steps, table
from benchmarks.first_contact.runner import Outcome, Show, Step, run_all
from benchmarks.first_contact.steps import Card

_RESULTS = Path(__file__).parents[1] / "results"


def as_json(machine: dict[str, str], outcomes: list[Outcome]) -> str:
    """All but the steps' text, with a line for each row."""

    def step(outcome: Outcome) -> str:
        rows = ",\n".join(map(json.dumps, outcome.rows))
        head = json.dumps({"name": outcome.name, "status": outcome.status, "cause": outcome.cause})
        return f'{head[:-1]}, "seconds": {outcome.seconds:.2f}, "rows": [\n{rows}\n]}}'

    steps = ",\n".join(map(step, outcomes))
    return f'{{"machine": {json.dumps(machine)}, "steps": [\n{steps}\n]}}\n'


def contact(
    card: Card, groups: list[tuple[Step, ...]], work: Path, output: Path, total: float, show: Show
) -> list[Outcome]:
    """Runs the steps, and writes results.json, log.txt and table.md to ``output``, anew behind each group of them."""
    output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    rehearse = card.arch == build.HOST
    units, batch = (cases.TINY_UNITS, 1) if rehearse else (cases.UNITS, 64)
    machine = {
        "card": card.name,
        "compute capability": card.arch,
        "driver": card.driver,
        "highest clocks": card.clocks,
        "python": sys.version.split()[0],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }

    def keep(outcomes: list[Outcome]) -> None:
        (output / "results.json").write_text(as_json(machine, outcomes))
        text = "".join(f"== {o.name}: {o.status} {o.cause}\n{o.text}\n" for o in outcomes)
        (output / "log.txt").write_text(text)
        written = "\n".join(table.lines(machine, outcomes, time.monotonic() - start, units, batch))
        (output / "table.md").write_text(written + "\n")

    # Steps find the package in the folder that they run in: the one that is built, or the checkout's in a rehearsal.
    folder = ROOT if rehearse else work / build.PACKAGE
    folder.mkdir(exist_ok=True)
    outcomes = run_all(groups, folder, steps.environment(), total, show, keep)
    show((output / "table.md").read_text())
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    """Returns an exit code: 1 where there is no card or a step is not ok."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_contact", description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        help="folder of the results (default: benchmarks/results/cuda-CARD-DATE, or build/first-contact)",
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="without a card: kernels run on the CPU, on small units"
    )
    options = parser.parse_args(arguments)
    card = steps.HOST if options.rehearse else steps.find_card()
    if card is None:
        print("there is no card that nvidia-smi knows of; --rehearse does without one", file=sys.stderr)
        return 1
    words = re.findall(r"[a-z0-9]+", card.name.lower().removeprefix("nvidia"))
    name = "-".join(["cuda", *words, datetime.now(timezone.utc).strftime("%Y-%m-%d")])
    output: Path = options.output or (ROOT / "build" / "first-contact" if options.rehearse else _RESULTS / name)
    start = time.monotonic()
    show: Callable[[str], None] = lambda text: print(f"[{time.monotonic() - start:4.0f} s] {text}", flush=True)  # noqa: E731
    show(f"{card.name}: results go to {output}")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        outcomes = contact(card, steps.steps(card, work), work, output.resolve(), steps.TOTAL_S, show)
    return 0 if all(outcome.status == "ok" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
