"""A run's numbers, whoever wrote them, as one record under TRL's names.

What is read: a run's folder or metrics.jsonl of ours; trainer_state.json, which TRL, LLaMA-Factory and all that is built on
transformers' Trainer write, in a folder or its newest checkpoint; LLaMA-Factory's trainer_log.jsonl; CSV with a header, such as a
tracker exports; tensorboard's event files; and rows like these in any .jsonl or .json.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tpo_lib.losses import OBJECTIVES
from tpo_lib.runs.run import read_run

STEP = ("step", "global_step", "current_steps", "_step", "Step")
SIDES = ("chosen", "rejected")
KNOWN = ("loss", "grad_norm", "learning_rate", "guidance/floor_share", "skipped")
KNOWN += ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
KNOWN += ("logps/chosen", "logps/rejected", "kl/chosen", "kl/rejected")
ALIASES = {"lr": "learning_rate", "accuracy": "rewards/accuracies"}  # ours; LLaMA-Factory's
NAMES = {"sigmoid": "dpo"}  # TRL's and LLaMA-Factory's name of an objective
EXPECTED = (
    "a run's folder or metrics.jsonl, trainer_state.json or a checkpoint that holds one, trainer_log.jsonl, CSV with a "
    "header, or tensorboard's event files"
)


@dataclass(frozen=True)
class Log:
    """What a run has logged: every metric's values in the order of their steps."""

    source: str  # the file
    values: Mapping[str, list[tuple[int, float]]]  # name -> (step, value); a value may be NaN or infinite
    notes: tuple[str, ...] = ()  # what was done to the file's rows, a sentence each
    settings: Mapping[str, Any] = field(default_factory=dict)  # loss_type, beta, ... where they are known
    guessed: bool = False  # loss_type is a guess from the numbers

    @property
    def loss_type(self) -> str:
        """The objective, known or guessed."""
        return self.settings["loss_type"]

    def __contains__(self, name: str) -> bool:
        return bool(self.values.get(name))

    def rows(self, *names: str) -> tuple[np.ndarray, ...]:
        """Steps, and the values of each name, where all of them have a finite one: (n,) each."""
        columns = [{step: v for step, v in self.values.get(name, ()) if math.isfinite(v)} for name in names]
        steps = sorted(set.intersection(*map(set, columns)))
        return (np.array(steps), *(np.array([column[step] for step in steps]) for column in columns))

    def last_step(self) -> int:
        """The last step of any metric."""
        return max(entry[-1][0] for entry in self.values.values())


def read_log(path: str | Path, **given) -> Log:
    """Read a run's numbers, and what is known of its settings; `given` (loss_type, beta, ...) counts before what a folder says.

    Where a step was logged twice, as by a run that was resumed, its last value counts, and the record says so.

    Raises:
        FileNotFoundError, ValueError: there is none of the formats above, or a known metric holds no number; the place is named.
        ModuleNotFoundError: event files, and tensorboard is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; name {EXPECTED}")
    source = _find(path) if path.is_dir() else path
    ours = source.name == "metrics.jsonl"
    known, notes = _settings(path if path.is_dir() else path.parent) if ours else ({}, ())
    log = log_of(
        _read(source), str(source), **known | {name: value for name, value in given.items() if value is not None}
    )
    return replace(log, notes=(*log.notes, *notes))


def log_of(rows: Sequence[Mapping[str, Any]], source: str = "rows", **settings) -> Log:
    """The record of rows in memory, such as `TrainResult.metrics` or a trainer's `state.log_history`; errors as `read_log`."""
    values, notes = _columns(source, rows)
    if not any(name in values for name in ("loss", "eval_loss", "rewards/chosen", "eval_rewards/chosen")):
        has = ", ".join(sorted(values)[:8]) or "no number"
        raise ValueError(f"{source} holds neither loss nor rewards/chosen, but {has}; expected {EXPECTED}")
    settings = {name: NAMES.get(value, value) for name, value in settings.items()}
    if settings.get("loss_type", "dpo") not in OBJECTIVES:
        notes.append(f"{settings['loss_type']} is no objective of ours: the rules that are true of any are asked")
    log = Log(source, values, tuple(notes), settings)
    if "loss_type" in settings:
        return log
    return replace(log, settings=log.settings | {"loss_type": guess(log)}, guessed=True)


def _find(folder: Path) -> Path:
    """The file to read in a folder."""
    for name in ("metrics.jsonl", "trainer_state.json"):
        if (folder / name).is_file():
            return folder / name
    if checkpoints := list(folder.glob("checkpoint-*/trainer_state.json")):
        return max(checkpoints, key=lambda path: int(re.sub(r"\D", "", path.parent.name) or 0))
    if (folder / "trainer_log.jsonl").is_file():
        return folder / "trainer_log.jsonl"
    events = sorted({path.parent for path in folder.rglob("*tfevents*")} - {folder})
    inside = (
        [folder]
        if list(folder.glob("*tfevents*"))
        else events or sorted(p.parent for p in folder.rglob("metrics.jsonl"))
    )
    if len(inside) > 1:
        raise ValueError(f"{folder} holds several runs; name one of {', '.join(map(str, inside[:8]))}")
    if not inside:
        raise FileNotFoundError(f"{folder} holds no run's numbers; name {EXPECTED}")
    return inside[0] if events or inside[0] == folder else inside[0] / "metrics.jsonl"


def _read(path: Path) -> list[dict]:
    """The rows of a file, whatever it is."""
    if path.is_dir() or "tfevents" in path.name:
        return _events(path)
    readers: dict[str, Callable[[str], Iterable]] = {".json": _whole, ".jsonl": _lines, ".csv": _table}
    if path.suffix not in readers:
        raise ValueError(f"{path} is none of the files that are read here: {EXPECTED}")
    try:
        rows = list(readers[path.suffix](path.read_text(encoding="utf-8-sig")))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no rows of metrics; expected {EXPECTED}")
    return rows


