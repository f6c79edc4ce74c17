"""Counts what kernels do by ncu: ``python -m benchmarks.first_contact.profile PROGRAM``. One row a kernel, in order.

Only the standard library is imported.
"""

import csv
import io
import json
import subprocess
import sys

from benchmarks.first_contact import cases

METRICS = {
    "instructions": "smsp__inst_executed.sum",
    "ipc": "sm__inst_executed.avg.per_cycle_active",
    "dram_read": "dram__bytes_read.sum",
    "dram_write": "dram__bytes_write.sum",
    "l2_read_sectors": "lts__t_sectors_op_read.sum",
    "shared_wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "shared_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "warps_active_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "cycles": "sm__cycles_elapsed.max",
    "time": "gpu__time_duration.sum",
}


def rows_of(output: str) -> list[dict[str, object]]:
    """A kernel's metrics by our names, each with its unit, from ncu's table: a line of names, one of units, kernels."""
    lines = output.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return []
    names, units, *kernels = csv.reader(io.StringIO("\n".join(lines[begin:])))
    found: list[dict[str, object]] = []
    for kernel in kernels:
        values, unit_of = dict(zip(names, kernel, strict=False)), dict(zip(names, units, strict=False))
        row: dict[str, object] = {"kernel": values.get("Kernel Name")}
        for name, metric in METRICS.items():
            if metric in values:
                row[name] = f"{values[metric]} {unit_of[metric]}".strip()
        found.append(row)
    return found


def main(program: str) -> int:
    wanted = [cases.line(case) for case in cases.profiled(rehearse=False)]
    command = ["ncu", "--csv", "--page", "raw", "--clock-control", "none", "--metrics", ",".join(METRICS.values())]
    done = subprocess.run(
        [*command, program, "once"], input="\n".join(wanted) + "\n", capture_output=True, text=True, check=False
    )
    rows = rows_of(done.stdout)
    for row in rows:
        print(json.dumps(row))
    if len(rows) < len(wanted):
        print(done.stdout, done.stderr)
        print(json.dumps({"ok": False, "what": f"ncu counted {len(rows)} kernels of {len(wanted)} units"}))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
