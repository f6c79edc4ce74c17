"""What the compiled CUDA kernels execute, counted: ``python -m benchmarks.cuda_counts``; needs nvcc and a C++ compiler.

The kernels' PTX runs on the CPU (tests/cuda/ptx), which says how many instructions warps execute, how many wavefronts
their accesses to shared memory take, and which sectors of global memory they touch. These are what a profiler would
count on a card, but for what ptxas makes of the PTX: a machine instruction does the work of one and more of these.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks import cuda_toolkit
from benchmarks.cuda_toolkit import LAYOUTS, ROOT, Case
from benchmarks.cuda_units import GROUPS, Unit, paper_units

SM = 90
DTYPE = "float16"
BATCH = 64
SECTOR_BYTES = 32  # by which global memory is accessed
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Count:
    """What instructions of one opcode, or of several, did in a launch, by the names of tests/cuda/ptx/counts.h."""

    executed: int = 0
    shared_accesses: int = 0
    shared_wavefronts: int = 0
    global_bytes: int = 0
    global_sectors: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(*(getattr(self, name) + getattr(other, name) for name in Count.__annotations__))


# The programs of tests/cuda that run kernels by their PTX, by the kernels' kind: those that are preferred first.
PROGRAMS = {"strip": "strip_test.cpp", "unit": "unit_test.cpp"}


def build_runners(folder: Path) -> dict[str, Path]:
    """Compiles the programs that run kernels by their PTX."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    sources = ROOT / "tests" / "cuda"
    for kind, source in PROGRAMS.items():
        command = [compiler, "-std=c++17", *cuda_toolkit.PTX_FLAGS, "-o", folder / kind, sources / source]
        subprocess.run([*map(str, command)], check=True)
    return {kind: folder / kind for kind in PROGRAMS}


def count(runners: Mapping[str, Path], case: Case) -> dict[str, Count]:
    """Runs a case by the first kind of kernels that can and returns what it executed, by opcode. What packs weights is
    not counted, as it runs once. Raises RuntimeError where a result is not right."""
    arch = cuda_toolkit.ptx_arch(int(case["sm"]))
    for kind, runner in runners.items():
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder) / "counts"
            ptx = cuda_toolkit.compile_ptx(f"{kind}_{case['dtype']}", arch)
            line = " ".join(f"{key}={value}" for key, value in {**case, "ptx": ptx, "counts": table}.items())
            done = subprocess.run([runner], input=line + "\n", capture_output=True, text=True, check=True)
            if done.stdout.startswith("unplanned "):
                continue
            if not done.stdout.startswith("ok "):
                raise RuntimeError(f"{line}: {done.stdout}")
            with table.open() as lines:
                rows = list(csv.DictReader(lines, delimiter="\t"))
            return {row.pop("opcode"): Count(**{name: int(value) for name, value in row.items()}) for row in rows}
    raise RuntimeError(f"no kernel runs {case}")


def summary(unit: Unit, counts: Mapping[str, Count]) -> dict[str, float]:
    """What tests hold the kernels to. Loads are those of global memory, cp.async included."""
    total = sum(counts.values(), Count())
    stores = sum((one for opcode, one in counts.items() if opcode.startswith("st.global")), Count())
    in_bytes = 2 * unit.batch * unit.in_channels * unit.height * unit.width
    out_height, out_width = unit.out_size
    out_bytes = 2 * unit.batch * (unit.out_channels + unit.pool_channels) * out_height * out_width
    return {
        "instructions": total.executed,
        "wavefronts_an_access": round(total.shared_wavefronts / total.shared_accesses, 3),
        "loaded_of_x": round((total.global_bytes - stores.global_bytes) / in_bytes, 3),
        "stored_of_result": round(stores.global_bytes / out_bytes, 3),
        "used_of_a_stored_sector": round(stores.global_bytes / (SECTOR_BYTES * stores.global_sectors), 3),
    }


def all_summaries(runners: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """The summary of each of the paper's units at batch 64, in float16 and both layouts."""
    units = [(f"{name}, {layout}", unit, layout) for name, unit in paper_units(BATCH).items() for layout in LAYOUTS]
    for kind in PROGRAMS:  # ahead of the threads, which would each do it
        cuda_toolkit.compile_ptx(f"{kind}_{DTYPE}", cuda_toolkit.ptx_arch(SM))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counts = pool.map(lambda one: count(runners, one[1].case(DTYPE, one[2], SM)), units)
        return {name: summary(unit, counted) for (name, unit, _), counted in zip(units, counts, strict=True)}


def report(summaries: Mapping[str, Mapping[str, float]]) -> str:
    lines = [
        "# What the CUDA kernels execute",
        "",
        "Written by `python -m benchmarks.cuda_counts`: the kernels' PTX, as nvcc "
        f"{cuda_toolkit.toolkit_version()} makes it, run on the CPU.",
        f"One launch of each unit of ShuffleNet 1×, g = {GROUPS}, {DTYPE}, batch {BATCH}, as planned for sm_{SM}.",
        "Instructions are those of warps, in PTX. A wavefront serves 128 bytes of shared memory. All loads of",
        "global memory are given, those of weights included; x counts as 1.",
        "",
        "| unit | instructions | wavefronts an access | loaded | stored, of the result | used of a stored sector |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in summaries.items():
        millions = f"{row['instructions'] / 1e6:.2f} M"
        used = f"{row['used_of_a_stored_sector']:.0%}"
        cells = [millions, *(f"{row[key]:.2f}" for key in list(row)[1:4]), used]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Writes the report, and the same as JSON for the tests; returns an exit code, 1 where there is no nvcc."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_counts", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder to write to (default: %(default)s)")
    options = parser.parse_args(arguments)
    if cuda_toolkit.nvcc() is None:
        print("counting needs nvcc (on PATH, or by CUDA_HOME), for the kernels' PTX", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        summaries = all_summaries(build_runners(Path(folder)))
    (options.output / "cuda_counts.md").write_text(report(summaries))
    (options.output / "cuda_counts.json").write_text(json.dumps(summaries, indent=1) + "\n")
    print(f"wrote cuda_counts.md and cuda_counts.json to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
