"""The contenders: what else runs a ShuffleNet unit or network on a CPU, each as a callable without arguments.

A peer is built for one module in eval mode and one input of static shape, under ``torch.no_grad``, for torch's current
number of threads; a call runs one inference and returns the output.
"""

import copy
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.fx.experimental import optimization as fx_optimization
from torch.nn.utils import fuse_conv_bn_eval

import shufflenet_ext as se

Contender = Callable[[], Tensor]

OURS = "ours"
OURS_CHANNELS_LAST = "ours channels_last"
DROP_IN = "ours drop-in"
EAGER = "eager"
FOLDED = "folded"
COMPILED = "torch.compile"
ONNX_RUNTIME = "ONNX Runtime"
OPENVINO = "OpenVINO"
OPENVINO_THROUGHPUT = "OpenVINO throughput"
NCNN = "ncnn"


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
            # A fused unit differs from a plain one in its forward alone.
            unit.__class__ = se.ShuffleBottleneck  # type: ignore[assignment]
    return copied


def folded_copy(module: nn.Module) -> nn.Module:
    """A copy in plain PyTorch with batch norm folded into the convolutions, a network's stem included."""
    if not has_units(module):
        folded: nn.Module = fx_optimization.fuse(module)
        return folded
    if isinstance(module, se.ShuffleBottleneck):
        return FoldedUnit(module)
    copied = copy.copy(module)
    copied._modules = {
        name: folded_copy(child) if child and has_units(child) else child for name, child in module._modules.items()
    }
    conv, norm = copied._modules.get("conv1"), copied._modules.get("bn1")
    if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
        copied.conv1, copied.bn1 = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return copied


def has_units(module: nn.Module) -> bool:
    """Whether it has units of this package."""
    return any(isinstance(child, se.ShuffleBottleneck) for child in module.modules())


def ours(module: nn.Module, x: Tensor) -> dict[str, Contender]:
    """This package: optimized for inference, in both memory formats, and with its units alone fused, in eval mode."""
    optimized = optimized_copy(module, x)
    return {
        OURS: eager(optimized, x),
        OURS_CHANNELS_LAST: eager(optimized, channels_last(x)),
        DROP_IN: eager(module if has_units(module) else se.fuse(copy.deepcopy(module)), x),
    }


def ours_in(dtype: torch.dtype, module: nn.Module, x: Tensor) -> dict[str, Contender]:
    """This package, optimized for inference in another dtype than the module's; the images keep theirs."""
    return {OURS: eager(optimized_copy(module, x, dtype), x)}


