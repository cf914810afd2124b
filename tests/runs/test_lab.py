"""The training laboratory: runs are kept, stopped, renamed, removed and exported; and the widget over it."""

from __future__ import annotations

import json

import pytest

from tpo_course.widgets.training_lab import training_lab
from tpo_lib.losses import OBJECTIVES, Hyperparameter, Objective
from tpo_lib.models import fingerprint
from tpo_lib.runs import plots
from tpo_lib.runs.lab import Laboratory
from tpo_lib.runs.report import write_report
from tpo_lib.types import LossOutput

SMALL = {"lr": 3e-4, "updates": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def lab(small_stage) -> Laboratory:
    return Laboratory(small_stage)


@pytest.fixture(autouse=True)
def _no_runs(lab):
    lab.runs.clear()


def test_a_run_is_trained_evaluated_and_kept(lab):
    start, words = fingerprint(lab.stage.start), []
    run = lab.train(lab.config("tdpo2", beta=0.1, alpha=0.5, **SMALL), on_stage=words.append)
    assert list(lab.runs) == ["tdpo2 β0.1 α0.5"]
    assert words == ["training tdpo2 β0.1 α0.5", "evaluating tdpo2 β0.1 α0.5"]
    assert [row["step"] for row in run.rows] == [1, 2]
    assert fingerprint(lab.stage.start) == start != fingerprint(run.policy)
    objective, point = lab.points()["tdpo2 β0.1 α0.5"]
    assert objective == "tdpo2"
    assert point["reward"]["low"] <= point["reward"]["mean"] <= point["reward"]["high"]
    assert lab.start_point()["kl"]["mean"] == pytest.approx(0, abs=1e-3)


def test_an_objective_of_ones_own_is_trained_evaluated_drawn_and_saved(lab, monkeypatch, tmp_path):
    """IPO with a hyperparameter of its own: at the start its loss is (1 / (2 tau))^2."""

    def mine(chosen, rejected, *, tau):
        rewards = [(side.logps - side.ref_logps).sum(-1) for side in (chosen, rejected)]
        return LossOutput((rewards[0] - rewards[1] - 1 / (2 * tau)) ** 2, *(reward.detach() for reward in rewards))

    record = Objective(mine, ("ref_logps",), {"tau": Hyperparameter(0.1, "τ", "pull towards the reference", above=0)})
    monkeypatch.setitem(OBJECTIVES, "mine", record)
    run = lab.train(lab.config("mine", beta=0.1, alpha=0.5, **SMALL, tau=0.25), "mine")
    assert run.rows[0]["loss"] == pytest.approx(4, rel=1e-4)
    assert run.evaluation.metrics["own_margin"].n > 0
    assert plots.run_points(lab.points(), lab.start_point()) is not None
    assert "<b>mine</b>" in training_lab(lab).table.value
    saved = json.loads(lab.save(tmp_path / "lab.json").read_text())["runs"]["mine"]["config"]
    assert saved["tau"] == 0.25
    assert "beta" not in saved
    curves = {"mine": [lab.start_point() | {"step": 0}, lab.points()["mine"][1] | {"step": 2}]}
    summary = {
        "objectives": {"mine": lab.points()["mine"][1]},
        "config": {"objectives": [saved]},
        "versions": {},
        "seed": 0,
    }
    write_report(tmp_path, summary | {"wall_time_s": 1.0}, curves, {}, training={"mine": run.rows})
    assert "| mine |" in (tmp_path / "report.md").read_text()


def test_tgdpo_trains_its_guide_once(lab):
    words = []
    for _ in range(2):
        lab.train(lab.config("tgdpo", beta=0.2, alpha=0.5, **SMALL), on_stage=words.append)
    assert sum("guide" in text for text in words) == 1
    assert list(lab.runs) == ["tgdpo β0.2 α0.5", "tgdpo β0.2 α0.5 (2)"]
    one, two = (fingerprint(run.policy) for run in lab.runs.values())
    assert one == two


def test_stop(lab):
    run = lab.train(
        lab.config("dpo", beta=0.1, alpha=0.5, lr=1e-4, updates=5, batch_size=8), on_log=lambda run: run.updates == 2
    )
    assert run.stopped
    assert run.updates == 2
    assert run.evaluation is not None
    guideless = lab.train(
        lab.config("tgdpo", beta=0.1, alpha=0.5, lr=9e-5, updates=5, batch_size=8), on_log=lambda run: True
    )
    assert guideless.stopped
    assert len(lab.runs) == 1  # a run that never began is not kept


def test_names(lab):
    config = lab.config("dpo", beta=0.1, alpha=0.5, **SMALL)
    lab.train(config, "a")
    with pytest.raises(ValueError, match="'a' already"):
        lab.train(config, "a")
    lab.train(config, "b")
    lab.rename("a", "first")
    assert list(lab.runs) == ["first", "b"]
    with pytest.raises(ValueError, match="taken"):
        lab.rename("first", "b")
    with pytest.raises(ValueError, match="empty"):
        lab.rename("first", " ")
    lab.remove("first")
    assert list(lab.runs) == ["b"]


def test_bad_settings_are_refused_by_name(lab):
    with pytest.raises(ValueError, match="beta=-1"):
        lab.config("dpo", beta=-1, alpha=0.5, **SMALL)


def test_the_widget_trains_lists_renames_removes_and_exports(lab, tmp_path):
    ui = training_lab(lab, folder=tmp_path)
    assert ui.hyper["alpha"].disabled
    ui.objective.value = "tdpo2"
    assert not ui.hyper["alpha"].disabled
    assert "No run yet" in ui.samples.value
    empty = bytes(ui.points.value)
    ui.updates.value, ui.name.value = 2, "mine"
    ui.train_button.click()
    ui.wait()
    assert "mine: finished after 2 of 2 updates" in ui.status.value
    assert ui.bar.value == ui.bar.max == 2
    assert bytes(ui.curve.value).startswith(b"\x89PNG")
    assert bytes(ui.points.value) != empty
    assert "<b>mine</b>" in ui.table.value
    assert not ui.train_button.disabled
    ui.train_button.click()  # the same name again
    assert "already" in ui.status.value
    ui.new_name.value = "yours"
    ui.rename_button.click()
    assert "<b>yours</b>" in ui.table.value
    assert "yours (" in ui.samples.value
    ui.export_button.click()
    saved = json.loads((tmp_path / "training_lab.json").read_text())
    assert saved["runs"]["yours"]["config"]["loss_type"] == "tdpo2"
    assert len(saved["runs"]["yours"]["training"]) == 2
    ui.remove_button.click()
    assert lab.runs == {}
    assert ui.remove_button.disabled
    assert "No run yet" in ui.samples.value


def test_the_widget_stops(lab):
    ui = training_lab(lab)
    ui.updates.value = 60
    logged = ui._logged

    def stop_after_two(run):
        if run.updates == 2:
            ui.stop_button.click()
        return logged(run)

    ui._logged = stop_after_two
    ui.train_button.click()
    ui.wait()
    assert "stopped after 2 of 60 updates" in ui.status.value
    assert ui.stop_button.disabled
    assert ", stopped" in ui.table.value


def test_a_failure_is_shown_and_raised_again(lab, monkeypatch):
    ui = training_lab(lab)
    monkeypatch.setattr(type(lab), "train", lambda *a, **k: (_ for _ in ()).throw(FloatingPointError("step 3")))
    ui.train_button.click()
    with pytest.raises(FloatingPointError, match="step 3"):
        ui.wait()
    assert "FloatingPointError: step 3" in ui.status.value
    assert not ui.train_button.disabled
    ui.wait()  # told once
