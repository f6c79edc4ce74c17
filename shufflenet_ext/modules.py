"""The unit as a module: plain (ShuffleBottleneck) and fused (FusedShuffleBottleneck), with the same state_dict."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy, Tracer

from shufflenet_ext import reference
from shufflenet_ext._backend import allows_tf32, fall_back, runs_native, trains_native, unit_variant
from shufflenet_ext._checks import check_divides, check_int, check_positive, check_tensor
from shufflenet_ext._native import UnitSizes
from shufflenet_ext._training_op import TrainedStage, untrainable
from shufflenet_ext._training_op import run as train

# The channels of a network's stem. The unit behind it does not group its first convolution (section 3.2).
STEM_CHANNELS = 24


class ShuffleBottleneck(nn.Module):
    """A ShuffleNet v1 unit in plain PyTorch (arXiv:1707.01083, figure 2 b for stride 1, c for stride 2).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the last convolution: in_channels for stride 1; the unit's output less in_channels for
            stride 2, where the pooled input is concatenated.
        stride: 1 or 2.
        groups: of the last convolution.
        mid_channels: of the intermediate tensors; by default ``out_channels // 4``.
        conv1_groups: of the first convolution; by default 1 if in_channels is 24, else ``groups``.
        conv2_relu: whether a ReLU follows the depthwise convolution's batch norm.
        pool_count_include_pad: as in nn.AvgPool2d, for stride 2.
        shuffle_groups: of the shuffle, a divisor of mid_channels; by default ``groups``.
        shortcut_first: whether the pooled input comes first in the concatenation, for stride 2.
        shortcut_relu: whether the pooled input goes through the last ReLU too, for stride 2.
        bias: whether the convolutions have biases.

    Input (N, in_channels, H, W); output (N, in_channels, H, W) for stride 1, (N, out_channels + in_channels,
    ceil(H / 2), ceil(W / 2)) for stride 2. Parameters and buffers: conv1, bn1, conv2, bn2, conv3, bn3.

    Raises TypeError or ValueError, naming the argument, for channels and groups that do not fit each other.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        groups: int,
        *,
        mid_channels: int | None = None,
        conv1_groups: int | None = None,
        conv2_relu: bool = False,
        pool_count_include_pad: bool = True,
        shuffle_groups: int | None = None,
        shortcut_first: bool = False,
        shortcut_relu: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_channels", in_channels),
            ("out_channels", out_channels),
            ("stride", stride),
            ("groups", groups),
        ):
            check_positive(name, value)
        if stride not in (1, 2):
            raise ValueError(f"stride: got {stride}, expected 1 or 2")
        if mid_channels is None:
            mid_channels = out_channels // 4
        if conv1_groups is None:
            conv1_groups = 1 if in_channels == STEM_CHANNELS else groups
        if shuffle_groups is None:
            shuffle_groups = groups
        check_int("mid_channels", mid_channels)
        check_int("conv1_groups", conv1_groups)
        check_int("shuffle_groups", shuffle_groups)
        if mid_channels < 1:
            raise ValueError(f"mid_channels: got {mid_channels}, expected a positive int")
        if stride == 1 and out_channels != in_channels:
            raise ValueError(
                f"out_channels: got {out_channels}, expected in_channels, {in_channels} (stride 1 adds the input)"
            )
        check_divides("conv1_groups", conv1_groups, "in_channels", in_channels)
        check_divides("conv1_groups", conv1_groups, "mid_channels", mid_channels)
        check_divides("groups", groups, "mid_channels", mid_channels)
        check_divides("groups", groups, "out_channels", out_channels)
        check_divides("shuffle_groups", shuffle_groups, "mid_channels", mid_channels)
        self.stride = stride
        self.groups = groups
        self.conv2_relu = conv2_relu
        self.pool_count_include_pad = pool_count_include_pad
        self.shuffle_groups = shuffle_groups
        self.shortcut_first = shortcut_first
        self.shortcut_relu = shortcut_relu
        self.conv1 = nn.Conv2d(in_channels, mid_channels, 1, groups=conv1_groups, bias=bias)
        self.bn1 = nn.BatchNorm2d(mid_channels)
        self.conv2 = nn.Conv2d(mid_channels, mid_channels, 3, stride, padding=1, groups=mid_channels, bias=bias)
        self.bn2 = nn.BatchNorm2d(mid_channels)
        self.conv3 = nn.Conv2d(mid_channels, out_channels, 1, groups=groups, bias=bias)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def pairs(self) -> tuple[tuple[nn.Conv2d, nn.BatchNorm2d], ...]:
        """Each convolution with the batch norm behind it."""
        return (self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)

    def variant(self) -> dict[str, Any]:
        """The op's arguments that set the unit apart from the original code's."""
        return unit_variant(self.groups, self.shuffle_groups, self.shortcut_first, self.shortcut_relu, self.stride)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Proxy):
            self._check(x)
        elif (node := leaf_node(self, x)) is not None:
            return node
        y = F.relu(self.bn1(self.conv1(x)))
        y = reference.shuffle_channels(y, self.shuffle_groups)
        y = self.bn2(self.conv2(y))
        if self.conv2_relu:
            y = F.relu(y)
        y = self.bn3(self.conv3(y))
        return reference.add_shortcut(
            y,
            x,
            stride=self.stride,
            pool_count_include_pad=self.pool_count_include_pad,
            shortcut_first=self.shortcut_first,
            shortcut_relu=self.shortcut_relu,
        )

    def _check(self, x: Tensor) -> None:
        check_tensor("x", x)
        if x.dim() != 4 or x.shape[1] != self.conv1.in_channels:
            raise ValueError(f"x: got shape {list(x.shape)}, expected (batch, {self.conv1.in_channels}, height, width)")

    def extra_repr(self) -> str:
        return f"stride={self.stride}, groups={self.groups}"


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # attributes of a module


