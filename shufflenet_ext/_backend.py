"""Decides whether a call runs the native kernel or the reference."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal, get_args

import torch

from shufflenet_ext import _native, reference

Backend = Literal["auto", "native", "reference"]


class ReferenceFallbackWarning(UserWarning):
    """Warns of a call that the native kernels do not cover, and that therefore ran the reference."""


def _checked(backend: str, source: str) -> str:
    if backend not in get_args(Backend):
        expected = ", ".join(repr(name) for name in get_args(Backend))
        raise ValueError(f"{source}: got {backend!r}, expected one of {expected}")
    return backend


_backend = _checked(os.environ.get("SHUFFLENET_EXT_BACKEND", "auto"), "SHUFFLENET_EXT_BACKEND")
_warned: set[str] = set()


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Selects what runs inside a ``with`` block, in every thread of the process.

    ``"auto"`` (the default, or what the environment variable ``SHUFFLENET_EXT_BACKEND`` names) runs the native kernel
    where it covers the device, the dtype and the unit. Elsewhere it runs the reference, and warns once of each cause.
    Under torch.compile and torch.export the choice is made while tracing, for every batch and size of image.
    ``"native"`` raises RuntimeError where ``"auto"`` would run the reference. ``"reference"`` always runs plain
    PyTorch. Raises ValueError for any other name.
    """
    global _backend
    previous = _backend
    _backend = _checked(backend, "backend")
    try:
        yield
    finally:
        _backend = previous


def fall_back(cause: str) -> None:
    """Reports that a call cannot run natively: raises under "native", warns once of each cause under "auto"."""
    if _backend == "native":
        raise RuntimeError(f"backend 'native' was asked for, but {cause}")
    _warn_once(cause)


def _warn_once(cause: str) -> None:
    if cause not in _warned:
        _warned.add(cause)
        warnings.warn(f"running the PyTorch reference: {cause}", ReferenceFallbackWarning, stacklevel=4)


_native.run_while_tracing(_warn_once)  # as torch.compile cannot trace a warning


def unit_variant(
    groups: int, shuffle_groups: int | None, shortcut_first: bool, shortcut_relu: bool, stride: int
) -> dict[str, Any]:
    """The keyword arguments that set a unit apart from the original code's; none for that one.

    They are passed only where they say something, as each takes time in the dispatcher.
    """
    variant: dict[str, Any] = {}
    if shuffle_groups is not None and shuffle_groups != groups:
        variant["shuffle_groups"] = shuffle_groups
    if stride == 2 and shortcut_first:
        variant["shortcut_first"] = True
    if stride == 2 and not shortcut_relu:
        variant["shortcut_relu"] = False
    return variant


def runs_native(x: torch.Tensor, units: Callable[[], Iterable[_native.UnitSizes]], version: int = 1) -> bool:
    """Whether a call of ``units``, one behind the other, on ``x`` runs the native kernel under the backend in use.

    ``version`` is that of the ShuffleNet they are units of.
    """
    if _backend == "reference" or (torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()):
        return False  # TorchScript's ONNX exporter takes PyTorch's operations alone; the other one knows ours (ops.py)
    if _native.native_error is None and x.is_cpu and x.dtype in _native.DTYPES:  # asked first, as it is most calls
        return True
    if version == 2 and x.is_cuda:
        fall_back("there is no CUDA kernel for units of ShuffleNet v2")
        return False
    cause = _native.uncovered(x.shape, x.dtype, x.device, units)
    if cause is None:
        return True
    fall_back(cause)
    return False


def trains_native(x: torch.Tensor, version: int = 1) -> bool:
    """Whether a training step of a unit on ``x`` runs the native passes under the backend in use.

    ``version`` is that of the ShuffleNet it is a unit of.
    """
    if _backend == "reference" or (torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()):
        return False
    cause = _native.untrainable(x)
    if version == 2:
        cause = "there is no native training step of units of ShuffleNet v2"
    if cause is None:
        return True
    fall_back(cause)
    return False


class _Settings(ModuleType):
    """Torch's settings, as attributes of a module: there torch.compile reads an attribute and guards its value.

    It can trace neither a call of the getter nor ``torch.backends.cudnn.conv``. It can trace the older
    ``torch.backends.cudnn.allow_tf32``, but reading that raises where convolutions and recurrent layers have different
    settings.
    """

    @property
    def convolutions_use_tf32(self) -> bool:
        return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]  # not in torch's stubs


_settings = _Settings("settings")


def allows_tf32(x: torch.Tensor) -> bool:
    """Whether torch lets a convolution of ``x`` round its operands to TF32."""
    return x.is_cuda and x.dtype == torch.float32 and _settings.convolutions_use_tf32


def implementation(
    x: torch.Tensor, units: Callable[[], Iterable[_native.UnitSizes]], version: int = 1
) -> tuple[Any, dict[str, Any]]:
    """What runs a call of ``units`` on ``x`` under the backend in use, and the keyword arguments that only it takes."""
    if runs_native(x, units, version):
        # A keyword argument takes its time in the dispatcher.
        return torch.ops.shufflenet_ext, {"allow_tf32": True} if allows_tf32(x) else {}
    return reference, {}
