"""Which backend and which ISA run, who decides, and what build_info says about it."""

import os
import re
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from support import (
    DTYPES,
    FORWARDING_ISAS,
    LAYOUTS,
    OPS,
    Network,
    Unit,
    assert_ran,
    assert_ran_reference,
    network_op,
    randomize,
    selected_isa,
)

import shufflenet_ext as se
from shufflenet_ext import _native

UNIT = Unit()
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def call(tensors=None):
    return se.ops.shuffle_bottleneck(*(tensors or UNIT.tensors()), **UNIT.options)


def test_each_backend_runs_what_it_says():
    for backend, check in (
        ("auto", assert_ran("shuffle_bottleneck")),
        ("native", assert_ran("shuffle_bottleneck")),
        ("reference", assert_ran_reference()),
    ):
        with se.use_backend(backend), check:
            call()


def test_context_nests_and_ends_with_an_exception():
    def fail():
        with se.use_backend("reference"):
            raise KeyError

    with se.use_backend("auto"):
        with se.use_backend("reference"), assert_ran_reference():
            call()
        with pytest.raises(KeyError):
            fail()
        with assert_ran("shuffle_bottleneck"):
            call()


def test_selects_for_every_thread():
    seen = []

    def record():
        with assert_ran_reference():
            seen.append(call())

    with se.use_backend("reference"):
        thread = threading.Thread(target=record)
        thread.start()
        thread.join()
    assert len(seen) == 1


@pytest.mark.parametrize("backend", ["fast", "", None, 3])
def test_bad_name(backend):
    with (
        pytest.raises(ValueError, match=r"backend: got .*, expected one of 'auto', 'native', 'reference'"),
        se.use_backend(backend),
    ):
        pass


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_uncovered_dtype_raises_under_native(dtype):
    tensors = [tensor.to(dtype) for tensor in UNIT.tensors()]
    with pytest.raises(RuntimeError, match=rf"'native' was asked for, but there is no native kernel for {dtype}"):
        call(tensors)
    with pytest.raises(RuntimeError, match=r"x: got dtype .*, expected float32, float64, bfloat16 or float16"):
        UNIT.native(tensors)


def test_integers_raise_under_every_backend():
    tensors = [tensor.int() for tensor in UNIT.tensors()]
    warnings.simplefilter("ignore", se.ReferenceFallbackWarning)
    for backend in ("auto", "native", "reference"):
        with se.use_backend(backend), pytest.raises((ValueError, RuntimeError), match=r"torch\.int32"):
            call(tensors)


