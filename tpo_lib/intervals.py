"""Means with 95% intervals: what is resampled is independent, a prompt or a held-out pair, never a token."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 2000
BLOCK = 1_000_000  # numbers drawn at a time: bounds the memory of a bootstrap over many values


@dataclass(frozen=True)
class Metric:
    """A mean, the bounds of its 95% interval, and the n independent units behind it (prompts or pairs)."""

    mean: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        """Return {"mean", "low", "high", "n"} of plain Python numbers, as written to summary.json."""
        return asdict(self)


def bootstrap(values, *, seed: int, resamples: int = RESAMPLES, confidence: float = 0.95) -> Metric:
    """Mean of n >= 1 values with its percentile bootstrap interval; of equal values it has length 0.

    Args:
        values: (n,) tensor or array.
        seed: equal seeds and equal n draw equal resamples.
        resamples, confidence: means of n values drawn with replacement, and the share of them inside, in (0, 1).

    Raises:
        ValueError: there is no value, or one is not finite (its index is named).

    Example:
        >>> bootstrap([1.0, 1.0, 1.0], seed=0)
        Metric(mean=1.0, low=1.0, high=1.0, n=3)
    """
    values = _finite(values, "values")
    return bootstrap_ratio(values, np.ones(len(values)), seed=seed, resamples=resamples, confidence=confidence)


def bootstrap_ratio(sums, counts, *, seed: int, resamples: int = RESAMPLES, confidence: float = 0.95) -> Metric:
    """sum(sums) / sum(counts), nats a token say: tokens of a sequence depend on each other, so it is drawn as a whole.

    Raises:
        ValueError: lengths differ, a count is negative, all are 0, or a number is not finite (its index is named).

    Example:
        >>> bootstrap_ratio([2.0, 4.0], [1, 2], seed=0).mean  # 6 / 3, not the mean of 2/1 and 4/2
        2.0
    """
    sums, counts = _finite(sums, "sums"), _finite(counts, "counts")
    if len(sums) != len(counts) or (counts < 0).any() or counts.sum() == 0:
        raise ValueError(
            f"{len(sums)} sums over {len(counts)} counts (total {counts.sum()}): need one count >= 0 a sum"
        )
    generator, n, ratios = np.random.default_rng(seed), len(sums), []
    for start in range(0, resamples, rows := max(1, BLOCK // n)):
        drawn = generator.integers(n, size=(min(rows, resamples - start), n))  # (rows, n)
        top, bottom = sums[drawn].sum(axis=1), counts[drawn].sum(axis=1)  # (rows,)
        ratios.append(top[bottom > 0] / bottom[bottom > 0])
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    return Metric(float(sums.sum() / counts.sum()), float(low), float(high), n)


def paired_differences(by_prompt: Mapping[str, Sequence[float]], *, seed: int) -> list[dict]:
    """Mean of a - b of every two objectives, {"a", "b", "mean", "low", "high", "n"} each, prompt by prompt.

    Both answered the same P prompts, so what a prompt does to both cancels: narrower than two intervals suggest.

    Example:
        >>> paired_differences({"dpo": [0.5, 0.6], "tdpo2": [0.7, 0.8]}, seed=0)[0]["mean"].__round__(3)
        -0.2
    """
    return [
        {"a": a, "b": b, **bootstrap(_finite(by_prompt[a], a) - _finite(by_prompt[b], b), seed=seed).as_dict()}
        for a, b in itertools.combinations(by_prompt, 2)
    ]


def _finite(values, name: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name} has shape {values.shape}; an interval needs an (n,) array with n >= 1")
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"{name}[{bad}] is {values[bad]}: every value of a mean must be finite")
    return values
