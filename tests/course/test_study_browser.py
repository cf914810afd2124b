"""The study browser on a small study made by hand: its table is the result's, every control changes it, nothing trains."""

from __future__ import annotations

import base64
import html
import io
import re
import time

import matplotlib.image
import numpy as np
import pytest
from scipy.stats import t
from toy_study import GAINS, runs, write

from tpo_course.widgets import study_browser as exported
from tpo_course.widgets.study_browser import BUDGETS, STUDIES, grid_figure, study_browser, study_shelf
from tpo_lib.studies import study


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("studies"))


@pytest.fixture
def browser(folder):
    return study_browser("toy", folder)


def lines(browser) -> dict[str, list[str]]:
    """The table: {first cell: the others}."""
    found = re.findall(r"<tr>(.*?)</tr>", browser.text.value)
    cells = [
        [html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in found
    ]
    return {first: others for first, *others in cells}


def by_hand(name: str, level: float, score: str = "reward") -> np.ndarray:
    """Of every seed, the score straight in the root of the KL where that comes to the level, else at its end."""
    values = []
    for run in runs(name):
        kl, value = ([point[key] for point in run["points"]] for key in ("kl", score))
        values.append(np.interp(level**0.5, np.sqrt(kl), value))
    return np.array(values)


def said(values: np.ndarray, sign: str = "") -> str:
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    mean = values.mean()
    return f"{mean:{sign}.3f} [{mean - half:{sign}.3f}, {mean + half:{sign}.3f}]"


@pytest.mark.parametrize(("level", "score"), [(2, "reward"), (10, "reward"), (6, "judge")])
def test_the_table_is_what_the_curves_give_by_hand(browser, level, score):
    browser.choose(*GAINS)
    browser.controls["budget"].value, browser.controls["score"].value = level, score
    found = lines(browser)
    assert found[""][:2] == [f"{score} [95%]", "seeds there"]
    reference = by_hand("dpo", level, score)
    for name, label in zip(GAINS, ("DPO", "TDPO2 α0.1", "TDPO2 α0.5", "SimPO"), strict=True):
        value, there, difference, setting = found[label]
        values = by_hand(name, level, score)
        assert value == said(values)
        reach = sum(run["points"][-1]["kl"] >= level for run in runs(name))
        assert there == f"{reach} of 5"
        apart = said(values - reference, "+")
        low, high = (float(end) for end in re.findall(r"[\[ ]([+-][\d.]+)[,\]]", apart))
        assert difference == ("-" if name == "dpo" else apart + " *" * (low > 0 or high < 0))
        assert setting.startswith(("beta", "alpha"))
    assert found["DPO"][3] == "beta 0.1 lr 0.0003"


def test_some_differences_are_told_apart_and_some_are_not(browser):
    browser.choose("tdpo2 α0.1", "tdpo2 α0.5")
    assert lines(browser)["TDPO2 α0.1"][2] == "+0.000 [+0.000, +0.000]"
    assert lines(browser)["TDPO2 α0.5"][2].endswith("*")
    browser.controls["reference"].value = "tdpo2 α0.5"
    assert lines(browser)["TDPO2 α0.5"][2] == "-"
    assert lines(browser)["TDPO2 α0.1"][2].startswith("-0.0")


def test_it_starts_with_each_method_at_its_best_beside_dpo(browser):
    assert exported is study_browser
    assert list(browser.rows) == ["dpo", "tdpo2 α0.5", "simpo"]
    assert [browser.controls[name].value for name in GAINS] == [True, False, True, True]
    assert (browser.controls["reference"].value, browser.controls["budget"].value) == ("dpo", 10)
    budgets = [nats for _, nats in browser.controls["budget"].options]
    assert budgets == [nats for nats in BUDGETS if nats <= 25]  # as far as a run comes
    assert np.diff(np.sqrt(BUDGETS)).max() < 3 * np.diff(np.sqrt(BUDGETS)).min()
    assert "second judge" not in [words for words, _ in browser.controls["score"].options]  # which no run has
    assert "Which is higher?" in browser.box.children[0].value


def test_the_picture_has_the_mean_thick_every_seed_thin_and_the_budget(browser):
    browser.choose("dpo", "simpo")
    browser.controls["budget"].value = 4
    (ax,) = browser.figure.axes
    thick = {line.get_label(): line for line in ax.get_lines() if line.get_linewidth() == 2}
    assert set(thick) == {"DPO", "SimPO", "best of n"}
    assert thick["DPO"].get_xdata()[-1] == pytest.approx(8)  # where seed 5 ends
    thin = [line for line in ax.get_lines() if line.get_linewidth() < 1]
    ends = sorted(line.get_xdata()[-1] for line in thin)
    assert ends == pytest.approx([8, 12.5, 16, 16, 16, 16, 25, 25, 25, 25])
    assert thin[0].get_color() == thick["DPO"].get_color()
    assert browser._line.get_xdata() == [4, 4]
    figure, before = browser.figure, browser.picture.value
    browser.controls["budget"].value = 17
    assert browser.figure is figure
    assert browser._line.get_xdata() == [17, 17]
    assert browser.picture.value != before
    browser.controls["score"].value = "judge"
    assert browser.figure.axes[0].get_ylabel().startswith("mean score of the judge")


def test_every_control_changes_text_and_alt(browser):
    for name, value in (("budget", 3), ("score", "judge"), ("simpo", False), ("reference", "simpo")):
        before = browser.text.value, browser.picture.value
        browser.controls[name].value = value
        assert browser.text.value != before[0]
        assert name == "reference" or browser.picture.value != before[1]
    assert "DPO 0.5" in browser.alt
    assert f'alt="{browser.alt}"' in html.unescape(browser.picture.value)
    assert 'role="status"' in browser.text.value
    shown = browser._repr_mimebundle_()
    assert shown["text/plain"] == browser.alt
    assert matplotlib.image.imread(io.BytesIO(base64.b64decode(shown["image/png"]))).shape[1] == 9 * 84


def test_without_a_method_it_says_so_and_goes_on_with_the_next(browser):
    before = browser.text.value
    browser.choose()
    assert "tick one or several" in browser.text.value
    assert "image/png" not in browser._repr_mimebundle_()
    browser.choose("dpo", "tdpo2 α0.5", "simpo")
    assert browser.text.value == before


def test_the_settings_that_were_tried(browser):
    assert [name for _, name in browser.controls["show"].options] == ["", "dpo", "tdpo2"]  # SimPO was not tuned
    browser.controls["show"].value = "dpo"
    found = lines(browser)
    assert found[""] == ["beta 0.05", "beta 0.1", "beta 1"]
    assert found["DPO lr 0.0001"] == ["0.700", "0.740", "0.600"]
    assert found["DPO lr 0.0003"] == ["0.710", "0.780", "0.620"]
    assert "6 settings of DPO" in browser.alt
    assert "most at beta 0.1 lr 0.0003, 0.780" in browser.alt
    (ax,) = browser.figure.axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines() if line.get_linewidth() == 2}
    assert drawn["DPO lr 0.0001"] == [[0.05, 0.7], [0.1, 0.74], [1.0, 0.6]]
    (ring,) = [line for line in ax.get_lines() if line.get_markersize() == 15]
    assert ring.get_xydata().tolist() == [[0.1, 0.78]]
    closed = {name for name, control in browser.controls.items() if control.disabled}
    assert closed == {"score", "reference", "budget", *GAINS}
    browser.controls["show"].value = "tdpo2"
    assert lines(browser)["TDPO2 beta 0.1 lr 0.0003"] == ["0.800", "1.200"]
    browser.controls["show"].value = ""
    assert not any(control.disabled for control in browser.controls.values())
    assert lines(browser)["DPO"][2] == "-"


