"""Which units run natively on CUDA, decided without a GPU: fake CUDA tensors, and se.explain.

Where no CUDA library is loaded a planner of the test's own takes its place; tests of the real one are skipped.
"""

import re
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import assert_ran, assert_ran_reference
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import shufflenet_ext as se
from shufflenet_ext import _native, reference
from shufflenet_ext._fused import foldable_unit
from shufflenet_ext.inference import InferenceUnits

ARCHS = (75, 80, 86, 89, 90, 100, 120)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CAUSE = r"no CUDA kernel can be planned for this unit \(sm_90: too many channels\)"
needs_library = pytest.mark.skipif(_native.cuda_error is not None, reason=f"{_native.cuda_error}")


class Planner(SimpleNamespace):
    """In the CUDA library's place, on a card that has room for `most` intermediate channels; notes what it is asked."""

    def __init__(self, most: int) -> None:
        super().__init__(most=most, asked=[])

    def device_error(self, index: int) -> str:
        return ""

    def plan(self, shape: Any, sizes: Any, channels_last: bool, dtype: str, index: int, sm: int | None) -> Any:
        if len(shape) != 4 or len(sizes) not in (8, 12):
            raise ValueError("sizes: these are no unit's")
        self.asked.append((tuple(shape), tuple(sizes)))
        batch, channels, height, width = shape
        stride = sizes[-2]
        rows = sizes[0] if len(sizes) == 8 else sizes[4] + (channels if stride == 2 else 0)
        result = (batch, rows, (height - 1) // stride + 1, (width - 1) // stride + 1)
        return {"ok": sizes[0] <= self.most, "explanation": "sm_90: too many channels", "result_shape": result}


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch) -> Iterator[Planner]:
    planner = Planner(most=12)
    monkeypatch.setattr(_native, "cuda_error", None)
    monkeypatch.setattr(_native, "_C_cuda", planner)
    caches = (_native._device_error, _native._plan_error)
    for cached in caches:
        cached.cache_clear()
    with FakeTensorMode():
        yield planner
    for cached in caches:
        cached.cache_clear()


