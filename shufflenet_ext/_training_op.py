"""A unit's training step as an op, and what PyTorch's machinery knows of it. csrc/cpu/training/ computes it (unit.h).

The op takes a unit's tensors, six of each convolution: weight and bias; its batch norm's weight, bias, running mean and
running variance. A norm that normalizes by the batch has no running statistics here; where there is no norm, all four
are None and its eps is 0. It returns the result and what the backward pass needs: y1, y2 and the statistics, which
begin with the mean and the unbiased variance of each norm that normalizes by the batch (see ``statistics_of``).
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from shufflenet_ext import _native, reference
from shufflenet_ext._backend import fall_back
from shufflenet_ext._checks import check_unit

_TENSORS = ", ".join(
    f"Tensor conv{i}_weight, Tensor? conv{i}_bias, Tensor? bn{i}_weight, Tensor? bn{i}_bias, Tensor? bn{i}_mean, "
    f"Tensor? bn{i}_var"
    for i in (1, 2, 3)
)
_OPTIONS = (
    "float[] eps, bool[] of_batch, int conv1_groups, int groups, int stride, bool conv2_relu, "
    "bool pool_count_include_pad, int shuffle_groups, bool shortcut_first, bool shortcut_relu, "
    "str processes"
)
_OF_STAGE = 6  # tensors of a convolution and its norm
_TRAINED = 4  # of them, the first ones have gradients

_GEOMETRY = (
    "conv1_groups", "groups", "stride", "conv2_relu", "pool_count_include_pad", "shuffle_groups", "shortcut_first",
    "shortcut_relu",
)  # fmt: skip

NAME, BACKWARD_NAME = "shuffle_bottleneck_training", "shuffle_bottleneck_training_backward"


def _stages(tensors: Sequence[Tensor | None]) -> list[Sequence[Tensor | None]]:
    return [tensors[i : i + _OF_STAGE] for i in range(0, 3 * _OF_STAGE, _OF_STAGE)]


def _check(x: Tensor, tensors: Sequence[Tensor | None], options: dict[str, Any]) -> None:
    """Raises TypeError or ValueError for arguments that describe no unit, or norms that do not fit it."""
    stages = _stages(tensors)
    names = ("conv1_groups", "groups", "stride", "shuffle_groups")
    convolutions = [tensor for stage in stages for tensor in stage[:2]]
    conv1_weight, conv1_bias, conv2_weight, conv2_bias, conv3_weight, conv3_bias = convolutions
    check_unit(
        x,
        conv1_weight,  # type: ignore[arg-type]  # checked there
        conv1_bias,
        conv2_weight,  # type: ignore[arg-type]
        conv2_bias,
        conv3_weight=conv3_weight,
        conv3_bias=conv3_bias,
        **{name: options[name] for name in names},
    )
    for i, (weight, _, *norm) in enumerate(stages, 1):
        assert weight is not None
        for name, tensor in zip(("weight", "bias", "mean", "var"), norm, strict=True):
            if tensor is not None and tuple(tensor.shape) != (len(weight),):
                raise ValueError(f"bn{i}_{name}: got shape {list(tensor.shape)}, expected [{len(weight)}]")
        if (norm[2] is None) != (norm[3] is None):
            raise ValueError(f"bn{i}_mean and bn{i}_var: got one of them, expected both or none")


def plain(
    x: Tensor, *tensors: Tensor | None, eps: Sequence[float], of_batch: Sequence[bool], **options: Any
) -> tuple[Tensor, ...]:
    """The op in plain PyTorch, which can differentiate and transform it.

    Of what it returns, the result, y1, y2, and mean and variance of norms that normalize by the batch are the op's.
    """
    _check(x, tensors, options)
    stages = _stages(tensors)
    statistics: list[Tensor] = []

    def stage(y: Tensor, i: int, **conv: Any) -> tuple[Tensor, Tensor]:
        weight, bias, gamma, beta, mean, var = stages[i]
        assert weight is not None
        plain_y = F.conv2d(y, weight, **conv)
        with torch.no_grad():
            of_y = plain_y.double()
            found = torch.var_mean(of_y, (0, 2, 3), correction=1)[::-1] if of_batch[i] else (mean, var)
        statistics.extend(of_y.new_zeros(len(weight)) if each is None else each.double() for each in found)
        y = plain_y if bias is None else plain_y + bias.view(1, -1, 1, 1)
        if of_batch[i] or mean is not None:
            y = F.batch_norm(y, mean, var, gamma, beta, of_batch[i], 0.0, eps[i])
        return plain_y, y

    y1, y = stage(x, 0, groups=options["conv1_groups"])
    y = reference.shuffle_channels(F.relu(y), options["shuffle_groups"])
    y2, y = stage(y, 1, stride=options["stride"], padding=1, groups=y.shape[1])
    _, y = stage(F.relu(y) if options["conv2_relu"] else y, 2, groups=options["groups"])
    names = ("stride", "pool_count_include_pad", "shortcut_first", "shortcut_relu")
    result = reference.add_shortcut(y, x, **{name: options[name] for name in names})
    return result, y1, y2, torch.cat(statistics)


def _native_forward(
    x: Tensor, *tensors: Tensor | None, eps: list[float], of_batch: list[bool], **options: Any
) -> tuple[Tensor, ...]:
    with raising_what_failed():
        return tuple(torch.ops.shufflenet_ext.training_unit(x, tensors, eps, of_batch, **options))


def _fake_forward(
    x: Tensor, *tensors: Tensor | None, eps: list[float], of_batch: list[bool], **options: Any
) -> tuple[Tensor, ...]:
    _check(x, tensors, options)
    mid, out_channels = (len(stage[0]) for stage in _stages(tensors)[::2])  # type: ignore[arg-type]  # checked
    stride, groups = options["stride"], options["groups"]
    n, in_channels, height, width = x.shape
    size = (height - 1) // stride + 1, (width - 1) // stride + 1
    channels = out_channels + (in_channels if stride == 2 else 0)
    result = x.new_empty(n, channels, *size).to(memory_format=_native.memory_format(x))
    count = 7 * mid + 3 * out_channels + 2 + (mid * mid // groups if of_batch[2] else 0)
    statistics = x.new_empty(count, dtype=torch.float64)
    return result, x.new_empty(n, mid, height, width), x.new_empty(n, mid, *size), statistics


def statistics_of(statistics: Tensor, stages: Sequence["TrainedStage"]) -> list[tuple[Tensor, Tensor]]:
    """Mean and unbiased variance of each norm that normalizes by the batch, in float32 or float64."""
    sizes = [len(stage.weight) for stage in stages for _ in range(2)]
    dtype = torch.promote_types(stages[0].weight.dtype, torch.float32)
    vectors = statistics[: sum(sizes)].to(dtype).split(sizes)
    return list(zip(vectors[::2], vectors[1::2], strict=True))


def _native_backward(
    gradient: Tensor,
    x: Tensor,
    kept: list[Tensor],
    *tensors: Tensor | None,
    depth: int,
    eps: list[float],
    of_batch: list[bool],
    **options: Any,
) -> list[Tensor]:
    op = torch.ops.shufflenet_ext.training_unit_backward
    with raising_what_failed():
        gradients: list[Tensor] = op(gradient, x, *kept, tensors, eps, of_batch, depth=depth, **options)
    return gradients


def _first_depth(index: int) -> int:
    """The depth from which the backward pass finds the gradient of an input: see Depth in csrc/cpu/training/unit.h."""
    if index == 0:
        return 4
    stage, tensor = divmod(index - 1, _OF_STAGE)
    return (3 if tensor == 0 else 2, 2, 1)[stage]


def _fake_backward(
    gradient: Tensor, x: Tensor, kept: list[Tensor], *tensors: Tensor | None, depth: int, **options: Any
) -> list[Tensor]:
    def fake(index: int, like: Tensor | None) -> Tensor:
        if like is None or depth < _first_depth(index):
            return x.new_empty(0)
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    fakes = [fake(0, x).to(memory_format=_native.memory_format(x)) if depth == 4 else x.new_empty(0)]
    for i, stage in enumerate(_stages(tensors)):
        fakes += [fake(1 + i * _OF_STAGE + j, like) for j, like in enumerate(stage[:_TRAINED])]
    return fakes


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    inputs, outputs = saved[: 1 + 3 * _OF_STAGE], saved[1 + 3 * _OF_STAGE :]
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
    found: list[Tensor | None] = [None] * len(inputs)
    if gradient is None:
        return tuple(found)
    if torch.is_grad_enabled():  # the gradients are to be differentiated themselves, which PyTorch's operations can be
        if ctx.options["processes"]:
            raise RuntimeError("gradients of gradients: got batch norms of several processes, expected those of one")
        return plain_gradients(plain, gradient, inputs, wanted, ctx.options)
    depth = max(map(_first_depth, wanted))
    gradients = _of_inputs(gradient, inputs[0], outputs, inputs[1:], depth, ctx.options)
    return tuple(each if i in wanted else None for i, each in enumerate(gradients))


def _of_inputs(
    gradient: Tensor,
    x: Tensor,
    kept: Sequence[Tensor],
    tensors: Sequence[Tensor | None],
    depth: int,
    options: dict[str, Any],
) -> list[Tensor | None]:
    """The native backward pass: the gradients of all inputs, of which those beyond the depth mean nothing."""
    op = getattr(torch.ops.shufflenet_ext, BACKWARD_NAME)
    x_gradient, *others = op(gradient, x, list(kept), *tensors, depth=depth, **options)
    found: list[Tensor | None] = [x_gradient]
    for i in range(0, len(others), _TRAINED):
        found += [*others[i : i + _TRAINED], *[None] * (_OF_STAGE - _TRAINED)]
    return found


_OF_CONVOLUTION = {"shuffle_bottleneck": 2, "shuffle_bottleneck_batch_norm": _OF_STAGE}  # tensors, by op


def frozen_gradients(
    name: str, gradient: Tensor, inputs: Sequence[Tensor | None], wanted: Sequence[int], options: dict[str, Any]
) -> tuple[Tensor | None, ...] | None:
    """The gradients of an inference op's inputs; None where no native pass finds those that are wanted."""
    x, of_convolution = inputs[0], _OF_CONVOLUTION.get(name)
    assert x is not None
    if of_convolution is None or torch.is_grad_enabled() or _native.untrainable(x) is not None:
        return None
    places = {0: 0}  # of the inputs among those of the training op
    tensors: list[Tensor | None] = [None] * (3 * _OF_STAGE)
    for i, tensor in enumerate(inputs[1:]):
        stage, j = divmod(i, of_convolution)
        tensors[stage * _OF_STAGE + j] = tensor
        places[1 + i] = 1 + stage * _OF_STAGE + j
    if any((places[i] - 1) % _OF_STAGE >= _TRAINED for i in wanted if i > 0):
        return None  # a norm's statistics
    given: dict[str, Any] = {
        "eps": [options.get(f"bn{i}_eps", 0.0) for i in (1, 2, 3)],
        "of_batch": [False] * 3,
        "processes": "",
        "shuffle_groups": options["groups"] if options.get("shuffle_groups") is None else options["shuffle_groups"],
    }
    defaults = {"stride": 1, "conv2_relu": False, "pool_count_include_pad": True, "shortcut_first": False}
    for option in _GEOMETRY:
        given.setdefault(option, options.get(option, defaults.get(option, True)))
    kept = getattr(torch.ops.shufflenet_ext, NAME)(x, *tensors, **given)
    depth = max(_first_depth(places[i]) for i in wanted)
    found = _of_inputs(gradient, x, kept, tensors, depth, given)
    return tuple(found[places[i]] if i in wanted else None for i in range(len(inputs)))