def test_a_grid_is_a_line_for_all_but_the_first_setting():
    grid = [({"beta": beta, "lr": lr}, beta + 100 * lr) for beta in (0.3, 0.1) for lr in (1e-4, 3e-4)]
    (ax,) = grid_figure("dpo", grid, ["beta", "lr"], [grid[2][0]]).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines() if line.get_linewidth() == 2}
    assert list(lines) == ["DPO lr 0.0001", "DPO lr 0.0003"]
    assert lines["DPO lr 0.0001"] == [[0.1, pytest.approx(0.11)], [0.3, pytest.approx(0.31)]]  # sorted
    (ring,) = [line for line in ax.get_lines() if line.get_markersize() == 15]
    assert ring.get_xydata().tolist() == [[0.1, pytest.approx(0.11)]]
    assert (ax.get_xscale(), [text.get_text() for text in ax.get_xticklabels()]) == ("log", ["0.1", "0.3"])
    none = grid_figure("tdpo2", [({"alpha": 0.0}, 0.5), ({"alpha": 1.0}, 0.6)], ["alpha"])
    assert none.axes[0].get_xscale() == "linear"


def test_controls_are_named_and_print_their_value(browser):
    for name, control in browser.controls.items():
        assert control.description, name
    assert browser.controls["budget"].continuous_update
    assert browser.controls["budget"].label == "10 nats"


