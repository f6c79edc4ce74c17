"""What the tests share: units with random arguments, the measure of accuracy, and a record of what ran."""

import itertools
import math
import multiprocessing
import pickle
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode

import shufflenet_ext as se
from shufflenet_ext import _native, reference

OPS = ("pointwise_shuffle_depthwise", "shuffle_bottleneck", "shuffle_bottleneck_batch_norm")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
network_op = torch.ops.shufflenet_ext.shuffle_network

# These instruction sets have kernels of their own for programs in bfloat16 alone and leave all else to AVX-512's:
# test_backend.py shows that they do, so no other test repeats AVX-512's results under their names.
FORWARDING_ISAS = ("avx512_bf16", "amx")
ISAS = [isa for isa in _native.cpu_isas() if isa not in FORWARDING_ISAS]
each_isa_for_bfloat16 = pytest.mark.parametrize("isa", _native.cpu_isas(), indirect=True)
VECTOR_BYTES = {"baseline": 16, "neon": 16, "avx2": 32, "avx512": 64}


@contextmanager
def selected_isa(isa: str) -> Iterator[None]:
    """Runs the block with the kernels of one of the CPU's instruction sets."""
    previous = _native.cpu_isa()
    _native.select_cpu_isa(isa)
    assert _native.cpu_isa() == isa
    try:
        yield
    finally:
        _native.select_cpu_isa(previous)


def sizes_at_the_tile(isa: str, dtype: torch.dtype) -> list[int]:
    """One less than a vector of the ISA holds, as many and one more; the same for three vectors, the largest tile."""
    lanes = VECTOR_BYTES[isa] // (8 if dtype == torch.float64 else 4)  # sums of all dtypes but float64 are float32
    return [size for tile in (lanes, 3 * lanes) for size in (tile - 1, tile, tile + 1)]


def covering(cases: Sequence[Sequence[Hashable]], axes: int) -> set[int]:
    """Indices of cases that have, together, every combination of values of so many axes that any of the cases has.

    Each case is its value on every axis. The choice is greedy: always the first case with the most combinations that
    are still missing.
    """
    combinations = [set(itertools.combinations(enumerate(case), min(axes, len(case)))) for case in cases]
    missing = set().union(*combinations)
    chosen = set()
    for most in range(max(map(len, combinations), default=0), 0, -1):
        for i, combination in enumerate(combinations):
            if len(combination & missing) >= most:
                missing -= combination
                chosen.add(i)
    return chosen


