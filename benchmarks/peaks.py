"""What the machine can do at most, measured: multiply-adds a second, and bytes copied a second at a given size."""

import ctypes
import os
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

# 12 independent chains of vector multiply-adds: enough to hide the latency of two FMA units, and they fit 16 registers.
_SOURCE = """
#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif
typedef float vec __attribute__((vector_size(lanes * 4)));
extern "C" long flop_per_step() { return 2 * 12 * lanes; }
extern "C" float multiply_add(long steps, float seed) {
  vec sums[12];
  for (int i = 0; i < 12; ++i) sums[i] = vec{} + (seed + i);
  const vec scale = vec{} + 0.999f, shift = vec{} + 0.001f;
  for (long step = 0; step < steps; ++step)
    for (int i = 0; i < 12; ++i) sums[i] = sums[i] * scale + shift;
  float total = 0;
  for (int i = 0; i < 12; ++i) for (int lane = 0; lane < lanes; ++lane) total += sums[i][lane];
  return total;
}
"""
_STEPS = 1_000_000  # a few milliseconds: short enough for some of the runs to be undisturbed
_FMA_REPEATS, _COPY_REPEATS = 200, 12


def fma_peak(threads: int) -> float:
    """FLOP/s in float32 on so many threads: a native loop of FMA on registers, best of many runs."""
    with tempfile.TemporaryDirectory() as folder:
        library_path = Path(folder, "peak.so")
        command = [os.environ.get("CXX", "c++"), "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run([*command, "-x", "c++", "-", "-o", library_path], input=_SOURCE.encode(), check=True)
        library = ctypes.CDLL(str(library_path))
    library.multiply_add.argtypes = [ctypes.c_long, ctypes.c_float]
    library.multiply_add.restype = ctypes.c_float
    library.flop_per_step.restype = ctypes.c_long
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_FMA_REPEATS):
            start = time.perf_counter()
            for run in [pool.submit(library.multiply_add, _STEPS, i) for i in range(threads)]:
                run.result()
            best = min(best, time.perf_counter() - start)
    return threads * _STEPS * library.flop_per_step() / best


def copy_bandwidth(traffic: int) -> float:
    """Bytes a second, read and written, of a copy that moves about ``traffic`` bytes, by torch on its threads.

    A copy that fits a cache measures that cache, as a unit whose tensors fit it would: so it depends on the size.
    """
    return _copy_bandwidth(max(1, traffic.bit_length() - 1), torch.get_num_threads())


@cache
def _copy_bandwidth(log2_traffic: int, threads: int) -> float:  # torch's threads, as the cache has to tell them apart
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
