"""explain, which says how a unit would run."""

from collections.abc import Sequence
from typing import Any

import torch

from shufflenet_ext import _native
from shufflenet_ext._checks import check_int
from shufflenet_ext.modules import ShuffleBottleneck, unfusable, unit_sizes


def explain(
    unit: ShuffleBottleneck,
    shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    sm: int | None = None,
) -> dict[str, Any]:
    """Says how a unit in eval mode would run on an input, under the backend "auto". It runs nothing.

    Args:
        unit: a :class:`FusedShuffleBottleneck`, or a :class:`ShuffleBottleneck`, explained as if it were fused.
        shape: of the input, (N, in_channels, H, W).
        dtype: of the input and the unit; by default that of the unit's parameters.
        device: "cpu", "cuda:0" and so on; by default the one that the unit is on.
        memory_format: of the input, torch.contiguous_format or torch.channels_last.
        sm: instead of a device, the compute capability of a CUDA card that need not be here: 75, 80, 86, 89, 90, 100
            or 120.

    Returns a dict with these keys:

    - ``backend``: "native" or "reference".
    - ``explanation``: the same in words; for "reference", the cause.
    - ``isa``, on the CPU: the instruction set of the kernel.
    - On CUDA, how the planner cuts the unit: ``tile_rows`` and ``tile_columns``, the window of result pixels that a
      block computes; ``slices``, the groups of conv3 that it computes; ``chunk``, the intermediate channels that it
      computes at once; ``tile_depth``, the channels of x that a warp multiplies at once; ``windows``, their number in
      the whole launch; ``shared_bytes``, the shared memory of a block; ``blocks_per_multiprocessor``, how many run
      side by side; ``multiprocessors``, the card's; ``cycles``, an estimate that is good only to compare;
      ``result_shape``.

    Raises TypeError or ValueError, naming the argument, for bad arguments; RuntimeError for ``sm`` where no CUDA
    library is loaded, which holds the planner.
    """
    if not isinstance(unit, ShuffleBottleneck):
        raise TypeError(f"unit: got {type(unit).__name__}, expected a FusedShuffleBottleneck or a ShuffleBottleneck")
    shape = tuple(shape)
    for size in shape:
        check_int("shape", size)
    channels = unit.conv1.in_channels
    if len(shape) != 4 or shape[1] != channels or shape[0] < 0 or min(shape[2:]) < 1:
        raise ValueError(f"shape: got {list(shape)}, expected [batch, {channels}, height, width]")
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(f"memory_format: got {memory_format}, expected torch.contiguous_format or torch.channels_last")
    for conv, norm in unit.pairs():
        cause = unfusable(conv, norm)
        if cause is not None:
            return {"backend": "reference", "explanation": cause}
    (sizes,) = unit_sizes(unit)
    weight = unit.conv1.weight
    dtype = weight.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: got {type(dtype).__name__}, expected a torch.dtype")

    def planned(**card: int) -> dict[str, Any]:
        plan = _native.cuda_plan(shape, sizes, memory_format == torch.channels_last, dtype, **card)
        if plan.pop("ok"):
            return {"backend": "native", **plan}
        return {"backend": "reference", "explanation": plan["explanation"]}

    if sm is not None:
        check_int("sm", sm)
        if device is not None:
            raise ValueError(f"sm: got {sm} and device {str(device)!r}, expected one of the two")
        if _native.cuda_error is not None:
            raise RuntimeError(f"sm: got {sm}, but the CUDA library holds the planner: {_native.cuda_error}")
        return planned(sm=sm)
    device = weight.device if device is None else torch.device(device)
    if device.type == "meta":
        raise ValueError("device: got 'meta', expected a device that computes")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    cause = _native.uncovered(shape, dtype, device, lambda: [sizes])
    if cause is not None:
        return {"backend": "reference", "explanation": cause}
    if device.type == "cuda":
        return planned(index=device.index)
    isa = _native.cpu_isa()
    return {"backend": "native", "explanation": f"one op on the CPU, by its {isa} kernel", "isa": isa}
