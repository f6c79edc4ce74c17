"""The ops for CUDA as a whole, from the dispatcher to the kernels, without a card.

csrc/cuda/ops.cpp is compiled for tensors of the CPU, with kernels that run there by their source
(tests/cuda/ops_on_host.cpp), as planned for an H100.
"""

import contextlib
import copy
import ctypes
import importlib.machinery
import importlib.util
import pickle
import platform
import re
import shutil
import sysconfig
import threading
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pybind11
import pytest
import torch
from compiled import CXX, compiled
from support import DTYPES, LAYOUTS, OPS, Network, Unit, assert_as_accurate, assert_strides_of_layout, randomize
from torch import Tensor, nn
from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

import shufflenet_ext as se
from benchmarks.cuda_toolkit import KERNEL, ROOT
from shufflenet_ext import _native, _packed, reference

SOURCES = ROOT / "tests" / "cuda"
MODULE = "_C_cuda"
UNIT, PACK, STRIP = range(3)  # kernels

pytestmark = pytest.mark.skipif(
    shutil.which(CXX) is None or platform.system() != "Linux" or platform.machine() != "x86_64",
    reason="needs a C++ compiler on x86-64 Linux",
)


class Host:
    """The ops, and how often each kernel was launched."""

    def __init__(self, path: str) -> None:
        self.library = torch.library.Library("shufflenet_ext_cuda", "DEF")
        for name in (*OPS, "shuffle_network", "pack_network"):
            schema = str(getattr(torch.ops.shufflenet_ext, name).default._schema)
            self.library.define(schema.removeprefix("shufflenet_ext::"))
        loader = importlib.machinery.ExtensionFileLoader(MODULE, path)
        spec = importlib.util.spec_from_loader(MODULE, loader)
        assert spec is not None
        loader.exec_module(importlib.util.module_from_spec(spec))
        self.ops = torch.ops.shufflenet_ext_cuda
        self._launches_of = ctypes.CDLL(path).launches_of

    @contextlib.contextmanager
    def launching(self, unit: int = 0, pack: int = 0, strip: int = 0) -> Any:
        """Fails unless the block launches the kernels so many times."""
        before = self.launches()
        yield
        launched = [now - then for now, then in zip(self.launches(), before, strict=True)]
        assert launched == [unit, pack, strip]

    def launches(self) -> list[int]:
        return [self._launches_of(kernel) for kernel in (UNIT, PACK, STRIP)]


@pytest.fixture(scope="module")
def host() -> Host:
    flags = [
        "-O1",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-fno-strict-aliasing",
        "-Wno-missing-field-initializers",
    ]
    headers = [pybind11.get_include(), *include_paths(), sysconfig.get_paths()["include"]]
    flags += [f"-isystem{folder}" for folder in headers] + [f"-I{KERNEL}", f"-I{SOURCES}"]
    (target,) = re.findall(r'^TORCH_TARGET_VERSION = "(\w+)"', (ROOT / "setup.py").read_text(), re.MULTILINE)
    flags += [f"-DTORCH_TARGET_VERSION={target}", f"-L{TORCH_LIB_PATH}", f"-Wl,-rpath,{TORCH_LIB_PATH}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_SM", "90")
        built = Host(str(compiled([SOURCES / "ops_on_host.cpp"], *flags, "-Wl,--no-as-needed", "-ltorch_cpu")))
        x, weights, program = Network((Unit(groups=1),)).arguments()
        built.ops.shuffle_network(x, weights, program)  # which asks for the card
    return built


@dataclass(frozen=True)
class HostUnit(Unit):
    ops: Any = None

    def native(self, tensors: list[Tensor]) -> Tensor:
        return getattr(self.ops, self.op)(*tensors, **self.options)


