"""Objectives under several conditions: every mean and interval stands where it belongs, in the objective's own look."""

from __future__ import annotations

import pytest
from matplotlib.text import Text

from tpo_lib.runs.plots import style_of
from tpo_lib.studies import conditions, figures

ROWS = ("labels as scored", "50 pairs")
OBJECTIVES = ("dpo", "tdpo2", "tgdpo")


def read(shift: float = 0.0) -> dict[str, dict]:
    names = [f"{objective}, {row}" for row in ROWS for objective in OBJECTIVES]
    means = {name: 0.5 + 0.04 * i + shift for i, name in enumerate(names)}
    return {name: {"mean": mean, "low": mean - 0.01, "high": mean + 0.03} for name, mean in means.items()}


def drawn(axes) -> dict[tuple[float, str], tuple[float, list[float]]]:
    """{(place, colour): (mean, its interval)}."""
    lines = [line for line in axes.get_lines() if line.get_linestyle() != ":"]
    spans = {
        (line.get_ydata()[0], line.get_color()): list(line.get_xdata()) for line in lines if len(line.get_xdata()) == 2
    }
    means = {
        (line.get_ydata()[0], line.get_color()): line.get_xdata()[0] for line in lines if len(line.get_xdata()) == 1
    }
    return {place: (mean, spans[place]) for place, mean in means.items()}


def test_every_mean_stands_in_its_row_with_its_interval():
    panels = {"reward end": read(), "reward within 10 nats": read(0.2)}
    figure = conditions.figure(panels)
    for axes, (words, found) in zip(figure.axes, panels.items(), strict=True):
        assert axes.get_xlabel() == words
        there = drawn(axes)
        assert len(there) == len(found)
        for (place, colour), (mean, span) in there.items():
            (objective,) = [each for each in OBJECTIVES if style_of(each).colour == colour]
            metric = found[f"{objective}, {ROWS[round(place)]}"]
            assert (mean, span) == (metric["mean"], [metric["low"], metric["high"]])
        (dotted,) = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
        assert dotted.get_xdata()[0] == found["dpo, labels as scored"]["mean"]
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == [*ROWS]
    figure.draw_without_rendering()
    shown = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    assert min(text.get_fontsize() for text in shown) >= 10


def test_what_is_not_reached_is_left_out_and_said():
    found = read()
    found["tdpo2, 50 pairs"] = dict.fromkeys(("mean", "low", "high"))
    (axes,) = conditions.figure({"reward at 20 nats": found}).axes
    assert len(drawn(axes)) == len(found) - 1
    words = conditions.alt({"reward at 20 nats": found})
    assert "50 pairs: DPO 0.620, TDPO2 does not come there, TGDPO 0.700." in words
    assert "labels as scored: DPO 0.500, TDPO2 0.540" in words


def test_pairs_of_one_condition_have_one_look_an_objective():
    row = {"mean": 0.01, "low": 0.0, "high": 0.02, "detectable": 0.01, "holm": 0.5}
    rows = [row | {"a": f"tdpo2, {name}", "b": f"dpo, {name}"} for name in ROWS]
    (axes,) = figures.differences({"reward end, difference": rows}).axes
    assert {line.get_color() for line in axes.get_lines()} == {"#555555", style_of("tdpo2").colour}
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [f"TDPO2 − DPO, {name}" for name in ROWS]
    assert "TDPO2 minus DPO, 50 pairs +0.010" in figures.differences_alt({"reward end, difference": rows})


@pytest.mark.parametrize("names", [["dpo", "tdpo2, 50 pairs"], ["dpo", "tdpo2 α0.5"]])
def test_without_conditions_there_are_none(names):
    assert conditions.by_condition(names) == {}
