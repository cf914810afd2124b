"""Scored completions -> preference pairs, cached by the content of everything that decides them.

This is the controlled-sentiment recipe of the DPO paper (arXiv 2305.18290): sample several completions of every prompt,
score each with a reward, and let the higher score be the chosen one.

    prompts --generate--> completions --score--> scores --pairs_from_scores--> Dataset, PairReport
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor

from tpo_lib.files import store
from tpo_lib.files.pairs import load_pairs, pairs_table, save_pairs
from tpo_lib.files.tokens import token_method, vocabulary_name
from tpo_lib.models import fingerprint, tokenizer_content
from tpo_lib.rewards import in_unit_interval, name_of, probe, scores_of
from tpo_lib.sampling import Completion, Progress, generate, stop_ids

Rule = Literal["all", "best_worst"]
BARS = 20  # of the histogram of gaps
CACHE_VERSION = 2  # raise it when the meaning of a setting changes: old entries are then not found


def score(reward, prompts: Sequence[str], completion_texts: Sequence[Sequence[str]]) -> Tensor:
    """Score every completion of every prompt.

    A reward of scope "response" reads the completion alone, one of scope "full" prompt and completion as one text.

    Returns:
        (P, K) for P prompts and P lists of K texts each: float32, or float64 where the reward computes in it.

    Raises:
        ValueError: the lists do not match, or as in `rewards.scores_of`.
    """
    widths = sorted({len(texts) for texts in completion_texts})
    if len(prompts) != len(completion_texts) or len(widths) > 1:
        raise ValueError(f"{len(prompts)} prompts, {len(completion_texts)} lists of completions of lengths {widths}")
    full = getattr(reward, "scope", "response") == "full"
    pairs = zip(prompts, completion_texts, strict=True)
    scores = scores_of(reward, [prompt + text if full else text for prompt, several in pairs for text in several])
    return scores.view(len(prompts), len(scores) // max(1, len(prompts)))  # (P K,) -> (P, K)


def score_samples(reward, tokenizer, prompts: Sequence[str], completions: Sequence[Sequence[Completion]]) -> Tensor:
    """Score sampled completions: by the tokens that were sampled where the reward reads tokens of the same vocabulary.

    Their text, tokenized, would often give other tokens, whose credit is not that of the tokens that are trained.

    Args:
        reward: as for `score`; with `score_ids` and a `tokenizer`, as AdditiveReward has them, it reads tokens.
        tokenizer: the one that the completions were sampled with.
    """
    score_ids = token_method(reward, "score_ids", tokenizer)
    if score_ids is None:
        return score(reward, prompts, [[completion.text for completion in several] for several in completions])
    rows = [completion.token_ids for several in completions for completion in several]
    return scores_of(score_ids, rows).view(len(prompts), len(rows) // max(1, len(prompts)))  # (P K,) -> (P, K)


@dataclass(frozen=True)
class PairReport:
    """What became of the samples.

    Attributes:
        prompts, completions: how many were there; kept: pairs in the table.
        dropped: reason -> candidate pairs that were left out for it.
        gap_edges, gap_counts: (BARS + 1,), (BARS,) histogram of the score gaps, chosen minus rejected, of the pairs kept:
            from 0 to 1 if all scores lie in [0, 1], else to the largest gap.
        score_mean, score_std: of the scores of all completions (standard deviation of the population).
    """

    prompts: int
    completions: int
    kept: int
    dropped: dict[str, int]
    gap_edges: tuple[float, ...]
    gap_counts: tuple[int, ...]
    score_mean: float
    score_std: float

    @property
    def bounded(self) -> bool:
        """All scores lie in [0, 1], as a probability's do."""
        return self.gap_edges[-1] == 1

    def __str__(self) -> str:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items() if count) or "none"
        lines = [
            f"{self.kept:,} pairs from {self.completions:,} completions of {self.prompts:,} prompts",
            f"dropped: {dropped}",
            f"scores: mean {self.score_mean:.3f}, standard deviation {self.score_std:.3f}",
            "score gap, chosen - rejected:",
        ]
        most, digits = max(1, *self.gap_counts), ".2f" if self.bounded else ".3g"
        for (low, high), count in zip(itertools.pairwise(self.gap_edges), self.gap_counts, strict=True):
            eighths = round(240 * count / most)  # of a bar of 30 characters
            bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
            lines.append(f"  {low:{digits}} to {high:{digits}} {bar:30} {count:,}")
        return "\n".join(lines)


