"""The time of each step of the paper's network with 3 groups, by the native op's own clock."""

import pytest

from benchmarks import profile


def bench_profile(profiled_batch: int, threads: int, request: pytest.FixtureRequest) -> None:
    request.node.user_properties.append(("profile", profile.measure(profiled_batch)))