def make_differentiable(
    library: torch.library.Library,
    name: str,
    setup_context: Callable[..., None],
    backward: Callable[..., tuple[Any, ...]],
) -> None:
    """Gives an op a backward pass, whose ctx.needs_input_grad has the keyword arguments, as one, before the others.

    As torch.library.register_autograd does; but that looks up the schema's arguments again at each call, one by one,
    which takes 0.8 ms where there are thirty.
    """
    op = getattr(torch.ops.shufflenet_ext, name)

    def forward(ctx: Any, options: dict[str, Any], *inputs: Tensor | None) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*inputs, **options)
        setup_context(ctx, inputs, options, output)
        return output

    def with_options(ctx: Any, *gradients: Tensor | None) -> Any:
        return None, *backward(ctx, *gradients)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(with_options)}
    function: Any = type(name, (torch.autograd.Function,), methods)

    def differentiable(*inputs: Tensor | None, **options: Any) -> Any:
        return function.apply(options, *inputs)

    library.impl(name, differentiable, "Autograd")


def in_plain_pytorch(plain: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """What a training op is under torch.func's transforms: its plain form, with a warning, or an error under native."""

    def transformed(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        fall_back("torch.func transforms the call, and there is no native kernel of a transformed one")
        return plain(*args, **kwargs)

    return transformed


def flops_of(plain: Callable[..., Any]) -> Callable[..., int]:
    """The flop formula of an op: what torch.utils.flop_counter counts for its plain form."""

    def flops(*args: Any, out_val: Any, **kwargs: Any) -> int:
        shapes = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), args)
        with FlopCounterMode(display=False) as counter:
            plain(*shapes, **kwargs)
        return counter.get_total_flops()

    return flops


