"""Every layout that `doctor` reads, written here as its tool writes it, gives the same record."""

from __future__ import annotations

import builtins
import csv
import json
import math

import pytest
import tiny
from test_train import CONFIG
from transformers.trainer_callback import TrainerState

from tpo_lib.data import EncodedPair
from tpo_lib.models import frozen_copy
from tpo_lib.runs.run import fit
from tpo_lib.tools.doctor.logs import canonical, log_of, read_log
from tpo_lib.tools.doctor.rules import examine

TRAIN = ("loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/margins")
TRAIN += ("rewards/accuracies", "logps/chosen", "logps/rejected")
HELD_OUT = tuple(name for name in TRAIN if name not in ("grad_norm", "learning_rate"))


def number(name: str, step: int) -> float:
    return round(len(name) - step / 7, 4)


def rows() -> list[dict]:
    """As transformers' Trainer keeps them: training every 10 steps, held-out pairs every 20, and a summary at the end."""
    found = []
    for step in (10, 20, 30, 40):
        found.append({name: number(name, step) for name in TRAIN} | {"epoch": step / 40, "step": step})
        if step % 20 == 0:
            held = {f"eval_{name}": number(f"eval_{name}", step) for name in HELD_OUT}
            found.append(held | {"eval_runtime": 1.5, "epoch": step / 40, "step": step})
    summary = {"train_runtime": 99.0, "train_loss": 0.5, "total_flos": 0.0, "epoch": 1.0, "step": 40}
    return [*found, summary]


def check(log, names=TRAIN, held_out=HELD_OUT) -> None:
    for name in names:
        assert log.values[name] == [(step, pytest.approx(number(name, step))) for step in (10, 20, 30, 40)], name
    for name in held_out:
        assert log.values[f"eval_{name}"] == [(step, pytest.approx(number(f"eval_{name}", step))) for step in (20, 40)]
    assert not log.notes


def test_trainer_state_of_trl_and_llama_factory(tmp_path):
    state = TrainerState(epoch=1.0, global_step=40, max_steps=40, log_history=rows())
    for step in (20, 40):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        state.log_history = [row for row in rows() if row["step"] <= step]
        state.save_to_json(str(folder / "trainer_state.json"))
    check(read_log(tmp_path / "checkpoint-40" / "trainer_state.json"))
    check(read_log(tmp_path / "checkpoint-40"))
    check(read_log(tmp_path))  # the newest checkpoint
    assert read_log(tmp_path).source.endswith("checkpoint-40/trainer_state.json")
    assert read_log(tmp_path / "checkpoint-20").last_step() == 20


