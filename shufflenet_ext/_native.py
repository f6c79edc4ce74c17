"""Loads the native libraries, which no other module imports, and says what they are and can do."""

import importlib
import importlib.util
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
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
# Why no CUDA kernel is loaded; None where one is. Whether that can run on a card is asked of _device_error.
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


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # those that there are kernels for


def run_while_tracing(function: Callable[..., Any]) -> None:
    """Makes torch.compile run the function itself while it traces, and take the result as a constant.

    This is what torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]


# A unit as the planner takes it: the shape of conv1's weight, that of conv3's if there is one, conv1_groups, groups,
# stride and shuffle_groups, all in one tuple.
UnitSizes = tuple[int, ...]


@cache
def _device_error(index: int) -> str | None:
    """Why the CUDA kernels do not run on a card, and the remedy; None where they do. Makes no context there."""
    assert _C_cuda is not None
    return _C_cuda.device_error(index) or None


def _cuda_error() -> str | None:
    """Why no CUDA kernel runs here, and the remedy, or None.

    To ask a card initialises the driver, and a process cannot use CUDA behind a fork where it was initialised before.
    So cards are asked once torch has done that. Until then it is known whether the driver is new enough, and by NVML,
    where that is there, how many cards torch will find.
    """
    if cuda_error is not None:
        return cuda_error
    assert _C_cuda is not None
    least = max(_C_cuda.cuda_version // 1000, int(str(torch.version.cuda).split(".")[0]))
    if _C_cuda.driver_version() // 1000 < least or torch.cuda.device_count() == 0:
        return _device_error(0) or (
            f"torch finds no CUDA device: the driver is too old for a torch for CUDA {torch.version.cuda}; "
            "update the driver, or install torch for an older CUDA"
        )
    if not torch.cuda.is_initialized():
        return None
    errors = [_device_error(i) for i in range(torch.cuda.device_count())]
    return None if None in errors else errors[0]


@lru_cache(maxsize=1024)  # bounds the memory that shapes take which change with every call
def _plan_error(shape: tuple[int, ...], dtype: torch.dtype, index: int, units: tuple[UnitSizes, ...]) -> str | None:
    """Why the CUDA kernel cannot be cut to one of the units, which run one behind the other; None where it can."""
    for sizes in units:
        for channels_last in (False, True):
            try:
                plan = cuda_plan(shape, sizes, channels_last, dtype, index=index)
            except ValueError:
                return None  # These describe no unit. The op will say which argument is wrong.
            if not plan["ok"]:
                return f"no CUDA kernel can be planned for this unit ({plan['explanation']})"
        shape = plan["result_shape"]
    return None


def _cuda_obstacle(shape: tuple[int, ...], dtype: torch.dtype, index: int, units: tuple[UnitSizes, ...]) -> str | None:
    return _device_error(index) or _plan_error(shape, dtype, index, units)


# A compiled graph keeps the answer that was given while it was traced.
run_while_tracing(_cuda_obstacle)


def uncovered(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, units: Callable[[], Iterable[UnitSizes]]
) -> str | None:
    """Why no native kernel covers the input and the units, one behind the other; None where one does.

    Only CUDA asks for the units: the CPU kernels cover all.
    """
    if native_error is not None:
        return native_error
    if dtype not in DTYPES:
        return f"there is no native kernel for {dtype}"
    if device.type == "cuda":
        if cuda_error is not None:
            return cuda_error
        # A compiled graph may run any batch and any size of image. As a window can be as small as a pixel, it depends
        # on the channels alone whether there is a plan.
        if torch.compiler.is_compiling():
            shape = (1, *shape[1:2], 1, 1)
        # Where channels or groups are symbolic numbers, this fixes them in the graph.
        sizes = tuple(tuple(map(operator.index, unit)) for unit in units())
        return _cuda_obstacle(tuple(map(operator.index, shape)), dtype, device.index, sizes)
    if device.type not in ("cpu", "meta"):
        return f"there is no native kernel for device type {device.type!r}"
    return None


def untrainable(x: torch.Tensor) -> str | None:
    """Why no native training step covers the input; None where one does."""
    if native_error is not None:
        return native_error
    if x.dtype not in DTYPES:
        return f"there is no native kernel for {x.dtype}"
    if x.device.type not in ("cpu", "meta"):
        return f"there is no native training step on device type {x.device.type!r}"
    if x.dim() == 4 and x.shape[0] == 0:
        return "there is no native training step on an empty batch"
    return None


def cuda_plan(
    shape: Sequence[int],
    sizes: UnitSizes,
    channels_last: bool,
    dtype: torch.dtype,
    *,
    index: int = 0,
    sm: int | None = None,
) -> dict[str, Any]:
    """How the planner cuts a unit for an input of this shape, on device ``index`` or, if given, on a card of ``sm``.

    Raises ValueError if the sizes describe no unit, or if the planner knows no card of ``sm``.
    """
    assert _C_cuda is not None
    plan: dict[str, Any] = _C_cuda.plan(shape, sizes, channels_last, str(dtype).removeprefix("torch."), index, sm)
    return plan


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether kernels treat x, and write their result, as channels_last: the same rule as layout_of in arguments.h."""
    return x.dim() == 4 and not x.is_contiguous() and x.stride(1) == 1


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """The format that kernels write a result of four dimensions in."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def describe(x: torch.Tensor, weights: torch.Tensor, program: Sequence[int], threads: int) -> dict[str, Any]:
    """How the CPU's shuffle_network would run on so many threads; see csrc/library.cpp. This runs nothing."""
    assert _C is not None
    dtype, weights_dtype = (str(tensor.dtype).removeprefix("torch.") for tensor in (x, weights))
    description: dict[str, Any] = _C.describe(
        x.shape, is_channels_last(x), dtype, weights.numel(), weights_dtype, program, threads
    )
    return description


