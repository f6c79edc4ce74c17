"""What ptxas makes of the kernels for each architecture: what the tests on the CPU cannot see. Needs no GPU.

The kernels are those of the CUDA library that SHUFFLENET_EXT_CUDA_LIBRARY names, which takes cuobjdump; without it nvcc
compiles them, for minutes.

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

from benchmarks.cuda_toolkit import Kernel, compile_kernels, compile_strips, kernels_of_library, nvcc

ARCHS = ("75", "80", "86", "89", "90", "100", "120")
LIBRARY = os.environ.get("SHUFFLENET_EXT_CUDA_LIBRARY")
Compiled = dict[tuple[str, str], tuple[Path, list[Kernel]]]  # by dtype and architecture
DTYPES = ("float32", "float64", "bfloat16", "float16", "tfloat32")
STRIP_DTYPES = ("bfloat16", "float16", "tfloat32")


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
    pytest.mark.skipif(nvcc() is None and LIBRARY is None, reason="needs nvcc (on PATH, or by CUDA_HOME)"),
    pytest.mark.long,  # all is compiled first, which takes minutes
]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    """Those of units by windows and by strips."""
    folder = tmp_path_factory.mktemp("cubins")
    if LIBRARY is not None:
        tool = cuobjdump()
        assert tool is not None, "SHUFFLENET_EXT_CUDA_LIBRARY: needs cuobjdump on PATH"
        return kernels_of_library(Path(LIBRARY), tool, folder)
    compilers = {"unit": compile_kernels, "strip": compile_strips}
    wanted = [("unit", dtype, arch) for dtype in DTYPES for arch in ARCHS]
    wanted += [("strip", dtype, arch) for dtype in STRIP_DTYPES for arch in ARCHS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(lambda k: compilers[k[0]](*k[1:], folder), wanted))
    return {
        kind: {(dtype, arch): found for (of, dtype, arch), found in zip(wanted, made, strict=True) if of == kind}
        for kind in compilers
    }


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_registers_are_as_the_planner_assumes(kernels: dict[str, Compiled], dtype: str, arch: str) -> None:
    _, found = kernels["unit"][dtype, arch]
    blocks = 1 if dtype == "float64" else 2  # blocks_by_registers in tiling.h
    assert {kernel.layout for kernel in found} == {"contiguous", "channels_last"}
    for kernel in found:
        assert kernel.spilled_bytes == 0, kernel
        assert -(-kernel.registers // 8) * 8 * 256 * blocks <= 65536, kernel
        assert kernel.static_shared_bytes == 0, "all shared memory is dynamic: SharedLayout counts it"


@pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_assembly_has_the_instructions_it_should(kernels: dict[str, Compiled], dtype: str, arch: str) -> None:
    cubin, _ = kernels["unit"][dtype, arch]
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


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", STRIP_DTYPES)
def test_strips_fit_their_registers(kernels: dict[str, Compiled], dtype: str, arch: str) -> None:
    cubin, found = kernels["strip"][dtype, arch]
    assert {kernel.layout for kernel in found} == {"contiguous", "channels_last"}
    for kernel in found:
        assert kernel.spilled_bytes == 0, kernel
        # So many threads, most_strip_warps in strip.h, then fit a multiprocessor.
        threads = 384 if int(arch) >= 90 and kernel.layout == "channels_last" else 256
        assert kernel.registers * threads <= 65536
        assert kernel.static_shared_bytes == 0, "all shared memory is dynamic: StripLayout counts it"
    if int(arch) < 80 or cuobjdump() is None:
        return
    assembly = subprocess.run([str(cuobjdump()), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    codes = [part for part in assembly.split("Function : ")[1:] if "strip_kernel" in part.partition("\n")[0]]
    assert len(codes) == 2
    for code in codes:
        is_wide, of_planes = dtype == "tfloat32", "LayoutE0" in code.partition("\n")[0]
        product = r"HMMA\.1688\.F32\.TF32" if is_wide else r"HMMA\.16816\.F32"
        for instruction in (product, r"LDGSTS\.E\.BYPASS\S*\.128", r"STG\.E\S*\.128" if is_wide else r"STG\.E\S*\.64"):
            assert re.search(instruction, code), instruction
        assert ("LDSM.16.M88.4" in code) == (not is_wide or not of_planes)
        assert ("STSM.16.M88" in code) == (int(arch) >= 90 and not is_wide)
        # Planes: operands of x are transposed on their way from shared memory.
        assert ("LDSM.16.MT88.4" in code) == (of_planes and not is_wide)
