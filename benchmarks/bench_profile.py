"""The time of each step of some networks, by the native op's own clock."""

import pytest

from benchmarks import profile
from benchmarks.shapes import NetworkShape


def bench_profile(profiled: NetworkShape, threads: int, request: pytest.FixtureRequest) -> None:
    request.node.user_properties.append(("profile", profile.measure(profiled)))
