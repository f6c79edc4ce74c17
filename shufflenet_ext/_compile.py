"""The torch.compile backend "shufflenet_ext": units become this package's ops, inductor compiles the rest."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx  # what backend="inductor" is
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from shufflenet_ext._capture import replace
from shufflenet_ext._fused import run_unit, stage_names
from shufflenet_ext._graph import Operation, TraceError, graph_of
from shufflenet_ext._match import Unit
from shufflenet_ext._network import chains_of


def backend(module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compiles a graph for torch.compile: units with all their norms in eval mode become ops, which have gradients."""
    compiled: Any = compile_fx(_with_ops(module), list(example_inputs))
    assert callable(compiled)
    return compiled


def _with_ops(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    # Inputs as dynamo traced them: without data, so that no norm is updated by tracing once more, and of symbolic sizes
    # where a second call had other ones.
    values = [node.meta.get("example_value") for node in module.graph.nodes if node.op == "placeholder"]
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    if mode is None:
        return module
    with mode:
        traced = make_fx(module, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*values)
    try:
        chains = chains_of(graph_of(traced))
    except TraceError:
        return module
    inputs = {node.name: node for node in traced.graph.nodes if node.op == "placeholder"}
    found = [found for chain in chains for found in chain.units]
    for each in found:
        names = [stage_names(stage) for stage in each.unit.stages]
        tensors = [[None if name is None else inputs[name] for name in stage] for stage in names]
        in_order = all(stage.order is None and stage.norm_order is None for stage in each.unit.stages)
        if in_order and not any(map(_depends_on_sizes, each.operations)):
            replace(traced.graph, each.operations, each.end, _call(traced.graph, each.unit, tensors))
    if not found:
        return module
    traced.graph.lint()
    traced.recompile()
    return traced


def _depends_on_sizes(operation: Operation) -> bool:
    """Whether a symbolic size is among its numbers, such as a pool's window: it is what it is for some sizes alone."""
    return any(isinstance(node.meta.get("val"), torch.SymInt) for node in operation.node.all_input_nodes)


def _call(graph: torch.fx.Graph, unit: Unit, tensors: list[list[Any]]) -> Callable[[torch.fx.Node], torch.fx.Node]:
    def run(x: Tensor, tensors: list[list[Tensor | None]]) -> Tensor:
        return run_unit(x, unit, tensors)

    return lambda x: graph.call_function(run, (x, tensors))
