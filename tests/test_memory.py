"""No full-size intermediate tensor: peak memory of a large unit is its result and small buffers."""

import os
import subprocess
import sys

import pytest
from support import OPS

MEBIBYTE = 1 << 20
THREADS = 2
MOST_EXTRA = 2 * MEBIBYTE * THREADS

# The high-water mark counts every page that was ever touched, whoever allocated it; so a process of its own for each.
MEASURE = """
import re, sys
import torch
from support import Unit

def resident(which):  # in bytes; not getrusage, whose maximum a process inherits from the one that started it
    return int(re.search(which + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

backend, op, dtype, layout = sys.argv[1:]
dtype, layout = getattr(torch, dtype), getattr(torch, layout)
torch.set_num_threads({threads})
unit = Unit(op, batch=0, in_channels=240, mid_channels=60, plane=(28, 28))
small = Unit(op, batch=2, in_channels=6, mid_channels=6)
call = small.native if backend == "native" else small.reference
call(small.tensors(dtype, layout))  # code and threads are loaded

_, *weights = unit.tensors(dtype)  # not x: making it would take more memory than the call
x = torch.empty(64, 240, 28, 28, dtype=dtype, memory_format=layout)
for image in x:
    image.normal_()
before = resident("VmRSS")
result = (unit.native if backend == "native" else unit.reference)([x, *weights])
print(resident("VmHWM") - before, result.numel() * result.element_size())
"""


def peak_beyond_result(*arguments):
    code = MEASURE.format(threads=THREADS)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *arguments]
    extra, result = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()
    assert int(result) >= MOST_EXTRA, "an intermediate tensor as large as the result would not be seen"
    assert int(extra) >= int(result), "less than the result itself: nothing was measured"
    return int(extra) - int(result)


linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux_only
@pytest.mark.covering(1)  # a new interpreter takes seconds
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("op", OPS)
def test_extra_memory_is_at_most_2_mib_a_thread(op, dtype, layout):
    assert peak_beyond_result("native", op, dtype, layout) <= MOST_EXTRA


@linux_only
def test_the_measure_sees_the_references_intermediates():
    assert peak_beyond_result("reference", "shuffle_bottleneck", "float32", "contiguous_format") > 20 * MEBIBYTE
