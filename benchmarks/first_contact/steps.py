"""The steps of a first contact, in the order of what is worth most. Only the standard library is imported."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cuda_toolkit import ROOT, nvcc
from benchmarks.first_contact import build, sanitize
from benchmarks.first_contact.runner import Step

TOTAL_S = 460.0  # of all steps together: a card may be lent for ten minutes


@dataclass(frozen=True)
class Card:
    name: str
    arch: str  # "9.0", or build.HOST in a rehearsal
    driver: str
    clocks: str  # the highest of the multiprocessors and of the memory


def find_card() -> Card | None:
    """The first card, as nvidia-smi names it; None where there is none."""
    try:
        query = "--query-gpu=name,compute_cap,driver_version,clocks.max.sm,clocks.max.memory"
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        name, arch, driver, *clocks = said.splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None
    return Card(name, arch, driver, ", ".join(clocks))


HOST = Card("none: a rehearsal on the CPU", build.HOST, "none", "none")


def environment() -> Mapping[str, str]:
    """With the toolkit's programs on PATH, and this checkout's benchmarks beside the package that is built."""
    found = dict(os.environ) | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    compiler = nvcc()
    if compiler is not None:
        found["PATH"] += os.pathsep + str(Path(compiler).parent)
    return found


def _module(name: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", f"benchmarks.first_contact.{name}", *map(str, arguments))


def steps(card: Card, work: Path) -> list[tuple[Step, ...]]:
    """Groups of steps; those of a group run side by side. What is timed has the card for itself."""
    rehearse = card.arch == build.HOST
    program = work / "driver"
    small = ("--rehearse",) if rehearse else ()
    compilers = () if rehearse else ("nvcc",)

    def driver(mode: str, cases: str, limit: float, name: str) -> tuple[Step]:
        return (Step(f"driver: {name}", _module("driver", program, mode, cases, *small), limit),)

    def torch_step(name: str, what: str, limit: float) -> tuple[Step]:
        # In the built package's folder: it comes before the checkout's on sys.path.
        return (Step(f"torch: {what}", _module(name, *small), limit),)

    builds = [
        Step("build: driver", _module("build", work, "driver", card.arch), 120, compilers),
        Step("build: library", _module("build", work, "library", card.arch), 180, compilers),
    ]
    if not rehearse:
        builds.append(Step("model", _module("model", card.arch.replace(".", "")), 120, compilers))
    sanitizers = tuple(
        Step(f"sanitizer: {tool}", _module("sanitize", program, tool), 45, ("compute-sanitizer",))
        for tool in sanitize.TOOLS
    )
    groups: list[tuple[Step, ...]] = [
        tuple(builds),
        driver("check", "checked", 50, "right"),
        driver("time", "timed", 50, "times"),
        driver("copy", "timed", 20, "copies"),
        torch_step("matrix", "right", 60),
        torch_step("speed", "times", 75),
        driver("time", "planned", 60, "plans"),
        sanitizers,
        (Step("ncu", _module("profile", program), 40, ("ncu",)),),
        torch_step("compiled", "torch.compile", 90),
    ]
    if not rehearse:
        groups.insert(6, torch_step("behaviour", "streams, graphs, threads", 60))
    return groups
