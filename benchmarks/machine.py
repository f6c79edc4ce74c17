"""What the machine is: its processor, that processor's caches, and which cores do not share their hardware."""

import os
import platform
from pathlib import Path

_CORES = Path("/sys/devices/system/cpu")


def processor() -> str:
    """The processor's name, as it calls itself."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def caches(core: int) -> dict[int, int]:
    """The bytes of each cache that holds data of a core, by level. Empty where the system does not say. On Linux."""
    sizes = {}
    for index in sorted((_CORES / f"cpu{core}" / "cache").glob("index*")):
        kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        if kind != "Instruction":
            sizes[int(level)] = int(size.removesuffix("K")) * 1024
    return sizes


def two_cores() -> tuple[int, int]:
    """Two that this process may run on, on Linux. RuntimeError if all it has are hardware threads of one core."""
    first, *others = sorted(os.sched_getaffinity(0))
    for other in others:
        if _core_of(other) != _core_of(first):
            return first, other
    raise RuntimeError(f"cores: got {1 + len(others)} hardware threads of one core, expected two cores at least")


def _core_of(thread: int) -> str:
    return (_CORES / f"cpu{thread}" / "topology" / "thread_siblings_list").read_text()
