"""The steps of the network that the paper has most results for, as the native op's own clock sees them."""

import pytest

from benchmarks import profile


def bench_profile(profiled_batch: int, threads: int, request: pytest.FixtureRequest) -> None:
    request.node.user_properties.append(("profile", profile.measure(profiled_batch)))
