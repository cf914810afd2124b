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
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks import gpu_bench, gpu_experiment, gpu_machinery, gpu_numerics
from benchmarks.measure import interleave
from benchmarks.run import HERE, about
from tpo_lib.files.store import write_file

SECONDS = {"numerics": 100, "bench": 180, "experiment": 340}
DATASHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "T4": 65e12}  # dense 16-bit FLOP/s


def numerics(**how) -> Iterator[dict]:
    """Losses first, then what runs around them."""
    return itertools.chain(gpu_numerics.run(**how), gpu_machinery.run(**how))


def ceilings(device: str) -> dict[str, float | None]:
    """The two rates nothing can pass: a large bf16 product (FLOP/s) and a large copy (bytes read and written a second)."""
    n = 8192 if device == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2**28 if device == "cuda" else 2**20, device=device)
    target = torch.empty_like(source)
    tries = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    for call in tries.values():
        call()  # to warm up
    seconds = {name: statistics.median(t["wall_s"]) for name, t in interleave(tries, 20, device).items()}
    card = torch.cuda.get_device_name() if device == "cuda" else ""
    sheet = next((rate for key, rate in DATASHEET.items() if key in card), None)
    rates = {"product_flops": 2 * n**3 / seconds["product"], "copy_bytes": 2 * source.nbytes / seconds["copy"]}
    return rates | {"datasheet_flops": sheet}


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
    start = written = time.perf_counter()
    part = {"part": name, "about": about(), "small": how["small"], "rows": [], "ceilings": ceilings(how["device"])}
    part |= {"finished": False, "problem": None}

    def spent() -> float:
        return time.perf_counter() - start

    def save() -> None:
        part["seconds"] = spent()
        write_file(path, json.dumps(part) + "\n")

    try:
        for row in rows(left=lambda: seconds - spent(), **how):
            part["rows"].append(row)
            if time.perf_counter() - written > 2:
                save()
                written = time.perf_counter()
            tell(f"{name} {spent():.0f} s", row)
        part["finished"] = True
    except Exception as problem:  # the other parts shall run all the same
        traceback.print_exc()
        part["problem"] = f"{type(problem).__name__}: {problem}"
    part["cut"] = spent() >= seconds
    save()
    print(f"{name}: {len(part['rows'])} rows in {part['seconds']:.0f} s -> {path}", flush=True)
    return part


def tell(place: str, row: dict) -> None:
    """One line for people; of the checks only those that do not hold."""
    if row.get("holds"):
        return
    told = ("median_s", "memory_gib", "most", "agreement")
    short = {k: v for k, v in row.items() if k in told or (isinstance(v, str | int | float) and k != "report")}
    if "points" in row:
        short["end"] = {k: round(row["points"][-1][k]["mean"], 4) for k in ("reward", "judge", "kl")}
    if row.get("kind") == "agreement":
        short["worst"] = max(r["error"] for r in row["rows"])
        short["failed"] = [r for r in row["rows"] if not r["holds"]]
    print(f"{place}: {'DOES NOT HOLD ' * ('holds' in row)}{json.dumps(short)}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    flag, all_parts = parser.add_argument, [*SECONDS, "page"]
    flag("--small", action="store_true", help="tiny shapes; runs on a CPU in a minute")
    flag("--only", nargs="+", choices=all_parts, default=all_parts, metavar="PART", help="of " + ", ".join(all_parts))
    flag("--model", help="folder of SmolLM2-135M; without it the bundled model is trained")
    flag("--imdb", help="folder with train.parquet and test.parquet; without it there is no SFT")
    flag("--seeds", type=int, nargs="+", help="of the experiment, 0 and 1; two processes may share a GPU")
    flag("--parts", type=Path, default=Path("runs/gpu"), help="where each part's results go (%(default)s)")
    flag("--out", type=Path, help="where the page goes (benchmarks/gpu; with --small runs/gpu/page)")
    flag("--seconds", type=float, help=f"time of each part, instead of {SECONDS}")
    flag("--fresh", action="store_true", help="run finished parts again")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.small:
        sys.exit("no GPU here: make gpu SMALL=1 runs a small form on the CPU")
    options.parts.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 is to mean float32
    more = {"model": options.model, "imdb": options.imdb, "seeds": options.seeds}
    parts = {"numerics": numerics, "bench": gpu_bench.run, "experiment": partial(gpu_experiment.run, **more)}
    for name, rows in parts.items():
        if name in options.only:
            how = {"seconds": options.seconds or SECONDS[name], "fresh": options.fresh}
            run_part(name, rows, options.parts, device=device, small=options.small, **how)
    if "page" in options.only:
        from benchmarks import gpu_page

        gpu_page.write(options.parts, options.out or (options.parts / "page" if options.small else HERE / "gpu"))


if __name__ == "__main__":
    main()
