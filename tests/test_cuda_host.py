"""The CUDA kernel's own source, run on the CPU by tests/cuda/host_device.h and compared with a naive unit in double.

No GPU and no CUDA toolkit is needed, only g++ on x86-64 Linux.
"""

import itertools
import math
import os
import platform
import random
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from compiled import CXX, compiled

from benchmarks.cuda_toolkit import KERNEL, ROOT, build_planner, plans

SOURCES = ROOT / "tests" / "cuda"
SANITIZE = ["-fno-strict-aliasing", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ARCHS = (75, 80, 86, 89, 90, 100, 120)

pytestmark = pytest.mark.skipif(
    shutil.which(CXX) is None or platform.system() != "Linux" or platform.machine() != "x86_64",
    reason="needs a C++ compiler on x86-64 Linux",
)

Case = dict[str, int | str]


def build(*flags: str, kernel: Path = KERNEL) -> Path:
    return compiled([SOURCES / "unit_test.cpp"], *flags, f"-I{kernel}", f"-I{SOURCES}")


def line(case: Case) -> str:
    return " ".join(f"{key}={value}" for key, value in case.items()) + "\n"


def run(program: Path, cases: list[Case]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program)], input="".join(map(line, cases)), capture_output=True, text=True)


def failures(program: Path, cases: list[Case]) -> list[str]:
    """What went wrong, by case. The cases are shared by as many processes as there are cores."""
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        found = pool.map(lambda core: failures_of_a_process(program, cases[core::cores]), range(min(cores, len(cases))))
        return [failure for failures in found for failure in failures]


def failures_of_a_process(program: Path, cases: list[Case]) -> list[str]:
    """What went wrong, by case; the harness ends the program at an access or a barrier that is not allowed."""
    done = run(program, cases)
    answers = done.stdout.splitlines()
    found = [
        f"{line(case)}: {answer}" for case, answer in zip(cases, answers, strict=False) if not answer.startswith("ok ")
    ]
    if len(answers) < len(cases):
        errors = [text for text in done.stderr.splitlines() if "doesn't fully support makecontext" not in text]
        found.append(f"{line(cases[len(answers)])}: ended with {done.returncode}\n" + "\n".join(errors[:40]))
    return found


@pytest.fixture(scope="session")
def programs() -> dict[str, Path]:
    """The kernel for 16-bit dtypes as compiled for sm_80 and newer and for sm_75, and for the others."""
    wanted = {
        "mma": ["-O1", *SANITIZE, "-DSHUFFLENET_TEST_DTYPE16"],
        "sm_75": ["-O1", *SANITIZE, "-DSHUFFLENET_TEST_DTYPE16", "-DSHUFFLENET_TEST_ARCH=75"],
        "wide": ["-O1", *SANITIZE],
    }
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        built = pool.map(lambda name: build(*wanted[name]), wanted)
        return dict(zip(wanted, built, strict=True))


DTYPES = {
    "mma": ("float16", "bfloat16"),
    "sm_75": ("float16", "bfloat16"),
    "wide": ("float32", "float64", "tfloat32"),
}


