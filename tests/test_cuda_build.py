"""How setup.py finds the CUDA toolkit, and what launch.cu says where CUDA does not work. No GPU is needed."""

import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines; nothing is built."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SHUFFLENET_EXT_REFERENCE_ONLY", "1")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("CUDA_HOME", "CUDA_PATH", "FORCE_CUDA"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path("setup.py")


def script(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A toolkit's folder, as far as setup.py looks into it; its nvcc is of CUDA 13.1."""
    home = tmp_path / "toolkit"
    nvcc = home / "bin" / "nvcc"
    version = "echo 'Cuda compilation tools, release 13.1, V13.1.5'"
    steps = f"echo '#$ TOP={home}/bin/..' >&2"
    script(nvcc, 'case "$1" in', f"  --version) {version} ;;", f"  --dryrun) {steps} ;;", "esac")
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    return home


def decide(setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch, guess: Path | None, path: Path) -> tuple[bool, str]:
    """setup.py's decision with torch for CUDA 13.0, where torch guesses the toolkit to be in `guess`."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None if guess is None else str(guess))
    monkeypatch.setenv("PATH", str(path), prepend=":")
    return setup["cuda_decision"]()


def test_the_toolkit_that_torch_finds(
    setup: dict[str, Any], toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = (True, f"toolkit {toolkit} of CUDA 13.1, torch for CUDA 13.0")
    assert decide(setup, monkeypatch, toolkit, toolkit / "bin") == expected


def test_an_nvcc_that_is_a_script_running_another(
    setup: dict[str, Any], toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "bin" / "nvcc", f'exec {toolkit}/bin/nvcc "$@"')
    expected = (True, f"toolkit {toolkit} of CUDA 13.1, torch for CUDA 13.0")
    assert decide(setup, monkeypatch, tmp_path, tmp_path / "bin") == expected
    assert str(toolkit) == cpp_extension.CUDA_HOME, "torch must look there too"


def test_an_explicit_folder_is_not_replaced(
    setup: dict[str, Any], toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    built, reason = decide(setup, monkeypatch, tmp_path, toolkit / "bin")
    assert not built
    assert reason == f"{tmp_path} holds no include/cuda_runtime.h: set CUDA_HOME to the toolkit's own folder"


def test_a_toolkit_of_another_major_version(
    setup: dict[str, Any], toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("13.1", "12.8"))
    built, reason = decide(setup, monkeypatch, toolkit, toolkit / "bin")
    assert not built
    assert reason.startswith(f"the toolkit {toolkit} is of CUDA 12.8 and torch for CUDA 13.0: set CUDA_HOME to")
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(RuntimeError, match=r"FORCE_CUDA=1, but the CUDA part cannot be built: .* is of CUDA 12\.8"):
        setup["cuda_decision"]()


# ---- What launch.cu says --------------------------------------------------------------------------------------------


def cuda_headers() -> Path | None:
    """Of the toolkit whose nvcc is on PATH."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    steps = subprocess.run([nvcc, "--dryrun", "unit.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", steps, re.MULTILINE)
    return Path(top[1], "include") if top else None


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program of launch.cu on a CUDA runtime that fails as it is told."""
    headers = cuda_headers()
    if headers is None or shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler and the CUDA toolkit's headers")
    program = tmp_path_factory.mktemp("messages") / "messages"
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-isystem{headers}", f"-I{ROOT / 'csrc' / 'cuda'}"]
    flags = ['-DSHUFFLENET_EXT_CUDA_ARCHS="8.0;9.0+PTX"', "-o", str(program)]
    source = ROOT / "tests" / "cuda" / "messages_test.cpp"
    subprocess.run([*command, *flags, str(source)], check=True)
    return program


@pytest.mark.parametrize(
    ("error", "driver", "message"),
    [
        ("cudaErrorInsufficientDriver", 0, r"there is no NVIDIA driver here; install one"),
        ("cudaErrorInsufficientDriver", 12040, r"the driver is for CUDA 12\.4 and .* CUDA 1\d\.\d; update the driver"),
        ("cudaErrorNoDevice", 13000, r"no CUDA device is visible; check CUDA_VISIBLE_DEVICES"),
        ("cudaErrorNoKernelImageForDevice", 13000, r"built for 8\.0;9\.0\+PTX; rebuild it with TORCH_CUDA_ARCH_LIST"),
        ("cudaErrorInvalidDeviceFunction", 13000, r"built for 8\.0;9\.0\+PTX; rebuild it with TORCH_CUDA_ARCH_LIST"),
        ("cudaErrorUnknown", 13000, r"^CUDA: \(cudaErrorUnknown\)$"),
        ("cudaSuccess", 13000, r"^$"),
    ],
)
def test_an_error_names_its_remedy(messages: Path, error: str, driver: int, message: str) -> None:
    done = subprocess.run([messages, error, str(driver)], capture_output=True, text=True, check=True)
    assert re.search(message, done.stdout), done.stdout
