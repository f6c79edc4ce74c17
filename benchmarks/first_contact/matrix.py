"""Compares the ops with the reference in float64 on the CPU, outputs poisoned: ``... matrix [--rehearse]``."""

import copy
from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor, nn

import shufflenet_ext as se
from benchmarks.first_contact.cases import LAYOUTS, PaperUnit
from benchmarks.first_contact.units import FORMATS, Settings, allow_tf32, compare, image_of, module_of, say

# Units that fit no vector and no tile, and planes of a row and of a pixel.
ODD_UNITS = (
    PaperUnit("odd", 30, 21, 30, 1, 1, 13),
    PaperUnit("odd stride 2", 15, 9, 9, 3, 2, 9),
    PaperUnit("one pixel", 15, 9, 9, 3, 2, 1),
    PaperUnit("even stride 2", 48, 24, 48, 3, 2, 10),
)


def results(
    settings: Settings, unit: PaperUnit, dtype: str, layout: str
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Each way to run a unit, with its result, PyTorch's own and the exact one."""
    module, x = module_of(unit), image_of(unit, 2)
    real = allow_tf32(dtype)
    cast = copy.deepcopy(module).to(settings.device, real)
    chain = se.optimize_for_inference(nn.Sequential(module)).to(settings.device, real)
    images = x.to(settings.device, real, memory_format=FORMATS[layout])
    with se.use_backend("reference"):
        exact = copy.deepcopy(module).double()(x.double())
        plain = cast(images)
    with se.use_backend("native"):
        yield "unit", cast(images), plain, exact
        yield "chain", chain(images), plain, exact

    def first_two(op: Callable[..., Tensor], y: Tensor) -> Tensor:
        conv1, conv2 = (conv.weight.to(y.device, y.dtype) for conv in (cast.conv1, cast.conv2))
        groups, stride = unit.conv1_groups, unit.stride
        return op(y, conv1, None, conv2, None, conv1_groups=groups, shuffle_groups=3, stride=stride)

    with se.use_backend("native"):
        got = first_two(se.ops.pointwise_shuffle_depthwise, images)
    plain = first_two(se.reference.pointwise_shuffle_depthwise, images)
    exact = first_two(se.reference.pointwise_shuffle_depthwise, images.double().cpu())
    yield "pointwise_shuffle_depthwise", got, plain, exact


def main() -> None:
    settings = Settings(__doc__)
    # Every uninitialised tensor is filled with NaN, those that the ops write their results to as well.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    units = (*settings.units, *ODD_UNITS)
    with torch.no_grad():
        for dtype, layout, unit in product(settings.dtypes, LAYOUTS, units):
            case = {"unit": unit.label, "dtype": dtype, "layout": layout}
            try:
                for op, got, plain, exact in results(settings, unit, dtype, layout):
                    say(**case, op=op, **compare(got, plain, exact))
            except Exception as error:  # of one case, which must not cost the others theirs
                say(**case, ok=False, what=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