def profile(call: Callable[[], object]) -> list[float]:
    """The seconds that each step of the CPU's ops in the call takes, on the thread that works longest."""
    assert _C is not None
    _C.start_profile()
    try:
        call()
    finally:
        seconds: list[float] = _C.finish_profile()
    return seconds


def measure_peak(dtype: torch.dtype) -> float:
    """The floating-point operations a second that torch's threads do at most, by the ISA in use, on ``dtype``."""
    assert _C is not None
    peak: float = _C.measure_peak(str(dtype).removeprefix("torch."))
    return peak


def cpu_isa() -> str | None:
    """The instruction set in use."""
    return _C.cpu_isa() if _C is not None else None


def cpu_isas() -> list[str]:
    """The instruction sets with kernels usable on this processor, the most capable last."""
    return _C.cpu_isas() if _C is not None else []


def select_cpu_isa(isa: str) -> None:
    """Makes the CPU kernels of ``isa`` the ones that run. Raises ValueError if it is not one of :func:`cpu_isas`."""
    if _C is None:
        raise RuntimeError(f"isa: got {isa!r}, but {native_error}")
    _C.select_cpu_isa(isa)


def build_info() -> dict[str, Any]:
    """What is installed and in use.

    Returns a dict: ``version``; ``torch``, the version built against; ``compiler``; ``cpu_isa``, in use; ``cpu_isas``,
    usable on this processor (the environment variable ``SHUFFLENET_EXT_CPU_ISA`` forces one); ``cuda_archs``, the
    architectures that CUDA kernels were compiled for; ``cuda_error``, why CUDA kernels are missing, or None;
    ``native_error``, why the native library is missing, or None. Nothing is initialised to answer: whether the kernels
    were compiled for a card that is here, ``cuda_error`` says once torch has initialised CUDA (``torch.cuda.init``).
    """
    return {
        "version": metadata.version("shufflenet_ext"),
        "torch": _C.torch_version if _C is not None else None,
        "compiler": _C.compiler if _C is not None else None,
        "cpu_isa": cpu_isa(),
        "cpu_isas": cpu_isas(),
        "cuda_archs": _C_cuda.cuda_archs.replace(";", " ").split() if _C_cuda is not None else [],
        "cuda_error": _cuda_error(),
        "native_error": native_error,
    }
