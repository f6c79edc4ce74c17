"""The growth of resident memory by a call, of ours and each peer; nothing is timed."""

import pytest

from benchmarks import memory


def bench_memory(resident: str, threads: int, request: pytest.FixtureRequest) -> None:
    request.node.user_properties.append(("memory", memory.measure(resident, threads)))
