"""Training pairs by a spec: fewer, of other gaps, labelled otherwise than by the score, or sampled from another model.

    labelled({"gap": [0.4, 0.6], "count": 500, "noise": 0.2}, stage, seed=0).pairs

Every step gives the pairs and says what it did. Rows, and with them what a guide or a cache knows of a pair, are of the pairs as
they are then: a swapped pair is another pair, so guides are made from the pairs that are returned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset
from scipy.special import expit, logit

from tpo_lib.data import EncodedPair, encode_pairs
from tpo_lib.losses import check_number
from tpo_lib.runs.stage import Stage, StageConfig, sampled_pairs

NEAREST = 1e-6  # to 0 or 1 that a score is taken to be: float32 says 1 to all log-odds above 17
STEPS = ("gap", "count", "noise", "temperature")  # of a spec, in this order


@dataclass(frozen=True)
class Labelled:
    """Pairs for training, and what became of them."""

    pairs: list[EncodedPair]
    note: dict  # step -> what it did


def labelled(spec: Mapping, stage: Stage, *, seed: int) -> Labelled:
    """The stage's pairs after the steps of a spec; {} leaves them as they are.

    Args:
        spec: gap: [least, most) difference of the scores; count: that many pairs, the first of one random order, so that a larger
            count holds a smaller one; noise: the share of labels that are swapped; temperature: labels drawn anew by
            Bradley-Terry from the scores' log-odds (not with noise).

    Raises:
        ValueError: a step is unknown or out of range, no pair is left, or there are no scores to go by.
    """
    if unknown := spec.keys() - set(STEPS):
        raise ValueError(f"{', '.join(sorted(unknown))} is no step of labels; they are {', '.join(STEPS)}")
    if {"noise", "temperature"} <= spec.keys():
        raise ValueError("noise and temperature both draw the labels; choose one of them")
    makers = {"gap": by_gap, "count": first, "noise": flipped, "temperature": bradley_terry}
    table, pairs, note = stage.table, stage.pairs, {}
    for name in STEPS:
        if name in spec:
            made = makers[name](table, pairs, spec[name], seed=seed)
            pairs, note = made.pairs, note | made.note
    return Labelled(list(pairs), note | {"pairs": len(pairs), "prompts": len({tuple(p.prompt_ids) for p in pairs})})


def flipped(table: Dataset, pairs: Sequence[EncodedPair], share: float, *, seed: int) -> Labelled:
    """Chosen and rejected swapped with probability `share` of each pair."""
    check_number("noise", share, least=0, most=1)
    return _swapped(pairs, _uniform(pairs, seed) < share, "noise", {})


def bradley_terry(table: Dataset, pairs: Sequence[EncodedPair], temperature: float, *, seed: int) -> Labelled:
    """Labels as a Bradley-Terry judge draws them: the higher score wins with sigma((logit s_w - logit s_l) / temperature).

    The note holds the mean of that probability, too: the share of labels that would agree with the score.
    """
    check_number("temperature", temperature, above=0)
    scores = _scores(table, pairs)
    if not ((scores >= 0) & (scores <= 1)).all():
        bad = int(np.argmax(~((scores >= 0) & (scores <= 1)).all(1)))
        raise ValueError(
            f"row {pairs[bad].row} has the scores {scores[bad].tolist()}, but Bradley-Terry labels take log-odds: they need "
            "scores in [0, 1]"
        )
    odds = logit(scores.clip(NEAREST, 1 - NEAREST))  # (P, 2)
    wins = expit((odds[:, 0] - odds[:, 1]) / temperature)  # (P,)
    return _swapped(pairs, _uniform(pairs, seed) >= wins, "temperature", {"expected_agreement": float(wins.mean())})


def first(table: Dataset, pairs: Sequence[EncodedPair], count: int, *, seed: int) -> Labelled:
    """`count` pairs at random."""
    if isinstance(count, bool) or not isinstance(count, int) or not 0 < count <= len(pairs):
        raise ValueError(f"count={count!r} must be a whole number from 1 to the {len(pairs)} pairs that there are")
    order = np.random.default_rng(seed).permutation(len(pairs))[:count]
    return Labelled([pairs[i] for i in order], {"count": {"kept": count, "of": len(pairs)}})


def by_gap(table: Dataset, pairs: Sequence[EncodedPair], bounds: Sequence[float], *, seed: int) -> Labelled:
    """The pairs whose scores differ by at least bounds[0] and less than bounds[1]."""
    try:
        least, most = map(float, bounds)
    except (TypeError, ValueError) as error:
        raise ValueError(f"gap={bounds!r} must be two numbers, [least, most)") from error
    gaps = -np.diff(_scores(table, pairs))[:, 0]  # (P,)
    kept = np.flatnonzero((gaps >= least) & (gaps < most))
    if not len(kept):
        raise ValueError(
            f"no pair has a gap in [{least:g}, {most:g}): they lie in [{gaps.min():.3g}, {gaps.max():.3g}]"
        )
    mean = float(gaps[kept].mean())
    return Labelled([pairs[i] for i in kept], {"gap": {"kept": len(kept), "of": len(pairs), "mean": mean}})


def _scores(table: Dataset, pairs: Sequence[EncodedPair]) -> np.ndarray:
    """(P, 2) scores of the chosen and the rejected response."""
    if missing := {"chosen_score", "rejected_score"} - set(table.column_names):
        raise ValueError(f"the table of pairs has no {', '.join(sorted(missing))}: it takes scored pairs")
    columns = [np.asarray(table[f"{side}_score"], dtype=np.float64) for side in ("chosen", "rejected")]
    return np.stack(columns, axis=1)[[pair.row for pair in pairs]]


def _uniform(pairs: Sequence[EncodedPair], seed: int) -> np.ndarray:
    """(P,) a number of each row's own: a larger share swaps what a smaller one does and more, in any subset of the pairs."""
    return np.array([np.random.default_rng([seed, pair.row]).random() for pair in pairs])


