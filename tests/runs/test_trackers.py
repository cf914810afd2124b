"""Trackers of the metrics: what they are told, that a resumed run goes on in the same one, and that unused they cost nothing."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from accelerate import tracking
from accelerate.utils import LoggerType
from test_train import CONFIG as BASE
from test_train import trained

from tpo_lib.cli import main
from tpo_lib.runs import trackers
from tpo_lib.runs.run import read_run

NAMES = ("wandb", "trackio")
CONFIG = replace(BASE, eval_every=1)  # callbacks come after every update


class Interrupted(RuntimeError):
    pass


def stop_at(step: int):
    def callback(now: int, policy) -> None:
        if now == step:
            raise Interrupted

    return callback


@pytest.fixture
def stand_in(monkeypatch):
    """`stand_in(name)` is a tracker's package of which nothing is installed; every run it began is {"given", "told", "rows"}."""

    def make(name: str) -> list[dict]:
        module, runs = ModuleType(name), []

        class Run:
            def __init__(self, given: dict) -> None:
                self.record = {"given": given, "told": {}, "rows": [], "finished": False}
                runs.append(self.record)

            def log(self, values: dict, step: int) -> None:
                self.record["rows"].append({"step": step} | values)

            def finish(self) -> None:
                self.record["finished"] = True

        class Config:
            @staticmethod
            def update(values: dict, allow_val_change: bool) -> None:
                runs[-1]["told"] |= values

        module.init, module.config = lambda **given: Run(given), Config
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(tracking, "_available_trackers", [LoggerType(name)])
        return runs

    return make


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_is_told_settings_and_every_row(name, stand_in, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    runs = stand_in(name)
    config = replace(
        CONFIG, loss_type="tdpo2", alpha=0.3, report_to=name, output_dir=str(tmp_path / "pocket" / "tdpo2")
    )
    result = trained(config)
    (run,) = runs
    assert run["given"]["project"] == "tpo-lib"
    assert run["given"]["name"].startswith("pocket/tdpo2")
    assert (run["told"]["alpha"], run["told"]["loss_type"], run["told"]["lr"]) == (0.3, "tdpo2", 1e-2)
    assert run["rows"] == result.metrics
    assert len(run["rows"]) == 2
    assert run["finished"]


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_goes_on_in_the_same_run(name, stand_in, tmp_path):
    runs, config = stand_in(name), replace(CONFIG, epochs=3, report_to=name, output_dir=str(tmp_path / "run"))
    with pytest.raises(Interrupted):
        trained(config, callbacks=[stop_at(3)])
    result = trained(config, resume=True)
    before, after = runs
    assert before["given"] == after["given"]
    assert before["given"]["resume"] == "allow"
    assert before["finished"]
    assert before["rows"] + after["rows"] == result.metrics
    assert [row["step"] for row in after["rows"]] == [4, 5, 6]
    other = replace(config, output_dir=str(tmp_path / "other" / "run"))
    trained(other)
    key = "id" if name == "wandb" else "name"
    assert runs[2]["given"][key] != before["given"][key]  # another training run is another there, too


def test_a_tracker_that_comes_later_is_told_what_there_was(stand_in, tmp_path):
    config = replace(CONFIG, epochs=3, output_dir=str(tmp_path / "run"))
    with pytest.raises(Interrupted):
        trained(config, callbacks=[stop_at(3)])
    runs = stand_in("wandb")
    result = trained(replace(config, report_to="wandb"), resume=True)
    assert runs[0]["rows"] == result.metrics
    assert runs[0]["given"]["id"] == read_run(tmp_path / "run").start["wandb run"]


def test_a_tracker_without_a_folder(stand_in):
    runs = stand_in("wandb")
    result = trained(replace(CONFIG, report_to="wandb"))
    assert runs[0]["rows"] == result.metrics
    assert runs[0]["given"]["name"] == "dpo"
    tracking._available_trackers.append(LoggerType("tensorboard"))
    with pytest.raises(ValueError, match="'tensorboard' writes its events below output_dir"):
        trained(replace(CONFIG, report_to="tensorboard"))


def test_what_hinders_a_tracker_is_what_is_raised(stand_in):
    stand_in("wandb")

    def refused(**given):
        raise OSError("no API key configured")

    sys.modules["wandb"].init = refused
    with pytest.raises(OSError, match="no API key"):
        trained(replace(CONFIG, report_to="wandb"))


@pytest.mark.parametrize("name", ["tensorboard", *NAMES])
def test_a_missing_package_is_named_before_anything_is_loaded(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--output-dir", str(tmp_path / "run"), "--report-to", name, "--pairs", "nowhere.jsonl"])
    assert stopped.value.code == 2
    needed = f'--report-to {name} needs its package: pip install "tpo-lib[{name}]"'
    assert needed in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(ModuleNotFoundError, match=name):
        trained(replace(CONFIG, report_to=name, output_dir=str(tmp_path / "run")))


def test_unused_they_cost_nothing():
    code = "import sys, tpo_lib.cli, tpo_lib.runs.run; print({'wandb', 'trackio', 'tensorboard'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_events_of_a_killed_and_resumed_run_stand_in_tensorboard_once(tmp_path):
    pytest.importorskip("tensorboard", reason="extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(CONFIG, epochs=3, save_every=2, report_to="tensorboard", output_dir=str(tmp_path / "run"))
    with pytest.raises(Interrupted):
        trained(config, callbacks=[stop_at(3)])
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000003")  # as a kill leaves it: a row past the checkpoint
    result = trained(config, resume=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Scalars("loss")
    assert [event.step for event in events] == [row["step"] for row in result.metrics] == [1, 2, 3, 4, 5, 6]
    assert [e.value for e in events] == pytest.approx([row["loss"] for row in result.metrics], rel=1e-5)


def test_wandb_itself(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    config = replace(CONFIG, epochs=3, report_to="wandb", output_dir=str(tmp_path / "run"))
    with pytest.raises(Interrupted):
        trained(config, callbacks=[stop_at(3)])
    result = trained(config, resume=True)
    run = read_run(tmp_path / "run").start["wandb run"]
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run}*/*.wandb"))
    assert len(files) == 2  # one id: they become one run when they are sent
    rows = [row for file in files for row in _wandb_rows(file)]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in result.metrics])
    assert [row["_step"] for row in rows] == [row["step"] for row in result.metrics]


def _wandb_rows(file: Path) -> list[dict]:
    """The history in a wandb file: a head of 7 bytes, then blocks of 32 KiB of records, each (checksum, length, kind) first."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:  # no room for a record's head: filled up
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record, at = record + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            found, record = Record.FromString(record), b""
            items = found.history.item if found.HasField("history") else ()
            rows += [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}] if items else []
    return rows


def test_trackio_itself(tmp_path):
    pytest.importorskip("trackio", reason="extra trackio is not installed")
    code = f"""
import pytest
from test_trackers import CONFIG, Interrupted, replace, stop_at, trained

config = replace(CONFIG, epochs=3, report_to="trackio", output_dir={str(tmp_path / "run")!r})
with pytest.raises(Interrupted):
    trained(config, callbacks=[stop_at(3)])
result = trained(config, resume=True)
from trackio.sqlite_storage import SQLiteStorage

(run,) = SQLiteStorage.get_runs("tpo-lib")
kept, made = SQLiteStorage.get_logs("tpo-lib", run), result.metrics
assert [row["step"] for row in kept] == [row["step"] for row in made] == [1, 2, 3, 4, 5, 6], kept
assert [row["loss"] for row in kept] == pytest.approx([row["loss"] for row in made])
"""
    # its folder is read from the environment when it is imported
    here = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    own = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": here}
    done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
