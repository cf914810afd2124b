"""Trackers of the metrics, through accelerate's: `--report-to tensorboard`, `wandb` or `trackio`; their packages are extras."""

from __future__ import annotations

import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from tpo_lib.config import TrainConfig

PROJECT = "tpo-lib"  # on wandb (WANDB_PROJECT names another) and trackio


def check_tracker(config: TrainConfig) -> None:
    """Refuse, before anything is loaded, a tracker that could not begin.

    Raises:
        ModuleNotFoundError: its package is not installed.
        ValueError: it writes below output_dir, and there is none.
    """
    name = config.report_to
    if name and name not in map(str, get_available_trackers()):
        raise ModuleNotFoundError(f'--report-to {name} needs its package: pip install "tpo-lib[{name}]"')
    if name == "tensorboard" and config.output_dir is None:
        raise ValueError("report_to='tensorboard' writes its events below output_dir; name one")


def begin_tracker(accelerator: Accelerator, config: TrainConfig, run: str) -> None:
    """Begin the tracker's run, or go on with it; `run` is its id, new for every training run."""
    folder = config.output_dir and Path(config.output_dir).resolve()
    name = "/".join(folder.parts[-2:]) if folder else config.loss_type  # a comparison's runs are told apart: pocket/dpo
    given = {
        "wandb": {"id": run, "name": name, "resume": "allow"},
        "trackio": {"name": f"{name} {run}", "resume": "allow"},  # it knows a run by its name alone
    }
    project = "tensorboard" if config.report_to == "tensorboard" else os.environ.get("WANDB_PROJECT", PROJECT)
    told = {k: v for k, v in config.to_dict().items() if isinstance(v, int | float | str)}
    try:
        accelerator.init_trackers(project, told, given)
    except BaseException:
        accelerator.trackers.clear()  # those that have not begun cannot be finished
        raise
