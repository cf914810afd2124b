"""The run browser on the runs that come with the course: its picture says which run is which."""

from __future__ import annotations

import pytest
from matplotlib.text import Annotation, Text

from tpo_course.widgets.run_browser import run_browser
from tpo_lib.runs import plots
from tpo_lib.runs.plots import mean


@pytest.fixture(scope="module")
def browser():
    return run_browser()


@pytest.mark.parametrize(("objective", "values"), [("dpo", {"beta": 0.5}), ("tdpo2", {"beta": 0.1, "alpha": 0.3})])
def test_the_runs_that_the_sliders_lead_to_are_named_where_they_stand(browser, objective, values):
    browser.objective.value = objective
    for name, value in values.items():
        getattr(browser, name).value = value
    others = [run for run in browser.content["runs"] if run is not browser.run]
    figure = plots.highlight(others, browser.run, browser.content["start"]["metrics"])
    browser._name(figure.axes[0])
    named = [(t.get_text(), *t.xy) for t in figure.axes[0].texts if isinstance(t, Annotation)]
    mine = [run for run in browser.content["runs"] if run["objective"] == objective]
    expected = [
        (f"{run[name]:g}", mean(run["metrics"], "kl"), mean(run["metrics"], "reward"))
        for name in values
        for run in mine
        if all(run[fixed] == value for fixed, value in values.items() if fixed != name)
    ]
    assert sorted(named) == sorted(expected)
    assert len(named) == (9 if objective == "dpo" else 3 + 4)


def test_the_names_of_the_runs_do_not_overlap_nor_leave_the_picture(browser):
    for objective in browser.objective.options:
        browser.objective.value = objective[1]
        others = [run for run in browser.content["runs"] if run is not browser.run]
        figure = plots.highlight(others, browser.run, browser.content["start"]["metrics"])
        browser._name(figure.axes[0])
        figure.draw_without_rendering()
        boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert all(box.x1 <= figure.axes[0].bbox.x1 for box in boxes)


def test_a_cell_shows_the_run_that_comes_nearest(browser):
    for asked, shown in ((("simpo", 0.1, 2.0), ("simpo", 1.0, 0.0)), (("tdpo2", 0.08, 0.45), ("tdpo2", 0.1, 0.5))):
        browser.show(*asked)
        assert tuple(browser.run[name] for name in ("objective", "beta", "alpha")) == shown
    with pytest.raises(ValueError, match="objective is 'ppo'; there are runs of dpo, "):
        browser.show("ppo", 0.1)