def tensors(mid: int, *, batch: int = 2, device: str = "cuda") -> list[Tensor | None]:
    shapes = ((batch, 24, 5, 7), (mid, 8, 1, 1), None, (mid, 1, 3, 3), None, (24, mid // 3, 1, 1), None)
    return [None if shape is None else torch.empty(shape, device=device) for shape in shapes]


def call(*arguments: Tensor | None) -> Tensor:
    return se.ops.shuffle_bottleneck(*arguments, conv1_groups=3, groups=3)


def on_a_fake_card(module: torch.nn.Module) -> dict[str, Tensor]:
    with unset_fake_temporarily():
        state = module.state_dict()
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda") for name, tensor in state.items()}


def module(mid: int) -> tuple[se.FusedShuffleBottleneck, dict[str, Tensor]]:
    """A unit, and its state on a fake card, for functional_call."""
    with unset_fake_temporarily(), torch.device("meta"):
        unit = se.FusedShuffleBottleneck(24, 24, 1, 3, mid_channels=mid, conv1_groups=3).eval()
    return unit, on_a_fake_card(unit)


def test_a_unit_that_can_be_planned_runs_natively(planner: Planner) -> None:
    with assert_ran("shuffle_bottleneck"):
        assert call(*tensors(12)).device == torch.device("cuda:0")
    assert set(planner.asked) == {((2, 24, 5, 7), (12, 8, 1, 1, 24, 4, 1, 1, 3, 3, 1, 3))}
    with assert_ran("pointwise_shuffle_depthwise"):
        se.ops.pointwise_shuffle_depthwise(*tensors(12)[:5], conv1_groups=3, shuffle_groups=3)
    unit, state = module(12)
    with assert_ran("shuffle_bottleneck_batch_norm"):
        torch.func.functional_call(unit, state, tensors(12)[0])


def test_a_unit_in_general_runs_natively(planner: Planner) -> None:
    (x, *rest), variant = tensors(12), {"shuffle_groups": 4, "shortcut_first": True, "shortcut_relu": False}
    with assert_ran("shuffle_bottleneck"):
        got = se.ops.shuffle_bottleneck(x, *rest, conv1_groups=3, groups=3, stride=2, **variant)
    assert got.shape == (2, 48, 3, 4)
    with unset_fake_temporarily(), torch.device("meta"):
        unit = se.FusedShuffleBottleneck(24, 24, 2, 3, mid_channels=12, conv1_groups=3, **variant).eval()
    with assert_ran("shuffle_bottleneck_batch_norm"):
        torch.func.functional_call(unit, on_a_fake_card(unit), x)
    assert {sizes for _, sizes in planner.asked} == {(12, 8, 1, 1, 24, 4, 1, 1, 3, 3, 2, 4)}


def test_one_that_cannot_raises_under_native(planner: Planner) -> None:
    unit, state = module(15)
    x, *rest = tensors(15)
    for run in (
        lambda: call(x, *rest),
        lambda: se.ops.pointwise_shuffle_depthwise(x, *rest[:4], conv1_groups=3, shuffle_groups=3),
        lambda: torch.func.functional_call(unit, state, x),
    ):
        with pytest.raises(RuntimeError, match=f"'native' was asked for, but {CAUSE}"):
            run()


def test_under_auto_it_runs_the_reference_and_warns_once(planner: Planner) -> None:
    with se.use_backend("auto"):
        with pytest.warns(se.ReferenceFallbackWarning, match=CAUSE), assert_ran_reference():
            call(*tensors(15))
        asked = len(planner.asked)
        with assert_ran_reference():  # a second warning would be an error: see filterwarnings
            call(*tensors(15))
        assert len(planner.asked) == asked, "planned once"
        with assert_ran("shuffle_bottleneck"):
            call(*tensors(12))


def test_nothing_is_planned_on_the_cpu(planner: Planner) -> None:
    with assert_ran("shuffle_bottleneck"):
        call(*tensors(15, device="cpu"))
    assert planner.asked == []


def test_a_chain_is_planned_unit_by_unit(planner: Planner) -> None:
    with unset_fake_temporarily(), torch.device("meta"):
        units = torch.nn.Sequential(
            se.FusedShuffleBottleneck(24, 24, 2, 3, mid_channels=12, conv1_groups=3),
            se.FusedShuffleBottleneck(48, 48, 1, 3, mid_channels=15),
        )
        chain = InferenceUnits([(unit, foldable_unit(unit)) for unit in units], dtype=None)
    with pytest.raises(RuntimeError, match=CAUSE):
        torch.func.functional_call(chain, on_a_fake_card(chain), tensors(12)[0])
    assert dict.fromkeys(shape for shape, _ in planner.asked) == dict.fromkeys([(2, 24, 5, 7), (2, 48, 3, 4)])


def test_what_is_no_unit_is_left_to_the_ops_own_check(planner: Planner) -> None:
    x, conv1, *rest = tensors(12)
    for arguments in (
        (x, torch.empty(8, 1, 1, device="cuda"), *rest),
        (torch.empty(24, 5, 7, device="cuda"), conv1, *rest),
        (x, torch.empty(1, device="cuda"), *rest),
    ):
        with pytest.raises(ValueError, match=r"(conv1_weight|x): got shape"):
            call(*arguments)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("mid", [12, 15])
def test_torch_compile_decides_by_the_channels(planner: Planner, mid: int, dynamic: bool | None) -> None:
    graphs: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=backend, fullgraph=True, dynamic=dynamic)
    with se.use_backend("auto"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", se.ReferenceFallbackWarning)
        for batch in (2, 3, 5, 6):  # symbolic from the second on, at the latest
            assert compiled(*tensors(mid, batch=batch)).shape[0] == batch
    fallbacks = [w for w in caught if w.category is se.ReferenceFallbackWarning]
    assert len(fallbacks) == (mid != 12)
    assert len(graphs) <= 2
    for graph in graphs:
        assert ("shufflenet_ext.shuffle_bottleneck" in graph) == (mid == 12)
    assert {shape for shape, _ in planner.asked} == {(1, 24, 1, 1)}
    with se.use_backend("native"):
        torch._dynamo.reset()
        if mid == 12:
            torch.compile(call, backend=backend, fullgraph=True, dynamic=dynamic)(*tensors(mid))
        else:
            with pytest.raises(Exception, match="no CUDA kernel can be planned"):
                torch.compile(call, backend=backend, dynamic=dynamic)(*tensors(mid))


# ---- se.explain -----------------------------------------------------------------------------------------------------


def test_explain_on_the_cpu(isa: str) -> None:
    for unit in (se.FusedShuffleBottleneck(240, 240, 1, 3), se.ShuffleBottleneck(240, 240, 1, 3)):
        assert se.explain(unit, (2, 240, 7, 7)) == {
            "backend": "native",
            "explanation": f"one op on the CPU, by its {isa} kernel",
            "isa": isa,
        }


def documented_keys() -> set[str]:
    """The keys that explain's docstring promises, those of CUDA included."""
    text = str(se.explain.__doc__)
    return set(re.findall(r"``(\w+)``", text[text.index("Returns a dict with") : text.index("Raises")]))


CPU_KEYS = {"backend", "explanation", "isa"}


def test_explains_keys_on_the_cpu_are_documented() -> None:
    assert set(se.explain(se.FusedShuffleBottleneck(24, 24, 1, 3), (1, 24, 5, 5), device="cpu")) == CPU_KEYS
    assert documented_keys() > CPU_KEYS


@needs_library
def test_explains_keys_on_cuda_are_documented() -> None:
    answer = se.explain(se.FusedShuffleBottleneck(24, 24, 1, 3), (1, 24, 5, 5), sm=90)
    assert set(answer) | CPU_KEYS == documented_keys()


def test_explain_asks_the_planner_about_a_device(planner: Planner) -> None:
    for mid, backend in ((12, "native"), (15, "reference")):
        unit, _ = module(mid)
        answer = se.explain(unit, (2, 24, 5, 7), device="cuda:0")
        assert answer["backend"] == backend
        assert "too many channels" in answer["explanation"]
    assert (2, 24, 5, 7) in {shape for shape, _ in planner.asked}


def test_explain_says_why_the_reference_runs() -> None:
    unit = se.FusedShuffleBottleneck(24, 24, 1, 3)
    shape = (1, 24, 5, 5)
    assert se.explain(unit, shape, dtype=torch.int8) == {
        "backend": "reference",
        "explanation": "there is no native kernel for torch.int8",
    }
    unit.conv2.register_forward_hook(lambda *args: None)
    assert se.explain(unit, shape)["backend"] == "reference"
    assert "hooks" in se.explain(unit, shape)["explanation"]


@pytest.mark.skipif(torch.cuda.is_available() and _native.cuda_error is None, reason="CUDA works here")
def test_explain_where_cuda_does_not_run() -> None:
    answer = se.explain(se.FusedShuffleBottleneck(24, 24, 1, 3), (1, 24, 5, 5), device="cuda")
    assert answer["backend"] == "reference"
    assert "install" in answer["explanation"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"unit": torch.nn.Conv2d(1, 1, 1)}, TypeError, "unit: got Conv2d, expected a FusedShuffleBottleneck"),
        ({"shape": (1, 23, 5, 5)}, ValueError, r"shape: got \[1, 23, 5, 5\], expected \[batch, 24, height, width\]"),
        ({"shape": (24, 5, 5)}, ValueError, "shape: got"),
        ({"shape": (-1, 24, 5, 5)}, ValueError, "shape: got"),
        ({"shape": (1, 24, 0, 5)}, ValueError, "shape: got"),
        ({"shape": (1, 24, 5.0, 5)}, TypeError, "shape: got float, expected an int"),
        ({"dtype": "float16"}, TypeError, "dtype: got str, expected a torch.dtype"),
        ({"device": "meta"}, ValueError, "device: got 'meta'"),
        ({"memory_format": torch.preserve_format}, ValueError, "memory_format: got torch.preserve_format, expected"),
        ({"sm": "90"}, TypeError, "sm: got str, expected an int"),
        ({"sm": 90, "device": "cpu"}, ValueError, "sm: got 90 and device 'cpu', expected one of the two"),
    ],
)
def test_explain_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"unit": se.FusedShuffleBottleneck(24, 24, 1, 3), "shape": (1, 24, 5, 5)} | arguments
    with pytest.raises(error, match=message):
        se.explain(**given)


