"""Runs a unit of ShuffleNet v2, with its norms in eval mode, by the native ops."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shufflenet_ext import ops
from shufflenet_ext._fold import fold_norm


def run_unit_v2(
    x: Tensor,
    tensors: list[list[Tensor | None]],
    eps: Sequence[float | None],
    program: list[int],
    options: dict[str, Any],
) -> Tensor:
    """The unit's result.

    ``tensors`` and ``eps`` are those of each convolution, as fold_norm takes them; ``program`` is the unit as
    shuffle_network's only step, ``options`` are the keyword arguments of shuffle_unit_v2. Where gradients may be
    wanted, or autocast is on, norms are folded by PyTorch's own operations, ahead of an op that knows of both.
    """
    if not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
        flat = [tensor for stage in tensors for tensor in stage]
        return torch.ops.shufflenet_ext.shuffle_network_batch_norm(x, flat, [each or 0.0 for each in eps], program)
    folded = [tensor for stage, each in zip(tensors, eps, strict=True) for tensor in fold_norm(stage, each)]
    return ops.shuffle_unit_v2(x, *folded, **options)
