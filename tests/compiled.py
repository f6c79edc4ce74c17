"""C++ programs of the tests, kept in build/tests/ from one run of the tests to the next."""

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "build" / "tests"
CXX = os.environ.get("CXX", "c++").split()[0]
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror"]


def compiled(sources: Sequence[Path], *flags: str) -> Path:
    """Compiles a program, unless it was compiled before: its name says what the preprocessor makes of its sources."""
    command = [CXX, *FLAGS, *flags]
    key = hashlib.sha256(repr([command, _output(CXX, "--version")]).encode())
    for source in sources:
        key.update(_output(*command, "-E", "-P", str(source)).encode())
    FOLDER.mkdir(parents=True, exist_ok=True)
    program = FOLDER / f"{sources[0].stem}-{key.hexdigest()[:16]}"
    if not program.exists():
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:  # a program that is there is a whole one
            made = Path(folder) / "program"
            _output(*command, "-o", str(made), *map(str, sources))
            made.rename(program)
    return program


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
