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
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory

from benchmarks import machine
from benchmarks.peaks import fma_peak
from shufflenet_ext import _native

_ROOT = Path(__file__).parent.parent
_PROGRAM = _ROOT / "benchmarks" / "native" / "partition.cpp"
_TABLE = _ROOT / "benchmarks" / "results" / "partition.md"
_CODES_MACHINE = "a 2-core Intel Xeon with AVX-512 and AMX, on 2026-11-24"  # see results/profile.md
_CODES_VECTORS = 5000  # multiply-adds that the code's constants take for a microsecond
_VECTOR_BYTES = {"baseline": 16, "neon": 16, "avx2": 32}  # of all other instruction sets, 64
_FLOAT_BYTES = 4
_RUNS = 8  # of the program: what else the machine does may last for seconds
_LARGEST_LOSS = 0.2  # of the rate at which the L2 cache is read, where it begins not to suffice


@dataclass(frozen=True)
class Quantity:
    """What an undisturbed thread takes, in seconds or bytes a second: a tenth of all samples are better."""

    undisturbed: float
    median: float


@dataclass(frozen=True)
class Machine:
    """What was measured. ``quantities`` has the names that native/partition.cpp prints."""

    vectors_a_microsecond: float  # multiply-adds of float32 by one core
    lanes: int  # floats in a vector
    quantities: Mapping[str, Quantity]

    def seconds(self, name: str) -> float:
        return self.quantities[name].undisturbed

    def cost(self, seconds: float) -> str:
        """How many multiply-adds a core does in so many seconds."""
        return f"{seconds * 1e6 * self.vectors_a_microsecond:.0f}"

    def bytes_a_cost(self, rate: float) -> str:
        """How many bytes come at this rate while a core does one multiply-add."""
        return f"{rate / 1e6 / self.vectors_a_microsecond:.1f}"

    def kept_bytes(self) -> int:
        """The most bytes that two cores at once read, each its own, about as fast as the fewest that were tried."""
        rates = {
            int(name.removeprefix("read ")): quantity.undisturbed
            for name, quantity in self.quantities.items()
            if name.startswith("read ")
        }
        least = (1 - _LARGEST_LOSS) * rates[min(rates)]
        return max(kib for kib in rates if all(rate >= least for other, rate in rates.items() if other <= kib)) * 1024


def measure() -> Machine:
    """Measures on two cores. Raises CalledProcessError where the program cannot be compiled, or fails."""
    samples = _samples()
    lanes = _VECTOR_BYTES.get(str(_native.cpu_isa()), 64) // _FLOAT_BYTES
    return Machine(
        fma_peak(threads=1) / 2 / lanes / 1e6, lanes, {name: _quantity(values) for name, values in samples.items()}
    )


def _samples() -> dict[str, list[float]]:
    samples: dict[str, list[float]] = defaultdict(list)
    with TemporaryDirectory() as folder:
        program = Path(folder, "partition")
        flags = ["-std=c++17", "-O3", "-march=native", "-pthread"]
        subprocess.run([os.environ.get("CXX", "c++"), *flags, _PROGRAM, "-o", program], check=True)
        command = [str(program), *map(str, machine.two_cores())]
        for _ in range(_RUNS):
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            for line in output.splitlines():
                name, _, numbers = line.partition(":")
                samples[name] += map(float, numbers.split())
    return samples


def _quantity(samples: list[float]) -> Quantity:
    low, *_, median, _, _, _, high = quantiles(samples, n=10, method="inclusive")
    return Quantity(low if median < 1 else high, median)  # seconds are below one, bytes a second above


def constants() -> dict[str, int]:
    """The constants of csrc/cpu's partition.h by name, such as {"kWaitCost": 1250}."""
    (header,) = (_ROOT / "csrc" / "cpu").rglob("partition.h")
    found: dict[str, int] = {}
    for name, value in re.findall(r"constexpr int64_t (k\w+) = ([\w *]+);", header.read_text()):
        found[name] = math.prod(found[factor] if factor in found else int(factor) for factor in value.split(" * "))
    return found


