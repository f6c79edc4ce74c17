"""Networks of ShuffleNet units: the paper's, and the original code's two for 32×32 images."""

import torch.nn.functional as F
from torch import Tensor, nn

from shufflenet_ext._chain import Part, network_plan, own_parts, run_by_plan
from shufflenet_ext._checks import check_int
from shufflenet_ext.modules import STEM_CHANNELS, FusedShuffleBottleneck

REPEATS = (4, 8, 4)
# Channels of stage 2 at width 1 by groups (arXiv:1707.01083, Table 1); each further stage doubles them.
STAGE2_CHANNELS = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}


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
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.avg_pool2d(x, 4).flatten(1))

    def parts(self) -> list[Part] | None:
        """The stem, the units and the head that it is; None where it is more, as with hooks."""
        return own_parts(self, max_pool=False, window=4)


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
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def parts(self) -> list[Part] | None:
        """The stem, the units and the head that it is; None where it is more, as with hooks."""
        return own_parts(self, max_pool=True, window=0)


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
