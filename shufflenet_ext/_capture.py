"""Captures a whole model as a graph in which chains of units, with their stem and head, are one module each."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

import torch
from torch import Tensor, nn

from shufflenet_ext._graph import Graph, trace
from shufflenet_ext._match import Found
from shufflenet_ext._network import Chain, Head, chains_of


@dataclass
class Captured:
    """A captured model."""

    module: torch.fx.GraphModule  # takes the model's own arguments
    chains: int
    whole: nn.Module | None  # the chain's, where the model takes a tensor, returns one and is no more than that chain
    # Sizes that the graph holds for, by the number of the tensor among the model's arguments; None: any.
    sizes: list[tuple[int | None, ...]]


# Makes the module that takes a chain's place: of the model whose tensors the chain names.
ChainModule = Callable[[nn.Module, Chain], nn.Module]


def capture(model: nn.Module, example_inputs: tuple[Any, ...], chain_module: ChainModule) -> Captured:
    """The model in eval mode, captured with these arguments.

    Batch and image size are found to be free where the graph is the same one, traced with others. All other sizes
    are fixed.
    """
    first = trace(model, example_inputs, training_too=False)
    chains = chains_of(first)
    tensors = [value for value in example_inputs if isinstance(value, Tensor)]
    sizes: list[list[int | None]] = [list(t.shape) for t in tensors]
    for free in ((0, 2, 3), (0,), (2, 3)):
        if any(size[dim] is None for size in sizes for dim in free if dim < len(size)):
            continue  # found before
        same = _same(first, chains, model, tuple(_grown(value, free) for value in example_inputs))
        if same is not None:
            chains = same
            for size in sizes:
                for dim in free:
                    if len(size) == 4 or (dim == 0 and size):
                        size[dim] = None
    module = first.program.module(check_guards=False)
    for number, chain in enumerate(chains):
        module.add_submodule(f"chain{number}", chain_module(model, chain))
    for number, chain in reversed(list(enumerate(chains))):
        call = functools.partial(_call_module, module.graph, f"chain{number}")
        replace(first, module.graph, chain, call)
    module.graph.lint()
    module.delete_all_unused_submodules()
    module.graph._tracer_cls = None  # export's own cannot be made anew, where a copy is unpickled
    # As a plain GraphModule: export's own refuses train() and eval().
    captured = torch.fx.GraphModule(module, module.graph)
    nodes = list(captured.graph.nodes)
    is_whole = [node.op for node in nodes] == ["placeholder", "call_module", "output"]
    whole = captured.get_submodule(nodes[1].target) if is_whole and first.program.call_spec.out_spec.is_leaf() else None
    return Captured(captured, len(chains), whole, [tuple(size) for size in sizes])


def _call_module(graph: torch.fx.Graph, name: str, x: torch.fx.Node) -> torch.fx.Node:
    return graph.call_module(name, (x,))


def _grown(value: Any, dims: tuple[int, ...]) -> Any:
    """An argument of another batch or image size; anything but a tensor as it is."""
    if not isinstance(value, Tensor):
        return value
    growth = {0: 1, 2: 32, 3: 16}
    shape = list(value.shape)
    for dim in dims:
        if len(shape) == 4 or (dim == 0 and shape):
            shape[dim] += growth[dim]
    return value.new_zeros(shape)


def _same(first: Graph, chains: list[Chain], model: nn.Module, inputs: tuple[Any, ...]) -> list[Chain] | None:
    """The chains as they hold for other sizes too; None where the model's graph is another one with those."""
    try:
        with torch.no_grad():
            model(*inputs)  # what it does not take it refuses here, without a word in torch's log
        other = trace(model, inputs, training_too=False)
    except Exception:  # whatever a user's code may raise
        return None
    theirs = chains_of(other)
    same = _united(chains, theirs)
    return same if same is not None and _rest(first, chains) == _rest(other, theirs) else None


