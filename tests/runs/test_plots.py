"""Pictures: every objective drawn once and told apart, axes named with units, text large enough, odd input survived."""

from __future__ import annotations

import itertools
import math

import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from tpo_lib.losses import OBJECTIVES, Objective
from tpo_lib.runs import plots

DRAWN = (*OBJECTIVES, "start", "ppo", "rloo")  # "ref" is the start model
METRICS = ("reward", "judge", "kl", "entropy", "distinct_2", "repetition", "length", "accuracy_logratio")
METRICS += ("seqkl_chosen", "seqkl_rejected", "seqkl_margin")


def metric(mean: float) -> dict:
    return {"mean": mean, "low": mean - 0.05, "high": mean + 0.05, "n": 64}


def curves(objectives=("dpo", "tdpo1", "tdpo2", "tgdpo", "simpo"), points: int = 4) -> dict:
    def point(step: int, slope: float) -> dict:
        values = {name: metric(0.5 + slope * step * (1 if name != "entropy" else -1)) for name in METRICS}
        return {"step": step, "pairs_seen": 32 * step} | values | {"kl": metric(3 * slope * step)}

    return {name: [point(10 * i, 0.01 * (1 + k / 10)) for i in range(points)] for k, name in enumerate(objectives)}


def training_rows() -> dict:
    row = {"rewards/margins": 0.1, "rewards/accuracies": 0.5, "loss": 0.7}
    evaluation = {"step": 4, "eval_loss": 0.6}  # rows without the metric are left out
    return {name: [*({"step": i} | row for i in range(1, 12)), evaluation] for name in ("dpo", "tgdpo")}


def figures() -> dict:
    return {
        "frontier": plots.frontier(curves()),
        "judge": plots.frontier(curves(), "judge"),
        "seqkl": plots.seqkl(curves()),
        "diversity": plots.diversity(curves()),
        "training": plots.training(training_rows()),
    }


def lines(ax, label: str) -> list:
    return [line for line in ax.get_lines() if line.get_label() == label]


def test_two_objectives_never_share_a_colour_a_marker_or_a_line():
    different = [plots.style_of(name) for name in DRAWN]
    for field in plots.Style._fields:
        values = [str(getattr(style, field)) for style in different]
        assert len(set(values)) == len(values), field


def test_colours_stand_out_from_white_and_from_each_other():
    used = [to_rgb(plots.style_of(name).colour) for name in DRAWN]
    for colour in used:
        assert 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2] < 0.75
    for a, b in itertools.combinations(used, 2):
        assert math.dist(a, b) > 0.25


@pytest.mark.parametrize("name", list(figures()))
def test_every_panel_names_its_axes_and_draws_each_objective_once(name):
    figure = figures()[name]
    assert len(figure.axes) == (1 if name in ("frontier", "judge") else 3)
    for ax in figure.axes:
        assert ax.get_xlabel()
        assert ax.get_ylabel()
        for objective in ("dpo", "tgdpo"):
            (line,) = lines(ax, plots.style_of(objective).label)
            assert line.get_color() == plots.style_of(objective).colour
            assert line.get_marker() == plots.style_of(objective).marker


@pytest.mark.parametrize("name", list(figures()))
def test_text_is_at_least_ten_points_and_no_pyplot_state_is_used(name):
    figure = figures()[name]
    figure.draw_without_rendering()
    shown = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    assert shown
    assert min(text.get_fontsize() for text in shown) >= 10
    assert figure.canvas.manager is None


def test_axis_labels_carry_units():
    assert "nats" in plots.frontier(curves()).axes[0].get_xlabel()
    assert all("nats" in ax.get_ylabel() for ax in plots.seqkl(curves()).axes)
    left, middle, right = plots.diversity(curves()).axes
    assert "nats per token" in left.get_ylabel()
    assert "share" in middle.get_ylabel()
    assert "tokens" in right.get_ylabel()
    assert all("reward" in ax.get_xlabel() for ax in (left, middle, right))
    loss, margin, accuracy = plots.training(training_rows()).axes
    assert "nats" in loss.get_ylabel()
    assert "nats" in margin.get_ylabel()
    assert "share" in accuracy.get_ylabel()


