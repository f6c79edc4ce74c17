"""Times the CUDA kernels against their peers and the memory's floor: ``python -m benchmarks.cuda [--quick]``.

Needs a CUDA device; from the repository's root.
"""

import argparse
import sys
import tempfile
import time
import traceback
from itertools import product
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

import shufflenet_ext as se
from benchmarks import cuda_race, cuda_report, cuda_toolkit, report
from benchmarks.cuda_model import CARDS, Model
from benchmarks.cuda_race import BATCHES, PRECISIONS, EventClock, Precision, Shape, Track

_RESULTS = Path(__file__).parent / "results"
_QUICK_BATCHES = (64,)


def machine() -> dict[str, str]:
    """What ran the benchmarks, and when."""
    card = torch.cuda.get_device_properties(0)
    size = f"{card.multi_processor_count} multiprocessors, {card.L2_cache_size / 2**20:.0f} MiB L2"
    known = report.machine()
    return {
        "card": f"{card.name}, sm_{card.major}{card.minor}, {size}",
        "shufflenet_ext": f"{se.build_info()['version']}, CUDA kernels for {' '.join(se.build_info()['cuda_archs'])}",
        "versions": f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
    } | {name: known[name] for name in ("processor", "system", "date")}


def race(
    rows: list[tuple[str, Shape]], precisions: tuple[Precision, ...], track: Track, console: Console
) -> tuple[list[cuda_race.CudaRow], list[str]]:
    """Measures the rows, and says which failed. A row that fails does not stop the others."""
    done, failed = [], []
    for i, (precision, (suite, shape)) in enumerate(wanted := list(product(precisions, rows)), 1):
        try:
            row = track.measure(suite, shape, precision)
        except Exception as error:
            failed.append(f"{precision.name} {suite} {shape.label} batch {shape.batch}: {error}")
            console.print(traceback.format_exc(), style="red", markup=False, soft_wrap=True)
            continue
        done.append(row)
        console.print(f"{i:3}/{len(wanted)} {cuda_report.line(row)}", highlight=False, soft_wrap=True)
    return done, failed


def no_model(sm: int) -> str:
    """Why nothing can be predicted for a card; empty where something can."""
    if sm not in CARDS:
        return f"the model has no card of sm_{sm}"
    return "" if cuda_toolkit.nvcc() else "no nvcc (on PATH, or by CUDA_HOME), for ptxas' figures"


def main(arguments: list[str] | None = None) -> int:
    """Runs everything, writes the report and returns an exit code: 1 where nothing can run or a row failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="float16 at batch 64 only, which has the targets")
    parser.add_argument("--output", type=Path, default=_RESULTS, help="folder of the results (default: %(default)s)")
    options = parser.parse_args(arguments)
    if torch.cuda.is_available():
        torch.cuda.init()  # so that build_info asks the card
    if error := se.build_info()["cuda_error"]:
        print(f"the CUDA benchmarks need a GPU and this package's CUDA kernels: {error}", file=sys.stderr)
        return 1

    start = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    described = machine()
    console.print("\n".join(described.values()), highlight=False, soft_wrap=True)
    clock = EventClock()
    bandwidth = cuda_race.copy_bandwidth(clock, "cuda")
    nothing = torch.empty(0)
    overhead = median(clock(lambda: nothing) for _ in range(100))
    major, minor = torch.cuda.get_device_capability()
    sm = 10 * major + minor
    reason = no_model(sm)
    with tempfile.TemporaryDirectory() as folder:
        graph = cuda_race.graphed
        model = None if reason else Model(Path(folder))
        track = Track("cuda", clock, graph, cuda_race.builders(graph), bandwidth, model, sm)
        shapes = list(cuda_race.shapes(_QUICK_BATCHES if options.quick else BATCHES))
        rows, failed = race(shapes, PRECISIONS[:1] if options.quick else PRECISIONS, track, console)
    if not rows:
        console.print("nothing was measured")
        return 1
    seconds = time.perf_counter() - start
    results = cuda_report.Results(described, seconds, bandwidth, overhead, reason, failed, rows)
    table = Table("target (for an H100)", "measured", "", title="float16, channels_last, batch 64")
    for target in cuda_report.targets(rows):
        table.add_row(*target)
    console.print(table)
    for path in cuda_report.write(results, options.output):
        console.print(f"wrote {path}")
    console.print(f"{len(rows)} rows, {len(failed)} failed, in {seconds:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
