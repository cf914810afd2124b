"""What a training run is made of: one dataclass, and the named presets. Values are checked, never rewritten."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from tpo_lib.losses import F_FLOOR, OBJECTIVES


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        loss_type: key of losses.OBJECTIVES.
        beta: strength of the pull towards the reference (SimPO: scale of the mean log-probability), > 0.
        alpha: TDPO2's weight of the KL terms, TGDPO's strength of guidance, >= 0.
        gamma: SimPO's target margin, >= 0.
        guide_beta: TGDPO: the beta its guide was trained with, > 0; None until the guide is known.
        shaping: TGDPO: "linear" or "exp".
        floor: TGDPO: smallest token weight, > 0.
        optimizer: "adamw" or "rmsprop".
        lr: peak learning rate.
        schedule: "cosine" (to 0), "linear" (to 0) or "constant", after a linear warm-up of `warmup_steps` updates.
        weight_decay: AdamW's; RMSprop takes none.
        clip: largest gradient norm.
        batch_size: pairs in one forward pass and process.
        accumulation: forward passes an update; incomplete windows at the end of an epoch are left out.
        max_tokens: most tokens of a forward pass, padding included; None sets no bound. An update takes batch_size x
            accumulation pairs as ever, but is cut into forward passes by tokens instead of by pairs.
        share_prefix: read the prompt of a pair once instead of twice (prefix.py), which pays where prompts are long.
        fused: head, statistics and gradient tile by tile (fused.py); False is the textbook path, all logits at once.
        epochs: passes over the pairs; max_steps, where given, ends the run earlier.
        max_length: tokens of prompt and response together; longer responses are cut and counted.
        precision: "no" (float32), "bf16" or "fp16" autocast; None chooses from the device.
        device: "cpu", "cuda", "mps"; None chooses.
        lora_rank: 0 trains all weights, otherwise low-rank adapters of that rank (extra `peft`).
        seed: orders the data; with the same seed, machine and thread count a run repeats bit for bit.
        log_every, eval_every, save_every: in updates; keep: checkpoints kept.
        output_dir: where checkpoints and metrics.jsonl go; None keeps everything in memory.
        report_to: None or "tensorboard".
        cache_dir: where what the frozen models say is kept on disk, to be read instead of them (caches.py); None reads them
            anew for every batch. It may come and go on a resume.
    """

    loss_type: str = "dpo"
    beta: float = 0.1
    alpha: float = 0.5
    gamma: float = 0.5
    guide_beta: float | None = None
    shaping: str = "linear"
    floor: float = F_FLOOR
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
        choices = {
            "loss_type": tuple(OBJECTIVES),
            "shaping": ("linear", "exp"),
            "optimizer": ("adamw", "rmsprop"),
            "schedule": ("cosine", "linear", "constant"),
            "precision": (None, "no", "bf16", "fp16"),
            "report_to": (None, "tensorboard"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(map(str, allowed))}"
                )
        above = {"beta": 0, "floor": 0, "lr": 0, "clip": 0, "batch_size": 0, "accumulation": 0, "epochs": 0}
        above |= {"max_length": 1, "log_every": 0, "save_every": 0, "keep": 0}
        above |= {name: 0 for name in ("guide_beta", "max_steps", "max_tokens") if getattr(self, name) is not None}
        for name, bound in above.items():
            if not getattr(self, name) > bound:
                raise ValueError(f"{name}={getattr(self, name)!r} must be greater than {bound}")
        for name in ("alpha", "gamma", "weight_decay", "warmup_steps", "eval_every", "lora_rank"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 0")
        if self.optimizer == "rmsprop" and self.weight_decay:
            raise ValueError(
                f"weight_decay={self.weight_decay} has no effect with rmsprop; set it to 0 or choose adamw"
            )

    def hyperparameters(self) -> dict:
        """The keyword arguments of this run's objective."""
        return {name: getattr(self, name) for name in OBJECTIVES[self.loss_type].hyperparameters}

    def to_dict(self) -> dict:
        """All fields, as JSON takes them."""
        return asdict(self)


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
        train=TrainConfig(lr=2e-4),
        source={"beta": "DPO's and TDPO's default", "alpha": "TDPO2's default", "everything else": _OURS},
    ),
    "gpt2-imdb": Preset(
        model="lvwerra/gpt2-imdb",
        reward="lvwerra/distilbert-imdb",
        judge=None,
        pairs=None,
        train=TrainConfig(
            optimizer="rmsprop", lr=5e-6, schedule="constant", warmup_steps=150, batch_size=16, accumulation=4
        ),
        source={
            "beta, alpha, optimizer, lr, warmup_steps, batch (16 x 4 = 64)": "TDPO's settings for IMDb",
            "model and reward": "ours: GPT-2 small and DistilBERT instead of gpt2-large and RoBERTa-large, to fit a free GPU",
        },
    ),
    "gpt2-large-imdb": Preset(
        model="openai-community/gpt2-large",
        reward="siebert/sentiment-roberta-large-english",
        judge=None,
        pairs=None,
        train=TrainConfig(
            optimizer="rmsprop", lr=5e-6, schedule="constant", warmup_steps=150, batch_size=64, max_length=512
        ),
        source={
            "reward, beta, alpha, optimizer, lr, warmup_steps, batch": "the papers' settings for IMDb",
            "max_length, clip": "the TDPO authors' code",
            "model": "gpt2-large; the papers first fine-tune it for an epoch on IMDb: run `--loss-type sft` first",
            "schedule": "ours where the papers are silent: constant after the warm-up",
        },
    ),
}


def override(config: TrainConfig, **values) -> TrainConfig:
    """Return the config with those values replaced that are not None."""
    return replace(config, **{name: value for name, value in values.items() if value is not None})
