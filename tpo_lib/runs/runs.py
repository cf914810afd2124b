"""Runs of training, in memory or in a folder, and the one place where policies and guides are made."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from tpo_lib.config import TrainConfig
from tpo_lib.data import EncodedPair
from tpo_lib.evaluation import Evaluation
from tpo_lib.files import adapters, folders
from tpo_lib.files.load import load_model
from tpo_lib.losses import OBJECTIVES
from tpo_lib.models import frozen_copy
from tpo_lib.runs.run import ADAPTER, adapter_base, fit, read_run


@dataclass
class Trained:
    """A run of training, ended or under way."""

    config: TrainConfig
    rows: list[dict] = field(default_factory=list)  # so far, names as in metrics.jsonl
    stopped: bool = False  # ended before its last update
    policy: torch.nn.Module | None = None  # when the run has ended
    evaluation: Evaluation | None = None  # where it was made
    mistakes: list[str] = field(default_factory=list)  # made on purpose, of which its config says nothing

    @property
    def updates(self) -> int:
        """Updates made so far."""
        return self.rows[-1]["step"] if self.rows else 0

    def record(self, samples: int | None = None) -> dict:
        """{"config", "stopped", "training", "metrics", "samples"} as JSON has them, "mistakes" if any; None: all samples."""
        made = {"config": self.config.to_dict(), "stopped": self.stopped, "training": self.rows}
        made |= {"mistakes": self.mistakes} if self.mistakes else {}
        return made | self.evaluation.record(samples)


OnLog = Callable[[Trained], bool | None]


def train(
    config: TrainConfig,
    policy,
    reference,
    pairs: Sequence[EncodedPair],
    *,
    on_log: OnLog = lambda run: None,
    progress: bool = False,
    **more,
) -> Trained:
    """`fit` of one run; with `config.output_dir` it goes on where it was, without one it stays in memory.

    `on_log`, called at every row of metrics, returns True to stop; `more` is `fit`'s guide, tokenizer, fast, callbacks.
    """
    run = Trained(config)

    def logged(row: dict) -> bool:
        run.rows.append(row)
        run.stopped = bool(on_log(run)) and row["step"] < (config.max_steps or row["step"] + 1)
        return run.stopped

    resume = config.output_dir is not None
    result = fit(config, policy, reference, pairs, on_log=logged, resume=resume, progress=progress, **more)
    run.rows, run.policy = result.metrics, result.policy.eval()
    return run


def new_policy(config: TrainConfig | None, start):
    """What a run trains, while `start` stays as it is: a copy of it, or where `config` has a rank adapters on its tensors."""
    if config is None or not config.lora_rank:
        return frozen_copy(start).requires_grad_(True)
    how = {"alpha": config.lora_alpha, "targets": config.lora_targets, "seed": config.seed}
    return adapters.add_lora(adapters.twin(start), config.lora_rank, **how)


def load_guide(name: str | Path, start):
    """The frozen guide in a folder or of the hub: on the tensors of `start` where it was trained as adapters of the same."""
    try:
        record = read_run(name)
    except ValueError:  # its record does not matter to what it says
        record = None
    if record and (record.folder / ADAPTER).is_dir():
        folders.find("guide", name)  # as what was saved
        guide = adapters.beside(start, record.folder / ADAPTER)
        if adapter_base(guide)["sha256"] == record.start["adapter base"]["sha256"]:
            return guide
    return load_model(name, device=start.device).requires_grad_(False)


def guide_settings(config: TrainConfig) -> TrainConfig:
    """The run whose policy guides `config`'s: DPO, all else equal, at the beta its log-ratios are read with."""
    beta = config.hyper.get("guide_beta") or config.hyperparameters().get("beta")
    return override(config, loss_type="dpo", beta=beta)


def train_guide(config: TrainConfig, policy, reference, pairs: Sequence[EncodedPair], **more) -> Trained:
    """`train` of the guide of `config`."""
    return train(guide_settings(config), policy, reference, pairs, **more)


def words(config: TrainConfig, also: Iterable[str] = (), *, exact: bool = False) -> str:
    """An objective in short, with the hyperparameters that its sweep varies and the settings `also`, to three digits or exact.

    Example:
        >>> words(TrainConfig(loss_type="tdpo2", lr=1e-5), ["lr"])
        'tdpo2 β0.1 α0.5 lr=1e-05'
    """
    known, said = OBJECTIVES[config.loss_type].hyperparameters, [config.loss_type]
    for name in dict.fromkeys([*(name for name, h in known.items() if h.swept), *also]):
        value = getattr(config, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        shown = f"{value:.3g}" if number and not exact else str(value)
        said.append(f"{known[name].symbol}{shown}" if name in known and number else f"{name}={shown}")
    return " ".join(said)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result, and the machine."""
    names = ("tpo-lib", "torch", "transformers", "accelerate", "datasets", "numpy")
    here = {"python": platform.python_version(), "machine": platform.machine(), "threads": str(torch.get_num_threads())}
    here |= {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return here | {name: importlib.metadata.version(name) for name in names}


def override(config: TrainConfig, **values) -> TrainConfig:
    """Return the config with those values replaced that are not None; another loss_type brings its own defaults."""
    values = {name: value for name, value in values.items() if value is not None}
    if values.get("loss_type", config.loss_type) != config.loss_type:
        values = {"hyper": {}} | values
    return replace(config, **values)


def check_taken(loss_type: str, given: Iterable[str]) -> None:
    """Raise ValueError where a hyperparameter was given by its flag that the objective does not take."""
    taken = OBJECTIVES[loss_type].hyperparameters
    for name in given:
        if name not in taken:
            idle, *has = (f"--{each.replace('_', '-')}" for each in (name, *taken))
            takes = f"which takes {', '.join(has) or 'none of these'}"
            raise ValueError(
                f"{idle} has no effect with {loss_type}, {takes}; leave it out or choose another --loss-type"
            )
