"""Runs steps, each within a limit of its own, and keeps what they say. Only the standard library is imported."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

_POLL_S = 0.05
_SHOWN_EVERY_S = 10.0
_LAST_WAIT_S = 5.0  # for a killed process; one that a card holds may never end
_TEXT_KEPT = 20_000  # characters of each step's output, from its end

Row = dict[str, Any]
Show = Callable[[str], None]


@dataclass(frozen=True)
class Step:
    """A command that is killed, with all that it started, after ``limit`` seconds.

    Each line of its output that is a JSON object is a row; a row whose ``ok`` is false is a failure of the step.
    ``needs`` are programs without which it cannot run.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    needs: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What became of a step: ``status`` is ok, failed, killed or missing, and ``cause`` says why where it is not ok."""

    name: str
    status: str
    cause: str = ""
    seconds: float = 0
    rows: list[Row] = field(default_factory=list)
    text: str = ""


def rows_of(output: str) -> list[Row]:
    """The lines that are JSON objects. A last line may have been cut off."""
    found = []
    for line in output.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return found


def run(step: Step, folder: Path, environment: Mapping[str, str], deadline: float, show: Show) -> Outcome:
    """Runs a step in a folder, until its limit or the deadline (of time.monotonic), whichever is first."""
    path = environment.get("PATH")
    missing = [name for name in step.needs if shutil.which(name, path=path) is None]
    limit = min(step.limit, deadline - time.monotonic())
    if missing or limit <= 0:
        outcome = Outcome(step.name, "missing", f"no {', '.join(missing)} here" if missing else "no time was left")
        show(f"{step.name}: {outcome.cause}")
        return outcome
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that what it starts can be killed with it
            )
        except OSError as error:
            return Outcome(step.name, "failed", str(error))
        in_time = _wait(process, start + limit, output, step, show)
        kill(process)  # also what it left running
        seconds = time.monotonic() - start
        text = _read(output)
    rows = rows_of(text)
    wrong = [row for row in rows if row.get("ok") is False]
    if not in_time:
        status, cause = "killed", f"at its limit of {limit:.0f} s"
    elif process.returncode != 0:
        status, cause = "failed", f"ended with {process.returncode}"
    else:
        status, cause = ("failed", "") if wrong else ("ok", "")
    if wrong:
        cause = f"{cause}; {len(wrong)} of {len(rows)} wrong".removeprefix("; ")
    outcome = Outcome(step.name, status, cause, seconds, rows, text[-_TEXT_KEPT:])
    show(f"{step.name}: {status}{f' ({cause})' if cause else ''} in {seconds:.1f} s, {len(rows)} rows")
    return outcome


def _wait(process: "subprocess.Popen[bytes]", until: float, output: BinaryIO, step: Step, show: Show) -> bool:
    """Waits for a process, saying now and then how far it is. False where it takes too long."""
    shown = time.monotonic()
    while process.poll() is None:
        if time.monotonic() >= until:
            return False
        if time.monotonic() - shown >= _SHOWN_EVERY_S:
            shown = time.monotonic()
            show(f"{step.name}: {len(rows_of(_read(output)))} rows, {until - shown:.0f} s left")
        time.sleep(_POLL_S)
    return True


def _read(output: BinaryIO) -> str:
    # Not by seeking: the process writes at the same file's position.
    size = os.fstat(output.fileno()).st_size
    return os.pread(output.fileno(), size, 0).decode(errors="replace")


def kill(process: "subprocess.Popen[bytes]") -> None:
    """Kills what is left of a process's session, and does not wait for what cannot be killed."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_LAST_WAIT_S)


def run_all(
    groups: list[tuple[Step, ...]],
    folder: Path,
    environment: Mapping[str, str],
    total: float,
    show: Show,
    keep: Callable[[list[Outcome]], None],
) -> list[Outcome]:
    """Runs groups of steps one behind the other, those of a group side by side, in ``total`` seconds at most.

    ``keep`` gets all outcomes so far behind each group.
    """
    deadline = time.monotonic() + total
    outcomes: list[Outcome] = []
    for group in groups:
        with ThreadPoolExecutor(len(group)) as pool:
            outcomes += pool.map(lambda step: run(step, folder, environment, deadline, show), group)
        keep(outcomes)
    return outcomes
