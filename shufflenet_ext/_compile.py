"""The torch.compile backend "shufflenet_ext": units become this package's ops, inductor compiles the rest."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor.compile_fx import compile_fx  # what backend="inductor" is
from torch.fx.experimental.proxy_tensor import make_fx

from shufflenet_ext._backend import unit_variant
from shufflenet_ext._graph import TraceError, graph_of
from shufflenet_ext._match import Unit
from shufflenet_ext._network import chains_of, insert


def backend(module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compiles a graph of torch.compile. Units whose norms are in eval mode become ops, with gradients; the rest is inductor's."""
    return compile_fx(_with_ops(module, example_inputs), list(example_inputs))  # type: ignore[no-any-return]
