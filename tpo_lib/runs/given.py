"""Rewards and weights of tokens that stand beside the pairs (`files.spans`): which a run takes, and what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from tpo_lib.config import TrainConfig
from tpo_lib.data import EncodedPair
from tpo_lib.fast.frozen import FrozenCache
from tpo_lib.files.spans import DEFAULTS
from tpo_lib.files.token_values import aligned
from tpo_lib.losses import OBJECTIVES
from tpo_lib.models import fingerprint
from tpo_lib.types import PairBatch

KINDS = {"rewards": "token_rewards", "weights": "token_weights"}  # of `TokenStats`: of the columns


@dataclass(frozen=True)
class Given:
    """What `train.fit` and `tpo_lib.fit` take as `given`; `held_out` is that of the held-out pairs."""

    caches: dict[str, FrozenCache]
    fingerprint: dict[str, str]  # of the numbers of each kind
    held_out: Given | None = None

    def __call__(self, batch: PairBatch) -> dict[str, Tensor]:
        return {name: cache.read(batch) for name, cache in self.caches.items()}


def token_values(
    table: Dataset,
    pairs: Sequence[EncodedPair],
    tokenizer,
    *,
    max_length: int,
    kinds: Sequence[str] | None = None,
    held_out: tuple[Dataset, Sequence[EncodedPair]] | None = None,
) -> Given | None:
    """Rewards and weights of the tokens of encoded pairs, from the columns of their table; None where it has none.

    Args:
        table, pairs, tokenizer, max_length: as `encode_pairs` took and made them.
        kinds: of "rewards" and "weights" (default: those that the table has).
        held_out: a table and its pairs; where it has no such column, rewards are 0 and weights 1.

    Raises:
        BadRowsError: names the rows whose numbers do not belong to their responses.
    """
    kinds = [name for name in kinds or KINDS if has(table, name)]
    if not kinds:
        return None
    made = {name: _cache(table, pairs, tokenizer, name, max_length) for name in kinds}
    other = None
    if held_out and len(held_out[1]):
        other = {name: _cache(*held_out, tokenizer, name, max_length, of="the held-out pairs") for name in kinds}
    return Given(made, {name: _mark(cache) for name, cache in made.items()}, other and Given(other, {}))


def has(table: Dataset, kind: str) -> bool:
    """Whether the table has a column of "rewards" or "weights" that is not empty."""
    names = (f"{side}_{KINDS[kind]}" for side in ("chosen", "rejected"))
    return any(any(table[name]) for name in names if name in table.column_names)


def taken(config: TrainConfig, table: Dataset, guide: str | None) -> tuple[TrainConfig, list[str], str]:
    """What a run takes of a table: its settings, the kinds, and words for them.

    Rewards are taken in the place of a guide, with a guide_beta of 1 where none is said; weights by every objective.

    Raises:
        ValueError: there are token rewards and a --guide.
    """
    guided, words = "guide_logps" in OBJECTIVES[config.loss_type].needs, []
    kinds = [name for name in KINDS if has(table, name)]
    if "rewards" in kinds and guided and guide:
        raise ValueError(
            f"the pairs have token rewards, and --guide {guide} gives others: {config.loss_type} takes one; leave --guide "
            f"out, or the columns chosen_{KINDS['rewards']} and rejected_{KINDS['rewards']}"
        )
    if "rewards" in kinds and guided:
        scaled = (
            "guide_beta" in OBJECTIVES[config.loss_type].hyperparameters
        )  # one of your own may read them as they are
        config = replace(config, guide_beta=1.0) if scaled and "guide_beta" not in config.hyper else config
        words.append("token rewards guide" + (f", times guide_beta {config.hyper['guide_beta']:g}" if scaled else ""))
    elif "rewards" in kinds:
        kinds.remove("rewards")
        words.append(f"token rewards are not used: {config.loss_type} reads no guide")
    if "weights" in kinds:
        words.append("token weights multiply the log-ratio and KL of their token")
    return config, kinds, "; ".join(words)


def _mark(cache: FrozenCache) -> str:
    """SHA-256 of the numbers and of which row has which."""
    rows = torch.tensor([[row, *ends] for row, ends in sorted(cache.spans.items())])  # (pairs, 5)
    return fingerprint({"values": cache.values, "rows": rows})


def _cache(
    table: Dataset, pairs: Sequence[EncodedPair], tokenizer, name: str, max_length: int, of="the table"
) -> FrozenCache:
    found, _ = aligned(table, pairs, tokenizer, KINDS[name], max_length=max_length, name=of)
    spans, values, end = {}, [], 0
    for pair, sides in zip(pairs, found, strict=True):
        ends = [end]
        for side in sides:
            values.append(side)
            ends += [ends[-1] + len(side)] if len(ends) == 1 else [ends[-1], ends[-1] + len(side)]
        spans[pair.row], end = ends + [ends[-1]] * (4 - len(ends)), ends[-1]
    return FrozenCache(torch.from_numpy(np.concatenate(values)), spans, None)


def summary(given: Given) -> str:
    """How many tokens have which numbers, and in how many responses all are 0."""
    said = []
    for name, cache in given.caches.items():
        x, default = cache.values, DEFAULTS[KINDS[name]]
        share = (x != default).float().mean().item()
        ends = np.array(list(cache.spans.values())).reshape(-1, 2)  # (responses, 2)
        seen = np.concatenate([[0], np.cumsum(x.numpy() != 0)])[ends]
        zero = ((seen[:, 0] == seen[:, 1]) & (ends[:, 0] < ends[:, 1])).sum()
        said.append(
            f"{name} of {len(x):,} tokens: {x.mean():.3g} on average, {x.min():.3g} to {x.max():.3g}, {share:.0%} not {default:g}"
            + (f", {zero:,} responses have none but 0" if zero else "")
        )
    return "; ".join(said)
