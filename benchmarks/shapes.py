"""What is measured: units and networks of the papers (arXiv:1707.01083, Table 1; arXiv:1807.11164), and for CIFAR."""

from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import torch
from torch import Tensor, nn

import shufflenet_ext as se
from benchmarks.public_styles import BlocksStyle, MegviiStyle, TorchvisionV2

GROUPS = (1, 2, 3, 4, 8)
QUICK_GROUPS = (3,)
BATCHES = (1, 16)
THREADS = (1, 2)
IMAGE_SIZE = 224
CIFAR_SIZE = 32
# Suites of whole networks.
NETWORKS, SIZES, CIFAR, FOREIGN = "networks", "image sizes and widths", "CIFAR", "networks of others"
V2 = "ShuffleNet v2"

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class UnitShape:
    """A unit of the paper's network with so many groups: a stage's first (stride 2), or one of the rest, all alike."""

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
    """A whole network: the paper's, or the original code's for CIFAR."""

    groups: int
    batch: int
    width: float = 1
    size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)
    suite: str = NETWORKS

    @property
    def label(self) -> str:
        height, width = self.size
        name = "CIFAR" if self.suite == CIFAR else f"{self.width:g}×"
        return f"{name} g={self.groups}, {f'{height}²' if height == width else f'{height}×{width}'}"

    def __str__(self) -> str:
        name = "cifar" if self.suite == CIFAR else f"{self.width:g}x"
        return f"g{self.groups}-{name}-{'x'.join(map(str, self.size))}-batch{self.batch}"

    @property
    def pixels(self) -> int:
        return self.batch * self.size[0] * self.size[1]

    def build(self) -> tuple[nn.Module, Tensor]:
        """The network in eval mode, and an input."""
        if self.suite == CIFAR:
            network: nn.Module = {2: se.models.ShuffleNetG2, 3: se.models.ShuffleNetG3}[self.groups]()
        else:
            network = se.models.shufflenet_v1(self.groups, self.width)
        return with_statistics(network), torch.randn(self.batch, 3, *self.size)


@dataclass(frozen=True)
class ForeignShape(NetworkShape):
    """A network that is not this package's: pytorchcv's, or in the style of a public repository."""

    suite: str = FOREIGN
    source: str = "pytorchcv"

    @property
    def label(self) -> str:
        return f"{self.source} g={self.groups}, {self.size[0]}²"

    def __str__(self) -> str:
        return f"{self.source.replace(' ', '-')}-g{self.groups}-batch{self.batch}"

    def build(self) -> tuple[nn.Module, Tensor]:
        channels = {3: (240, 480, 960), 8: (384, 768, 1536)}[self.groups]
        stages = tuple(zip(channels, (4, 8, 4), strict=True))
        if self.source == "pytorchcv":
            from pytorchcv.models import shufflenet

            network: nn.Module = getattr(shufflenet, f"shufflenet_g{self.groups}_w1")()
        elif self.source == "Megvii style":
            network = MegviiStyle(24, stages, self.groups, window=7, classes=1000)
        else:
            network = BlocksStyle(stages, self.groups, classes=100)
        return with_statistics(network), torch.randn(self.batch, 3, *self.size)


@dataclass(frozen=True)
class V2Shape(NetworkShape):
    """ShuffleNet v2, as torchvision writes it."""

    groups: int = 1
    batch: int = 1
    suite: str = V2

    @property
    def label(self) -> str:
        return f"v2 {self.width:g}×, {self.size[0]}²"

    def __str__(self) -> str:
        return f"v2-{self.width:g}x-{'x'.join(map(str, self.size))}-batch{self.batch}"

    def build(self) -> tuple[nn.Module, Tensor]:
        network = TorchvisionV2(*se.models.V2_CHANNELS[self.width])
        return with_statistics(network), torch.randn(self.batch, 3, *self.size)


def profiled_shapes() -> list[NetworkShape]:
    """The networks that are timed by step: the paper's 1× with 3 groups, v2's 1× and, mostly dense, its 2×."""
    of_v2 = [V2Shape(batch=batch, width=width) for width in (1.0, 2.0) for batch in BATCHES]
    return [*(NetworkShape(3, batch) for batch in BATCHES), *of_v2]


def with_statistics(module: Module) -> Module:
    """Gives the module's batch norms random statistics and parameters, as after training; returns it in eval mode."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            for tensor in (norm.weight, norm.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (norm.bias, norm.running_mean):
                nn.init.normal_(tensor, std=0.1)
    return module.eval()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def unit_shapes(groups: tuple[int, ...]) -> list[UnitShape]:
    return [UnitShape(*values) for values in product(groups, (2, 3, 4), (2, 1), BATCHES)]


def network_shapes(groups: tuple[int, ...]) -> list[NetworkShape]:
    paper = [NetworkShape(g, batch) for g, batch in product(groups, BATCHES)]
    sizes = ((128, 128), (160, 160), (480, 640), (720, 1280))
    others = [NetworkShape(3, batch, size=size, suite=SIZES) for size, batch in product(sizes, BATCHES)]
    others += [NetworkShape(3, batch, width, suite=SIZES) for width, batch in product((0.25, 0.5, 2), BATCHES)]
    size = (CIFAR_SIZE, CIFAR_SIZE)
    others += [NetworkShape(g, batch, size=size, suite=CIFAR) for g, batch in product((2, 3), BATCHES)]
    for batch in BATCHES:
        others += [ForeignShape(3, batch), ForeignShape(8, batch), ForeignShape(3, batch, source="Megvii style")]
        others.append(ForeignShape(3, batch, size=size, source="CIFAR with biases"))
    second: list[NetworkShape] = [V2Shape(batch=n, width=w) for w, n in product((0.5, 1.0, 1.5, 2.0), BATCHES)]
    second += [V2Shape(batch=n, width=1.0, size=(size, size)) for size, n in product((320, 416), BATCHES)]
    return paper + [shape for shape in others if shape.groups in groups] + second
