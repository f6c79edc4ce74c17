"""The strip kernel's own source, run on the CPU by tests/cuda/strip_test.cpp and compared with a naive unit in double.

As in test_cuda_host.py, only g++ on x86-64 Linux is needed.
"""

import itertools
import math
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from compiled import compiled
from test_cuda_host import SOURCES, Case, failures, paper_units, pytestmark, run  # noqa: F401  # pytestmark is pytest's

from benchmarks.cuda_toolkit import KERNEL


def build(*flags: str, kernel: Path = KERNEL) -> Path:
    flags = ("-O0", "-fno-strict-aliasing", *flags)
    return compiled([SOURCES / "strip_test.cpp"], *flags, f"-I{kernel}", f"-I{SOURCES}")


@pytest.fixture(scope="session")
def program() -> Path:
    return build("-g1", "-fsanitize=address")


def random_strips(seed: int, count: int) -> list[Case]:
    """Units that can be run by strips, cut by the planner or at random; some with Inf and NaN in x."""
    rng = random.Random(1000 + seed)
    cases = []
    for i in range(count):
        groups = rng.choice([1, 2, 3, 4, 8])
        conv1_groups = rng.choice([1, groups, groups, 2])
        both = math.lcm(groups, conv1_groups)
        channels = math.lcm(8, 4 * conv1_groups, groups) * rng.choice([1, 2, 3, 5])
        stride = rng.choice([1, 2])
        mid = both * rng.choice([1, 2, 3, 5, 8, 9, 17])
        case: Case = {
            "layout": rng.choice(["nhwc", "nchw"]),
            "dtype": rng.choice(["float16", "bfloat16", "tfloat32"]),
            "n": rng.choice([1, 1, 2]),
            "in": channels,
            "mid": mid,
            "out": channels if stride == 1 else math.lcm(4, groups) * rng.choice([1, 2, 3, 5, 9]),
            "h": rng.choice([1, 2, 3, 5, 7, 8]),
            "w": rng.choice([1, 2, 3, 7, 8, 13, 16, 17]),
            "g": groups,
            "g1": conv1_groups,
            "stride": stride,
            "relu": rng.randint(0, 1),
            "norm": rng.randint(0, 2),
            "wild": rng.choice([0, 0, 1, 4]),
            "seed": i,
            "sm": rng.choice([80, 86, 90]),
        }
        if rng.random() < 0.3:
            case["sg"] = rng.choice([divisor for divisor in range(1, 25) if mid % divisor == 0])
        if stride == 2:
            case |= {"pad": rng.randint(0, 1), "first": rng.randint(0, 1), "shortcut_relu": rng.randint(0, 1)}
        if rng.random() < 0.7:
            case["rows"] = rng.randint(1, (int(case["h"]) - 1) // stride + 1)
            case["slices"] = rng.choice([divisor for divisor in range(1, groups + 1) if groups % divisor == 0])
            most = 12 if case["layout"] == "nhwc" and case["sm"] == 90 else 8  # as most_strip_warps in strip.h
            case["warps"] = rng.choice([2, 4, 6, 8, most])
            case["gap"] = rng.choice([1, 8])
        cases.append(case)
    return cases


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 8))])
def test_strips_of_all_kinds(program: Path, seed: int) -> None:
    assert failures(program, random_strips(seed, 18)) == []