def test_the_curves_are_the_data():
    data = curves()
    (line,) = lines(plots.frontier(data).axes[0], "TDPO2")
    assert list(line.get_xdata()[:: plots.STEPS]) == pytest.approx([p["kl"]["mean"] for p in data["tdpo2"]])
    assert list(line.get_ydata()[:: plots.STEPS]) == pytest.approx([p["reward"]["mean"] for p in data["tdpo2"]])
    assert line.get_markevery() == plots.STEPS
    (line,) = lines(plots.frontier(data, "judge").axes[0], "TDPO2")
    assert list(line.get_ydata()[:: plots.STEPS]) == pytest.approx([p["judge"]["mean"] for p in data["tdpo2"]])
    for ax, name in zip(plots.seqkl(data).axes, ("seqkl_chosen", "seqkl_rejected", "seqkl_margin"), strict=True):
        (line,) = lines(ax, "DPO")
        assert list(line.get_xdata()) == [p["pairs_seen"] for p in data["dpo"]]
        assert list(line.get_ydata()) == [p[name]["mean"] for p in data["dpo"]]
    for ax, name in zip(plots.diversity(data).axes, ("entropy", "distinct_2", "length"), strict=True):
        (line,) = lines(ax, "DPO")
        assert list(line.get_xdata()) == [p["reward"]["mean"] for p in data["dpo"]]
        assert list(line.get_ydata()) == [p[name]["mean"] for p in data["dpo"]]


def test_intervals_are_drawn():
    data = curves(("dpo",), points=2)
    data["dpo"][1]["reward"] |= {"low": 0.1, "high": 0.9}
    (bars,) = plots.frontier(data).axes[0].collections
    ends = [[tuple(point) for point in segment] for segment in bars.get_segments()]
    x = data["dpo"][1]["kl"]["mean"]
    assert ends[1] == [pytest.approx((x, 0.1)), pytest.approx((x, 0.9))]


def test_chosen_and_rejected_share_one_scale():
    data = curves(("dpo",))
    for point in data["dpo"]:
        point["seqkl_rejected"] = metric(100 * point["seqkl_rejected"]["mean"])
    chosen, rejected, margin = plots.seqkl(data).axes
    assert chosen.get_ylim() == rejected.get_ylim()
    assert margin.get_ylim()[1] < 10


def test_without_pairs_seen_the_axis_counts_updates():
    data = {name: [{k: v for k, v in p.items() if k != "pairs_seen"} for p in ps] for name, ps in curves().items()}
    ax = plots.seqkl(data).axes[0]
    assert ax.get_xlabel() == "updates"
    assert list(lines(ax, "DPO")[0].get_xdata()) == [0, 10, 20, 30]


def test_names_stand_beside_the_frontier_unless_a_curve_ends_far_from_the_others():
    def names(data) -> tuple[list, list]:
        figure = plots.frontier(data)
        beside = [text.get_text() for text in figure.axes[0].texts if text.get_text() != "start"]
        below = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        return sorted(beside), sorted(below)

    all_names = sorted(["DPO", "TDPO1", "TDPO2", "TGDPO", "SimPO"])
    assert names(curves()) == (all_names, [])
    data = curves()
    for point in data["simpo"]:
        point["kl"] = metric(20 * point["kl"]["mean"])
    assert names(data) == ([], all_names)


def test_names_beside_the_frontier_do_not_overlap():
    data = curves()
    for points in data.values():
        points[-1]["reward"] = metric(0.9)  # all end at one height
    figure = plots.frontier(data)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts if text.get_text() != "start"]
    for a, b in itertools.combinations(boxes, 2):
        assert min(a.y1, b.y1) <= max(a.y0, b.y0) + 2  # pixels; an annotation's own extent would include its line


@pytest.mark.parametrize("objectives", [("dpo", "simpo"), ("dpo", "tdpo1", "tdpo2", "tgdpo", "simpo", "sft", "ppo")])
def test_the_legend_stays_inside_the_figure(objectives):
    data = curves(objectives)
    for point in data["simpo"]:
        point["kl"] = metric(20 * point["kl"]["mean"])
    for figure in (plots.frontier(data), plots.seqkl(data), plots.diversity(data)):
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box = legend.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert all(box.y1 <= ax.get_tightbbox().y0 + 2 for ax in figure.axes)  # below all panels: it covers no data