def test_explain_a_card_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "cuda_error", "this installation has none (test)")
    with pytest.raises(RuntimeError, match=r"sm: got 90, but .* planner: this installation has none \(test\)"):
        se.explain(se.FusedShuffleBottleneck(24, 24, 1, 3), (1, 24, 5, 5), sm=90)


def paper_units() -> list[tuple[se.ShuffleBottleneck, tuple[int, int, int]]]:
    """Each different unit of the paper's networks, with its input of 224 x 224 pixels."""
    found: dict[str, tuple[se.ShuffleBottleneck, tuple[int, int, int]]] = {}
    for groups in (1, 2, 3, 4, 8):
        with torch.device("meta"):
            network = se.models.shufflenet_v1(groups=groups)
        side = 56
        for unit in (*network.layer1, *network.layer2, *network.layer3):
            found.setdefault(f"{unit}", (unit, (unit.conv1.in_channels, side, side)))
            side //= unit.stride
    return list(found.values())


# in, mid and out channels of those that float64 makes too wide for sm_75, in one layout at least (which:
# tests/test_cuda_host.py).
TOO_WIDE_IN_DOUBLES = {(288, 144, 288), (576, 144, 576), (800, 200, 800)}


@needs_library
@pytest.mark.parametrize("sm", ARCHS)
def test_the_librarys_planner_has_a_plan_for_the_paper(sm: int) -> None:
    units = paper_units()
    assert len(units) == 30
    for unit, plane in units:
        for dtype in DTYPES:
            for memory_format in (torch.contiguous_format, torch.channels_last):
                for batch in (0, 1, 64):
                    shape = (batch, *plane)
                    plan = se.explain(unit, shape, dtype=dtype, sm=sm, memory_format=memory_format)
                    assert plan == se.explain(unit, shape, dtype=dtype, sm=sm, memory_format=memory_format)
                    channels = (unit.conv1.in_channels, unit.conv1.out_channels, unit.conv3.out_channels)
                    if (sm, dtype) == (75, torch.float64) and channels in TOO_WIDE_IN_DOUBLES:
                        assert plan["backend"] == "native" or "bytes of shared memory" in plan["explanation"]
                        continue
                    assert plan["backend"] == "native", (unit, plan)
                    assert f"sm_{sm}:" in plan["explanation"]
                    assert plan["result_shape"][1] == unit.conv3.out_channels + (unit.stride - 1) * plane[0]
                    assert plan["windows"] > 0 or batch == 0
                    assert 1 <= plan["tile_rows"] <= plan["result_shape"][2]