STRIP: Case = {"layout": "nhwc", "dtype": "float16", "in": 24, "mid": 18, "out": 24, "h": 5, "w": 7}


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_strips_around_the_tiles(program: Path, layout: str) -> None:
    # 16 pixels by 8 columns a tile, 32 pixels an item; 16 channels a half and 32 a step of conv1, and of conv3 two and
    # four blocks; up to six tiles of conv1 and five pairs of conv3 at a time.
    one: Case = STRIP | {"g": 1, "g1": 1, "h": 1, "w": 9, "in": 16, "out": 16, "mid": 5}
    edges = [one | {"w": width} for width in (15, 16, 17, 31, 32, 33, 65)]
    edges += [one | {"in": channels, "out": channels} for channels in (8, 24, 32, 40, 80, 88, 168)]
    edges += [one | {"mid": mid} for mid in (8, 9, 16, 17, 24, 25, 32, 33, 48, 49, 56, 97)]
    # The pool takes 16 pixels of the result and 16 channels at a time.
    two: Case = one | {"stride": 2, "out": 8, "h": 2, "pad": 0, "wild": 1}
    edges += [two | {"w": width} for width in (1, 2, 29, 30, 31, 32, 33, 34, 35, 66, 67)]
    edges += [two | {"in": channels} for channels in (8, 24, 40, 136)]
    assert failures(program, [edge | {"layout": layout} for edge in edges]) == []


def test_copies_of_planes(program: Path) -> None:
    # Units of 16, 8, 4 and 2 bytes, in strips and whole; runs of one unit, of as many as there are threads, and more;
    # planes that are taken together, and a number of planes that cannot be.
    planes: Case = {"layout": "nchw", "dtype": "float16", "g": 1, "g1": 1, "in": 32, "mid": 8, "out": 32, "wild": 1}
    sizes = [(1, 1), (7, 7), (3, 5), (5, 6), (6, 6), (4, 12), (3, 24), (1, 64), (1, 65), (2, 66), (1, 129), (3, 43)]
    cases = [planes | {"h": height, "w": width, "warps": 2} for height, width in sizes]
    cases += [case | {"rows": int(case["h"]) // 2} for case in cases if int(case["h"]) > 1]
    cases += [case | {"stride": 2, "rows": 1} for case in cases]
    cases += [case | {"in": 24, "out": 24} for case in cases]
    assert failures(program, [case | {"seed": i} for i, case in enumerate(cases)]) == []


def paper_strips() -> list[Case]:
    common: Case = {"norm": 1, "sm": 90, "wild": 2}
    dtypes = ("float16", "tfloat32")
    return [
        unit | common | {"layout": layout, "dtype": dtype}
        for unit, layout, dtype in itertools.product(paper_units(), ("nhwc", "nchw"), dtypes)
    ]


@pytest.mark.long
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8])
def test_units_of_the_paper_by_strips(program: Path, groups: int) -> None:
    cases = [case for case in paper_strips() if case["g"] == groups]
    for case in cases:
        case["h"] = min(int(case["h"]), 9)
    assert failures(program, cases) == []