def random_cases(program: str, seed: int, count: int) -> list[Case]:
    """Units of all kinds, cut by the planner for some card, or at random."""
    rng = random.Random(seed)
    cases = []
    for i in range(count):
        groups = rng.choice([1, 2, 3, 4, 8])
        conv1_groups = rng.choice([1, groups, rng.choice([1, 2, 3])])
        both = math.lcm(groups, conv1_groups)
        stride = rng.choice([1, 2])
        case: Case = {
            "dtype": rng.choice(DTYPES[program]),
            "layout": rng.choice(["nchw", "nhwc"]),
            "n": rng.choice([1, 2, 3]),
            "in": conv1_groups * rng.choice([1, 3, 5, 8, 10, 16, 17, 24, 33, 40]),
            "h": rng.choice([1, 2, 3, 4, 5, 7, 8, 9, 11]),
            "w": rng.choice([1, 2, 3, 4, 6, 7, 8, 13, 16, 17]),
            "mid": both * rng.choice([1, 2, 3, 5, 8, 9]),
            "out": rng.choice([0, groups * rng.choice([1, 4, 7, 8, 65 if groups < 3 else 9])]),
            "g1": conv1_groups,
            "g": groups,
            "stride": stride,
            "relu": rng.randint(0, 1),
            "pad": rng.randint(0, 1),
            "first": rng.randint(0, 1),
            "shortcut_relu": rng.randint(0, 1),
            "norm": rng.randint(0, 2),
            "shift": rng.choice([0, 0, 0, 1, 4]),
            "seed": i,
            "sm": rng.choice(ARCHS),
        }
        if stride == 1 and case["out"]:
            case["in"] = case["out"] = both * rng.choice([1, 2, 3, 8, 11])
        if rng.random() < 0.4:
            case["sg"] = rng.choice([divisor for divisor in range(1, 25) if int(case["mid"]) % divisor == 0])
        out_height, out_width = (int(case["h"]) - 1) // stride + 1, (int(case["w"]) - 1) // stride + 1
        if rng.random() < 0.6:
            case["tile_rows"] = rng.randint(1, out_height)
            case["tile_columns"] = rng.choice([out_width, out_width, rng.randint(1, out_width)])
            case["slices"] = rng.randint(1, groups)
            case["tile_depth"] = 16 * rng.randint(1, 5)
            if rng.random() < 0.5:
                case["chunk"] = rng.randint(1, int(case["mid"]) // groups * int(case["slices"]))
        if rng.random() < 0.3:
            case["blocks"] = rng.randint(1, 3)  # fewer than there are windows: blocks go on to the next
        cases.append(case)
    return cases


@pytest.mark.parametrize("first", [0, *(pytest.param(first, marks=pytest.mark.long) for first in range(12, 60, 12))])
@pytest.mark.parametrize("program", DTYPES)
def test_units_of_all_kinds(programs: dict[str, Path], program: str, first: int) -> None:
    assert failures(programs[program], random_cases(program, 0, 60)[first : first + 12]) == []


@pytest.mark.parametrize("program", DTYPES)
def test_sizes_around_the_tiles(programs: dict[str, Path], program: str) -> None:
    # 16 pixels by 48 rows a tile of conv1, 80, 40 or 20 channels deep; 16 by 32 of conv3.
    edges: list[tuple[str, tuple[int, ...]]] = [
        ("w", (15, 16, 17, 33)),
        ("in", (15, 17, 32, 33, 79, 80, 81, 161)),
        ("out", (31, 32, 33, 65)),
    ]
    cases: list[Case] = [
        {"layout": layout, "dtype": dtype, "g": 1, "g1": 1, "h": 1, "w": 9, "in": 8, "mid": 5, "out": 4, "stride": 2}
        | {name: value}
        for layout in ("nchw", "nhwc")
        for dtype in DTYPES[program]
        for name, values in edges
        for value in values
    ]
    cases += [case | {"mid": mid, "g": 1} for case in cases[:2] for mid in (15, 16, 17, 47, 48, 49, 97)]
    assert failures(programs[program], cases) == []


@pytest.mark.parametrize("layout", ["nhwc", pytest.param("nchw", marks=pytest.mark.long)])
def test_a_stage_4_unit_of_the_paper(programs: dict[str, Path], layout: str) -> None:
    unit: Case = {"in": 960, "mid": 240, "out": 960, "h": 7, "w": 7, "layout": layout, "dtype": "float16", "norm": 1}
    assert failures(programs["mma"], [unit]) == []


def test_thread_order_does_not_matter(programs: dict[str, Path]) -> None:
    case: Case = {"dtype": "float16", "layout": "nhwc", "in": 48, "mid": 36, "out": 48, "h": 9, "w": 8}
    # The seed draws the inputs, too; equal answers for all seeds are not expected, right ones are.
    assert failures(programs["mma"], [case | {"seed": seed} for seed in range(12)]) == []


# By name: the file, what is replaced in it and by what, and how the harness must answer.
MUTATIONS = {
    "missing barrier": (
        "unit_kernel.cuh",
        "(staging, window, run_count).run();\n    barrier();\n",
        "(staging, window, run_count).run();\n",
        "race|never written",
    ),
    "missing barrier of a warp": (
        "unit_conv1.cuh",
        "        warp_barrier();  // all lanes see the tile",
        "        // all lanes see the tile",
        "race",
    ),
    "halo off by one": (
        "unit_window.cuh",
        "in_row(out_row * s.stride - 1)",
        "in_row(out_row * s.stride)",
        "wrong|outside|never written",
    ),
    "fragment of the wrong lane": (
        "unit_products.cuh",
        "8 * j + lane_index() % 4 * 2 + i % 2",
        "8 * j + lane_index() % 4 + i % 2 * 4",
        "wrong|never written",
    ),
    "fragment transposed": ("unit_products.cuh", "load_matrices<false, T>(a", "load_matrices<true, T>(a", "wrong"),
    "weights where elements are not": ("unit_conv3.cuh", "return kPlanes ? i : place(i);", "return i;", "wrong"),
    "copy not waited for": (
        "unit_conv1.cuh",
        "        wait_copies<0>();\n        warp_barrier();",
        "        wait_copies<1>();\n        warp_barrier();",
        "copy is filling|never written",
    ),
    "barrier that some threads skip": (
        "unit_kernel.cuh",
        "    barrier();  // all threads have finished reading what is overwritten now",
        "    if (thread_index() < 96) barrier();",
        "not all threads reach",
    ),
    "padding not cleared": ("unit_kernel.cuh", "      staging.clear_y2();", "", "never written"),
    "one row too many": (
        "unit_staging.cuh",
        "row < valid_rows ? depth",
        "row <= valid_rows ? depth",
        "heap-buffer-overflow|wrong",
    ),
    "index past shared memory": (
        "unit_conv1.cuh",
        "layout.tiles + static_cast<int64_t>(warp_index())",
        "layout.tiles + static_cast<int64_t>(warp_index() + 1)",
        "outside",
    ),
    "operand not rounded to TF32": ("unit_products.cuh", "        round_operands<T>(b);\n", "", "not rounded"),
}


@pytest.fixture(scope="session")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mutants")

    def build_mutant(name: str) -> Path:
        file, right, planted, symptoms = MUTATIONS[name]
        place = folder / name.replace(" ", "_") / "cuda"
        shutil.copytree(KERNEL, place, ignore=shutil.ignore_patterns("*.cpp", "*.cu"))
        shutil.copy(KERNEL.parent / "unit.h", place.parent)
        (place / file).write_text((place / file).read_text().replace(right, planted))
        flags = ["-O0"]
        if "heap-buffer-overflow" in symptoms:  # without AddressSanitizer it compiles in two thirds of the time
            flags.append("-fsanitize=address")
        if "TF32" not in name:
            flags.append("-DSHUFFLENET_TEST_DTYPE16")
        return build(*flags, kernel=place)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(MUTATIONS, pool.map(build_mutant, MUTATIONS), strict=True))


