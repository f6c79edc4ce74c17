"""Units and near misses in every style that people write them in, at random: what fuse takes, and what not."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)

NEAR_MISSES = (
    "relu6",
    "leaky relu",
    "no relu",
    "5x5",
    "dilated",
    "reflected",
    "dropout",
    "squeeze and excite",
    "second use",
    "max pool",
    "other average pool",
    "other divisor",
    "no shuffle",
    "flipped",
    "hooked",
    "tied",
    "training only",
    "by value",
    "relu on the shortcut",
    "scaled sum",
    "norm of the batch",
)
SHUFFLES = ("transpose", "permute", "unflatten", "channel_shuffle", "index", "slices", "stack", "buffer")
RELUS = ("module", "inplace module", "functional", "method", "inplace method", "clamp")


@dataclass(frozen=True)
class Style:
    """What a random unit is, and how it is written."""

    seed: int
    stride: int
    in_channels: int
    mid_channels: int
    out_channels: int
    conv1_groups: int
    groups: int
    shuffle_groups: int
    shuffled_behind: bool  # whether the shuffle comes behind the depthwise convolution and its norm
    conv2_relu: bool
    include_pad: bool
    shortcut_first: bool
    relu_on_both: bool
    bias: bool
    norms: bool
    affine: bool
    writing: str  # "attributes", "sequential" or "functional"
    shuffle: str
    relu: str
    near_miss: str | None = None


def random_style(seed: int, near_miss: str | None = None) -> Style:
    rng = random.Random(seed)
    stride = 2 if near_miss in ("max pool", "other average pool", "other divisor") else rng.choice([1, 2])
    stride = 1 if near_miss in ("relu on the shortcut", "scaled sum") else stride
    groups, conv1_groups = rng.choice([1, 2, 3, 4]), rng.choice([1, 2, 3])
    both = groups * conv1_groups
    mid = both * rng.choice([1, 2, 3, 4])
    if near_miss == "no shuffle":
        mid = both * 6
    in_channels = both * rng.choice([1, 2, 3])
    writing = rng.choice(["attributes", "sequential", "functional"])
    if near_miss in ("hooked", "reflected", "tied"):
        writing = rng.choice(["attributes", "sequential"])
    return Style(
        seed=seed,
        stride=stride,
        in_channels=in_channels,
        mid_channels=mid,
        out_channels=in_channels if stride == 1 else groups * rng.choice([1, 2, 5]),
        conv1_groups=conv1_groups,
        groups=groups,
        shuffle_groups=rng.choice([d for d in range(1, mid + 1) if mid % d == 0]),
        shuffled_behind=rng.random() < 0.5,
        conv2_relu=rng.random() < 0.3,
        include_pad=rng.random() < 0.7,
        shortcut_first=rng.random() < 0.5,
        relu_on_both=rng.random() < 0.6,
        bias=rng.random() < 0.4,
        norms=rng.random() < 0.9 or near_miss == "tied",
        affine=rng.random() < 0.9,
        writing=writing,
        shuffle=rng.choice(SHUFFLES),
        relu=rng.choice(RELUS),
        near_miss=near_miss,
    )


class Shuffle(nn.Module):
    def __init__(self, channels: int, groups: int, way: str) -> None:
        super().__init__()
        self.groups, self.way = groups, way
        self.order = [c % groups * (channels // groups) + c // groups for c in range(channels)]
        if way == "buffer":
            self.register_buffer("numbers", torch.tensor(self.order), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.size()
        g = self.groups
        if self.way == "transpose":
            return x.view(n, g, c // g, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        if self.way == "permute":
            return x.reshape(n, g, c // g, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)
        if self.way == "unflatten":
            return x.unflatten(1, (g, -1)).swapaxes(1, 2).flatten(1, 2)
        if self.way == "channel_shuffle":
            return F.channel_shuffle(x, g)
        if self.way == "index":
            return x[:, self.order]
        if self.way == "slices":
            return torch.cat([x[:, i :: c // g] for i in range(c // g)], 1)
        if self.way == "stack":
            return torch.stack(x.chunk(g, 1), 2).flatten(1, 2)
        return torch.index_select(x, 1, self.numbers)


def shuffle_of(style: Style) -> Shuffle:
    shuffle = Shuffle(style.mid_channels, style.shuffle_groups, style.shuffle)
    if style.near_miss == "no shuffle":
        random.Random(style.seed).shuffle(shuffle.order)
        shuffle.way = "index"
    return shuffle


class Relu(nn.Module):
    """Only "module" and "inplace module" are classes of PyTorch's."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return {"functional": F.relu, "method": Tensor.relu, "inplace method": Tensor.relu_}.get(
            self.way, lambda y: y.clamp(min=0)
        )(x)


def relu_of(way: str) -> nn.Module:
    return nn.ReLU(inplace=way == "inplace module") if "module" in way else Relu(way)


