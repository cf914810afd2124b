"""The runs that notebook 00 shows without training: every objective over alpha and beta, from one start on one set of pairs.

python -m tpo_lib sweep --output data/runs.json      # resumes where it was
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tqdm.auto import tqdm

from tpo_lib.lab import Laboratory
from tpo_lib.models import POCKET
from tpo_lib.stage import pocket_stage

RUNS = POCKET.parent / "runs.json"
BETAS = (0.05, 0.1, 0.5)
ALPHAS = {"dpo": (0.0,), "tdpo1": (0.0,), "tdpo2": (0.1, 0.3, 0.5, 1.0), "tgdpo": (0.5, 1.0, 2.0)}  # 0: has none
SIMPO_BETAS = (1.0, 2.0, 4.0)  # multiply a mean over tokens, not a sum
STAGE = {"train_prompts": 330, "max_pairs": 512, "held_out_prompts": 96}
LR, UPDATES = 3e-4, 16  # at most once over the pairs
SAMPLES = 6  # kept of each run
DIGITS = 5  # significant ones kept of a figure


def grid() -> Iterator[tuple[str, float, float]]:
    """(objective, beta, alpha) of every run; alpha is 0 where the objective has none."""
    for beta in BETAS:
        for objective, alphas in ALPHAS.items():
            for alpha in alphas:
                yield objective, beta, alpha
    for beta in SIMPO_BETAS:
        yield "simpo", beta, 0.0


def sweep(path: Path, *, progress: bool = True) -> dict:
    """Make every run of the grid that `path` does not hold yet; the file is complete after each of them.

    Returns:
        The file's content: {"start", "stage", "versions", "runs": [{"objective", "beta", "alpha", "training",
        "metrics", "samples"}]}.

    Raises:
        ValueError: `path` holds runs from another start.
    """
    lab = Laboratory(pocket_stage(**STAGE))
    content = json.loads(path.read_text()) if path.exists() else {"runs": []}
    start = _short(lab.start_point())
    if content.get("start", {"metrics": start})["metrics"] != start:
        raise ValueError(f"{path} holds runs from another start (the pocket model has changed); remove it first")
    done = {(run["objective"], run["beta"], run["alpha"]) for run in content["runs"]}
    todo = [settings for settings in grid() if settings not in done]
    for objective, beta, alpha in tqdm(todo, desc="sweep", unit="run", disable=not progress):
        lab.train(lab.config(objective, beta=beta, alpha=alpha, lr=LR, updates=UPDATES), "run")
        saved = json.loads(lab.save(path.with_suffix(".part"), samples=SAMPLES).read_text())
        lab.remove("run")
        run = saved["runs"]["run"]
        found = {"objective": objective, "beta": beta, "alpha": alpha} | {
            key: _short(run[key]) for key in ("training", "metrics", "samples")
        }
        content = {
            "lr": LR,
            "updates": UPDATES,
            "start": _short(saved["start"]),
            "stage": {**saved["stage"], "model": "pocket", "reward": "pocket", "judge": "pocket/judge"},
            "versions": saved["versions"],
            "runs": [*content["runs"], found],
        }
        path.with_suffix(".part").write_text(json.dumps(content, separators=(",", ":")) + "\n")
        path.with_suffix(".part").replace(path)
    return content


def _short(value):
    """The same nest of values with every float cut to DIGITS significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _short(v) for key, v in value.items()}
    return [_short(v) for v in value] if isinstance(value, list) else value
