"""How often A is preferred over B, as it is and at equal length, with intervals: questions are resampled, with all their turns.

Length is controlled as in AlpacaEval 2 (arXiv 2404.04475), by a logistic regression of the preference and its value at no
difference of length,

    p(A over B | question i) = sigma(theta + phi tanh(d_i / s)),        length-controlled rate = sigma(theta),

d_i the length of A's answer minus that of B's in characters, s the standard deviation of d, which is not centred. Left out are
the paper's term for the difficulty of a question, which takes the judgments of many models, and the penalties that its code
puts on the weights: a prior of phi ~ N(0, PRIOR^2) takes their place, too wide to act but where length parts wins from losses.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from scipy.special import expit, logit, ndtr, stdtrit

from tpo_lib.intervals import BLOCK, RESAMPLES, Metric

PRIOR = 10.0  # nats of log-odds
LONGEST_STEP = 2.0  # of Newton's method, in nats: where wins are all but parted it would leap too far
LEVELS = (0.95, 0.9)  # the second is Arena-Hard's


def fit(preference: np.ndarray, difference: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """theta and phi of the regression, (R,) each, of R weightings of n rows; where A always wins or loses theta is infinite.

    Args:
        preference: (n,) in [0, 1], 1 where A is preferred, 1/2 of a tie.
        difference: (n,) length of A's answer minus that of B's.
        weights: (R, n) how often each row counts.
    """
    total = weights.sum(1)
    mean = weights @ difference / total
    variance = np.maximum(weights @ difference**2 / total - mean**2, 0) * total / np.maximum(total - 1, 1)  # (R,)
    spread = np.sqrt(variance)[:, None]
    # where rounding alone tells lengths apart, nothing is to be controlled
    apart = spread > 1e-9 * np.abs(difference).max(initial=1.0)
    x = np.tanh(np.divide(difference, spread, out=np.zeros(weights.shape), where=apart))  # (R, n)
    with np.errstate(divide="ignore"):
        theta = logit(np.clip(weights @ preference / total, 0, 1))
    phi, decided = np.zeros_like(theta), np.isinf(theta)
    theta = np.where(decided, 0.0, theta)
    for _ in range(200):
        p = expit(theta[:, None] + phi[:, None] * x)
        rest, curve = weights * (preference - p), weights * p * (1 - p)
        slope = rest.sum(1), (rest * x).sum(1) - phi / PRIOR**2
        a, b, c = curve.sum(1), (curve * x).sum(1), (curve * x * x).sum(1) + PRIOR**-2
        inverse = 1 / np.maximum(a * c - b * b, 1e-12)
        steps = (c * slope[0] - b * slope[1]) * inverse, (a * slope[1] - b * slope[0]) * inverse
        steps = [np.where(decided, 0.0, np.clip(step, -LONGEST_STEP, LONGEST_STEP)) for step in steps]
        theta, phi = theta + steps[0], phi + steps[1]
        if max(np.abs(step).max() for step in steps) < 1e-9:
            break
    return np.where(decided, np.where(weights @ preference > 0, np.inf, -np.inf), theta), phi


def win_rates(
    preference: Sequence[float],
    difference: Sequence[float],
    questions: Sequence[Hashable],
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> tuple[dict[str, dict[float, Metric]], float]:
    """{"raw", "length_controlled"} -> {level: rate with its interval}, and phi, by bootstrap over questions.

    The interval is `intervals`' expanded percentile. Swapping A and B turns a rate into one minus it, both ways.

    Args:
        preference, difference: as in `fit`.
        questions: (n,) what each row answers: the turns of a conversation are drawn together.
        seed, resamples: of the bootstrap.

    Raises:
        ValueError: there are fewer than two questions.

    Example:
        >>> rates, phi = win_rates([1, 0.5, 0, 1], [0, 0, 0, 0], range(4), seed=0)
        >>> rates["raw"][0.95].mean, round(rates["length_controlled"][0.95].mean, 3)
        (0.625, 0.625)
    """
    preference, difference = np.asarray(preference, float), np.asarray(difference, float)
    place = {question: i for i, question in enumerate(dict.fromkeys(questions))}
    of, n = np.array([place[question] for question in questions]), len(place)
    if n < 2:
        raise ValueError(f"{n} questions make no interval: two at least are needed")
    once = np.ones((1, len(of)))
    theta, phi = fit(preference, difference, once)
    found = {"raw": float(preference.mean()), "length_controlled": float(expit(theta[0]))}
    drawn, generator = {name: [] for name in found}, np.random.default_rng(seed)
    for start in range(0, resamples, rows := max(1, BLOCK // len(of))):
        counts = generator.multinomial(n, np.full(n, 1 / n), size=min(rows, resamples - start))  # (rows, questions)
        weights = counts[:, of].astype(float)  # (rows, n)
        drawn["raw"].append(weights @ preference / weights.sum(1))
        drawn["length_controlled"].append(expit(fit(preference, difference, weights)[0]))

    def interval(name: str, level: float) -> Metric:
        tail = ndtr((n / (n - 1)) ** 0.5 * stdtrit(n - 1, (1 - level) / 2))  # as `intervals` has it
        return Metric(found[name], *np.quantile(np.concatenate(drawn[name]), [tail, 1 - tail]).tolist(), n)

    return {name: {level: interval(name, level) for level in LEVELS} for name in found}, float(phi[0])
