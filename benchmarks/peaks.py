"""What the machine can do at most, measured: multiply-adds a second, and bytes copied a second at a given size."""

import time
from functools import cache

import torch

from shufflenet_ext import _native

_COPY_REPEATS = 12


def fma_peak(threads: int) -> float:
    """FLOP/s in float32 of so many threads, which run a native loop of FMA on registers: the best of many runs."""
    torch.set_num_threads(threads)
    return _native.measure_peak(torch.float32)


def copy_bandwidth(traffic: int) -> float:
    """Bytes a second, read and written, of a copy that moves about ``traffic`` bytes, by torch on its threads.

    It depends on the size: a copy that fits into a cache is as fast as that cache, as is a unit that fits into it.
    """
    return _copy_bandwidth(max(1, traffic.bit_length() - 1), torch.get_num_threads())


@cache
def _copy_bandwidth(log2_traffic: int, threads: int) -> float:  # threads are an argument for the cache's sake
    source = torch.zeros(2**log2_traffic // 8 or 1)
    target = torch.empty_like(source)
    calls = max(1, 2**27 // 2**log2_traffic)
    best = float("inf")
    for _ in range(_COPY_REPEATS):
        start = time.perf_counter()
        for _ in range(calls):
            target.copy_(source)
        best = min(best, (time.perf_counter() - start) / calls)
    return 2 * source.nbytes / best