def plain_gradients(
    plain: Callable[..., tuple[Tensor, ...]],
    gradient: Tensor,
    inputs: Sequence[Tensor | None],
    wanted: Sequence[int],
    options: dict[str, Any],
) -> tuple[Tensor | None, ...]:
    """The gradients of a training op's inputs by PyTorch's operations, which can be differentiated themselves."""

    def run(*values: Tensor) -> Tensor:
        replaced = dict(zip(wanted, values, strict=True))
        return plain(*(replaced.get(i, given) for i, given in enumerate(inputs)), **options)[0]

    found: list[Tensor | None] = [None] * len(inputs)
    for i, each in zip(wanted, torch.func.vjp(run, *(inputs[i] for i in wanted))[1](gradient), strict=True):
        found[i] = each
    return tuple(found)


_flops = flops_of(plain)


def _backward_flops(
    gradient: Tensor, x: Tensor, kept: Any, *tensors: Any, depth: int, out_val: Any, **kwargs: Any
) -> int:
    """Each convolution's again for its weight's gradient and for its input's, as far back as they are wanted."""
    n, _, height, width = x.shape
    of_conv1 = 2 * n * height * width * tensors[0].numel()
    return 2 * _flops(x, *tensors, out_val=None, **kwargs) - max(0, 4 - depth) * of_conv1


