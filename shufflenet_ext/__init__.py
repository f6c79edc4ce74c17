"""ShuffleNet units, v1 and v2, as fused native kernels for PyTorch.

Start at :class:`FusedShuffleBottleneck` and :class:`FusedShuffleUnitV2`.
"""

from shufflenet_ext import models, ops, reference
from shufflenet_ext._backend import ReferenceFallbackWarning, use_backend
from shufflenet_ext._explain import explain
from shufflenet_ext._native import build_info
from shufflenet_ext.fusion import FuseWarning, fuse
from shufflenet_ext.inference import optimize_for_inference
from shufflenet_ext.modules import FusedShuffleBottleneck, ShuffleBottleneck
from shufflenet_ext.modules_v2 import FusedShuffleUnitV2, ShuffleUnitV2
from shufflenet_ext.reference import shuffle_channels

__all__ = [
    "FuseWarning",
    "FusedShuffleBottleneck",
    "FusedShuffleUnitV2",
    "ReferenceFallbackWarning",
    "ShuffleBottleneck",
    "ShuffleUnitV2",
    "build_info",
    "explain",
    "fuse",
    "models",
    "ops",
    "optimize_for_inference",
    "reference",
    "shuffle_channels",
    "use_backend",
]