def test_the_start_alone_can_be_drawn():
    data = curves(points=1)
    for figure in (plots.frontier(data), plots.seqkl(data), plots.diversity(data)):
        figure.draw_without_rendering()
    plots.training({"dpo": []}).draw_without_rendering()


def test_objectives_of_ones_own_have_styles_that_nobody_else_has(monkeypatch):
    own = ("mine", "yours", "his", "hers", "theirs")
    for name in own:
        monkeypatch.setitem(OBJECTIVES, name, Objective(OBJECTIVES["dpo"].fn))
    styles = [*map(plots.style_of, DRAWN), *map(plots.style_of, own)]
    assert tuple(style.label for style in styles[-5:]) == own
    for style in styles[-5:]:
        for field in plots.Style._fields:
            assert [getattr(other, field) for other in styles].count(getattr(style, field)) == 1, field
    assert {to_rgb(colour) for colour in plots.OWN_COLOURS}.isdisjoint(to_rgb(style.colour) for style in styles[:-5])
    for figure in (plots.frontier(curves(("dpo", "mine"))), plots.training({"mine": training_rows()["dpo"]})):
        figure.draw_without_rendering()
    assert plots.style_of("read from a file") == plots.style_of("read from a file")


def test_run_points_stand_where_their_figures_are():
    def metric(mean, low, high):
        return {"mean": mean, "low": low, "high": high, "n": 9}

    runs = {
        "mine": ("tdpo2", {"kl": metric(3, 2, 5), "reward": metric(0.7, 0.6, 0.8)}),
        "other": ("dpo", {"kl": metric(9, 8, 10), "reward": metric(0.9, 0.85, 0.95)}),
    }
    start = {"kl": metric(0, 0, 0), "reward": metric(0.5, 0.4, 0.6)}
    (ax,) = plots.run_points(runs, start).axes
    drawn = {container.lines[0].get_color(): container for container in ax.containers}  # by colour
    line, _, bars = drawn[plots.style_of("tdpo2").colour].lines
    assert (line.get_xdata()[0], line.get_ydata()[0]) == (3, 0.7)
    ends = [segment.tolist() for bar in bars for segment in bar.get_segments()]
    assert [[2, 0.7], [5, 0.7]] in ends
    assert {text.get_text() for text in ax.texts} == {"mine", "other", "start"}
    assert ax.get_xlabel().endswith("nats")


def test_highlight_draws_one_run_large_and_the_others_faint():
    def run(objective, x, y):
        metrics = {"kl": {"mean": x, "low": x - 1, "high": x + 1, "n": 9}}
        return {
            "objective": objective,
            "metrics": metrics | {"reward": {"mean": y, "low": y - 0.1, "high": y + 0.1, "n": 9}},
        }

    mine, others = run("tdpo2", 4, 0.7), [run("dpo", 9, 0.8), run("tdpo2", 2, 0.6)]
    (ax,) = plots.highlight(others, mine, run("dpo", 0, 0.5)["metrics"]).axes
    faint = [line for line in ax.lines if line.get_alpha() == 0.35]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in faint] == [(9, 0.8), (2, 0.6)]
    (large,) = [line for line in ax.lines if line.get_markersize() == 12]
    assert (large.get_xdata()[0], large.get_ydata()[0]) == (4, 0.7)
    assert large.get_color() == plots.style_of("tdpo2").colour


def test_the_legend_of_highlight_keeps_its_order_whichever_run_is_chosen():
    metrics = {"kl": metric(1.0), "reward": metric(0.5)}
    runs = [{"objective": name, "metrics": metrics} for name in ("tgdpo", "dpo", "tdpo2", "dpo")]
    for chosen in range(len(runs)):
        others = runs[:chosen] + runs[chosen + 1 :]
        (legend,) = plots.highlight(others, runs[chosen], metrics).legends
        assert [text.get_text() for text in legend.get_texts()] == ["DPO", "TDPO2", "TGDPO", "start"]


def test_a_reward_of_another_scale_is_not_said_to_lie_between_0_and_1():
    points = curves()
    assert plots.frontier(points).axes[0].get_ylabel() == "mean reward (0 to 1)"
    points["dpo"][-1]["reward"] = {"mean": 7.5, "low": 7.0, "high": 8.0, "n": 9}
    assert plots.frontier(points).axes[0].get_ylabel() == "mean reward"
    assert plots.diversity(points).axes[0].get_xlabel() == "mean reward"
    ends = {name: (name, rows[-1]) for name, rows in points.items()}
    assert plots.run_points(ends, points["dpo"][0]).axes[0].get_ylabel() == "mean reward"


