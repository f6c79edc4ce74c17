"""Builds what a first contact needs, for one card, installing nothing: ``... build FOLDER driver|library ARCH|host``.

``driver`` is the torch-free driver; ``library`` the package, in a copy of its sources. Only the standard library is
imported.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.cuda_toolkit import KERNEL, ROOT

HOST = "host"  # in a card's place, for a rehearsal
PACKAGE = "package"  # the folder that the package is built in
_HERE = Path(__file__).parent
_INCLUDES = [f"-I{KERNEL}", f"-I{ROOT / 'tests' / 'cuda'}", f"-I{_HERE}"]
_CXX = [os.environ.get("CXX", "c++").split()[0], "-std=c++17"]


def _run(*command: object) -> None:
    print(shlex.join(map(str, command)), flush=True)
    subprocess.run([*map(str, command)], check=True)


def driver(folder: Path, arch: str) -> Path:
    """Compiles the driver: with nvcc the kernels and what launches them, or a host in their place. Returns its path."""
    program, objects = folder / "driver", folder / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    sources = [_HERE / "driver.cpp", _HERE / ("card_host.cpp" if arch == HOST else "card_cuda.cpp")]
    optimize = "-O0" if arch == HOST else "-O2"
    compile_cpp, link = [*_CXX, optimize], [*_CXX]
    if arch != HOST:
        nvcc = shutil.which("nvcc")
        assert nvcc is not None
        sources += sorted(path for path in KERNEL.glob("*.cu"))
        gpu = [f"-arch=sm_{arch.replace('.', '')}", f'-DSHUFFLENET_EXT_CUDA_ARCHS="{arch}"', "-std=c++17", "-O3"]
        compile_cu, link = [nvcc, *gpu], [nvcc]
        # Compiled by nvcc as well, as it knows where CUDA's headers are; it hands plain C++ on to the compiler.
        compile_cpp = [nvcc, "-std=c++17", optimize]

    def compiled(source: Path) -> Path:
        target = objects / f"{source.stem}.o"
        _run(*(compile_cu if source.suffix == ".cu" else compile_cpp), *_INCLUDES, "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        _run(*link, "-o", program, *pool.map(compiled, sources))
    return program


def library(folder: Path, arch: str) -> Path:
    """Builds the package in a copy of its sources, and returns the folder to import it from.

    pyproject.toml stays behind: older versions of setuptools than it asks for do not know its form, and setup.py has
    all that a build in place needs. What importlib.metadata asks for is written beside the copy.
    """
    copy = folder / PACKAGE
    copy.mkdir(exist_ok=True)
    for name in ("csrc", "shufflenet_ext"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "setup.py", copy)
    text = (ROOT / "pyproject.toml").read_text()
    name, version = (re.search(rf'^{key} = "(.+)"$', text, re.MULTILINE)[1] for key in ("name", "version"))  # type: ignore[index]
    metadata = copy / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if arch == HOST:
        os.environ["SHUFFLENET_EXT_REFERENCE_ONLY"] = "1"  # as compiling takes minutes
    else:
        os.environ |= {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arch, "MAX_JOBS": str(os.cpu_count())}
    os.chdir(copy)
    _run(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
    ask = "import json, torch, shufflenet_ext as se\nif torch.cuda.is_available(): torch.cuda.init()\n"
    _run(sys.executable, "-c", f"{ask}print(json.dumps(se.build_info()))")
    return copy


def main(folder: str, what: str, arch: str) -> int:
    """Returns an exit code; the last line of the output names what was built."""
    try:
        built = {"driver": driver, "library": library}[what](Path(folder).resolve(), arch)
    except subprocess.CalledProcessError as error:
        print(error)
        return 1
    print(json.dumps({"built": str(built)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
