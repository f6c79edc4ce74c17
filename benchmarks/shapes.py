"""What is measured: units and networks of the paper (arXiv:1707.01083, Table 1), and the original code's for CIFAR."""

from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import torch
from torch import Tensor, nn

import shufflenet_ext as se

GROUPS = (1, 2, 3, 4, 8)
QUICK_GROUPS = (3,)
BATCHES = (1, 16)
IMAGE_SIZE = 224
CIFAR_SIZE = 32

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class UnitShape:
    """One of the distinct units of the paper's network with ``groups`` groups: a stage's first, or one of the rest."""

    groups: int
    stage: int
    stride: int
    batch: int

    @property
    def label(self) -> str:
        return f"stage {self.stage} stride {self.stride}"

    def __str__(self) -> str:
        return f"g{self.groups}-stage{self.stage}-stride{self.stride}-batch{self.batch}"

    def build(self) -> tuple[se.FusedShuffleBottleneck, Tensor]:
        """The unit, taken from its network, in eval mode, and an input."""
        unit = getattr(se.models.shufflenet_v1(self.groups), f"layer{self.stage - 1}")[0 if self.stride == 2 else 1]
        size = IMAGE_SIZE // 2**self.stage // (1 if self.stride == 2 else 2)
        return with_statistics(unit), torch.randn(self.batch, unit.conv1.in_channels, size, size)


@dataclass(frozen=True)
class NetworkShape:
    """A whole network: the paper's at width 1, or the original code's for CIFAR."""

    groups: int
    cifar: bool
    batch: int

    @property
    def label(self) -> str:
        return f"CIFAR g={self.groups}" if self.cifar else f"1× g={self.groups}"

    def __str__(self) -> str:
        return f"g{self.groups}-{'cifar' if self.cifar else 'imagenet'}-batch{self.batch}"

    def build(self) -> tuple[nn.Module, Tensor]:
        """The network in eval mode, and an input."""
        size = CIFAR_SIZE if self.cifar else IMAGE_SIZE
        x = torch.randn(self.batch, 3, size, size)
        if self.cifar:
            return with_statistics({2: se.models.ShuffleNetG2, 3: se.models.ShuffleNetG3}[self.groups]()), x
        return with_statistics(se.models.shufflenet_v1(self.groups)), x


def with_statistics(module: Module) -> Module:
    """``module`` in eval mode, with batch norms that do something, as after training."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            for tensor in (norm.weight, norm.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (norm.bias, norm.running_mean):
                nn.init.normal_(tensor, std=0.1)
    return module.eval()


def unit_shapes(groups: tuple[int, ...]) -> list[UnitShape]:
    return [UnitShape(*values) for values in product(groups, (2, 3, 4), (2, 1), BATCHES)]


def network_shapes(groups: tuple[int, ...]) -> list[NetworkShape]:
    paper = [NetworkShape(g, False, batch) for g, batch in product(groups, BATCHES)]
    return paper + [NetworkShape(g, True, batch) for g, batch in product((2, 3), BATCHES) if g in groups]
