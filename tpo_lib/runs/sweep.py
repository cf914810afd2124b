"""The runs that notebook 00 shows without training: every objective over alpha and beta, from one start on one set of pairs.

python -m tpo_lib sweep --output data/runs.json      # resumes where it was
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from tqdm.auto import tqdm

from tpo_lib.files import store
from tpo_lib.files.load import POCKET
from tpo_lib.losses import OBJECTIVES
from tpo_lib.runs.lab import Laboratory
from tpo_lib.runs.stage import pocket_stage

RUNS = POCKET.parent / "runs.json"
STAGE = {"train_prompts": 330, "max_pairs": 512, "held_out_prompts": 96}
NAMES = ("beta", "alpha")  # what is swept
LR, UPDATES = 3e-4, 16  # at most once over the pairs
SAMPLES = 6  # kept of each run
DIGITS = 5  # significant ones kept of a figure


def grid() -> Iterator[tuple[str, float, float]]:
    """(objective, beta, alpha) of every run, as the records have it; alpha is 0 where the objective has none."""
    for name, entry in OBJECTIVES.items():
        if entry.paired:
            swept = (entry.hyperparameters[key].swept if key in entry.hyperparameters else (0.0,) for key in NAMES)
            yield from ((name, *values) for values in itertools.product(*swept))


def sweep(path: Path, *, progress: bool = True) -> dict:
    """Make every run of the grid that `path` does not hold yet; the file is complete after each of them.

    Returns:
        The file's content: {"lr", "updates", "start", "stage", "versions", "runs": [{"objective", "beta", "alpha",
        "training", "metrics", "samples"}]}.

    Raises:
        ValueError: `path` holds something else, or runs from another start or with other settings.
        CheckpointError: it is damaged.
    """
    with store.alone(path):  # a second sweep waits, and makes what is missing then
        known = _known(path)  # first: a stage is minutes of work
        lab = Laboratory(pocket_stage(**STAGE))
        content = _begin(path, known, lab)
        done = {(run["objective"], run["beta"], run["alpha"]) for run in content["runs"]}
        todo = [settings for settings in grid() if settings not in done]
        for objective, beta, alpha in tqdm(todo, desc="sweep", unit="run", disable=not progress):
            run = lab.train(lab.config(objective, beta=beta, alpha=alpha, lr=LR, updates=UPDATES))
            found = store.rounded({"training": run.rows} | run.evaluation.record(SAMPLES), DIGITS)
            content["runs"].append({"objective": objective, "beta": beta, "alpha": alpha} | found)
            lab.runs.clear()  # its policy with it
            store.write_json(path, content)
    return content


def _known(path: Path) -> dict | None:
    if not path.exists():
        return None
    known = store.read_json(path, "restore it, or remove it to make all runs anew")
    if not known.keys() >= {"lr", "updates", "start", "stage", "versions", "runs"}:
        raise ValueError(f"{path} is not the file of a sweep, and is left as it is; choose another --output")
    return known


def _begin(path: Path, known: dict | None, lab: Laboratory) -> dict:
    """The content of `path`, or that of a file without runs; what is there is of the same start and settings."""
    content = {"lr": LR, "updates": UPDATES} | store.rounded(lab.record(samples=SAMPLES), DIGITS) | {"runs": []}
    content["stage"] |= {"model": "pocket", "reward": "pocket", "judge": "pocket/judge"}
    content["stage"]["second_judge"] = "pocket/second_judge"
    if known is None:
        return content
    for name in ("start", "stage", "lr", "updates"):
        was, now = (found[name]["metrics"] if name == "start" else found[name] for found in (known, content))
        if was != now:
            raise ValueError(
                f"{path} holds runs of another sweep ({name} differs); remove it, or name another --output"
            )
    return known
