"""What a training run is made of: one dataclass, and the named presets. Values are checked, never rewritten."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from numbers import Integral, Real

from tpo_lib.losses import FLOAT32_MAX, OBJECTIVES, Hyperparameter


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The help of the command line's flags is this list.

    Attributes:
        loss_type: key of losses.OBJECTIVES.
        beta, alpha, gamma, guide_beta, shaping, floor: what the objective takes, as `OBJECTIVES` says, with ranges; None is the
            objective's own default (`hyperparameters` fills it in), so that another loss_type brings its own.
        extra: hyperparameters of an objective of your own, by name.
        optimizer: "adamw" or "rmsprop".
        lr: peak learning rate.
        schedule: "cosine" (to 0), "linear" (to 0) or "constant", after the warm-up.
        warmup_steps: updates over which the learning rate rises to its peak.
        weight_decay: AdamW's; RMSprop takes none.
        clip: largest gradient norm.
        batch_size: pairs in one forward pass and process.
        accumulation: forward passes an update; incomplete windows at the end of an epoch are left out.
        max_tokens: most tokens of a forward pass, padding included; None sets no bound. An update takes batch_size x
            accumulation pairs as ever, but is cut into forward passes by tokens instead of by pairs.
        share_prefix: read the prompt of a pair once instead of twice (prefix.py), which pays where prompts are long.
        fused: head, statistics and gradient tile by tile (fused.py); False is the textbook path, all logits at once.
        epochs: passes over the pairs.
        max_steps: updates after which the run ends, if that is earlier; None sets no bound.
        max_length: tokens of prompt and response together; longer responses are cut and counted.
        precision: "no" (float32), "bf16" or "fp16" autocast; None chooses from the device.
        device: "cpu", "cuda", "mps"; None chooses.
        lora_rank: 0 trains all weights, otherwise low-rank adapters of that rank (extra `peft`).
        seed: orders the data; with the same seed, machine and thread count a run repeats bit for bit.
        log_every: updates between two rows of metrics.
        eval_every: updates between two evaluations on held-out pairs; 0 makes none on the way.
        save_every: updates between two checkpoints.
        keep: checkpoints kept.
        output_dir: where checkpoints and metrics.jsonl go; None keeps everything in memory.
        report_to: None or "tensorboard".
        cache_dir: where what the frozen models say is kept on disk, to be read instead of them (caches.py); None reads them
            anew for every batch. It may come and go on a resume.
    """

    loss_type: str = "dpo"
    beta: float | None = None
    alpha: float | None = None
    gamma: float | None = None
    guide_beta: float | None = None
    shaping: str | None = None
    floor: float | None = None
    extra: Mapping[str, float | str] = field(default_factory=dict, hash=False)
    optimizer: str = "adamw"
    lr: float = 1e-4
    schedule: str = "cosine"
    warmup_steps: int = 10
    weight_decay: float = 0.0
    clip: float = 10.0
    batch_size: int = 32
    accumulation: int = 1
    max_tokens: int | None = None
    share_prefix: bool = False
    fused: bool = True
    epochs: int = 1
    max_steps: int | None = None
    max_length: int = 128
    precision: str | None = None
    device: str | None = None
    lora_rank: int = 0
    seed: int = 0
    log_every: int = 5
    eval_every: int = 0
    save_every: int = 100
    keep: int = 2
    output_dir: str | None = None
    report_to: str | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in tuple(allowed):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(map(str, allowed))}"
                )
        known = known_hyperparameters(self.loss_type)
        for name, value in self._given().items():
            if name not in known:
                raise ValueError(f"extra names {name!r}, which no objective takes; they take {', '.join(known)}")
            known[name].check(name, value)
        for name, (kind, optional) in field_kinds().items():
            if name not in known and not (optional and getattr(self, name) is None):
                _check_number(name, getattr(self, name), kind)
        if self.optimizer == "rmsprop" and self.weight_decay:
            raise ValueError(
                f"weight_decay={self.weight_decay} has no effect with rmsprop; set it to 0 or choose adamw"
            )

    def _given(self) -> dict:
        """The hyperparameters that were given, those of `extra` among them."""
        own = {f.name for f in fields(self)}
        if own & set(self.extra):
            raise ValueError(
                f"extra holds {sorted(own & set(self.extra))}, which TrainConfig has of itself; set it there"
            )
        named = {name: getattr(self, name) for name in known_hyperparameters(self.loss_type) if name in own}
        return {name: value for name, value in (named | dict(self.extra)).items() if value is not None}

    def hyperparameters(self) -> dict:
        """The keyword arguments of this run's objective: what was given, else its defaults."""
        return OBJECTIVES[self.loss_type].settings(self._given())

    def remarks(self, steps: int) -> list[str]:
        """What is allowed and hardly ever meant in a run of so many updates, a sentence each."""
        known, said = OBJECTIVES[self.loss_type].hyperparameters, []
        for name, value in self._given().items():
            if name not in known:
                takes = f"it takes {', '.join(known)}" if known else "it takes no hyperparameters"
                said.append(f"{name}={value!r} has no effect with {self.loss_type}: {takes}")
            elif known[name].usual and not known[name].usual[0] <= value <= known[name].usual[1]:
                low, high = known[name].usual
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
        """All fields, as JSON takes them, with the hyperparameters that are in use."""
        used, own = self.hyperparameters(), field_kinds().keys()
        extra = {name: value for name, value in (dict(self.extra) | used).items() if name not in own}
        return asdict(self) | {name: value for name, value in used.items() if name in own} | {"extra": extra}