def leaf_node(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A call of the module as one node of the graph that torch.fx.symbolic_trace makes, as a torch.nn module's is.

    None where that is not what is being done, or cannot be: where the module is itself what is traced, or has hooks,
    which have been called with the stand-ins for tensors.
    """
    proxies = (value for value in (*args, *kwargs.values()) if isinstance(value, Proxy))
    tracer = getattr(next(proxies, None), "tracer", None)
    if not isinstance(tracer, Tracer) or module is tracer.root or has_hooks(module):
        return None
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs more than its class's forward."""
    return any(getattr(module, name) for name in HOOKS) or "forward" in vars(module)


def _pads_to_same_size(conv: nn.Conv2d) -> bool:
    half = conv.kernel_size[0] // 2
    return conv.padding == (half, half) and conv.dilation == (1, 1) and conv.padding_mode == "zeros"


def _computes_as(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether a module's forward is that of one of these classes, as a subclass's may be or not."""
    kind = type(module)
    return (kind in classes or kind.forward in [c.forward for c in classes]) and "forward" not in module.__dict__


def unfusable(conv: nn.Module, norm: nn.Module, is_trained: bool = False) -> str | None:
    """Why the op cannot stand for what is in a convolution's and a norm's place; None where it can.

    That is the op of eval mode, or of a unit that is trained.
    """
    if not isinstance(conv, nn.Conv2d) or not _computes_as(conv, nn.Conv2d) or not _pads_to_same_size(conv):
        return f"a convolution was replaced: {conv}"
    if not _computes_as(norm, nn.BatchNorm2d, nn.SyncBatchNorm):  # the same in eval mode
        return f"a batch norm was replaced: {norm}"
    if not is_trained and (norm.running_mean is None or norm.running_var is None):
        return "a batch norm has no running statistics"
    if has_hooks(conv) or has_hooks(norm):
        return "a convolution or batch norm has hooks"
    return None


def unit_sizes(unit: ShuffleBottleneck) -> list[UnitSizes]:
    """The unit as the planner takes it, in a list; an empty one where conv1 or conv3 is not a convolution."""
    conv1, conv3 = unit.conv1, unit.conv3
    if not isinstance(conv1, nn.Conv2d) or not isinstance(conv3, nn.Conv2d):
        return []
    shapes = (*conv1.weight.shape, *conv3.weight.shape)
    return [(*shapes, conv1.groups, unit.groups, unit.stride, unit.shuffle_groups)]


class FusedShuffleBottleneck(ShuffleBottleneck):
    """The drop-in: a :class:`ShuffleBottleneck` that runs native kernels, as one in eval mode.

    Same arguments, state_dict, results and gradients. In eval mode a call is one op, which reads the parameters and the
    statistics as they are at that moment: there is no folded copy that could be stale. In training mode, where batch
    norm needs the whole batch's statistics between the convolutions, it takes three passes forward and four back, on
    the CPU; elsewhere it runs as the plain unit. The backend in use (:func:`shufflenet_ext.use_backend`) decides what
    runs the op.
    """

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return super().forward(x)
        check_tensor("x", x)
        pairs = self.pairs()
        is_trained = any(norm.training for _, norm in pairs)
        if not (trains_native(x) if is_trained else runs_native(x, lambda: unit_sizes(self))):
            return super().forward(x)
        causes = [unfusable(conv, norm, is_trained) for conv, norm in pairs]
        cause = next((cause for cause in causes if cause is not None), None)
        if cause is None and is_trained:
            cause = untrainable([norm for _, norm in pairs])
        if cause is not None:
            fall_back(f"in a FusedShuffleBottleneck {cause}")
            return super().forward(x)
        return self._train(x) if is_trained else self._infer(x)

    def _train(self, x: Tensor) -> Tensor:
        self._check(x)
        stages = [TrainedStage(conv.weight, conv.bias, norm.weight, norm.bias, norm) for conv, norm in self.pairs()]
        names = ("groups", "stride", "conv2_relu", "pool_count_include_pad", "shuffle_groups", "shortcut_first")
        options = {name: getattr(self, name) for name in (*names, "shortcut_relu")}
        return train(x, stages, conv1_groups=self.conv1.groups, **options)

    def _infer(self, x: Tensor) -> Tensor:
        tensors: list[Tensor | None] = []
        for conv, norm in self.pairs():
            tensors += [conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var]
        return torch.ops.shufflenet_ext.shuffle_bottleneck_batch_norm(
            x,
            *tensors,
            bn1_eps=self.bn1.eps,
            bn2_eps=self.bn2.eps,
            bn3_eps=self.bn3.eps,
            conv1_groups=self.conv1.groups,
            groups=self.groups,
            stride=self.stride,
            conv2_relu=self.conv2_relu,
            pool_count_include_pad=self.pool_count_include_pad,
            allow_tf32=allows_tf32(x),
            **self.variant(),
        )
