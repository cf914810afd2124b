"""python -m benchmarks: time and memory beside TRL and Liger (= make bench)."""

from __future__ import annotations

from argparse import BooleanOptionalAction
from collections.abc import Sequence
from pathlib import Path

from benchmarks import run
from tpo_lib.cli import call
from tpo_lib.parser import COUNT, Parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = Parser(prog="python -m benchmarks", description="Time and memory beside TRL and Liger (two hours).")
    parser.add_argument("--quick", action="store_true", help="fewer sections and pairs, about three minutes")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="sections whose names begin so")
    words = "only these; nothing is written"
    parser.add_argument("--contestants", nargs="+", default=(), metavar="NAME", dest="labels", help=words)
    parser.add_argument("--memory", action=BooleanOptionalAction, default=True, help="measure memory too")
    parser.add_argument("--repetitions", type=COUNT, help="rounds of timing (default: 4, quick: 2)")
    words = "folder of SmolLM2-135M (default: where `tpo_lib get smollm2-135m` left it, else its shape)"
    parser.add_argument("--model", metavar="DIR", help=words)
    parser.add_argument("--output", type=Path, help="folder to write (default: benchmarks, quick: runs/bench)")
    flags = ("quick", "only", "labels", "memory", "repetitions", "model")
    parser.set_defaults(function=lambda o: run.run(o.output, **{name: getattr(o, name) for name in flags}))
    call(parser, arguments)


if __name__ == "__main__":
    main()
