"""The training laboratory: runs are kept, stopped, renamed, removed and exported; and the widget over it."""

from __future__ import annotations

import itertools
import json

import pytest

from tpo_course.widgets.training_lab import training_lab
from tpo_course.widgets.training_troubles import TROUBLES, WELL
from tpo_lib.losses import OBJECTIVES, Hyperparameter, Objective
from tpo_lib.models import fingerprint
from tpo_lib.runs import plots
from tpo_lib.runs.lab import Laboratory
from tpo_lib.runs.report import write_report
from tpo_lib.runs.runs import Trained
from tpo_lib.runs.sweep import RUNS
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


def test_swapped_labels_look_sound_in_training_and_lower_the_reward(lab):
    config = lab.config("dpo", beta=0.1, lr=3e-4, updates=16, batch_size=8)
    pairs = [(pair.chosen_ids, pair.rejected_ids) for pair in lab.stage.pairs]
    sound, wrong = lab.train(config), lab.train(config, swapped=True)
    assert list(lab.runs) == ["dpo β0.1", "dpo β0.1 labels swapped"]
    assert pairs == [(pair.chosen_ids, pair.rejected_ids) for pair in lab.stage.pairs]
    for run in (sound, wrong):
        assert run.rows[-1]["rewards/margins"] > 0.05
        assert run.rows[-1]["loss"] < run.rows[0]["loss"] - 0.03
    start = lab.start.metrics["reward"].mean
    assert sound.evaluation.metrics["reward"].mean > start + 0.05
    assert wrong.evaluation.metrics["reward"].mean < start - 0.05
    assert wrong.evaluation.metrics["accuracy_logratio"].mean < 0.5 < sound.evaluation.metrics["accuracy_logratio"].mean
    saved = lab.record()["runs"]
    assert saved["dpo β0.1 labels swapped"]["mistakes"] == ["labels swapped"]
    assert "mistakes" not in saved["dpo β0.1"]


def test_a_guide_may_be_another_beta_s(lab):
    words, config = [], lab.config("tgdpo", beta=0.1, alpha=0.5, guide_beta=10.0, **SMALL)
    for how in ({}, {"guide_trained_at": 10.0}, {"guide_trained_at": 0.3}, {"swapped": True}):
        lab.train(config, **how, on_stage=words.append)
    trained = [text for text in words if "guide, beta" in text]
    assert trained == [
        f"training the DPO guide, beta {beta}" for beta in ("10", "0.3", "10")
    ]  # the last on swapped pairs
    assert [run.mistakes for run in lab.runs.values()] == [[], [], ["guide trained at 0.3"], ["labels swapped"]]
    assert len({fingerprint(run.policy) for run in lab.runs.values()}) == 3
    with pytest.raises(ValueError, match=r"guide_trained_at=0.1: dpo has no guide"):
        lab.train(lab.config("dpo", beta=0.1, **SMALL), guide_trained_at=0.1)


@pytest.fixture(scope="module")
def troubled(small_stage) -> dict[str, Trained]:
    """Every trouble of the training lab, and the same objectives with nothing wrong, on a few pairs."""
    lab, asked = Laboratory(small_stage), {name: trouble.values for name, trouble in TROUBLES.items()}
    asked |= {trouble.objective: {"objective": trouble.objective} | WELL for trouble in TROUBLES.values()}
    for name, values in asked.items():
        settings = dict(values)
        mistakes = {key: settings.pop(key) for key in ("swapped", "guide_trained_at")}
        mistakes["guide_trained_at"] = mistakes["guide_trained_at"] or None
        lab.train(lab.config(settings.pop("objective"), **settings, batch_size=8), name, **mistakes)
    return lab.runs | {"start": lab.start}


def ended(run, name: str) -> float:
    """A metric at the end: logged, or of the evaluation."""
    return run.rows[-1][name] if name in run.rows[-1] else run.evaluation.metrics[name].mean


def rise(run) -> float:
    """How far the loss goes up within the first five updates, later batches differ too much."""
    losses = [row["loss"] for row in run.rows[:5]]
    return max(after - before for before, after in itertools.combinations(losses, 2))


