"""Random units and near misses through fuse: none swapped that is no unit, none crashes, nearly every unit is taken.

python tests/fuzz_match.py [count] [first seed]: so many modules of ShuffleNet v1, and as many of v2.
"""

import copy
import sys
import warnings
from collections import Counter

import styles
import styles_v2
import torch

import shufflenet_ext as se
from shufflenet_ext._fused import FusedUnit, plain_unit, stage_tensors

VERSIONS = {1: styles, 2: styles_v2}


def check(seed: int, version: int = 1) -> tuple[str | None, bool]:
    """Fuses a random module, and compares it with a copy. Returns its near miss, if any, and whether it was swapped."""
    near_misses = VERSIONS[version].NEAR_MISSES
    near_miss = near_misses[seed // 2 % len(near_misses)] if seed % 2 else None
    style = VERSIONS[version].random_style(seed, near_miss)
    unit = VERSIONS[version].random_unit(style)
    twin = copy.deepcopy(unit)
    keys = list(unit.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fused = se.fuse(unit)
        swapped = isinstance(fused, FusedUnit)
        assert list(fused.state_dict()) == keys
        x = torch.randn(2, style.in_channels, 9, 8, dtype=torch.float64)
        with torch.no_grad(), se.use_backend("auto"):
            expected = twin(x.clone())
            torch.testing.assert_close(fused(x.clone()), expected, msg=lambda text: f"{style}: {text}")
            if swapped:
                got = plain_unit(x, fused.fused_unit, stage_tensors(fused, fused.fused_unit), training=False)
                torch.testing.assert_close(got, expected, msg=lambda text: f"{style}: {text}")
    assert not (swapped and near_miss), f"{style} is no unit, and was swapped"
    return near_miss, swapped


def main(count: int, first: int) -> None:
    for version, module in VERSIONS.items():
        swapped, true_units = 0, 0
        left = Counter()
        for seed in range(first, first + count):
            near_miss, taken = check(seed, version)
            if near_miss is None:
                true_units += 1
                swapped += taken
                if not taken:
                    left[str(module.random_style(seed))] += 1
        for style in left:
            print("left:", style)
        print(f"ShuffleNet v{version}: {count} modules, {true_units} of them units: {swapped} taken", flush=True)
        assert swapped >= 0.99 * true_units


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
