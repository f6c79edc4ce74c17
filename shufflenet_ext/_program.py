"""The program of shuffle_network: integers that say what its steps are. csrc/program.h reads it for the native kernels.

Each step is its kind and the integers that are listed here:

- ``STEM, out_channels, kernel_size, stride, padding, max_pool, relu``: a square convolution (11×11 at most), where
  ``relu`` is 1 a ReLU and, where ``max_pool`` is 1, a max pool of 3×3 with stride 2 and padding 1. It comes first.
- ``UNIT, mid_channels, out_channels, conv1_groups, groups, stride, conv2_relu, pool_count_include_pad``: a unit.
- ``GENERAL_UNIT``, the integers of a unit, then ``shuffle_groups, shortcut_first, shortcut_relu``: a unit in general.
- ``AGAIN, times``: the unit before, so many times more, with weights of its own each time.
- ``UNIT_V2, mid_channels, out_channels, shortcut_channels, stride, split_groups, shuffle_groups``: a unit of ShuffleNet
  v2, as :func:`shufflenet_ext.ops.shuffle_unit_v2` computes it; ``shortcut_channels`` is 0 with stride 1. The units of
  a program are all of one version.
- ``LAST_CONVOLUTION, out_channels``: a dense 1×1 convolution and a ReLU, once and behind the units.
- ``HEAD, classes, pool_window``: the mean of the upper left ``pool_window`` × ``pool_window`` pixels (0: of all), and a
  linear layer. It comes last.

A program has one step at least. The weights are in the order in which the steps name their convolutions, each of them
weight then bias, with batch norm folded in, and padded as ``reference.pack_weights`` does it.
"""

from collections.abc import Iterable, Iterator
from enum import IntEnum

from shufflenet_ext._checks import MOST_STEM_SIZE, check_divides


class StepKind(IntEnum):
    """The first integer of a step."""

    STEM = 0
    UNIT = 1
    HEAD = 2
    AGAIN = 3
    GENERAL_UNIT = 4
    UNIT_V2 = 5
    LAST_CONVOLUTION = 6


_UNITS = (StepKind.UNIT, StepKind.GENERAL_UNIT, StepKind.UNIT_V2)
# How many integers follow a step's kind.
_STEP_LENGTHS = {
    StepKind.STEM: 6,
    StepKind.UNIT: 7,
    StepKind.HEAD: 2,
    StepKind.AGAIN: 1,
    StepKind.GENERAL_UNIT: 10,
    StepKind.UNIT_V2: 6,
    StepKind.LAST_CONVOLUTION: 1,
}


def program_of(steps: Iterable[list[int]]) -> list[int]:
    """The program of some steps. It is short: each number takes some 40 ns on its way through the dispatcher."""
    program: list[int] = []
    before, again = None, False  # the step before, and whether the program ends with how often that is repeated
    for step in steps:
        if step != before:
            program += step
            again = False
        elif again:
            program[-1] += 1
        else:
            program += [StepKind.AGAIN.value, 1]
            again = True
        before = step
    return program


def split_program(program: list[int]) -> Iterator[tuple[StepKind, list[int]]]:
    """Yields each step of a program as its kind and its integers. A unit that is repeated comes as often as it runs.

    Raises ValueError unless the program is made of whole steps in their order.
    """
    at, kind, last = 0, None, False  # whether the last convolution has come
    unit: tuple[StepKind, list[int]] | None = None
    while at < len(program):
        before, number = kind, program[at]
        kind = StepKind(number) if number in _STEP_LENGTHS else None
        misplaced = (kind is StepKind.STEM and at > 0) or (kind is StepKind.AGAIN and unit is None)
        misplaced = misplaced or (last and kind is not StepKind.HEAD)
        last = last or kind is StepKind.LAST_CONVOLUTION
        if kind is None or misplaced or before is StepKind.HEAD:
            expected = "0 (stem) first, 1, 4 or 5 (unit), 3 (again) behind a unit, 6 (last convolution) behind units "
            expected += "or 2 (head) last"
            raise ValueError(f"program: got step {number} at element {at}, expected {expected}")
        step = program[at + 1 : at + 1 + _STEP_LENGTHS[kind]]
        if len(step) < _STEP_LENGTHS[kind]:
            raise ValueError(f"program: got {len(step)} elements for its last step, expected {_STEP_LENGTHS[kind]}")
        if kind is StepKind.AGAIN:
            _check_positive(times=step[0])
            assert unit is not None
            for _ in range(step[0]):
                yield unit
        else:
            if kind in _UNITS:
                if unit is not None and (unit[0] is StepKind.UNIT_V2) != (kind is StepKind.UNIT_V2):
                    raise ValueError("program: got units of ShuffleNet v1 and v2, expected units of one version")
                unit = kind, step
            yield kind, step
        at += 1 + len(step)
    if kind is None:
        raise ValueError("program: got no elements, expected one step at least")


