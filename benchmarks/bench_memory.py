"""By how much a call lets resident memory grow, of ours and of each peer. This times nothing."""

import pytest

from benchmarks import memory


def bench_memory(resident: str, threads: int, request: pytest.FixtureRequest) -> None:
    request.node.user_properties.append(("memory", memory.measure(resident, threads)))
