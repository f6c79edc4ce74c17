"""Networks of ShuffleNet units: the papers', v1 and v2, and the original code's two for 32×32 images."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from shufflenet_ext._chain import FusedStem, Part, network_plan, own_parts, run_by_plan, train_stem
from shufflenet_ext._checks import check_int
from shufflenet_ext.modules import STEM_CHANNELS, FusedShuffleBottleneck
from shufflenet_ext.modules_v2 import FusedShuffleUnitV2

REPEATS = (4, 8, 4)
# Channels of stage 2 at width 1 by groups (arXiv:1707.01083, Table 1); each further stage doubles them.
STAGE2_CHANNELS = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}
# Channels of v2's stage 2, doubled by each further stage, and of its last convolution, by width (arXiv:1807.11164,
# Table 5).
V2_CHANNELS = {0.5: (48, 1024), 1.0: (116, 1024), 1.5: (176, 1024), 2.0: (244, 2048)}
_NAMES: dict[str, Any] = {"stem": ("conv1", "bn1"), "last": None, "linear": "linear"}
_V2_NAMES: dict[str, Any] = {"stem": ("conv1.0", "conv1.1"), "last": ("conv5.0", "conv5.1"), "linear": "fc"}


def _stage(
    in_channels: int, out_channels: int, repeats: int, groups: int, first_mid_channels: int | None
) -> nn.Sequential:
    """One stage: a unit of stride 2 that brings in_channels to out_channels, then repeats - 1 of stride 1."""
    first = FusedShuffleBottleneck(in_channels, out_channels - in_channels, 2, groups, mid_channels=first_mid_channels)
    rest = (FusedShuffleBottleneck(out_channels, out_channels, 1, groups) for _ in range(repeats - 1))
    return nn.Sequential(first, *rest)


class ShuffleNetCifar(nn.Module):
    """The original code's network for 3×32×32 images: 1×1 stem, three stages, 4×4 average pool, 10 classes."""

    def __init__(self, out_channels: tuple[int, int, int], groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM_CHANNELS, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        self.layer1 = _stage(STEM_CHANNELS, out_channels[0], REPEATS[0], groups, None)
        self.layer2 = _stage(out_channels[0], out_channels[1], REPEATS[1], groups, None)
        self.layer3 = _stage(out_channels[1], out_channels[2], REPEATS[2], groups, None)
        self.linear = nn.Linear(out_channels[2], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Takes images (N, 3, 32, 32) and returns logits (N, 10)."""
        logits = run_by_plan(self, x, lambda: network_plan(self.parts()))
        if logits is not None:
            return logits
        stem = train_stem(self, x, self.conv1, self.bn1, max_pool=False)
        x = F.relu(self.bn1(self.conv1(x))) if stem is None else stem
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.avg_pool2d(x, 4).flatten(1))

    def parts(self) -> list[Part] | None:
        """The stem, the units and the head that it is; None where it is more, as with hooks."""
        return own_parts(self, self.layers(), **_NAMES, max_pool=False, window=4)

    def layers(self) -> tuple[nn.Sequential, ...]:
        """Its stages."""
        return self.layer1, self.layer2, self.layer3


def ShuffleNetG2() -> ShuffleNetCifar:  # noqa: N802 (the original code's name)
    """The original code's network with 2 groups and stages of 200, 400 and 800 channels."""
    return ShuffleNetCifar((200, 400, 800), 2)


def ShuffleNetG3() -> ShuffleNetCifar:  # noqa: N802 (the original code's name)
    """The original code's network with 3 groups and stages of 240, 480 and 960 channels."""
    return ShuffleNetCifar((240, 480, 960), 3)


class ShuffleNetV1(nn.Module):
    """The paper's network; see :func:`shufflenet_v1`."""

    def __init__(self, out_channels: tuple[int, int, int], groups: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM_CHANNELS, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        # In a stage's first unit, too, the bottleneck has a quarter of the stage's channels: only so do the
        # multiply-adds become those of Table 1.
        mid_channels = [channels // 4 for channels in out_channels]
        self.layer1 = _stage(STEM_CHANNELS, out_channels[0], REPEATS[0], groups, mid_channels[0])
        self.layer2 = _stage(out_channels[0], out_channels[1], REPEATS[1], groups, mid_channels[1])
        self.layer3 = _stage(out_channels[1], out_channels[2], REPEATS[2], groups, mid_channels[2])
        self.linear = nn.Linear(out_channels[2], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Takes images (N, 3, H, W) and returns logits (N, num_classes)."""
        logits = run_by_plan(self, x, lambda: network_plan(self.parts()))
        if logits is not None:
            return logits
        stem = train_stem(self, x, self.conv1, self.bn1, max_pool=True)
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1) if stem is None else stem
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def parts(self) -> list[Part] | None:
        """The stem, the units and the head that it is; None where it is more, as with hooks."""
        return own_parts(self, self.layers(), **_NAMES, max_pool=True, window=0)

    def layers(self) -> tuple[nn.Sequential, ...]:
        """Its stages."""
        return self.layer1, self.layer2, self.layer3


def shufflenet_v1(groups: int = 3, width: float = 1.0, num_classes: int = 1000) -> ShuffleNetV1:
    """ShuffleNet v1 of the paper (arXiv:1707.01083, Table 1).

    Args:
        groups: 1, 2, 3, 4 or 8.
        width: scales every stage's channels, but not the stem's 24, rounded to the nearest number whose quarter, the
            bottleneck, the groups divide.
        num_classes: outputs of the linear layer.

    Raises ValueError for other groups, a width that is not positive or fewer than one class.
    """
    check_int("groups", groups)
    check_int("num_classes", num_classes)
    if groups not in STAGE2_CHANNELS:
        raise ValueError(f"groups: got {groups}, expected one of {sorted(STAGE2_CHANNELS)} (Table 1)")
    if not isinstance(width, (int, float)) or isinstance(width, bool):
        raise TypeError(f"width: got {type(width).__name__}, expected a float")
    if not 0 < width < float("inf"):
        raise ValueError(f"width: got {width}, expected a positive number")
    if num_classes < 1:
        raise ValueError(f"num_classes: got {num_classes}, expected a positive int")
    multiple = 4 * groups
    stage2 = max(multiple, round(STAGE2_CHANNELS[groups] * width / multiple) * multiple)
    return ShuffleNetV1((stage2, 2 * stage2, 4 * stage2), groups, num_classes)


def _convolution(in_channels: int, out_channels: int, size: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class ShuffleNetV2(nn.Module):
    """The network of the second paper; see :func:`shufflenet_v2`."""

    def __init__(self, stage2: int, last_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = _convolution(3, STEM_CHANNELS, 3, 2)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        stages, channels = [], STEM_CHANNELS
        for out_channels, repeats in zip((stage2, 2 * stage2, 4 * stage2), REPEATS, strict=True):
            first = FusedShuffleUnitV2(channels, out_channels, 2)
            rest = (FusedShuffleUnitV2(out_channels, out_channels, 1) for _ in range(repeats - 1))
            stages.append(nn.Sequential(first, *rest))
            channels = out_channels
        self.stage2, self.stage3, self.stage4 = stages
        self.conv5 = _convolution(channels, last_channels, 1, 1)
        self.fc = nn.Linear(last_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Takes images (N, 3, H, W) and returns logits (N, num_classes)."""
        logits = run_by_plan(self, x, lambda: network_plan(self.parts()))
        if logits is not None:
            return logits
        layers = (*self.conv1, self.conv1) if self._has_own_stem() else (None, None)
        stem = train_stem(self, x, *layers, self.maxpool, max_pool=True)
        x = self.maxpool(self.conv1(x)) if stem is None else stem
        x = self.stage4(self.stage3(self.stage2(x)))
        return self.fc(self.conv5(x).mean([2, 3]))

    def parts(self) -> list[Part] | None:
        """The stem, the units, the last convolution and the head that it is; None where it is more, as with hooks."""
        last = self.conv5
        plain = self._has_own_stem() and type(last) is nn.Sequential and type(last[2]) is nn.ReLU
        return own_parts(self, self.layers(), **_V2_NAMES, max_pool=True, window=0) if plain else None

    def _has_own_stem(self) -> bool:
        """Whether the stem is of modules of the classes that it was made with."""
        pool, stem = self.maxpool, self.conv1
        usual = type(pool) is nn.MaxPool2d and (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1)
        # Which fuse may have made a stem of: it is a Sequential all the same.
        plain = isinstance(stem, nn.Sequential) and (type(stem) is nn.Sequential or isinstance(stem, FusedStem))
        return usual and plain and len(stem) == 3 and type(stem[2]) is nn.ReLU

    def layers(self) -> tuple[nn.Sequential, ...]:
        """Its stages."""
        return self.stage2, self.stage3, self.stage4


def shufflenet_v2(width: float = 1.0, num_classes: int = 1000) -> ShuffleNetV2:
    """ShuffleNet v2 (arXiv:1807.11164, Table 5), with the names of torchvision's shufflenet_v2 networks.

    Args:
        width: 0.5, 1.0, 1.5 or 2.0.
        num_classes: outputs of the linear layer.

    Raises ValueError for another width or fewer than one class.
    """
    check_int("num_classes", num_classes)
    if not isinstance(width, (int, float)) or isinstance(width, bool):
        raise TypeError(f"width: got {type(width).__name__}, expected a float")
    if width not in V2_CHANNELS:
        raise ValueError(f"width: got {width}, expected one of {sorted(V2_CHANNELS)} (Table 5)")
    if num_classes < 1:
        raise ValueError(f"num_classes: got {num_classes}, expected a positive int")
    return ShuffleNetV2(*V2_CHANNELS[width], num_classes)