def uses_batch(norm: nn.Module | None) -> bool:
    """Whether a batch norm normalizes by the batch's statistics, as nn.BatchNorm2d's forward decides it."""
    return norm is not None and (norm.training or (norm.running_mean is None and norm.running_var is None))


def untrainable(norms: Sequence[nn.Module | None]) -> str | None:
    """Why there is no native training step with these norms; None where there is."""
    for norm in norms:
        if norm is not None and not isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):
            return f"there is no native training step with a {type(norm).__name__} in the place of a batch norm"
    if len({processes_of(norm) for norm in norms if uses_batch(norm)}) > 1:
        return "there is no native training step with batch norms of other processes each"
    return None


def processes_of(norm: Any) -> str:
    """The name of the process group with which a norm shares its statistics; empty where it shares them with none."""
    if not isinstance(norm, nn.SyncBatchNorm) or not distributed.is_available() or not distributed.is_initialized():
        return ""
    group: Any = norm.process_group or distributed.group.WORLD
    return group.group_name if norm.training and distributed.get_world_size(group) > 1 else ""


class TrainedStage(NamedTuple):
    """A convolution's weight and bias, its batch norm's, and the norm itself; None for what there is not."""

    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    norm: Any
    order: Tensor | None = None  # of the unit's channels among the norm's, where they are others

    def running_statistics(self) -> list[Tensor | None]:
        tensors = [None, None] if self.norm is None else [self.norm.running_mean, self.norm.running_var]
        return [each if each is None or self.order is None else each[self.order] for each in tensors]


