"""Intervals against scipy, coverage of the truth, and what has no interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from tpo_lib import intervals


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(0).gamma(2.0, size=80)
    ours = intervals.bootstrap(torch.tensor(values), seed=1, resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, random_state=np.random.default_rng(2)
    ).confidence_interval
    assert ours.mean == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert ours.n == 80


def test_bootstrap_ratio_agrees_with_scipy_and_is_not_a_mean_of_ratios():
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 60, size=70)
    sums = counts * 0.5 + generator.normal(size=70) * counts**0.5 + 5 * (counts < 5)
    ours = intervals.bootstrap_ratio(sums, counts, seed=1, resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (sums, counts),
        lambda s, c, axis: s.sum(axis) / c.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        random_state=np.random.default_rng(2),
    ).confidence_interval
    assert ours.mean == pytest.approx(sums.sum() / counts.sum())
    assert abs(ours.mean - (sums / counts).mean()) > 0.05
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_bootstrap_covers_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(0)
    inside = 0
    for seed in range(400):
        metric = intervals.bootstrap(generator.exponential(size=60), seed=seed, resamples=400)
        inside += metric.low <= 1.0 <= metric.high
    assert 0.90 <= inside / 400 <= 0.98


def test_bootstrap_is_a_function_of_the_seed_and_blocks_do_not_matter(monkeypatch):
    values = np.random.default_rng(0).normal(size=40)
    first = intervals.bootstrap(values, seed=3)
    assert first == intervals.bootstrap(values, seed=3)
    assert first != intervals.bootstrap(values, seed=4)
    assert intervals.bootstrap(values, seed=3, confidence=0.5).low > first.low
    monkeypatch.setattr(intervals, "BLOCK", 1000)
    cut = intervals.bootstrap(values, seed=3)
    assert (cut.mean, cut.n) == (first.mean, first.n)
    assert (cut.low, cut.high) == pytest.approx((first.low, first.high), abs=0.05)


@pytest.mark.parametrize("values", [[0.25], [0.25] * 9])
def test_one_value_or_equal_values_have_an_interval_of_length_zero(values):
    metric = intervals.bootstrap(values, seed=0)
    assert metric.as_dict() == {"mean": 0.25, "low": 0.25, "high": 0.25, "n": len(values)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: intervals.bootstrap([], seed=0), "n >= 1"),
        (lambda: intervals.bootstrap(torch.zeros(2, 2), seed=0), r"\(2, 2\)"),
        (lambda: intervals.bootstrap([1.0, math.nan], seed=0), r"values\[1\] is nan"),
        (lambda: intervals.bootstrap_ratio([1.0, 2.0], [1.0], seed=0), "2 sums over 1 counts"),
        (lambda: intervals.bootstrap_ratio([1.0], [0.0], seed=0), "total 0"),
        (lambda: intervals.bootstrap_ratio([math.inf], [1.0], seed=0), r"sums\[0\] is inf"),
    ],
)
def test_what_has_no_interval_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_paired_differences_have_the_right_sign_and_are_narrower_than_unpaired_ones():
    generator = np.random.default_rng(0)
    prompt = generator.normal(size=100)  # what both objectives share
    by_prompt = {"dpo": prompt + 0.1 * generator.normal(size=100), "tdpo2": prompt + 0.2, "simpo": prompt}
    differences = intervals.paired_differences(by_prompt, seed=0)
    assert [(d["a"], d["b"]) for d in differences] == [("dpo", "tdpo2"), ("dpo", "simpo"), ("tdpo2", "simpo")]
    assert differences[0]["high"] < 0 < differences[2]["low"]
    assert differences[2]["mean"] == pytest.approx(0.2)
    alone = intervals.bootstrap(by_prompt["dpo"], seed=0)
    assert differences[0]["high"] - differences[0]["low"] < 0.3 * (alone.high - alone.low)