def _rows(measured: Machine) -> Iterator[tuple[str, str, str, str]]:
    """Of each constant: its name, what takes the time, what that is here, and the same in the constant's unit."""
    wait, own, shared = (measured.seconds(name) for name in ("wait", "own line", "shared line"))
    foreign, weights = (measured.seconds(name) for name in ("foreign", "weights"))
    vector = measured.lanes * measured.seconds("depthwise")
    yield "kWaitCost", "two threads wait for each other", f"{wait * 1e6:.2f} µs", measured.cost(wait)
    yield (
        "kForeignBytesPerCost",
        "a thread reads what the other has just written, line by line from many planes",
        f"{foreign / 1e9:.1f} GB/s",
        measured.bytes_a_cost(foreign),
    )
    yield (
        "kSharedLineCost",
        "a thread writes to a cache line whose other half the other has just written, not to one of its own",
        f"{(shared - own) * 1e9:.1f} ns",
        measured.cost(shared - own),
    )
    yield (
        "kWeightBytesPerCost",
        "two threads read the same 8 MiB of weights",
        f"{weights / 1e9:.1f} GB/s each",
        measured.bytes_a_cost(weights),
    )
    yield (
        "kDepthwiseCost",
        "a vector of the depthwise convolution, without masks",
        f"{vector * 1e9:.1f} ns",
        measured.cost(vector),
    )


def _markdown(measured: Machine) -> Iterator[str]:
    core, other = machine.two_cores()
    caches = ", ".join(f"L{level} {size // 1024} KiB" for level, size in machine.caches(core).items())
    in_code = constants()
    kib = {name: f"{in_code[name] // 1024} KiB" for name in ("kPartBudget", "kWholeBudget", "kMostStripBytes")}
    disturbed = measured.quantities["wait"]
    yield "# What the CPU's partitioning counts by"
    yield ""
    yield (
        "`choose_partition` in csrc/cpu (partition.h) counts costs in multiply-adds of a vector by one core. Its "
        f"constants were measured on {_CODES_MACHINE} (see [profile.md](profile.md)). `python -m benchmarks.partition` "
        "writes this table."
    )
    yield ""
    yield f"- measured here on: {machine.processor()}, cores {core} and {other} of {os.cpu_count()}"
    yield f"- caches of a core: {caches or 'not known to the system'}"
    yield (
        f"- multiply-adds of float32: {measured.vectors_a_microsecond:.0f} vectors of {measured.lanes} lanes "
        f"a microsecond ({_native.cpu_isa()}); the code assumes {_CODES_VECTORS}"
    )
    yield f"- date: {datetime.now(timezone.utc):%Y-%m-%d}"
    yield ""
    yield "| constant | what takes the time | here | in the constant's unit, here | in the code |"
    yield "|---|---|--:|--:|--:|"
    for name, meaning, here, in_unit in _rows(measured):
        yield f"| `{name}` | {meaning} | {here} | {in_unit} | {in_code[name]} |"
    yield ""
    yield (
        "`k…PerCost` are bytes that come while a core does one multiply-add; the others are multiply-adds. What "
        "counts is a sample that a tenth of all are better than, as of threads that nothing disturbs. (What else the "
        f"machine does shows in the median: that of a wait was {disturbed.median * 1e6:.2f} µs.) The loops here do "
        "nothing else meanwhile, and so overlap more of their loads than a kernel does: what they say of lines that go "
        "from core to core is the least that these cost."
    )
    yield ""
    yield (
        f"`kPartBudget`, {kib['kPartBudget']} in the code, is a share of a core's L2 cache. Here two cores at "
        f"once read up to {measured.kept_bytes() // 1024} KiB each without losing more than {_LARGEST_LOSS:.0%} of the "
        "L2 cache's rate; weights and rows of x have to fit in there as well."
    )
    yield ""
    yield (
        f"Not measured here, as no quantity of the machine says them: `kWholeBudget` ({kib['kWholeBudget']}), "
        f"`kMostStripBytes` ({kib['kMostStripBytes']}) and `kMostExtraParts` ({in_code['kMostExtraParts']}) were "
        "chosen by the times of whole units."
    )


def main() -> int:
    """Measures, writes the table and prints it."""
    text = "\n".join(_markdown(measure())) + "\n"
    _TABLE.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