def _united(ours: list[Chain], theirs: list[Chain]) -> list[Chain] | None:
    """The chains that two traces with different sizes have in common; None where they differ."""
    if len(ours) != len(theirs):
        return None
    united = []
    for one, other in zip(ours, theirs, strict=True):
        if [found.unit for found in one.units] != [found.unit for found in other.units]:
            return None
        if one.stem != other.stem or one.last != other.last:
            return None
        head = _united_head(one.head, other.head)
        if (head is None) != (one.head is None):
            return None
        united.append(changed(one, head=head))
    return united


def _united_head(one: Head | None, other: Head | None) -> Head | None:
    if one is None or other is None or one == other:
        return one if other is not None else None
    # A window that was the whole plane both times, as large as it was.
    if one.whole and other.whole and changed(one, window=0, exact=False) == changed(other, window=0, exact=False):
        return changed(one, window=0, exact=False)
    return changed(one, whole=False) if changed(one, whole=False) == changed(other, whole=False) else None


def _rest(graph: Graph, chains: list[Chain]) -> list[Any]:
    """What a graph calls besides its chains, with its arguments: the same for two graphs that compute the same."""
    inside = {id(operation.node) for chain in chains for operation in chain.operations}
    inside |= {id(end_node(graph, chain)) for chain in chains}
    needed = _needed(graph, inside)
    order = {node: number for number, node in enumerate(needed)}

    def numbered(node: torch.fx.Node) -> Any:
        return ("node", order.get(node, "chain"))

    return [
        (node.op, str(node.target), torch.fx.node.map_arg((node.args, node.kwargs), numbered))
        for node in needed
        if id(node) not in inside
    ]


def _needed(graph: Graph, inside: set[int]) -> list[torch.fx.Node]:
    """The nodes that the outputs need when the chains' operations need nothing."""
    nodes = list(graph.program.graph.nodes)
    needed: set[torch.fx.Node] = set()
    stack = [node for node in nodes if node.op == "output"]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        if id(node) not in inside:
            stack += node.all_input_nodes
    # A chain's operations count by their ends alone.
    return [node for node in nodes if node in needed and node.op != "placeholder"]


def end_node(graph: Graph, part: Chain | Found) -> torch.fx.Node:
    """The node whose tensor is what a chain or a unit ends in: its last operation, or what joins the last ones."""
    last = max(operation.node for operation in part.operations)
    return next(node for node in graph.holders[part.end] if not node < last)


def _twin(node: torch.fx.Node, by_name: dict[str, torch.fx.Node]) -> torch.fx.Node:
    """A traced graph's node in a copy of the graph, where inputs may have other names: as what reads them has them."""
    if node.op != "placeholder":
        return by_name[node.name]
    reader = next(user for user in node.users if user.name in by_name)
    return by_name[reader.name].all_input_nodes[reader.all_input_nodes.index(node)]


def replace(
    graph: Graph,
    target: torch.fx.Graph,
    part: Chain | Found,
    call_of: Callable[[torch.fx.Node], torch.fx.Node],
) -> None:
    """Puts a call in the place of a chain or a unit in ``target``, the traced graph itself or a copy of it.

    Of parts that follow each other, the last must be replaced first.
    """
    by_name = {node.name: node for node in target.nodes}
    first = min(operation.node for operation in part.operations)
    x = [node for node in graph.holders[part.input] if node < first][-1]
    with target.inserting_before(by_name[first.name]):
        call = call_of(_twin(x, by_name))
    by_name[end_node(graph, part).name].replace_all_uses_with(call)
    members = {operation.node.name for operation in part.operations}
    for node in reversed(list(target.nodes)):
        # fx counts a dropout as impure, even one that drops nothing.
        pure = node.op in ("call_function", "get_attr") and not node.is_impure()
        idle = node.target is torch.ops.aten.dropout.default and not node.args[2]
        if (node.name in members or pure or idle) and not node.users and node is not call:
            target.erase_node(node)
