"""Settings of the trainers: DPOConfig's, the objective's own, and a sentence for each that could only be disregarded."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar

from tpo_lib.losses import OBJECTIVES
from tpo_lib.trl.hooks import DPOConfig

SHARDED = "weights cut over processes cannot be read; DDP (accelerate launch, torchrun) can be used"
REASONS = {  # why options of DPOConfig cannot be honoured but at their defaults
    "the loss is one, and has no parts to weigh": "loss_weights",
    "the loss has weights of its own": "ld_alpha use_weighting",
    "the loss is derived for the reverse KL": "f_divergence_type f_alpha_divergence_coef",
    "the loss has no smoothed form": "label_smoothing label_smoothing_factor",
    "it is of another loss": "discopop_tau",
    "what is kept is a sum a response; the loss needs tokens": "precompute_ref_log_probs precompute_ref_batch_size",
    "TRL has it switched off for DPO, too": "padding_free",
    "the head is read in tiles of our own": "use_liger_kernel torch_compile",
    "a sequence must lie on one device as a whole": "parallelism_config",
    SHARDED: "fsdp deepspeed",
}
REFUSED = {name: why for why, names in REASONS.items() for name in names.split()}


def _parameter(objective: str, name: str):
    """A field for a hyperparameter of an objective; None takes the default of its record, which has the words, too."""
    known = OBJECTIVES[objective].hyperparameters[name]
    taken = "it must be given" if known.default is None else f"None: {known.default}"
    return field(default=None, metadata={"help": f"{known.words} ({taken})"})


@dataclass
class _TokenLevelConfig(DPOConfig):
    losses: ClassVar[tuple[str, ...]] = ()  # values of loss_type
    refused: ClassVar[dict[str, str]] = REFUSED

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type not in ([name] for name in self.losses):
            given = self.loss_type[0] if len(self.loss_type) == 1 else self.loss_type
            raise ValueError(
                f"loss_type={given!r}: {type(self).__name__} takes {' or '.join(self.losses)}, one of them"
            )
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in self.refused and (value or each.default) and value != each.default:
                raise ValueError(f"{each.name}={value!r}: {self.refused[each.name]}; leave it {each.default!r}")
        (name,), taken = self.loss_type, self.hyperparameters()
        for other in {other for loss in self.losses for other in OBJECTIVES[loss].hyperparameters} - taken.keys():
            if getattr(self, other) is not None:
                raise ValueError(f"{other}={getattr(self, other)!r}: {name} has none; leave it None")
        for parameter, value in taken.items():
            if value is None:
                raise ValueError(f"{name} needs {parameter}, {OBJECTIVES[name].hyperparameters[parameter].words}")
            setattr(self, parameter, value)

    def hyperparameters(self) -> dict:
        """The keyword arguments of the objective's function; ValueError where one is out of range."""
        return OBJECTIVES[self.loss_type[0]].settings(vars(self))


@dataclass
class TDPOConfig(_TokenLevelConfig):
    """DPOConfig for TDPO (arXiv 2404.11999): `loss_type` is "tdpo2" or "tdpo1", and TDPO2 has an `alpha`.

    Raises:
        ValueError: a hyperparameter is out of its range, or an option of DPO cannot be honoured.
    """

    losses: ClassVar[tuple[str, ...]] = ("tdpo2", "tdpo1")

    loss_type: list[str] = field(default_factory=lambda: ["tdpo2"], metadata={"help": "tdpo2 or tdpo1"})
    alpha: float | None = _parameter("tdpo2", "alpha")


@dataclass
class TGDPOConfig(_TokenLevelConfig):
    """DPOConfig for TGDPO (arXiv 2506.14574); its guide may be given here by name, or to the trainer.

    Raises:
        ValueError: guide_beta is missing, a hyperparameter is out of its range, or an option of DPO cannot be honoured.
    """

    losses: ClassVar[tuple[str, ...]] = ("tgdpo",)
    refused: ClassVar[dict[str, str]] = REFUSED | {
        "sync_ref_model": "the guide's reward is measured from the reference that it was trained with"
    }

    loss_type: list[str] = field(default_factory=lambda: ["tgdpo"], metadata={"help": "tgdpo"})
    alpha: float | None = _parameter("tgdpo", "alpha")
    guide: str | None = field(
        default=None, metadata={"help": "a DPO model: its folder, its hub name, or an adapter's name on the policy"}
    )
    guide_beta: float | None = _parameter("tgdpo", "guide_beta")
    shaping: str | None = _parameter("tgdpo", "shaping")
    floor: float | None = _parameter("tgdpo", "floor")
