"""Many runs side by side: processes of this machine, or a Ray cluster. A run that is there already is not made again.

A run is a function of its spec that writes a folder of its own, so every engine makes the same files, and a worker that is
killed costs the run that it was at: it is made again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from tqdm.auto import tqdm

from tpo_lib.studies.execute import execute, record_path

ENGINES = ("pool", "ray")
TRIES = 3  # of a run whose worker died
UPDATE, EVALUATION = 1.0, 5.5  # core-seconds on the pocket model: the bar's weights, and of no consequence else


def work(spec: dict) -> float:
    """About how long a run takes, in core-seconds of the pocket model."""
    updates = spec["evaluate"]["at"][-1] + spec.get("guide", {}).get("max_steps", 0) / 4  # a guide serves several
    return updates * UPDATE + len(spec["evaluate"]["at"]) * spec["evaluate"]["samples"] / 2 * EVALUATION


def make_all(
    specs: Sequence[dict], folder: Path, *, engine: str = "pool", workers: int | None = None, progress: bool = True
) -> None:
    """Make every run that is not there, with a bar of the work that is left.

    Args:
        engine: "pool", processes of this machine; "ray", the cluster that RAY_ADDRESS names, or one on this machine.
        workers: runs side by side; None takes as many as there are cores, or of Ray as many as its cluster has room for.

    Raises:
        ValueError: the engine is unknown, or what a run raises, with its spec named.
        RuntimeError: a run killed its worker three times.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is unknown; choose one of {', '.join(ENGINES)}")
    todo = {str(record_path(spec, folder)): spec for spec in specs if not record_path(spec, folder).exists()}
    total, done = sum(map(work, specs)), sum(map(work, specs)) - sum(map(work, todo.values()))
    shown = {"desc": "runs", "unit": "core-s", "unit_scale": True, "disable": not progress}
    run = _pool if engine == "pool" else _ray
    with tqdm(total=round(total), initial=round(done), **shown) as bar:
        for spec in run(list(todo.values()), folder, workers):
            bar.update(round(work(spec)))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pool(specs: list[dict], folder: Path, workers: int | None) -> Iterator[dict]:
    """Make the runs, and yield each when it is done; a pool that a killed worker broke is begun anew with what is left."""
    tries = 0
    while specs:
        with ProcessPoolExecutor(workers or cores(), mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(execute, spec, folder): spec for spec in specs}
            try:
                for future in _as_completed(futures):
                    _result(future, futures[future])
                    specs.remove(futures[future])
                    yield futures[future]
                    tries = 0
            except BrokenProcessPool as error:
                tries += 1
                if tries == TRIES:
                    raise RuntimeError(
                        f"a worker was killed {TRIES} times in a row (is there memory for {workers}?)"
                    ) from error
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def _as_completed(futures: dict[Future, dict]) -> Iterator[Future]:
    left = set(futures)
    while left:
        done, left = wait(left, return_when=FIRST_COMPLETED)
        yield from done


def _result(future: Future, spec: dict) -> None:
    try:
        future.result()
    except BrokenProcessPool:
        raise
    except Exception as error:
        raise ValueError(f"the run {spec} failed: {type(error).__name__}: {error}") from error
