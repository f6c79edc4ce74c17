"""Times torch.compile, against which ours has targets: ``... compiled [--rehearse]``. Float16, channels_last, batch 64.

Each unit by torch.compile in a CUDA graph; then all 16 units of the network by max-autotune, and ours beside it.
"""

from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

import shufflenet_ext as se
from benchmarks import peers
from benchmarks.cuda_race import AllUnits, EventClock, max_autotune
from benchmarks.first_contact.speed import rotated, sets_of, timer
from benchmarks.first_contact.units import Settings, image_of, module_of, say


def main() -> None:
    settings = Settings(__doc__)
    timed = timer(settings)
    batch, real = (1, torch.float32) if settings.rehearse else (64, torch.float16)

    def on_device(module: nn.Module) -> nn.Module:
        module.to(settings.device, real)
        return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    with torch.no_grad(), se.use_backend("native"):
        for unit in settings.units[-1:] if settings.rehearse else settings.units:
            dtype = str(real).removeprefix("torch.")
            case = {"unit": unit.label, "dtype": dtype, "layout": "channels_last", "batch": batch}
            try:
                folded = on_device(peers.folded_copy(module_of(unit)))
                x = peers.channels_last(image_of(unit, batch, settings.device).to(real))
                run: Callable[[Tensor], Tensor] = torch.compile(folded, fullgraph=True, dynamic=False)
                images = [x, *(torch.randn_like(x) for _ in range(sets_of(2 * x.nbytes) - 1))]
                say(**case, compiled=timed(rotated(run, images)))
            except Exception as error:  # of one unit, which must not cost the others theirs
                say(**case, ok=False, what=f"{type(error).__name__}: {error}")
        if settings.rehearse:
            return
        module, x = AllUnits(3, batch).build()
        x = peers.channels_last(x.to(settings.device, real))
        ours = se.optimize_for_inference(module).to(settings.device, real)
        row = {"unit": "16 units", "ours": timed(rotated(ours, [x, x.clone()]))}
        say(**row)  # even if what follows takes too long
        autotuned = max_autotune(peers.folded_copy(module).to(settings.device, real), x)  # with graphs of its own
        clock = EventClock()
        clock(autotuned)
        say(**row, max_autotune=1e6 * median(clock(autotuned) for _ in range(20)))


if __name__ == "__main__":
    main()