def run(x: Tensor, stages: Sequence[TrainedStage], **options: Any) -> Tensor:
    """A unit's training step by the native op, on the norms' running statistics as well.

    Raises ValueError where a norm would normalize single values, as nn.BatchNorm2d does.
    """
    of_batch = [uses_batch(stage.norm) for stage in stages]
    tensors: list[Tensor | None] = []
    for stage, batch in zip(stages, of_batch, strict=True):
        tensors += [stage.weight, stage.bias, stage.norm_weight, stage.norm_bias]
        tensors += [None, None] if batch else stage.running_statistics()
    (n, _, height, width), stride = x.shape, options["stride"]
    of_x, of_result = n * height * width, n * ((height - 1) // stride + 1) * ((width - 1) // stride + 1)
    counts = (of_x, of_result, of_result)  # of values by norm
    processes = next((processes_of(stage.norm) for stage in stages if uses_batch(stage.norm)), "")
    if not processes and any(batch and count == 1 for batch, count in zip(of_batch, counts, strict=True)):
        size = [n, len(stages[0].weight), 1, 1]
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
    eps = [0.0 if stage.norm is None else stage.norm.eps for stage in stages]
    op = getattr(torch.ops.shufflenet_ext, NAME)
    result, _, _, statistics = op(x, *tensors, eps=eps, of_batch=of_batch, processes=processes, **options)
    update_running_statistics(stages, of_batch, statistics)
    return result


@torch.no_grad()
def update_running_statistics(stages: Sequence[TrainedStage], of_batch: Sequence[bool], statistics: Tensor) -> None:
    """Updates those of the norms in training mode from what an op returned, as nn.BatchNorm2d does."""
    for stage, batch, (mean, var) in zip(stages, of_batch, statistics_of(statistics, stages), strict=True):
        norm = stage.norm
        if not batch or not norm.training or not norm.track_running_stats:
            continue
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        if norm.running_mean is None:
            continue
        # A momentum of None stands for the mean over all batches.
        factor = norm.momentum
        if factor is None:
            factor = 1 / norm.num_batches_tracked.to(norm.running_mean.dtype)
        if stage.bias is not None:
            mean = mean + stage.bias.detach()
        for running, found in ((norm.running_mean, mean), (norm.running_var, var)):
            in_order = found if stage.order is None else torch.empty_like(found).index_copy_(0, stage.order, found)
            running.lerp_(in_order.to(running.dtype), factor)


_failure = threading.local()  # error: what failed in _sum_over_processes, in this thread


def _sum_over_processes(numbers: Tensor, processes: str) -> None:
    group = distributed.distributed_c10d._resolve_process_group(processes)  # type: ignore[arg-type]  # a str
    try:
        distributed.all_reduce(numbers, group=group)
    except BaseException as error:
        _failure.error = error
        raise


@contextmanager
def raising_what_failed() -> Iterator[None]:
    """Raises what failed between the processes, which C++ in between makes a RuntimeError without a cause."""
    try:
        yield
    except RuntimeError:
        error = vars(_failure).pop("error", None)
        if error is None:
            raise
        raise error from None


if _native.native_error is None:
    _library = torch.library.Library("shufflenet_ext", "FRAGMENT")
    _library.define(f"{NAME}(Tensor x, {_TENSORS}, *, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)")
    _library.define(
        f"{BACKWARD_NAME}(Tensor gradient, Tensor x, Tensor[] kept, {_TENSORS}, *, int depth, {_OPTIONS}) -> Tensor[]"
    )
    _library.define("sum_over_processes(Tensor(a!) numbers, str processes) -> ()")
    _library.impl("sum_over_processes", _sum_over_processes, "CPU")
    _library.impl(NAME, _native_forward, "CPU")
    _library.impl(BACKWARD_NAME, _native_backward, "CPU")
    _library.impl(NAME, in_plain_pytorch(plain), "FuncTorchDynamicLayerFrontMode")
    torch.library.register_fake(f"shufflenet_ext::{NAME}", _fake_forward)
    torch.library.register_fake(f"shufflenet_ext::{BACKWARD_NAME}", _fake_backward)
    make_differentiable(_library, NAME, _setup_context, _backward)
    register_flop_formula(getattr(torch.ops.shufflenet_ext, NAME), get_raw=True)(_flops)
    register_flop_formula(getattr(torch.ops.shufflenet_ext, BACKWARD_NAME), get_raw=True)(_backward_flops)
