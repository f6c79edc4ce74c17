"""Builds the native library through torch.utils.cpp_extension; everything else is in pyproject.toml.

Environment:
    SHUFFLENET_EXT_REFERENCE_ONLY=1   installs no native library, so that no compiler is needed
    FORCE_CUDA=1 / 0                  builds the CUDA part or fails / leaves it out
    TORCH_CUDA_ARCH_LIST, MAX_JOBS, CUDA_HOME, CXX   as for every PyTorch extension
"""

import os
import shutil
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from setuptools.errors import CompileError
from torch.utils import cpp_extension

# The oldest torch that the library runs under: the target of LibTorch's stable ABI, as in pyproject.toml.
TORCH_TARGET_VERSION = "0x020b000000000000ULL"


def cpp_flags() -> list[str]:
    flags = ["-O3", "-std=c++17", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    return [*flags, f'-DSHUFFLENET_EXT_TORCH_VERSION="{torch.__version__}"']


def cuda_sources() -> list[str]:
    return sorted(str(path) for suffix in ("cu", "cpp") for path in Path("csrc/cuda").glob(f"*.{suffix}"))


def cuda_decision() -> tuple[bool, str]:
    """Whether to build the CUDA part, and why: by the toolkit and torch, never by whether a GPU is visible here."""
    forced = os.environ.get("FORCE_CUDA")
    home = cpp_extension.CUDA_HOME
    if forced == "0":
        return False, "FORCE_CUDA=0"
    if not cuda_sources():
        reason = "this version has no CUDA kernels"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a CPU build"
    elif home is None:
        reason = "no CUDA toolkit found (CUDA_HOME is not set and nvcc is not on PATH)"
    elif not Path(home, "include", "cuda_runtime.h").is_file():
        reason = f"{home} holds no include/cuda_runtime.h: set CUDA_HOME to the toolkit's own folder"
    else:
        return True, f"toolkit {home}, torch for CUDA {torch.version.cuda}"
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
    sources = ["csrc/library.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]
    library = cpp_extension.CppExtension(
        "shufflenet_ext._C",
        sources,
        include_dirs=[pybind11.get_include()],  # before torch's bundled copy
        depends=[str(path) for path in Path("csrc").rglob("*.h")],
        extra_compile_args=cpp_flags(),
    )
    library.libraries = ["torch_cpu"]  # holds the stable ABI; nothing of libc10 or libtorch_python is used
    return [library]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
