"""When a run says that its reward was over-optimised, and when it does not."""

from __future__ import annotations

import numpy as np
import pytest

from tpo_lib.intervals import bootstrap
from tpo_lib.runs import overoptimised

PROMPTS = np.random.default_rng(0).normal(size=40)  # what they do to every evaluation


def curve(rewards, judges, noise: float = 0.02, seed: int = 1) -> list[dict]:
    generator, points = np.random.default_rng(seed), []
    for step, means in enumerate(zip(rewards, judges, strict=True)):
        values = [0.1 * PROMPTS + mean + noise * generator.normal(size=40) for mean in means]
        table = dict(zip(("reward", "judge"), (each.tolist() for each in values), strict=True))
        metrics = {name: bootstrap(value, seed=0).as_dict() for name, value in table.items()}
        points.append({"step": 8 * step, "by_prompt": table} | metrics)
    return points


@pytest.mark.parametrize(
    ("rewards", "judges", "verdict", "step"),
    [
        (
            [0.5, 0.7, 0.8, 0.9],
            [0.5, 0.7, 0.65, 0.6],
            "seen",
            8,
        ),  # the judge falls from its peak while the reward rises
        ([0.5, 0.7, 0.8, 0.9], [0.5, 0.6, 0.65, 0.7], "not seen", 16),  # a lower judge that rises too is no sign of it
        ([0.5, 0.7, 0.8, 0.9], [0.5, 0.6, 0.7, 0.7], "open", 16),  # flat, or not: nobody can say
        ([0.5, 0.7, 0.8, 0.7], [0.5, 0.7, 0.8, 0.6], "not seen", 16),  # both fall: nothing was bought
    ],
)
def test_the_verdict_needs_a_falling_judge_and_a_rising_reward(rewards, judges, verdict, step):
    found = overoptimised.finding(curve(rewards, judges), "judge", seed=0)
    assert (found.verdict, found.step) == (verdict, step)
    assert found.reward["mean"] == pytest.approx(rewards[-1] - rewards[step // 8], abs=0.02)
    assert found.judge["mean"] == pytest.approx(judges[-1] - judges[step // 8], abs=0.02)


def test_choosing_the_highest_of_equal_evaluations_is_seldom_mistaken_for_a_fall():
    rewards, judges, tables = np.linspace(0.5, 0.9, 12), np.full(12, 0.6), 60
    found = [overoptimised.finding(curve(rewards, judges, 0.05, i), "judge", seed=0) for i in range(tables)]
    assert sum(each.judge["high"] < 0 for each in found) > 0.1 * tables  # what an interval alone would take for one
    assert sum(each.verdict == "seen" for each in found) <= 0.08 * tables


def test_seeds_count_and_curves_without_numbers_say_nothing():
    points = curve([0.5, 0.7, 0.9], [0.5, 0.7, 0.6])
    for point in points:
        tables = {name: np.array(values) for name, values in point["by_prompt"].items()}
        shifts = (-0.2, 0.2) if point is points[-1] else (0.0, 0.0)  # two seeds that end far apart
        point["by_seed"] = {name: [(values + shift).tolist() for shift in shifts] for name, values in tables.items()}
    assert overoptimised.finding(points, "judge", seed=0).verdict == "not seen"
    (said,) = overoptimised.sentences({"dpo": points, "ipo": points[:1], "sft": [{}, {}]}, "judge", seed=0)
    assert said.startswith("DPO: not seen. From update 8 to the end reward +0.2")
    assert overoptimised.sentences({"dpo": points}, "second_judge", seed=0) == []