class SqueezeAndExcite(nn.Module):
    """Without convolutions, so that these do not give it away."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean((2, 3), keepdim=True).sigmoid()


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def flip(x: Tensor) -> Tensor:
    return x.flip(3)


class Convolution(nn.Module):
    """A convolution written with functions, on parameters of its own."""

    def __init__(self, *shape: int, bias: bool, **options: Any) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(shape) / 3)
        self.offset = nn.Parameter(torch.randn(shape[0])) if bias else None
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, self.offset, **self.options)


class RandomUnit(nn.Module):
    def __init__(self, style: Style) -> None:
        super().__init__()
        rng = random.Random(style.seed)
        self.style = style
        miss, s = style.near_miss, style

        def conv(rows: int, columns: int, size: int, groups: int, stride: int = 1) -> nn.Module:
            wide, spread = miss == "5x5" and size > 1, 2 if miss == "dilated" and size > 1 else 1
            size = 5 if wide else size
            padding = size // 2 * spread
            options = {"stride": stride, "padding": padding, "dilation": spread, "groups": groups}
            if s.writing == "functional":
                return Convolution(rows, columns // groups, size, size, bias=s.bias, **options)
            mode = "reflect" if miss == "reflected" and size > 1 else "zeros"
            return nn.Conv2d(columns, rows, size, bias=s.bias, padding_mode=mode, **options)

        def norm(channels: int) -> list[nn.Module]:
            if not s.norms and miss != "norm of the batch":
                return []
            return [
                nn.BatchNorm2d(
                    channels,
                    eps=rng.choice([1e-5, 1e-3]),
                    momentum=rng.choice([0.1, None]),
                    affine=s.affine,
                    track_running_stats=miss != "norm of the batch",
                )
            ]

        first_relu = {"relu6": nn.ReLU6(), "leaky relu": nn.LeakyReLU(0.1), "no relu": nn.Identity()}
        shuffle = [shuffle_of(s)]
        middle = {
            "dropout": nn.Dropout(0.5),
            "squeeze and excite": SqueezeAndExcite(),
            "flipped": Function(flip),
        }
        parts: list[nn.Module] = [conv(s.mid_channels, s.in_channels, 1, s.conv1_groups), *norm(s.mid_channels)]
        parts += [first_relu.get(miss or "", relu_of(s.relu))]
        parts += [] if s.shuffled_behind else shuffle
        parts += [conv(s.mid_channels, s.mid_channels, 3, s.mid_channels, s.stride), *norm(s.mid_channels)]
        parts += [relu_of(s.relu)] if s.conv2_relu else []
        parts += shuffle if s.shuffled_behind else []
        if miss in middle:
            parts.insert(rng.randrange(3, len(parts)), middle[miss])
        parts += [conv(s.out_channels, s.mid_channels, 1, s.groups), *norm(s.out_channels)]
        if miss == "hooked":
            rng.choice(parts).register_forward_hook(lambda module, args, y: None)
        if s.writing == "sequential":
            cut = rng.randrange(1, len(parts))
            self.branch = nn.Sequential(nn.Sequential(*parts[:cut]), *parts[cut:])
        else:
            self.names = [
                f"{rng.choice(['layer', 'op', 'part', 'conv'])}_{rng.choice('abc')}{i}" for i in range(len(parts))
            ]
            for name, part in zip(self.names, parts, strict=True):
                self.add_module(name, part)
        pool: nn.Module = nn.AvgPool2d(3, 2, 1, count_include_pad=s.include_pad)
        if miss == "max pool":
            pool = nn.MaxPool2d(3, 2, 1)
        elif miss == "other average pool":
            pool = nn.AvgPool2d(5, 2, 2, count_include_pad=s.include_pad)
        elif miss == "other divisor":
            pool = nn.AvgPool2d(3, 2, 1, divisor_override=7)
        self.pool = pool if s.stride == 2 else nn.Identity()
        self.last = relu_of(s.relu)

    def main(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The main branch's result, and an intermediate of it."""
        if self.style.writing == "sequential":
            between = self.branch[0](x)
            y = between
            for part in list(self.branch)[1:]:
                y = part(y)
            return y, between
        between = y = getattr(self, self.names[0])(x)
        for name in self.names[1:]:
            y = getattr(self, name)(y)
        return y, between

    def forward(self, x: Tensor) -> Tensor:
        s, miss = self.style, self.style.near_miss
        y, between = self.main(x)
        if miss == "second use":
            y = y + between.mean()
        if miss == "training only" and self.training:
            y = y * 1.01
        if miss == "by value" and bool((x.mean() > 0.01).item()):
            y = y + 1
        shortcut = self.pool(x)
        if s.stride == 1:
            if miss == "relu on the shortcut":
                shortcut = shortcut.relu()
            if miss == "scaled sum":
                return self.last(torch.add(y, shortcut, alpha=2))
            if s.relu == "inplace method":
                y += shortcut
                return self.last(y)
            return self.last(shortcut + y if s.shortcut_first else y + shortcut)
        if s.relu_on_both:
            return self.last(torch.cat([shortcut, y] if s.shortcut_first else [y, shortcut], 1))
        parts = [self.last(y), shortcut]
        return torch.cat(parts[::-1] if s.shortcut_first else parts, dim=1)


def randomize_norms(unit: nn.Module) -> None:
    for module in unit.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                if tensor is not None:
                    tensor.data.normal_()


def at_random(unit_class: Callable[[Any], AnyModule], style: Any) -> AnyModule:
    """The unit of a style with weights and statistics at random, in float64 and eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(style.seed)
        unit = unit_class(style).double().eval()
        randomize_norms(unit)
        if style.near_miss == "tied":
            norms = [module for module in unit.modules() if isinstance(module, nn.BatchNorm2d)]
            norms[1].running_mean = norms[0].running_mean
    return unit


def random_unit(style: Style) -> RandomUnit:
    return at_random(RandomUnit, style)