def test_llama_factorys_trainer_log(tmp_path):
    """Its callback names steps and metrics in its own way, and leaves out what is None."""
    lines = []
    for row in rows():
        names = {
            "loss": "loss",
            "eval_loss": "eval_loss",
            "rewards/accuracies": "accuracy",
            "learning_rate": "lr",
            "epoch": "epoch",
        }
        line = {"current_steps": row["step"], "total_steps": 40} | {
            new: row[old] for old, new in names.items() if old in row
        }
        lines.append(line | {"percentage": 2.5 * row["step"], "elapsed_time": "0:00:31", "remaining_time": "0:01:02"})
    (tmp_path / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in (tmp_path, tmp_path / "trainer_log.jsonl"):
        check(read_log(path), ("loss", "learning_rate", "rewards/accuracies"), ("loss",))
        assert read_log(path).loss_type == "dpo"


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("step", ["step", "global_step", "train/global_step", "Step", "_step"])
def test_csv_with_a_header(tmp_path, step, delimiter):
    """As pandas and trackers export them: one row a log, empty cells where a metric was not logged."""
    prefixed = [{} for _ in rows()]
    for made, row in zip(prefixed, rows(), strict=True):
        for name, value in row.items():
            held = name.startswith("eval_")
            made[step if name == "step" else f"eval/{name[5:]}" if held else f"train/{name}"] = value
    path = tmp_path / "history.csv"
    with open(path, "w", newline="") as file:
        names = list(dict.fromkeys(name for row in prefixed for name in row))
        writer = csv.DictWriter(file, names, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(prefixed)
    check(read_log(path))


def test_tensorboards_events(tmp_path, monkeypatch):
    """As transformers' callback writes them: train/ and eval/ before the names."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "runs" / "now")) as writer:
        for row in rows():
            for name, value in row.items():
                if name != "step":
                    tag = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
                    writer.add_scalar(tag, value, row["step"])
    events = next((tmp_path / "runs" / "now").iterdir())
    for path in (tmp_path, tmp_path / "runs" / "now", events):
        check(read_log(path))
    real = builtins.__import__

    def without(name, *more):
        if name.startswith("tensorboard"):
            raise ModuleNotFoundError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "tpo-lib\[tensorboard\]"'):
        read_log(events)
    monkeypatch.undo()
    with SummaryWriter(str(tmp_path / "runs" / "before")) as writer:
        writer.add_scalar("train/loss", 1.0, 1)
    with pytest.raises(ValueError, match=r"holds several runs; name one of .*before.*now"):
        read_log(tmp_path)


def test_rows_alone_and_in_a_list(tmp_path):
    (tmp_path / "log.json").write_text(json.dumps(rows()))
    (tmp_path / "log.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows()) + '{"step": 50, "lo'
    )  # killed
    check(read_log(tmp_path / "log.json"))
    check(read_log(tmp_path / "log.jsonl"))
    check(log_of(rows()))


def test_a_run_of_ours(tmp_path):
    """Its folder says what it was trained with; a guide's folder, what that was."""
    pairs = [EncodedPair(i, [1, 2 + i], [5 + i, 6], [7, 8 + i]) for i in range(8)]
    start = frozen_copy(tiny.llama())
    guide = tiny.llama()
    more = {"epochs": 2, "eval_every": 1, "batch_size": 4}
    config = type(CONFIG)(**CONFIG.to_dict() | more | {"beta": 0.7, "output_dir": str(tmp_path / "guide")})
    fit(config, guide, start, pairs, progress=False)
    guide.name_or_path = guide.config._name_or_path = str(tmp_path / "guide" / "final")
    settings = {"loss_type": "tgdpo", "beta": 0.2, "guide_beta": 0.1, "output_dir": str(tmp_path / "run")}
    config = type(CONFIG)(**{k: v for k, v in CONFIG.to_dict().items() if k != "beta"} | more | settings)
    fit(config, tiny.llama(), start, pairs, eval_pairs=pairs, guide=guide, progress=False)
    log = read_log(tmp_path / "run")
    assert (log.loss_type, log.settings["beta"], log.settings["trained_beta"], log.guessed) == (
        "tgdpo",
        0.2,
        0.7,
        False,
    )
    (told,) = (finding.evidence for finding in examine(log)[0] if finding.rule == "guide-beta")
    assert told == "guide_beta is 0.1, the guide was trained with beta 0.7"
    assert {"learning_rate", "kl/chosen", "eval_kl/rejected", "guidance/floor_share"} <= set(log.values)
    assert len(log.values["loss"]) == 4
    assert read_log(tmp_path / "run" / "metrics.jsonl").settings == log.settings
    assert read_log(tmp_path / "run", beta=0.3, loss_type="sigmoid").settings | {"beta": 0.3} == log.settings | {
        "beta": 0.3,
        "loss_type": "dpo",
    }
    with pytest.raises(ValueError, match=r"holds several runs; name one of .*guide.*run"):
        read_log(tmp_path)
    for path in tmp_path.rglob("training.json"):
        path.unlink()
    log = read_log(tmp_path / "run")
    assert log.notes == ("no training.json beside it: settings are not known",)
    assert (log.loss_type, log.guessed) == ("tgdpo", True)


def test_what_was_logged_twice_is_said_and_the_last_counts():
    again = [{"step": step, "loss": 100.0 + step} for step in (30, 40, 50)]
    log = log_of([{"step": step, "loss": 1.0} for step in (10, 20, 30, 40)] + again)
    assert log.values["loss"] == [(10, 1.0), (20, 1.0), (30, 130.0), (40, 140.0), (50, 150.0)]
    assert log.notes == (
        "logged more than once (a run that was resumed?): step 2 steps from 30 to 40; the last value counts",
    )


def test_rows_without_steps_are_counted_and_said():
    log = log_of([{"loss": 1.0}, {"loss": 0.5}])
    assert log.values["loss"] == [(1, 1.0), (2, 0.5)]
    assert log.notes == ("2 rows name no step: they were counted",)


def test_values_that_are_not_finite_are_kept():
    """As Python's json, the DPO authors' code and our own loop write them."""
    log = log_of(
        [{"step": 1, "loss": math.nan}, {"step": 2, "loss": "inf", "grad_norm": None}, {"step": 3, "loss": "nan"}]
    )
    assert [str(value) for _, value in log.values["loss"]] == ["nan", "inf", "nan"]
    assert math.isnan(log.values["grad_norm"][0][1])


def test_the_names_of_the_dpo_authors():
    names = {
        "rewards_train/accuracies": "rewards/accuracies",
        "logps_eval/chosen": "eval_logps/chosen",
        "loss/train": "loss",
    }
    assert {name: canonical(name) for name in names} == names


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", "loss 1", r"a\.txt is none of the files that are read here: a run's folder"),
        ("a.json", "{", r"a\.json cannot be read as json"),
        ("a.json", '{"loss": 1}', r"a\.json holds no rows of metrics; expected"),
        ("a.json", '{"log_history": []}', r"a\.json holds no rows of metrics; expected"),
        ("a.jsonl", '{"loss": 1}\nno\n{"loss": 2}\n', r"a\.jsonl cannot be read as jsonl: line 2"),
        ("a.jsonl", '{"step": 1, "reward": 2}\n', r"holds neither loss nor rewards/chosen, but reward"),
        ("a.jsonl", '{"step": 1, "loss": "low"}\n', r"a\.jsonl, row 1: loss is 'low', which is no number"),
        ("a.csv", "step,loss\n", r"a\.csv holds no rows of metrics"),
        ("a.csv", "step,loss\n1,\n2,x\n", r"a\.csv, row 2: loss is 'x', which is no number"),
    ],
)  # fmt: skip
def test_what_is_no_log_is_named(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        read_log(tmp_path / name)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; name a run's folder"):
        read_log(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no run's numbers; name a run's folder"):
        read_log(tmp_path)
