"""The weights of a program on CUDA in the order in which its kernels read them, packed once, not by each call."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MOST = 8  # shapes of x that weights are kept packed for; calls with further ones pack them again


@dataclass
class _Packed:
    weights: Tensor
    source: weakref.ref[Tensor]  # what they were packed from,
    address: int  # where that lay,
    changes: int  # and how often it had been changed in place

    def is_of(self, source: Tensor) -> bool:
        """Whether the weights were packed from what ``source`` is now."""
        return self.source() is source and (self.address, self.changes) == (source.data_ptr(), source._version)


class PackedWeights:
    """What a module keeps of :func:`pack_network`'s results. Copies of the module, and pickles, begin with none."""

    def __init__(self) -> None:
        self._packed: dict[Any, _Packed] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedWeights, ()

    def of(self, x: Tensor, weights: Tensor, program: list[int], source: Tensor) -> Tensor | None:
        """The weights for calls with ``x``; None where the op has to pack them itself.

        ``weights`` is ``source``, or a part of it. What was packed once stays where it is: CUDA graphs may read it.
        Where ``source`` is changed, it is packed into the same memory, by the next call outside of a graph.
        """
        if _is_traced(x, weights) or source.is_inference():  # which does not count its changes
            return None
        key = x.shape, x.stride(), x.dtype, weights.device
        found = self._packed.get(key)
        if found is not None and found.is_of(source):
            return found.weights
        if found is None and len(self._packed) >= _MOST:
            return None
        with torch.cuda.device(x.device):
            if torch.cuda.is_current_stream_capturing():
                return None
            packed: Tensor = torch.ops.shufflenet_ext.pack_network(x, weights, program)
            if found is not None:
                packed = found.weights.copy_(packed)
            torch.cuda.current_stream().synchronize()  # so that other streams may read it from now on
        self._packed[key] = _Packed(packed, weakref.ref(source), source.data_ptr(), source._version)
        return packed


def _is_traced(*tensors: Tensor) -> bool:
    """Whether somebody looks at or changes what ops do: compilers, transforms, autocast, modes, tensor subclasses."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled("cuda")
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(tensor) is not Tensor for tensor in tensors)
    )