def pairs_from_scores(
    prompts: Sequence[str],
    completions: Sequence[Sequence[Completion]],
    scores: Sequence[Sequence[float]],
    *,
    rule: Rule = "all",
    min_gap: float = 0.0,
    tokenizer=None,
) -> tuple[Dataset, PairReport]:
    """Turn scored completions into preference pairs: the higher score is the chosen one.

    Args:
        rule: "all" takes every pair of completions of a prompt (6 of 4), "best_worst" its highest against its lowest.
        min_gap: pairs whose scores differ by less are dropped. Equal scores are dropped whatever it is.
        tokenizer: the one that the completions were sampled with; with it, the table holds the sampled ids too.

    Returns:
        A table with prompt, chosen, rejected, chosen_score, rejected_score, chosen_complete, rejected_complete, with a
        tokenizer chosen_ids, rejected_ids, tokenizer, and the report of what was kept and dropped.

    Raises:
        ValueError: the rule is unknown, min_gap negative, or the lists do not match.
    """
    if rule not in ("all", "best_worst") or not min_gap >= 0:
        raise ValueError(f'rule must be "all" or "best_worst" and min_gap at least 0, got {rule!r} and {min_gap}')
    rows: list[dict[str, Any]] = []
    dropped = dict.fromkeys(("empty text", "identical text", "equal scores", "gap below min_gap"), 0)
    name = {} if tokenizer is None else {"tokenizer": vocabulary_name(tokenizer)}
    for prompt, several, values in zip(prompts, completions, scores, strict=True):
        scored = list(zip(map(float, values), several, strict=True))
        scored.sort(key=lambda pair: -pair[0])  # stable: ties keep their order
        candidates = list(itertools.combinations(scored, 2))
        if rule == "best_worst":
            candidates = [(scored[0], scored[-1])][: len(candidates)]
        for (high, better), (low, worse) in candidates:
            if not (better.text.strip() and worse.text.strip()):
                dropped["empty text"] += 1
            elif better.text == worse.text:
                dropped["identical text"] += 1
            elif high == low:
                dropped["equal scores"] += 1
            elif high - low < min_gap:
                dropped["gap below min_gap"] += 1
            else:
                row = {"prompt": prompt, "chosen": better.text, "rejected": worse.text}
                row |= {"chosen_score": high, "rejected_score": low}
                row |= {"chosen_complete": better.complete, "rejected_complete": worse.complete}
                rows.append(row | ({"chosen_ids": better.steps, "rejected_ids": worse.steps} | name if name else {}))
    return pairs_table(rows), _report(rows, dropped, scores)


def _report(rows: list[dict[str, Any]], dropped: dict[str, int], scores: Sequence[Sequence[float]]) -> PairReport:
    gaps = torch.tensor([row["chosen_score"] - row["rejected_score"] for row in rows], dtype=torch.float64)
    flat = torch.tensor([float(value) for values in scores for value in values], dtype=torch.float64)
    bounded = not len(gaps) or in_unit_interval(flat.tolist())
    counts, edges = torch.histogram(gaps, bins=BARS, range=(0.0, 1.0 if bounded else gaps.max().item()))
    return PairReport(
        prompts=len(scores),
        completions=len(flat),
        kept=len(rows),
        dropped=dropped,
        gap_edges=tuple(float(f"{edge:.9g}") for edge in edges.tolist()),
        gap_counts=tuple(int(count) for count in counts),
        score_mean=flat.mean().item() if len(flat) else math.nan,
        score_std=flat.std(correction=0).item() if len(flat) else math.nan,
    )


# ---- all of it, cached


