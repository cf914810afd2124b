"""What a training run is made of: one dataclass, and the named presets. Values are checked, never rewritten."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from numbers import Integral

from tpo_lib.losses import FLOAT32_MAX, OBJECTIVES, Hyperparameter, check_number


def setting(default, words: str, **bounds):
    """A field with the words of its flag and what it may be: `choices`, or greater than `above` and at most `most`."""
    return field(default=default, metadata={"words": words, **bounds})


@dataclass(frozen=True, init=False)
class TrainConfig:
    """One training run. Hyperparameters of the objective are given, and read, like settings.

    Raises:
        ValueError: a value is out of range, or nobody takes it; it is named.

    Example:
        >>> config = TrainConfig(loss_type="tdpo2", alpha=0.3, lr=1e-4)
        >>> config.hyper, config.beta  # what was given; what is in use
        ({'alpha': 0.3}, 0.1)
    """

    loss_type: str = setting("dpo", "the objective, or FILE.py:NAME of your own", choices=OBJECTIVES)
    hyper: Mapping[str, float | str] = field(default_factory=dict, hash=False)
    optimizer: str = setting("adamw", "what makes the updates", choices=("adamw", "rmsprop"))
    lr: float = setting(1e-4, "peak learning rate", above=0)
    schedule: str = setting("cosine", "after the warm-up: to 0, or constant", choices=("cosine", "linear", "constant"))
    warmup_steps: int = setting(10, "updates over which the learning rate rises to its peak")
    weight_decay: float = setting(0.0, "AdamW's; RMSprop takes none")
    clip: float = setting(10.0, "largest gradient norm", above=0)
    batch_size: int = setting(32, "pairs in one forward pass and process", above=0)
    accumulation: int = setting(1, "forward passes an update; what fills none at an epoch's end is left out", above=0)
    group_prompts: bool = setting(False, "keep a prompt's pairs in one update, which reads each response once")
    max_tokens: int | None = setting(
        None,
        "most tokens of a forward pass, padding included; None sets no bound. An update takes batch_size x accumulation pairs as "
        "ever, but is cut into forward passes by tokens instead of by pairs",
        above=3,  # the shortest pair is two rows of two tokens
    )
    epochs: int = setting(1, "passes over the pairs", above=0)
    max_steps: int | None = setting(None, "updates after which the run ends, if it has more; None: no bound", above=0)
    max_length: int = setting(128, "tokens of prompt and response; longer responses are cut and counted", above=1)
    precision: str | None = setting(
        None,
        "no (float32), bf16 or fp16 autocast; None chooses by the device, auto measures on a CPU, too",
        choices=("no", "bf16", "fp16", "auto"),
    )
    device: str | None = setting(None, "cpu, cuda or mps; None takes cuda where there is one, else the cpu")
    lora_rank: int = setting(0, "0 trains all weights, otherwise low-rank adapters of that rank (extra `peft`)")
    lora_alpha: float | None = setting(None, "scales the adapters, over the rank; None is twice the rank", above=0)
    lora_targets: str = setting("all-linear", "the adapted layers, as q_proj,v_proj; all-linear is all but the head")
    seed: int = setting(0, "orders the data; with the same one, machine and threads a run repeats", most=2**32 - 1)
    log_every: int = setting(5, "updates between two rows of metrics", above=0)
    eval_every: int = setting(0, "updates between two evaluations on held-out pairs; 0 makes none on the way")
    save_every: int = setting(100, "updates between two checkpoints", above=0)
    keep: int = setting(2, "checkpoints kept", above=0)
    output_dir: str | None = setting(None, "where checkpoints and metrics.jsonl go; None keeps everything in memory")
    report_to: str | None = setting(None, "a tracker of the metrics", choices=("tensorboard", "wandb", "trackio"))

    def __init__(self, **given) -> None:
        settings = {name: f.default for name, f in run_settings().items()}
        hyper = dict(given.pop("hyper", {})) | {name: given.pop(name) for name in [*given] if name not in settings}
        hyper = {name: value for name, value in hyper.items() if value is not None}
        vars(self).update(settings | given, hyper=hyper)  # past the class being frozen
        self._check()
        for name, value in (hyper | self.hyperparameters()).items():
            vars(self).setdefault(name, value)  # what is in use can be read like a setting

    def __getattr__(self, name: str):
        raise AttributeError(f"a training run of {vars(self).get('loss_type')} has no {name!r}")

    def _check(self) -> None:
        for name, each in run_settings().items():
            check_setting(each, getattr(self, name))
        known = known_hyperparameters(self.loss_type)
        for name, value in self.hyper.items():
            if name not in known:
                raise ValueError(
                    f"{name}={value!r} is no setting, and no objective takes it; they take {', '.join(known)}"
                )
            known[name].check(name, value)
        idle = {"weight_decay": (self.optimizer == "rmsprop", "with rmsprop; set it to 0 or choose adamw")}
        idle |= dict.fromkeys(("lora_alpha", "lora_targets"), (not self.lora_rank, "without lora_rank; leave it out"))
        for name, (nobody_reads_it, why) in idle.items():
            if nobody_reads_it and getattr(self, name) != run_settings()[name].default:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect {why}")

    def hyperparameters(self) -> dict:
        """The keyword arguments of this run's objective: what was given, else its defaults."""
        return OBJECTIVES[self.loss_type].settings(self.hyper)

    def remarks(self, steps: int) -> list[str]:
        """What is allowed and hardly ever meant in a run of so many updates, a sentence each."""
        known, said = OBJECTIVES[self.loss_type].hyperparameters, []
        for name, value in self.hyper.items():
            if name not in known:
                takes = f"it takes {', '.join(known)}" if known else "it takes no hyperparameters"
                said.append(f"{name}={value!r} has no effect with {self.loss_type}: {takes}")
                continue
            low, high = known[name].usual or (value, value)
            if not low <= value <= high:
                said.append(
                    f"{name}={value!r} is unusual with {self.loss_type}: {known[name].words}, usually {low:g} to {high:g} "
                    f"(default {known[name].default:g})"
                )
        if self.warmup_steps > steps:
            said.append(
                f"the warm-up of {self.warmup_steps} updates is longer than the run of {steps}: the learning rate only rises, "
                f"to {self.lr * steps / self.warmup_steps:.3g} of {self.lr:.3g}; lower --warmup-steps"
            )
        return said

    def to_dict(self) -> dict:
        """All settings side by side, as JSON takes them: `TrainConfig(**config.to_dict())` is the same run."""
        return self.hyperparameters() | {name: getattr(self, name) for name in run_settings()}


