"""The torch.compile backend "shufflenet_ext": units become this package's ops, inductor compiles the rest."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx  # what backend="inductor" is
from torch.fx.experimental.proxy_tensor import make_fx

from shufflenet_ext._capture import replace
from shufflenet_ext._fused import run_unit, stage_names
from shufflenet_ext._graph import TraceError, graph_of
from shufflenet_ext._match import Unit
from shufflenet_ext._network import chains_of


def backend(module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compiles a graph for torch.compile.

    Units with all their norms in eval mode become ops, which have gradients. Inductor compiles all else, and graphs of
    symbolic sizes as they are.
    """
    compiled: Any = compile_fx(_with_ops(module, example_inputs), list(example_inputs))
    assert callable(compiled)
    return compiled


def _with_ops(module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> torch.fx.GraphModule:
    if any(isinstance(value, torch.SymInt) for value in example_inputs):
        return module  # make_fx would take symbolic sizes for the numbers that they are now
    # Tracing runs the graph, and a norm in training mode would update the model's statistics once more.
    copies = [_copied(value) if isinstance(value, Tensor) else value for value in example_inputs]
    traced = make_fx(module, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*copies)
    try:
        chains = chains_of(graph_of(traced))
    except TraceError:
        return module
    inputs = {node.name: node for node in traced.graph.nodes if node.op == "placeholder"}
    on_cuda = any(isinstance(value, Tensor) and value.is_cuda for value in example_inputs)
    found = [found for chain in chains for found in chain.units if not (on_cuda and found.unit.variant)]
    for each in found:
        names = [stage_names(stage) for stage in each.unit.stages]
        tensors = [[None if name is None else inputs[name] for name in stage] for stage in names]
        in_order = all(stage.order is None and stage.norm_order is None for stage in each.unit.stages)
        if in_order:
            replace(traced.graph, each.operations, each.end, _call(traced.graph, each.unit, tensors))
    if not found:
        return module
    traced.graph.lint()
    traced.recompile()
    return traced


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _call(graph: torch.fx.Graph, unit: Unit, tensors: list[list[Any]]) -> Callable[[torch.fx.Node], torch.fx.Node]:
    def run(x: Tensor, tensors: list[list[Tensor | None]]) -> Tensor:
        return run_unit(x, unit, tensors)

    return lambda x: graph.call_function(run, (x, tensors))
