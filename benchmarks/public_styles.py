"""Networks in the styles in which ShuffleNet was published, each in classes of its own; small unless told otherwise."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShuffledBehind(nn.Module):
    """Megvii's order: (n, g) transposed, behind the depthwise convolution; [pool, main] with a ReLU on main alone."""

    def __init__(self, inp: int, oup: int, group: int, first_group: bool, stride: int) -> None:
        super().__init__()
        self.stride, self.group = stride, group
        mid = oup // 4
        outputs = oup - inp if stride == 2 else oup
        self.branch_main_1 = nn.Sequential(
            nn.Conv2d(inp, mid, 1, groups=1 if first_group else group, bias=False),
            nn.BatchNorm2d(mid),
            nn.ReLU(inplace=True),
            nn.Conv2d(mid, mid, 3, stride, 1, groups=mid, bias=False),
            nn.BatchNorm2d(mid),
        )
        self.branch_main_2 = nn.Sequential(
            nn.Conv2d(mid, outputs, 1, groups=group, bias=False), nn.BatchNorm2d(outputs)
        )
        if stride == 2:
            self.branch_proj = nn.AvgPool2d(3, 2, 1)

    def forward(self, old_x: Tensor) -> Tensor:
        x = self.branch_main_1(old_x)
        n, c, h, w = x.shape
        x = x.reshape(n, c // self.group, self.group, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)
        x = self.branch_main_2(x)
        return F.relu(x + old_x) if self.stride == 1 else torch.cat((self.branch_proj(old_x), F.relu(x)), 1)


class MegviiStyle(nn.Module):
    """Their whole network; ``stages`` are each one's channels and units."""

    def __init__(
        self,
        stem: int = 12,
        stages: Sequence[tuple[int, int]] = ((48, 2), (96, 2)),
        groups: int = 2,
        window: int = 4,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(
            nn.Conv2d(3, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU(inplace=True)
        )
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        units, inputs = [], stem
        for channels, count in stages:
            units.append(ShuffledBehind(inputs, channels, groups, inputs == stem, 2))
            units += [ShuffledBehind(channels, channels, groups, False, 1) for _ in range(count - 1)]
            inputs = channels
        self.features = nn.Sequential(*units)
        self.globalpool = nn.AvgPool2d(window)
        self.classifier = nn.Sequential(nn.Linear(inputs, classes, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.globalpool(self.features(self.maxpool(self.first_conv(x))))
        return self.classifier(x.contiguous().view(x.shape[0], -1))


class CifarUnit(nn.Module):
    """kuangliu's: a ReLU behind the depthwise convolution, and in the first unit a shuffle by conv1's groups, 1."""

    def __init__(self, in_planes: int, out_planes: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride = stride
        mid = out_planes // 4
        self.g = 1 if in_planes == 24 else groups
        self.conv1 = nn.Conv2d(in_planes, mid, 1, groups=self.g, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, mid, 3, stride, 1, groups=mid, bias=False)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = nn.Conv2d(mid, out_planes, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(out_planes)
        self.shortcut = nn.Sequential(nn.AvgPool2d(3, 2, 1)) if stride == 2 else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        n, c, h, w = out.size()
        out = out.view(n, self.g, c // self.g, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        res = self.shortcut(x)
        return F.relu(torch.cat([out, res], 1)) if self.stride == 2 else F.relu(out + res)


class CifarStyle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = nn.Sequential(CifarUnit(24, 40, 2, 2), CifarUnit(64, 64, 1, 2))
        self.layer2 = nn.Sequential(CifarUnit(64, 64, 2, 2), CifarUnit(128, 128, 1, 2))
        self.linear = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        out = F.avg_pool2d(out, 8)
        return self.linear(out.view(out.size(0), -1))


class BiasedUnit(nn.Module):
    """jaxony's: convolutions with biases, the shortcut first, and how to combine kept as a function."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, grouped: bool, combine: str) -> None:
        super().__init__()
        self.groups, self.combine = groups, combine
        mid = out_channels // 4
        stride, out_channels = (2, out_channels - in_channels) if combine == "concat" else (1, out_channels)
        self.compress = nn.Sequential(
            OrderedDict(
                conv1x1=nn.Conv2d(in_channels, mid, 1, groups=groups if grouped else 1),
                batch_norm=nn.BatchNorm2d(mid),
                relu=nn.ReLU(),
            )
        )
        self.depthwise = nn.Conv2d(mid, mid, 3, stride, 1, groups=mid)
        self.bn_after_depthwise = nn.BatchNorm2d(mid)
        self.expand = nn.Sequential(nn.Conv2d(mid, out_channels, 1, groups=groups), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        residual = F.avg_pool2d(x, kernel_size=3, stride=2, padding=1) if self.combine == "concat" else x
        out = self.compress(x)
        n, c, h, w = out.data.size()
        out = torch.transpose(out.view(n, self.groups, c // self.groups, h, w), 1, 2).contiguous().view(n, -1, h, w)
        out = self.expand(self.bn_after_depthwise(self.depthwise(out)))
        return F.relu(torch.cat((residual, out), 1) if self.combine == "concat" else residual + out)


class BiasedStyle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 3, 2, 1)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.stage2 = nn.Sequential(BiasedUnit(24, 48, 2, False, "concat"), BiasedUnit(48, 48, 2, True, "add"))
        self.fc = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.maxpool(self.conv1(x)))
        x = F.avg_pool2d(x, x.data.size()[-2:])
        return F.log_softmax(self.fc(x.view(x.size(0), -1)), dim=1)


class Blocks(nn.Module):
    """weiaicunzai's: blocks of convolution and norm in modules of their own, a stem of stride 1 without a pool."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int) -> None:
        super().__init__()
        mid = out_channels // 4

        outputs = out_channels - in_channels if stride == 2 else out_channels

        def block(conv: nn.Conv2d) -> nn.Sequential:
            return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))

        self.bottleneck = nn.Sequential(block(nn.Conv2d(in_channels, mid, 1, groups=groups)), nn.ReLU(inplace=True))
        self.channel_shuffle = nn.ChannelShuffle(groups)
        self.depthwise = block(nn.Conv2d(mid, mid, 3, stride, 1, groups=mid))
        self.expand = block(nn.Conv2d(mid, outputs, 1, groups=groups))
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else nn.Sequential()
        self.fusion = self._cat if stride == 2 else self._add

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.add(x, y)

    def _cat(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, y], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        shuffled = self.expand(self.depthwise(self.channel_shuffle(self.bottleneck(x))))
        return self.relu(self.fusion(shortcut, shuffled))


class BlocksStyle(nn.Module):
    """Their whole network; ``stages`` are each one's channels and units."""

    def __init__(
        self, stages: Sequence[tuple[int, int]] = ((48, 2), (96, 2)), groups: int = 3, classes: int = 10
    ) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(inplace=True))
        self.stages, inputs = nn.Sequential(), 24
        for channels, count in stages:
            self.stages.append(Blocks(inputs, channels, 2, groups))
            self.stages.extend(Blocks(channels, channels, 1, groups) for _ in range(count - 1))
            inputs = channels
        self.avg = nn.AdaptiveAvgPool2d((1, 1))
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avg(self.stages(self.conv1(x)))
        return self.fc(self.drop(x.view(x.size(0), -1)))


def shuffled_by_view(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def v2_block(
    inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, relu: bool = True
) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), *([nn.ReLU(inplace=True)] if relu else [])]


class TorchvisionUnit(nn.Module):
    """A half passes by, the result is shuffled by two."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        half = outputs // 2
        shortcut = [*v2_block(inputs, inputs, 3, 2, inputs, relu=False), *v2_block(inputs, half, 1)]
        self.branch1 = nn.Sequential(*(shortcut if stride == 2 else []))
        self.branch2 = nn.Sequential(
            *v2_block(inputs if stride == 2 else half, half, 1),
            *v2_block(half, half, 3, stride, half, relu=False),
            *v2_block(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return shuffled_by_view(out, 2)


class TorchvisionV2(nn.Module):
    """Their network of ShuffleNet v2, with its names."""

    def __init__(self, stage2: int = 116, last: int = 1024, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*v2_block(3, 24, 3, 2))
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 24
        for i, repeats in enumerate((4, 8, 4)):
            outputs = stage2 * 2**i
            units = [TorchvisionUnit(channels, outputs, 2)]
            units += [TorchvisionUnit(outputs, outputs, 1) for _ in range(repeats - 1)]
            self.add_module(f"stage{i + 2}", nn.Sequential(*units))
            channels = outputs
        self.conv5 = nn.Sequential(*v2_block(channels, last, 1))
        self.fc = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage4(self.stage3(self.stage2(self.maxpool(self.conv1(x)))))  # type: ignore[operator]
        return self.fc(self.conv5(x).mean([2, 3]))


# Each with the size of its images, and how many units it has.
STYLES = {MegviiStyle: (64, 4), CifarStyle: (32, 4), BiasedStyle: (32, 2), BlocksStyle: (16, 4)}
