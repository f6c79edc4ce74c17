"""What csrc/cuda/launch.cu asks of the CUDA runtime, and what it says where that fails: on a runtime of the test's own.

No GPU is needed, only a C++ compiler and the CUDA toolkit's headers.
"""

import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from compiled import CXX, compiled

from benchmarks.cuda_toolkit import KERNEL, ROOT
from shufflenet_ext import _native, build_info

SOURCES = ROOT / "tests" / "cuda"


def cuda_headers() -> Path | None:
    """Of the toolkit whose nvcc is on PATH."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    steps = subprocess.run([nvcc, "--dryrun", "unit.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", steps, re.MULTILINE)
    return Path(top[1], "include") if top else None


class Answer(NamedTuple):
    said: list[str]
    calls: list[str]


@pytest.fixture(scope="module")
def launch() -> Path:
    headers = cuda_headers()
    if headers is None or shutil.which(CXX) is None:
        pytest.skip("needs a C++ compiler and the CUDA toolkit's headers")
    flags = [f"-isystem{headers}", f"-I{KERNEL}", f"-I{SOURCES}", '-DSHUFFLENET_EXT_CUDA_ARCHS="8.0;9.0a;10.0+PTX"']
    return compiled([SOURCES / "launch_test.cpp"], *flags, "-pthread")


def ask(launch: Path, *arguments: str) -> Answer:
    done = subprocess.run([launch, *arguments], capture_output=True, text=True, check=True)
    said, _, calls = done.stdout.partition("calls:\n")
    return Answer(said.splitlines(), calls.splitlines())


# ---- What is left behind --------------------------------------------------------------------------------------------


def test_versions_initialise_nothing(launch: Path) -> None:
    answer = ask(launch, "versions")
    assert re.fullmatch(r"1\d0\d0 13000", answer.said[0])
    assert answer.calls == ["0: cudaDriverGetVersion"]


def test_properties_are_attributes_asked_once(launch: Path) -> None:
    answer = ask(launch, "properties")
    assert answer.said == ["90"]
    assert answer.calls == ["0: cudaDeviceGetAttribute of 1"] * 6


class Card(SimpleNamespace):
    """In the CUDA library's place; notes which cards it is asked about."""

    def __init__(self, driver: int, errors: list[str]) -> None:
        super().__init__(driver=driver, errors=errors, asked=[], cuda_version=13000, cuda_archs="9.0")

    def driver_version(self) -> int:
        return self.driver

    def device_error(self, index: int) -> str:
        self.asked.append(index)
        return self.errors[index]


@pytest.mark.parametrize(
    ("driver", "errors", "initialised", "asked", "expected"),
    [
        (13000, ["", ""], False, [], None),  # nothing that a fork behind it would suffer from
        (13000, ["other", "other"], False, [], None),
        (13000, ["other", ""], True, [0, 1], None),
        (13000, ["first", "second"], True, [0, 1], "first"),
        (12080, ["too old for ours"], False, [0], "too old for ours"),
        (12080, [""], False, [0], "torch finds no CUDA device: the driver is too old for a torch for CUDA 13.0"),
        (13000, [], False, [0], "no card"),
    ],
)
def test_cards_are_asked_once_torch_has_initialised_cuda(
    driver: int,
    errors: list[str],
    initialised: bool,
    asked: list[int],
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = Card(driver, errors or ["no card"])
    _native._device_error.cache_clear()
    monkeypatch.setattr(_native, "_C_cuda", card)
    monkeypatch.setattr(_native, "cuda_error", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(errors))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialised)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("initialises the driver"))
    error = build_info()["cuda_error"]
    _native._device_error.cache_clear()
    assert error == expected or (expected and error.startswith(expected))
    assert card.asked == asked


# ---- The device of a launch -----------------------------------------------------------------------------------------


def test_a_launch_for_another_device_on_a_fresh_thread(launch: Path) -> None:
    answer = ask(launch, "device", "0", "1")
    assert answer.said == ["then 0 is current", "context on 0", "context on 1"]
    assert answer.calls[:2] == ["0: cudaGetDevice", "0: cudaSetDevice 1"]
    assert "1: cudaLaunchKernel" in answer.calls
    assert answer.calls[-1] == "1: cudaSetDevice 0"


def test_a_device_that_had_no_context_has_none_behind_the_launch(launch: Path) -> None:
    answer = ask(launch, "device", "1")
    assert answer.said == ["then 1 is current", "context on 1"]
    assert "1: cudaLaunchKernel" in answer.calls


# ---- Loading a kernel -----------------------------------------------------------------------------------------------

