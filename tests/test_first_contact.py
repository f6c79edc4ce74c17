"""The first contact with a card, rehearsed without one: kernels run on the CPU in its place, on small units."""

import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from compiled import compiled
from test_cuda_host import pytestmark as needs_a_compiler

from benchmarks import cuda_units
from benchmarks.cuda_toolkit import KERNEL, ROOT
from benchmarks.first_contact import cases, driver, profile, runner, steps, table
from benchmarks.first_contact.__main__ import contact, main
from benchmarks.first_contact.runner import Outcome, Step, run_all
from benchmarks.first_contact.steps import Card

HERE = ROOT / "benchmarks" / "first_contact"


def python(name: str, code: str, limit: float = 10, needs: tuple[str, ...] = ()) -> Step:
    return Step(name, (sys.executable, "-c", code), limit, needs)


def run(*groups: tuple[Step, ...], total: float = 30) -> tuple[dict[str, Outcome], list[str]]:
    said: list[str] = []
    outcomes = run_all(list(groups), ROOT, steps.environment(), total, said.append, lambda outcomes: None)
    return {outcome.name: outcome for outcome in outcomes}, said


# ---- The runner -----------------------------------------------------------------------------------------------------


def test_a_step_that_fails_or_hangs_does_not_stop_the_others(tmp_path: Path) -> None:
    # The hanging one has a child that hangs, too, and holds on to its output.
    child = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {PERSISTENT!r}, {str(tmp_path / 'alive')!r}])"
    )
    start = time.monotonic()
    found, said = run(
        (python("crash", "print('{\"n\": 1}', flush=True); import os; os.abort()"), python("hang", child, limit=1.5)),
        (python("missing", "", needs=("no-such-program",)),),
        (python("wrong", "print('{\"ok\": false}'); print('{\"ok\": true}'); print('{\"cut')"),),
        (python("right", "print('text'); print('{\"ok\": true}')"),),
    )
    assert time.monotonic() - start < 10
    assert [(outcome.name, outcome.status, outcome.cause) for outcome in found.values()] == [
        ("crash", "failed", "ended with -6"),
        ("hang", "killed", "at its limit of 2 s"),
        ("missing", "missing", "no no-such-program here"),
        ("wrong", "failed", "1 of 2 wrong"),
        ("right", "ok", ""),
    ]
    assert found["crash"].rows == [{"n": 1}]
    assert "text" in found["right"].text
    assert len(said) == 5
    alive = tmp_path / "alive"
    before = alive.read_text()
    time.sleep(0.3)
    assert alive.read_text() == before, "the hanging step's child still runs"


# A program that nothing but SIGKILL ends, and that says all the time that it runs.
PERSISTENT = """
import signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
while True:
    open(sys.argv[1], "w").write(str(time.monotonic()))
    time.sleep(0.02)
"""


def test_all_steps_together_have_a_limit() -> None:
    sleep = "import time; time.sleep(30)"
    start = time.monotonic()
    found, _ = run((python("long", sleep, limit=40),), (python("late", sleep, limit=40),), total=1)
    assert time.monotonic() - start < 5
    assert found["long"].status == "killed"
    assert (found["late"].status, found["late"].cause) == ("missing", "no time was left")


def test_a_program_that_does_not_start() -> None:
    found, _ = run((Step("none", ("/no/such/program",), 5),))
    assert found["none"].status == "failed"
    assert "/no/such/program" in found["none"].cause


# ---- The driver's answers -------------------------------------------------------------------------------------------

FAKE_DRIVER = """
import os, sys, time
for line in sys.stdin:
    if "crash" in line:
        os.abort()
    if "hang" in line:
        time.sleep(60)
    print('{"case": "' + line.strip() + '", "ok": true}', flush=True)
"""


def test_a_case_that_ends_or_holds_the_driver_is_one_failure() -> None:
    lines = ["a", "crash", "b", "hang", "c"]
    rows = [json.loads(answer) for answer in driver.answers([sys.executable, "-c", FAKE_DRIVER], lines, seconds=1)]
    assert [(row["case"], row["ok"]) for row in rows] == [
        ("a", True),
        ("crash", False),
        ("b", True),
        ("hang", False),
        ("c", True),
    ]
    assert rows[1]["what"] == "the driver ended, or took more than 1 s"


