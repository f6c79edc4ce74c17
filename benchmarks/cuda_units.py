"""The units that the CUDA benchmarks, counts and the model are about: the paper's."""

from dataclasses import dataclass
from itertools import product

import torch

import shufflenet_ext as se
from benchmarks.cuda_toolkit import Case
from benchmarks.shapes import IMAGE_SIZE

GROUPS = 3


@dataclass(frozen=True)
class Unit:
    batch: int
    in_channels: int
    height: int
    width: int
    mid_channels: int
    out_channels: int
    conv1_groups: int
    groups: int
    stride: int

    @classmethod
    def of(cls, module: se.ShuffleBottleneck, x: torch.Tensor) -> "Unit":
        mid, out = module.conv1.out_channels, module.conv3.out_channels
        batch, in_channels, height, width = x.shape
        return cls(batch, in_channels, height, width, mid, out, module.conv1.groups, module.groups, module.stride)

    @property
    def out_size(self) -> tuple[int, int]:
        return (self.height - 1) // self.stride + 1, (self.width - 1) // self.stride + 1

    @property
    def slice_channels(self) -> int:
        return self.mid_channels // self.groups

    @property
    def pool_channels(self) -> int:
        return self.in_channels if self.stride == 2 else 0

    @property
    def weights(self) -> int:
        depths = self.in_channels // self.conv1_groups + 1, 9 + 1
        return self.mid_channels * sum(depths) + self.out_channels * (self.slice_channels + 1)

    @property
    def elements(self) -> int:
        """How many elements have to be moved: x, the result and the parameters, each once."""
        height, width = self.out_size
        results = (self.out_channels + self.pool_channels) * height * width
        return self.batch * (self.in_channels * self.height * self.width + results) + self.weights

    @property
    def multiply_adds(self) -> int:
        pixels, results = self.height * self.width, self.out_size[0] * self.out_size[1]
        conv1 = pixels * self.mid_channels * self.in_channels // self.conv1_groups
        return self.batch * (conv1 + results * (9 * self.mid_channels + self.out_channels * self.slice_channels))

    def case(self, dtype: str, layout: str, sm: int) -> Case:
        return {
            **{"n": self.batch, "in": self.in_channels, "h": self.height, "w": self.width, "mid": self.mid_channels},
            **{"out": self.out_channels, "g1": self.conv1_groups, "g": self.groups, "stride": self.stride},
            **{"dtype": dtype, "layout": "nhwc" if layout == "channels_last" else "nchw", "sm": sm},
        }


def paper_units(batch: int, groups: int = GROUPS) -> dict[str, Unit]:
    """The distinct units of the paper's network, by label."""
    units = {}
    with torch.device("meta"):
        network = se.models.shufflenet_v1(groups)
        for stage, stride in product((2, 3, 4), (2, 1)):
            module = getattr(network, f"layer{stage - 1}")[0 if stride == 2 else 1]
            size = IMAGE_SIZE // 2**stage // (1 if stride == 2 else 2)
            x = torch.empty(batch, module.conv1.in_channels, size, size)
            units[f"stage {stage} stride {stride}"] = Unit.of(module, x)
    return units
