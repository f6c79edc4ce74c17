"""The command line: ``python -m shufflenet_ext demo | info | bench``."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from shufflenet_ext import build_info


def _as_text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected at least 1")
    return value


def _info(arguments: argparse.Namespace) -> int:
    if torch.cuda.is_available():
        torch.cuda.init()  # so that the cards are asked, too
    info = build_info()
    if arguments.json:
        print(json.dumps(info, indent=2))
        return 0
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # the extra is not installed: the same, plain
        for key, value in info.items():
            print(f"{key:<14}{_as_text(value)}")
        return 0
    table = Table(show_header=False)
    for key, value in info.items():
        table.add_row(key, _as_text(value))
    Console().print(table)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from shufflenet_ext import demo
    except ModuleNotFoundError as error:
        print(f"The demo needs {error.name}: pip install 'shufflenet_ext[demo]'", file=sys.stderr)
        return 1
    return demo.run(arguments.output, arguments.epochs)


def _bench(arguments: argparse.Namespace) -> int:
    for root in (Path.cwd(), Path(__file__).resolve().parent.parent):
        if (root / "benchmarks" / "__main__.py").is_file() and (root / "csrc").is_dir():
            return subprocess.call([sys.executable, "-m", "benchmarks", *arguments.rest], cwd=root)
    print("The benchmark suite is not installed with the package: run bench in a checkout's folder.", file=sys.stderr)
    return 1


def main(argv: list[str] | None = None) -> int:
    """Runs the command that ``argv`` (by default the process's arguments) names; returns the exit status."""
    parser = argparse.ArgumentParser(prog="shufflenet_ext", description="ShuffleNet v1 units as fused native kernels.")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="train on handwritten digits and compare the ways to run the network")
    demo.add_argument("--output", type=Path, default=Path("shufflenet_ext_demo.png"), help="the picture (%(default)s)")
    demo.add_argument("--epochs", type=_positive, default=5, help="of training (%(default)s)")
    demo.set_defaults(run=_demo)

    info = commands.add_parser("info", help="what is installed and in use")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=_info)

    bench = commands.add_parser(
        "bench",
        help="run the benchmark suite of a checkout (its own arguments, such as --help, may follow)",
        add_help=False,
    )
    bench.set_defaults(run=_bench)

    arguments, rest = parser.parse_known_args(argv)
    arguments.rest = rest
    if rest and arguments.run is not _bench:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments.run(arguments)
