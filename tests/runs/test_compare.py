"""The comparison end to end on the bundled pocket model, in small; notebook 06 runs the --quick one."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch

from tpo_lib import losses
from tpo_lib.cli import main
from tpo_lib.files import store
from tpo_lib.runs import compare, heatmap, presets, stage
from tpo_lib.runs.advice import OutOfMemory
from tpo_lib.runs.presets import PRESETS

OBJECTIVES = {name for name, entry in losses.OBJECTIVES.items() if entry.paired}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished small comparison, interrupted once on the way."""
    folder = tmp_path_factory.mktemp("runs") / "quick"
    config = presets.comparison(quick=True)
    small = {
        "train_prompts": 64,
        "held_out_prompts": 32,
        "max_pairs": 128,
        "max_held_out_pairs": 16,
        "max_new_tokens": 20,
    }
    objectives = tuple(replace(train, lr=1e-3, batch_size=16) for train in config.objectives)
    config = replace(config, stage=replace(config.stage, **small), objectives=objectives, evaluations=1)
    real, calls = stage.evaluate, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:  # within the second objective
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    stage.evaluate = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            compare.run(config, folder, progress=False)
        made = sorted(path.relative_to(folder) for path in folder.glob("*/evaluations/*.json"))
        assert [str(path.parent.parent) for path in made] == ["dpo", "start"]
        calls.append(1)
        summary = compare.run(config, folder, progress=False)
        assert len(calls) == 4 + len(OBJECTIVES) - 1  # start and dpo were not evaluated again
    finally:
        stage.evaluate = real
    return config, folder, summary


def test_an_evaluation_that_finds_no_memory_says_what_takes_less(finished, tmp_path, monkeypatch):
    config, _, _ = finished

    def give_out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(stage, "evaluate", give_out)
    with pytest.raises(
        OutOfMemory, match=r"^CUDA out of memory\.; an evaluation does not fit; .* --set stage\.sampled_together=N"
    ):
        compare.run(config, tmp_path / "one", progress=False)


def test_rewards_rise_and_figures_are_finite(finished):
    _, _, summary = finished
    assert set(summary["objectives"]) == OBJECTIVES
    start = summary["start"]
    assert start["reward"]["mean"] == pytest.approx(0.5, abs=0.12)
    assert start["kl"]["mean"] == pytest.approx(0, abs=1e-3)
    for name, metrics in summary["objectives"].items():
        assert metrics["reward"]["mean"] > start["reward"]["mean"] + 0.04, name
        assert 0.1 < metrics["kl"]["mean"] < 100, name
        for metric, value in metrics.items():
            assert math.isfinite(value["mean"]), metric
            assert value["low"] <= value["mean"] <= value["high"], metric
        wanted = {"reward", "judge", "kl", "entropy", "rare", "ref_perplexity", "distinct_2", "length"}
        wanted |= {"accuracy_logratio", "own_accuracy"}
        assert wanted | {f"seqkl_{side}" for side in ("chosen", "rejected", "margin")} <= metrics.keys()


def test_everything_promised_is_written(finished):
    _, folder, summary = finished
    for name in ("frontier.png", "seqkl.png", "diversity.png", "gaps.png"):
        assert (folder / name).stat().st_size > 5000, name
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert {"config", "seed", "versions", "wall_time_s"} <= summary.keys()
    assert summary["config"]["held_out_prompts_seen"] == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {row["objective"] for row in rows} == OBJECTIVES
    assert {row["kind"] for row in rows} == {"train", "evaluation"}
    page = (folder / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"']https?:", page)
    text = (folder / "report.md").read_text()
    assert {"frontier.png", "tokens_logratio.png", "tokens_kl.png"} <= set(re.findall(r"\(([a-z_]+\.png)\)", text))
    for name in OBJECTIVES:
        pairs = json.loads((folder / name / "tokens.json").read_text())["pairs"]
        assert len(pairs) == heatmap.PAIRS
        sizes = {len(pairs[0]["chosen"][key]) for key in ("pieces", "logratio", "kl", "credit")}
        assert len(sizes) == 1
    assert page.count(f"{heatmap.CREDIT}</span>") == 2 * heatmap.PAIRS
    assert (folder.parent / "latest" / "summary.json").samefile(folder / "summary.json")


