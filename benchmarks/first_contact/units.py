"""What the steps with torch share: the device, modules of cases.py's units, and what is allowed of a result."""

import argparse
import json
from typing import Any

import torch
from torch import Tensor

import shufflenet_ext as se
from benchmarks.first_contact.cases import DTYPES, LAYOUTS, TINY_DTYPES, TINY_UNITS, UNITS, PaperUnit
from benchmarks.shapes import with_statistics

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
assert FORMATS.keys() == LAYOUTS.keys()


class Settings:
    """A card, or in a rehearsal the CPU with small units."""

    def __init__(self, doc: str | None) -> None:
        parser = argparse.ArgumentParser(description=doc)
        parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small units")
        self.rehearse: bool = parser.parse_args().rehearse
        self.device = "cpu" if self.rehearse else "cuda"
        self.units = TINY_UNITS if self.rehearse else UNITS
        self.dtypes = TINY_DTYPES if self.rehearse else DTYPES


def module_of(unit: PaperUnit) -> se.FusedShuffleBottleneck:
    torch.manual_seed(0)
    module = se.FusedShuffleBottleneck(
        unit.in_channels,
        unit.out_channels,
        unit.stride,
        3,
        mid_channels=unit.mid_channels,
        conv1_groups=unit.conv1_groups,
    )
    return with_statistics(module)


def image_of(unit: PaperUnit, batch: int, device: str = "cpu") -> Tensor:
    return torch.randn(batch, unit.in_channels, unit.size, unit.size, device=device)


def allow_tf32(name: str) -> torch.dtype:
    """Lets torch, and the kernels with it, multiply float32 as TF32 for the dtype of that name alone; the dtype."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = name == "tfloat32"
    dtype: torch.dtype = getattr(torch, "float32" if name == "tfloat32" else name)
    return dtype


def compare(got: Tensor, plain: Tensor, exact: Tensor) -> dict[str, Any]:
    """Whether a result is as near to the exact one as twice PyTorch's own, and both largest errors, of the largest."""
    exact = exact.double()
    largest = exact.abs().max().item() or 1.0
    error, allowed = ((result.double().cpu() - exact).abs().max().item() / largest for result in (got, plain))
    floor = torch.finfo(got.dtype).eps * (1 if got.element_size() == 2 else 8)
    return {"ok": bool(error <= 2 * allowed + floor), "error": error, "eager_error": allowed}


def say(**row: Any) -> None:
    print(json.dumps(row), flush=True)
