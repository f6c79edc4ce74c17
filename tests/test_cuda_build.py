"""How setup.py finds the CUDA toolkit, and what it builds for. No GPU is needed."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

from benchmarks.cuda_toolkit import ptx_arch

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


@pytest.mark.parametrize(
    ("known", "archs", "code"),
    [
        (
            "75 80 86 87 89 90 100 103 110 120 121",
            "7.5;8.0;8.6;8.9;9.0+PTX;10.0;12.0+PTX",
            "75:sm_75 80:sm_80 80:sm_86 80:sm_89 90:sm_90 90:compute_90 90:sm_100 120:sm_120 120:compute_120",
        ),
        ("75 80 86 89 90", "7.5;8.0;8.6;8.9;9.0+PTX", "75:sm_75 80:sm_80 80:sm_86 80:sm_89 90:sm_90 90:compute_90"),
        ("70 75 80 86", "7.5;8.0;8.6+PTX", "75:sm_75 80:sm_80 80:sm_86 86:compute_86"),
    ],
)
def test_default_architectures(
    setup: dict[str, Any], toolkit: Path, monkeypatch: pytest.MonkeyPatch, known: str, archs: str, code: str
) -> None:
    codes = " ".join(f"sm_{code}" for code in known.split())
    script(toolkit / "bin" / "nvcc", f"[ $1 = --list-gpu-code ] && printf '%s\\n' {codes}")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(toolkit))
    assert setup["default_cuda_archs"]() == archs
    made = [re.fullmatch(r"-gencode=arch=compute_(\d+),code=(\w+)", flag) for flag in setup["gencode_of"](archs)]
    assert " ".join(f"{one[1]}:{one[2]}" for one in made if one) == code


def test_code_is_made_of_the_ptx_that_tests_run(setup: dict[str, Any]) -> None:
    made_from = {arch: setup["CODE_FROM"].get(arch, arch) for arch in setup["DEFAULT_CUDA_ARCHS"]}
    numbers = {int(arch.replace(".", "")): int(virtual.replace(".", "")) for arch, virtual in made_from.items()}
    assert numbers == {arch: ptx_arch(arch) for arch in numbers}


def test_no_default_architecture_that_nvcc_knows(
    setup: dict[str, Any], toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(toolkit / "bin" / "nvcc", "echo sm_130")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(toolkit))
    with pytest.raises(RuntimeError, match=r"knows none of .* set TORCH_CUDA_ARCH_LIST"):
        setup["default_cuda_archs"]()
