"""Measures what the CPU's partitioning counts by: ``python -m benchmarks.partition``, from the repository's root.

``choose_partition`` in csrc/cpu decides how threads share a unit by counting what each way costs. Its constants were
measured on one machine. This measures the same quantities on the machine at hand, by a small C++ program
(native/partition.cpp, compiled here), and writes a table of both: results/partition.md. It changes no constant.
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory

import torch

from benchmarks import machine
from benchmarks.peaks import fma_peak
from shufflenet_ext import _native

_ROOT = Path(__file__).parent.parent
_PROGRAM = _ROOT / "benchmarks" / "native" / "partition.cpp"
_TABLE = _ROOT / "benchmarks" / "results" / "partition.md"
_CODES_MACHINE = "a 2-core Intel Xeon with AVX-512 and AMX, on 2026-11-24"  # see results/profile.md
_VECTOR_BYTES = {"baseline": 16, "neon": 16, "avx2": 32}  # of all other instruction sets, 64
_FLOAT_BYTES = 4
_LARGEST_LOSS = 0.2  # of the rate at which the L2 cache is read, where it begins not to suffice


@dataclass
class Row:
    """A constant, what it stands for, and what this machine has in its place, with quartiles where there are some."""

    constant: str
    meaning: str
    physical: str
    here: str


class Quantities:
    """What was measured: FMA in vectors a microsecond, and samples of all else in seconds or bytes a second."""

    def __init__(self, vectors_a_microsecond: float, lanes: int, samples: Mapping[str, list[float]]) -> None:
        self.vectors_a_microsecond = vectors_a_microsecond
        self.lanes = lanes
        self.samples = samples

    def cost(self, name: str, times: int = 1) -> str:
        """Of what takes so many times the measured seconds: how many multiply-adds a core does meanwhile."""
        return _spread([times * s * 1e6 * self.vectors_a_microsecond for s in self.samples[name]], "{:.0f}")

    def bytes_a_cost(self, name: str) -> str:
        """How many bytes come while a core does one multiply-add."""
        return _spread([rate / 1e6 / self.vectors_a_microsecond for rate in self.samples[name]], "{:.1f}")

    def physical(self, name: str, scale: float, unit: str) -> str:
        return f"{median(self.samples[name]) * scale:.3g} {unit}"

    def kept_bytes(self) -> int:
        """The most bytes that two cores at once read, each its own, about as fast as the fewest that were tried."""
        rates = {int(name.split()[1]): median(rates) for name, rates in self.samples.items() if "read " in name}
        least = (1 - _LARGEST_LOSS) * rates[min(rates)]
        return max(kib for kib in rates if all(rate >= least for other, rate in rates.items() if other <= kib)) * 1024


def measure() -> Quantities:
    """Measures on two cores. CalledProcessError where the program cannot be compiled or fails."""
    lanes = _VECTOR_BYTES.get(str(_native.cpu_isa()), 64) // _FLOAT_BYTES
    samples = _samples()
    flop = fma_peak(threads=1)
    return Quantities(flop / 2 / lanes / 1e6, lanes, samples)


def _samples() -> dict[str, list[float]]:
    with TemporaryDirectory() as folder:
        program = Path(folder, "partition")
        flags = ["-std=c++17", "-O3", "-march=native", "-pthread"]
        subprocess.run([os.environ.get("CXX", "c++"), *flags, _PROGRAM, "-o", program], check=True)
        cores = map(str, machine.two_cores())
        output = subprocess.run([program, *cores], check=True, stdout=subprocess.PIPE, text=True).stdout
    lines = (line.partition(":") for line in output.splitlines())
    return {name: [float(number) for number in numbers.split()] for name, _, numbers in lines}


def _spread(values: list[float], form: str) -> str:
    q1, middle, q3 = (form.format(value) for value in quantiles(values, method="inclusive"))
    return f"{middle} ({q1} to {q3})"


def constants() -> dict[str, int]:
    """The constants of csrc/cpu's partition.h by name, such as {"kWaitCost": 1250}."""
    (header,) = (_ROOT / "csrc" / "cpu").rglob("partition.h")
    found: dict[str, int] = {}
    for name, value in re.findall(r"constexpr int64_t (k\w+) = ([\w *]+);", header.read_text()):
        found[name] = math.prod(found[factor] if factor in found else int(factor) for factor in value.split(" * "))
    return found