# ---- settings and seeds

SETTINGS = [f"{name} β.{beta}" for name in ("dpo", "tdpo1", "tdpo2", "simpo") for beta in ("05", "1", "5")]


def light(colour) -> float:
    red, green, blue = to_rgb(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def seeded(labels, seeds: int = 3) -> dict:
    """Curves whose last three points have a mean, a lowest and a highest seed: mean - .1, mean, mean + .1."""
    data = curves(labels)
    for points in data.values():
        for point in points[1:]:
            for value in point.values():
                if isinstance(value, dict):
                    value["seeds"] = [value["mean"] + 0.1 * (i - 1) for i in range(seeds)]
    return data


def test_settings_have_their_objectives_hue_a_shade_and_a_marker():
    styles = {name: plots.style_of(name, SETTINGS) for name in SETTINGS}
    assert styles["tdpo2 β.05"].label == "TDPO2 β.05"
    for name in ("dpo", "tdpo1", "tdpo2", "simpo"):
        own = [styles[f"{name} β.{beta}"] for beta in ("05", "1", "5")]
        shades = [light(style.colour) for style in own]
        assert (
            0.76 > shades[0] > shades[1] + 0.05 > shades[2] + 0.1
        )  # readable on white, darker the later, in greyscale too
        assert [style.marker for style in own] == ["o", "s", "^"]  # of the setting, the same for all objectives
        assert {style.linestyle for style in own} == {plots.style_of(name).linestyle}
    looks = [(style.marker, str(style.linestyle)) for style in styles.values()]
    assert len(set(looks)) == len(looks)  # told apart without any colour
    beside = ["dpo", "sft", "simpo", "tdpo2", *(f"tgdpo α{alpha}" for alpha in (0.5, 1, 2, 4))]
    assert len({plots.style_of(name, beside).marker for name in beside}) == len(beside)  # whatever their dashes
    assert plots.style_of("tdpo2 β.05")[1:] == plots.style_of("tdpo2")[1:]  # alone, it is the objective's
    assert to_rgb(plots.style_of("tdpo2 β.05", ["tdpo2 β.05", "dpo"]).colour) == to_rgb(plots.style_of("tdpo2").colour)
    assert plots.style_of("dpo", [*SETTINGS, "dpo"]) == plots.style_of("dpo")
    assert plots.style_of("read from a file", ["read from a file"]).label == "read from a file"


def all_figures(data, rows) -> list:
    return [plots.frontier(data), plots.seqkl(data), plots.diversity(data), plots.training(rows)]


@pytest.mark.parametrize("labels", [SETTINGS, SETTINGS[:6], ["tgdpo", *SETTINGS[:3]]])
def test_with_settings_and_seeds_the_legend_covers_no_data(labels):
    rows = dict.fromkeys(labels, [training_rows()["dpo"]] * 3)
    data = seeded(labels)
    for point in data[labels[-1]]:
        point["kl"] = metric(20 * point["kl"]["mean"])  # far from the others: names go below the frontier
    for figure in all_figures(data, rows):
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box = legend.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert box.y0 >= 0
        for ax in figure.axes:
            assert box.y1 <= ax.get_tightbbox().y0 + 2
            assert ax.get_window_extent().height > 200  # the figure grew, not the legend alone
        shown = [
            text.get_text() for text in legend.get_texts() if text.get_text().strip() and text.get_text() != "start"
        ]
        assert shown == [plots.style_of(name).label for name in labels]


def test_a_column_of_the_legend_is_an_objective():
    for figure in (plots.seqkl(seeded(SETTINGS)), plots.diversity(seeded(SETTINGS))):
        figure.draw_without_rendering()
        places = {text.get_text(): text.get_window_extent().x0 for text in figure.legends[0].get_texts()}
        for name in ("DPO", "TDPO1", "TDPO2", "SimPO"):
            assert len({round(places[f"{name} β.{beta}"]) for beta in ("05", "1", "5")}) == 1


def test_bands_reach_from_the_lowest_to_the_highest_seed():
    data = seeded(["dpo", "tdpo2"])
    for figure, x, y in ((plots.frontier(data), "kl", "reward"), (plots.seqkl(data), "pairs_seen", "seqkl_chosen")):
        band = figure.axes[0].collections[0].get_paths()[0].vertices
        last = data["dpo"][-1]
        at = last[x]["mean"] if x == "kl" else last[x]
        ends = [value for where, value in band if where == pytest.approx(at)]
        assert (min(ends), max(ends)) == pytest.approx((last[y]["mean"] - 0.1, last[y]["mean"] + 0.1))
        (line,) = lines(figure.axes[0], "DPO")
        assert line.get_ydata()[-1] == last[y]["mean"]


def test_training_of_several_seeds_is_their_mean_in_a_band():
    runs = [[{"step": i, "loss": level + i} for i in range(1, 5)] for level in (1.0, 2.0, 6.0)]
    runs[2] = runs[2][:3]  # one that has not come so far: the steps that all have are drawn
    ax = plots.training({"dpo β.1": runs, "dpo β.5": runs}).axes[0]
    (line,) = lines(ax, "DPO β.1")
    assert line.get_xdata().tolist() == [1, 2, 3]
    assert line.get_ydata().tolist() == pytest.approx([4, 5, 6])
    band = ax.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (2, 9)
    assert len(ax.get_lines()) == 2  # no line of single updates


def test_a_run_is_drawn_with_its_held_out_pairs_beside_it():
    rows = [
        {
            "step": i,
            "loss": 1 / i,
            "rewards/margins": i,
            "kl/chosen": 2 * i,
            "kl/rejected": 3 * i,
            "lr": 1e-4 * i,
            "grad_norm": None,
        }
        for i in range(1, 9)
    ]
    rows[3] |= {"eval_loss": 0.4, "eval_kl/rejected": 11.0}
    rows.append({"step": 8, "eval_loss": 0.3})
    figure = plots.run("tdpo2", rows)
    figure.draw_without_rendering()
    named = {ax.get_ylabel(): ax for ax in figure.axes}
    assert list(named) == [
        plots.LOGGED[name] for name in ("loss", "rewards/margins", "kl/chosen", "lr")
    ]  # what there is
    (held_out,) = lines(named["loss, nats"], "held-out pairs")
    assert (list(held_out.get_xdata()), list(held_out.get_ydata())) == ([4, 8], [0.4, 0.3])
    kl = named[plots.LOGGED["kl/chosen"]]
    assert [text.get_text() for text in kl.texts] == ["chosen", "rejected"]
    assert [list(line.get_ydata()) for line in lines(kl, "held-out pairs")] == [[11.0]]
    (rate,) = [line for line in named["learning rate"].get_lines() if line.get_linewidth() == 2]
    assert list(rate.get_ydata()) == [row["lr"] for row in rows[:8]]  # not smoothed
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text().strip()) >= 10
    assert [text.get_text() for text in figure.legends[0].get_texts()][1:] == ["held-out pairs"]
    assert len(plots.run("sft", [{"step": 1, "loss": 1.0}]).legends[0].get_texts()) == 1
    plots.run("dpo", [{"step": 1, "eval_loss": 1.0}]).draw_without_rendering()


def test_a_level_of_the_kl_is_read_in_its_root_and_the_picture_is_drawn_so():
    # a rounding below 0 at the start; it turns back at the end
    kl, reward = [-1e-9, 4.0, 9.0, 1.0], [0.5, 0.7, 0.8, 0.4]
    assert plots.at_level(kl, reward, 1.0, root=True) == pytest.approx(0.6)  # where it first comes there
    assert plots.at_level(kl, reward, 6.25, root=True) == pytest.approx(0.75)
    assert plots.at_level(kl, reward, 6.25, root=False) == pytest.approx(0.745)
    assert plots.at_level(kl, reward, 9.1, root=True) is None
    end = 34.31653742712939  # whose power of 1/2 is larger than its root, by rounding
    assert plots.at_level([0.0, end], reward[:2], end, root=True) == 0.7
    assert plots.at_level(kl[:1], reward[:1], 1.0, root=True) is None
    x, y = plots.bent(kl, reward)
    assert x[:: plots.STEPS] == pytest.approx(kl, abs=1e-8)
    assert y[:: plots.STEPS] == pytest.approx(reward)
    assert [plots.at_level(kl, reward, level, root=True) for level in x[1:41]] == pytest.approx(list(y[1:41]))
