"""What benchmarks/cuda_model.py predicts for a card, in microseconds: ``... model SM``, such as 90. Needs nvcc."""

import sys
import tempfile
from itertools import product
from pathlib import Path

from benchmarks.cuda_model import BATCHES, CARDS, ELEMENT_BYTES, Model
from benchmarks.cuda_toolkit import LAYOUTS
from benchmarks.cuda_units import paper_units
from benchmarks.first_contact.units import say


def main(sm: int) -> int:
    if sm not in CARDS:
        print(f"the model knows no card of sm_{sm}, only {', '.join(map(str, CARDS))}")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        model = Model(Path(folder))
        model.compile(ELEMENT_BYTES, [sm])
        for batch, dtype, layout in product(BATCHES, ELEMENT_BYTES, LAYOUTS):
            units = paper_units(batch)
            for label, predicted in zip(units, model.predict(list(units.values()), dtype, layout, sm), strict=True):
                case = {"unit": label, "dtype": dtype, "layout": layout, "batch": batch}
                say(**case, predicted=predicted.time * 1e6, bound=predicted.bound)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
