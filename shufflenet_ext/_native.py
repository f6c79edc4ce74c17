"""Loads the native libraries and says what they are. No other module imports them."""

import importlib
import importlib.util
from functools import cache
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

_C_cuda: ModuleType | None = None
# Why no CUDA kernel is loaded. That a loaded one can run on a card is another question: see _device_error.
cuda_error: str | None
if native_error is not None:
    cuda_error = native_error
elif importlib.util.find_spec("shufflenet_ext._C_cuda") is None:
    cuda_error = (
        "this installation was built without CUDA kernels; reinstall with --no-build-isolation "
        "where a CUDA toolkit and a CUDA build of torch are"
    )
elif torch.version.cuda is None:
    cuda_error = (
        f"the CUDA library needs a CUDA build of torch, and this is {torch.__version__}; install torch for CUDA"
    )
else:
    try:
        _C_cuda = importlib.import_module("shufflenet_ext._C_cuda")
        cuda_error = None
    except ImportError as error:
        cuda_error = f"the CUDA library is not loaded ({error}); reinstall shufflenet_ext against this torch"


@cache
def _device_error(index: int) -> str | None:
    """Why the CUDA kernels do not run on a card, and the remedy; None where they do."""
    assert _C_cuda is not None
    return _C_cuda.device_error(index) or None


def _cuda_error() -> str | None:
    """Why no CUDA kernel runs here, or None. Does not initialise CUDA where torch finds no card."""
    if cuda_error is not None:
        return cuda_error
    if not torch.cuda.is_available():
        return (
            "torch.cuda.is_available() is False: no card is visible, or its driver is missing or too old for this torch"
        )
    errors = [_device_error(i) for i in range(torch.cuda.device_count())]
    return None if None in errors else errors[0]


def uncovered(x: torch.Tensor) -> str | None:
    """Why no native kernel covers ``x``'s device and dtype; None where one does."""
    if native_error is not None:
        return native_error
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"there is no native kernel for {x.dtype}"
    if x.device.type == "cuda":
        return cuda_error or _device_error(x.device.index)
    if x.device.type not in ("cpu", "meta"):
        return f"there is no native kernel for device type {x.device.type!r}"
    return None


def cuda_plan(unit: dict[str, int], dtype: str, *, sm: int) -> dict[str, Any]:
    """How the CUDA kernel would cut a unit on a card of compute capability ``sm`` (90 for sm_90); no card is needed.

    Args:
        unit: ``batch``, ``in_channels``, ``height``, ``width``, ``mid_channels``, ``out_channels`` (0: no conv3),
            ``conv1_groups``, ``groups``, ``stride``, ``channels_last`` (0 or 1).
        dtype: ``"float32"``, ``"float64"``, ``"bfloat16"``, ``"float16"``, or ``"tfloat32"`` for float32 where torch
            allows TF32.

    Returns a dict whose ``explanation`` says it in words; ``ok`` is False where the unit cannot be planned, and the
    explanation says why. RuntimeError where the CUDA library is not loaded.
    """
    if _C_cuda is None:
        raise RuntimeError(f"no CUDA plan: {cuda_error}")
    plan: dict[str, Any] = _C_cuda.plan(unit, dtype, sm)
    return plan


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
        "cuda_archs": _C_cuda.cuda_archs.replace(";", " ").split() if _C_cuda is not None else [],
        "cuda_error": _cuda_error(),
        "native_error": native_error,
    }