def test_every_trouble_has_the_effect_that_its_words_say(troubled):
    dpo, tdpo2, tgdpo = (troubled[name] for name in ("dpo", "tdpo2", "tgdpo"))

    pulled = troubled["alpha too large"]
    assert ended(pulled, "kl") < 0.6 * ended(tdpo2, "kl")
    assert ended(pulled, "rewards/margins") > 0.7 * ended(tdpo2, "rewards/margins")
    assert abs(ended(pulled, "loss") - ended(tdpo2, "loss")) < 0.05
    assert ended(pulled, "reward") < ended(tdpo2, "reward")

    tiny = troubled["beta tiny"]
    assert ended(tiny, "rewards/margins") < 0.15 * ended(dpo, "rewards/margins")
    assert ended(tiny, "loss") > ended(dpo, "loss") + 0.03
    assert ended(tiny, "kl") > 0.95 * ended(dpo, "kl")

    floored = troubled["weights on the floor"]
    assert 0.4 > ended(floored, "guidance/floor_share") > 0.25 > 0.01 > ended(tgdpo, "guidance/floor_share")
    assert ended(floored, "loss") < 0.05
    assert ended(floored, "grad_norm") < 0.2 * ended(tgdpo, "grad_norm")

    misread = troubled["guide beta is not the guide's"]
    assert ended(misread, "rewards/margins") > 10 * ended(tgdpo, "rewards/margins")
    assert ended(misread, "rewards/accuracies") == 1
    assert ended(misread, "accuracy_logratio") <= ended(tgdpo, "accuracy_logratio")

    fast = troubled["learning rate too large"]
    assert rise(fast) > 0.1 > 0.02 > rise(dpo)
    assert ended(fast, "kl") > 10 * ended(dpo, "kl")
    assert ended(fast, "ref_perplexity") > 5 * ended(dpo, "ref_perplexity")
    assert ended(fast, "rare") > 3 * ended(dpo, "rare")

    swapped = troubled["labels swapped"]
    assert ended(swapped, "rewards/margins") > 0.7 * ended(dpo, "rewards/margins")
    assert ended(swapped, "reward") < troubled["start"].metrics["reward"].mean < ended(dpo, "reward")


def test_a_trouble_sets_the_controls_says_what_to_look_for_and_names_its_run(lab):
    ui = training_lab(lab)

    def stand() -> dict:
        return {name: control.value for name, control in ui._knobs.items()}

    assert stand() == {"objective": "dpo"} | WELL
    for name, trouble in TROUBLES.items():
        ui.trouble.value = name
        assert stand() == trouble.values
        assert ui.guide_trained_at.label
        assert trouble.look in ui.look.value
        assert ui.trouble.value == name
    ui.trouble.value = "nothing"  # the objective stays, so that the two can be compared
    assert stand() == {"objective": TROUBLES["labels swapped"].objective} | WELL
    assert "Nothing in these settings goes wrong" in ui.look.value
    ui.trouble.value = "labels swapped"
    ui.updates.value = 2
    assert ui.trouble.value == "settings of your own"
    assert ui.swapped.value
    assert "Look at" not in ui.look.value
    ui.train_button.click()
    ui.wait()
    assert list(lab.runs) == ["dpo β0.1 labels swapped"]
    assert "labels swapped" in ui.table.value
    ui.trouble.value = "beta tiny"
    ui.lab.train(lab.config("dpo", beta=0.01, **SMALL), "dpo beta tiny")
    assert ui.lab.free_name("dpo beta tiny") == "dpo beta tiny (2)"
    ui.trouble.value = "guide beta is not the guide's"
    ui.objective.value = "dpo"  # which has no guide: what stands in the closed control is not asked for
    ui.updates.value = 2
    assert ui.guide_trained_at.disabled
    ui.train_button.click()
    ui.wait()
    assert list(lab.runs.values())[-1].mistakes == []


def test_curves_of_several_runs_and_the_stored_runs_stand_in_the_pictures(lab, monkeypatch):
    drawn, points = [], []
    training, run_points = plots.training, plots.run_points
    monkeypatch.setattr(plots, "training", lambda curves: drawn.append(dict(curves)) or training(curves))
    monkeypatch.setattr(plots, "run_points", lambda *a, **k: points.append(run_points(*a, **k)) or points[-1])
    ui = training_lab(lab, stored=RUNS)
    assert list(drawn[-1].values()) == [[]]
    stored = json.loads(RUNS.read_text())["runs"]

    def faint(colour: str) -> int:
        return sum(line.get_color() == colour and line.get_alpha() is not None for line in points[-1].axes[0].lines)

    for objective in ("dpo", "tdpo2"):
        ui.objective.value = objective
        mine = sum(run["objective"] == objective for run in stored)
        assert faint(plots.style_of(objective).colour) == mine
        assert faint("#999999") == len(stored) - mine
    assert f"{len(stored)} stored runs" in ui.table.value
    for name in ("dpo mine", "mine", "a" * 40, "b", "c"):
        lab.train(lab.config("dpo", beta=0.1, **SMALL), name)
    ui._runs_changed()
    assert list(drawn[-1]) == ["dpo mine", f"dpo {'a' * 32}", "dpo b", "dpo c"]
    lab.remove("b")
    ui._logged(lab.runs["c"])  # as of a run under way
    assert list(drawn[-1]) == ["dpo mine", "dpo mine'", f"dpo {'a' * 32}", "dpo c", "dpo under way"]
    assert "stored" not in training_lab(lab).table.value


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
