"""Times units against PyTorch and a copy, in CUDA graphs over rotating buffers: ``... speed [--rehearse]``.

Times are in microseconds a call. Ours are optimized for inference, and so is what is folded.
"""

import time
from collections.abc import Callable
from itertools import product
from statistics import median

import torch
from torch import Tensor

import shufflenet_ext as se
from benchmarks import peers
from benchmarks.cuda_race import Clock, EventClock, copy_of, graphed
from benchmarks.first_contact.cases import BATCHES, LAYOUTS, TIMED_DTYPES, PaperUnit
from benchmarks.first_contact.units import FORMATS, Settings, allow_tf32, image_of, module_of, say

_ROUNDS = 9
_LEAST_SETS, _MOST_SETS = 4, 16
_ROTATED_BYTES = 2**27  # beyond most cards' L2 cache


class WallClock:
    """In the place of EventClock in a rehearsal."""

    def __call__(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


# Returns the microseconds of a call, of several that are recorded as one graph.
Timer = Callable[[list[Callable[[], object]]], float]


def timer(settings: Settings) -> Timer:
    """Returns what times calls, which are recorded as one graph: the median of some replays, in µs a call."""
    clock: Clock = WallClock() if settings.rehearse else EventClock()

    def timed(calls: list[Callable[[], object]]) -> float:
        def all_of_them() -> Tensor:
            results = [call() for call in calls]
            assert isinstance(results[0], Tensor)
            return results[0]

        replay = all_of_them if settings.rehearse else graphed(all_of_them)
        replay()
        return 1e6 * median(clock(replay) for _ in range(2 if settings.rehearse else _ROUNDS)) / len(calls)

    return timed


def sets_of(traffic: int) -> int:
    return max(_LEAST_SETS, min(_MOST_SETS, _ROTATED_BYTES // traffic))


def rotated(run: Callable[[Tensor], Tensor], images: list[Tensor]) -> list[Callable[[], object]]:
    return [lambda x=x: run(x) for x in images]  # type: ignore[misc]


def row_of(settings: Settings, timed: Timer, unit: PaperUnit, dtype: str, layout: str, batch: int) -> dict[str, object]:
    """One unit's times. Raises RuntimeError where the kernels do not run."""
    real, memory_format = allow_tf32(dtype), FORMATS[layout]
    torch.backends.cudnn.benchmark = batch == 64  # for the batch that there are targets for; it takes its time
    made = module_of(unit)
    optimized, folded, plain = (
        module.to(settings.device, real)
        for module in (
            se.optimize_for_inference(torch.nn.Sequential(made)),
            peers.folded_copy(made),
            peers.plain_copy(made),
        )
    )
    for module in (folded, plain):
        module.to(memory_format=memory_format)  # type: ignore[call-overload]
    x = image_of(unit, batch, settings.device).to(real, memory_format=memory_format)
    result = optimized(x)
    allowed = {"float32": 1e-4, "bfloat16": 5e-2}.get(dtype, 1e-2)  # peers round intermediate results
    largest = result.abs().max().item()
    apart = max((module(x) - result).abs().max().item() / largest for module in (folded, plain))
    traffic = x.nbytes + result.nbytes + sum(weight.nbytes for weight in folded.parameters())
    images = [x, *(torch.randn_like(x) for _ in range(sets_of(traffic) - 1))]
    return {
        "ok": apart <= allowed,
        "apart": apart,
        "bytes": traffic,
        "ours": timed(rotated(optimized, images)),
        "copy": timed([copy_of(traffic, settings.device) for _ in images]),
        "eager": timed(rotated(plain, images)),
        "folded": timed(rotated(folded, images)),
    }


def main() -> None:
    settings = Settings(__doc__)
    timed = timer(settings)
    batches = (1,) if settings.rehearse else sorted(BATCHES, key=lambda n: n != 64)
    dtypes = settings.dtypes if settings.rehearse else TIMED_DTYPES
    with torch.no_grad(), se.use_backend("native"):
        for batch, dtype, layout, unit in product(batches, dtypes, LAYOUTS, settings.units):
            case = {"unit": unit.label, "dtype": dtype, "layout": layout, "batch": batch}
            try:
                say(**case, **row_of(settings, timed, unit, dtype, layout, batch))
            except Exception as error:  # of one case, which must not cost the others theirs
                say(**case, ok=False, what=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