def build_pairs(
    model,
    tokenizer,
    reward,
    *,
    prompts: list[str],
    samples_per_prompt: int = 4,
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    rule: Rule = "all",
    min_gap: float = 0.0,
    seed: int,
    cache_dir: Path | None,
    batch_size: int = 256,
    precision: str = "no",
    progress: Progress | None = None,
) -> tuple[Dataset, PairReport]:
    """Sample completions, score them and make pairs; the second call with the same content reads them from the cache.

    The cache entry is named by a SHA-256 over the model's weights and configuration, the tokenizer, the reward's
    fingerprint, the prompts and all settings. It is written atomically and verified when read; a damaged one is built
    anew, with a note on stderr. The samples have an entry of their own, written before they are scored: they outlive
    whatever fails after, and serve any reward. The pairs of a reward without a fingerprint are not cached.

    Args:
        cache_dir: folder of cache entries, or None for no cache.
        progress: called with (completions done, completions in all).

    Raises:
        ValueError: no pair was left (the message says why), or as in `generate`, `score` and `pairs_from_scores`.
    """
    sampling = {"samples_per_prompt": samples_per_prompt, "max_new_tokens": max_new_tokens, "temperature": temperature}
    sampling |= {"seed": seed, "batch_size": batch_size, "precision": precision}
    pairing = {"rule": rule, "min_gap": min_gap}

    def make() -> tuple[Dataset, PairReport]:
        probe(reward)
        completions = sample_cached(model, tokenizer, prompts, cache_dir=cache_dir, progress=progress, **sampling)
        scores = score_samples(reward, tokenizer, prompts, completions)
        dataset, report = pairs_from_scores(prompts, completions, scores.tolist(), **pairing, tokenizer=tokenizer)
        if not report.kept:
            raise ValueError(f"no pair is left; lower min_gap or sample longer or more completions.\n{report}")
        return dataset, report

    if cache_dir is None:
        return make()
    if not (mark := getattr(reward, "fingerprint", None)):
        print(f"reward {name_of(reward)!r} has no fingerprint, so its pairs are not cached", file=sys.stderr)
        return make()
    content = {"prompts": list(prompts), "reward": [mark, getattr(reward, "scope", "response")]}
    key = _content_hash(model, tokenizer, content | sampling | pairing)
    return store.cached(cache_dir, key, _read_pairs, make, _write_pairs)


def _write_pairs(made: tuple[Dataset, PairReport], folder: Path) -> None:
    save_pairs(made[0], folder / "pairs.parquet")
    (folder / "report.json").write_text(json.dumps(asdict(made[1])))


def _read_pairs(folder: Path) -> tuple[Dataset, PairReport]:
    fields = json.loads((folder / "report.json").read_text())
    report = PairReport(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})
    return load_pairs(folder / "pairs.parquet")[0], report


def sample_cached(
    model, tokenizer, prompts: Sequence[str], *, cache_dir: Path | None, progress: Progress | None = None, **sampling
) -> list[list[Completion]]:
    """`generate`, written to the cache before anything is made of it; the second call with the same content reads it.

    Args:
        cache_dir: folder of cache entries, or None for no cache.
        sampling: further arguments of `generate`.
    """

    def make() -> list[list[Completion]]:
        return generate(model, tokenizer, prompts, **sampling, progress=progress)

    def write(completions: list[list[Completion]], folder: Path) -> None:
        (folder / "samples.json").write_text(json.dumps(completions, default=asdict))

    def read(folder: Path) -> list[list[Completion]]:
        rows = json.loads((folder / "samples.json").read_text())
        return [[Completion(row["text"], tuple(row["token_ids"]), row["end"]) for row in several] for several in rows]

    if cache_dir is None:
        return make()
    key = f"samples-{_content_hash(model, tokenizer, {'samples': list(prompts), **sampling})}"
    return store.cached(cache_dir, key, read, make, write)


def _content_hash(model, tokenizer, settings: dict[str, Any]) -> str:
    content = {"version": CACHE_VERSION, "model": fingerprint(model), "tokenizer": tokenizer_content(tokenizer)}
    return store.content_key(content | {"stops": stop_ids(model, tokenizer)} | settings)
