"""Two models under one experiment: what is read off their curves, and the slider over them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from tpo_course import two_models, widgets
from tpo_course.exercises import compare, real_model
from tpo_data import smollm2
from tpo_lib.runs import plots, report


def _metric(mean: float) -> dict:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 8}


def _point(step: int, kl: float, reward: float) -> dict:
    values = {"kl": kl, "reward": reward, "judge": reward, "entropy": 3.0, "length": 20.0}
    around = np.linspace(-0.01, 0.01, 8)
    by_prompt = {name: list(values[name] + around) for name in ("kl", "reward", "judge")}
    return {"step": step, "by_prompt": by_prompt} | {name: _metric(value) for name, value in values.items()}


def _model(ends: dict[str, tuple[float, float]]) -> dict:
    curves = {name: [_point(0, 0.0, 0.5), _point(9, kl, reward)] for name, (kl, reward) in ends.items()}
    return {"curves": curves, "stage": {"pairs": 7}, "sft": None}


ENDS = {"dpo": (4, 0.7), "tdpo1": (5, 0.75), "tdpo2": (2, 0.6), "tgdpo": (6, 0.8), "simpo": (8, 0.7), "ipo": (1, 0.55)}
STORED = {"pocket": _model(ENDS), "smollm2-135m": _model(ENDS | {"tdpo2": (4.001, 0.7), "tgdpo": (3, 0.8)})}


def test_reward_at_interpolates_and_stops_where_the_run_did():
    points = STORED["pocket"]["curves"]["dpo"]  # 0 to .2 nats a token, reward .5 to .7
    assert two_models.reward_at(points, 0.05) == pytest.approx(0.6)  # half of the way in the root of the KL
    assert two_models.reward_at(points, 0.2) == pytest.approx(0.7)
    assert two_models.reward_at(points, 0.21) is None


def test_findings_are_answered_from_the_differences_by_prompt():
    said = {name: two_models.answers(model) for name, model in STORED.items()}
    assert set(said["pocket"].values()) == {"yes"}
    assert said["smollm2-135m"]["TGDPO travels further than DPO"] == "no"
    noisy = two_models.difference(STORED["smollm2-135m"], "kl", "dpo", "tdpo2")
    assert noisy["mean"] == pytest.approx(-0.001)
    assert two_models.difference(STORED["pocket"], "reward", "dpo", "start")["mean"] == pytest.approx(0.2)


def test_a_difference_whose_interval_holds_zero_is_not_told_apart():
    model = _model(ENDS)
    model["curves"]["tdpo2"][-1]["by_prompt"]["kl"] = list(4 + np.array([-1, 1, -1, 1, -1, 1, -1, 1.0]))
    assert two_models.answers(model)["TDPO2 stays nearer to the start than DPO"] == "not told apart"


def test_the_slider_says_what_it_shows():
    lab = widgets.two_models(STORED)
    lab.controls["level"].value = two_models_level(lab, 0.08)
    level = lab.controls["level"].value
    assert lab.found["pocket"]["dpo"] == pytest.approx(0.5 + 0.2 * (level / 0.2) ** 0.5)
    assert lab.found["pocket"]["ipo"] is None
    assert re.search(r"IPO - and -\.", lab.alt)
    before = lab.picture.value
    lab.controls["metric"].value = "entropy"
    assert lab.found["pocket"]["dpo"] == pytest.approx(3.0)
    assert lab.picture.value != before
    assert "nobody measured there" in lab.text.value


def two_models_level(lab, near: float) -> float:
    return min((value for _, value in lab.controls["level"].options), key=lambda value: abs(value - near))


def test_both_panels_have_the_same_axes_and_every_objective():
    figure = two_models.frontiers(STORED, level=0.1)
    first, second = figure.axes
    assert first.get_ylim() == second.get_ylim()
    assert first.get_xlim() == second.get_xlim()
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["DPO", "TDPO1"]
    assert "nats a token" in first.get_xlabel()


def test_what_is_stored_answers_the_chapter():
    """The runs that come with the course: both models, the same objectives, prompts in one order, no text."""
    stored = smollm2.load()
    assert set(stored) == {"pocket", "smollm2-135m"}
    assert stored["pocket"]["objectives"] == stored["smollm2-135m"]["objectives"]
    for model in stored.values():
        for points in model["curves"].values():
            assert {len(p["by_prompt"][m]) for p in points for m in ("reward", "judge", "kl")} == {
                points[0]["reward"]["n"]
            }
            for point in points:
                assert np.mean(point["by_prompt"]["reward"]) == pytest.approx(point["reward"]["mean"], abs=1e-4)
        assert "DPO" in report.summary_table(two_models.summary(model))
        assert two_models.answers(model).keys() == two_models.FINDINGS.keys()


def test_kl_per_token_is_the_exercises():
    point = STORED["pocket"]["curves"]["dpo"][-1]
    lengths = [20.0] * 8
    right = real_model.kl_per_token.right(np.array(point["by_prompt"]["kl"]), np.array(lengths))
    assert right == pytest.approx(two_models.kl_per_token(point))


def test_the_exercise_on_equal_kl_reads_a_curve_as_every_report_does():
    kl, reward = torch.tensor([0.0, 3.0, 8.0, 21.0]).double(), torch.tensor([0.5, 0.71, 0.8, 0.93]).double()
    for level in (0.5, 3.0, 9.0, 21.0):
        expected = plots.at_level(kl.tolist(), reward.tolist(), level, root=True)
        assert compare.reward_at_kl.right(kl, reward, level).item() == pytest.approx(expected)
    assert compare.reward_at_kl.right(kl, reward, 22.0).isnan()
