"""Runs the suites and writes the report: ``python -m benchmarks [--quick]``, from the repository's root."""

import argparse
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import peaks, report
from benchmarks.conftest import QUICK
from benchmarks.memory import Growth
from benchmarks.peers import CONVERTED, OURS
from benchmarks.profile import Profile
from benchmarks.race import Row, best_peer
from benchmarks.shapes import THREADS

_RESULTS = Path(__file__).parent / "results"


class Display:
    """A pytest plugin that shows progress instead of the terminal reporter, and gathers results and failures."""

    def __init__(self, console: Console) -> None:
        self.rows: list[Row] = []
        self.memory: list[Growth] = []
        self.profiles: list[Profile] = []
        self.failed: list[str] = []
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("collecting", total=None)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._progress.update(self._task, total=len(session.items))
        self._progress.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._progress.update(self._task, description=nodeid.partition("::")[2].removeprefix("bench_"))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._fail(report)
        if report.when == "call":
            for _, value in report.user_properties:
                if isinstance(value, Row):
                    self.rows.append(value)
                    self._console.print(_line(value), highlight=False, soft_wrap=True)
                elif isinstance(value, Growth):
                    self.memory.append(value)
                elif isinstance(value, Profile):
                    self.profiles.append(value)
            self._progress.advance(self._task)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._fail(report)

    def pytest_sessionfinish(self) -> None:
        self._progress.stop()

    def _fail(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        self.failed.append(report.nodeid)
        self._console.print(f"FAILED {report.nodeid}\n{report.longreprtext}", style="red", markup=False, soft_wrap=True)


def _line(row: Row) -> str:
    best = best_peer(row)
    return (
        f"{row.suite:32} g={row.groups} {row.label:22} batch {row.batch:<3} threads {row.threads} {row.precision:8} "
        f"{row.timings[OURS].median * 1e3:8.3f} ms  {row.timings[best].ratio:6.2f}× {best}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the suites; returns an exit code: 0, or 1 if a row failed, which is never a matter of time taken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=QUICK)
    parser.add_argument("-k", metavar="EXPRESSION", default="", help="only the benchmarks that match, as for pytest -k")
    parser.add_argument("--output", type=Path, default=_RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--redraw", action="store_true", help="only write the report again, from the results there")
    options = parser.parse_args(arguments)
    if options.redraw:
        report.write(report.load(options.output), options.output)
        return 0

    start = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    console = Console(file=os.fdopen(os.dup(sys.stdout.fileno()), "w"))  # pytest captures the other one
    machine = report.machine()
    console.print("\n".join(machine.values()), highlight=False, soft_wrap=True)
    before = [peaks.fma_peak(threads) for threads in THREADS]
    display = Display(console)
    pytest_arguments = [
        str(Path(__file__).parent),
        *("-p", "no:terminal", "-p", "no:cacheprovider", "-k", options.k),
        *("-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", "-o", "addopts="),
        *("--benchmark-disable-gc", f"--benchmark-json={options.output / 'pytest-benchmark.json'}"),
        *(["--quick"] if options.quick else []),
    ]
    code = pytest.main(pytest_arguments, plugins=[display])
    after = [peaks.fma_peak(threads) for threads in THREADS]
    torch.set_num_threads(THREADS[-1])
    seconds = time.perf_counter() - start
    if not (display.rows or display.memory or display.profiles):
        console.print("nothing was measured")
        return 1
    results = report.Results(
        machine=machine,
        seconds=seconds,
        # Measured before and after the rows, in case one of the two was disturbed.
        fma_peaks={threads: max(measured) for threads, *measured in zip(THREADS, before, after, strict=True)},
        copy_bandwidth=peaks.copy_bandwidth(2**29),
        left_out=list(CONVERTED) if options.quick else [],
        failed=display.failed,
        rows=display.rows,
        memory=display.memory,
        profiles=display.profiles,
    )
    for path in report.write(results, options.output):
        console.print(f"wrote {path}")
    console.print(f"{len(display.rows)} rows, {len(display.failed)} failed, in {seconds:.0f} s")
    return 1 if display.failed or code != pytest.ExitCode.OK else 0


if __name__ == "__main__":
    sys.exit(main())
