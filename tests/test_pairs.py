"""The kernels on planes of pairs of bfloat16, fuzzed with dot products in plain C++, which every processor can run."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from compiled import CXX, compiled

NATIVE = Path(__file__).parent / "native"
SOURCES = [NATIVE / source for source in ("fuzz_kernels.cpp", "plain_pairs.cpp", "stand_in/dispatch.cpp")]
# As run_fuzz.sh has them.
FLAGS = ["-O1", "-Wno-unknown-pragmas", "-Wno-unknown-warning-option", "-Wno-psabi"]


@pytest.mark.skipif(
    shutil.which(CXX) is None or platform.system() != "Linux", reason="needs a C++ compiler, and memory pages of Linux"
)
def test_units_stems_heads_and_images_of_pairs() -> None:
    done = subprocess.run(
        [compiled(SOURCES, *FLAGS), "60"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout == "plain pairs: 60 units, stems, heads, images and passes of training on pairs\n"