def _whole(text: str) -> Iterable:
    content = json.loads(text)
    content = content.get("log_history", [None]) if isinstance(content, dict) else content  # transformers' TrainerState
    return content if isinstance(content, list) else [None]


def _lines(text: str) -> Iterable:
    lines = [line for line in text.splitlines() if line.strip()]
    for i, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            if i < len(lines):  # a kill may have cut the last one
                raise ValueError(f"line {i}: {error}") from error


def _table(text: str) -> Iterable:
    lines = text.splitlines()
    delimiter = max(",;\t", key="".join(lines[:1]).count)
    for row in csv.DictReader(lines, strict=True, delimiter=delimiter):
        yield {name: value for name, value in row.items() if name and value not in (None, "")}


def _events(path: Path) -> list[dict]:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{path} holds tensorboard\'s events: pip install "tpo-lib[tensorboard]"') from error
    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()  # 0: all of them
    return [{"step": e.step, tag: e.value} for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]


def canonical(name: str) -> str:
    """TRL's name of a metric.

    Example:
        >>> [canonical(name) for name in ("train/loss", "eval/rewards/chosen", "rewards_train/chosen", "loss/eval", "lr")]
        ['loss', 'eval_rewards/chosen', 'rewards/chosen', 'eval_loss', 'learning_rate']
    """
    name = re.sub(r"^(\w+?)_(train|eval)/", r"\2/\1/", name)  # the DPO authors' code: rewards_train/chosen, loss/train
    name = re.sub(r"^loss/(train|eval)$", r"\1/loss", name)
    name = re.sub(r"^train(er)?/", "", name)
    name = re.sub(r"^eval/", "eval_", name)  # transformers' trackers
    return ALIASES.get(name, name)


def _columns(path: str, rows: Sequence[Mapping]) -> tuple[dict[str, list[tuple[int, float]]], list[str]]:
    """Rows to columns; and what has to be said of them."""
    found: dict[str, dict[int, float]] = {}
    repeated: set[int] = set()
    unnumbered = 0
    for i, row in enumerate(rows, 1):
        row = {canonical(name): value for name, value in row.items()}
        named = next((row[name] for name in STEP if name in row), None)
        unnumbered += named is None
        step = int(_number(path, i, "step", i if named is None else named))
        for name, value in row.items():
            if name in STEP or (value is None and name != "grad_norm"):  # None: ours, where the norm was not finite
                continue
            number = _number(path, i, name, value)
            if number is not None:
                column = found.setdefault(name, {})
                if step in column and name.removeprefix("eval_") in KNOWN:  # trainers log `epoch` in several rows
                    repeated.add(step)
                column[step] = number
    notes = [f"{unnumbered} rows name no step: they were counted"] if unnumbered else []
    if repeated:
        where = (
            f"{min(repeated)}"
            if len(repeated) == 1
            else f"{len(repeated)} steps from {min(repeated)} to {max(repeated)}"
        )
        notes.append(f"logged more than once (a run that was resumed?): step {where}; the last value counts")
    return {name: sorted(column.items()) for name, column in found.items()}, notes


def _number(path: str, row: int, name: str, value) -> float | None:
    """A value as a number, "nan" and "inf" too; None for what is no metric of ours and no number."""
    try:
        return math.nan if value is None else float(value)
    except (TypeError, ValueError):
        if name.removeprefix("eval_") not in (*KNOWN, "step"):
            return None
        raise ValueError(f"{path}, row {row}: {name} is {str(value)[:40]!r}, which is no number") from None


def _settings(folder: Path) -> tuple[dict, tuple[str, ...]]:
    """What a run's folder of ours says of it; and of its guide."""
    try:
        record = read_run(folder)
        if record is None:
            return {}, ("no training.json beside it: settings are not known",)
        known = {"loss_type": record.config.loss_type, "lr": record.config.lr, **record.config.hyperparameters()}
        known |= {"weighted": True} if "weights" in record.start.get("token values", ()) else {}
        guide = record.start.get("guide", {}).get("name")
        trained = read_run(guide) if guide else None
    except ValueError as error:
        return {}, (f"its settings could not be read: {error}",)
    return known | ({"trained_beta": trained.config.hyperparameters().get("beta")} if trained else {}), ()


def guess(log: Log) -> str:
    """The objective, from what is logged: SFT's loss is its reward, SimPO has no reference, IPO another first loss."""
    if "guidance/floor_share" in log:
        return "tgdpo"
    prefix = "" if "loss" in log else "eval_"
    _, loss, chosen, rejected = log.rows(*(prefix + name for name in ("loss", "rewards/chosen", "rewards/rejected")))
    if not len(loss):
        # all that some logs have of the pairs, and LLaMA-Factory's the accuracy
        first = log.rows(prefix + "loss")[1][:1]
        return "dpo" if f"{prefix}rewards/accuracies" in log or np.any(abs(first - math.log(2)) < 0.01) else "sft"
    if np.allclose(loss, -chosen, rtol=0.01):
        return "sft"
    mean, margin = (chosen + rejected) / 2, abs(chosen - rejected)
    if mean[0] < -1 and margin[0] < -mean[0] / 2 and abs(mean[-1] - mean[0]) < -mean[0] / 4:
        return "simpo"
    return "ipo" if loss[0] > 2 and margin[0] < 0.5 else "dpo"


def needs_reference(loss_type: str) -> bool:
    """Whether its rewards are 0 where the policy is the reference."""
    return loss_type in OBJECTIVES and "ref_logps" in OBJECTIVES[loss_type].needs
