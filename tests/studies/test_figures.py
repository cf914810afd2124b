"""Pictures of studies: what is drawn is the data, axes have units, grey tells what colour does, and the texts say it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from matplotlib.text import Text

from tpo_lib.studies import endpoints, figures, tables

METHODS = {
    "dpo": 0.30,
    "tdpo2 α.1": 0.31,
    "tdpo2 α.5": 0.36,
    "tgdpo": 0.33,
    "simpo": 0.22,
}  # -> height of the reward's curve
METRICS = ("kl", *figures.SCORES, *figures.SEQKL)


def runs(height: float, seeds: int = 5, prompts: int = 24, *, far: float = 30.0) -> list[dict]:
    """Made-up records, one a seed, that reach `far` nats."""
    found = []
    for seed in range(seeds):
        generator = np.random.default_rng([seed, int(1000 * height)])
        points = []
        for step in range(0, 41, 4):
            root = far**0.5 * (step / 40) ** 0.7 * (1 + 0.03 * seed)
            means = {"kl": root**2, "reward": 0.5 + height * (1 - np.exp(-0.5 * root)) + 0.004 * seed * (step > 0)}
            means |= {"judge": 0.5 + 0.8 * height * (1 - np.exp(-0.6 * root)), "second_judge": 0.5 + 0.02 * root}
            means |= {"seqkl_chosen": 0.5 * root**2 * height, "seqkl_rejected": root**2 * height * 0.8}
            means["seqkl_margin"] = means["seqkl_rejected"] - means["seqkl_chosen"]
            noise = 0.1 * generator.normal(size=(len(means), prompts)) * (step > 0)
            by = {
                name: (mean + each - each.mean()).tolist()
                for (name, mean), each in zip(means.items(), noise, strict=True)
            }
            points.append({"step": step, "by_prompt": by})
        found.append({"points": points})
    return found


@pytest.fixture(scope="module")
def methods() -> dict:
    return {name: runs(height, far=12.0 if name == "simpo" else 30.0) for name, height in METHODS.items()}


def best_of_n() -> list[dict]:
    return [{"n": n, "reward": 0.5 + 0.09 * np.log2(n), "judge": 0.5 + 0.05 * np.log2(n)} for n in (1, 2, 4, 8, 16)]


def family(methods, endpoint, *how) -> list[dict]:
    values = {name: endpoints.table(each, endpoint, *how) for name, each in methods.items()}
    return tables.paired(values, [(name, "dpo") for name in METHODS if name != "dpo"], seed=0)


@pytest.fixture(scope="module")
def pictures(methods) -> dict:
    return drawn(methods)


def drawn(methods) -> dict:
    panels = {"reward, area from 1 to 20 nats": family(methods, "area", "reward", 1, 20)}
    panels["reward at 20 nats"] = family(methods, "at_level", "reward", 20.0)
    return {
        "frontier": figures.frontier(methods, best_of_n=best_of_n()),
        "differences": figures.differences(panels),
        "seqkl": figures.seqkl({name: each for name, each in methods.items() if name != "simpo"}),
        "over_training": figures.over_training(methods, ("reward", "judge")),
        "seeds": figures.frontier(methods, ["reward"], seeds=True),
    }


@pytest.mark.parametrize("name", ["frontier", "differences", "seqkl", "over_training", "seeds"])
def test_text_is_large_enough_and_axes_have_words(pictures, name):
    figure = pictures[name]
    figure.draw_without_rendering()
    shown = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    assert min(text.get_fontsize() for text in shown) >= 10
    assert all(ax.get_xlabel() for ax in figure.axes)
    assert name == "differences" or all(ax.get_ylabel() for ax in figure.axes)


def test_a_mean_curve_is_read_at_equal_kl_as_far_as_every_seed_comes():
    each = runs(0.3, seeds=3)
    kl, values, marks = figures.mean_curve(each, "reward")
    ends = [endpoints.curve(run, "kl").mean(1)[-1] for run in each]
    assert (kl[0], kl[-1]) == (0.0, min(ends))
    assert max(ends) > 1.1 * min(ends)
    at = int(np.searchsorted(kl, 9.0))
    expected = [endpoints.at_level(run, "reward", kl[at]).mean() for run in each]
    assert values[:, at] == pytest.approx(expected)
    means = np.mean([endpoints.curve(run, "kl").mean(1) for run in each], 0)
    assert kl[marks] == pytest.approx([mean for mean in means if mean <= min(ends)])


def test_the_frontier_draws_means_bands_and_the_best_of_n(methods):
    figure = figures.frontier(methods, best_of_n=best_of_n())
    assert [ax.get_ylabel().split(" (")[0] for ax in figure.axes] == [
        "mean reward",
        "mean score of the judge",
        "mean score of the second judge",
    ]
    reward, _, second = figure.axes
    (line,) = [line for line in reward.get_lines() if line.get_label() == "TGDPO"]
    _, values, marks = figures.mean_curve(methods["tgdpo"], "reward")
    assert list(line.get_ydata()) == pytest.approx(values.mean(0).tolist())
    assert line.get_markevery() == marks
    (reference,) = [line for line in reward.get_lines() if line.get_label() == "best of n"]
    assert reference.get_xdata()[-1] == pytest.approx(endpoints.best_of_n_kl(16))
    assert reference.get_ydata()[-1] == pytest.approx(0.5 + 0.09 * 4)
    assert "best of n" not in [line.get_label() for line in second.get_lines()]  # which no sample was scored by
    assert len(reward.collections) == len(METHODS)
    assert "root" in reward.get_xlabel()
    without = copy.deepcopy(methods)
    del without["simpo"][2]["points"][1]["by_prompt"]["judge"]
    assert len(figures.frontier(without).axes) == 2
    with pytest.raises(ValueError, match="none of judge"):
        figures.frontier(without, ["judge"])


def test_every_seed_is_drawn_to_its_own_end(methods, pictures):
    (ax,) = pictures["seeds"].axes
    assert not ax.collections
    colour = figures.plots.style_of("tgdpo", methods).colour
    thin = [line for line in ax.get_lines() if line.get_linewidth() < 1 and line.get_color() == colour]
    ends = [endpoints.curve(run, "kl").mean(1)[-1] for run in methods["tgdpo"]]
    assert [line.get_xdata()[-1] for line in thin] == pytest.approx(ends)
    assert [line.get_ydata()[-1] for line in thin] == pytest.approx(
        [endpoints.end(run, "reward").mean() for run in methods["tgdpo"]]
    )


def test_what_a_result_keeps_of_a_run_gives_the_same_picture(methods):
    def short(run: dict) -> dict:
        return {
            "points": [{"step": p["step"]} | {k: np.mean(v) for k, v in p["by_prompt"].items()} for p in run["points"]]
        }

    kept = {name: [short(run) for run in each] for name, each in methods.items()}
    assert figures.frontier_alt(kept) == figures.frontier_alt(methods)
    assert figures.over_training_alt(kept) == figures.over_training_alt(methods)


def test_a_row_of_the_forest_is_its_interval_in_the_band_of_what_is_detected(methods):
    rows = family(methods, "area", "reward", 1, 20)
    (ax,) = figures.differences({"reward": rows}).axes
    bands = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in ax.patches]
    assert bands == [pytest.approx((-row["detectable"], row["detectable"])) for row in rows]
    points = [line for line in ax.get_lines() if line.get_marker() not in ("None", "", None)]
    assert [line.get_xdata()[0] for line in points] == [row["mean"] for row in rows]
    assert [line.get_markerfacecolor() != "white" for line in points] == [row["holm"] < 0.05 for row in rows]
    assert [text.get_text() for text in ax.get_yticklabels()][1] == "TDPO2 α.5 − DPO"
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first on top
    with pytest.raises(ValueError, match="same pairs"):
        figures.differences({"a": rows, "b": rows[1:]})


def test_a_level_that_was_not_reached_is_said(methods):
    rows = family(methods, "at_level", "reward", 20.0)
    assert rows[-1]["mean"] is None
    (ax,) = figures.differences({"reward at 20 nats": rows}).axes
    assert [text.get_text() for text in ax.texts] == ["level not reached"]
    assert len(ax.patches) == len(rows) - 1
    assert "SimPO and DPO do not both reach the level" in figures.differences_alt({"reward at 20 nats": rows})


def test_curves_over_training_are_means_over_seeds(methods):
    chosen, rejected, margin = figures.seqkl(methods).axes
    assert chosen.get_ylim() == rejected.get_ylim()
    (line,) = [line for line in margin.get_lines() if line.get_label() == "TGDPO"]
    expected = np.mean([endpoints.curve(run, "seqkl_margin").mean(1) for run in methods["tgdpo"]], 0)
    assert list(line.get_ydata()) == pytest.approx(expected.tolist())
    assert list(line.get_xdata()) == list(range(0, 41, 4))
    assert chosen.get_xlabel() == "updates"
    figure = figures.over_training(methods, ("reward", "judge"))
    (band, *_) = figure.axes[0].collections
    low, high = (f(endpoints.curve(run, "reward").mean(1)[-1] for run in methods["dpo"]) for f in (min, max))
    ends = band.get_paths()[0].vertices
    assert {round(y, 6) for x, y in ends if x == 40} == {round(low, 6), round(high, 6)}


def test_growth_is_that_of_the_longest_responses():
    def run(longest: int, power: float, scale: float) -> dict:
        point = {"step": 40}
        for t in (8, 16, 32, 64, 128):
            if t <= longest:
                point |= {f"seqkl_mean_at_{t}": scale * t / 10, f"logratio_var_at_{t}": scale * t**power}
        return {"points": [{"step": 0}, point]}

    methods = {"dpo 16 tokens": [run(16, 1.0, 1.0)]}
    methods |= {"dpo 128 tokens": [run(128, 1.2, 1.0), run(128, 1.2, 3.0)], "tdpo2 128 tokens": [run(128, 1.0, 0.5)]}
    for run_ in [each for several in methods.values() for each in several]:  # `_means` reads every point
        run_["points"][0] |= {name: 0.0 for name in run_["points"][1] if name != "step"}
    figure = figures.growth(methods)
    figure.draw_without_rendering()
    seqkl, variance = figure.axes
    lines = {line.get_label(): line for line in variance.get_lines()}
    assert {"DPO 128 tokens", "TDPO2 128 tokens"} <= lines.keys()
    assert "DPO 16 tokens" not in lines
    assert lines["DPO 128 tokens"].get_ydata().tolist() == pytest.approx([2 * t**1.2 for t in (8, 16, 32, 64, 128)])
    (dotted,) = [line for line in seqkl.get_lines() if line.get_linestyle() == ":"]
    assert dotted.get_ydata().tolist() == pytest.approx([2 * t / 10 for t in (8, 16, 32, 64, 128)])
    assert [text.get_text() for text in seqkl.get_xticklabels()] == ["8", "16", "32", "64", "128"]
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)
    text = figures.growth_alt(methods)
    assert "from the first 8 to 128 tokens" in text
    assert "nats: DPO 128 tokens 1.6 to 25.6, TDPO2 128 tokens 0.4 to 6.4;" in text


def test_texts_say_the_figures(methods):
    text = figures.frontier_alt(methods)
    assert "over 5 seeds" in text
    assert "At 10 nats" in text  # SimPO ends at 12
    kl, values, _ = figures.mean_curve(methods["dpo"], "reward")
    assert f"DPO {np.interp(10**0.5, kl**0.5, values.mean(0)):.3f}" in text
    rows = family(methods, "area", "reward", 1, 20)
    text = figures.differences_alt({"reward": rows})
    assert f"TDPO2 α.1 minus DPO {rows[0]['mean']:+.3f} [{rows[0]['low']:+.3f}, {rows[0]['high']:+.3f}]" in text
    assert "told apart" in text
    text = figures.over_training_alt(methods, ("seqkl_margin",))
    end = np.mean([endpoints.end(run, "seqkl_margin").mean() for run in methods["dpo"]])
    assert f"seqkl margin at the end: DPO {end:.3g}" in text
