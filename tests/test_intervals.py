"""Intervals against scipy, coverage of the truth, and what has no interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from tpo_lib import intervals


def expanded(n: int) -> float:
    """The level at which the percentile interval of n normal values is as long as Student's (Hesterberg 2015)."""
    return 1 - 2 * scipy.stats.norm.cdf(-math.sqrt(n / (n - 1)) * scipy.stats.t.ppf(0.975, n - 1))


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(0).gamma(2.0, size=80)
    ours = intervals.bootstrap(torch.tensor(values), seed=1, resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (values,),
        np.mean,
        method="percentile",
        n_resamples=20_000,
        confidence_level=expanded(80),
        random_state=np.random.default_rng(2),
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
        confidence_level=expanded(70),
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


@pytest.mark.parametrize("n", [8, 30])
def test_intervals_of_few_values_cover_what_plain_percentiles_miss(n):
    generator, tables, ours, plain = np.random.default_rng(0), 400, 0, 0
    for seed in range(tables):
        values = generator.beta(0.5, 0.5, size=n)  # scores in (0, 1), crowded at both ends, with a mean of .5
        metric = intervals.bootstrap(values, seed=seed, resamples=500)
        means = values[generator.integers(n, size=(500, n))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        ours, plain = ours + (metric.low <= 0.5 <= metric.high), plain + (low <= 0.5 <= high)
    assert 0.92 <= ours / tables <= 0.98
    assert plain < ours - (0.02 * tables if n == 8 else 0)


def test_one_value_is_told_to_say_nothing():
    with pytest.warns(UserWarning, match="length 0"):
        assert intervals.bootstrap([0.5], seed=0) == intervals.Metric(0.5, 0.5, 0.5, 1)


def test_what_has_one_prompt_is_drawn_together():
    generator, tables, ours, as_if = np.random.default_rng(1), 300, 0, 0
    for seed in range(tables):
        sizes = generator.integers(1, 7, size=40)  # pairs a prompt
        prompt = np.repeat(np.arange(40), sizes)
        values = generator.normal(size=40)[prompt] + generator.normal(size=len(prompt))
        metric = intervals.bootstrap(values, groups=prompt, seed=seed, resamples=400)
        alone = intervals.bootstrap(values, seed=seed, resamples=400)
        assert metric.mean == pytest.approx(values.mean())  # each pair counts as much as any other
        assert metric.n == 40
        ours, as_if = ours + (metric.low <= 0 <= metric.high), as_if + (alone.low <= 0 <= alone.high)
    assert 0.91 <= ours / tables <= 0.98  # .93 of 3,000: prompts of 1 to 6 pairs count as fewer than 40
    assert as_if / tables < 0.85


def test_no_bound_of_groups_of_unequal_size_lies_where_no_mean_can():
    values, groups = np.array([1.0] * 8 + [0.0, 1.0]), [0] * 8 + [1, 2]
    alone = intervals.bootstrap(intervals.by_group(values, groups), seed=0)
    metric = intervals.bootstrap(values, groups=groups, seed=0)
    assert alone.high > 1 == metric.high
    assert (metric.mean, metric.low, metric.n) == (alone.mean, max(0.0, alone.low), 3)


def test_one_number_a_group_serves_means_and_differences():
    prompts = ["b", "a", "b", "b"]  # of any kind that has equals; tensors of numbers too
    values, others = np.array([1.0, 0.0, 0.0, 1.0]), np.array([0.5, 0.5, 1.0, 0.0])
    # mean 1/2, G / n = 2 / 4: b has 1/2 + 1/2 (2 - 3/2), a has 1/2 + 1/2 (0 - 1/2)
    assert intervals.by_group(values, prompts).tolist() == [0.75, 0.25]
    assert intervals.by_group(values, torch.tensor([1, 0, 1, 1])).tolist() == [0.75, 0.25]
    assert intervals.by_group([3.0, 1.0, 4.0, 8.0], [0, 1, 0, 1]).tolist() == [3.5, 4.5]  # equally large: their means
    both = intervals.by_group(values, prompts) - intervals.by_group(others, prompts)
    assert both == pytest.approx(intervals.by_group(values - others, prompts))
    alone, grouped = (intervals.bootstrap(values, seed=3, groups=groups) for groups in (None, [0, 1, 2, 3]))
    assert (alone.low, alone.high) == pytest.approx((grouped.low, grouped.high))
    assert alone.n == grouped.n


def test_a_linearised_ratio_has_its_mean_and_the_spread_of_its_bootstrap():
    generator = np.random.default_rng(0)
    counts = generator.integers(5, 40, size=300)
    sums = 0.5 * counts + generator.normal(size=300) * counts**0.5
    each, whole = intervals.linearised(sums, counts), intervals.bootstrap_ratio(sums, counts, seed=0)
    found = intervals.bootstrap(each, seed=0)
    assert each.mean() == pytest.approx(whole.mean) == sums.sum() / counts.sum()
    assert (found.low, found.high) == pytest.approx((whole.low, whole.high), abs=0.003)
    assert np.std(sums / counts) > 1.05 * np.std(each)  # a prompt counts by its steps


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
        (lambda: intervals.bootstrap([1.0, 2.0], groups=["a"], seed=0), "2 values in 1 groups"),
        (lambda: intervals.bootstrap_ratio([1.0, 2.0], [1.0], seed=0), "2 sums over 1 counts"),
        (lambda: intervals.bootstrap_ratio([1.0], [0.0], seed=0), "total 0"),
        (lambda: intervals.bootstrap_ratio([math.inf], [1.0], seed=0), r"sums\[0\] is inf"),
    ],
)
def test_what_has_no_interval_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
