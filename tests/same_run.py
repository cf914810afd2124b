"""The same run by `fit` and by a trainer of TRL: settings, pairs and models of both, and what must agree."""

from __future__ import annotations

import tiny
import torch
from datasets import Dataset

from tpo_lib import TrainConfig, fit, train
from tpo_lib.data import encode_pairs
from tpo_lib.models import frozen_copy

STEPS, BATCH, LONGEST = 5, 4, 64
CLOSE = 1e-5  # of every number that is logged, in float32
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
OURS = {"lr": 1e-3, "warmup_steps": 0, "clip": 1.0, "batch_size": BATCH, "log_every": 1, "device": "cpu"}
THEIRS = {  # the settings on the page, and what only concerns the machine and the logs
    "bf16": False,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": BATCH,
    "num_train_epochs": 1,
    "train_sampling_strategy": "sequential",
    "max_length": LONGEST,
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def sentences(count: int = STEPS * BATCH) -> list[dict]:
    """Rows of text; the responses have 1 to 9 words."""
    words = ["good", "fun", "bad", "film", "plot", "cast", "fine", "really", "poor", "and", "a", "the"]
    draw = torch.Generator().manual_seed(0)

    def say(most: int) -> str:
        number = int(torch.randint(1, most, (1,), generator=draw))
        return " ".join(words[i] for i in torch.randint(len(words), (number,), generator=draw))

    return [{"prompt": say(5), "chosen": f" {say(10)}", "rejected": f" {say(10)}."} for _ in range(count)]


def models(family: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A policy, and another model as the reference, so that no margin begins at 0."""
    build = getattr(tiny, family)
    return build(0, vocab=320), frozen_copy(build(1, vocab=320))


def encode(rows: list[dict], tokenizer, longest: int = LONGEST) -> list:
    return encode_pairs(Dataset.from_list(rows), tokenizer, max_length=longest)[0]


def by_fit(
    family: str, rows: list[dict], tokenizer, guide=None, **settings
) -> tuple[list[dict], list[dict], torch.nn.Module]:
    """The metrics of every update, the table in the order of the updates, and the trained policy."""
    config, pairs, (policy, reference) = TrainConfig(**OURS | settings), encode(rows, tokenizer), models(family)
    found = fit(config, policy, reference, pairs, guide=guide, progress=False).metrics
    order = [row for window in train.updates(config, pairs, BATCH, 0, STEPS) for row in window]
    return found, [rows[row] for row in order], policy


def by_trl(trainer: type, config, family: str, rows: list[dict], tokenizer, *, with_reference: bool, **more):
    """The same of TRL: metrics with the loss as it was, not as the log rounds it, and the trained policy."""
    (policy, reference), losses = models(family), []

    class Recorded(trainer):
        def compute_loss(self, *given, **named):
            losses.append(float(loss := super().compute_loss(*given, **named)))
            return loss

    more |= {"ref_model": reference} if with_reference else {}
    run = Recorded(policy, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **more)
    run.train()
    logged = [row for row in run.state.log_history if "grad_norm" in row]
    return [row | {"loss": loss} for row, loss in zip(logged, losses, strict=True)], policy


def check_equal(ours: list[dict], theirs: list[dict], policies, *, metrics=METRICS) -> None:
    """Loss, gradient norm, learning rate and metrics of every update, and logits at the end.

    Not the weights: those that no output depends on, as the biases of GPT-2's keys, go wherever rounding takes them.
    """
    assert len(ours) == len(theirs) == STEPS
    names = {name: name for name in ("loss", "grad_norm", *metrics)} | {"lr": "learning_rate"}
    gaps = {mine: max(abs(a[mine] - b[its]) for a, b in zip(ours, theirs, strict=True)) for mine, its in names.items()}
    with torch.no_grad():
        a, b = (policy.eval()(torch.arange(3, 43)[None]).logits for policy in policies)
    gaps["logits"] = float((a - b).abs().max())
    print({name: f"{gap:.1e}" for name, gap in gaps.items()})
    assert max(gaps.values()) < CLOSE, gaps
    assert max(abs(row["loss"] - ours[0]["loss"]) for row in ours) > 0.01  # it has moved
