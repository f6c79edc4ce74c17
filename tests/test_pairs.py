"""The kernels on planes of pairs of bfloat16, fuzzed with dot products in plain C++, which every processor can run."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parent / "native"
SOURCES = ["fuzz_kernels.cpp", "plain_pairs.cpp", "stand_in/dispatch.cpp"]
CXX = os.environ.get("CXX", "c++").split()[0]
# As run_fuzz.sh has them.
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unknown-warning-option"]
FLAGS += ["-Wno-psabi"]


@pytest.mark.skipif(
    shutil.which(CXX) is None or platform.system() != "Linux", reason="needs a C++ compiler, and memory pages of Linux"
)
def test_units_stems_heads_and_images_of_pairs(tmp_path: Path) -> None:
    program = tmp_path / "fuzz_pairs"
    for command in ([CXX, *FLAGS, "-o", program, *(NATIVE / source for source in SOURCES)], [program, "60"]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
    assert done.stdout == "plain pairs: 60 units, stems, heads and images of pairs\n"
