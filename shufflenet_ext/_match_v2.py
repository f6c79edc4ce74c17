"""Recognises units of ShuffleNet v2 in a traced graph, as _match.py does those of v1.

Which channels are split off, joined and shuffled, and how, the numbers of the graph say: what a unit's last tensor
holds is undone by each shuffle there may be until it is two parts, one of them a convolution's whole result.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from shufflenet_ext._graph import Graph, Operation, Wire, wire_of
from shufflenet_ext._match import (
    Found,
    NearMiss,
    Stage,
    UnitV2,
    depthwise_stride,
    expect_in_order,
    named,
    past_relu,
    square,
    stage,
    whole,
)

Channels = list[tuple[Operation, int]]


@dataclass
class _Branch:
    """Convolutions one behind the other: the main branch, or a shortcut."""

    input: Wire
    stages: list[Stage]
    channels: list[int]  # of each stage
    stride: int
    operations: list[Operation]


def unit_v2_at(end: Wire, graph: Graph) -> Found:
    """The unit of v2 whose result a wire holds. NearMiss where it is none's."""
    causes = []
    for groups, joined in _unshuffled(end.channels()):
        try:
            return _joined_unit(joined, groups, end, graph)
        except NearMiss as miss:
            causes.append(miss)
    raise max(causes, key=lambda miss: miss.depth)


def _unshuffled(channels: Channels) -> Iterator[tuple[int, Channels]]:
    """Each shuffle, by its groups, of which these channels may be the result, and what was shuffled."""
    count = len(channels)
    for groups in dict.fromkeys((2, count // 2, 1)):
        if groups > 0 and count % groups == 0:
            rows = count // groups
            # Channel c of the result is (c % groups) * rows + c // groups of what was shuffled.
            yield groups, [channels[row * groups + group] for group in range(groups) for row in range(rows)]


def _joined_unit(joined: Channels, shuffle_groups: int, end: Wire, graph: Graph) -> Found:
    last = joined[-1][0]
    own = len(last.result.channels())
    if joined[-own:] != last.result.channels() or own == len(joined):
        raise NearMiss(0, "its result is not one part that passes by, or a shortcut, and a convolution's, shuffled")
    main = _branch(last.result, pointwise_first=True)
    beside = wire_of(joined[:-own])
    if main.stride == 2:
        shortcut = _branch(beside, pointwise_first=False)
        if shortcut.stride != 2:
            raise NearMiss(6, "the shortcut's depthwise convolution does not have stride 2")
        if shortcut.input != main.input:
            raise NearMiss(6, "the main branch and the shortcut do not read the same tensor")
        stages = tuple(main.stages + shortcut.stages)
        operations = main.operations + shortcut.operations
        x, split_groups, shortcut_channels = main.input, 1, shortcut.channels[1]
    else:
        if len(joined) != 2 * own:
            raise NearMiss(6, "the half that passes by and the other one do not have as many channels")
        halves = beside.channels() + main.input.channels()
        if len(halves) != len(joined):
            raise NearMiss(6, "the first convolution does not read half of the channels")
        stages, operations, shortcut_channels = tuple(main.stages), main.operations, 0
        x, split_groups = _whole_of(halves, graph)
    unit = UnitV2(
        in_channels=len(x.channels()),
        mid_channels=main.channels[0],
        out_channels=main.channels[2],
        shortcut_channels=shortcut_channels,
        stride=main.stride,
        split_groups=split_groups,
        shuffle_groups=shuffle_groups,
        stages=stages,
    )
    return Found(unit, x, end, operations)


def _whole_of(halves: Channels, graph: Graph) -> tuple[Wire, int]:
    """The tensor that was split in halves, and by the halves of which shuffle of it."""
    count = len(halves)
    found = []
    for groups in dict.fromkeys((1, count // 2, 2)):
        rows = count // groups
        x = wire_of([halves[c % rows * groups + c // rows] for c in range(count)])
        if x in graph.holders:
            found.append((x, groups))
    if not found:
        raise NearMiss(6, "what passes by and what the first convolution reads are not the halves of one tensor")
    # A module that shuffles its input itself holds both: its unit begins with the input.
    return next((at for at in found if at[0].only() in graph.inputs), found[0])


def _branch(end: Wire, *, pointwise_first: bool) -> _Branch:
    """The branch that ends in a wire: [1x1, ReLU,] depthwise, 1x1, ReLU."""
    which = "main branch" if pointwise_first else "shortcut"
    operations: list[Operation] = []
    last = end.only()
    if last is None or last.name != "relu":
        name = "channels of several tensors" if last is None else last.name
        raise NearMiss(1, f"its {which} ends in {name}, expected a ReLU")
    conv3, norm3, order3 = stage(past_relu(whole(end, 1, f"its {which}"), operations), operations)
    expect_in_order(order3, "the last convolution's result")
    stage3 = Stage(*named(conv3, norm3, "the last convolution"))
    pointwise = [(conv3, f"the last convolution of its {which}")]
    conv2, norm2, order2 = stage(conv3.arguments["input"], operations)
    expect_in_order(order2, "the depthwise convolution's result")
    stride = depthwise_stride(conv2)
    stages = [Stage(*named(conv2, norm2, "the depthwise convolution")), stage3]
    channels, norms = [conv2.channels, conv3.channels], [norm2, norm3]
    x = conv2.arguments["input"]
    if pointwise_first:
        between = whole(x, 4, "what the depthwise convolution reads")
        if between[0].name != "relu":
            raise NearMiss(4, f"{between[0].name} stands ahead of the depthwise convolution, expected relu")
        conv1, norm1, order1 = stage(past_relu(between, operations), operations)
        expect_in_order(order1, "the first convolution's result")
        stages.insert(0, Stage(*named(conv1, norm1, "the first convolution")))
        channels.insert(0, conv1.channels)
        norms.append(norm1)
        pointwise.append((conv1, f"the first convolution of its {which}"))
        x = conv1.arguments["input"]
    for conv, what in pointwise:
        if square(conv) != (1, 1, 0, 1) or conv.arguments["groups"] != 1:
            raise NearMiss(5, f"{what} is not a dense 1x1 convolution with stride 1 and no padding")
    if any(norm is not None and norm[1] != sorted(norm[1]) for norm in norms):
        raise NearMiss(5, f"in its {which} channels are shuffled ahead of a norm")
    if not isinstance(x, Wire):
        raise NearMiss(5, f"its {which} reads something that is not made of whole channels")
    return _Branch(x, stages, channels, stride, operations)
