"""Units and networks of ShuffleNet v2 for the tests: random arguments, and the styles in which they are published."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from support import LAYOUTS
from torch import Tensor, nn

from benchmarks.public_styles import TorchvisionUnit, v2_block
from shufflenet_ext import reference


@dataclass(frozen=True)
class UnitV2:
    """A unit, as an op's call and as a program's step."""

    stride: int = 1
    in_channels: int = 12
    mid_channels: int = 7
    out_channels: int | None = None  # in_channels // 2
    shortcut_channels: int | None = None  # out_channels, with stride 2
    split_groups: int = 1
    shuffle_groups: int = 2
    batch: int = 2
    plane: tuple[int, int] = (5, 7)
    bias: bool = True

    @property
    def rows(self) -> int:
        return self.out_channels or self.in_channels // 2

    @property
    def beside(self) -> int:
        return (self.shortcut_channels or self.rows) if self.stride == 2 else self.in_channels // 2

    @property
    def result_channels(self) -> int:
        return self.rows + self.beside

    @property
    def options(self) -> dict[str, int]:
        return {"stride": self.stride, "split_groups": self.split_groups, "shuffle_groups": self.shuffle_groups}

    @property
    def step(self) -> list[int]:
        return [5, self.mid_channels, self.rows, self.beside if self.stride == 2 else 0, *self.options.values()]

    def tensors(self, dtype: torch.dtype = torch.float32, layout: torch.memory_format = LAYOUTS[0]) -> list[Tensor]:
        """The op's positional arguments; every intermediate is of the order of one."""
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def convolution(*shape: int) -> list[Any]:
            return [normal(*shape) / math.prod(shape[1:]) ** 0.5, normal(shape[0]) if self.bias else None]

        channels, mid = self.in_channels, self.mid_channels
        tensors = [normal(self.batch, channels, *self.plane)]
        tensors += convolution(mid, channels if self.stride == 2 else channels // 2, 1, 1)
        tensors += convolution(mid, 1, 3, 3)
        tensors += convolution(self.rows, mid, 1, 1)
        if self.stride == 2:
            tensors += convolution(channels, 1, 3, 3)
            tensors += convolution(self.beside, channels, 1, 1)
        tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
        tensors[0] = tensors[0].contiguous(memory_format=layout)
        return tensors

    def native(self, tensors: list[Tensor]) -> Tensor:
        return torch.ops.shufflenet_ext.shuffle_unit_v2(*tensors, **self.options)

    def reference(self, tensors: list[Tensor]) -> Tensor:
        return reference.shuffle_unit_v2(*tensors, **self.options)

    def exact(self, tensors: list[Tensor]) -> Tensor:
        return self.reference([None if tensor is None else tensor.double() for tensor in tensors])


class MegviiUnit(nn.Module):
    """Channels of even numbers pass by, and nothing is shuffled behind; the shortcut keeps the number of channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        own, mid = inputs if stride == 2 else inputs // 2, outputs // 2
        self.branch_main = nn.Sequential(
            *v2_block(own, mid, 1), *v2_block(mid, mid, 3, stride, mid, relu=False), *v2_block(mid, outputs - own, 1)
        )
        if stride == 2:
            self.branch_proj = nn.Sequential(*v2_block(own, own, 3, 2, own, relu=False), *v2_block(own, own, 1))

    def forward(self, old_x: Tensor) -> Tensor:
        if self.stride == 2:
            return torch.cat((self.branch_proj(old_x), self.branch_main(old_x)), 1)
        n, c, h, w = old_x.size()
        x = old_x.reshape(n * c // 2, 2, h * w).permute(1, 0, 2).reshape(2, -1, c // 2, h, w)
        return torch.cat((x[0], self.branch_main(x[1])), 1)


class FunctionalUnit(nn.Module):
    """Written with slices, an index and functions; biases and no norms."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.half = stride, outputs // 2
        half = self.half
        self.reduce = nn.Conv2d(inputs if stride == 2 else half, half, 1)
        self.depthwise = nn.Conv2d(half, half, 3, stride, 1, groups=half)
        self.expand = nn.Conv2d(half, half, 1)
        if stride == 2:
            self.pass_depthwise = nn.Conv2d(inputs, inputs, 3, 2, 1, groups=inputs)
            self.pass_pointwise = nn.Conv2d(inputs, half, 1)
        self.order = [c % 2 * half + c // 2 for c in range(outputs)]

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            kept, own = F.relu(self.pass_pointwise(self.pass_depthwise(x))), x
        else:
            kept, own = x[:, : self.half], x[:, self.half :]
        own = self.expand(self.depthwise(self.reduce(own).relu())).clamp(min=0)
        return torch.cat([kept, own], 1)[:, self.order]


UNITS = (TorchvisionUnit, MegviiUnit, FunctionalUnit)


class Network(nn.Module):
    """A small network of units; ``features`` are its stages' results."""

    def __init__(self, unit: type[nn.Module], classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(*v2_block(3, 8, 3, 2))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.stage2 = nn.Sequential(unit(8, 24, 2), unit(24, 24, 1), unit(24, 24, 1))
        self.stage3 = nn.Sequential(unit(24, 44, 2), unit(44, 44, 1))
        self.last = nn.Sequential(*v2_block(44, 60, 1))
        self.fc = nn.Linear(60, classes)

    def features(self, x: Tensor) -> list[Tensor]:
        low = self.stage2(self.pool(self.stem(x)))
        return [low, self.stage3(low)]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.features(x)[1]).mean([2, 3]))


class Detector(nn.Module):
    """A larger model that wants the results of both stages."""

    def __init__(self, unit: type[nn.Module]) -> None:
        super().__init__()
        self.backbone = Network(unit)
        self.lateral = nn.Conv2d(44, 24, 1)
        self.boxes = nn.Conv2d(24, 4, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low, high = self.backbone.features(x)
        merged = low + F.interpolate(self.lateral(high), scale_factor=2.0)
        return {"boxes": self.boxes(merged), "high": high}