def _swapped(pairs: Sequence[EncodedPair], swap: np.ndarray, step: str, more: dict) -> Labelled:
    if bare := [pair.row for pair in pairs if not pair.rejected_ids]:
        raise ValueError(f"row {bare[0]} has no rejected side to swap with")
    made = [
        replace(pair, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids) if out else pair
        for pair, out in zip(pairs, swap, strict=True)
    ]
    return Labelled(made, {step: {"swapped": int(swap.sum()), "of": len(pairs)} | more})


def off_policy(
    stage: Stage, sampler, prompts: list[str], *, seed: int, cache_dir: Path | None = None
) -> tuple[Dataset, list[EncodedPair], dict]:
    """At most as many pairs as the stage has, sampled by another model than the start and labelled by the stage's reward.

    Args:
        sampler: a causal model of the stage's vocabulary.
        prompts: the training prompts, all of them: those of the stage's table are the ones that led to a pair.

    Returns:
        The table, its pairs, and a note: pairs, the mean score of all that was sampled, and the pairs' mean gap.
    """
    config = stage.config
    sample = partial(sampled_pairs, config, sampler, stage.tokenizer, stage.reward, cache_dir, prompts)
    table, report = sample(config.samples_per_prompt, seed, config.max_pairs, lambda done, total: None)
    pairs = encoded(table, stage.tokenizer, config)
    gap = float(-np.diff(_scores(table, pairs)).mean())
    return table, pairs, {"pairs": len(pairs), "score_mean": report.score_mean, "mean_gap": gap}


def encoded(table: Dataset, tokenizer, config: StageConfig) -> list[EncodedPair]:
    """Sampled pairs as tokens; ValueError where max_length would cut a response."""
    pairs, report = encode_pairs(table, tokenizer, max_length=config.max_length, on_bad_rows="skip")
    if report.truncated:
        few = f"{report.truncated} responses do not fit in max_length={config.max_length} behind their prompts"
        raise ValueError(f"{few}; lower max_new_tokens={config.max_new_tokens}")
    return pairs