def optimized_copy(module: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> nn.Module:
    """The module optimized for inference; a network of others as a whole takes an example of its input."""
    return se.optimize_for_inference(module, dtype, example_inputs=None if has_units(module) else (x,))


def eager(module: Callable[[Tensor], Tensor], x: Tensor) -> Contender:
    """PyTorch as it is."""
    return lambda: module(x)


def eager_in(dtype: torch.dtype, module: nn.Module, x: Tensor) -> Contender:
    """PyTorch as it is, in a dtype."""
    return eager(copy.deepcopy(module).to(dtype), x.to(dtype))


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
    with inductor_config.patch(freezing=True):  # is read when the first call compiles; an option would have no effect
        run(x)
    return eager(run, x)


# Conversions depend on neither threads nor settings, and are kept for the rows that differ in these alone.


@lru_cache(maxsize=1)
def _onnx_model(module: nn.Module, shape: torch.Size) -> bytes:
    program = torch.onnx.export(module, (torch.zeros(shape),), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto.SerializeToString()


def onnx_runtime(module: nn.Module, x: Tensor) -> Contender:
    """ONNX Runtime in float32 with all its graph optimizations, input and output bound ahead."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(_onnx_model(module, x.shape), options, providers=["CPUExecutionProvider"])
    (source,), (target,) = session.get_inputs(), session.get_outputs()
    out = torch.empty(target.shape)
    binding = session.io_binding()
    binding.bind_ortvalue_input(source.name, onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy()))
    binding.bind_ortvalue_output(target.name, onnxruntime.OrtValue.ortvalue_from_numpy(out.numpy()))

    def run() -> Tensor:
        session.run_with_iobinding(binding)
        return out

    return run


@lru_cache(maxsize=2)  # one for the whole batch, one for a stream's share
def _openvino_model(module: nn.Module, shape: torch.Size) -> Any:
    os.environ.setdefault("CI", "true")  # no telemetry
    import openvino as ov

    # It runs the module on the example, several times: one image is enough.
    return ov.convert_model(module, example_input=torch.zeros(1, *shape[1:]), input=list(shape))


def openvino(module: nn.Module, x: Tensor, precision: str) -> Contender:
    """OpenVINO, tuned for latency, input and output shared with torch; both are float32 in any precision."""
    (request,), out = _openvino_requests(module, x, precision, "LATENCY", 1)

    def run() -> Tensor:
        request.infer(share_inputs=True, share_outputs=True)  # by default both are copied
        return out

    return run


def openvino_throughput(module: nn.Module, x: Tensor, precision: str) -> Contender:
    """OpenVINO, tuned for throughput: a stream a thread, and the batch shared evenly among them."""
    requests, out = _openvino_requests(module, x, precision, "THROUGHPUT", torch.get_num_threads())

    def run() -> Tensor:
        for request in requests:
            request.start_async(share_inputs=True)
        for request in requests:
            request.wait()
        return out

    return run


def _openvino_requests(module: nn.Module, x: Tensor, precision: str, hint: str, count: int) -> tuple[list[Any], Tensor]:
    """Requests that each infer an equal share of the batch, and the tensor that all of them write to."""
    sources = x.split(len(x) // count)
    model = _openvino_model(module, sources[0].shape)
    import openvino as ov

    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled_model = ov.Core().compile_model(model, "CPU", settings)
    out = torch.empty(len(x), *list(model.output().shape)[1:])
    requests = []
    for source, target in zip(sources, out.split(len(x) // count), strict=True):
        request = compiled_model.create_infer_request()
        request.set_input_tensor(ov.Tensor(source.numpy(), shared_memory=True))
        request.set_output_tensor(ov.Tensor(target.numpy(), shared_memory=True))
        requests.append(request)
    return requests, out


@lru_cache(maxsize=1)
def _ncnn_files(module: nn.Module, shape: torch.Size) -> "TemporaryDirectory[str]":
    import pnnx

    folder = TemporaryDirectory()
    pnnx.export(module, str(Path(folder.name, "network.pt")), (torch.zeros(shape),), fp16=False)
    return folder


def ncnn(module: nn.Module, x: Tensor) -> Contender:
    """ncnn in float32. It takes one image: the threads share it, or if there are more images, each has its own."""
    import ncnn as runtime

    workers = min(len(x), torch.get_num_threads())
    net = runtime.Net()
    net.opt.num_threads = torch.get_num_threads() // workers
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_packed = net.opt.use_bf16_storage = False
    folder = Path(_ncnn_files(module, x[:1].shape).name)
    for load, ending in ((net.load_param, "param"), (net.load_model, "bin")):
        if load(str(folder / f"network.ncnn.{ending}")):
            raise RuntimeError(f"ncnn cannot load what pnnx made of the module (network.ncnn.{ending})")
    images = [runtime.Mat(image.numpy()).clone() for image in x]
    each: Any = map if workers == 1 else ThreadPoolExecutor(workers).map

    def infer(image: Any) -> Tensor:
        extractor = net.create_extractor()
        extractor.input("in0", image)
        return torch.from_numpy(extractor.extract("out0")[1].numpy())

    def run() -> Tensor:
        return torch.stack(list(each(infer, images)))

    return run


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# Builds the peer of a name in the report, from the plain module, the one with batch norm folded, and an input. Runtimes
# get the folded module, as they would fold it themselves.
Builder = Callable[[nn.Module, nn.Module, Tensor], Contender]
_EAGER: dict[str, Builder] = {
    EAGER: lambda plain, folded, x: eager(plain, x),
    "eager channels_last": lambda plain, folded, x: eager_channels_last(plain, x),
}
_FOLDED: dict[str, Builder] = {
    FOLDED: lambda plain, folded, x: eager(folded, x),
    "folded channels_last": lambda plain, folded, x: eager_channels_last(folded, x),
}
_COMPILED: dict[str, Builder] = {COMPILED: lambda plain, folded, x: compiled(folded, x)}
_RUNTIMES: dict[str, Builder] = {
    ONNX_RUNTIME: lambda plain, folded, x: onnx_runtime(folded, x),
    OPENVINO: lambda plain, folded, x: openvino(folded, x, "f32"),
    OPENVINO_THROUGHPUT: lambda plain, folded, x: openvino_throughput(folded, x, "f32"),
    NCNN: lambda plain, folded, x: ncnn(folded, x),
}
ALL = _EAGER | _FOLDED | _COMPILED | _RUNTIMES
OTHERS_OF_PYTORCH = tuple(name for name in _EAGER | _FOLDED if name != FOLDED)
CONVERTED = tuple(_COMPILED | _RUNTIMES)  # these take seconds to build
OF_OPS = _FOLDED | _COMPILED
OF_UNITS = _EAGER | OF_OPS | {name: _RUNTIMES[name] for name in (ONNX_RUNTIME, OPENVINO)}
# Those that compute in bfloat16: PyTorch's modules are converted to it, the runtimes do it on their own.
IN_BFLOAT16: dict[str, Builder] = {
    FOLDED: lambda plain, folded, x: eager_in(torch.bfloat16, folded, x),
    COMPILED: lambda plain, folded, x: compiled(copy.deepcopy(folded).bfloat16(), x.bfloat16()),
    OPENVINO: lambda plain, folded, x: openvino(folded, x, "bf16"),
    OPENVINO_THROUGHPUT: lambda plain, folded, x: openvino_throughput(folded, x, "bf16"),
}


def build(
    builders: Mapping[str, Builder], plain: nn.Module, folded: nn.Module, x: Tensor
) -> tuple[dict[str, Contender], dict[str, str]]:
    """The peers, and for each one that cannot be had, why."""
    built: dict[str, Contender] = {}
    absent: dict[str, str] = {}
    for name, builder in builders.items():
        try:
            built[name] = builder(plain, folded, x)
        except ImportError as error:
            absent[name] = f"not installed ({error})"
        except Exception as error:  # a peer that cannot run this shape must not cost the others theirs
            absent[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return built, absent
