"""What ptxas makes of the kernels for each architecture: what the tests on the CPU cannot see. Needs nvcc, no GPU.

A kernel that spills, or takes more registers than the planner counts on, is a failure here; so is one whose assembly
lacks the tensor-core instructions or the 16-byte accesses that it was written for.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.cuda_toolkit import Kernel, compile_kernels, compile_strips, nvcc

ARCHS = ("75", "80", "86", "89", "90", "100", "120")
DTYPES = ("float32", "float64", "bfloat16", "float16", "tfloat32")


def cuobjdump() -> str | None:
    """The toolkit's, or the one that comes with triton."""
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        found = shutil.which("cuobjdump", path=str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    return found


pytestmark = [
    pytest.mark.skipif(nvcc() is None, reason="needs nvcc (on PATH, or by CUDA_HOME)"),
    pytest.mark.long,  # all is compiled first, which takes minutes
]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, list[Kernel]]]:
    folder = tmp_path_factory.mktemp("cubins")
    wanted = [(dtype, arch) for dtype in DTYPES for arch in ARCHS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(wanted, pool.map(lambda pair: compile_kernels(*pair, folder), wanted), strict=True))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_registers_are_as_the_planner_assumes(
    compiled: dict[tuple[str, str], tuple[Path, list[Kernel]]], dtype: str, arch: str
) -> None:
    _, kernels = compiled[dtype, arch]
    blocks = 1 if dtype == "float64" else 2  # blocks_by_registers in tiling.h
    assert {kernel.layout for kernel in kernels} == {"contiguous", "channels_last"}
    for kernel in kernels:
        assert kernel.spilled_bytes == 0, kernel
        assert -(-kernel.registers // 8) * 8 * 256 * blocks <= 65536, kernel
        assert kernel.static_shared_bytes == 0, "all shared memory is dynamic: SharedLayout counts it"


@pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_assembly_has_the_instructions_it_should(
    compiled: dict[tuple[str, str], tuple[Path, list[Kernel]]], dtype: str, arch: str
) -> None:
    cubin, _ = compiled[dtype, arch]
    assembly = subprocess.run([cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    for kernel in assembly.split("Function : ")[1:]:
        if int(arch) >= 80:
            assert re.search(r"LDGSTS\.E\.BYPASS\S*\.128", kernel), "copies of x and of weights"
        else:
            assert re.search(r"LDG\.E\S*\.128", kernel), "copies of x and of weights"
        assert re.search(r"STG\.E\S*\.128", kernel), "the result"
        uses_mma = dtype == "float16" or (dtype in ("bfloat16", "tfloat32") and int(arch) >= 80)
        assert bool(re.search(r"HMMA\.\d+", kernel)) == uses_mma
        if uses_mma:
            for_16_bits = r"HMMA\.1688\.F32(?!\.TF32)" if arch == "75" else r"HMMA\.16816\.F32"
            assert re.search(r"HMMA\.1688\.F32\.TF32" if dtype == "tfloat32" else for_16_bits, kernel)
            assert "LDSM.16.M88.4" in kernel
            # Planes: the fragments of 16-bit x are transposed on their way from shared memory.
            assert "LDSM.16.MT88.4" in kernel or dtype == "tfloat32" or "LayoutE1" in kernel


# ---- Strips ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def strips(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, Kernel]]:
    folder = tmp_path_factory.mktemp("strips")
    wanted = [(dtype, arch) for dtype in ("float16", "bfloat16") for arch in ARCHS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(wanted, pool.map(lambda pair: compile_strips(*pair, folder), wanted), strict=True))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_strips_fit_their_registers(strips: dict[tuple[str, str], tuple[Path, Kernel]], dtype: str, arch: str) -> None:
    cubin, kernel = strips[dtype, arch]
    assert kernel.spilled_bytes == 0, kernel
    assert kernel.registers <= 255  # 256 threads, kMostStripWarps in strip.h, then fit a multiprocessor
    assert kernel.static_shared_bytes == 0, "all shared memory is dynamic: StripLayout counts it"
    if int(arch) < 80 or cuobjdump() is None:
        return
    assembly = subprocess.run([str(cuobjdump()), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    (code,) = (part for part in assembly.split("Function : ")[1:] if "strip_kernel" in part.partition("\n")[0])
    for instruction in (r"HMMA\.16816\.F32", r"LDSM\.16\.M88\.4", r"LDGSTS\.E\.BYPASS\S*\.128", r"STG\.E\S*\.64"):
        assert re.search(instruction, code), instruction
    assert ("STSM.16.M88" in code) == (int(arch) >= 90)
