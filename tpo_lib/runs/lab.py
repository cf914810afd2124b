"""A laboratory for training runs: one after another from one start, kept with their curves, figures and samples.

lab = Laboratory(pocket_stage())
run = lab.train(lab.config("tdpo2", beta=0.1, alpha=0.3, lr=3e-4, updates=10))
lab.save("lab.json")
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from tpo_lib.config import TrainConfig, known_hyperparameters
from tpo_lib.files import store
from tpo_lib.losses import OBJECTIVES
from tpo_lib.models import frozen_copy
from tpo_lib.runs import runs
from tpo_lib.runs.presets import PRESETS
from tpo_lib.runs.runs import Trained
from tpo_lib.runs.stage import Stage


class Laboratory:
    """Runs on one stage, by name."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        mine = (preset.train for preset in PRESETS.values() if preset.model == stage.config.model)
        self.base = next(mine, PRESETS["pocket"].train)  # what a run has where it is told nothing else
        self.runs: dict[str, Trained] = {}  # in the order they were made; ended runs alone
        self.start = stage.evaluate(stage.start)
        self._guides: dict[tuple[TrainConfig, bool], torch.nn.Module] = {}  # swapped or not

    def config(self, loss_type: str, *, lr: float, updates: int, **settings) -> TrainConfig:
        """Settings of a run of so many updates on the stage's pairs; ValueError names a value out of range.

        `settings` are hyperparameters of any objective, of which this one takes its own, and others of TrainConfig.
        """
        base = self.base
        size = settings.get("batch_size", base.batch_size) * settings.get("accumulation", base.accumulation)
        per_epoch = max(1, len(self.stage.pairs) // size)
        idle = known_hyperparameters().keys() - OBJECTIVES[loss_type].hyperparameters.keys()
        given = {"guide_beta": base.beta, "device": self.stage.config.device} | settings
        taken = {name: value for name, value in given.items() if name not in idle}
        return runs.override(
            base, loss_type=loss_type, lr=lr, warmup_steps=min(5, updates // 2), max_length=self.stage.config.max_length,
            max_steps=updates, epochs=-(-updates // per_epoch), log_every=1, **taken,
        )  # fmt: skip

    def train(
        self,
        config: TrainConfig,
        name: str | None = None,
        *,
        swapped: bool = False,
        guide_trained_at: float | None = None,
        on_log: runs.OnLog = lambda run: None,
        on_stage: Callable[[str], None] = lambda words: None,
    ) -> Trained:
        """Train from the start, its guide first where it needs one, evaluate on the held-out prompts and keep the run.

        Two mistakes can be made on purpose; the run's `mistakes` name them.

        Args:
            swapped: chosen and rejected change places in all training pairs, the guide's too; the held-out pairs stay.
            guide_trained_at: beta of the DPO run that guides, in the place of the guide_beta that it is read with.
            on_log: called after every update; returns True to stop.
            on_stage: called with a few words when something else begins.

        Raises:
            ValueError: the name is taken, or a guide is spoken of that the objective does not need.
        """
        guided = "guide_logps" in OBJECTIVES[config.loss_type].needs
        if guide_trained_at is not None and not guided:
            raise ValueError(f"guide_trained_at={guide_trained_at:g}: {config.loss_type} has no guide; leave it out")
        teacher = runs.override(runs.guide_settings(config), beta=guide_trained_at)
        mistakes = ["labels swapped"] * swapped
        if teacher != runs.guide_settings(config):
            mistakes.append(f"guide trained at {guide_trained_at:g}")
        name = name or self.free_name(" ".join([runs.words(config), *mistakes]))
        if name in self.runs:
            raise ValueError(f"there is a run {name!r} already; rename or remove it, or choose another name")
        guide = self._guide(teacher, swapped, on_log, on_stage) if guided else None
        if guided and guide is None:
            return Trained(config, stopped=True)
        on_stage(f"training {name}")
        run = runs.train(config, *self._fresh(swapped), guide=guide, on_log=on_log)
        run.mistakes = mistakes
        if run.updates:
            on_stage(f"evaluating {name}")
            run.evaluation = self.stage.evaluate(run.policy, config, guide=guide)
            self.runs[name] = run
        return run

    def _fresh(self, swapped: bool) -> tuple:
        """What a run begins with, as the stage has it or with chosen and rejected in each other's place."""
        policy, reference, pairs = self.stage.fresh()
        if swapped:
            pairs = [replace(pair, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids) for pair in pairs]
        return policy, reference, pairs

    def _guide(self, settings: TrainConfig, swapped: bool, on_log, on_stage) -> torch.nn.Module | None:
        if (settings, swapped) not in self._guides:
            on_stage(f"training the DPO guide, beta {settings.beta:g}")
            run = runs.train(settings, *self._fresh(swapped), on_log=on_log)
            if run.stopped:
                return None
            self._guides[settings, swapped] = frozen_copy(run.policy)
        return self._guides[settings, swapped]

    def free_name(self, base: str) -> str:
        """A name that no run has, `base` or with a number behind it: "tdpo2 β0.1 α0.5 (2)"."""
        names = [base, *(f"{base} ({i})" for i in range(2, len(self.runs) + 3))]
        return next(name for name in names if name not in self.runs)

    def rename(self, old: str, new: str) -> None:
        """Give a run another name; the order stays. ValueError where the new name is empty or taken."""
        if not new.strip() or (new != old and new in self.runs):
            raise ValueError(f"cannot rename {old!r} to {new!r}: the name is {'taken' if new.strip() else 'empty'}")
        self.runs = {new if name == old else name: run for name, run in self.runs.items()}

    def remove(self, name: str) -> None:
        """Forget a run."""
        del self.runs[name]

    def points(self) -> dict[str, tuple[str, dict]]:
        """{name: (objective, {metric: {mean, low, high, n}})}, as `plots.run_points` takes them."""
        return {name: (run.config.loss_type, run.evaluation.record(0)["metrics"]) for name, run in self.runs.items()}

    def start_point(self) -> dict:
        """The start's metrics, {metric: {mean, low, high, n}}."""
        return self.start.record(0)["metrics"]

    def save(self, path: str | Path, *, samples: int | None = None) -> Path:
        """Write `record` as JSON; returns the path."""
        path = Path(path)
        store.write_file(path, json.dumps(self.record(samples=samples), indent=1) + "\n")
        return path

    def record(self, *, samples: int | None = None) -> dict:
        """Every run with so many samples (None: all), the start, the stage and the versions, as JSON has them."""
        return {
            "start": self.start.record(samples),
            "runs": {name: run.record(samples) for name, run in self.runs.items()},
            "stage": asdict(self.stage.config),
            "versions": runs.versions(),
        }
