"""The PTX that nvcc makes of the CUDA kernels, executed on the CPU by tests/cuda/ptx and compared with a naive unit.

Where test_cuda_host.py runs the kernels' source, here runs what a card is given: inline assembly, the order of its
operands, and what the compiler made of it all. Needs nvcc, and g++ on x86-64 Linux; no GPU.
"""

import itertools
import json
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from compiled import CXX, compiled
from test_cuda_host import MUTATIONS, SOURCES, Case, failures, paper_units, random_cases, run
from test_cuda_strips import STRIP_MUTATIONS, paper_strips, random_strips

from benchmarks import cuda_counts
from benchmarks.cuda_toolkit import KERNEL, LAYOUTS, PTX_FLAGS, build_planner, compile_ptx, nvcc, plans, ptx_arch

pytestmark = pytest.mark.skipif(
    shutil.which(CXX) is None or platform.system() != "Linux" or platform.machine() != "x86_64",
    reason="needs a C++ compiler on x86-64 Linux",
)
needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="needs nvcc (on PATH, or by CUDA_HOME)")


@pytest.mark.long  # takes half a minute to compile
def test_the_machine_executes_ptx_as_the_isa_says() -> None:
    program = compiled([SOURCES / "ptx_test.cpp"], "-O0", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing")
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d{4,} checks, 0 failed$", done.stdout, re.M), done.stdout


@pytest.fixture(scope="session")
def program() -> Path:
    """Runs units by their PTX; a case says which."""
    return compiled([SOURCES / "unit_test.cpp"], *PTX_FLAGS)


@pytest.fixture(scope="session")
def strip_program() -> Path:
    """The same by strips."""
    return compiled([SOURCES / "strip_test.cpp"], *PTX_FLAGS)


def with_ptx(cases: list[Case], kind: str = "unit") -> list[Case]:
    """The cases, each with the PTX of its dtype and architecture, which is compiled where it is not there yet."""

    def ptx_of(case: Case) -> tuple[str, int]:
        return f"{kind}_{case['dtype']}", ptx_arch(int(case["sm"]))

    wanted = sorted({ptx_of(case) for case in cases})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = dict(zip(wanted, pool.map(lambda ptx: compile_ptx(*ptx), wanted), strict=True))
    return [case | {"ptx": str(made[ptx_of(case)])} for case in cases]


@needs_nvcc
def test_a_few_units(program: Path) -> None:
    cases = [case | {"dtype": "float16", "sm": 90} for case in random_cases("mma", 1000, 16)]
    assert failures(program, with_ptx(cases)) == []


@needs_nvcc
@pytest.mark.long  # compiles PTX for a minute
@pytest.mark.parametrize("kind", ["mma", "wide"])
def test_units_of_all_kinds(program: Path, kind: str) -> None:
    assert failures(program, with_ptx(random_cases(kind, 1001, 120))) == []


@needs_nvcc
@pytest.mark.long
def test_units_of_the_paper(program: Path) -> None:
    dtypes = ("float16", "bfloat16", "float32", "tfloat32", "float64")
    cases = [
        unit | {"dtype": dtype, "layout": layout, "norm": 1, "sm": 90}
        for unit, (layout, dtype) in zip(
            paper_units(), itertools.cycle(itertools.product(("nhwc", "nchw"), dtypes)), strict=False
        )
    ]
    assert failures(program, with_ptx(cases)) == []


COUNTED = [(name, layout) for name in cuda_counts.paper_units(1) for layout in LAYOUTS]


@needs_nvcc
@pytest.mark.long
@pytest.mark.parametrize(("name", "layout"), COUNTED)
def test_counts_are_as_recorded(strip_program: Path, program: Path, name: str, layout: str) -> None:
    """What the kernels execute may grow by 5 % until it is recorded anew, by python -m benchmarks.cuda_counts."""
    unit = cuda_counts.paper_units(cuda_counts.BATCH)[name]
    case = unit.case(cuda_counts.DTYPE, layout, cuda_counts.SM)
    got = cuda_counts.summary(unit, cuda_counts.count({"strip": strip_program, "unit": program}, case))
    recorded = json.loads((cuda_counts.RESULTS / "cuda_counts.json").read_text())[f"{name}, {layout}"]
    assert got.keys() == recorded.keys()
    for key in ("instructions", "wavefronts_an_access", "loaded_of_x"):
        assert got[key] <= 1.05 * recorded[key], key
    assert got["stored_of_result"] == 1
    assert got["used_of_a_stored_sector"] >= 0.95 * recorded["used_of_a_stored_sector"]


@needs_nvcc
@pytest.mark.long
@pytest.mark.parametrize("name", ["stage 2 stride 1", "stage 3 stride 1"])
def test_eight_groups_take_at_most_twice_as_many_instructions(strip_program: Path, name: str) -> None:
    """For each multiply-add, of what three groups take."""
    recorded = json.loads((cuda_counts.RESULTS / "cuda_counts.json").read_text())[f"{name}, channels_last"]
    three, eight = (cuda_counts.paper_units(cuda_counts.BATCH, groups)[name] for groups in (3, 8))
    case = eight.case(cuda_counts.DTYPE, "channels_last", cuda_counts.SM)
    executed = sum(count.executed for count in cuda_counts.count({"strip": strip_program}, case).values())
    assert executed / eight.multiply_adds <= 2 * recorded["instructions"] / three.multiply_adds


@needs_nvcc
@pytest.mark.long
@pytest.mark.parametrize("sm", [80, 90])
def test_the_planner_predicts_what_strips_execute(strip_program: Path, tmp_path: Path, sm: int) -> None:
    planner = build_planner(tmp_path)
    units = cuda_counts.paper_units(2).items()
    for (name, unit), dtype, layout in itertools.product(units, ("float16", "tfloat32"), LAYOUTS):
        case = unit.case(dtype, layout, sm)
        (plan,) = plans(planner, [case])
        counted = sum(count.executed for count in cuda_counts.count({"strip": strip_program}, case).values())
        assert 0.8 < int(plan["strip_instructions"]) / counted < 1.2, (name, dtype, layout)


@needs_nvcc
def test_a_few_strips(strip_program: Path) -> None:
    cases = [case | {"dtype": dtype, "sm": 90} for dtype in ("float16", "tfloat32") for case in random_strips(1000, 12)]
    assert failures(strip_program, with_ptx(cases, "strip")) == []


@needs_nvcc
@pytest.mark.long
def test_strips_of_all_kinds(strip_program: Path) -> None:
    assert failures(strip_program, with_ptx(random_strips(1001, 180), "strip")) == []


@needs_nvcc
@pytest.mark.long
def test_units_of_the_paper_by_strips(strip_program: Path) -> None:
    assert failures(strip_program, with_ptx(paper_strips(), "strip")) == []


# Faults in inline assembly, which the source's host version has not; they are planted in the PTX itself. By name: the
# kind of kernel, what is replaced in all places, a pattern, and by what.
MMA = r"(mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32 \{[^}]*\}, )"
A = r"\{(%\w+), (%\w+), (%\w+), (%\w+)\}"
IN_PTX = {
    "registers of A swapped": ("unit", MMA + A, r"\1{\2, \4, \3, \5}"),
    "registers of B swapped": ("unit", MMA + r"(\{[^}]*\}), \{(%\w+), (%\w+)\}", r"\1\2, {\4, \3}"),
    "float16 taken for bfloat16": ("unit", r"f32\.f16\.f16\.f32", "f32.bf16.bf16.f32"),
    "matrices swapped": ("unit", r"(m8n8\.x4\.shared\.b16) " + A, r"\1 {\2, \4, \3, \5}"),
    "matrices transposed": ("unit", r"m8n8\.x4\.shared\.b16", "m8n8.x4.trans.shared.b16"),
    "a copy reads what is not there": ("unit", r"(cp\.async\.cg\.\S+ \S+ \S+ 16, )%\w+", r"\g<1>16"),
    "copies that are never committed": ("unit", r"cp\.async\.commit_group;", ""),
    "copies that nobody waits for": ("unit", r"cp\.async\.wait_group \d+;", ""),
    "matrices stored in the wrong order": (
        "strip",
        r"(stmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16 \S+) " + A,
        r"\1 {\3, \2, \4, \5}",
    ),
    "operands of planes not transposed": ("strip", r"m8n8\.x4\.trans\.shared\.b16", "m8n8.x4.shared.b16"),
    "copies of another size": ("strip", r"(cp\.async\.ca\.\S+ \S+ \S+) 8;", r"\1 4;"),
    "pairs stored in the wrong order": ("strip", r"(st\.global\.v2\.u32 \S+) \{(%\w+), (%\w+)\}", r"\1 {\3, \2}"),
    "the first product's registers of A swapped": (
        "strip",
        MMA + A + r"(, \{[^}]*\}, \{(%\w+), \7, \7, \7\})",
        r"\1{\2, \4, \3, \5}\6",
    ),
}
# Those of test_cuda_host.py and test_cuda_strips.py that are compiled here as well: the kind and the name.
IN_SOURCE = {
    "missing barrier": "unit",
    "missing barrier of a warp": "unit",
    "halo off by one": "unit",
    "one row too many": "unit",
    "swizzle of the copies alone": "strip",
    "a pixel behind the last one stored": "strip",
    "the pool takes the row below": "strip",
}
# Small cases of either kind. Of those by strips one has several tiles of conv1 a slice, one a pitch that is swizzled,
# one a pool, and some are of planes.
CASES: dict[str, list[Case]] = {
    "unit": [{"in": 24, "mid": 18, "out": 24, "h": 9, "w": 8, "tile_rows": rows} for rows in (9, 4)],
    "strip": [
        {"in": 48, "mid": 48, "out": 48, "g": 1, "g1": 1, "h": 9, "w": 8},
        {"in": 64, "mid": 16, "out": 64, "g": 1, "g1": 1, "h": 9, "w": 17},
        {"in": 40, "mid": 16, "out": 16, "g": 1, "g1": 1, "h": 9, "w": 16, "stride": 2, "rows": 2},
        {"in": 48, "mid": 48, "out": 48, "g": 1, "g1": 1, "h": 9, "w": 8, "rows": 3, "layout": "nchw"},
        {"in": 40, "mid": 16, "out": 16, "g": 1, "g1": 1, "h": 9, "w": 12, "stride": 2, "rows": 2, "layout": "nchw"},
    ],
}


@needs_nvcc
@pytest.mark.long
@pytest.mark.parametrize("name", IN_PTX)
def test_a_fault_planted_in_ptx_is_caught(program: Path, strip_program: Path, tmp_path: Path, name: str) -> None:
    kind, right, planted = IN_PTX[name]
    ptx, places = re.subn(right, planted, compile_ptx(f"{kind}_float16", 90).read_text())
    assert places, "the fault does not fit the kernels"
    (tmp_path / "faulty.ptx").write_text(ptx)
    assert_wrong({"unit": program, "strip": strip_program}[kind], tmp_path / "faulty.ptx", CASES[kind])


@pytest.fixture(scope="session")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The PTX of the kernels for channels_last with each fault of IN_SOURCE planted."""

    def compile_fault(name: str) -> Path:
        kind = IN_SOURCE[name]
        file, right, planted, *_ = {"unit": MUTATIONS, "strip": STRIP_MUTATIONS}[kind][name]
        sources = tmp_path_factory.mktemp("faulty") / "csrc"
        shutil.copytree(KERNEL.parent, sources, ignore=shutil.ignore_patterns("cpu"))
        kernel = sources / KERNEL.name
        (kernel / file).write_text((kernel / file).read_text().replace(right, planted))
        for instances in kernel.glob("*_instance.cuh"):  # one of the two layouts compiles in half of the time
            instances.write_text(instances.read_text().replace("Layout::contiguous>", "Layout::channels_last>"))
        return compile_ptx(f"{kind}_float16", 90, kernel)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(IN_SOURCE, pool.map(compile_fault, IN_SOURCE), strict=True))


@needs_nvcc
@pytest.mark.long  # compiles for a minute
@pytest.mark.parametrize("name", IN_SOURCE)
def test_a_fault_planted_in_the_source_is_caught(
    program: Path, strip_program: Path, faulty: dict[str, Path], name: str
) -> None:
    kind = IN_SOURCE[name]
    cases = [case for case in CASES[kind] if case.get("layout", "nhwc") == "nhwc"]
    assert_wrong({"unit": program, "strip": strip_program}[kind], faulty[name], cases)


def assert_wrong(program: Path, ptx: Path, cases: list[Case]) -> None:
    common: Case = {"dtype": "float16", "layout": "nhwc", "sm": 90, "ptx": str(ptx)}
    done = run(program, [common | case for case in cases])
    # A wrong result, or an error of the machine, which says where; not one of reading the PTX.
    assert re.search(r"^wrong |^failed: block \d+, warp \d+", done.stdout, re.M), done.stdout + done.stderr
