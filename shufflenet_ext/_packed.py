"""The weights of a program on CUDA in the order in which its kernels read them, packed once, not by each call."""

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MOST = 8  # shapes of x that weights are kept packed for; calls with further ones pack them again


@dataclass
class _Packed:
    weights: Tensor | None  # none where the kernels read them as they are
    source: Tensor  # what they were packed from
    address: int  # of the source then
    changes: int  # of the source in place, until then

    def is_of_now(self) -> bool:
        """Whether the source is what it was."""
        return (self.address, self.changes) == (self.source.data_ptr(), self.source._version)


class PackedWeights:
    """What a module keeps of :func:`pack_network`'s results. Copies of the module, and pickles, begin with none.

    What was packed stays where it is, as CUDA graphs may read it. Weights that are changed in place are packed anew
    into the same memory, by the next call outside of a graph; other tensors in their place have memory of their own. A
    change that PyTorch does not count, through ``weights.data``, is not seen.
    """

    def __init__(self) -> None:
        self._packed: dict[Any, _Packed] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedWeights, ()

    def of(
        self, x: Tensor, weights: Tensor, program: list[int], source: Tensor, settings: dict[str, Any]
    ) -> Tensor | None:
        """The weights for calls with ``x`` and these settings; None where the op has to pack them itself, or need not.

        ``weights`` is ``source``, or a part of it.
        """
        if _is_traced(x, weights) or source.is_inference():  # which does not count its changes
            return None
        key = x.shape, x.stride(), x.dtype, id(source), *settings.items()
        found = self._packed.get(key)
        if found is None or not found.is_of_now():
            with self._lock:
                found = self._pack(key, x, weights, program, source, settings)
        return None if found is None else found.weights

    def _pack(
        self, key: Any, x: Tensor, weights: Tensor, program: list[int], source: Tensor, settings: dict[str, Any]
    ) -> _Packed | None:
        found = self._packed.get(key)
        if found is not None and found.is_of_now():  # another thread was here first
            return found
        with torch.cuda.device(x.device), torch.inference_mode(False), torch.no_grad():
            if torch.cuda.is_current_stream_capturing():
                return None
            if found is None and len(self._packed) >= _MOST:
                torch.cuda.synchronize()  # streams may read what is forgotten
                self._packed = {other: each for other, each in self._packed.items() if each.source is source}
                if len(self._packed) >= _MOST:
                    return None
            packed: Tensor = torch.ops.shufflenet_ext.pack_network(x, weights, program, **settings)
            if found is not None and found.weights is not None:
                packed = found.weights.copy_(packed)
            made = _Packed(packed if packed.numel() > 0 else None, source, source.data_ptr(), source._version)
            torch.cuda.current_stream().synchronize()  # so that other streams may read it from now on
        self._packed[key] = made
        return made


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
