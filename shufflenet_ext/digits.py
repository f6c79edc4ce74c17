"""scikit-learn's handwritten digits, as images: what the demonstration and ``examples/train.py`` train on.

Needs the extra ``demo``; nothing else of the package imports this module.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

CLASSES = 10
HELD_OUT = 360  # of 1797 images


@dataclass
class Digits:
    """Images (N, 3, size, size) in float32, and labels (N), to train on and to test with."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(size: int = 32) -> Digits:
    """The digits, 8×8 grey, as 3×size×size; the held-out part is the same in every run."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    images = ((images - 0.3) / 0.35).repeat(1, 3, 1, 1)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[:HELD_OUT], order[HELD_OUT:]
    return Digits(images[rest], labels[rest], images[held_out], labels[held_out])


def shifted(image: Tensor, top: int, left: int, largest: int) -> Tensor:
    """Moves images (…, H, W) by largest - top pixels down and largest - left to the right; edges are repeated.

    ``top`` and ``left`` are 0 to 2 · largest.
    """
    height, width = image.shape[-2:]
    padded = F.pad(image, (largest,) * 4, mode="replicate")
    return padded[..., top : top + height, left : left + width].contiguous()
