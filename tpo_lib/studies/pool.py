"""Many runs side by side: processes of this machine, or a Ray cluster. A run that is there already is not made again.

A run is a function of its spec that writes a folder of its own, so every engine makes the same files, and a worker that is
killed costs the run that it was at: it is made again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

from tqdm.auto import tqdm

from tpo_lib.files import store
from tpo_lib.models import choose_device
from tpo_lib.studies.execute import execute, key, read, record_path

ENGINES = ("pool", "ray")
TRIES = 3  # of a run whose worker died
GPU_SHARE = 0.25  # of a GPU that a run takes in a cluster that has some: small models leave it idle
STORE = 100 * 2**20  # bytes of Ray's object store: records are small
UPDATE, EVALUATION = 1.0, 5.5  # core-seconds on the pocket model: the bar's weights, and of no consequence else


def work(spec: dict) -> float:
    """About how long a run takes, in core-seconds of the pocket model."""
    updates = spec["evaluate"]["at"][-1] + spec.get("guide", {}).get("max_steps", 0) / 4  # a guide serves several
    return updates * UPDATE + len(spec["evaluate"]["at"]) * spec["evaluate"]["samples"] / 2 * EVALUATION


def make_all(
    specs: Sequence[dict],
    folder: Path,
    *,
    engine: str = "pool",
    workers: int | None = None,
    num_gpus: float | None = None,
    progress: bool = True,
) -> None:
    """Make every run that is not there, with a bar of the work that is left.

    Args:
        engine: "pool", processes of this machine; "ray", the cluster that RAY_ADDRESS names, or one on this machine.
        workers: runs side by side; None takes one on a GPU, else as many as there are cores, or of Ray as many as its cluster
            has room for.
        num_gpus: of a Ray cluster that has GPUs, what a run takes of one, or how many; None takes GPU_SHARE.

    Raises:
        ValueError: the engine is unknown, or knows no num_gpus; a host computes on another kind of device than this one; or
            what a run raises, with its spec named.
        RuntimeError: a run killed its worker three times.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is unknown; choose one of {', '.join(ENGINES)}")
    if num_gpus is not None and engine != "ray":
        raise ValueError(
            f"num_gpus={num_gpus} is what a run takes of a cluster: engine ray knows it, {engine} does not"
        )
    todo = {str(record_path(spec, folder)): spec for spec in specs if not record_path(spec, folder).exists()}
    total, done = sum(map(work, specs)), sum(map(work, specs)) - sum(map(work, todo.values()))
    shown = {"desc": "runs", "unit": "core-s", "unit_scale": True, "disable": not progress}
    run = _pool if engine == "pool" else partial(_ray, num_gpus=num_gpus)
    with tqdm(total=round(total), initial=round(done), **shown) as bar:
        for spec in run(list(todo.values()), folder, workers):
            bar.update(round(work(spec)))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pool(specs: list[dict], folder: Path, workers: int | None) -> Iterator[dict]:
    """Make the runs, and yield each when it is done; a pool that a killed worker broke is begun anew with what is left."""
    tries, workers = 0, workers or (cores() if choose_device().type == "cpu" else 1)
    while specs:
        how = {"mp_context": get_context("spawn"), "initializer": _die_with_parent}
        with ProcessPoolExecutor(workers, **how) as pool:
            futures = {pool.submit(execute, spec, folder): spec for spec in specs}
            try:
                for future in _as_completed(futures):
                    _told(future.result, futures[future])
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


def _die_with_parent() -> None:
    """Let a worker end with the process that asked for its run: a killed one would leave it at work, its runs locked."""

    def wait_for_it() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=wait_for_it, daemon=True).start()


def _as_completed(futures: dict[Future, dict]) -> Iterator[Future]:
    left = set(futures)
    while left:
        done, left = wait(left, return_when=FIRST_COMPLETED)
        yield from done


def _told(result: Callable, spec: dict):
    """The result of a run; its spec is named where it failed."""
    try:
        return result()
    except BrokenProcessPool:
        raise
    except Exception as error:
        raise ValueError(f"the run {spec} failed: {type(error).__name__}: {error}") from error


def _ray(specs: list[dict], folder: Path, workers: int | None, num_gpus: float | None) -> Iterator[dict]:
    """The same on a Ray cluster; a host that shares no folder with this one sends its records here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ImportError("engine ray needs the package: pip install tpo-lib[ray]") from error
    here = {"include_dashboard": False, "object_store_memory": STORE, "num_cpus": workers or cores()}
    cluster = {"address": os.environ["RAY_ADDRESS"]} if os.environ.get("RAY_ADDRESS") else here
    ray.init(**cluster, log_to_driver=False, logging_level="ERROR")
    try:
        share = GPU_SHARE if num_gpus is None else num_gpus
        gpus = share if ray.cluster_resources().get("GPU") else 0
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=TRIES)(_record)
        pending = {remote.remote(execute, spec, str(folder.absolute()), key(spec)): spec for spec in specs}
        while pending:
            (ready,), _ = ray.wait(list(pending))
            spec = pending.pop(ready)
            path, record = record_path(spec, folder), _told(partial(ray.get, ready), spec)
            if not path.exists():
                store.write_json(path, record)
            yield spec
    finally:
        ray.shutdown()


def _record(make: Callable, spec: dict, folder: str, called: str) -> dict:
    if key(spec) != called:  # its name, which says so where a GPU makes it
        raise ValueError(
            f"this host would make it on {choose_device().type}, the one that asks for it would not, and their samples "
            "differ: set CUDA_VISIBLE_DEVICES alike on both"
        )
    make(spec, Path(folder))
    return read(spec, Path(folder))