def test_fallback_warns_once_of_each_cause():
    unit = randomize(se.FusedShuffleBottleneck(24, 24, 1, 3)).eval()
    handle = unit.conv1.register_forward_hook(lambda *args: None)
    x = torch.randn(1, 24, 5, 5)
    with se.use_backend("auto"):
        with pytest.warns(se.ReferenceFallbackWarning, match="hooks"), assert_ran_reference():
            unit(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with assert_ran_reference():
                unit(x)
            handle.remove()
            with assert_ran("shuffle_bottleneck_batch_norm"):
                unit(x)


def test_missing_library(monkeypatch):
    monkeypatch.setattr(_native, "native_error", "the native library is not loaded (test)")
    with pytest.raises(RuntimeError, match=r"'native' was asked for, but the native library is not loaded \(test\)"):
        call()
    with (
        se.use_backend("auto"),
        pytest.warns(se.ReferenceFallbackWarning, match=r"the native library is not loaded \(test\)"),
        assert_ran_reference(),
    ):
        call()


def test_build_info():
    info = se.build_info()
    assert list(info)[:7] == ["version", "torch", "compiler", "cpu_isa", "cpu_isas", "cuda_archs", "cuda_error"]
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", info["version"])
    assert info["torch"][:2] == "2."
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert info["cpu_isa"] in info["cpu_isas"]
    assert isinstance(info["cuda_archs"], list)
    assert (info["cuda_error"] is None) == bool(info["cuda_archs"])
    assert info["native_error"] is None


def test_selecting_an_isa():
    chosen = se.build_info()["cpu_isa"]
    usable = ", ".join(_native.cpu_isas())
    for isa in ("avx1024", "", "AVX2"):
        with pytest.raises(ValueError, match=rf"isa: got '{isa}', expected one that this processor has \({usable}\)"):
            _native.select_cpu_isa(isa)
    assert se.build_info()["cpu_isa"] == chosen
    with pytest.raises(TypeError):
        _native.select_cpu_isa(2)


def test_every_isa_runs_code_of_its_own():
    # Fused multiply-adds round once: the last bits tell them from x86-64's baseline, or the choice has no effect.
    unit = Unit(plane=(14, 14), in_channels=48, mid_channels=24)
    tensors = unit.tensors()
    results = {}
    for isa in _native.cpu_isas():
        with selected_isa(isa):
            results[isa] = unit.native(tensors)
    least, *others = results
    for isa in others:
        assert not torch.equal(results[isa], results[least]), isa


def forwarding_isas():
    return [isa for isa in FORWARDING_ISAS if isa in _native.cpu_isas()]


@pytest.mark.skipif(not forwarding_isas(), reason="this processor has no dot products of bfloat16")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_but_programs_in_bfloat16_are_avx512s(dtype, layout):
    # Bit for bit: what lets every other test leave these ISAs out. Sums of many products, in vectors and behind them.
    size = {"plane": (13, 17), "in_channels": 60, "mid_channels": 60}
    calls = [
        (unit, unit.tensors(dtype, layout))
        for stride in (1, 2)
        for op in OPS
        for unit in [Unit(op, stride=stride, **size)]
    ]
    network = Network((Unit(**size), Unit(stride=2, **size)), (60, 3, 2, 1, 1), (10, 0), in_channels=3, plane=(27, 35))
    arguments = network.arguments(dtype, layout)

    def results(isa):
        with selected_isa(isa):
            results = [unit.native(tensors) for unit, tensors in calls]
            return results if dtype == torch.bfloat16 else [*results, network_op(*arguments)]

    expected = results("avx512")
    for isa in forwarding_isas():
        for got, wanted in zip(results(isa), expected, strict=True):
            assert torch.equal(got, wanted), isa


def python(code, **environment):
    """Runs code in a new interpreter."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("SHUFFLENET_EXT_")} | environment
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


CALL = """
import sys, torch, shufflenet_ext as se
from support import Recorder, Unit
unit = Unit()
with Recorder() as recorder:
    se.ops.shuffle_bottleneck(*unit.tensors(), **unit.options)
print(se.build_info()["cpu_isa"], "shufflenet_ext::shuffle_bottleneck" in recorder.names)
"""


@pytest.mark.covering(1)  # a new interpreter takes seconds
@pytest.mark.parametrize(
    ("backend", "isa"),
    [*((backend, "") for backend in ("auto", "native", "reference")), *(("native", isa) for isa in _native.cpu_isas())],
)
def test_environment_chooses_the_backend_and_the_isa(backend, isa):
    result = python(CALL, SHUFFLENET_EXT_BACKEND=backend, SHUFFLENET_EXT_CPU_ISA=isa)
    ran_natively = str(backend != "reference")
    assert result.stdout.split() == [isa or _native.cpu_isas()[-1], ran_natively], result.stderr


def test_bad_backend_in_the_environment():
    result = python("import shufflenet_ext", SHUFFLENET_EXT_BACKEND="fast")
    assert result.returncode != 0
    assert "SHUFFLENET_EXT_BACKEND: got 'fast', expected one of 'auto', 'native', 'reference'" in result.stderr


def test_bad_isa_in_the_environment():
    # Another ISA is not what was asked for, so there is no native library: "auto" says so once, "native" raises.
    usable = ", ".join(_native.cpu_isas())
    message = f"SHUFFLENET_EXT_CPU_ISA: got 'mmx', expected one that this processor has ({usable})"
    for backend, code, returncode in (("auto", CALL + "print(se.build_info())", 0), ("native", CALL, 1)):
        result = python(code, SHUFFLENET_EXT_CPU_ISA="mmx", SHUFFLENET_EXT_BACKEND=backend)
        assert message in result.stderr
        assert result.returncode == returncode
