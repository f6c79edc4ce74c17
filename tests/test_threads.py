"""Threads and processes: results bit for bit the same, calls at the same time, use after a fork."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support import DTYPES, LAYOUTS, Unit, randomize
from torch.utils.data import DataLoader, Dataset

import shufflenet_ext as se

RACES = Path(__file__).parent / "native" / "run_races.sh"
CXX = os.environ.get("CXX", "c++").split()[0]


@pytest.mark.skipif(
    shutil.which(CXX) is None or platform.system() != "Linux" or platform.machine() != "x86_64",
    reason="needs a C++ compiler with ThreadSanitizer, on x86-64 Linux",
)
def test_phases_wait_for_each_other():
    # Elsewhere a missing wait changes results only if a thread happens to be late.
    done = subprocess.run(["sh", RACES], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("batch", [1, 2, 16])
@pytest.mark.parametrize("plane", [(28, 28), (7, 7), (13, 1)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(isa, plane, batch, stride, dtype, layout):
    # The planes are cut into strips, or shared by channels, in other ways for each number.
    unit = Unit(batch=batch, plane=plane, stride=stride, in_channels=48, mid_channels=24)
    tensors = unit.tensors(dtype, layout)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(unit.native(tensors))
    for got in results[1:]:
        assert torch.equal(got, results[0])


@pytest.mark.parametrize("op", ["pointwise_shuffle_depthwise", "shuffle_bottleneck_batch_norm"])
@pytest.mark.parametrize("groups", [1, 3, 8])
def test_large_units_with_every_number_of_threads(op, groups):
    unit = Unit(op, groups=groups, batch=1, plane=(14, 14), in_channels=240, mid_channels=120)
    tensors = unit.tensors()
    torch.set_num_threads(1)
    expected = unit.check(tensors)
    for threads in range(2, 9):
        torch.set_num_threads(threads)
        assert torch.equal(unit.native(tensors), expected)


def test_calls_from_eight_threads_at_once():
    torch.set_num_threads(2)
    units = [Unit(groups=1 + i % 4, mid_channels=24, plane=(9 + i, 12), stride=1 + i % 2) for i in range(8)]
    given = [unit.tensors(DTYPES[i % 4], LAYOUTS[i // 4]) for i, unit in enumerate(units)]
    expected = [unit.native(tensors) for unit, tensors in zip(units, given, strict=True)]

    def work(i):
        return all(torch.equal(units[i].native(given[i]), expected[i]) for _ in range(25))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_one_module_used_from_eight_threads():
    torch.set_num_threads(2)
    unit = randomize(se.FusedShuffleBottleneck(240, 240, 1, 3)).eval()
    images = [torch.randn(1, 240, 14, 14) for _ in range(8)]
    with torch.no_grad():
        expected = [unit(x) for x in images]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda x: unit(x).detach(), images * 4))
    for got, wanted in zip(results, expected * 4, strict=True):
        assert torch.equal(got, wanted)


@pytest.fixture
def network():
    """A network for inference, and images, as many as it has results."""
    return se.optimize_for_inference(randomize(se.models.shufflenet_v1(3, 0.5))), torch.randn(8, 3, 96, 64)


def test_one_optimized_network_called_from_eight_threads(network):
    net, images = network
    torch.set_num_threads(2)
    batches = [images[:1], images[1:4], images[4:6], images]  # shared by the threads, one image each, or both
    expected = [net(x) for x in batches]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(net, batches * 16))
    for got, wanted in zip(results, expected * 16, strict=True):
        assert torch.equal(got, wanted)


def test_more_threads_than_cores(network):
    net, images = network
    expected = net(images[:1])
    torch.set_num_threads(4 * (os.cpu_count() or 1))
    for _ in range(10):
        assert torch.equal(net(images[:1]), expected)


def test_calls_from_the_inter_op_pool(network):
    net, images = network

    @torch.jit.script
    def fork(images: list[torch.Tensor], weights: torch.Tensor, program: list[int]):
        futures = [torch.jit.fork(torch.ops.shufflenet_ext.shuffle_network, x, weights, program) for x in images]
        return [torch.jit.wait(future) for future in futures]

    torch.set_num_threads(2)
    for got, x in zip(fork(list(images.split(1)), net.model.weights, net.model.program), images.split(1), strict=True):
        assert torch.equal(got, net(x))


def test_calls_inside_another_parallel_region(network):
    # OpenMP's own entry point starts the region in which each thread calls the op, whose own then has one thread.
    net, images = network
    torch.set_num_threads(2)
    expected = net(images[:1])
    with open("/proc/self/maps") as maps:
        libraries = {line.split()[-1] for line in maps if re.search(r"/lib[gi]omp[^/]*$", line)}
    if len(libraries) != 1 or "gomp" not in (library := libraries.pop()):
        pytest.skip("torch uses another OpenMP library than GCC's")
    results = []
    region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: results.append(net(images[:1])))
    ctypes.CDLL(library).GOMP_parallel(region, None, 3, 0)
    assert len(results) == 3
    assert all(torch.equal(got, expected) for got in results)


def test_autograd_from_a_thread_of_its_own():
    tensors = [tensor.requires_grad_() for tensor in Unit().tensors()]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: Unit().native(tensors).sum().backward()).result()
    assert all(tensor.grad is not None for tensor in tensors)


class Features(Dataset):
    def __init__(self, unit, images):
        self.unit, self.images = unit, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        with torch.no_grad():
            return self.unit(self.images[i : i + 1])[0]


def test_use_in_a_forked_worker_after_use_in_the_parent():
    unit = randomize(se.FusedShuffleBottleneck(48, 48, 1, 3)).eval()
    images = torch.randn(6, 48, 28, 28)
    torch.set_num_threads(2)
    with torch.no_grad():
        expected = unit(images)  # starts the parent's threads, which no child inherits
    loader = DataLoader(Features(unit, images), 2, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.cat(list(loader)), expected)
