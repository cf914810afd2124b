"""Run sections one by one; results.json and README.md are written after each, so a killed run keeps what it had."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from benchmarks import contestants, goals, loops, report, sections
from tpo_lib.files.store import read_json

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "trl", "liger-kernel", "numpy")


def run(
    folder: Path | None = None,
    *,
    quick: bool = False,
    only: Sequence[str] = (),
    labels: Sequence[str] = (),
    memory: bool = True,
    repetitions: int | None = None,
    model: str | None = None,
) -> dict:
    """Measure, print, and write results.json, README.md and scaling.png.

    Args:
        folder: where they go; None is this folder, or runs/bench if the measurement is not the whole one (`quick`).
        quick: about three minutes instead of two hours.
        only: beginnings of section names; the other sections keep what results.json has.
        labels: contestants to measure beside the textbook; what was measured is printed, not written.
        memory: measure peak memory too.
        repetitions: rounds of timing; None is 4, or 2 with `quick`.
        model: folder of SmolLM2-135M's weights; None takes them where `tpo_lib get` left them, else random ones.

    Raises:
        ValueError: no section or contestant is called so.
        FileExistsError: the folder's README.md is another's.
        measure.Disagreement: a contestant computes something else.
    """
    folder = folder or (Path("runs/bench") if quick else HERE)
    repetitions = repetitions or (2 if quick else 4)
    plan = sections.Plan(quick=quick, repetitions=repetitions, labels=tuple(labels), memory=memory, model=model)
    todo = sections.every(plan)
    there = sorted({label for entries in (*contestants.CONTESTANTS.values(), loops.LOOPS) for label in entries})
    for what, names, known, fits in (
        ("section", only, todo, str.startswith),
        ("contestant", labels, there, str.__eq__),
    ):
        unknown = [name for name in names if not any(fits(each, name) for each in known)]
        if unknown:
            raise ValueError(f"no {what} is called {' or '.join(unknown)}; there are {', '.join(known)}")
    path, page, keep = folder / "results.json", folder / "README.md", not labels
    if keep and page.exists() and not path.is_file():
        raise FileExistsError(f"{page} is not of these benchmarks, and would be replaced; choose another folder")
    results = read_json(path, "remove it") if only and keep and path.is_file() else {"sections": {}}
    results["about"] = about()
    for name in [name for name in todo if not only or name.startswith(tuple(only))]:
        start, load = time.perf_counter(), os.getloadavg()[0]
        found = todo[name]()
        found |= {"seconds": time.perf_counter() - start, "load": [load, os.getloadavg()[0]], "commit": commit()}
        results["sections"][name] = found
        results["goals"] = goals.evaluate(results["sections"])
        print(f"\n{name} ({found['seconds']:.0f} s, load {load:.1f})\n{report.section_text(found)}", flush=True)
        if keep:
            report.write(results, folder)
        gc.collect()
    print(f"\n{report.goals_table(results['goals'])}")
    if keep:
        print(f"\nwritten: {path} and {page}")
    return results


def about() -> dict:
    """Machine, versions and settings that the numbers belong to."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    card = gpu and {
        "gpu_gib": round(gpu.total_memory / 2**30, 1),
        "multiprocessors": gpu.multi_processor_count,
        "capability": f"{gpu.major}.{gpu.minor}",
        "cuda": torch.version.cuda,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": commit(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpu": gpu and gpu.name,
        "system": platform.platform(),
        "versions": versions,
    } | (card or {})


def commit() -> str | None:
    """The commit that is checked out, with "+" where files differ from it; None without git or a repository."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=HERE.parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "tpo_lib", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