@needs_library
@pytest.mark.parametrize("sm", ARCHS)
def test_the_librarys_planner_says_why_it_has_none(sm: int) -> None:
    with torch.device("meta"):
        unit = se.FusedShuffleBottleneck(8, 8, 1, 1, mid_channels=200_000)
    # What torch.compile relies on: a larger plane or batch changes nothing.
    answers = [se.explain(unit, shape, sm=sm) for shape in ((1, 8, 1, 1), (1, 8, 5, 7), (64, 8, 28, 28))]
    for answer in answers:
        assert answer["backend"] == "reference"
        assert "200000 intermediate channels" in answer["explanation"]


@needs_library
def test_the_library_refuses_an_unknown_card() -> None:
    with pytest.raises(ValueError, match="sm: got 70, expected one of 75, 80, 86, 89, 90, 100, 120"):
        se.explain(se.FusedShuffleBottleneck(24, 24, 1, 3), (1, 24, 5, 5), sm=70)


@needs_library
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_driver_the_library_is_loaded_and_the_cpu_works() -> None:
    assert "driver" in se.build_info()["cuda_error"]
    assert se.build_info()["cuda_archs"]
    assert "there is no NVIDIA driver here; install one" in str(_native._device_error(0))
    x, *rest = (None if t is None else torch.randn(t.shape) for t in tensors(12, device="cpu"))
    with assert_ran("shuffle_bottleneck"):
        got = call(x, *rest)
    torch.testing.assert_close(got, reference.shuffle_bottleneck(x, *rest, conv1_groups=3, groups=3))