FIRST = [
    "cudaThreadExchangeStreamCaptureMode",
    "cudaFuncGetAttributes",
    f"cudaFuncSetAttribute bytes {227 * 1024}",
    "cudaFuncSetAttribute carveout",
    "cudaThreadExchangeStreamCaptureMode",
    "cudaLaunchKernel",
]


def test_a_kernel_is_made_ready_once_a_device(launch: Path) -> None:
    answer = ask(launch, "launches")
    assert answer.said == []
    calls = [call for call in answer.calls if not re.search(r"cudaGetDevice|cudaDeviceGet|cudaSetDevice|Entry", call)]
    sections: list[list[str]] = []
    for call in calls:
        if ": " in call:
            sections[-1].append(re.sub(r"(carveout) \d+", r"\1", call.split(": ")[1]))
        else:
            sections.append([])
    only_carveout = [FIRST[0], *FIRST[3:]]
    assert sections == [FIRST, FIRST[-1:], FIRST, FIRST[-1:], only_carveout, FIRST]


def test_the_carveout_holds_the_blocks_that_the_planner_counts_on(launch: Path) -> None:
    plain, more = (
        [int(share) for share in re.findall(r"carveout (\d+)", "\n".join(ask(launch, *arguments).calls))]
        for arguments in (("capture",), ("launches",))
    )
    assert more[0] == more[1] == plain[0]
    assert plain[0] < more[2] <= 100
    # Two blocks of 4 KB more each, of 228 KB.
    assert more[2] - more[0] in (3, 4)


def test_a_first_launch_inside_of_a_capture(launch: Path) -> None:
    answer = ask(launch, "capture")
    assert answer.said == ["as strict as before"], "and no error"
    assert answer.calls[-1] == "0: cudaLaunchKernel"


def test_a_unit_by_strips_is_two_kernels(launch: Path) -> None:
    answer = ask(launch, "strips")
    assert answer.said == []
    assert answer.calls.count("0: cudaLaunchKernel") == 2 * 2
    assert answer.calls.count("0: cudaFuncGetAttributes") == 2, "each kernel is loaded once"


# ---- Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "error", "message"),
    [
        (0, "cudaErrorInsufficientDriver", r"there is no NVIDIA driver here; install one"),
        (12040, "cudaErrorInsufficientDriver", r"the driver is for CUDA 12\.4 and .* CUDA 1\d\.\d; update the driver"),
        (13000, "cudaErrorNoDevice", r"no CUDA device is visible; check CUDA_VISIBLE_DEVICES"),
        (13000, "cudaErrorUnknown", r"^cudaDeviceGetAttribute: \(unknown\)$"),
    ],
)
def test_an_error_names_its_remedy(launch: Path, driver: int, error: str, message: str) -> None:
    answer = ask(launch, "driver", str(driver), error)
    assert re.search(message, answer.said[0]), answer.said
    assert {call.split(": ")[1] for call in answer.calls} <= {"cudaDeviceGetAttribute of 0", "cudaDriverGetVersion"}


@pytest.mark.parametrize(
    ("capability", "runs"), [(75, False), (80, True), (86, True), (90, True), (100, True), (103, True), (120, True)]
)
def test_a_card_that_no_code_runs_on(launch: Path, capability: int, runs: bool) -> None:
    answer = ask(launch, "card", str(capability))
    expected = (
        "a card of compute capability 7.5: shufflenet_ext was built for 8.0;9.0a;10.0+PTX; rebuild it with "
        "TORCH_CUDA_ARCH_LIST naming this card's compute capability"
    )
    assert answer.said == ["" if runs else expected]
    assert all("cudaDeviceGetAttribute" in call for call in answer.calls), "none that makes a context"


@pytest.mark.parametrize("function", ["cudaFuncGetAttributes", "cudaFuncSetAttribute", "cudaLaunchKernel"])
def test_a_refused_launch_says_so_and_puts_the_device_back(launch: Path, function: str) -> None:
    what = {"cudaFuncGetAttributes": "loading the unit's kernel", "cudaLaunchKernel": "launch of the unit's kernel"}
    answer = ask(launch, "refused", function)
    remedy = "shufflenet_ext was built for 8.0;9.0a;10.0+PTX; rebuild it with TORCH_CUDA_ARCH_LIST naming this card's"
    assert answer.said[0].startswith(f"{what.get(function, function)}: (error): {remedy}")
    assert answer.said[1] == "then 1 is current"  # as device 0 has no context


def test_a_device_that_cannot_be_set(launch: Path) -> None:
    answer = ask(launch, "refused", "cudaSetDevice")
    assert answer.said[0].startswith("cudaSetDevice: (error)")
    assert answer.said[1] == "then 0 is current"
    assert not any("cudaLaunchKernel" in call for call in answer.calls)
