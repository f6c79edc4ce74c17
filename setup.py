"""Builds the native library through torch.utils.cpp_extension; everything else is in pyproject.toml.

Environment:
    SHUFFLENET_EXT_REFERENCE_ONLY=1   installs no native library, so that no compiler is needed
    FORCE_CUDA=1 / 0                  builds the CUDA part or fails / leaves it out
    TORCH_CUDA_ARCH_LIST, MAX_JOBS, CUDA_HOME, CXX   as for every PyTorch extension
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from setuptools.errors import CompileError
from torch.utils import cpp_extension

# The oldest torch that the library runs under: the target of LibTorch's stable ABI, as in pyproject.toml.
TORCH_TARGET_VERSION = "0x020b000000000000ULL"
DEFAULT_CUDA_ARCHS = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
# Whose PTX is kept beside that of the last one, for newer cards that the last one's does not reach: 10.3 and 11.0.
PTX_CUDA_ARCH = "9.0"
# By architecture, the older one whose PTX its code is made from. The sources ask for no more than that, and the first
# half of nvcc's work, which takes longer than the second, is done once for both.
CODE_FROM = {"8.6": "8.0", "8.9": "8.0", "10.0": "9.0"}


def cpp_flags() -> list[str]:
    flags = ["-O3", "-std=c++17", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    return [*flags, f'-DSHUFFLENET_EXT_TORCH_VERSION="{torch.__version__}"']


def cuda_sources() -> list[str]:
    return sorted(str(path) for suffix in ("cu", "cpp") for path in Path("csrc/cuda").glob(f"*.{suffix}"))


def has_headers(home: str | None) -> bool:
    return home is not None and Path(home, "include", "cuda_runtime.h").is_file()


def toolkit() -> str | None:
    """The CUDA toolkit's folder: the one torch finds or, where that is none, the one that nvcc names.

    torch takes the folder above the nvcc on PATH, which may be a script that runs another.
    """
    home, nvcc = cpp_extension.CUDA_HOME, shutil.which("nvcc")
    if has_headers(home) or nvcc is None or {"CUDA_HOME", "CUDA_PATH"} & os.environ.keys():
        return home
    steps = subprocess.run([nvcc, "--dryrun", "unit.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", steps, re.MULTILINE)
    return str(Path(top[1]).resolve()) if top and has_headers(top[1]) else home


def toolkit_version(home: str) -> str:
    """Such as "13.0"."""
    answer = subprocess.run([Path(home, "bin", "nvcc"), "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release ([\d.]+)", answer)
    return version[1] if version else "unknown"


def default_cuda_archs() -> str:
    """What to build for where TORCH_CUDA_ARCH_LIST names nothing: those of DEFAULT_CUDA_ARCHS that nvcc knows.

    No GPU is asked: the machine that builds need not be the one that runs. PTX_CUDA_ARCH and the last also leave PTX,
    which the driver compiles for newer cards.
    """
    nvcc = Path(str(cpp_extension.CUDA_HOME), "bin", "nvcc")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    archs = [arch for arch in DEFAULT_CUDA_ARCHS if "sm_" + arch.replace(".", "") in known]
    if not archs:
        raise RuntimeError(f"{nvcc} knows none of {DEFAULT_CUDA_ARCHS}: set TORCH_CUDA_ARCH_LIST")
    return ";".join(f"{arch}+PTX" if arch in (PTX_CUDA_ARCH, archs[-1]) else arch for arch in archs)


def gencode_of(archs: str) -> list[str]:
    """nvcc's flags for what default_cuda_archs() names, each architecture's code from the PTX that CODE_FROM names."""

    def flag(virtual: str, kind: str, arch: str) -> str:
        return f"-gencode=arch=compute_{virtual},code={kind}_{arch}".replace(".", "")

    flags = []
    for wanted in archs.split(";"):
        arch = wanted.removesuffix("+PTX")
        flags.append(flag(CODE_FROM.get(arch, arch), "sm", arch))
        if arch != wanted:
            flags.append(flag(arch, "compute", arch))
    return flags


def cuda_decision() -> tuple[bool, str]:
    """Whether to build the CUDA part, and why: by the toolkit and torch, never by whether a GPU is visible here."""
    forced = os.environ.get("FORCE_CUDA")
    home = cpp_extension.CUDA_HOME = toolkit()  # where torch takes nvcc and the headers from
    if forced == "0":
        return False, "FORCE_CUDA=0"
    if not cuda_sources():
        reason = "this version has no CUDA kernels"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a CPU build"
    elif home is None:
        reason = "no CUDA toolkit found (CUDA_HOME is not set and nvcc is not on PATH)"
    elif not has_headers(home):
        reason = f"{home} holds no include/cuda_runtime.h: set CUDA_HOME to the toolkit's own folder"
    elif (version := toolkit_version(home)).split(".")[0] != torch.version.cuda.split(".")[0]:
        reason = (
            f"the toolkit {home} is of CUDA {version} and torch for CUDA {torch.version.cuda}: set CUDA_HOME to a "
            "toolkit of torch's major version, or install torch for the toolkit's"
        )
    else:
        return True, f"toolkit {home} of CUDA {version}, torch for CUDA {torch.version.cuda}"
    if forced == "1":
        raise RuntimeError(f"FORCE_CUDA=1, but the CUDA part cannot be built: {reason}")
    return False, reason


class BuildExtension(cpp_extension.BuildExtension):
    def build_extensions(self) -> None:
        compiler = os.environ.get("CXX", "c++").split()[0]
        if shutil.which(compiler) is None:
            raise CompileError(
                f"shufflenet_ext needs a C++17 compiler, and '{compiler}' was not found. Install one (or name it in "
                "CXX), or set SHUFFLENET_EXT_REFERENCE_ONLY=1 to install without native kernels."
            )
        super().build_extensions()


def extensions() -> list[Extension]:
    if os.environ.get("SHUFFLENET_EXT_REFERENCE_ONLY") == "1":
        print("shufflenet_ext: reference only, no native library (SHUFFLENET_EXT_REFERENCE_ONLY=1)")
        return []
    with_cuda, reason = cuda_decision()
    print(f"shufflenet_ext: building {'with' if with_cuda else 'without'} CUDA: {reason}")
    sources = ["csrc/library.cpp", *sorted(str(path) for path in Path("csrc/cpu").rglob("*.cpp"))]
    library = cpp_extension.CppExtension(
        "shufflenet_ext._C",
        sources,
        include_dirs=[pybind11.get_include()],  # before torch's bundled copy
        depends=[str(path) for path in Path("csrc").rglob("*.h")],
        extra_compile_args=cpp_flags(),
    )
    library.libraries = ["torch_cpu"]  # holds the stable ABI; nothing of libc10 or libtorch_python is used
    return [library, cuda_extension()] if with_cuda else [library]


def cuda_extension() -> Extension:
    """The CUDA library, apart from the CPU's: where it cannot be loaded the CPU kernels still are."""
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST")
    archs = chosen or default_cuda_archs()
    gencode = [] if chosen else gencode_of(archs)  # where there are none, torch makes flags of TORCH_CUDA_ARCH_LIST
    print(f"shufflenet_ext: CUDA kernels for {archs}")
    flags = [*cpp_flags(), "-DUSE_CUDA", f'-DSHUFFLENET_EXT_CUDA_ARCHS="{archs}"']
    extension = cpp_extension.CUDAExtension(
        "shufflenet_ext._C_cuda",
        cuda_sources(),
        include_dirs=[pybind11.get_include()],
        depends=[str(path) for suffix in ("h", "cuh") for path in Path("csrc").rglob(f"*.{suffix}")],
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-std=c++17", *gencode, *flags[-1:]]},
    )
    # The static runtime: whichever CUDA version torch brings, the library takes its own.
    extension.libraries = [name for name in extension.libraries if name != "cudart"] + ["cudart_static", "rt", "dl"]
    return extension


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