# What a field may be beside its type: one of these, greater than these, at most these.
CHOICES = {
    "loss_type": OBJECTIVES,
    "optimizer": ("adamw", "rmsprop"),
    "schedule": ("cosine", "linear", "constant"),
    "precision": (None, "no", "bf16", "fp16"),
    "report_to": (None, "tensorboard"),
}
ABOVE = {
    "lr": 0,
    "clip": 0,
    "batch_size": 0,
    "accumulation": 0,
    "epochs": 0,
    "max_steps": 0,
    "max_length": 1,
    "log_every": 0,
}
ABOVE |= {"save_every": 0, "keep": 0, "max_tokens": 3}  # the shortest pair is two rows of two tokens
LARGEST = {"seed": 2**32 - 1}  # numpy's bound; of other whole numbers 2**31 - 1, of floats what float32 holds


def known_hyperparameters(loss_type: str) -> dict[str, Hyperparameter]:
    """All that any objective takes, by name; where two take one of the same name, this objective's."""
    everyone = {name: h for entry in OBJECTIVES.values() for name, h in entry.hyperparameters.items()}
    return everyone | dict(OBJECTIVES[loss_type].hyperparameters)


@cache
def field_kinds() -> dict[str, tuple[type, bool]]:
    """{field of TrainConfig: (int, float, bool or str; may it be None)}; `extra` is left out."""
    found = {}
    for name, hint in typing.get_type_hints(TrainConfig).items():
        kinds = hint.__args__ if isinstance(hint, types.UnionType) else (hint,)
        if kinds[0] in (int, float, bool, str):
            found[name] = (kinds[0], type(None) in kinds)
    return found


def _check_number(name: str, value, kind: type) -> None:
    """Type, sign and range of one field; words are left to others."""
    if kind is str:
        return
    fits = {int: Integral, float: Real, bool: bool}[kind]
    if not isinstance(value, fits) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(
            f"{name}={value!r} must be {'True or False' if kind is bool else f'a number ({kind.__name__})'}"
        )
    if name in ABOVE and not value > ABOVE[name]:
        raise ValueError(f"{name}={value!r} must be greater than {ABOVE[name]}")
    if not value >= 0:
        raise ValueError(f"{name}={value!r} must be at least 0")
    if value == math.inf:
        raise ValueError(f"{name}={value!r} must be finite")
    most = LARGEST.get(name, FLOAT32_MAX if kind is float else 2**31 - 1)
    if value > most:
        raise ValueError(f"{name}={value!r} must be at most {most}")


@dataclass(frozen=True)
class Preset:
    """A named starting point: which model, reward, judge and pairs, and how to train on them.

    Attributes:
        model, reward, judge: folder or hub name; None is the bundled one ("pocket") or, for the judge, none.
        pairs: None samples pairs from the model, otherwise folder, file or hub name.
        train: the training run.
        source: where each value comes from, so that nobody takes ours for the papers'.
    """

    model: str | None
    reward: str | None
    judge: str | None
    pairs: str | None
    train: TrainConfig
    source: dict[str, str]


_OURS = "ours, chosen for the pocket model"

PRESETS = {
    "pocket": Preset(
        model=None,
        reward=None,
        judge=None,
        pairs=None,
        train=TrainConfig(beta=0.1, lr=2e-4),
        source={"beta": "DPO's and TDPO's default", "everything else": _OURS},
    ),
    "gpt2-imdb": Preset(
        model="lvwerra/gpt2-imdb",
        reward="lvwerra/distilbert-imdb",
        judge=None,
        pairs=None,
        train=TrainConfig(
            beta=0.1, optimizer="rmsprop", lr=5e-6, schedule="constant", warmup_steps=150, batch_size=16, accumulation=4
        ),
        source={
            "beta, optimizer, lr, warmup_steps, batch (16 x 4 = 64)": "TDPO's settings for IMDb",
            "model and reward": "ours: GPT-2 small and DistilBERT instead of gpt2-large and RoBERTa-large, to fit a free GPU",
        },
    ),
    "gpt2-large-imdb": Preset(
        model="openai-community/gpt2-large",
        reward="siebert/sentiment-roberta-large-english",
        judge=None,
        pairs=None,
        train=TrainConfig(
            beta=0.1, optimizer="rmsprop", lr=5e-6, schedule="constant", warmup_steps=150, batch_size=64, max_length=512
        ),
        source={
            "reward, beta, optimizer, lr, warmup_steps, batch": "the papers' settings for IMDb",
            "max_length, clip": "the TDPO authors' code",
            "model": "gpt2-large; the papers first fine-tune it for an epoch on IMDb: run `--loss-type sft` first",
            "schedule": "ours where the papers are silent: constant after the warm-up",
        },
    ),
}


def override(config: TrainConfig, **values) -> TrainConfig:
    """Return the config with those values replaced that are not None; another loss_type brings its own defaults."""
    values = {name: value for name, value in values.items() if value is not None}
    if values.get("loss_type", config.loss_type) != config.loss_type:
        values = (
            dict.fromkeys(field_kinds().keys() & known_hyperparameters(config.loss_type).keys())
            | {"extra": {}}
            | values
        )
    return replace(config, **values)
