"""The contenders: what else runs a ShuffleNet unit or network on a CPU, each as a callable without arguments.

A peer is built for one module in eval mode and one input of static shape, under ``torch.no_grad``, for torch's current
number of threads; a call runs one inference and returns the output.
"""

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.nn.utils import fuse_conv_bn_eval

import shufflenet_ext as se

Contender = Callable[[], Tensor]

OURS = "ours"
OURS_CHANNELS_LAST = "ours channels_last"
DROP_IN = "ours drop-in"
FOLDED = "folded"


class FoldedDepthwise(nn.Module):
    """Plain PyTorch, batch norm folded: a unit's 1×1 convolution, ReLU, shuffle and depthwise convolution.

    Not ``se.reference``, whose checks of arguments would be timed.
    """

    def __init__(self, unit: se.ShuffleBottleneck) -> None:
        super().__init__()
        self.conv1 = fuse_conv_bn_eval(unit.conv1, unit.bn1)
        self.conv2 = fuse_conv_bn_eval(unit.conv2, unit.bn2)
        self.groups = unit.groups

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x), inplace=True)
        n, c, h, w = y.shape
        return self.conv2(y.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w))


class FoldedUnit(FoldedDepthwise):
    """Plain PyTorch, batch norm folded: a unit."""

    def __init__(self, unit: se.ShuffleBottleneck) -> None:
        super().__init__(unit)
        self.conv3 = fuse_conv_bn_eval(unit.conv3, unit.bn3)
        self.stride = unit.stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(super().forward(x))
        if self.stride == 1:
            return F.relu(y + x, inplace=True)
        return F.relu(torch.cat([y, F.avg_pool2d(x, 3, stride=2, padding=1)], 1), inplace=True)


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy whose units are :class:`se.ShuffleBottleneck`, whatever backend is in use."""
    copied = copy.deepcopy(module)
    for unit in copied.modules():
        if isinstance(unit, se.FusedShuffleBottleneck):
            # A fused unit is a plain one but for its forward.
            unit.__class__ = se.ShuffleBottleneck  # type: ignore[assignment]
    return copied


def folded_copy(module: nn.Module) -> nn.Module:
    """A copy in plain PyTorch with batch norm folded into the convolutions, a network's stem included."""
    if isinstance(module, se.ShuffleBottleneck):
        return FoldedUnit(module)
    copied = copy.copy(module)
    copied._modules = {name: folded_copy(child) if child else None for name, child in module._modules.items()}
    conv, norm = copied._modules.get("conv1"), copied._modules.get("bn1")
    if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
        copied.conv1, copied.bn1 = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return copied


def ours(module: nn.Module, x: Tensor) -> dict[str, Contender]:
    """This package, optimized for inference, in both memory formats; and its module as it is, in eval mode."""
    optimized = se.optimize_for_inference(module)
    return {
        OURS: eager(optimized, x),
        OURS_CHANNELS_LAST: eager(optimized, channels_last(x)),
        DROP_IN: eager(module, x),
    }


def eager(module: Callable[[Tensor], Tensor], x: Tensor) -> Contender:
    """PyTorch as it is."""
    return lambda: module(x)


def eager_channels_last(module: nn.Module, x: Tensor) -> Contender:
    """PyTorch with weights and input in channels_last."""
    copied = copy.deepcopy(module)
    for weight in copied.parameters():
        if weight.dim() == 4:
            weight.data = channels_last(weight.data)
    return eager(copied, channels_last(x))


def compiled(module: nn.Module, x: Tensor, mode: str = "default") -> Contender:
    """torch.compile with Inductor's freezing."""
    run: Callable[[Tensor], Tensor] = torch.compile(module, fullgraph=True, dynamic=False, mode=mode)
    with inductor_config.patch(freezing=True):  # read when the first call compiles; as an option it has no effect
        run(x)
    return eager(run, x)


def onnx_runtime(module: nn.Module, x: Tensor) -> Contender:
    """ONNX Runtime in float32, input and output bound ahead."""
    import onnxruntime

    program = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    model = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (source,), (target,) = session.get_inputs(), session.get_outputs()
    out = torch.empty(target.shape)
    binding = session.io_binding()
    binding.bind_ortvalue_input(source.name, onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy()))
    binding.bind_ortvalue_output(target.name, onnxruntime.OrtValue.ortvalue_from_numpy(out.numpy()))

    def run() -> Tensor:
        session.run_with_iobinding(binding)
        return out

    return run


def openvino(module: nn.Module, x: Tensor) -> Contender:
    """OpenVINO in float32, tuned for latency, input and output shared with torch."""
    os.environ.setdefault("CI", "true")  # no telemetry
    import openvino as ov

    model = ov.convert_model(module, example_input=x, input=list(x.shape))
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    source = ov.Tensor(x.numpy(), shared_memory=True)
    out = torch.empty(list(model.output().shape))
    request.set_output_tensor(ov.Tensor(out.numpy(), shared_memory=True))

    def run() -> Tensor:
        request.infer(source, share_inputs=True, share_outputs=True)  # by default both are copied
        return out

    return run


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# Name in the report: how it is built from the plain module, from the one with batch norm folded, and an input. Runtimes
# get the folded module: they would fold it themselves.
Builder = Callable[[nn.Module, nn.Module, Tensor], Contender]
_EAGER: dict[str, Builder] = {
    "eager": lambda plain, folded, x: eager(plain, x),
    "eager channels_last": lambda plain, folded, x: eager_channels_last(plain, x),
}
_FOLDED: dict[str, Builder] = {
    FOLDED: lambda plain, folded, x: eager(folded, x),
    "folded channels_last": lambda plain, folded, x: eager_channels_last(folded, x),
}
_COMPILED: dict[str, Builder] = {"torch.compile": lambda plain, folded, x: compiled(folded, x)}
_RUNTIMES: dict[str, Builder] = {
    "ONNX Runtime": lambda plain, folded, x: onnx_runtime(folded, x),
    "OpenVINO": lambda plain, folded, x: openvino(folded, x),
}
ALL = _EAGER | _FOLDED | _COMPILED | _RUNTIMES
CONVERTED = tuple(_COMPILED | _RUNTIMES)  # these take seconds to build
OF_OPS = tuple(_FOLDED | _COMPILED)


def build(
    names: Iterable[str], plain: nn.Module, folded: nn.Module, x: Tensor, builders: Mapping[str, Builder] = ALL
) -> tuple[dict[str, Contender], dict[str, str]]:
    """The named peers, and for each one that cannot be had, why."""
    built: dict[str, Contender] = {}
    absent: dict[str, str] = {}
    for name in names:
        try:
            built[name] = builders[name](plain, folded, x)
        except ImportError as error:
            absent[name] = f"not installed ({error})"
        except Exception as error:  # a peer that cannot run this shape must not cost the others theirs
            absent[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return built, absent
