"""Supervised fine-tuning on reviews before preferences are learnt, as the papers do: a start model that writes reviews.

A row is a review without a rejected side: its first token is the prompt, what follows the response, EOS included unless cut.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tpo_lib.config import TrainConfig
from tpo_lib.data import EncodedPair, collate
from tpo_lib.fast import FastPath
from tpo_lib.fast.tiles import response_logps
from tpo_lib.models import ResponseReader
from tpo_lib.runs import runs
from tpo_lib.train import planned_steps

HELD_OUT = 200  # reviews that perplexity is measured on


@dataclass(frozen=True)
class SftConfig:
    """How the start model is fine-tuned.

    Attributes:
        reviews: how many, the first ones in an order drawn from the seed.
        tokens: a review is cut there.
        epochs: passes over them, at most 2: with more, a small model knows them by heart.
        lr, batch_size, precision: of the run, as in TrainConfig.
    """

    reviews: int
    tokens: int = 96
    epochs: int = 1
    lr: float = 1e-4
    batch_size: int = 32
    precision: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.epochs <= 2:
            raise ValueError(f"sft epochs={self.epochs} must be 1 or 2")
        if self.reviews < self.batch_size or self.tokens < 3:
            raise ValueError(
                f"sft needs one batch of {self.batch_size} reviews of 3 tokens, got {self.reviews} of {self.tokens}"
            )

    def training(self, **common) -> TrainConfig:
        """The run itself."""
        size = {"batch_size": self.batch_size, "max_length": self.tokens, "epochs": self.epochs}
        return TrainConfig(loss_type="sft", lr=self.lr, warmup_steps=10, log_every=10, **size, **common)


def review_rows(texts: Sequence[str], tokenizer, most: int) -> list[EncodedPair]:
    """Reviews as rows for SFT, each at most `most` tokens; those of fewer than three are left out."""
    encoded = tokenizer([text[: 12 * most] for text in texts], add_special_tokens=False)["input_ids"]
    whole = ([*ids, tokenizer.eos_token_id][:most] for ids in encoded)
    return [EncodedPair(number, ids[:1], ids[1:]) for number, ids in enumerate(whole) if len(ids) > 2]


@torch.no_grad()
def perplexity(model, rows: Sequence[EncodedPair], *, batch_size: int = 64) -> float:
    """exp of the mean negative log-probability of a response token, over all rows' tokens."""
    reader, found = ResponseReader(model), []
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size], 0).to(model.device)
        found.append(response_logps(reader(batch), batch.labels).double())  # (R,)
    return torch.cat(found).mean().neg().exp().item()


def fine_tune(
    start,
    tokenizer,
    config: SftConfig,
    reviews: dict,
    *,
    seed: int,
    folder: Path | None,
    fast: FastPath | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> dict:
    """Fine-tune `start` in place on reviews of the split "train".

    Args:
        reviews: {"train": {"text": [...]}, "test": {"text": [...]}}, as `files.imdb.load_imdb` gives them.
        folder: where the run is kept, so that it goes on after an interruption; None keeps it in memory.
        fast: how the model is read.
        progress: called with the share that is done.

    Returns:
        {"reviews", "tokens", "updates", "perplexity_before", "perplexity_after"}; perplexities of reviews of "test", cut alike.
    """
    draw, held_out = random.Random(seed), reviews["test"]["text"]
    texts = draw.sample(reviews["train"]["text"], config.reviews)
    held_out = draw.sample(held_out, min(HELD_OUT, len(held_out)))
    rows, held_out = (review_rows(part, tokenizer, config.tokens) for part in (texts, held_out))
    said = {
        "reviews": len(rows),
        "tokens": sum(row.length for row in rows),
        "perplexity_before": perplexity(start, held_out),
    }
    common = {"seed": seed, "device": str(start.device), "precision": config.precision}
    settings = config.training(output_dir=folder and str(folder), **common)
    updates = planned_steps(settings, len(rows), settings.batch_size)
    trained = runs.train(
        settings,
        start.requires_grad_(True),
        None,
        rows,
        tokenizer=tokenizer,
        fast=fast,
        on_log=lambda run: progress(run.updates / updates),
    )
    trained.policy.requires_grad_(False).zero_grad(set_to_none=True)
    return said | {"updates": trained.updates, "perplexity_after": perplexity(trained.policy, held_out)}