def check_step(kind: StepKind, step: list[int], channels: int, height: int, width: int) -> None:
    """Raises ValueError unless a program's step fits images of these sizes."""
    if kind is StepKind.STEM:
        out_channels, size, stride, padding = step[:4]
        _check_positive(out_channels=out_channels)
        if not 1 <= size <= MOST_STEM_SIZE:
            raise ValueError(f"program: got kernel_size {size}, expected 1 to {MOST_STEM_SIZE}")
        if stride not in (1, 2):
            raise ValueError(f"program: got stride {stride}, expected 1 or 2")
        if not 0 <= padding < size:
            raise ValueError(f"program: got padding {padding}, expected at least 0 and less than kernel_size, {size}")
        if min(height, width) + 2 * padding < size:
            least = size - 2 * padding
            raise ValueError(f"x: got {height} x {width} pixels, expected at least {least} x {least}")
    elif kind in (StepKind.UNIT, StepKind.GENERAL_UNIT):
        mid_channels, out_channels, conv1_groups, groups, stride = step[:5]
        _check_positive(mid_channels=mid_channels, out_channels=out_channels)
        if stride not in (1, 2):
            raise ValueError(f"program: got stride {stride}, expected 1 or 2")
        check_divides("program: conv1_groups", conv1_groups, "the unit's input channels", channels)
        check_divides("program: conv1_groups", conv1_groups, "mid_channels", mid_channels)
        check_divides("program: groups", groups, "mid_channels", mid_channels)
        check_divides("program: groups", groups, "out_channels", out_channels)
        if kind is StepKind.GENERAL_UNIT:
            check_divides("program: shuffle_groups", step[7], "mid_channels", mid_channels)
        if stride == 1 and out_channels != channels:
            expected = f"{channels} (with stride 1, the unit's input is added to its result)"
            raise ValueError(f"program: got {out_channels} out_channels, expected {expected}")
    elif kind is StepKind.UNIT_V2:
        mid_channels, out_channels, shortcut_channels, stride, split_groups, shuffle_groups = step
        _check_positive(mid_channels=mid_channels, out_channels=out_channels)
        if stride not in (1, 2):
            raise ValueError(f"program: got stride {stride}, expected 1 or 2")
        if stride == 2:
            _check_positive(shortcut_channels=shortcut_channels)
        elif shortcut_channels != 0 or channels != 2 * out_channels:
            got = f"{channels} input channels, {out_channels} out_channels and {shortcut_channels} shortcut_channels"
            expected = "an even number, its half and 0 (with stride 1, half of the unit's input passes by)"
            raise ValueError(f"program: got {got}, expected {expected}")
        joined = out_channels + (shortcut_channels if stride == 2 else channels // 2)
        check_divides("program: split_groups", split_groups, "the unit's input channels", channels)
        check_divides("program: shuffle_groups", shuffle_groups, "the joined channels", joined)
    elif kind is StepKind.LAST_CONVOLUTION:
        _check_positive(out_channels=step[0])
    else:
        classes, window = step
        _check_positive(classes=classes)
        if window != 0 and not (window > 0 and height // window == width // window == 1):
            raise ValueError(
                f"x: got {height} x {width} pixels ahead of the head, expected one window of {window} x {window}"
            )


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"program: got {name} {number}, expected a positive number")
