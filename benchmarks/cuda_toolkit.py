"""What can be known of the CUDA kernels without a card: what ptxas says of them, and what the planner chooses.

Only the standard library is imported: tests and the model of the kernels' speed share this.
"""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
KERNEL = ROOT / "csrc" / "cuda"
LAYOUTS = ("contiguous", "channels_last")

# A unit, how it is run and on what, by the names of tests/cuda/case.h.
Case = Mapping[str, int | str]
# What the planner chooses for a case, by the keys that tests/cuda/plan_test.cpp prints.
Plan = Mapping[str, int | str]


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel, as ptxas describes it; registers are a thread's."""

    layout: str
    registers: int
    spilled_bytes: int
    static_shared_bytes: int


_Compiled = tuple[Path, list[Kernel]]


def compile_kernels(dtype: str, arch: str, folder: Path) -> _Compiled:
    """Compiles the two kernels of a dtype, one for each layout. Raises RuntimeError where nvcc fails."""
    cubin, entries = _compile(KERNEL / f"unit_{dtype}.cu", arch, folder)
    return cubin, [_kernel(LAYOUTS["LayoutE1" in entry], entry) for entry in entries]


def compile_strips(dtype: str, arch: str, folder: Path) -> _Compiled:
    """Compiles the kernels that run units by strips, as above."""
    cubin, entries = _compile(KERNEL / f"strip_{dtype}.cu", arch, folder)
    strips = [entry for entry in entries if "strip_kernel" in entry.partition("\n")[0]]
    return cubin, [_kernel(LAYOUTS["LayoutE1" in entry], entry) for entry in strips]


def kernels_of_library(library: Path, cuobjdump: str, folder: Path) -> dict[str, dict[tuple[str, str], _Compiled]]:
    """The kernels of a built CUDA library, by "unit" or "strip" and by dtype and architecture.

    Each comes with its cubin, which is extracted into the folder. Raises CalledProcessError where cuobjdump fails.
    """
    subprocess.run([cuobjdump, "-xelf", "all", library.resolve()], cwd=folder, capture_output=True, check=True)
    found: dict[str, dict[tuple[str, str], _Compiled]] = {"unit": {}, "strip": {}}
    for cubin in folder.glob("*.sm_*.cubin"):
        arch = cubin.name.split(".")[-2].removeprefix("sm_")
        reserved = 1024 if int(arch) >= 90 else 0  # bytes of shared memory in every block, which ptxas does not count
        said = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        for name, *numbers in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", said):
            mangled = re.search(r"(unit|strip)_kernelI(?:NS\d_\d+(\w*?Float\d+)E|(f|d))", name)
            if mangled is None:  # the kernel that packs weights
                continue
            kind, structure, fundamental = mangled.groups()
            dtype = structure.lower() if structure else {"f": "float32", "d": "float64"}[fundamental]
            registers, stack, shared, local = map(int, numbers)
            kernel = Kernel(LAYOUTS["LayoutE1" in name], registers, stack + local, shared - reserved)
            found[kind].setdefault((dtype, arch), (cubin, []))[1].append(kernel)
    return found


def _compile(source: Path, arch: str, folder: Path) -> tuple[Path, list[str]]:
    """Compiles a file; what ptxas says of each of its kernels."""
    cubin = folder / f"{source.stem}_{arch}.cubin"
    code = f"-gencode=arch=compute_{ptx_arch(int(arch))},code=sm_{arch}"
    command = [nvcc(), "-std=c++17", "-O3", code, "-Xptxas", "-v", "-cubin", "-o", cubin, source]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc failed on {source.name} for sm_{arch}:\n{done.stderr}")
    return cubin, done.stderr.split("Compiling entry function")[1:]


def _kernel(layout: str, entry: str) -> Kernel:
    return Kernel(
        layout=layout,
        registers=_number(r"Used (\d+) registers", entry),
        spilled_bytes=sum(map(int, re.findall(r"(\d+) bytes spill", entry))),
        static_shared_bytes=_number(r"(\d+) bytes smem", entry, 0),
    )


def compile_ptx(name: str, arch: int, kernel: Path = KERNEL) -> Path:
    """The PTX of name.cu, for a compute capability such as 90; ``kernel`` is the folder of the sources.

    It is kept in build/ptx from one run to the next, by what it is made of. Raises RuntimeError where nvcc fails.
    """
    command = [str(nvcc()), "-std=c++17", "-O3", f"-arch=compute_{arch}", "-ptx"]
    key = hashlib.sha256(repr([command, toolkit_version(), name]).encode())
    for source in sorted([*kernel.glob("*.*"), *kernel.parent.glob("*.h")]):
        key.update(source.name.encode() + source.read_bytes())
    folder = ROOT / "build" / "ptx"
    ptx = folder / f"{name}_{arch}-{key.hexdigest()[:16]}.ptx"
    if not ptx.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = folder / f"{ptx.stem}-{os.getpid()}"  # a file that is there is a whole one
        command += ["-o", str(made), str(kernel / f"{name}.cu")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc failed on {name}.cu for compute_{arch}:\n{done.stderr}")
        made.rename(ptx)
    return ptx


# What unit_test.cpp and strip_test.cpp of tests/cuda are compiled with to run kernels by their PTX. No two operations
# may become one.
PTX_FLAGS = (
    *("-O1", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-DSHUFFLENET_TEST_PTX", f"-I{KERNEL}", f"-I{ROOT / 'tests' / 'cuda'}"),
)
# The compute capabilities that PTX is compiled for, of which setup.py makes the code of all architectures: those where
# kernels may begin to differ, and the newest.
PTX_ARCHS = (75, 80, 90, 120)


def ptx_arch(sm: int) -> int:
    """Which PTX an architecture's code is made of."""
    return max(arch for arch in PTX_ARCHS if arch <= sm)


def _number(pattern: str, text: str, otherwise: int | None = None) -> int:
    found = re.search(pattern, text)
    if found:
        return int(found[1])
    if otherwise is None:
        raise RuntimeError(f"expected a match of {pattern!r} in: {text}")
    return otherwise


def toolkit_version() -> str:
    """The version of the toolkit that nvcc is part of, such as 13.0."""
    text = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    return found[1] if found else text.strip()


def constants(header: str) -> dict[str, float]:
    """The numbers that a header of the kernels defines, by name."""
    text = (KERNEL / header).read_text()
    return {name: float(value) for name, value in re.findall(r"constexpr (?:int|double) (\w+) = ([\d.]+);", text)}


def build_planner(folder: Path) -> Path:
    """Compiles tests/cuda/plan_test.cpp, a program that prints what plan_unit chooses."""
    program, sources = folder / "planner", ROOT / "tests" / "cuda"
    compiler = os.environ.get("CXX", "c++").split()[0]
    command = [compiler, "-std=c++17", "-O1", f"-I{KERNEL}", "-o", program, sources / "plan_test.cpp"]
    subprocess.run([*map(str, command)], check=True)
    return program


def plans(planner: Path, cases: Iterable[Case]) -> list[Plan]:
    """What the planner chooses for each case."""
    lines = [" ".join(f"{key}={value}" for key, value in case.items()) for case in cases]
    done = subprocess.run([planner], input="\n".join(lines) + "\n", capture_output=True, text=True, check=True)
    answers = done.stdout.splitlines()
    assert len(answers) == len(lines)
    found: list[Plan] = []
    for answer in answers:
        numbers, explanation = answer.split(" explanation=")
        plan: dict[str, int | str] = {key: int(value) for key, value in (pair.split("=") for pair in numbers.split())}
        found.append(plan | {"explanation": explanation})
    return found
