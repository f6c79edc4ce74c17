"""Units of ShuffleNet v2 and near misses of them, in every style that people write them in, at random."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from styles import (
    RELUS,
    SHUFFLES,
    Convolution,
    Function,
    Shuffle,
    SqueezeAndExcite,
    at_random,
    flip,
    relu_of,
)
from torch import Tensor, nn

NEAR_MISSES = (
    "relu6",
    "leaky relu",
    "no relu",
    "relu behind the depthwise convolution",
    "5x5",
    "dilated",
    "reflected",
    "grouped",
    "dropout",
    "squeeze and excite",
    "second use",
    "other split",
    "overlapping halves",
    "unequal halves",
    "touched",
    "residual",
    "main first",
    "other shuffle",
    "no shuffle",
    "flipped",
    "hooked",
    "tied",
    "training only",
    "by value",
    "norm of the batch",
)
_STRIDE_1 = ("other split", "overlapping halves", "unequal halves", "residual")
SPLITS = ("chunk", "split", "sizes", "slices", "narrow", "tensor_split", "view", "unbind", "index")
WRITINGS = ("attributes", "sequential", "blocks", "functional")


@dataclass(frozen=True)
class StyleV2:
    """What a random unit is, and how it is written."""

    seed: int
    stride: int
    in_channels: int
    own_channels: int  # of the input, those that the main branch reads
    mid_channels: int
    out_channels: int  # the main branch's
    beside_channels: int  # those that pass by, or the shortcut's
    split_groups: int
    shuffle_groups: int
    bias: bool
    norms: bool
    affine: bool
    writing: str
    split: str
    join: str  # "cat", "hstack" or "stack", which also shuffles
    shuffle: str
    relu: str
    near_miss: str | None = None


def random_style(seed: int, near_miss: str | None = None) -> StyleV2:
    rng = random.Random(seed)
    stride = 1 if near_miss in _STRIDE_1 else rng.choice([1, 2])
    if near_miss in ("grouped", "other shuffle", "no shuffle", "other split", "overlapping halves"):
        half, mid, out = 6, rng.choice([2, 4, 6]), 6
    else:
        half, mid, out = rng.randrange(1, 9), rng.randrange(1, 9), rng.randrange(1, 9)
    own = in_channels = half
    beside = rng.choice([out, out, half])
    if stride == 1:
        in_channels, own, out, beside = 2 * half, half, half, half
    if near_miss == "other split":
        own = out = rng.choice([3, 4, 8, 9])
        beside = in_channels - own
    elif near_miss == "unequal halves":
        out += rng.choice([1, 2])
    channels = out + beside
    alternatives = [1, 2, channels // 2] if channels % 2 == 0 else [1]
    shuffle_groups = rng.choice([3, 4] if near_miss == "other shuffle" else alternatives)
    split_groups = rng.choice([1, 1, 2, half]) if stride == 1 and near_miss != "other split" else 1
    return StyleV2(
        seed=seed,
        stride=stride,
        in_channels=in_channels,
        own_channels=own,
        mid_channels=mid,
        out_channels=out,
        beside_channels=beside,
        split_groups=split_groups,
        shuffle_groups=shuffle_groups,
        bias=rng.random() < 0.4,
        norms=rng.random() < 0.9 or near_miss == "tied",
        affine=rng.random() < 0.9,
        writing=rng.choice(WRITINGS[:-1] if near_miss == "reflected" else WRITINGS),
        split=rng.choice(["steps", "megvii"] if split_groups == half > 2 and rng.random() < 0.7 else SPLITS),
        join=rng.choice(["cat", "hstack", "stack"] if shuffle_groups == 2 and out == beside else ["cat", "hstack"]),
        shuffle=rng.choice(SHUFFLES),
        relu=rng.choice(RELUS),
        near_miss=near_miss,
    )


def split(x: Tensor, sizes: tuple[int, int], way: str) -> Sequence[Tensor]:
    """What passes by, and what the main branch reads; "steps" and "megvii" take channels of even and odd numbers."""
    first, second = sizes
    n, c, h, w = x.shape
    if way == "steps":
        return x[:, ::2], x[:, 1::2]
    if way == "megvii":
        y = x.reshape(n * c // 2, 2, h * w).permute(1, 0, 2).reshape(2, -1, c // 2, h, w)
        return y[0], y[1]
    if first == second:
        if way == "chunk":
            return x.chunk(2, dim=1)
        if way == "split":
            return x.split(c // 2, 1)
        if way == "view":
            y = x.view(n, 2, -1, h, w)
            return y[:, 0], y[:, 1]
        if way == "unbind":
            return x.unflatten(1, (2, -1)).unbind(1)
    if way == "narrow":
        return x.narrow(1, 0, first), x.narrow(1, first, second)
    if way == "tensor_split":
        return torch.tensor_split(x, [first], dim=1)
    if way == "index":
        return x[:, list(range(first))], x[:, list(range(first, c))]
    if way == "sizes":
        return torch.split(x, [first, second], 1)
    return x[:, :first], x[:, first:]


def touch(x: Tensor, way: str) -> Tensor:
    return {"relu": torch.relu, "scale": lambda y: y * 0.5, "flip": flip, "clip": lambda y: y.clamp(-1, 1)}[way](x)


class RandomUnitV2(nn.Module):
    def __init__(self, style: StyleV2) -> None:
        super().__init__()
        self.style, self.rng = style, random.Random(style.seed)
        s, rng = style, self.rng
        # What a near miss changes of a branch, it changes in either branch or in both.
        changed = rng.choice([("main",), ("shortcut",), ("main", "shortcut")]) if s.stride == 2 else ("main",)
        self.main_names = self.add(self.main_parts(s.near_miss if "main" in changed else None))
        self.shortcut_names: list[str] = []
        if s.stride == 2:
            self.shortcut_names = self.add(self.shortcut_parts(s.near_miss if "shortcut" in changed else None))
        self.ahead = Shuffle(s.in_channels, s.split_groups, s.shuffle)
        self.behind = Shuffle(s.out_channels + s.beside_channels, s.shuffle_groups, s.shuffle)
        if s.near_miss == "no shuffle":
            rng.shuffle(self.behind.order)
            self.behind.way = "index"
        self.touched = rng.choice(["beside", "own"]), rng.choice(["relu", "scale", "flip", "clip"])

    def main_parts(self, miss: str | None) -> list[tuple[str, nn.Module]]:
        s = self.style
        own, mid, out = s.own_channels, s.mid_channels, s.out_channels
        return self.parts([(mid, own, 1, True), (mid, mid, 3, False), (out, mid, 1, True)], miss)

    def shortcut_parts(self, miss: str | None) -> list[tuple[str, nn.Module]]:
        channels, beside = self.style.in_channels, self.style.beside_channels
        return self.parts([(channels, channels, 3, False), (beside, channels, 1, True)], miss)

    def parts(self, convolutions: list[tuple[int, int, int, bool]], miss: str | None) -> list[tuple[str, nn.Module]]:
        """Convolutions, of rows, columns and size, with their norms and, where it is so, ReLUs; each with its kind."""
        s, rng = self.style, self.rng
        grouped = rng.randrange(len(convolutions)) if miss == "grouped" else None
        parts: list[tuple[str, nn.Module]] = []
        for i, (rows, columns, size, relu) in enumerate(convolutions):
            wide = size > 1
            groups = columns if wide else 1
            if grouped == i:
                groups = 1 if wide else 2
            parts.append(("convolution", self.convolution(rows, columns, size, groups, miss if wide else None)))
            if s.norms or miss == "norm of the batch":
                eps, momentum, tracked = rng.choice([1e-5, 1e-3]), rng.choice([0.1, None]), miss != "norm of the batch"
                parts.append(("norm", nn.BatchNorm2d(rows, eps, momentum, s.affine, track_running_stats=tracked)))
            parts += [("relu", relu_of(s.relu))] if relu else []
        others = {"relu6": nn.ReLU6(), "leaky relu": nn.LeakyReLU(0.1), "no relu": nn.Identity()}
        if miss in others:
            parts[rng.choice([i for i, (kind, _) in enumerate(parts) if kind == "relu"])] = "other", others[miss]
        between = {"dropout": nn.Dropout(0.5), "squeeze and excite": SqueezeAndExcite(), "flipped": Function(flip)}
        if miss in between:
            parts.insert(rng.randrange(1, len(parts) + 1), ("other", between[miss]))
        if miss == "relu behind the depthwise convolution":
            last = max(i for i, (kind, _) in enumerate(parts) if kind == "convolution")
            parts.insert(last, ("relu", relu_of(s.relu)))
        if miss == "hooked":
            rng.choice(parts)[1].register_forward_hook(lambda module, args, y: None)
        return parts

    def convolution(self, rows: int, columns: int, size: int, groups: int, miss: str | None) -> nn.Module:
        s = self.style
        stride, spread = s.stride if size > 1 else 1, 2 if miss == "dilated" else 1
        size = 5 if miss == "5x5" else size
        options: dict[str, Any] = {"stride": stride, "padding": size // 2 * spread, "dilation": spread}
        if s.writing == "functional":
            return Convolution(rows, columns // groups, size, size, bias=s.bias, groups=groups, **options)
        mode = "reflect" if miss == "reflected" else "zeros"
        return nn.Conv2d(columns, rows, size, groups=groups, bias=s.bias, padding_mode=mode, **options)

    def add(self, parts: list[tuple[str, nn.Module]]) -> list[str]:
        """Registers the parts of a branch as the style has it, and returns the names of what runs one by one."""
        way, rng, modules = self.style.writing, self.rng, [module for _, module in parts]
        branch = f"{rng.choice(['branch', 'b', 'path'])}{len(self._modules)}"
        if way == "sequential":
            cut = rng.randrange(1, len(modules))
            self.add_module(branch, nn.Sequential(nn.Sequential(*modules[:cut]), *modules[cut:]))
            return [f"{branch}.{i}" for i in range(len(modules) - cut + 1)]
        if way == "blocks":
            starts = [i for i, (kind, _) in enumerate(parts) if kind == "convolution"]
            ends = [*starts[1:], len(parts)]
            modules = [nn.Sequential(*modules[a:b]) for a, b in zip(starts, ends, strict=True)]
        names = [f"{branch}_{rng.choice(['conv', 'op', 'layer'])}{i}" for i in range(len(modules))]
        for name, module in zip(names, modules, strict=True):
            self.add_module(name, module)
        return names

    def run(self, names: list[str], x: Tensor) -> tuple[Tensor, Tensor]:
        """A branch's result, and an intermediate of it."""
        between = y = self.get_submodule(names[0])(x)
        for name in names[1:]:
            y = self.get_submodule(name)(y)
        return y, between

    def forward(self, x: Tensor) -> Tensor:
        s, miss = self.style, self.style.near_miss
        beside, own = x, x
        if s.stride == 1:
            sizes = s.in_channels - s.own_channels, s.own_channels
            ahead = x if s.split_groups == 1 or s.split in ("steps", "megvii") else self.ahead(x)
            beside, own = split(ahead, sizes, s.split)
            if miss == "overlapping halves":
                own = ahead[:, 1 : s.own_channels + 1]
        if miss == "touched":
            which, way = self.touched
            beside, own = (touch(beside, way), own) if which == "beside" else (beside, touch(own, way))
        y, between = self.run(self.main_names, own)
        if s.stride == 2:
            beside, _ = self.run(self.shortcut_names, beside)
        if miss == "second use":
            y = y + between.mean()
        if miss == "residual":
            y = y + own
        if miss == "training only" and self.training:
            y = y * 1.01
        if miss == "by value" and bool((x.mean() > 0.01).item()):
            y = y + 1
        parts = [y, beside] if miss == "main first" else [beside, y]
        if s.join == "stack" and miss != "no shuffle":
            return torch.stack(parts, 2).flatten(1, 2)
        joined = torch.hstack(parts) if s.join == "hstack" else torch.cat(parts, dim=1)
        return self.behind(joined)


def random_unit(style: StyleV2) -> RandomUnitV2:
    return at_random(RandomUnitV2, style)
