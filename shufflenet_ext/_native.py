"""Loads the native libraries and says what they are. No other module imports them."""

import importlib
from importlib import metadata
from types import ModuleType
from typing import Any

import torch

_C: ModuleType | None
native_error: str | None
try:
    _C = importlib.import_module("shufflenet_ext._C")
    native_error = None
except ImportError as error:
    _C = None
    native_error = f"the native library is not loaded ({error})"

cuda_error: str | None = "this version has no CUDA kernels"


def uncovered(x: torch.Tensor) -> str | None:
    """Why no native kernel covers ``x``'s device and dtype; None where one does."""
    if native_error is not None:
        return native_error
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"there is no native kernel for {x.dtype}"
    if x.device.type == "cuda":
        return cuda_error
    if x.device.type not in ("cpu", "meta"):
        return f"there is no native kernel for device type {x.device.type!r}"
    return None


def cpu_isas() -> list[str]:
    """The instruction sets with kernels usable on this processor, the most capable last."""
    return _C.cpu_isas() if _C is not None else []


def select_cpu_isa(isa: str) -> None:
    """Makes the CPU kernels of ``isa`` the ones that run. ValueError if it is not one of :func:`cpu_isas`."""
    if _C is None:
        raise RuntimeError(f"isa: got {isa!r}, but {native_error}")
    _C.select_cpu_isa(isa)


def build_info() -> dict[str, Any]:
    """What is installed and in use.

    Returns a dict: ``version``; ``torch``, the version built against; ``compiler``; ``cpu_isa``, in use; ``cpu_isas``,
    usable on this processor (the environment variable ``SHUFFLENET_EXT_CPU_ISA`` forces one); ``cuda_archs``, the
    architectures that CUDA kernels were compiled for; ``cuda_error``, why CUDA kernels are missing, or None;
    ``native_error``, why the native library is missing, or None.
    """
    return {
        "version": metadata.version("shufflenet_ext"),
        "torch": _C.torch_version if _C is not None else None,
        "compiler": _C.compiler if _C is not None else None,
        "cpu_isa": _C.cpu_isa() if _C is not None else None,
        "cpu_isas": cpu_isas(),
        "cuda_archs": [],
        "cuda_error": cuda_error,
        "native_error": native_error,
    }
