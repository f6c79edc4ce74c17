"""ShuffleNet v1 units as fused native kernels for PyTorch. Start at :class:`FusedShuffleBottleneck`."""

from shufflenet_ext import models, ops, reference
from shufflenet_ext._backend import ReferenceFallbackWarning, use_backend
from shufflenet_ext._explain import explain
from shufflenet_ext._native import build_info
from shufflenet_ext.fusion import FuseWarning, fuse
from shufflenet_ext.inference import optimize_for_inference
from shufflenet_ext.modules import FusedShuffleBottleneck, ShuffleBottleneck
from shufflenet_ext.reference import shuffle_channels

__all__ = [
    "FuseWarning",
    "FusedShuffleBottleneck",
    "ReferenceFallbackWarning",
    "ShuffleBottleneck",
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
