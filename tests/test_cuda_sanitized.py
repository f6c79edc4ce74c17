"""What `make sanitize-cuda` runs under compute-sanitizer: no kernel but the unit's, which all reports are about."""

import pytest
from support import DTYPES, LAYOUTS, OPS, Unit, assert_as_accurate

from shufflenet_ext import _native

if (cuda_error := _native.build_info()["cuda_error"]) is not None:
    pytest.skip(f"no CUDA kernels: {cuda_error}", allow_module_level=True)

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("plane", [(9, 8), (1, 17)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_small_units(op, dtype, layout, stride, plane):
    for channels in ((24, 12), (15, 9)):  # whole vectors and steps, and neither
        unit = Unit(op, in_channels=channels[0], mid_channels=channels[1], stride=stride, plane=plane)
        tensors = unit.tensors(dtype, layout)
        got = unit.native([tensor.to("cuda") for tensor in tensors]).cpu()
        assert_as_accurate(got, unit.reference(tensors), unit.exact(tensors))
