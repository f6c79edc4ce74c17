"""Torch's setting for TF32 convolutions on its way to the kernels. What they do with it: tests/test_cuda_host.py."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import Unit
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import shufflenet_ext as se
from shufflenet_ext import _backend, modules
from shufflenet_ext._fused import foldable_unit
from shufflenet_ext.inference import InferenceUnits


@pytest.fixture(autouse=True)
def setting() -> Iterator[None]:
    before = torch.backends.cudnn.conv.fp32_precision
    torch._dynamo.reset()
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize(
    ("precision", "device", "dtype", "expected"),
    [
        ("tf32", "cuda", torch.float32, True),
        ("ieee", "cuda", torch.float32, False),
        ("tf32", "cuda", torch.float64, False),
        ("tf32", "cuda", torch.float16, False),
        ("tf32", "cpu", torch.float32, False),
    ],
)
def test_torch_decides(precision: str, device: str, dtype: torch.dtype, expected: bool) -> None:
    torch.backends.cudnn.conv.fp32_precision = precision
    with FakeTensorMode():
        assert _backend.allows_tf32(torch.empty(1, device=device, dtype=dtype)) is expected


def test_the_older_name_of_the_setting_counts() -> None:
    with FakeTensorMode():
        x = torch.empty(1, device="cuda")
    for allowed in (True, False):
        with torch.backends.cudnn.flags(allow_tf32=allowed):
            assert _backend.allows_tf32(x) is allowed


def test_compiled_code_follows_the_setting() -> None:
    compiled = torch.compile(lambda x: x + _backend._settings.convolutions_use_tf32, fullgraph=True, backend="eager")
    for precision, expected in (("ieee", 0), ("tf32", 1), ("ieee", 0)):
        torch.backends.cudnn.conv.fp32_precision = precision
        assert compiled(torch.zeros(())) == expected


class Told(TorchDispatchMode):
    """Notes what each op of this package was told."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "shufflenet_ext":
            self.answers.append(kwargs.get("allow_tf32", False))
        return func(*args, **kwargs or {})


def unit_as(way: str) -> nn.Module | Any:
    module = se.FusedShuffleBottleneck(24, 24, 1, 3, mid_channels=12).eval()
    unit = Unit("pointwise_shuffle_depthwise" if way == "pointwise_shuffle_depthwise" else "shuffle_bottleneck")
    return {
        "module": module,
        "chain": InferenceUnits([(module, foldable_unit(module))], dtype=None),
        unit.op: lambda x: getattr(se.ops, unit.op)(x, *unit.tensors()[1:], **unit.options),
    }[way]


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("way", ["pointwise_shuffle_depthwise", "shuffle_bottleneck", "module", "chain"])
def test_the_op_is_told(way: str, allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_backend, modules):
        monkeypatch.setattr(module, "allows_tf32", lambda _: allowed)
    with torch.no_grad(), Told() as told:
        unit_as(way)(Unit().tensors()[0])
    assert told.answers == [allowed]


@pytest.mark.parametrize("op", ["pointwise_shuffle_depthwise", "shuffle_bottleneck", "shuffle_bottleneck_batch_norm"])
def test_nothing_else_depends_on_it(op: str) -> None:
    unit = Unit(op)
    tensors = unit.tensors()
    native = getattr(torch.ops.shufflenet_ext, op)
    tensors[1].requires_grad_()
    options = unit.options | {"allow_tf32": True}
    torch.library.opcheck(native.default, tensors, options)
    results = [native(*tensors, **options), unit.native(tensors)]
    assert torch.equal(*results)
    grads = [torch.autograd.grad(result.sum(), tensors[1])[0] for result in results]
    assert torch.equal(*grads)
