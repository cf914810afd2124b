"""Endpoints of runs against the curve they are read off, against the jackknife, and their coverage of a known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from simulated import record, study

from tpo_lib.runs import plots, seeds
from tpo_lib.studies import endpoints, tables

# ---- what is read off a curve


ONE = ([0.0, 1.0, 4.0, 9.0], [0.5, 0.6, 0.8, 0.7])  # mean KL and reward of a run by hand
SPREAD = np.array([-0.3, 0.1, 0.2, 0.0])  # of four prompts, around them


def by_hand(kl=ONE[0], values=ONE[1], metric: str = "reward") -> dict:
    """A run of four prompts around given means, evaluated after 0, 10, 20, ... updates."""
    values = np.array(values)[:, None] + SPREAD * np.arange(1, len(values) + 1)[:, None]
    return record(np.array(kl)[:, None] * (1 + SPREAD), values, range(0, 10 * len(kl), 10), metric)


def test_ends_and_steps_are_the_rows_of_the_record():
    run = by_hand()
    assert endpoints.end(run, "reward").tolist() == run["points"][-1]["by_prompt"]["reward"]
    assert endpoints.end(run, "reward", 10).tolist() == run["points"][1]["by_prompt"]["reward"]
    assert endpoints.best_step(run, "reward") == 20


def test_where_a_run_turns_is_the_kl_of_its_best_evaluation():
    turning = by_hand([0.0, 1.0, 4.0, 9.0], [0.5, 0.6, 0.8, 0.7])
    assert endpoints.at_best(turning, "reward").tolist() == pytest.approx([4.0])
    rising = by_hand([0.0, 1.0, 4.0, 9.0], [0.5, 0.6, 0.7, 0.8])
    assert endpoints.at_best(rising, "reward").tolist() == pytest.approx([9.0])


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0, 2.25, 6.0, 9.0, 9.1])
def test_the_mean_at_a_level_is_what_the_frontier_shows_there(level):
    found, expected = endpoints.at_level(by_hand(), "reward", level), plots.at_level(*ONE, level, root=True)
    assert (found is None) == (expected is None)
    assert found is None or found.mean() == pytest.approx(expected, abs=1e-12)


def test_at_a_reward_the_axis_is_straight():
    run = by_hand()
    # .65 lies a quarter of the way from .6 to .8, at 1 + 3/4 nats and after 12.5 updates
    assert endpoints.at_level(run, "kl", 0.65, "reward").mean() == pytest.approx(1.75)
    assert endpoints.steps_to(run, 0.65).mean() == pytest.approx(12.5)
    assert endpoints.steps_to(run, 2.25, "kl").mean() == pytest.approx(15.0)  # half of the way in the root
    assert endpoints.steps_to(run, 0.5).tolist() == [0.0] * 4  # it starts there
    assert endpoints.steps_to(run, 0.81) is None
    assert endpoints.at_level(run, "kl", 0.81, "reward") is None


def spending(**spec) -> dict:
    """`by_hand` with what it sampled and how long it took: 40 completions of 10 tokens, or 100 tokens more an update, of which
    one stood still for 900 seconds of the clock."""
    training = [{"step": i, "tokens": 50 * i * (i + 1), "seconds": i + 900 * (i > 4)} for i in range(1, 31)]
    run = by_hand() | {"spec": {"data": {"seed": 1, "train_prompts": 10}} | spec, "seconds": {"training": 60.0}}
    for i, point in enumerate(run["points"]):
        point["by_prompt"]["length"] = [8.0 + i, 10.0 + i, 12.0 + i, 10.0 + i]
    return run | {"training": training if "online" in spec else [{"step": 30, "loss": 0.1}]}


def test_what_a_reward_cost_in_tokens_and_seconds():
    """.65 lies a quarter of the way from update 10 to 20: 5,500 and 21,000 of the 46,500 tokens of an online run, in which the
    processor worked 60 seconds."""
    online, offline = spending(online={"updates": 30}), spending(train={"loss_type": "dpo"})
    assert endpoints.tokens_to(online, 0.65).mean() == pytest.approx(5500 + 15500 / 4)
    assert endpoints.seconds_to(online, 0.65).mean() == pytest.approx(60 * (5500 + 15500 / 4) / 46500)
    assert np.std(endpoints.tokens_to(online, 0.65)) / 1550 == pytest.approx(np.std(endpoints.steps_to(online, 0.65)))
    for level in (0.55, 0.65, 0.8):  # all sampled before: no reward costs more
        assert endpoints.tokens_to(offline, level) == pytest.approx([320, 400, 480, 400])
    assert endpoints.seconds_to(offline, 0.65).mean() == pytest.approx(60 * 12.5 / 30)
    for run in (online, offline):
        for cost in (endpoints.tokens_to, endpoints.seconds_to):
            assert cost(run, 0.5).tolist() == [0.0] * 4
            assert cost(run, 0.81) is None


def test_within_a_budget_a_run_that_rests_keeps_its_end():
    run = by_hand()
    for level in (0.0, 1.7, 9.0):
        assert endpoints.budget(run, "reward", level).tolist() == endpoints.at_level(run, "reward", level).tolist()
    assert endpoints.budget(run, "reward", 40.0).tolist() == endpoints.end(run, "reward").tolist()


def test_the_area_by_hand_and_by_a_fine_grid():
    run = by_hand()
    # roots 0 1 2 3: means of the segments .55 .7 .75, then .7 as far as 16 nats, whose root is 4
    assert endpoints.area(run, "reward", 0, 16).mean() == pytest.approx((0.55 + 0.7 + 0.75 + 0.7) / 4)
    assert endpoints.area(run, "reward", 1, 4).mean() == pytest.approx(0.7)
    grid = np.linspace(0.5**0.5, 12**0.5, 4001) ** 2
    fine = np.mean([endpoints.budget(run, "reward", k) for k in grid], 0)
    assert endpoints.area(run, "reward", 0.5, 12) == pytest.approx(fine, abs=1e-3)


def test_a_level_is_reached_the_first_time_and_a_dip_is_no_second():
    kl, values = [0.0, 4.0, 1.0, 9.0], [0.5, 0.7, 0.6, 0.9]
    run = by_hand(kl, values)
    assert endpoints.at_level(run, "reward", 2.25).mean() == pytest.approx(plots.at_level(kl, values, 2.25, root=True))
    # below 2 (the root) on the first segment, above it on the last: .6 + (.9 - .6) * (2.5 - 1) / 2 at its middle 2.5
    assert endpoints.area(run, "reward", 0, 9).mean() == pytest.approx((2 * 0.6 + 0.825) / 3)
    flat = by_hand([0.0, 4.0, 4.0], [0.5, 0.7, 0.9])
    assert endpoints.at_level(flat, "reward", 4.0).mean() == pytest.approx(0.7)


@pytest.mark.parametrize(
    "read",
    [
        lambda run: endpoints.at_level(run, "reward", 0.5),
        lambda run: endpoints.at_level(run, "reward", 5.0),
        lambda run: endpoints.at_level(run, "kl", 0.7, "reward"),
        lambda run: endpoints.budget(run, "reward", 12.0),
        lambda run: endpoints.budget(run, "reward", 40.0),
        lambda run: endpoints.area(run, "reward", 1, 40),
        lambda run: endpoints.steps_to(run, 0.7),
        lambda run: endpoints.end(run, "reward"),
    ],
)
def test_a_prompts_value_is_what_leaving_it_out_changes(read):
    run = study(np.random.default_rng(3), 1, noise=0.3, methods=["climbs"])["climbs"][0]

    def without(i: int) -> dict:
        kept = [{m: v[:i] + v[i + 1 :] for m, v in point["by_prompt"].items()} for point in run["points"]]
        return {"points": [point | {"by_prompt": by} for point, by in zip(run["points"], kept, strict=True)]}

    whole, n = read(run), 128
    jackknife = np.array([n * whole.mean() - (n - 1) * read(without(i)).mean() for i in range(n)])
    assert np.corrcoef(whole, jackknife)[0, 1] > 0.999
    assert np.std(whole) == pytest.approx(np.std(jackknife), rel=0.03)


def test_where_the_kl_alone_is_noisy_its_noise_is_the_error():
    generator, values = np.random.default_rng(0), np.tile(np.array(ONE[1])[:, None], 128)

    def draw() -> np.ndarray:
        kl = np.array(ONE[0])[:, None] * generator.gamma(3.0, 1 / 3, size=(4, 128))
        return endpoints.at_level(record(kl, values), "reward", 2.0)

    found = [draw() for _ in range(300)]
    spread = np.std([each.mean() for each in found])
    said = np.mean([each.std(ddof=1) for each in found]) / 128**0.5
    assert said == pytest.approx(spread, rel=0.1)
    assert spread > 0.003


def test_a_metric_of_other_prompts_has_both_errors_side_by_side():
    generator = np.random.default_rng(0)

    def draw() -> np.ndarray:
        kl = np.array(ONE[0])[:, None] * generator.gamma(1.0, 1.0, size=(4, 128))
        return endpoints.at_level(
            record(kl, np.array([0.0, 2, 4, 6])[:, None] + generator.normal(size=(4, 40)), metric="seqkl"), "seqkl", 2.0
        )

    found = [draw() for _ in range(400)]
    assert {len(each) for each in found} == {168}
    spread = np.std([each.mean() for each in found])
    said = np.mean([each.std(ddof=1) for each in found]) / 168**0.5
    assert said == pytest.approx(spread, rel=0.1)
    run = record(np.ones((2, 5)) * [[0.0], [1.0]], np.ones((2, 3)), metric="seqkl")
    assert (
        {len(endpoints.budget(run, "seqkl", k)) for k in (0.5, 3.0)} == {len(endpoints.area(run, "seqkl", 0, 2))} == {8}
    )


def test_a_drop_is_not_made_of_the_noise_it_was_chosen_by():
    generator, crossed, naive = np.random.default_rng(0), [], []
    for _ in range(200):
        run = record(np.ones((8, 64)), generator.normal(size=(8, 64)))  # a run that stands still
        crossed.append(endpoints.drop(run, "reward").mean())
        naive.append(endpoints.drop(run, "reward", endpoints.best_step(run, "reward")).mean())
    assert abs(np.mean(crossed)) < 0.04
    assert np.mean(naive) > 0.1
    # by hand: the highest is step 20 for both halves, so it is that minus the end
    run = by_hand()
    assert endpoints.drop(run, "reward").mean() == pytest.approx(0.1)
    assert endpoints.drop(run, "reward", 10).mean() == pytest.approx(-0.1)


def test_a_power_of_the_length_and_the_kl_of_a_token_by_hand():
    """4, 8, 32 at 8, 16, 64 tokens double with the length; the KL is 9 nats a sample, of 5 to 15 tokens."""
    run = by_hand()
    last = run["points"][-1]["by_prompt"]
    for t, mean in ((8, 4.0), (16, 8.0), (64, 32.0)):
        last[f"seqkl_mean_at_{t}"] = [mean * 0.5, mean * 1.5]
        last[f"logratio_var_at_{t}"] = [(mean / 4) ** 2] * 2
        last[f"logratio_mean_at_{t}"] = [-mean] * 2
    assert endpoints.exponent(run, "seqkl_mean").mean() == pytest.approx(1.0)
    assert endpoints.exponent(run, "logratio_var") == pytest.approx([2.0, 2.0])
    last["seqkl_mean_at_64"] = [0.0, 64.0]  # the second prompt grows by half as much again, the first by as much less
    low, high = endpoints.exponent(run, "seqkl_mean")
    x = np.log([8, 16, 64]) - np.log([8, 16, 64]).mean()
    assert high - low == pytest.approx(x @ [1, 1, 2] / (x @ x))  # d log mean of each, high minus low
    for point in run["points"]:
        point["by_prompt"]["length"] = [5.0, 10.0, 15.0, 10.0]
    assert endpoints.per_token(run, "kl").mean() == pytest.approx(0.9)
    jackknife = [4 * 0.9 - 3 * np.delete(last["kl"], i).sum() / np.delete(last["length"], i).sum() for i in range(4)]
    assert endpoints.per_token(run, "kl") == pytest.approx(jackknife, abs=0.2)
    for metric in ("logratio_mean", "reward"):
        with pytest.raises(ValueError, match=f"{metric} was measured at the lengths"):
            endpoints.exponent(run, metric)


def test_the_best_of_n_by_hand_and_by_sampling():
    assert endpoints.best_of_n([[3.0, 1.0, 2.0]], 1).tolist() == pytest.approx([2.0])
    assert endpoints.best_of_n([[3.0, 1.0, 2.0]], 2).tolist() == pytest.approx([8 / 3])
    assert endpoints.best_of_n([[3.0, 1.0, 2.0]], 3).tolist() == [3.0]
    judged = endpoints.best_of_n([[0.1, 0.9, 0.4]], 2, by=[[3.0, 1.0, 2.0]])
    assert judged.tolist() == pytest.approx([(2 * 0.1 + 0.4) / 3])  # 3 is chosen twice, 2 once
    scores = np.random.default_rng(0).normal(size=(1, 64))
    drawn = [np.random.default_rng(i).choice(scores[0], 8, replace=False).max() for i in range(4000)]
    assert endpoints.best_of_n(scores, 8)[0] == pytest.approx(np.mean(drawn), abs=0.02)
    assert endpoints.best_of_n_kl(1) == 0.0
    assert endpoints.best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: endpoints.end(by_hand(), "judge"), r"step 0 has no 'judge' by prompt; it has \['kl', 'reward'\]"),
        (lambda: endpoints.end(by_hand(), "reward", 5), r"step 5 was not evaluated: take one of \[0, 10, 20, 30\]"),
        (lambda: endpoints.area(by_hand(), "reward", 4, 4), "from 4 to 4 nats"),
        (lambda: endpoints.best_of_n([[1.0, 2.0]], 3), "best of 3 among 2"),
        (lambda: tables.summary([0.5, 0.6], seed=0), r"shape \(2,\)"),
        (lambda: tables.summary([[0.5, math.nan]], seed=0), "finite"),
        (lambda: tables.summary([[0.5]], seed=0), "two seeds at least"),
        (lambda: tables.paired({"a": [[1.0, 2.0]]}, [("a", "b")], seed=0), "a against b: no table of b"),
        (
            lambda: tables.paired({"a": np.ones((2, 4)), "b": np.ones((3, 4))}, [("a", "b")], seed=0),
            r"\(2, 4\) .* \(3, 4\)",
        ),
    ],
)
def test_what_cannot_be_said_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- tables over seeds


def test_a_level_that_one_seed_misses_has_no_mean():
    runs = [by_hand(), by_hand([0.0, 1.0, 2.0, 3.0])]
    assert endpoints.table(runs, "at_level", "reward", 2.0).shape == (2, 4)
    missed = endpoints.table(runs, "at_level", "reward", 4.0)
    assert missed is None
    assert set(tables.summary(missed, seed=0).values()) == {None}
    there = endpoints.table(runs, "end", "reward")
    both = {"a": there, "b": missed, "c": there - 1 + 0.2 * np.random.default_rng(0).normal(size=there.shape)}
    rows = tables.paired(both, [("a", "b"), ("a", "c")], seed=0)
    assert (rows[0]["p"], rows[0]["holm"], rows[0]["mean"], rows[0]["detectable"]) == (1.0, 1.0, None, None)
    assert 0 < rows[1]["p"] < 0.05
    assert rows[1]["holm"] == pytest.approx(2 * rows[1]["p"])  # the family has two all the same


def test_a_table_says_seeds_and_evaluation_apart():
    values = np.random.default_rng(0).normal(size=(5, 40)) + np.arange(5)[:, None]
    found, whole = tables.summary(values, seed=3), seeds.over_seeds(values, seed=3)
    assert {name: found[name] for name in ("mean", "low", "high", "n")} == whole.as_dict()
    assert found["seeds"] == pytest.approx(values.mean(1).tolist())
    assert found["seed_sd"] == pytest.approx(np.std(values.mean(1), ddof=1))
    alone = seeds.bootstrap(values.mean(0), seed=3)
    assert found["evaluation"] == pytest.approx((alone.high - alone.low) / 2)
    one = tables.summary(values[:1], seed=3)
    assert (one["seed_sd"], one["high"]) == (None, seeds.bootstrap(values[0], seed=3).high)
    runs = tables.summary([[3.0], [5.0], [4.0]], seed=0)  # one number a run: Student's interval of the seeds
    assert (runs["low"], runs["high"]) == pytest.approx(scipy.stats.t.interval(0.95, 2, 4.0, 3**-0.5))
    assert runs["evaluation"] is None


def test_the_family_is_the_one_that_was_planned():
    generator = np.random.default_rng(0)
    values = {name: generator.normal(size=(5, 30)) + shift for name, shift in (("a", 0.0), ("b", 0.4), ("c", 0.1))}
    every = seeds.paired_over_seeds(values, seed=1)
    rows = tables.paired(values, [("b", "a"), ("c", "a")], seed=1)
    assert (rows[0]["a"], rows[0]["b"]) == ("b", "a")
    assert rows[0]["mean"] == pytest.approx(-every[0]["mean"])
    assert [row["p"] for row in rows] == pytest.approx([every[0]["p"], every[1]["p"]], rel=0.1)
    assert [row["holm"] for row in rows] == seeds.holm([row["p"] for row in rows])
    both = tables.corrected(rows + rows)
    assert both[0]["holm"] == pytest.approx(4 * rows[0]["p"])


@pytest.mark.parametrize(("error", "freedom"), [(0.01, 4.0), (0.3, 2.5), (1.0, 131.0)])
def test_what_the_design_detects_is_seen_four_times_in_five(error, freedom):
    smallest = tables.detectable(error, freedom)
    critical = scipy.stats.t.ppf(0.975, freedom)
    assert scipy.stats.nct.sf(critical, freedom, smallest / error) == pytest.approx(0.8, abs=1e-6)
    generator = np.random.default_rng(0)
    drawn = (smallest / error + generator.normal(size=20_000)) / (
        generator.chisquare(freedom, size=20_000) / freedom
    ) ** 0.5
    assert np.mean(np.abs(drawn) > critical) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("count", [3, 5])
def test_intervals_of_endpoints_cover_the_truth(count):
    """A reduced form of what the module's docstring tells of."""
    read = {"area": ("area", "reward", 1, 20), "at": ("at_level", "reward", 5.0)}
    truth = {}
    for method, runs in study(np.random.default_rng(1), 1000, 1, noise=0.0, methods=("climbs", "is lower")).items():
        for name, (endpoint, *how) in read.items():
            truth[method, name] = endpoints.table(runs, endpoint, *how).mean()
    inside = {(kind, name): 0 for kind in ("mean", "pair") for name in read}
    studies = 60
    for i in range(studies):
        runs = study(np.random.default_rng(100 * count + i), count, methods=("climbs", "is lower"))
        for name, (endpoint, *how) in read.items():
            both = {method: endpoints.table(each, endpoint, *how) for method, each in runs.items()}
            cell = tables.summary(both["climbs"], seed=i)
            inside["mean", name] += cell["low"] <= truth["climbs", name] <= cell["high"]
            (row,) = tables.paired(both, [tuple(both)], seed=i)
            inside["pair", name] += row["low"] <= truth["climbs", name] - truth["is lower", name] <= row["high"]
            assert row["detectable"] > 0
    for which, times in inside.items():
        assert times / studies >= 0.9, which


def test_a_loss_has_converged_where_an_epoch_of_it_is_low():
    rows = [{"step": step, "loss": loss} for step, loss in ((5, 0.6), (10, 0.05), (15, 0.08), (20, 0.05), (25, 0.01))]
    points = [{"step": s, "by_prompt": {"reward": [r, r + 1]}} for s, r in ((0, 0.0), (10, 0.4), (30, 0.8))]
    run = {"training": rows, "points": points}
    assert endpoints.converged(run, 10) == [15.0]  # not 10, where one row is low: the epoch before it is .325
    assert endpoints.at_convergence(run, "reward", 10) == pytest.approx([0.5, 1.5])
    assert endpoints.converged(run | {"training": rows[:2]}, 10) is None
    assert endpoints.at_convergence(run | {"training": rows[:2]}, "reward", 10) == pytest.approx([0.8, 1.8])


def test_the_floor_share_is_the_mean_of_what_was_logged():
    rows = [{"step": 2, "guidance/floor_share": 0.02}, {"step": 3}, {"step": 4, "guidance/floor_share": 0.04}]
    assert endpoints.floored({"training": rows}).tolist() == [pytest.approx(0.03)]
    assert endpoints.floored({"training": [{"step": 2}]}) is None