def rows(measured: Quantities) -> Iterator[Row]:
    yield Row(
        "kWaitCost",
        "two threads wait for each other",
        measured.physical("wait", 1e6, "µs"),
        measured.cost("wait"),
    )
    yield Row(
        "kForeignBytesPerCost",
        "a thread reads what the other has just written, line by line from many planes",
        measured.physical("foreign", 1e-9, "GB/s"),
        measured.bytes_a_cost("foreign"),
    )
    yield Row(
        "kSharedLineCost",
        "two threads write to the two halves of a cache line",
        measured.physical("shared line", 1e9, "ns more than to lines of their own"),
        measured.cost("shared line"),
    )
    yield Row(
        "kWeightBytesPerCost",
        "two threads read the same 8 MiB of weights",
        measured.physical("weights", 1e-9, "GB/s each"),
        measured.bytes_a_cost("weights"),
    )
    yield Row(
        "kDepthwiseCost",
        "a vector of the depthwise convolution, without masks",
        measured.physical("depthwise", 1e9 * measured.lanes, "ns"),
        measured.cost("depthwise", measured.lanes),
    )


def markdown(measured: Quantities) -> Iterator[str]:
    core, other = machine.two_cores()
    caches = ", ".join(f"L{level} {size // 1024} KiB" for level, size in machine.caches(core).items())
    in_code = constants()
    kib = {name: f"{in_code[name] // 1024} KiB" for name in ("kScratchBudget", "kWholeBudget", "kMostStripBytes")}
    yield "# What the CPU's partitioning counts by"
    yield ""
    yield (
        "`choose_partition` in csrc/cpu (partition.h) counts costs in multiply-adds of a vector by one core. Its "
        f"constants were measured on {_CODES_MACHINE} ([profile.md](profile.md)). Written by `python -m "
        "benchmarks.partition`; the medians of some rounds, with their quartiles."
    )
    yield ""
    yield f"- measured here on: {machine.processor()}, cores {core} and {other} of {os.cpu_count()}"
    yield f"- caches of a core: {caches or 'not known to the system'}"
    yield (
        f"- multiply-adds of float32: {measured.vectors_a_microsecond:.0f} vectors of {measured.lanes} lanes "
        f"a microsecond ({_native.cpu_isa()}); the code assumes 5000"
    )
    yield f"- date: {datetime.now(timezone.utc):%Y-%m-%d}"
    yield ""
    yield "| constant | what takes the time | here | in the constant's unit, here | in the code |"
    yield "|---|---|--:|--:|--:|"
    for row in rows(measured):
        yield f"| `{row.constant}` | {row.meaning} | {row.physical} | {row.here} | {in_code[row.constant]} |"
    yield ""
    yield (
        "`k…PerCost` are bytes that come while a core does one multiply-add; the others are multiply-adds. The loops "
        "here do nothing else meanwhile, and so overlap more of their loads than a kernel does: what they say of lines "
        "that go from core to core is the least that these cost."
    )
    yield ""
    yield (
        f"`kScratchBudget`, {kib['kScratchBudget']} in the code, is a share of a core's L2 cache. Here two cores at "
        f"once read up to {measured.kept_bytes() // 1024} KiB each without losing more than {_LARGEST_LOSS:.0%} of the "
        "L2 cache's rate; weights and rows of x have to fit in there as well."
    )
    yield ""
    yield (
        f"Not measured here, as no quantity of the machine says them: `kWholeBudget` ({kib['kWholeBudget']}), "
        f"`kMostStripBytes` ({kib['kMostStripBytes']}) and `kMostExtraStrips` ({in_code['kMostExtraStrips']}) were "
        "chosen by the times of whole units."
    )


def main() -> int:
    """Measures, writes the table and prints it."""
    torch.set_num_threads(1)
    text = "\n".join(markdown(measure())) + "\n"
    _TABLE.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