def test_a_driver_that_answers_nothing_is_given_up() -> None:
    answers = driver.answers([sys.executable, "-c", FAKE_DRIVER], ["crash"] * 9, seconds=5)
    with pytest.raises(RuntimeError, match="5 cases ended the driver; 4 are left"):
        list(answers)


def test_ncus_table_is_read() -> None:
    said = "\n".join(
        [
            "==PROF== Connected to process 1",
            '"ID","Kernel Name","smsp__inst_executed.sum","sm__inst_executed.avg.per_cycle_active"',
            '"","","inst","inst/cycle"',
            '"0","unit_kernel","2,920,000","2.1"',
        ]
    )
    assert profile.rows_of(said) == [
        {"kernel": "unit_kernel", "instructions": "2,920,000 inst", "ipc": "2.1 inst/cycle"}
    ]
    assert profile.rows_of("==ERROR== ERR_NVGPUCTRPERM") == []


# ---- The cases ------------------------------------------------------------------------------------------------------


def test_the_units_are_the_papers() -> None:
    expected = {
        label: cuda_units.Unit(
            **{"batch": 64, "in_channels": unit.in_channels, "height": unit.size, "width": unit.size},
            **{"mid_channels": unit.mid_channels, "out_channels": unit.out_channels},
            **{"conv1_groups": unit.conv1_groups, "groups": 3, "stride": unit.stride},
        )
        for label, unit in ((unit.label, unit) for unit in cases.UNITS)
    }
    assert cuda_units.paper_units(64) == expected


def test_the_cases_are_what_was_asked_for() -> None:
    assert len(list(cases.timed(False))) == 6 * 4 * 2 * 4
    assert len(list(cases.sanitized(False))) == 12
    assert len(list(cases.profiled(False))) == 3
    planned = [cases.line(case) for case in cases.planned(False)]
    assert len(planned) == len(set(planned)) > 300
    for name, count in (("checked", 300), ("timed", 192)):
        lines = [cases.line(case) for case in cases.SETS[name](False)]
        assert len(set(lines)) == len(lines) >= count


# ---- The rehearsal --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program() -> Path:
    includes = [f"-I{folder}" for folder in (KERNEL, ROOT / "tests" / "cuda", HERE)]
    return compiled([HERE / "driver.cpp", ROOT / "tests" / "cuda" / "faulty_card.cpp"], "-O0", *includes)