TWO: Case = {"stride": 2, "h": 7, "rows": 2}
PLANES: Case = {"layout": "nchw"}
WIDE: Case = {"dtype": "tfloat32"}
SCATTERED: Case = {"g": 8, "g1": 8, "in": 64, "mid": 96, "out": 64}
# What each planted bug replaces in a file, and how the harness must answer; what the case has beside STRIP.
STRIP_MUTATIONS: dict[str, tuple[str, str, str, str, Case]] = {
    "y1 read before all of it is there": (
        "strip_kernel.cuh",
        "    conv1();\n    barrier();\n",
        "    conv1();\n",
        "race|never written",
        {},
    ),
    "x not waited for": ("strip_kernel.cuh", "    wait_copies<0>();\n", "", "is filling|never written", {}),
    "swizzle of the copies alone": (
        "strip_pixels.cuh",
        "base + layout.x_offset(least(pixel + lane % 16, last), (block + lane / 16) * kBlockBytes)",
        "base + least(pixel + lane % 16, last) * layout.x_pitch + (block + lane / 16) * kBlockBytes",
        "wrong",
        {"rows": 5},
    ),
    "y2 of the next pixels too early": (
        "strip_depthwise.cuh",
        "    warp_barrier();  // all lanes have finished reading what y2 was\n",
        "",
        "race",
        {"in": 168, "out": 168, "g": 1, "g1": 1, "h": 9, "w": 8, "rows": 9, "warps": 2},
    ),
    "a pixel behind the last one stored": (
        "strip_kernel.cuh",
        "if (pixel + kHalf * 8 >= pixels) return;",
        "if (pixel + kHalf * 8 > pixels) return;",
        "race|wrong|outside|never written",
        {"g": 1, "g1": 1},
    ),
    "a pixel behind the last one scattered": (
        "strip_kernel.cuh",
        "if (pixel + kEight * 8 >= pixels) return;",
        "if (pixel + kEight * 8 > pixels) return;",
        "race|wrong|outside|never written",
        SCATTERED,
    ),
    "rows above the image not cleared": (
        "strip_staging.cuh",
        "if (in_row < 0) clear_row",
        "if (in_row < -1) clear_row",
        "never written|wrong",
        {},
    ),
    "a row of the halo missing": (
        "strip_staging.cuh",
        "least(in_row + in_rows, s.height)",
        "least(in_row + in_rows - 1, s.height)",
        "wrong|never written",
        {"rows": 2},
    ),
    "matrices in the wrong order": (
        "strip_kernel.cuh",
        "{pairs[n][0], pairs[n][1], pairs[n + 1][0], pairs[n + 1][1]}",
        "{pairs[n][0], pairs[n + 1][0], pairs[n][1], pairs[n + 1][1]}",
        "wrong",
        {"mid": 48, "g": 1, "g1": 1, "h": 9, "w": 8, "rows": 9},  # whole items, which are stored by matrices
    ),
    "pixels right of the image not cleared": (
        "strip_shares.h",
        "clears_right(s.stride == 1 ? t.gap > 1 :",
        "clears_right(s.stride == 1 ? t.gap > 8 :",
        "never written|wrong",
        {"gap": 8},
    ),
    "a thread's share of the tables left out": (
        "strip_kernel.cuh",
        "this->write_places(thread - framing, threads - framing);",
        "this->write_places(thread, threads);",
        "never written",
        {},
    ),
    "tiles of a piece in one block": (
        "pack_kernel.cuh",
        "+ group * layout.piece_tiles + tile % layout.piece_tiles;",
        "+ group * layout.piece_tiles;",
        "race|never written",
        {"g": 2, "g1": 2, "mid": 64},
    ),
    "half a step of y2 left over": (
        "strip_depthwise.cuh",
        "if (packed.blocks % 2 != 0) clear_block",
        "if (packed.blocks % 2 == 0) clear_block",
        "never written",
        {},
    ),
    "NaN not looked for": (
        "strip_kernel.cuh",
        "warp_any(any != any)",
        "warp_any(any != any && lane < 0)",
        "wrong",
        {"wild": 2},
    ),
    "channels of other groups multiplied": (
        "strip_products.cuh",
        "static_cast<uint32_t>(channel) < static_cast<uint32_t>(depth)",
        "channel < depth + 1000",
        "wrong",
        {"g": 2, "g1": 2, "in": 40, "out": 40, "wild": 2},
    ),
    "odd places where even ones end": (
        "strip.h",
        "next_with_remainder(s.out_width + 1, 5, 8)",
        "s.out_width",
        "race|wrong",
        TWO | {"w": 9},
    ),
    "the middle tap of stride 2 a pixel further": (
        "strip_depthwise.cuh",
        "load_matrices<0>(a, corner[m] + middle_bytes);",
        "load_matrices<kBlockBytes>(a, corner[m] + middle_bytes);",
        "wrong|never written",
        TWO,
    ),
    "no pixel of zeros for the pool": (
        "strip_pixels.cuh",
        "    if (s.stride == 2) {\n      SHUFFLENET_NO_UNROLL\n      for (int block",
        "    if (false) {\n      SHUFFLENET_NO_UNROLL\n      for (int block",
        "never written",
        TWO,
    ),
    "the pool takes the row below": (
        "strip_pool.cuh",
        "row = 2 * out_row + block.in_row - block.image_row;",
        "row = 2 * out_row;",
        "wrong",
        TWO,
    ),
    "Inf of one pooled channel in others": (
        "strip_pool.cuh",
        "warp_any(any != any)",
        "warp_any(any != any && lane < 0)",
        "wrong",
        TWO | {"wild": 2},
    ),
    "a row of y1 missing in strips of stride 2": (
        "strip.h",
        "return (out - 1) * s.stride + 3;",
        "return (out - 1) * s.stride + 4 - s.stride;",
        "wrong|never written|outside",
        TWO,
    ),
    "pixels behind a plane's last one not cleared": (
        "strip_planes.cuh",
        "channel < s.in_channels && pixels < end_pixel",
        "channel < 0",
        "never written",
        PLANES,
    ),
    "results copied before all are there": (
        "strip_planes.cuh",
        "  SHUFFLENET_DEVICE void after_results() const {\n    barrier();\n",
        "  SHUFFLENET_DEVICE void after_results() const {\n",
        "race",
        PLANES,
    ),
    "pooled results copied before all are there": (
        "strip_planes.cuh",
        "      pool.run(pair, last);\n      barrier();\n",
        "      pool.run(pair, last);\n",
        "race|never written",
        PLANES | TWO | {"in": 48, "out": 48, "g": 1, "g1": 1},
    ),
    "y2 in the pooled results' place before they are copied": (
        "strip_planes.cuh",
        "                   base + layout.y2);\n      barrier();\n",
        "                   base + layout.y2);\n",
        "race",
        PLANES | TWO | {"in": 48, "out": 48, "g": 1, "g1": 1},
    ),
    "Inf of one pooled pixel in others": (
        "strip_plane_pool.cuh",
        "if (warp_any(any != any)) sum_by_pixels",
        "if (warp_any(any != any && lane < 0)) sum_by_pixels",
        "wrong",
        PLANES | TWO | {"wild": 2},
    ),
    "pairs of pixels that are no words": (
        "strip_planes.cuh",
        "return -(first_pixel_of_result() % 2);",
        "return 0;",
        "aligned",
        PLANES | {"rows": 2},
    ),
    "planes copied by too large a unit": (
        "strip.h",
        "for (int row = 0; row < s.out_height; row += t.rows) {",
        "for (int row = 0; row < 0; row += t.rows) {",
        "aligned|wrong|never written",
        PLANES | {"h": 8, "rows": 2, "w": 6},
    ),
    "the last planes not copied": (
        "strip_planes.cuh",
        "ceil_div(runs.planes - plane, step)",
        "ceil_div(runs.planes - 1 - plane, step)",
        "never written|wrong",
        PLANES,
    ),
    "the constants of the neighbouring channel": (
        "pack_kernel.cuh",
        "conv3_channel(slice, tile / 2 * 2 + odd, i % 8)",
        "conv3_channel(slice, tile / 2 * 2 + odd, i % 8 ^ 1)",
        "wrong",
        PLANES | {"norm": 1},
    ),
    "the pool's left column where there is none": (
        "strip_plane_pool.cuh",
        "return most(0, 2 * column - 1);",
        "return 2 * column - 1;",
        "wrong|outside|never written",
        PLANES | TWO | {"w": 6},
    ),
    "slots of y2 in their own order": (
        "pack_kernel.cuh",
        "kIsWide<T> ? row / 8 * 8 + row % 4 * 2 + row % 8 / 4 : row",
        "row",
        "wrong",
        WIDE,
    ),
    "operands of x not rounded": (
        "strip_products.cuh",
        "    load_matrices<kHalf * kToNext>(a, row[m]);\n    round_operands<T>(a);\n",
        "    load_matrices<kHalf * kToNext>(a, row[m]);\n",
        "not rounded",
        WIDE,
    ),
    "NaN of other groups in an empty slot": (
        "strip_depthwise.cuh",
        "if (is_empty(scales.values[0])) pair.low = 0;",
        "if (lane < 0) pair.low = 0;",
        "wrong",
        WIDE | {"g": 2, "g1": 2, "in": 40, "out": 40, "mid": 20, "wild": 2},
    ),
    "two taps in each other's places": (
        "pack_kernel.cuh",
        "tap = 2 * fifth + w / 2",
        "tap = 2 * fifth + (w / 2 ^ 1)",
        "wrong",
        WIDE,
    ),
    "a pixel that is not pooled": (
        "strip_pool.cuh",
        "find_taps(taps, pixel, pair * kPairBytes<T> + lane % 4 * kBlockBytes);",
        "find_taps(taps, pixel + 1, pair * kPairBytes<T> + lane % 4 * kBlockBytes);",
        "wrong",
        WIDE | TWO,
    ),
    "eight pixels behind the last ones": (
        "strip_planes.cuh",
        "pixel + m * kTilePixels + 8 < image_rows * s.width",
        "pixel >= 0",
        "never written|race|wrong|outside",
        WIDE | PLANES | {"g": 1, "g1": 1},
    ),
    "a pixel of the row above pooled": (
        "strip_plane_pool.cuh",
        "const bool has_left = column > 0,",
        "const bool has_left = true,",
        "wrong|never written|outside",
        WIDE | PLANES | TWO,
    ),
    "channels side by side pooled twice": (
        "strip_plane_pool.cuh",
        "mine + in_turn, behind, side_by_side);",
        "mine + in_turn, behind, 1);",
        "race",
        WIDE | PLANES | TWO,
    ),
    "empty columns that share a slot": (
        "pack_kernel.cuh",
        "= -1 - empty++;",
        "= -1 - empty;",
        "race|never written",
        SCATTERED,
    ),
    "the columns of a pair in each other's slots": (
        "strip_kernel.cuh",
        "store_element(to[n][1] + place, element_of<T>(pair, 1));",
        "store_element(to[n][1] + place, element_of<T>(pair, 0));",
        "wrong",
        SCATTERED,
    ),
    "blocks turned on one side only": (
        "strip.h",
        "(slot + (kColumns - 2) * block) % kColumns;",
        "(slot + kColumns * block) % kColumns;",
        "wrong",
        SCATTERED,
    ),
    "taps in the wrong order": (
        "pack_kernel.cuh",
        "word < 6 ? word / 2 + word % 2 * 3 : word",
        "word",
        "wrong",
        {},
    ),
}