@dataclass(frozen=True)
class Unit:
    """A call of one op. Every row of a convolution has channels of its own, so that no two can be mixed up."""

    op: str = "shuffle_bottleneck"
    groups: int = 3
    conv1_groups: int | None = None  # groups
    in_channels: int = 24
    mid_channels: int = 12
    out_channels: int | None = None  # in_channels
    batch: int = 2
    plane: tuple[int, int] = (5, 7)
    stride: int = 1
    conv2_relu: bool = False
    pool_count_include_pad: bool = True
    shuffle_groups: int | None = None  # groups
    shortcut_first: bool = False
    shortcut_relu: bool = True
    bias: bool = True
    affine: bool = True  # whether batch norms have weights and biases

    @property
    def names(self) -> list[str]:
        """The op's positional arguments."""
        schema = getattr(torch.ops.shufflenet_ext, self.op).default._schema
        return [argument.name for argument in schema.arguments if not argument.kwarg_only]

    @property
    def options(self) -> dict[str, Any]:
        """The op's keyword arguments."""
        options: dict[str, Any] = {"conv1_groups": self.conv1_groups or self.groups}
        options |= {"stride": self.stride, "conv2_relu": self.conv2_relu}
        if self.op == "pointwise_shuffle_depthwise":
            return options | {"shuffle_groups": self.groups}
        options |= {"groups": self.groups, "pool_count_include_pad": self.pool_count_include_pad}
        if self.shuffle_groups is not None:
            options["shuffle_groups"] = self.shuffle_groups
        if self.shortcut_first or not self.shortcut_relu:
            options |= {"shortcut_first": self.shortcut_first, "shortcut_relu": self.shortcut_relu}
        if self.op == "shuffle_bottleneck_batch_norm":
            options |= {"bn1_eps": 1e-5, "bn2_eps": 1e-3, "bn3_eps": 1e-4}
        return options

    def tensors(self, dtype: torch.dtype = torch.float32, layout: torch.memory_format = LAYOUTS[0]) -> list[Tensor]:
        """The op's positional arguments, on torch's default device; every intermediate is of the order of one."""
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

        def vectors(channels: int) -> list[Any]:
            bias = [normal(channels) if self.bias else None]
            if self.op != "shuffle_bottleneck_batch_norm":
                return bias
            weight, var = (1 + normal(channels).abs() for _ in range(2))
            affine = [weight, normal(channels)] if self.affine else [None, None]
            return [*bias, *affine, normal(channels), var]

        out_channels = self.out_channels or self.in_channels
        depth1, depth3 = self.in_channels // self.options["conv1_groups"], self.mid_channels // self.groups
        tensors = [normal(self.batch, self.in_channels, *self.plane)]
        tensors += [normal(self.mid_channels, depth1, 1, 1) / depth1**0.5, *vectors(self.mid_channels)]
        tensors += [normal(self.mid_channels, 1, 3, 3) / 3, *vectors(self.mid_channels)]
        if self.op != "pointwise_shuffle_depthwise":
            tensors += [normal(out_channels, depth3, 1, 1) / depth3**0.5, *vectors(out_channels)]
        device = torch.get_default_device()
        tensors = [None if tensor is None else tensor.to(dtype).to(device) for tensor in tensors]
        tensors[0] = tensors[0].contiguous(memory_format=layout)
        return tensors

    def native(self, tensors: list[Tensor]) -> Tensor:
        """The native op itself, no fallback between."""
        return getattr(torch.ops.shufflenet_ext, self.op)(*tensors, **self.options)

    def reference(self, tensors: list[Tensor]) -> Tensor:
        return getattr(reference, self.op)(*tensors, **self.options)

    def exact(self, tensors: list[Tensor]) -> Tensor:
        """The ground truth: the reference in float64."""
        return self.reference([None if tensor is None else tensor.double() for tensor in tensors])

    def check(self, tensors: list[Tensor]) -> Tensor:
        """The native result, which must be as accurate as PyTorch's own."""
        got = self.native(tensors)
        assert got.dtype == tensors[0].dtype
        assert_as_accurate(got, self.reference(tensors), self.exact(tensors))
        return got


