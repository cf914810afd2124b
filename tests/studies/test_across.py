"""Methods across settings: numbers worked by hand from the published formulas, and coverage of a known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tpo_lib.studies import across


def test_the_interquartile_mean_by_hand():
    # eight runs: two go at either end, 3 4 5 6 stay
    found = across.interquartile_mean({"a": [1.0, 8.0, 3.0, 6.0], "b": [5.0, 4.0, 2.0, 70.0]}, seed=0)
    assert (found.mean, found.n) == (4.5, 8)
    assert found.low < 4.5 < found.high < 70
    # ten runs: floor(10 / 4) = 2 go at either end
    ten = across.interquartile_mean({"a": [0.0, 1, 2, 3, 4], "b": [5.0, 6, 7, 8, 99]}, seed=0)
    assert ten.mean == pytest.approx((2 + 3 + 4 + 5 + 6 + 7) / 6)


def test_the_probability_of_improvement_by_hand():
    # first setting: 1 < 2, 1 > 0, 2 = 2, 2 > 0: (0 + 1 + 1/2 + 1) / 4; second: all tie, 1/2
    x, y = {"a": [1.0, 2.0], "b": [3.0, 3.0]}, {"a": [2.0, 0.0], "b": [3.0, 3.0]}
    found, back = across.improvement(x, y, seed=0), across.improvement(y, x, seed=0)
    assert (found.mean, found.n) == ((0.625 + 0.5) / 2, 8)
    assert back.mean == 1 - found.mean
    assert 0 <= found.low <= found.mean <= found.high <= 1
    better = across.improvement({"a": [2.0, 3.0]}, {"a": [0.0, 1.0]}, seed=0)
    assert (better.mean, better.low, better.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("count", [3, 5])
def test_intervals_cover_the_truth(count):
    generator, studies, inside, chances = np.random.default_rng(count), 100, 0, 0
    for i in range(studies):
        x, y = ({name: generator.normal(size=count) for name in "abcdef"} for _ in range(2))
        found = across.interquartile_mean(x, seed=i)
        inside += found.low <= 0 <= found.high
        chance = across.improvement(x, y, seed=i)
        chances += chance.low <= 0.5 <= chance.high
    assert inside / studies >= 0.9
    assert chances / studies >= 0.9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: across.interquartile_mean({"a": [1.0]}, seed=0), r"scores of a are \[1.0\]: .* two seeds"),
        (lambda: across.interquartile_mean({"a": [1.0, math.nan]}, seed=0), "finite"),
        (lambda: across.interquartile_mean({}, seed=0), "no setting"),
        (lambda: across.improvement({"a": [1.0, 2.0]}, {"b": [1.0, 2.0]}, seed=0), r"\['a'\], y has \['b'\]"),
    ],
)
def test_what_cannot_be_said_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
