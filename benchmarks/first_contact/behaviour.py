"""Checks what a card alone can show, each in a process that has done nothing before: ``... behaviour [NAME]``.

Without a name, all of them, one row each.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

import shufflenet_ext as se
from benchmarks.first_contact.cases import UNITS
from benchmarks.first_contact.units import compare, image_of, module_of, say

_SECONDS = 45.0  # of all checks, which run side by side, torch's import included
_UNIT = UNITS[3]


class Example:
    """A unit on a card, with an image and its exact result."""

    def __init__(self, device: str = "cuda", batch: int = 2) -> None:
        module, x = module_of(_UNIT), image_of(_UNIT, batch)
        with torch.no_grad(), se.use_backend("reference"):
            self.module = module.half().to(device)
            self.x = x.half().to(device)
            self.plain = self.module(self.x)
            self.exact = module_of(_UNIT).double()(x.double())

    def run(self, x: Tensor | None = None) -> Tensor:
        with torch.no_grad(), se.use_backend("native"):
            result: Tensor = self.module(self.x if x is None else x)
        return result

    def check(self, got: Tensor) -> None:
        compared = compare(got, self.plain, self.exact)
        assert compared["ok"], compared


def first_call_in_a_capture() -> None:
    example = Example()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = example.run()
    graph.replay()
    torch.cuda.synchronize()
    example.check(got)


def graph_replays_follow_their_input() -> None:
    example = Example()
    example.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = example.run()
    for changed in (example.x.flip(0), example.x.flip(2)):
        example.x.copy_(changed)
        graph.replay()
        assert torch.equal(got, example.run())


def stream_of_its_own() -> None:
    example = Example()
    later = torch.full_like(example.x, torch.nan)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    busy = torch.randn(4096, 4096, device="cuda")
    with torch.cuda.stream(stream):
        for _ in range(20):
            busy = (busy @ busy).clamp(-1, 1)
        later.copy_(example.x)  # what runs in another stream comes before this
        got = example.run(later)
    torch.cuda.current_stream().wait_stream(stream)
    example.check(got)


def on_fresh_threads() -> None:
    example = Example()
    torch.cuda.synchronize()
    got: list[Tensor] = []
    threads = [threading.Thread(target=lambda: got.append(example.run())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(got) == 4
    for result in got:
        example.check(result)


def second_card_on_a_fresh_thread() -> None:
    if torch.cuda.device_count() < 2:
        return
    example = Example("cuda:1")
    free = torch.cuda.mem_get_info(0)[0]
    got: list[Tensor] = []
    thread = threading.Thread(target=lambda: got.append(example.run()))
    thread.start()
    thread.join()
    torch.cuda.synchronize(1)
    example.check(got[0])
    assert torch.cuda.mem_get_info(0)[0] >= free, "a context on the first card"


def fork_behind_build_info() -> None:
    assert se.build_info()["cuda_error"] is None
    assert not torch.cuda.is_initialized()
    child = os.fork()
    if child == 0:
        try:
            Example().run().sum().item()
        except BaseException as error:
            print(f"in the child: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "the child cannot use CUDA"


def build_info_of_the_card() -> None:
    torch.cuda.init()
    error = se.build_info()["cuda_error"]
    assert error is None, error


def many_images() -> None:
    example = Example(batch=1)
    last = example.run(example.x.expand(65537, -1, -1, -1)[:, :, :4, :4].contiguous())[-1:]
    assert torch.equal(last, example.run(example.x[:, :, :4, :4].contiguous()))


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        first_call_in_a_capture,
        graph_replays_follow_their_input,
        stream_of_its_own,
        on_fresh_threads,
        second_card_on_a_fresh_thread,
        fork_behind_build_info,
        build_info_of_the_card,
        many_images,
    )
}


def main() -> None:
    if len(sys.argv) > 1:
        CHECKS[sys.argv[1]]()
        return
    running = {
        name: subprocess.Popen(
            [sys.executable, "-m", "benchmarks.first_contact.behaviour", name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in CHECKS
    }
    until = time.monotonic() + _SECONDS
    for name, process in running.items():
        try:
            said, _ = process.communicate(timeout=max(0, until - time.monotonic()))
            ok = process.returncode == 0
        except subprocess.TimeoutExpired:
            process.kill()
            ok, said = False, f"not done in {_SECONDS:g} s"
        say(check=name, ok=ok, **({} if ok else {"what": said[-600:]}))


if __name__ == "__main__":
    main()
