"""The sweep behind the run browser: resumable, one start only; and the browser says what the file holds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tpo_course.widgets.run_browser import run_browser
from tpo_lib.files.store import CheckpointError, read_json, write_json
from tpo_lib.runs import lab, sweep
from tpo_lib.runs.presets import PRESETS

WHOLE = tuple(sweep.grid())  # the fixture below replaces it
GRID = (("dpo", 0.1, 0.0), ("tdpo2", 0.1, 0.3), ("tdpo2", 0.5, 1.0), ("tdpo2", 0.5, 0.3), ("tdpo2", 0.1, 1.0))


@pytest.fixture(scope="module")
def swept(small_stage, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "pocket_stage", lambda **changes: small_stage)
        patch.setattr(sweep, "UPDATES", 2)
        pocket = PRESETS["pocket"]
        patch.setattr(lab, "PRESETS", {"pocket": replace(pocket, train=replace(pocket.train, batch_size=8))})
        path = tmp_path_factory.mktemp("sweep") / "runs.json"
        patch.setattr(sweep, "grid", lambda: iter(GRID[:1]))
        first = sweep.sweep(path, progress=False)
        patch.setattr(sweep, "grid", lambda: iter(GRID))
        content = sweep.sweep(path, progress=False)
        assert content["runs"][0] == first["runs"][0]
        yield path, content
        content["start"]["metrics"]["reward"]["mean"] = 0.123
        write_json(path, content)
        with pytest.raises(ValueError, match=r"another sweep \(start differs\)"):
            sweep.sweep(path, progress=False)


def test_the_file_is_what_was_returned(swept):
    path, content = swept
    assert read_json(path, "no") == content
    assert [(run["objective"], run["beta"], run["alpha"]) for run in content["runs"]] == list(GRID)
    assert [other for other in path.parent.iterdir() if other.suffix != ".lock"] == [path]
    for run in content["runs"]:
        assert len(run["training"]) == 2
        assert run["metrics"]["reward"]["low"] <= run["metrics"]["reward"]["high"]


def test_the_browser_shows_the_run_that_was_chosen(swept):
    path, content = swept
    ui = run_browser(path)
    assert ui.objective.value == "dpo"
    assert ui.alpha.disabled
    ui.objective.value = "tdpo2"
    assert not ui.alpha.disabled
    pictures = bytes(ui.points.value), bytes(ui.curve.value)
    for beta, alpha in ((0.1, 0.3), (0.5, 1.0), (0.5, 0.3)):
        ui.beta.value, ui.alpha.value = beta, alpha
        run = next(r for r in content["runs"] if (r["objective"], r["beta"], r["alpha"]) == ("tdpo2", beta, alpha))
        assert ui.run is run or ui.run == run
        assert f"beta {beta:g}, alpha {alpha:g}" in ui.facts.value
        assert f"reward {run['metrics']['reward']['mean']:.2f} [" in ui.facts.value
    assert (bytes(ui.points.value), bytes(ui.curve.value)) != pictures


@pytest.mark.parametrize("text", ['{"runs": []}', '{"name": "mine", "version": 1}'])
def test_a_file_of_another_kind_is_left_alone(swept, small_stage, tmp_path, monkeypatch, text):
    monkeypatch.setattr(sweep, "pocket_stage", lambda **changes: small_stage)
    (tmp_path / "package.json").write_text(text)
    with pytest.raises(ValueError, match=r"package\.json is not the file of a sweep"):
        sweep.sweep(tmp_path / "package.json", progress=False)
    assert (tmp_path / "package.json").read_text() == text


def test_a_digit_that_changed_is_noticed(swept, tmp_path):
    text = swept[0].read_text()
    (tmp_path / "runs.json").write_text(text.replace('"mean": 0.', '"mean": 1.', 1))
    with pytest.raises(CheckpointError, match=r"runs\.json is damaged .*digest differs.*; make it anew with"):
        run_browser(tmp_path / "runs.json")


def test_the_grid_has_no_run_twice():
    assert len(set(WHOLE)) == len(WHOLE) == 39
