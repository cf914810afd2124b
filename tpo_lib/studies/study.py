"""A study from its file to its result: tune, choose, report. `run` goes on where it was, since every run is kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tpo_lib.files import store
from tpo_lib.studies import endpoints, execute
from tpo_lib.studies.pool import make_all
from tpo_lib.studies.spec import FOLDER, Study

AREA = 1.0, 20.0  # nats, what settings are chosen by


def run(name: str, *, runs: Path, folder: Path = FOLDER, **how) -> dict:
    """Make the runs of a study that are missing, and write its result.

    Args:
        name: of its file, folder/NAME.toml.
        runs: where runs are kept.
        how: of `pool.make_all`: engine, workers, progress.
    """
    study = Study.read(folder / f"{name}.toml")
    tuning = study.tuning()
    make_all([spec for *_, spec in tuning], runs, **how)
    grid = [(method.name, setting, score(execute.read(spec, runs))) for method, setting, spec in tuning]
    chosen = choose(study, grid, folder)
    reporting = study.reporting(chosen)
    make_all([spec for *_, spec in reporting], runs, **how)
    return {"grid": grid, "chosen": chosen, "reporting": reporting}


def score(record: Mapping) -> float:
    """The area under a run's curve of rewards, by which settings are chosen."""
    return endpoints.area(record["points"], "reward", *AREA).mean().item()


def choose(study: Study, grid: list[tuple[str, dict, float]], folder: Path) -> dict[str, tuple[str, dict]]:
    """{label: (method, setting)} of all that is reported."""
    chosen: dict[str, tuple[str, dict]] = {}
    best: dict[str, dict] = {}
    for method in study.methods:
        mine = [(points, setting) for name, setting, points in grid if name == method.name]
        if method.tuned:
            other, _, label = method.tuned.partition(": ")
            known = store.read_json(folder / "results" / f"{other}.json", f"run `study {other}` first")["chosen"]
            best[method.name] = known[label][1] | method.fixed
        elif method.like:
            best[method.name] = best[method.like] | method.fixed
        elif not method.grid:
            (best[method.name],) = method.settings()
        else:
            best[method.name] = max(mine, key=lambda each: each[0])[1]
        for value in method.grid.get(method.each, ()) if method.each else ():
            found = max((each for each in mine if each[1][method.each] == value), key=lambda each: each[0])[1]
            chosen[f"{method.name} {method.each} {value:g}"] = method.name, found
        if not method.each:
            chosen[method.name] = method.name, best[method.name]
    return chosen


def write(path: Path, content: dict) -> None:
    """Write a result, a line a run, so that a change is seen where it is."""
    store.write_file(path, json.dumps(content, indent=None) + "\n")