def test_the_bugs_to_plant_fit_the_kernel() -> None:
    found = {name: (KERNEL / file).read_text().count(right) for name, (file, right, *_) in MUTATIONS.items()}
    assert found == dict.fromkeys(MUTATIONS, 1)


@pytest.mark.long  # the mutants take a minute to build
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_bug_is_caught(mutants: dict[str, Path], name: str) -> None:
    dtype = "tfloat32" if "TF32" in name else "float16"
    case: Case = {"dtype": dtype, "layout": "nhwc", "in": 24, "mid": 18, "out": 24, "h": 9, "w": 8}
    done = run(mutants[name], [case | {"tile_rows": rows} for rows in (9, 4)])
    answer = done.stdout + done.stderr
    assert any(symptom in answer for symptom in MUTATIONS[name][3].split("|")), answer


# ---- The planner ----------------------------------------------------------------------------------------------------


def paper_units() -> list[Case]:
    """The units of the paper's networks; stride-2 ones with this project's and with the paper's mid channels."""
    stages = {1: (144, 288, 576), 2: (200, 400, 800), 3: (240, 480, 960), 4: (272, 544, 1088), 8: (384, 768, 1536)}
    units: list[Case] = []
    for groups, outputs in stages.items():
        for i, (channels, side) in enumerate(zip(outputs, (28, 14, 7), strict=True)):
            inputs = outputs[i - 1] if i else 24
            for mid in {(channels - inputs) // 4 // groups * groups, channels // 4 // groups * groups}:
                units.append(
                    {"in": inputs, "mid": mid, "out": channels - inputs, "h": 2 * side, "w": 2 * side, "stride": 2}
                    | {"g": groups, "g1": groups if i else 1}
                )
                if (channels - inputs) % groups:
                    units.pop()
            mid = channels // 4 // groups * groups
            units.append({"in": channels, "mid": mid, "out": channels, "h": side, "w": side, "g": groups, "g1": groups})
    return units


@pytest.fixture(scope="session")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_planner(tmp_path_factory.mktemp("planner"))


# The units (in, mid, out, g, layout) that sm_75, which has 64 KiB a block, cannot run in float64.
TOO_WIDE_IN_DOUBLES = {
    (288, 144, 288, 1, "nchw"),
    (288, 144, 288, 1, "nhwc"),
    (576, 144, 576, 1, "nchw"),
    (576, 144, 576, 1, "nhwc"),
    (800, 200, 800, 2, "nchw"),
}


@pytest.mark.parametrize("sm", ARCHS)
def test_every_unit_of_the_paper_has_a_plan(planner: Path, sm: int) -> None:
    cases = [
        unit | {"sm": sm, "dtype": dtype, "layout": layout, "n": batch}
        for unit, dtype, layout, batch in itertools.product(
            paper_units(), ("float16", "bfloat16", "float32", "float64", "tfloat32"), ("nchw", "nhwc"), (1, 64, 65536)
        )
    ]
    for case, plan in zip(cases, plans(planner, cases), strict=True):
        sizes = (case["in"], case["mid"], case["out"], case["g"], case["layout"])
        assert plan["ok"] == ((sm, case["dtype"]) != (75, "float64") or sizes not in TOO_WIDE_IN_DOUBLES), case
        if not plan["ok"]:
            continue
        assert int(plan["shared_bytes"]) <= int(plan["shared_per_block"])
        assert int(plan["blocks"]) >= 1
        out_height = (int(case["h"]) - 1) // int(case.get("stride", 1)) + 1
        assert 1 <= int(plan["tile_rows"]) <= out_height
        if case["dtype"] in ("float16", "bfloat16"):
            assert int(plan["tile_columns"]) == out_height, "whole rows fit"
            whole_slices = int(case["mid"]) // int(case["g"]) * int(plan["slices"])
            assert plan["chunk"] == whole_slices or int(plan["shared_per_block"]) < 200 * 1024
        tiles = math.ceil(out_height / int(plan["tile_rows"])) * math.ceil(out_height / int(plan["tile_columns"]))
        assert plan["windows"] == int(case["n"]) * tiles * math.ceil(int(case["g"]) / int(plan["slices"]))
        uses_mma = case["dtype"] == "float16" or (case["dtype"] in ("bfloat16", "tfloat32") and sm >= 80)
        assert ("tensor cores" in str(plan["explanation"])) == uses_mma
        if case["layout"] == "nhwc" and case["g"] == 3 and case.get("stride", 1) == 1:
            assert plan["x_vector"] == plan["conv1_vector"] == plan["result_vector"] == 16


def test_a_unit_that_cannot_be_planned_says_why(planner: Path) -> None:
    (plan,) = plans(planner, [{"in": 8, "mid": 100_000, "out": 8, "g": 1, "g1": 1, "dtype": "float64", "sm": 75}])
    assert plan["ok"] == 0
    assert "100000 intermediate channels" in str(plan["explanation"])
    assert "65536" in str(plan["explanation"])


def test_wide_and_deep_units_are_cut_smaller(planner: Path) -> None:
    wide: Case = {"in": 240, "mid": 60, "out": 240, "h": 64, "w": 4096, "sm": 90}
    deep: Case = {"in": 64, "mid": 1024, "out": 64, "h": 28, "w": 28, "g": 1, "g1": 1, "sm": 90, "dtype": "float16"}
    first, second = plans(planner, [wide, deep])
    assert first["ok"]
    assert int(first["tile_columns"]) < 4096
    assert second["ok"]
    assert int(second["chunk"]) < 1024
