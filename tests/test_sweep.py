"""The sweep behind the run browser: resumable, one start only; and the browser says what the file holds."""

from __future__ import annotations

import json

import pytest

from tpo_lib import sweep
from tpo_lib.widgets.run_browser import run_browser

WHOLE = tuple(sweep.grid())  # the fixture below replaces it
GRID = (("dpo", 0.1, 0.0), ("tdpo2", 0.1, 0.3), ("tdpo2", 0.5, 1.0), ("tdpo2", 0.5, 0.3), ("tdpo2", 0.1, 1.0))


@pytest.fixture(scope="module")
def swept(small_stage, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "pocket_stage", lambda **changes: small_stage)
        patch.setattr(sweep, "UPDATES", 2)
        path = tmp_path_factory.mktemp("sweep") / "runs.json"
        patch.setattr(sweep, "grid", lambda: iter(GRID[:1]))
        first = sweep.sweep(path, progress=False)
        patch.setattr(sweep, "grid", lambda: iter(GRID))
        content = sweep.sweep(path, progress=False)
        assert content["runs"][0] == first["runs"][0]
        yield path, content
        content = json.loads(path.read_text())
        content["start"]["metrics"]["reward"]["mean"] = 0.123
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="another start"):
            sweep.sweep(path, progress=False)


def test_the_file_is_what_was_returned(swept):
    path, content = swept
    assert json.loads(path.read_text()) == content
    assert [(run["objective"], run["beta"], run["alpha"]) for run in content["runs"]] == list(GRID)
    assert list(path.parent.iterdir()) == [path]
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


def test_the_grid_has_no_run_twice():
    assert len(set(WHOLE)) == len(WHOLE) == 30
