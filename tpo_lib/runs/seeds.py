"""Several runs of one setting: means over seeds and prompts, paired differences, and Holm's correction of them.

    mean of S seeds on n prompts = truth + seeds' part, variance V_s / S + prompts' part, variance V_p / n

Every seed answers the same prompts, so these are crossed and not nested: what a prompt does to all seeds does not average out
over them. Few seeds (2 to 5) cannot be resampled: of three there are ten different draws, and where seeds matter most an
interval of such draws holds the truth 79 times in 100. So the seeds' variance is estimated, the prompts' is the bootstrap's, and
Student's t has the degrees of freedom of the two (Satterthwaite 1946): 93 in 100 at worst with three seeds, 89 with two. With
one seed all is as in `intervals`.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy.stats import t

from tpo_lib.intervals import Metric, bootstrap
from tpo_lib.rewards import in_unit_interval

LEVEL = 0.95
SHARES = {"accuracy_logratio", "accuracy_mean", "own_accuracy", "distinct_2", "distinct_2_within", "repetition", "rare"}
NOT_NEGATIVE = {"kl", "seqkl_chosen", "seqkl_rejected", "entropy", "ref_perplexity", "length"}


def paired_differences(
    by_prompt: Mapping[str, Sequence[float]], *, seed: int, groups: Sequence[Hashable] | None = None
) -> list[dict]:
    """Mean of a - b of every two objectives, {"a", "b", "mean", "low", "high", "n"} each, prompt by prompt.

    Both answered the same P prompts, so what a prompt does to both cancels: narrower than two intervals suggest. Of pairs, say
    in `groups` which prompt each has.

    Example:
        >>> paired_differences({"dpo": [0.5, 0.6], "tdpo2": [0.7, 0.8]}, seed=0)[0]["mean"].__round__(3)
        -0.2
    """
    values = {name: np.asarray(by_prompt[name], dtype=np.float64) for name in by_prompt}
    return [
        {"a": a, "b": b, **bootstrap(values[a] - values[b], seed=seed, groups=groups).as_dict()}
        for a, b in itertools.combinations(values, 2)
    ]


def over_seeds(values, *, seed: int) -> Metric:
    """Mean of an (S, n) table, a row a seed and a column a prompt, with its 95% interval; n stays the number of prompts.

    Raises:
        ValueError: the table is not two-dimensional, is empty, or holds a number that is not finite.

    Example:
        >>> over_seeds([[0.4, 0.6, 0.5]], seed=0) == bootstrap([0.4, 0.6, 0.5], seed=0)  # one seed
        True
    """
    values = _table(values, "values")
    return widened(bootstrap(values.mean(0), seed=seed), values.mean(1))


def widened(metric: Metric, means: Sequence[float]) -> Metric:
    """A mean whose interval covers the evaluation alone, with one that covers the spread of its seeds' means too."""
    if len(means) == 1:
        return metric
    error, freedom = standard_error(metric, means)
    half = float(t.ppf((1 + LEVEL) / 2, freedom)) * error
    return Metric(metric.mean, metric.mean - half, metric.mean + half, metric.n)


def paired_over_seeds(tables: Mapping[str, Sequence], *, seed: int) -> list[dict]:
    """`paired_differences` of (S, n) tables, seed by seed and prompt by prompt, with p values.

    Returns:
        {"a", "b", "mean", "low", "high", "n", "p", "holm"} of every two settings: p of the hypothesis that they are equal, and
        p after Holm's correction for all of them (below .05: told apart, with an error of 5% for the whole family).

    Raises:
        ValueError: as in `over_seeds`, or two tables differ in shape.

    Example:
        >>> paired_over_seeds({"dpo": [[0.5, 0.6, 0.4]], "tdpo2": [[0.7, 0.8, 0.6]]}, seed=0)[0]["mean"].__round__(3)
        -0.2
    """
    tables, found = {name: _table(values, name) for name, values in tables.items()}, []
    for a, b in itertools.combinations(tables, 2):
        if tables[a].shape != tables[b].shape:
            raise ValueError(
                f"{a} has {tables[a].shape} seeds x prompts, {b} has {tables[b].shape}: paired differences need the same"
            )
        difference = tables[a] - tables[b]
        metric, means = bootstrap(difference.mean(0), seed=seed), difference.mean(1)
        found.append({"a": a, "b": b, **widened(metric, means).as_dict(), "p": p_value(metric, means)})
    corrected = holm([entry["p"] for entry in found])
    return [entry | {"holm": p} for entry, p in zip(found, corrected, strict=True)]


