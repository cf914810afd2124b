"""Means with 95% intervals: what is resampled is independent, a prompt with all that hangs on it, never a pair or a token.

The percentile bootstrap is too narrow by sqrt(1 - 1/n) and by Student's t over the normal quantile, so its tails are moved out to
Phi(sqrt(n / (n - 1)) t_(n-1)) (Hesterberg 2015, "expanded percentile"). Measured on scores in (0, 1) crowded at both ends, 95%
intervals then cover .92 (before: .86) at n = 5, .96 (.91) at 8, .95 (.94) at 30; crowded near 1, .85 (.77), .89 (.83) and .94
(.92). No formula helps shares near 0 or 1 at small n: of 8 answers with a chance of .9, 43 in 100 tables show no failure at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from scipy.special import ndtr, stdtrit

RESAMPLES = 2000
BLOCK = 1_000_000  # numbers drawn at a time: bounds the memory of a bootstrap over many values


@dataclass(frozen=True)
class Metric:
    """A mean, the bounds of its 95% interval, and the n independent units behind it (prompts)."""

    mean: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        """Return {"mean", "low", "high", "n"} of plain Python numbers, as written to summary.json."""
        return asdict(self)


def bootstrap(
    values, *, seed: int, groups: Sequence[Hashable] | None = None, resamples: int = RESAMPLES, confidence: float = 0.95
) -> Metric:
    """Mean of n >= 1 values with its bootstrap interval, see the module; of equal values it has length 0.

    Args:
        values: (n,) tensor or array.
        seed: equal seeds and equal n draw equal resamples.
        groups: (n,) labels, the prompt of every pair say: what has the same one is drawn together (see `by_group`).
        resamples, confidence: means of n values drawn with replacement, and the share of them inside, in (0, 1).

    Raises:
        ValueError: there is no value, one is not finite (its index is named), or values and groups differ in number.

    Example:
        >>> bootstrap([1.0, 1.0, 1.0], seed=0)
        Metric(mean=1.0, low=1.0, high=1.0, n=3)
        >>> bootstrap([1.0, 0.0, 1.0, 0.0], groups=["a", "a", "b", "b"], seed=0)  # every prompt says the same
        Metric(mean=0.5, low=0.5, high=0.5, n=2)
    """
    each = _finite(values, "values") if groups is None else by_group(values, groups)
    found = bootstrap_ratio(each, np.ones(len(each)), seed=seed, resamples=resamples, confidence=confidence)
    if groups is not None:  # no mean lies beyond the values, a share above 1 say, as a linearised one may
        found = replace(found, low=max(found.low, float(min(values))), high=min(found.high, float(max(values))))
    return found


def by_group(values, groups: Sequence[Hashable]) -> np.ndarray:
    """(n,) values -> (G,), one a group as they appear, `linearised`: of groups of one size the mean of each."""
    values = _finite(values, "values")
    groups = groups.tolist() if hasattr(groups, "tolist") else list(groups)  # the entries of a tensor have no equals
    if len(groups) != len(values):
        raise ValueError(f"{len(values)} values in {len(groups)} groups: need the group of every value")
    of = list(map({group: i for i, group in enumerate(dict.fromkeys(groups))}.get, groups))
    return linearised(np.bincount(of, values), np.bincount(of))


def linearised(sums, counts):
    """(n,) arrays or tensors -> (n,) values to subtract, of mean sum(sums) / sum(counts) and, to first order, its spread."""
    ratio = sums.sum() / counts.sum()
    return ratio + len(sums) / counts.sum() * (sums - ratio * counts)


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
        raise ValueError(f"{len(sums)} sums over {len(counts)} counts (total {counts.sum()}): need one >= 0 for each")
    if len(sums) == 1:
        warnings.warn("one prompt makes an interval of length 0, which says nothing: take two at least", stacklevel=2)
    generator, n, ratios = np.random.default_rng(seed), len(sums), []
    for start in range(0, resamples, rows := max(1, BLOCK // n)):
        drawn = generator.integers(n, size=(min(rows, resamples - start), n))  # (rows, n)
        top, bottom = sums[drawn].sum(axis=1), counts[drawn].sum(axis=1)  # (rows,)
        ratios.append(top[bottom > 0] / bottom[bottom > 0])
    tail = ndtr((n / max(1, n - 1)) ** 0.5 * stdtrit(max(1, n - 1), (1 - confidence) / 2))
    return Metric(float(sums.sum() / counts.sum()), *np.quantile(np.concatenate(ratios), [tail, 1 - tail]).tolist(), n)


def _finite(values, name: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name} has shape {values.shape}; an interval needs an (n,) array with n >= 1")
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"{name}[{bad}] is {values[bad]}: every value of a mean must be finite")
    return values
