"""Runs the driver on small cases under a tool of compute-sanitizer: ``... sanitize PROGRAM TOOL``.

Ends with an error where the tool reports one. Only the standard library is imported.
"""

import subprocess
import sys

from benchmarks.first_contact import cases

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def main(program: str, tool: str) -> int:
    lines = "".join(cases.line(case) + "\n" for case in cases.sanitized(rehearse=False))
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", program, "check"]
    return subprocess.run(command, input=lines, text=True, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