@pytest.mark.skipif(needs_a_compiler.args[0], reason=needs_a_compiler.kwargs["reason"])
def test_a_rehearsal_of_the_driver(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's steps, a planted failure, a planted hang, and the tools that are not here: all ends in the table."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    work, output = tmp_path / "work", tmp_path / "results"
    work.mkdir()
    shutil.copy(program, work / "driver")
    groups = [
        kept
        for group in steps.steps(steps.HOST, work)
        if (kept := tuple(step for step in group if step.name.startswith(("driver", "sanitizer", "ncu"))))
    ]
    hang = python("planted hang", "import time; time.sleep(60)", limit=1)
    groups.insert(0, (python("planted failure", "raise SystemExit(7)"), hang))
    outcomes = {o.name: o for o in contact(steps.HOST, groups, work, output, 120, lambda text: None)}

    assert {name: outcome.status for name, outcome in outcomes.items() if not name.startswith("driver")} == {
        "planted failure": "failed",
        "planted hang": "killed",
        **{f"sanitizer: {tool}": "missing" for tool in ("memcheck", "racecheck", "initcheck", "synccheck")},
        "ncu": "missing",
    }
    assert {name: outcome.status for name, outcome in outcomes.items() if name.startswith("driver")} == dict.fromkeys(
        ("driver: right", "driver: times", "driver: copies", "driver: plans"), "ok"
    )
    assert len(outcomes["driver: right"].rows) == 12
    assert all(row["units"] < 16 and row["cycles"] > 0 for row in outcomes["driver: right"].rows)
    assert [row["case"] for row in outcomes["driver: times"].rows] == [
        row["case"] for row in outcomes["driver: copies"].rows
    ]
    for flow in ("tile_rows", "rows"):
        assert {row.get(flow) for row in outcomes["driver: plans"].rows} == {None, 1, 2, 3}, "plans are forced"

    written = json.loads((output / "results.json").read_text())
    assert [step["name"] for step in written["steps"]] == list(outcomes)
    text = (output / "table.md").read_text()
    assert "| planted failure | failed: ended with 7 | 0 |" in text
    assert "| planted hang | killed: at its limit of 1 s | 0 |" in text
    assert "| ncu | missing: no ncu here | 0 |" in text
    assert "Nothing is wrong in" in text
    unit = next(line for line in text.splitlines() if line.startswith("| stage 2 stride 1 | contiguous |"))
    kernel, over_copy, over_model, best_plan, *by_torch = (cell.strip() for cell in unit.split("|")[3:-1])
    assert min(float(cell) for cell in (kernel, over_copy, best_plan)) >= 0
    assert {over_model, *by_torch} == {"–"}


@pytest.mark.skipif(needs_a_compiler.args[0], reason=needs_a_compiler.kwargs["reason"])
def test_the_driver_names_what_is_wrong(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.line(cases.TINY_UNITS[1].case("float16", "contiguous", 1))
    command = [str(program), "check"]
    for fault, where in (
        ("nothing", r"image 0 channel 0 pixel 0: got -?nan, expected .*"),
        ("outside", r"written outside of the result"),
    ):
        monkeypatch.setenv("FAULT", fault)
        (row,) = map(json.loads, driver.answers(command, [case], 10))
        assert not row["ok"]
        assert re.fullmatch(where, row["where"])
    wide = f"{case} tile_rows=3 slices=3 tile_depth=100000"
    crowded = f"{case} rows=3 slices=3 warps=12 gap=1"  # as many as kernels of channels_last have
    rows = list(map(json.loads, driver.answers(command, [f"{case} dtype=float64", "nonsense", wide, crowded], 10)))
    assert [row["ok"] for row in rows] == [False] * 4
    assert rows[0]["what"] == "dtype: a rehearsal has kernels of float16 and float32 only"
    assert rows[1]["what"] == "not key=value: nonsense"
    assert re.fullmatch(r"does not fit: \d+ bytes of shared memory", rows[2]["what"])
    assert rows[3]["what"] == "does not fit: 12 warps, a block has 8"


def test_the_table_names_what_is_wrong() -> None:
    outcome = Outcome("torch: right", "failed", "1 of 1 wrong", 1.0, [{"ok": False, "unit": "odd", "error": 0.5}])
    text = "\n".join(table.lines({"card": "none"}, [outcome], 1.0, cases.UNITS, 64))
    assert "**1 of 1 rows are wrong.**" in text
    assert "- torch: right: {'ok': False, 'unit': 'odd', 'error': 0.5}" in text


def test_the_card_is_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "NVIDIA H100 80GB HBM3, 9.0, 580.159.04, 1980 MHz, 2619 MHz"
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for lines, expected in (
        (f"echo '{said}'; echo another", Card("NVIDIA H100 80GB HBM3", "9.0", "580.159.04", "1980 MHz, 2619 MHz")),
        ("echo 'NVIDIA-SMI has failed'; exit 9", None),
        ("echo", None),
    ):
        program.write_text(f"#!/bin/sh\n{lines}\n")
        program.chmod(0o755)
        assert steps.find_card() == expected


def test_without_a_card_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(steps, "find_card", lambda: None)
    assert main([]) == 1
    assert "there is no card that nvidia-smi knows of" in capsys.readouterr().err


@pytest.mark.long  # torch is imported by each of its steps, and compiles
@pytest.mark.skipif(needs_a_compiler.args[0], reason=needs_a_compiler.kwargs["reason"])
def test_the_whole_rehearsal(tmp_path: Path) -> None:
    show: Callable[[str], None] = print
    work = tmp_path / "work"
    work.mkdir()
    groups = steps.steps(steps.HOST, work)
    outcomes = contact(steps.HOST, groups, work, tmp_path / "results", 400, show)
    assert {outcome.name: outcome.cause for outcome in outcomes if outcome.status != "ok"} == {
        outcome.name: outcome.cause for outcome in outcomes if outcome.status == "missing"
    }
    assert runner.rows_of((tmp_path / "results" / "log.txt").read_text())
