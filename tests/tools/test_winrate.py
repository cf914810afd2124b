"""Win rates: a truth that is known by hand or by simulation, raw and at equal length, and what its intervals cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import expit, logit

from tpo_lib.intervals import bootstrap
from tpo_lib.tools.winrate import LEVELS, PRIOR, fit, win_rates


def once(preference, difference):
    theta, phi = fit(np.asarray(preference, float), np.asarray(difference, float), np.ones((1, len(preference))))
    return theta[0], phi[0]


def test_two_groups_by_hand():
    """d = +-10 alone: sigma(theta +- phi x) are the two groups' own rates, 3 of 4 and 1 of 2, but for the wide prior."""
    difference = [10] * 4 + [-10] * 4
    theta, phi = once([1, 1, 1, 0, 1, 0, 1, 0], difference)
    x = math.tanh(10 / np.std(difference, ddof=1))
    assert theta == pytest.approx((logit(0.75) + logit(0.5)) / 2, abs=0.01)
    assert phi == pytest.approx((logit(0.75) - logit(0.5)) / 2 / x, abs=0.02)


def test_the_fit_is_where_the_gradient_vanishes():
    draw = np.random.default_rng(0)
    difference, preference = draw.normal(30, 80, 200), draw.choice([0, 0.5, 1], 200, p=[0.3, 0.2, 0.5])
    weights = draw.integers(0, 4, (3, 200)).astype(float)
    theta, phi = fit(preference, difference, weights)
    for row, t, f in zip(weights, theta, phi, strict=True):
        rows = np.repeat(np.arange(200), row.astype(int))  # a weight is as many rows
        x = np.tanh(difference[rows] / np.std(difference[rows], ddof=1))
        rest = preference[rows] - expit(t + f * x)
        assert rest.sum() == pytest.approx(0, abs=1e-6)
        assert (rest * x).sum() == pytest.approx(f / PRIOR**2, abs=1e-6)


def test_a_planted_length_bias_is_removed():
    """A judge that likes length and nothing else: the longer side wins most, at equal length neither does."""
    draw = np.random.default_rng(0)
    difference = np.round(draw.normal(60, 100, 4000))
    for theta in (0.0, 0.7):
        preference = (draw.random(4000) < expit(theta + 2 * np.tanh(difference / 100))).astype(float)
        rates, phi = win_rates(preference, difference, range(4000), seed=0, resamples=50)
        assert rates["raw"][0.95].mean > expit(theta) + 0.08
        assert rates["length_controlled"][0.95].mean == pytest.approx(expit(theta), abs=0.025)
        assert phi == pytest.approx(2, abs=0.2)


def test_swapping_the_sides_turns_the_rates_round():
    draw = np.random.default_rng(1)
    preference, difference = draw.choice([0, 0.5, 1], 60), draw.normal(20, 50, 60)
    there, phi = win_rates(preference, difference, range(60), seed=0)
    back, same = win_rates(1 - preference, -difference, range(60), seed=0)
    for kind in there:
        for level in LEVELS:
            a, b = there[kind][level], back[kind][level]
            assert (a.mean, a.low, a.high) == pytest.approx((1 - b.mean, 1 - b.high, 1 - b.low), abs=1e-6)
    assert phi == pytest.approx(same)


def test_ties_count_half_and_equal_lengths_leave_nothing_to_control():
    rates, phi = win_rates([1, 0.5, 0.5, 0.5], [7, 7, 7, 7], range(4), seed=0)
    for kind in rates:
        assert rates[kind][0.95].mean == pytest.approx(0.625)
    assert phi == 0


@pytest.mark.parametrize("preference", [0.0, 1.0])
def test_who_always_wins_does_so_at_any_length(preference):
    rates, _ = win_rates([preference] * 10, range(10), range(10), seed=0)
    for levels in rates.values():
        assert {(m.mean, m.low, m.high) for m in levels.values()} == {(preference,) * 3}


def test_wins_that_length_parts_from_losses_say_nothing_of_equal_length():
    """The longer answer always wins: the slope has no bound but the prior, and the rate stays in the middle."""
    difference = np.array([-30, -20, -10, -5, 5, 10, 20, 30] * 5)
    rates, phi = win_rates((difference > 0).astype(float), difference, range(40), seed=0)
    assert rates["length_controlled"][0.95].mean == pytest.approx(0.5, abs=1e-6)
    assert 5 < phi < 4 * PRIOR
    assert rates["length_controlled"][0.95].low < 0.4


def test_the_raw_interval_is_the_librarys():
    preference = np.random.default_rng(2).choice([0, 0.5, 1], 100)
    rates, _ = win_rates(preference, np.arange(100), range(100), seed=0)
    for level in LEVELS:
        mine, theirs = rates["raw"][level], bootstrap(preference, seed=0, confidence=level)
        assert (mine.mean, mine.n) == (pytest.approx(theirs.mean), theirs.n)
        assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=0.015)


def test_turns_of_a_question_are_drawn_together():
    """Two turns that say the same are one question's worth."""
    preference, difference = np.random.default_rng(3).choice([0, 1], 80), np.random.default_rng(4).normal(0, 9, 80)
    single, _ = win_rates(preference, difference, range(80), seed=0)
    double, _ = win_rates(np.repeat(preference, 2), np.repeat(difference, 2), np.repeat(np.arange(80), 2), seed=0)
    for kind in single:
        one, two = single[kind][0.95], double[kind][0.95]
        assert two.n == 80
        assert (one.low, one.high) == pytest.approx((two.low, two.high), abs=0.005)


def test_one_question_makes_no_interval():
    with pytest.raises(ValueError, match="two at least"):
        win_rates([1, 0], [1, 2], ["a", "a"], seed=0)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """400 judgments of 60 questions by a judge that likes length: 93 to 97 in 100 of the 95% intervals hold the truth."""
    draw, theta, phi, shift = np.random.default_rng(8), 0.0, 1.0, 0.5
    raw = expit(theta + phi * np.tanh(draw.normal(shift, 1, 200_000))).mean()
    truth = {"raw": raw, "length_controlled": expit(theta)}
    held = dict.fromkeys([(kind, level) for kind in truth for level in LEVELS], 0)
    for seed in range(400):
        z = draw.normal(shift, 1, 60)
        preference = (draw.random(60) < expit(theta + phi * np.tanh(z))).astype(float)
        rates, _ = win_rates(preference, 100 * z, range(60), seed=seed, resamples=300)
        for kind, level in held:
            held[kind, level] += rates[kind][level].low <= truth[kind] <= rates[kind][level].high
    for (kind, level), count in held.items():
        assert count / 400 == pytest.approx(level, abs=0.02 if level == 0.95 else 0.035), (kind, level)