@dataclass(frozen=True)
class Network:
    """A call of shuffle_network: units one behind the other, with or without a stem and a head."""

    units: tuple[Unit, ...]
    stem: tuple[int, ...] | None = None  # out_channels, kernel_size, stride, padding, max_pool and, unless 1, relu
    head: tuple[int, ...] | None = None  # classes, pool_window
    batch: int = 2
    in_channels: int | None = None  # the first unit's
    plane: tuple[int, int] = (14, 14)

    @property
    def channels(self) -> int:
        """Those of x."""
        return self.in_channels or self.units[0].in_channels

    @property
    def program(self) -> list[int]:
        program = [] if self.stem is None else [0, *self.stem, 1][:7]
        for unit in self.units:
            o = unit.options
            is_general = unit.shuffle_groups is not None or unit.shortcut_first or not unit.shortcut_relu
            program += [4 if is_general else 1, unit.mid_channels, unit.out_channels or unit.in_channels]
            program += [o["conv1_groups"], o["groups"], o["stride"]]
            program += [int(o["conv2_relu"]), int(o["pool_count_include_pad"])]
            if is_general:
                program += [unit.shuffle_groups or unit.groups, int(unit.shortcut_first), int(unit.shortcut_relu)]
        return program if self.head is None else [*program, 2, *self.head]

    def parameters(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Weights and biases in the program's order; every intermediate is of the order of one."""
        generator = torch.Generator().manual_seed(2)

        def layer(rows: int, *depth: int) -> list[Tensor]:
            weight = torch.randn((rows, *depth), generator=generator, dtype=torch.float64, device="cpu")
            bias = torch.randn(rows, generator=generator, dtype=torch.float64, device="cpu")
            return [(weight / math.prod(depth) ** 0.5).to(dtype), bias.to(dtype)]

        parameters: list[Tensor] = []
        if self.stem is not None:
            out_channels, size = self.stem[:2]
            parameters += layer(out_channels, self.channels, size, size)
        for unit in self.units:
            parameters += unit.tensors(dtype)[1:]
        if self.head is not None:
            channels = self.stem[0] if self.stem else self.channels
            if self.units:
                last = self.units[-1]
                channels = (last.out_channels or last.in_channels) + (last.in_channels if last.stride == 2 else 0)
            parameters += layer(self.head[0], channels)
        return [parameter.to(torch.get_default_device()) for parameter in parameters]

    def arguments(
        self, dtype: torch.dtype = torch.float32, layout: torch.memory_format = LAYOUTS[0]
    ) -> tuple[Tensor, Tensor, list[int]]:
        """The op's arguments, on torch's default device."""
        x = Unit(groups=1, in_channels=self.channels, mid_channels=1, batch=self.batch, plane=self.plane).tensors(
            dtype, layout
        )[0]
        return x, reference.pack_weights(self.parameters(dtype)), self.program

    def check(self, x: Tensor, weights: Tensor, program: list[int]) -> Tensor:
        """The native result, which must be as accurate as PyTorch's own."""
        got = network_op(x, weights, program)
        assert got.dtype == x.dtype
        exact = reference.shuffle_network(x.double(), weights.double(), program)
        assert_as_accurate(got, reference.shuffle_network(x, weights, program), exact)
        return got


def assert_as_accurate(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Fails if ``got`` is further from ``exact`` than twice as far as ``plain``, PyTorch's own result, is.

    The floor is for results that ``plain`` hits by luck: of few elements, or where both round the same float64.
    """
    assert got.shape == exact.shape
    if got.numel() == 0:
        return
    assert got.isfinite().all(), "the result has elements that are not finite"
    largest = exact.abs().max()
    # The rounding of the result for the 16-bit dtypes, of a few sums for those that are summed in themselves; more of
    # them in float64, where exact has been rounded as often as got has.
    floor = torch.finfo(got.dtype).eps * largest * {2: 1, 4: 8, 8: 32}[got.element_size()]
    error, plain_error = (result.double() - exact for result in (got, plain))
    for norm in (lambda e: e.abs().max(), lambda e: e.square().mean().sqrt()):
        got_norm, plain_norm = norm(error), norm(plain_error)
        assert got_norm <= 2 * plain_norm + floor, f"error {got_norm:.3g}, PyTorch's {plain_norm:.3g}"


def assert_refuses_what_does_not_fit(
    run: Any, tensors: list[Any], options: dict[str, Any], *, wrong: int, says: str = "got"
) -> None:
    """A call that is right, after which each tensor and each option in turn is one that does not fit.

    ``wrong`` is given for each option that is no bool; ``says`` is what the error for it matches, with {} for its name.
    """
    run(*tensors, **options)
    for i, tensor in enumerate(tensors):
        others = [tensor.new_empty(*tensor.shape[:-1], tensor.shape[-1] + 2), tensor.to(torch.int64), tensor[None]]
        others.append(tensor[:, :0] if tensor.dim() == 4 else tensor[..., :0])
        others += [tensor.transpose(-1, -2)] if tensor.dim() > 1 and tensor.shape[-1] != tensor.shape[-2] else []
        for other in others:
            with pytest.raises(RuntimeError, match="got"):
                run(*tensors[:i], other, *tensors[i + 1 :], **options)
    for option, value in options.items():
        if not isinstance(value, bool):
            with pytest.raises(RuntimeError, match=says.format(option)):
                run(*tensors, **options | {option: wrong})


def passes_of(run: Callable[[], Any]) -> set[str]:
    """The passes of native training that PyTorch's profiler sees in a call, by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return {event.key.partition("training: ")[2] for event in profile.key_averages() if "training: " in event.key}


def assert_strides_of_layout(tensor: Tensor, layout: torch.memory_format) -> None:
    assert tensor.stride() == torch.empty(tensor.shape, memory_format=layout).stride()


def autocast(dtype: torch.dtype | None = None, enabled: bool = True) -> torch.autocast:
    """torch.autocast on torch's default device."""
    return torch.autocast(torch.get_default_device().type, dtype, enabled)


class Recorder(TorchDispatchMode):
    """Notes the name of every op that reaches a backend."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@contextmanager
def assert_ran(op: str, times: int = 1) -> Iterator[None]:
    """Fails unless the block runs the native op so often, and no convolution of PyTorch's."""
    with Recorder() as recorder:
        yield
    assert recorder.names.count(f"shufflenet_ext::{op}") == times
    assert "aten::convolution" not in recorder.names


@contextmanager
def assert_ran_reference() -> Iterator[None]:
    """Fails unless the block runs convolutions of PyTorch's and no native op."""
    with Recorder() as recorder:
        yield
    assert not [name for name in recorder.names if name.startswith("shufflenet_ext::")]
    assert "aten::convolution" in recorder.names


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives a model weights and statistics of no special values, as training would; fresh batch norms hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            for tensor in (module.weight, module.running_var):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias, module.running_mean):
                if tensor is not None:
                    tensor.data.normal_(generator=generator)
        elif isinstance(module, nn.Conv2d):
            module.weight.data.normal_(std=module.weight[0].numel() ** -0.5, generator=generator)
    return model


def plain_twin(unit: se.FusedShuffleBottleneck) -> se.ShuffleBottleneck:
    """A ShuffleBottleneck with a copy of the unit's state."""
    plain = se.ShuffleBottleneck(
        unit.conv1.in_channels,
        unit.conv3.out_channels,
        unit.stride,
        unit.groups,
        mid_channels=unit.conv1.out_channels,
        conv1_groups=unit.conv1.groups,
        conv2_relu=unit.conv2_relu,
        pool_count_include_pad=unit.pool_count_include_pad,
        shuffle_groups=unit.shuffle_groups,
        shortcut_first=unit.shortcut_first,
        shortcut_relu=unit.shortcut_relu,
        bias=unit.conv1.bias is not None,
    ).to(unit.conv1.weight.dtype)
    plain.load_state_dict(unit.state_dict())
    for norm in ("bn1", "bn2", "bn3"):
        getattr(plain, norm).eps = getattr(unit, norm).eps
    return plain.train(unit.training)


def _join(store: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(minutes=2)
    )


def _call(rank: int, function_and_arguments: bytes) -> bytes:
    function, arguments = pickle.loads(function_and_arguments)
    return pickle.dumps(function(rank, *arguments))


class Processes:
    """A group of processes in torch.distributed, started once for all tests that run something in them.

    How they end is not looked at: PyTorch's gloo threads outlive a DistributedDataParallel, and one that frees a tensor
    while Python shuts down aborts its process.
    """

    def __init__(self, folder: Path, world_size: int) -> None:
        self._folder, self._world_size = folder, world_size
        self._groups = 0  # that were started
        self._workers: list[ProcessPoolExecutor] = []

    def run(self, function: Callable[..., Any], *arguments: object) -> list[Any]:
        """What function(rank, *arguments) returns in each process, or the error of one that failed.

        Behind an error the next call starts processes anew: the others may wait in the middle of something.
        """
        copies = pickle.dumps((function, arguments))  # submit itself would share the tensors' memory
        results = [worker.submit(_call, rank, copies) for rank, worker in enumerate(self._workers or self._start())]
        try:
            for result in wait(results, timeout=150, return_when=FIRST_EXCEPTION).done:
                result.result()
            return [pickle.loads(result.result(timeout=0)) for result in results]
        except BaseException:
            self.close()
            raise

    def _start(self) -> list[ProcessPoolExecutor]:
        self._groups += 1
        store, spawn = self._folder / f"store{self._groups}", multiprocessing.get_context("spawn")
        self._workers = [
            ProcessPoolExecutor(1, spawn, initializer=_join, initargs=(store, rank, self._world_size))
            for rank in range(self._world_size)
        ]
        return self._workers

    def close(self) -> None:
        for worker in self._workers:
            worker.shutdown(wait=False, cancel_futures=True)
        self._workers = []
