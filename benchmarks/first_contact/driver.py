"""Gives a set of cases to the torch-free driver: ``python -m benchmarks.first_contact.driver PROGRAM MODE CASES``.

Prints the driver's answers. Where it ends, or a case takes too long, that case is a failure, and a new driver goes on
behind it. Only the standard library is imported.
"""

import argparse
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator

from benchmarks.first_contact import cases

_SECONDS_A_CASE = 20.0  # more than any takes, the start of the driver included, also under a sanitizer
_MOST_LOST = 5  # drivers, after which the rest is left alone: each may have taken a case's whole time


def answers(command: list[str], lines: list[str], seconds: float = _SECONDS_A_CASE) -> Iterator[str]:
    """The driver's answer to each line, or a failure in its place. Raises RuntimeError where too many are lost."""
    done = lost = 0
    while done < len(lines):
        for answer in _of_a_process(command, lines[done:], seconds):
            done += 1
            yield answer
        if done < len(lines):
            cause = f"the driver ended, or took more than {seconds:g} s"
            yield json.dumps({"case": lines[done], "ok": False, "what": cause})
            done += 1
            lost += 1
            if lost == _MOST_LOST:
                raise RuntimeError(f"{lost} cases ended the driver; {len(lines) - done} are left")


def _of_a_process(command: list[str], lines: list[str], seconds: float) -> Iterator[str]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    source, target = process.stdin, process.stdout
    said: queue.Queue[str] = queue.Queue()

    def write() -> None:
        try:
            source.write("\n".join(lines) + "\n")
            source.close()
        except BrokenPipeError:  # the driver has ended, which its output says
            return

    def read() -> None:
        for text in target:
            said.put(text.rstrip())
        said.put("")

    for work in (write, read):
        threading.Thread(target=work, daemon=True).start()
    answered = 0
    try:
        while answered < len(lines):
            text = said.get(timeout=seconds)
            if text.startswith("{"):
                answered += 1
                yield text
            elif text:
                print(text, file=sys.stderr)
            else:
                return
    except queue.Empty:
        return
    finally:
        process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_contact.driver", description=__doc__)
    parser.add_argument("program")
    parser.add_argument("mode", choices=["check", "time", "copy", "once"])
    parser.add_argument("cases", choices=cases.SETS)
    parser.add_argument("--rehearse", action="store_true", help="small units in their place")
    options = parser.parse_args()
    lines = [cases.line(case) for case in cases.SETS[options.cases](options.rehearse)]
    for answer in answers([options.program, options.mode], lines):
        row = json.loads(answer)
        if "does not fit" in row.get("what", ""):  # a cut that no block has the memory or the warps for is no failure
            row["ok"] = None
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