def table_of(point: Mapping, metric: str) -> list | None:
    """(S, n) numbers of a metric at one point of a curve, a row a seed, if it kept them."""
    one = point.get("by_prompt", {}).get(metric)
    return point.get("by_seed", {}).get(metric) or (one and [one])


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number (Holm 1979): the k-th smallest of m times m - k + 1, never falling, at most 1.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order, corrected, most = np.argsort(p_values, kind="stable"), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        most = corrected[i] = max(most, min(1.0, (len(order) - rank) * p_values[i]))
    return corrected


def merged(points: Sequence[Mapping], *, seed: int) -> dict:
    """The points that the seeds of one setting have at one step as one point; a single one stays as it is.

    Every metric gains seeds (the mean of each), seed_sd (their standard deviation, n - 1) and evaluation (half the length of the
    interval that covers the prompts alone); by_prompt is the mean over seeds, by_seed has the (S, n) tables.

    Raises:
        ValueError: the points stand at different steps.
    """
    first = dict(points[0])
    if len(points) == 1:
        return first
    steps = [point["step"] for point in points]
    if len(set(steps)) > 1:
        raise ValueError(f"points of several seeds stand at steps {steps}; one mean needs the same step of all")
    common = set.intersection(
        *(set(point.get("by_prompt", {})) for point in points)
    )  # an old evaluation may have fewer
    tables = {name: [p["by_prompt"][name] for p in points] for name in first.get("by_prompt", {}) if name in common}
    first = {name: value for name, value in first.items() if name != "by_prompt" and all(name in p for p in points)}
    for name, value in first.items():
        if isinstance(value, Mapping) and "mean" in value:
            first[name] = _merged_metric(name, [point[name] for point in points], tables.get(name), seed)
    if tables:
        first |= {"by_prompt": {name: np.mean(table, 0).tolist() for name, table in tables.items()}, "by_seed": tables}
    return first


def _merged_metric(name: str, metrics: Sequence[Mapping], table: Sequence | None, seed: int) -> dict:
    means = [metric["mean"] for metric in metrics]
    mean = float(np.mean(means))
    if table is None:
        # No number a prompt, and what the prompts of all seeds share does not average out: halves do not fall.
        half = float(np.mean([metric["high"] - metric["low"] for metric in metrics])) / 2
        alone = Metric(mean, mean - half, mean + half, metrics[0]["n"])
        share = name in SHARES
    else:
        alone = bootstrap(np.mean(table, 0), seed=seed)
        share = name in SHARES or (
            name in ("reward", "judge", "second_judge") and in_unit_interval(itertools.chain(*table))
        )
    both = widened(alone, means).as_dict()
    if share or name in NOT_NEGATIVE:  # few seeds make long intervals, longer than what can be
        both["low"] = min(mean, max(0.0, both["low"]))
    if share:
        both["high"] = min(1.0, both["high"])
    return both | {"seeds": means, "seed_sd": float(np.std(means, ddof=1)), "evaluation": (alone.high - alone.low) / 2}


def standard_error(metric: Metric, means: Sequence[float]) -> tuple[float, float]:
    """The standard error of a mean over prompts and seeds, and its degrees of freedom (Satterthwaite's).

    Args:
        metric: the mean over seeds, with the interval that covers the prompts alone.
        means: of every seed.
    """
    free = max(1, metric.n - 1)
    parts = [(((metric.high - metric.low) / 2 / t.ppf((1 + LEVEL) / 2, free)) ** 2, free)]  # of the prompts
    if len(means) > 1:
        parts.append((np.var(means, ddof=1) / len(means), len(means) - 1))
    total = sum(part for part, _ in parts)
    freedom = total**2 / sum(part**2 / free for part, free in parts) if total else metric.n
    return float(total**0.5), float(freedom)


def p_value(metric: Metric, means: Sequence[float]) -> float:
    """P of the hypothesis that a mean is 0 (two-sided), with the arguments of `standard_error`."""
    error, freedom = standard_error(metric, means)
    if metric.n == len(means) == 1 or metric.mean == 0:
        return 1.0  # one number tells nothing
    return float(2 * t.sf(abs(metric.mean) / error, freedom)) if error else 0.0


def _table(values, name: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"{name} has shape {values.shape}; several seeds need an (S, n) table, a row a seed")
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(f"{name}[{row}, {column}] is {values[row, column]}: every value of a mean must be finite")
    return values