UNITS = [
    Unit(),
    Unit(stride=2, out_channels=36, conv2_relu=True, pool_count_include_pad=False),
    Unit(groups=4, in_channels=16, mid_channels=32, stride=2, shuffle_groups=2, shortcut_first=True, bias=False),
    Unit(groups=2, conv1_groups=1, in_channels=10, mid_channels=6, out_channels=8, stride=2, shortcut_relu=False),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", UNITS, ids=range(len(UNITS)))
@pytest.mark.parametrize("op", OPS)
def test_units(host: Host, op: str, unit: Unit, dtype: torch.dtype, layout: torch.memory_format) -> None:
    unit = HostUnit(**{**vars(replace(unit, op=op)), "ops": host.ops})
    by_strips = dtype.itemsize == 2 and op != "pointwise_shuffle_depthwise" and unit.in_channels % 8 == 0
    with host.launching(**({"pack": 1, "strip": 1} if by_strips else {"unit": 1})):
        assert_strides_of_layout(unit.check(unit.tensors(dtype, layout)), layout)
    x, *parameters = unit.tensors(dtype, layout)
    wider = x.new_zeros(*x.shape[:-1], x.shape[-1] + 3).contiguous(memory_format=layout)
    apart = wider[..., 3:].copy_(x)  # with gaps
    torch.testing.assert_close(unit.native([apart, *parameters]), unit.native([x, *parameters]), rtol=0, atol=0)
    with host.launching():
        assert unit.native([x[:0], *parameters]).shape[0] == 0


NETWORK = Network(
    (Unit(), Unit(stride=2, out_channels=36), Unit(in_channels=60, mid_channels=24)), batch=3, plane=(9, 7)
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_networks(host: Host, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x, weights, program = NETWORK.arguments(dtype, layout)
    by_strips = 2 if dtype.itemsize == 2 else 0  # not the last one: 60 is no multiple of 8
    with host.launching(unit=3 - by_strips, pack=by_strips, strip=by_strips):
        got = host.ops.shuffle_network(x, weights, program)
    exact = reference.shuffle_network(x.double(), weights.double(), program)
    assert_as_accurate(got, reference.shuffle_network(x, weights, program), exact)
    with host.launching(pack=by_strips):
        packed = host.ops.pack_network(x, weights, program)
    with host.launching(unit=3 - by_strips, strip=by_strips):
        ahead = host.ops.shuffle_network(x, weights, program, packed=packed)
    torch.testing.assert_close(ahead, got, rtol=0, atol=0)
    assert ahead.stride() == got.stride()
    with host.launching():
        assert host.ops.pack_network(x[:0], weights, program).numel() == 0


def test_what_is_no_networks_packed_weights_is_refused(host: Host) -> None:
    x, weights, program = NETWORK.arguments(torch.float16)
    packed = host.ops.pack_network(x, weights, program)
    for bad, says in (
        (packed[1:], r"shape \[\d+\], expected shape \[\d+\]"),
        (packed.float(), "dtype float32, expected x's, float16"),
        (torch.stack([packed, packed], 1)[:, 0], "gaps"),
        (torch.cat([packed[:1], packed])[1:], "an address 2 bytes behind a multiple of 16"),
    ):
        with pytest.raises(RuntimeError, match=f"packed: got .*{says}"):
            host.ops.shuffle_network(x, weights, program, packed=bad)
    with pytest.raises(RuntimeError, match="packed: got a tensor, expected None on the CPU"):
        torch.ops.shufflenet_ext.shuffle_network(x, weights, program, packed=packed)


class Card:
    """torch.cuda's part in packing ahead, which a test looks at."""

    def __init__(self) -> None:
        self.is_capturing, self.waits, self.device_waits = False, 0, 0

    def device(self, device: torch.device) -> Any:
        return contextlib.nullcontext()

    def is_current_stream_capturing(self) -> bool:
        return self.is_capturing

    def current_stream(self) -> Any:
        return SimpleNamespace(synchronize=self.wait)

    def wait(self) -> None:
        self.waits += 1

    def synchronize(self) -> None:
        self.device_waits += 1


@pytest.fixture
def card(host: Host, monkeypatch: pytest.MonkeyPatch) -> Card:
    """The ops for CUDA in the place of those of the CPU."""
    card = Card()
    for name in ("pack_network", "shuffle_network"):
        monkeypatch.setattr(torch.ops.shufflenet_ext, name, getattr(host.ops, name))
    for name in ("device", "is_current_stream_capturing", "current_stream", "synchronize"):
        monkeypatch.setattr(_packed.torch.cuda, name, getattr(card, name))
    return card


class OnCard(Tensor):
    """Says that it is on a card."""

    is_cuda = True


def units() -> tuple[Any, nn.Module]:
    """Two units as one op, and what they compute."""
    plain = nn.Sequential(*(randomize(se.ShuffleBottleneck(24, 24, 1, 3), seed) for seed in (1, 2))).half().eval()
    model = se.optimize_for_inference(plain).model
    return model, plain


def run(model: Any, x: Tensor, **settings: Any) -> Tensor:
    """A call as of a tensor on a card."""
    weights = model._buffers["weights"]
    packed = model.packed.of(x, weights, model.program, weights, settings)
    if packed is not None:
        settings["packed"] = packed
    return torch.ops.shufflenet_ext.shuffle_network(x, weights, model.program, **settings)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_packed_for_a_setting_of_tf32(host: Host, card: Card, layout: torch.memory_format) -> None:
    plain = nn.Sequential(*(randomize(se.ShuffleBottleneck(24, 24, 1, 3), seed) for seed in (1, 2))).eval()
    model, x = se.optimize_for_inference(plain).model, torch.randn(2, 24, 9, 7).contiguous(memory_format=layout)
    with host.launching(unit=2):
        exact = run(model, x)
    with host.launching(pack=2, strip=2):
        rounded = run(model, x, allow_tf32=True)
    with host.launching(strip=2):
        torch.testing.assert_close(run(model, x, allow_tf32=True), rounded, rtol=0, atol=0)
    with host.launching(unit=2):
        torch.testing.assert_close(run(model, x), exact, rtol=0, atol=0)
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=4e-3, atol=4e-3)


def test_weights_are_packed_once(host: Host, card: Card) -> None:
    model, plain = units()
    x = torch.randn(2, 24, 9, 7, dtype=torch.float16)
    with host.launching(pack=2, strip=2):
        first = run(model, x)
    assert card.waits == 1
    with host.launching(strip=4):
        torch.testing.assert_close(run(model, x), first, rtol=0, atol=0)
        run(model, torch.randn_like(x))
    assert card.waits == 1
    assert_as_accurate(first, plain(x), plain.double()(x.double()))
    for kind in (x[:1], x.contiguous(memory_format=torch.channels_last)):
        with host.launching(pack=2, strip=4):
            assert torch.equal(run(model, kind), first[: len(kind)])
            run(model, kind)


def packed_in(model: Any) -> list[Tensor]:
    return [entry.weights for entry in model.packed._packed.values()]


def test_changed_weights_are_packed_anew_into_the_same_memory(host: Host, card: Card) -> None:
    model, _ = units()
    x = torch.randn(2, 24, 9, 7, dtype=torch.float16)
    with torch.inference_mode():  # which must not make what is kept a tensor of its own kind
        run(model, x)
    (kept,) = packed_in(model)
    for change in (
        lambda: model.weights.mul_(0.5),
        lambda: setattr(model.weights, "data", model.weights * 2),
        lambda: model.load_state_dict({"weights": model.weights * 2}),
    ):
        change()
        expected = host.ops.shuffle_network(x, model.weights, model.program)
        with host.launching(pack=2, strip=2):
            assert torch.equal(run(model, x), expected)
        with host.launching(strip=2):
            assert torch.equal(run(model, x), expected)
        assert [each is kept for each in packed_in(model)] == [True]


def test_other_weights_are_packed_into_memory_of_their_own(host: Host, card: Card) -> None:
    model, _ = units()
    x = torch.randn(2, 24, 9, 7, dtype=torch.float16)
    first = run(model, x)
    before = packed_in(model)[0].clone()
    former = model.weights
    model.weights = former * 2
    expected = host.ops.shuffle_network(x, model.weights, model.program)
    assert torch.equal(run(model, x), expected)
    assert torch.equal(packed_in(model)[0], before)
    model.weights = former
    with host.launching(strip=2):
        assert torch.equal(run(model, x), first)
    for _ in range(_packed._MOST):  # the table is full at last, and forgets those that the module has no more
        model.weights = former.clone()
        with host.launching(pack=2, strip=4):
            run(model, x)
            run(model, x)
    assert card.device_waits == 1
    assert len(packed_in(model)) <= _packed._MOST


def test_threads_that_come_first_together_pack_once(host: Host, card: Card) -> None:
    model, _ = units()
    x = torch.randn(2, 24, 9, 7, dtype=torch.float16)
    got: list[Any] = []

    def ask() -> None:
        got.append(model.packed.of(x, model.weights, model.program, model.weights, {}))

    with host.launching(pack=2):
        with model.packed._lock:
            threads = [threading.Thread(target=ask) for _ in range(3)]
            for thread in threads:
                thread.start()
        for thread in threads:
            thread.join()
    assert len(got) == 3
    assert all(each is got[0] for each in got)


def test_where_nothing_is_packed_nothing_is_kept(host: Host, card: Card) -> None:
    model, _ = units()
    model.float()
    x = torch.randn(2, 24, 9, 7)
    with host.launching(unit=4):
        run(model, x)
        run(model, x)
    assert packed_in(model) == [None]


def test_captures_pack_for_themselves_what_was_not_packed_ahead(host: Host, card: Card) -> None:
    model, _ = units()
    x = torch.randn(2, 24, 9, 7, dtype=torch.float16)
    card.is_capturing = True
    with host.launching(pack=4, strip=4):
        run(model, x)
        run(model, x)
    assert card.waits == 0
    card.is_capturing = False
    run(model, x)
    card.is_capturing = True
    with host.launching(strip=2):
        run(model, x)
    model.weights.mul_(2)
    expected = host.ops.shuffle_network(x, model.weights, model.program)
    with host.launching(pack=2, strip=2):
        assert torch.equal(run(model, x), expected)


def test_a_bounded_number_of_shapes_is_kept(host: Host, card: Card) -> None:
    model, _ = units()
    for height in range(3, 3 + 2 * _packed._MOST):
        run(model, torch.randn(1, 24, height, 3, dtype=torch.float16))
    assert len(model.packed._packed) == _packed._MOST
    with host.launching(strip=2):
        run(model, torch.randn(1, 24, 3, 3, dtype=torch.float16))


def test_copies_keep_no_packed_weights(host: Host, card: Card) -> None:
    model, _ = units()
    x = torch.randn(2, 24, 9, 7, dtype=torch.float16)
    expected = run(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not twin.packed._packed
        assert torch.equal(run(twin, x), expected)
    assert "packed" not in "".join(model.state_dict())


def test_nothing_is_packed_where_somebody_looks_at_the_ops(
    host: Host, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = units()
    x = torch.randn(2, 24, 9, 7, dtype=torch.float16)
    asked = []

    def ask(x: Tensor) -> Tensor:
        asked.append(model.packed.of(x, model.weights, model.program, model.weights, {}))
        return x

    torch.func.vmap(ask)(x[None])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        ask(x)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        ask(x)
    torch.jit.trace(ask, (x,), check_trace=False)
    ask(x.as_subclass(OnCard))
    torch.compile(ask, backend="eager")(x)
    with torch.inference_mode():
        model.weights = model.weights.clone()
    ask(x)
    assert asked == [None] * 7
    model, _ = units()
    ask(x)
    assert asked[-1] is not None


def test_a_module_on_a_card_runs_by_packed_weights(host: Host, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_packed, "_is_traced", lambda *tensors: False)
    monkeypatch.setattr(_native, "uncovered", lambda *arguments: None)
    model, _ = units()
    x = torch.randn(2, 24, 9, 7, dtype=torch.float16)
    expected = host.ops.shuffle_network(x, model.weights, model.program)
    with host.launching(pack=2, strip=4):
        for _ in range(2):
            assert torch.equal(model(x.as_subclass(OnCard)), expected)
