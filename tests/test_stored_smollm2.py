"""What is stored of a finished comparison: its numbers, and no text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tpo_data import smollm2
from tpo_lib.files import store

REVIEW = "This film was a waste of two hours"
NUMBERS = ("reward", "judge", "kl", "length")


@pytest.fixture
def run(tmp_path) -> Path:
    """A comparison's folder as `compare.run` leaves it, two objectives, one evaluation each."""
    folder = tmp_path / "runs" / "smollm2-135m"

    def evaluation(name: str, step: int, value: float) -> None:
        metrics = {metric: {"mean": value, "low": value, "high": value, "n": 2} for metric in NUMBERS}
        samples = [
            {"prompt": REVIEW, "text": "x" * 30, "reward": 0.1, "judge": 0.1},
            {"prompt": REVIEW, "text": "y" * 50},
        ]
        row = {"step": step, "pairs_seen": 32 * step} | metrics | {"samples": samples}
        row["by_prompt"] = {metric: [value, value + 1e-7] for metric in NUMBERS[:3]}
        store.write_json(folder / name / "evaluations" / f"{step:08d}.json", row)

    for name, step, value in (("start", 0, 0.0), ("dpo", 4, 0.6), ("ipo", 4, 0.5)):
        (folder / name / "evaluations").mkdir(parents=True)
        evaluation(name, step, value)
    runs = [{"loss_type": name, "beta": 0.1} | dict.fromkeys(smollm2.SETTINGS, 1) for name in ("dpo", "ipo")]
    config = dict.fromkeys(smollm2.STAGE, 8) | {"prompts": "imdb", "imdb": "/home/me/reviews", "objectives": runs}
    config |= {"model": "/home/me/.cache/models/smollm2-135m", "sft": {"reviews": 9}}
    config |= {f"sft {name}": 2.0 for name in smollm2.SFT}
    summary = {
        "objectives": {"dpo": {}, "ipo": {}},
        "config": config,
        "costs": {"start, prompts and pairs": {"seconds": 1.0}},
    }
    summary |= {"seed": 0, "versions": {"torch": "2.13.0"}, "wall_time_s": 9.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = [
        {"objective": "dpo", "kind": "train", "step": 2, "loss": 0.123456789, "lr": 1.0},
        {"objective": "dpo", "kind": "evaluation"},
    ]
    rows[1]["samples"] = [{"prompt": REVIEW}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_numbers_are_kept_and_texts_are_not(run, tmp_path):
    path = tmp_path / "stored" / "summary.json"
    smollm2.write([run], path)
    model = smollm2.load(path)["smollm2-135m"]
    written = path.read_text()
    assert "film" not in written
    assert "/home" not in written
    assert [point["step"] for point in model["curves"]["dpo"]] == [0, 4]
    assert model["curves"]["ipo"][1]["by_prompt"]["reward"] == [0.5, 0.5]
    assert model["curves"]["dpo"][1]["characters"] == 40
    assert model["training"] == {"dpo": [{"step": 2, "loss": 0.12346}]}
    assert model["sft"]["reviews"] == 2.0
    assert model["objectives"] == {"dpo": {"beta": 0.1}, "ipo": {"beta": 0.1}}


def test_a_text_is_refused(run):
    summary = json.loads((run / "summary.json").read_text())
    summary["config"]["prompts"] = REVIEW
    (run / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=r"'This film was a waste.*is text, and none is kept"):
        smollm2.compact(run)


def test_a_later_run_replaces_its_model_alone(run, tmp_path):
    path = tmp_path / "summary.json"
    store.write_json(path, {"models": {"pocket": {"kept": 1}, "smollm2-135m": {"gone": 1}}})
    stored = smollm2.write([run], path)
    assert stored["pocket"] == {"kept": 1}
    assert "gone" not in stored["smollm2-135m"]


def test_an_unfinished_comparison_is_refused(run, capsys):
    (run / "summary.json").unlink()
    with pytest.raises(SystemExit):
        smollm2.main([str(run)])
    assert "let the comparison end first" in capsys.readouterr().err
