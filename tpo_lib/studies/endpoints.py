"""What one run of a study says, prompt by prompt, so that every later step is a mean over an (S seeds, P prompts) table.

A run is its record, see `execute`: {"points": [{"step": updates, "by_prompt": {metric: [P numbers]}}, ...], ...}, the untrained
start first. All runs of a study answer the same P prompts in one order, so their values may be subtracted.

Where a value is read at a level of another metric, a KL say, the level is reached by the run's mean, which has noise of its own.
To first order it moves the value read by minus the slope of the curve times what it is off, and off it is by the mean of what the
prompts are off. So every prompt's value has its share of that subtracted (the delta method): the mean stays what is read off the
curve, and the spread over prompts tells its whole error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import comb, log

import numpy as np

from tpo_lib.intervals import linearised
from tpo_lib.studies.bench import Data

Run = Mapping  # a record
CONVERGED = log(2) / 10  # a tenth of the loss at the start, nats


def curve(run: Run, metric: str) -> np.ndarray:
    """(C, P): a metric at every point of a run, for every prompt.

    Raises:
        ValueError: a point lacks it.
    """
    for point in run["points"]:
        if metric not in point["by_prompt"]:
            raise ValueError(f"step {point['step']} has no {metric!r} by prompt; it has {sorted(point['by_prompt'])}")
    return np.array([point["by_prompt"][metric] for point in run["points"]], dtype=np.float64)


def end(run: Run, metric: str, step: int | None = None) -> np.ndarray:
    """(P,): a metric at an evaluation after `step` updates; None: at the last.

    Raises:
        ValueError: the run was not evaluated there.
    """
    steps = [point["step"] for point in run["points"]]
    if step is not None and step not in steps:
        raise ValueError(f"step {step} was not evaluated: take one of {steps}")
    return curve(run, metric)[-1 if step is None else steps.index(step)]


def at_level(run: Run, metric: str, level: float, x: str = "kl") -> np.ndarray | None:
    """(n,): a metric where the run's mean `x` first comes to a level from below; None where it never does.

    Read straight between two points, in sqrt(KL) where x is "kl" and in x itself where it is a reward, as `plots.at_level` does.
    n is P; where `x` has Q prompts and the metric P others (those with held-out pairs, of seqkl), it is P + Q: two sets of
    values that are taken as independent, with the same mean and the variance that both together give it.

    Example:
        >>> points = [{"step": 0, "by_prompt": {"kl": [0.0, 0.0], "reward": [0.4, 0.6]}}]
        >>> points += [{"step": 8, "by_prompt": {"kl": [4.0, 4.0], "reward": [0.9, 0.9]}}]
        >>> at_level({"points": points}, "reward", 1.0).round(6).tolist()  # half of the way in sqrt(KL)
        [0.65, 0.75]
    """
    values, xs, at = curve(run, metric), *_axis(run, x)
    place = _place(xs, at, level, root=x == "kl")
    return None if place is None else _read(values, *place)


def budget(run: Run, metric: str, level: float) -> np.ndarray:
    """(n,): what a run gives within a budget of KL, in nats: the metric `at_level` where the run comes there, else at its end.

    So a method that rests at 4 nats has its end for every larger budget, even where it was farther out, and better, before.
    """
    values, xs, at = curve(run, metric), *_axis(run, "kl")
    return _within(values, xs, at, level)


def area(run: Run, metric: str, low: float, high: float) -> np.ndarray:
    """(n,): the mean of `budget` over all budgets from low to high nats, equally spaced in sqrt(KL): the area under the frontier.

    Exact: between the run's points, and beyond its last, the curve is straight in sqrt(KL): its mean is its value in the middle.

    Raises:
        ValueError: not 0 <= low < high.
    """
    if not 0 <= low < high:
        raise ValueError(f"an area from {low} to {high} nats: need 0 <= low < high")
    values, xs, at = curve(run, metric), *_axis(run, "kl")
    cuts = np.unique(np.clip([low**0.5, *at, high**0.5], low**0.5, high**0.5))
    middles = (cuts[1:] + cuts[:-1]) / 2
    each = [width * _within(values, xs, at, middle**2) for width, middle in zip(np.diff(cuts), middles, strict=True)]
    return np.sum(each, axis=0) / (high**0.5 - low**0.5)


def equal_area(run: Run, metric: str, low: float, high: float) -> np.ndarray | None:
    """The same of a run that comes to `high`, else None: so that methods are compared where all of them were."""
    return None if at_level(run, metric, high) is None else area(run, metric, low, high)


def drop(run: Run, metric: str, best: int | None = None) -> np.ndarray:
    """(P,): a metric at its highest evaluation minus at its end; what is lost by training on.

    The highest of several is too high by the noise it was chosen with. So it is chosen on other data: with `best`, the update
    that `best_step` found on validation prompts, or else for the even prompts by the odd ones and the other way round.
    """
    values = curve(run, metric)
    if best is not None:
        return end(run, metric, best) - values[-1]
    found = np.empty(values.shape[1])
    for mine, others in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        found[mine] = values[values[:, others].mean(1).argmax(), mine] - values[-1, mine]
    return found


def best_step(run: Run, metric: str) -> int:
    """The update of the evaluation at which the mean of a metric is highest."""
    return run["points"][int(curve(run, metric).mean(1).argmax())]["step"]


def at_best(run: Run, best: str, metric: str = "kl") -> np.ndarray:
    """(1,): the mean of a metric at the evaluation where that of `best` is highest: where a run turns, unless that is its end.

    One number a run, whose spread is that of the seeds; between two evaluations nothing is known.
    """
    return end(run, metric, best_step(run, best)).mean(keepdims=True)


def steps_to(run: Run, level: float, x: str = "reward") -> np.ndarray | None:
    """(P,): the updates after which the mean of `x` first comes to a level, straight between evaluations; None if it never does.

    A run has one such number, the mean of these; a prompt's value says how it would move that number, as in `at_level`. A start
    that is there has needed 0.
    """
    return _spent(run, level, x, [[point["step"]] for point in run["points"]])


def tokens_to(run: Run, level: float, x: str = "reward") -> np.ndarray | None:
    """(P,): tokens sampled from the policy or the start until `steps_to`: those that an online run has logged by then.

    A run on pairs had all of them before its first update, whenever it comes there: every completion that its pairs were chosen
    from, at the start's mean length on the evaluation's prompts, without the tokens that end texts (a writer's, see `bench.Data`,
    are taken to be as long as the start's).
    """
    if "online" in run["spec"]:
        return _spent(run, level, x, _logged(run, "tokens"))
    stage = Data(**run["spec"]["data"]).config()
    return _spent(run, level, x, stage.train_prompts * stage.samples_per_prompt * curve(run, "length")[0])


def seconds_to(run: Run, level: float, x: str = "reward") -> np.ndarray | None:
    """(P,): processor seconds until `steps_to` without evaluations, on the machine that made the run, in one thread.

    They are a share of those of its training: of a run on pairs, that of the updates, of an online run that of the tokens it has
    sampled and learnt from (the clock also counts what ran beside it). What sampling pairs took, or training a guide, is in no
    record and left out.
    """
    steps = np.array([[point["step"]] for point in run["points"]])
    gone = _logged(run, "tokens") if "online" in run["spec"] else steps
    return _spent(run, level, x, run["seconds"]["training"] * gone / gone[-1])


def converged(run: Run, over: int) -> np.ndarray | None:
    """(1,): the updates after which the training loss, averaged over the last `over` (an epoch), is CONVERGED; None if never.

    One number a run, whose spread is that of the seeds.
    """
    steps, losses = (np.array([row[name] for row in run["training"]]) for name in ("step", "loss"))
    for step in steps[steps >= over]:
        if losses[(steps > step - over) & (steps <= step)].mean() <= CONVERGED:
            return np.array([float(step)])
    return None


def at_convergence(run: Run, metric: str, over: int) -> np.ndarray:
    """(P,): a metric where the loss has `converged`, straight between evaluations; at the end of a run whose loss never does."""
    values, steps, at = curve(run, metric), [point["step"] for point in run["points"]], converged(run, over)
    return values[-1] if at is None else np.array([np.interp(at[0], steps, each) for each in values.T])


def floored(run: Run) -> np.ndarray | None:
    """(1,): the share of response tokens with a TGDPO weight on its floor, mean over logged updates; None without weights."""
    shares = [row["guidance/floor_share"] for row in run["training"] if "guidance/floor_share" in row]
    return np.array([np.mean(shares)]) if shares else None


def per_token(run: Run, metric: str) -> np.ndarray:
    """(P,): a sum over a sample's tokens at the end, as the KL is, by the token."""
    return linearised(end(run, metric), end(run, "length"))


def exponent(run: Run, metric: str) -> np.ndarray:
    """(n,): the power of t by which a metric of the first t tokens, "seqkl_mean" of `measures.growth` say, grows, at the end.

    The least-squares slope of its logarithm over log t; 1 is in proportion to the length.

    Raises:
        ValueError: it was measured at fewer than two lengths, or is not positive at one.
    """
    last, name = run["points"][-1]["by_prompt"], f"{metric}_at_"
    lengths = np.array([int(each.removeprefix(name)) for each in last if each.startswith(name)])
    values = np.array([last[f"{name}{t}"] for t in lengths])
    if len(lengths) < 2 or (values.mean(1) <= 0).any():
        raise ValueError(f"{metric} was measured at the lengths {lengths.tolist()}: need two, and positive means")
    x, means = np.log(lengths), values.mean(1, keepdims=True)
    slope = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    return slope @ (np.log(means) + values / means - 1)  # d log x = dx / x


def best_of_n(scores, n: int, by=None) -> np.ndarray:
    """(P,): the mean score of the best of n samples, over all choices of n among the K >= n of a prompt.

    The i-th smallest of K is the largest of C(i - 1, n - 1) of the C(K, n) choices.

    Args:
        scores: (P, K), of the start's samples.
        by: (P, K) what chooses among them, the reward where the scores are a judge's; None: the scores themselves.

    Example:
        >>> best_of_n([[0.0, 1.0, 0.5]], 2).round(6).tolist()  # of the three choices the larger ones are .5, 1, 1
        [0.833333]
    """
    scores = np.asarray(scores, dtype=np.float64)
    count = scores.shape[1]
    if not 1 <= n <= count:
        raise ValueError(f"the best of {n} among {count} samples a prompt: need 1 <= n <= {count}")
    order = np.argsort(scores if by is None else np.asarray(by), axis=1, kind="stable")
    return np.take_along_axis(scores, order, 1) @ [comb(i, n - 1) / comb(count, n) for i in range(count)]


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n nats: KL(best of n || start) where no two samples score the same, else more than it."""
    return log(n) - (n - 1) / n


# What a study's file may name.
ENDPOINTS: dict[str, Callable] = {
    each.__name__: each
    for each in (
        *(end, at_level, budget, area, equal_area, drop, at_best, steps_to, tokens_to, seconds_to),
        *(converged, at_convergence, floored, per_token, exponent),
    )
}


def table(runs: Sequence[Run], endpoint: str, *args, **how) -> np.ndarray | None:
    """(S, n): one endpoint of the runs of all seeds, in their order; None where one of them never comes to the level.

    The mean of those that do would be one of chosen seeds: `budget` and `area` have a value for all.

    Args:
        endpoint: key of ENDPOINTS; what follows are its own arguments, `table(runs, "area", "reward", 1, 20)`.
    """
    rows = [ENDPOINTS[endpoint](run, *args, **how) for run in runs]
    return None if any(row is None for row in rows) else np.array(rows)


def _axis(run: Run, x: str) -> tuple[np.ndarray, np.ndarray]:
    """What levels are of: (C, Q) deviations of prompts from the mean, and the (C,) means, both in the variable of the axis."""
    values = curve(run, x)
    means = values.mean(1)
    if x != "kl":
        return values - means[:, None], means
    roots = np.sqrt(np.maximum(means, 0.0))  # a KL of 0 may be a rounding below it
    with np.errstate(divide="ignore", invalid="ignore"):  # d sqrt(x) = dx / (2 sqrt(x)); the start has no deviation
        return np.where(roots[:, None] > 0, (values - means[:, None]) / (2 * roots[:, None]), 0.0), roots


def _place(off: np.ndarray, at: np.ndarray, level: float, *, root: bool) -> tuple | None:
    """The first segment that comes to the level, the weight of its left end, its width, and what the prompts are off there."""
    level = level**0.5 if root else level
    found = np.flatnonzero((at[:-1] <= level) & (level <= at[1:]))
    if not len(found):
        return None
    i = found[0]
    width = at[i + 1] - at[i]
    weight = (at[i + 1] - level) / width if width else 1.0
    return i, weight, width, weight * off[i] + (1 - weight) * off[i + 1]


def _spent(run: Run, level: float, x: str, spent) -> np.ndarray | None:
    """(n,): what a run has spent by the time its mean `x` first comes to a level; 0 where it starts there, None if it never does.

    `spent` is (C, 1) at the run's points, or (n,) where all of it was spent before.
    """
    off, at = _axis(run, x)
    if at[0] >= (level**0.5 if x == "kl" else level):
        return np.zeros(off.shape[1])
    place = _place(off, at, level, root=x == "kl")
    return None if place is None else _read(np.broadcast_to(np.array(spent, dtype=np.float64), off.shape), *place)


def _logged(run: Run, name: str) -> np.ndarray:
    """(C, 1): a sum that training logs after every update, at the run's points."""
    sums = {0: 0.0} | {row["step"]: row[name] for row in run["training"]}
    return np.array([[sums[point["step"]]] for point in run["points"]])


def _read(values: np.ndarray, i: int, weight: float, width: float, off: np.ndarray) -> np.ndarray:
    """A metric at a place on the axis, for every prompt."""
    slope = (values[i + 1].mean() - values[i].mean()) / width if width else 0.0
    return _joined(weight * values[i] + (1 - weight) * values[i + 1], slope * off)


def _within(values: np.ndarray, off: np.ndarray, at: np.ndarray, level: float) -> np.ndarray:
    place = _place(off, at, level, root=True)
    if place is not None:
        return _read(values, *place)
    return _joined(values[0 if level < at[0] ** 2 else -1], np.zeros(off.shape[1]))


def _joined(values: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """(P,) values minus (Q,) shifts of mean 0; of other prompts side by side, each scaled so that the variances of means add."""
    if len(values) == len(shift):
        return values - shift
    mean, n = values.mean(), len(values) + len(shift)
    return np.concatenate([mean + n / len(values) * (values - mean), mean - n / len(shift) * shift])
