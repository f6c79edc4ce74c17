"""Recognises units of either version in a traced graph."""

from shufflenet_ext._graph import Graph, Wire
from shufflenet_ext._match import AnyUnit, Found, NearMiss, unit_at
from shufflenet_ext._match_v2 import unit_v2_at


def unit_ending_in(end: Wire, graph: Graph) -> Found:
    """The unit whose result a wire holds. NearMiss, with the cause that came nearest, where it is none's."""
    try:
        return unit_at(end)
    except NearMiss as miss:
        first = miss
    try:
        return unit_v2_at(end, graph)
    except NearMiss as second:
        raise max(first, second, key=lambda miss: miss.depth) from None


def unit_of(graph: Graph) -> AnyUnit:
    """The unit that a traced module is. NearMiss, with the cause, where it is none."""
    if len(graph.outputs) != 1 or not isinstance(graph.outputs[0], Wire):
        raise NearMiss(0, "it does not return one tensor made of whole channels")
    if len(graph.inputs) != 1:
        raise NearMiss(0, "it does not take one tensor")
    found = unit_ending_in(graph.outputs[0], graph)
    if found.input.only() is not graph.inputs[0]:
        raise NearMiss(6, "its first convolution does not read its input as it is")
    taken = {id(operation) for operation in [*found.operations, *graph.inputs]}
    for operation in graph.operations:
        if id(operation) not in taken:
            raise NearMiss(6, f"it computes more than a unit: {operation.name}")
    return found.unit