def test_repeating_only_redraws(finished, monkeypatch):
    config, folder, summary = finished
    monkeypatch.setattr(stage, "evaluate", lambda *a, **k: pytest.fail("evaluated again"))
    monkeypatch.setattr(heatmap, "token_map", lambda *a, **k: pytest.fail("looked at again"))
    assert compare.run(config, folder, progress=False)["objectives"] == json.loads(json.dumps(summary))["objectives"]


def test_another_comparison_is_not_mixed_in(finished):
    config, folder, _ = finished
    with pytest.raises(RuntimeError, match="--fresh"):
        compare.run(replace(config, stage=replace(config.stage, seed=1)), folder, progress=False)


def test_fresh_knows_every_file_of_a_comparison_and_stops_at_any_other(finished, tmp_path):
    _, folder, _ = finished
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "tgdpo" / "final" / "notes.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"tgdpo/final/notes\.md is not ours, and nothing was removed"):
        store.clear(copy, compare.FILES)
    assert len(list(copy.rglob("*"))) == len(list(folder.rglob("*"))) + 1
    (copy / "tgdpo" / "final" / "notes.md").unlink()
    store.clear(copy, compare.FILES)
    assert [path.name for path in copy.iterdir()] == [store.mark("comparison")]


@pytest.mark.parametrize("damage", ["digit", "gone"])
def test_an_evaluation_that_changed_is_not_believed(finished, tmp_path, damage):
    config, folder, _ = finished
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = max(copy.glob("dpo/evaluations/*.json"))
    text = path.read_text()
    mean = json.loads(text)["reward"]["mean"]
    path.write_text(text.replace(f'"mean": {mean}', '"mean": 0.999'))
    if damage == "gone":
        path.unlink()
    said = "missing, and the run has gone on" if damage == "gone" else "damaged"
    with pytest.raises(RuntimeError, match=rf"dpo/evaluations/{path.name} is {said}.*--fresh"):
        compare.run(config, copy, progress=False)


@pytest.mark.parametrize("name", ["..", ".", "latest", "a/b", "/tmp/elsewhere", "../home", "a\\b"])
def test_a_name_is_one_folder_below_runs(tmp_path, capsys, name):
    (tmp_path / "runs").mkdir()
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--fresh", "--quick", "--runs", str(tmp_path / "runs"), "--name", name])
    assert f"--name {name!r} must be a name of one folder" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "runs"]


def test_a_folder_of_the_users_is_refused_with_fresh_and_without(tmp_path, capsys):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "report.md").write_text("mine")
    for more in ([], ["--fresh"]):
        with pytest.raises(SystemExit, match="2"):
            main(["run", "--quick", "--runs", str(tmp_path / "runs"), "--name", "mine", *more])
        assert "mine/report.md was there before" in capsys.readouterr().err
    assert (tmp_path / "runs" / "mine" / "report.md").read_text() == "mine"


@pytest.mark.parametrize("kind", ["folder", "file", "link of the user's", "link of ours", "nothing"])
def test_latest_is_a_link_or_left_as_it_is(tmp_path, capsys, kind):
    link, run = tmp_path / "latest", tmp_path / "quick"
    run.mkdir()
    if kind == "folder":
        link.mkdir()
        (link / "precious").write_text("mine")
    elif kind == "file":
        link.write_text("mine")
    elif kind != "nothing":
        link.symlink_to("earlier" if kind == "link of ours" else "/home")
    compare._link_latest(run)
    if kind in ("nothing", "link of ours"):
        assert link.readlink().name == "quick"
    else:
        assert "latest is left as it is" in capsys.readouterr().err
        assert not link.is_symlink() or str(link.readlink()) == "/home"
        assert kind != "folder" or (link / "precious").read_text() == "mine"


def test_nothing_is_tuned_in_favour_of_one():
    full = presets.comparison()
    for field in ("lr", "optimizer", "schedule", "warmup_steps", "batch_size", "epochs", "seed", "clip", "max_length"):
        assert len({getattr(run, field) for run in full.objectives}) == 1, field
    assert {run.beta for run in full.objectives if run.loss_type != "simpo"} == {PRESETS["pocket"].train.beta}
    assert [run.loss_type for run in full.objectives].index("dpo") < [run.loss_type for run in full.objectives].index(
        "tgdpo"
    )