@pytest.fixture(scope="session")
def strip_mutants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("strip_mutants")

    def build_mutant(name: str) -> Path:
        file, right, planted, _, case = STRIP_MUTATIONS[name]
        place = folder / name.replace(" ", "_") / "cuda"
        shutil.copytree(KERNEL, place, ignore=shutil.ignore_patterns("*.cpp", "*.cu"))
        shutil.copy(KERNEL.parent / "unit.h", place.parent)
        (place / file).write_text((place / file).read_text().replace(right, planted))
        layout = "contiguous" if case.get("layout") == "nchw" else "channels_last"
        element = "TFloat32" if case.get("dtype") == "tfloat32" else "Float16"
        return build(f"-DSHUFFLENET_TEST_LAYOUT={layout}", f"-DSHUFFLENET_TEST_TYPE={element}", kernel=place)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(STRIP_MUTATIONS, pool.map(build_mutant, STRIP_MUTATIONS), strict=True))


def test_the_bugs_to_plant_fit_the_strips() -> None:
    found = {name: (KERNEL / file).read_text().count(right) for name, (file, right, *_) in STRIP_MUTATIONS.items()}
    assert found == dict.fromkeys(STRIP_MUTATIONS, 1)


@pytest.mark.long  # as below
@pytest.mark.parametrize("name", STRIP_MUTATIONS)
def test_a_bug_planted_in_strips_is_caught(strip_mutants: dict[str, Path], name: str) -> None:
    *_, symptoms, others = STRIP_MUTATIONS[name]
    done = run(strip_mutants[name], [STRIP | others | {"seed": seed} for seed in range(4)])
    answer = done.stdout + done.stderr
    assert any(symptom in answer for symptom in symptoms.split("|")), answer