def test_a_missing_result_says_how_to_make_it(folder, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"results/other\.json is not there yet; run `python -m tpo_lib study other`"
    ):
        study_browser("other", folder)
    study.write(tmp_path / "results" / "toy.json", {"grid": [], "runs": {}})
    with pytest.raises(FileNotFoundError, match=r"toy\.toml: there is no such study; there are none"):
        study_browser("toy", tmp_path)


def test_a_move_of_the_budget_is_drawn_at_once(browser):
    seconds = []
    for nats in (1, 2, 4, 6, 12, 14, 17):
        began = time.process_time()
        browser.controls["budget"].value = nats
        seconds.append(time.process_time() - began)
    assert sorted(seconds)[3] <= 0.3, seconds


@pytest.mark.skipif(not (STUDIES / "results" / "frontier.json").is_file(), reason="study 1 has no result yet")
def test_the_result_of_study_1_is_shown():
    browser = study_browser()
    known = study.read(STUDIES, "frontier")
    assert "dpo" in browser.rows
    assert set(browser.rows) <= set(known["runs"])
    for name, row in browser.rows.items():
        kls = [[point["kl"] for point in run["points"]] for run in known["runs"][name]]
        rewards = [[point["reward"] for point in run["points"]] for run in known["runs"][name]]
        lowest, highest = (f(f(each) for each in rewards) for f in (min, max))
        assert lowest < row["mean"] < highest
        assert row["there"] == sum(max(kl) >= 10 for kl in kls)
    browser.controls["budget"].value = 5
    there = {name: [run["endpoints"]["reward at 5 nats"] for run in known["runs"][name]] for name in browser.rows}
    whole = {name: values for name, values in there.items() if None not in values}
    assert "dpo" in whole
    for name, values in whole.items():  # what the study's page has, of the same curve
        assert browser.rows[name]["mean"] == pytest.approx(np.mean([np.mean(each) for each in values]), abs=2e-3)
    browser.controls["show"].value = "dpo"
    assert f"{sum(name == 'dpo' for name, *_ in known['grid'])} settings of DPO" in browser.alt


def test_a_shelf_opens_a_study_at_a_time_and_leaves_it_as_it_was(folder):
    shelf = study_shelf({"toy": ["dpo", "simpo"]}, folder)
    assert list(shelf.browser.runs) == ["dpo", "simpo"]
    assert shelf.which.options == (("Toy", "toy"),)
    assert shelf.box.children == (shelf.which, shelf.browser.box)
    assert shelf._repr_mimebundle_()["text/plain"] == shelf.browser.alt


@pytest.mark.skipif(not (STUDIES / "results" / "guides.json").is_file(), reason="study 5 has no result yet")
def test_the_studies_of_a_shelf_are_those_of_the_course():
    shelf = study_shelf({"frontier": None, "guides": None})
    first = shelf.browser
    assert list(first.rows) == ["dpo", "tdpo1", "tdpo2 α0.1", "tgdpo α1", "tgdpo equal updates", "simpo", "sft"]
    first.controls["budget"].value = 5
    shelf.which.value = "guides"
    assert len(shelf.browser.rows) == 7  # of ten: no more are shown at the start
    assert "guide" in shelf.browser.plan.question.lower() or "guidance" in shelf.browser.plan.question
    shelf.which.value = "frontier"
    assert shelf.browser is first
    assert shelf.browser.controls["budget"].value == 5


def test_a_method_that_a_study_lacks_is_named(folder):
    with pytest.raises(ValueError, match=r"offered: study 'toy' has no method 'ipo'; it has dpo, tdpo2 α0\.1"):
        study_browser("toy", folder, offered=["dpo", "ipo"])
