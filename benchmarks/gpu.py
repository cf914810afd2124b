"""Ten minutes on one GPU: `make gpu`, or `make gpu SMALL=1` on a CPU in a minute.

    python -m benchmarks.gpu [--small] [--only PART ...] [--model DIR] [--imdb DIR]

numerics     gpu_numerics.py, gpu_machinery.py: is everything computed here what it should be?
bench        gpu_bench.py: seconds, memory and share of the peak of a training step, beside the peers
experiment   gpu_experiment.py: the papers' experiment on a real small Llama
page         gpu_page.py: README.md, results.json and figures from what the other parts wrote

Every part writes PART.json into --parts as soon as a row is there, and stops at its time; a part that is finished is not
run again unless --fresh. No network is used.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import gpu_bench, gpu_device, gpu_experiment, gpu_machinery, gpu_numerics
from benchmarks.run import about
from tpo_lib.files.store import write_file

SECONDS = {"numerics": 100, "bench": 180, "experiment": 340}
HERE = Path(__file__).resolve().parent
RUNS = Path("runs/gpu")


def numerics(**how) -> Iterator[dict]:
    """Losses first, then what runs around them."""
    return itertools.chain(gpu_numerics.run(**how), gpu_machinery.run(**how))


def run_part(
    name: str, rows: Callable[..., Iterator[dict]], folder: Path, *, seconds: float, fresh: bool = False, **how
) -> dict:
    """Run one part and write what it yields, row by row; what breaks it is written down too.

    Returns:
        {"part", "about", "rows", "seconds", "finished", "problem"}, as in its file.
    """
    path = folder / f"{name}.json"
    if path.is_file() and not fresh:
        found = json.loads(path.read_text())
        if found["finished"] and found["small"] == how["small"]:
            print(f"{name}: read from {path}", flush=True)
            return found
    start = time.perf_counter()
    device = how["device"]
    part = {"part": name, "about": about() | gpu_device.about(device), "small": how["small"], "rows": []}
    part |= {"ceilings": gpu_device.ceilings(device), "finished": False, "problem": None}

    def left() -> float:
        return seconds - (time.perf_counter() - start)

    def save() -> None:
        part["seconds"] = time.perf_counter() - start
        write_file(path, json.dumps(part) + "\n")

    written = time.perf_counter()
    try:
        for row in rows(left=left, **how):
            part["rows"].append(row)
            if time.perf_counter() - written > 2:
                save()
                written = time.perf_counter()
            tell(name, row, time.perf_counter() - start)
        part["finished"] = True
    except Exception as problem:  # the other parts shall run all the same
        import traceback

        traceback.print_exc()
        part["problem"] = f"{type(problem).__name__}: {problem}"
    part["cut"] = left() <= 0
    save()
    print(f"{name}: {len(part['rows'])} rows in {part['seconds']:.0f} s -> {path}", flush=True)
    return part


def tell(name: str, row: dict, seconds: float) -> None:
    """One line for people; of the checks only those that do not hold."""
    if "holds" in row:
        if not row["holds"]:
            print(f"{name} {seconds:.0f} s: DOES NOT HOLD {json.dumps(row)}", flush=True)
        return
    short = {k: v for k, v in row.items() if isinstance(v, str | int | float) and k != "report"}
    short |= {k: row[k] for k in ("median_s", "memory_gib", "most", "agreement") if k in row}
    if "points" in row:
        short["end"] = {k: round(row["points"][-1][k]["mean"], 4) for k in ("reward", "judge", "kl")}
    if row.get("kind") == "agreement":
        short = {"kind": "agreement", "worst": max(r["error"] for r in row["rows"]),
                 "failed": [r for r in row["rows"] if not r["holds"]]}  # fmt: skip
    print(f"{name} {seconds:.0f} s: {json.dumps(short)}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny shapes; runs on a CPU in a minute")
    parser.add_argument("--only", nargs="+", choices=[*SECONDS, "page"], default=[*SECONDS, "page"], metavar="PART",
                        help="of numerics, bench, experiment, page")  # fmt: skip
    parser.add_argument("--model", help="folder of SmolLM2-135M; without it the bundled model is trained")
    parser.add_argument("--imdb", help="folder with train.parquet and test.parquet; without it there is no SFT")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="of the experiment, 0 and 1; two processes may share a GPU"
    )
    parser.add_argument("--parts", type=Path, default=RUNS, help="where each part's results go (%(default)s)")
    parser.add_argument("--out", type=Path, help="where the page goes (benchmarks/gpu; with --small runs/gpu/page)")
    parser.add_argument("--seconds", type=float, help="time of each part, instead of " + str(SECONDS))
    parser.add_argument("--fresh", action="store_true", help="run finished parts again")
    options = parser.parse_args(arguments)
    device = gpu_device.best()
    if device == "cpu" and not options.small:
        sys.exit("no GPU here: make gpu SMALL=1 runs a small form on the CPU")
    options.parts.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 is to mean float32
    parts = {"numerics": numerics, "bench": gpu_bench.run, "experiment": gpu_experiment.run}
    for name, rows in parts.items():
        if name in options.only:
            more = (
                {"model": options.model, "imdb": options.imdb, "seeds": options.seeds} if name == "experiment" else {}
            )
            run_part(
                name, rows, options.parts, seconds=options.seconds or SECONDS[name], fresh=options.fresh,
                device=device, small=options.small, **more,
            )  # fmt: skip
    if "page" in options.only:
        from benchmarks import gpu_page

        out = options.out or (options.parts / "page" if options.small else HERE / "gpu")
        gpu_page.write(options.parts, out)


if __name__ == "__main__":
    main()