def run_settings() -> dict[str, Field]:
    """The fields of TrainConfig but the hyperparameters, by name; their metadata hold words and ranges."""
    return {f.name: f for f in fields(TrainConfig) if f.name != "hyper"}


def kind_of(setting: Field) -> str:
    """int, float, bool or str."""
    return setting.type.partition(" |")[0]


def known_hyperparameters(loss_type: str | None = None) -> dict[str, Hyperparameter]:
    """All that any objective takes, by name; where two take one of the same name, the first's, or this objective's."""
    entries = [*([OBJECTIVES[loss_type]] if loss_type else []), *OBJECTIVES.values()]
    return {name: h for entry in reversed(entries) for name, h in entry.hyperparameters.items()}


def check_setting(setting: Field, value) -> None:
    """Raise ValueError, naming the value, where it is none that the setting may have."""
    name, kind, bounds = f"{setting.name}={value!r}", kind_of(setting), setting.metadata
    if value is None and setting.type.endswith("| None"):
        return
    if "choices" in bounds and value not in tuple(bounds["choices"]):
        file = kind == "str" and str(value).rpartition(":")[0]
        fix = f", or say where {file} lies: --loss-type FOLDER/{value}" if str(file).endswith(".py") else ""
        raise ValueError(f"{name} is unknown; choose one of {', '.join(bounds['choices'])}{fix}")
    if kind == "bool" and not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False")
    if kind == "int" and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise ValueError(f"{name} must be a number (int)")
    if kind in ("int", "float"):
        most = bounds.get("most", FLOAT32_MAX if kind == "float" else 2**31 - 1)
        check_number(setting.name, value, above=bounds.get("above", -math.inf), least=0, most=most)
