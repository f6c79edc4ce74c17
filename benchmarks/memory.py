"""By how much one call lets resident memory grow: ``python -m benchmarks.memory CONTENDER THREADS``, on Linux.

It is measured at a contender's first call, in a process of its own, as a runtime may keep what it allocates then. What
it allocates while it is built counts as the model's.
"""

import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import shufflenet_ext as se
from benchmarks import peers
from benchmarks.peers import OURS
from benchmarks.shapes import NetworkShape

SHAPE = NetworkShape(groups=3, batch=1, size=(720, 1280))
# All but the one that shares out a batch.
CONTENDERS = (OURS, *(name for name in peers.ALL if name != peers.OPENVINO_THROUGHPUT))
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"  # written to /proc/self/clear_refs, makes the peak what is resident now


@dataclass
class Growth:
    """By how many bytes a contender's call lets memory grow."""

    name: str
    threads: int
    peak: int


def measure(name: str, threads: int) -> Growth:
    """Measures a contender on :data:`SHAPE`. Raises RuntimeError, with what it printed, if the process fails."""
    command = [sys.executable, "-m", "benchmarks.memory", name, str(threads)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    return Growth(name, threads, int(done.stdout.split()[-1]))


def growth(run: Callable[[], object]) -> int:
    """By how many bytes a call lets resident memory grow at its peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # otherwise the call could reuse pages that only building the model needed
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def main(name: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    module, x = SHAPE.build()
    with torch.no_grad(), se.use_backend("native"):
        if name == OURS:
            run = peers.ours(module, x)[OURS]
        else:
            run = peers.ALL[name](peers.plain_copy(module), peers.folded_copy(module), x)
        print(growth(run))


if __name__ == "__main__":
    main(*sys.argv[1:])
