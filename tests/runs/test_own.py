"""Objectives and rewards from files of one's own: trained, recorded, resumed and evaluated; every refusal says what to do."""

from __future__ import annotations

import functools
import json
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from tpo_lib import cli, train
from tpo_lib.config import TrainConfig
from tpo_lib.losses import OBJECTIVES
from tpo_lib.rewards import scores_of
from tpo_lib.runs import own
from tpo_lib.runs.plots import style_of
from tpo_lib.runs.run import fit, read_run
from tpo_lib.types import LossOutput

OBJECTIVE = """
from tpo_lib.losses import LossOutput

def hinge(chosen, rejected, *, tau=0.5):
    '''Raise the margin up to one, and no further.'''
    w, l = ((side.logps - side.ref_logps).sum(-1) * tau for side in (chosen, rejected))
    return LossOutput((1 - (w - l)).clamp_min(0), w.detach(), l.detach())
"""
REWARD = """
def score(texts):
    return [text.count("good") / 10 for text in texts]
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A function that writes a file, and OBJECTIVES put back at the end."""
    monkeypatch.setattr("tpo_lib.losses.OBJECTIVES", OBJECTIVES)
    before = dict(OBJECTIVES)

    def write(text: str, name: str = "mine.py") -> str:
        (tmp_path / name).write_text(textwrap.dedent(text))
        return str(tmp_path / name)

    yield write
    OBJECTIVES.clear()
    OBJECTIVES.update(before)


def trained(folder: Path, **more):
    config = TrainConfig(
        loss_type="mine.py:hinge", batch_size=4, epochs=2, device="cpu", output_dir=str(folder), **more
    )
    resume = (folder / "checkpoints").exists()
    return fit(config, tiny.llama(), tiny.llama(), tiny.pairs(8), progress=False, resume=resume)


def test_a_functions_record_is_made_from_it(written):
    assert own.load_objective(written(OBJECTIVE) + ":hinge") == "mine.py:hinge"
    record = OBJECTIVES["mine.py:hinge"]
    assert (record.needs, record.hyperparameters["tau"].default) == (("ref_logps",), 0.5)
    assert record.words == "Raise the margin up to one, and no further."
    assert style_of("mine.py:hinge").label == "mine.py:hinge"
    assert TrainConfig(loss_type="mine.py:hinge", tau=0.1).hyperparameters() == {"tau": 0.1}
    own.load_objective(written(OBJECTIVE.replace("0.5", "0.7")) + ":hinge")  # changed since
    assert OBJECTIVES["mine.py:hinge"].hyperparameters["tau"].default == 0.7


def test_a_record_is_taken_as_it_is(written):
    text = OBJECTIVE + "\nfrom tpo_lib.losses import Hyperparameter, Objective\n"
    text += (
        "ours = Objective(hinge, ('ref_logps',), {'tau': Hyperparameter(0.2, 'τ', 'slope', above=0)}, label='Hinge')"
    )
    assert own.load_objective(written(text) + ":ours") == "mine.py:ours"
    assert style_of("mine.py:ours").label == "Hinge"
    with pytest.raises(ValueError, match=r"tau=0 must be greater than 0"):
        TrainConfig(loss_type="mine.py:ours", tau=0)


def test_a_run_records_the_file_resumes_with_it_and_is_read_with_it_alone(written, tmp_path):
    file, folder = written(OBJECTIVE), tmp_path / "run"
    own.load_objective(f"{file}:hinge")
    assert trained(folder, max_steps=2).steps == 2
    record = read_run(folder)
    assert record.config.hyperparameters() == {"tau": 0.5}
    assert record.start["objective"]["name"] == "mine.py:hinge"
    own.check_unchanged("mine.py:hinge", record.start["objective"])
    assert trained(folder, max_steps=2).steps == 2
    own.load_objective(written(OBJECTIVE + "\n# another one") + ":hinge")
    with pytest.raises(RuntimeError, match=r"objective.*mine\.py:hinge \(sha256"):
        trained(folder, max_steps=2)
    with pytest.raises(ValueError, match=r"mine\.py:hinge has changed since the run was trained.*bring that file back"):
        own.check_unchanged("mine.py:hinge", record.start["objective"])
    del OBJECTIVES["mine.py:hinge"]
    with pytest.raises(ValueError, match=r"'mine\.py:hinge' is unknown.*--loss-type FOLDER/mine\.py:hinge"):
        read_run(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(chosen): pass", r"f raised TypeError: .*takes 1 positional argument but 2 were given"),
        (
            "def f(chosen, rejected, beta): pass",
            r"f raised TypeError: .*missing 1 required positional argument: 'beta'",
        ),
        (
            "def f(chosen, rejected, *, beta=None, shaping='linear'): pass",
            r"the default of shaping='linear' must be a number",
        ),
        ("def f(chosen, rejected):\n    return chosen.logps.nosuch", r"f raised AttributeError in line 2: 'Tensor'"),
        ("def f(chosen, rejected):\n    return chosen.logps.sum(-1)", r"f returned a Tensor, not a LossOutput"),
        (
            "from tpo_lib.losses import LossOutput\n"
            "def f(c, r): return LossOutput(c.logps.mean(), c.logps.sum(-1), r.logps.sum(-1))",
            r"f gave loss as shape \(\) for 2 pairs; it must be one number a pair, \(2,\), without a mean",
        ),
        (
            "from tpo_lib.losses import LossOutput\n"
            "def f(c, r): return LossOutput(c.logps.sum(-1), c.logps.sum(-1), r.logps.sum(-1))",
            "f: detach the rewards",
        ),
        (
            "from tpo_lib.losses import LossOutput\n"
            "def f(c, r):\n  x = c.logps.sum(-1).detach()\n  return LossOutput(x, x, x)",
            "f: no gradient reaches logps",
        ),
        ("f = 3", "f is a int, neither a function"),
        ("g = 3", r"mine\.py has no 'f'; it has g"),
        ("import nosuchmodule", r"mine\.py fails when it is executed: ModuleNotFoundError in line 1"),
        ("def f(:", r"mine\.py fails when it is executed: SyntaxError in line 1"),
        ("raise SystemExit(0)", r"mine\.py fails when it is executed: SystemExit in line 1"),
    ],
)
def test_what_is_no_objective_is_refused_with_the_reason(written, text, message):
    with pytest.raises(ValueError, match=message):
        own.load_objective(written(text) + ":f")
    assert not any(".py:" in name for name in OBJECTIVES)


def test_what_fails_later_names_the_file_and_the_line(written):
    own.load_objective(written(OBJECTIVE.replace("    w, l", "    assert len(chosen.mask) == 2\n    w, l")) + ":hinge")
    with pytest.raises(ValueError, match=r"mine\.py:hinge raised AssertionError in line 6"):
        fit(
            TrainConfig(loss_type="mine.py:hinge", batch_size=4),
            tiny.llama(),
            tiny.llama(),
            tiny.pairs(8),
            progress=False,
        )


def test_a_reward_of_ones_own_scores(written, tmp_path):
    spec = written(REWARD) + ":score"
    reward = own.scorer(spec, torch.device("cpu"))
    assert (reward.name, reward.scope) == ("mine.py:score", "response")
    assert scores_of(reward, ["good good", "bad"]).tolist() == pytest.approx([0.2, 0.0])
    assert reward.fingerprint != own.scorer(written(REWARD + "\n") + ":score", "cpu").fingerprint
    for text, message in (
        ("def score(texts): return 1.0", r"'mine\.py:score' returned shape \(\) for 2 texts"),
        ("def score(): return 1.0", r"mine\.py:score raised TypeError"),
        ("def score(texts): return [float('nan')] * len(texts)", "every score must be finite"),
        ("score = 'good'", "is a str, not a function texts -> scores"),
    ):
        with pytest.raises(ValueError, match=message):
            own.scorer(written(text) + ":score", "cpu")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.py"):
        own.scorer(str(tmp_path / "none.py:score"), "cpu")


def test_both_from_the_command_line(written, small_stage, tmp_path, capsys):
    """Pairs by one's own reward, one's own objective with its flag, and an evaluation that needs its file."""
    reward, objective = written(REWARD, "rewarded.py") + ":score", written(OBJECTIVE) + ":hinge"
    pairs, run = str(tmp_path / "pairs.jsonl"), str(tmp_path / "run")
    few = ["--num-prompts", "12", "--max-new-tokens", "12", "--device", "cpu", "--cache-dir", str(tmp_path / "cache")]
    cli.main(["pairs", "--reward", reward, "--output", pairs, *few])
    assert "rewarded.py:score" in capsys.readouterr().out
    settings = ["--loss-type", objective, "--tau", "0.2", "--max-steps", "2", "--batch-size", "4", "--device", "cpu"]
    cli.main(["train", "--pairs", pairs, "--output-dir", run, *settings])
    assert json.loads((Path(run) / "final" / "training.json").read_text())["tau"] == 0.2
    capsys.readouterr()
    del OBJECTIVES["mine.py:hinge"]
    measure = ["evaluate", run, "--reward", reward, "--judge", reward, "--pairs", pairs, *few]
    with pytest.raises(SystemExit):
        cli.main(measure)
    assert "--loss-type FOLDER/mine.py:hinge" in capsys.readouterr().err
    cli.main([*measure, "--loss-type", objective])
    said = capsys.readouterr().out
    assert "mine.py:hinge's implicit reward, as trained" in said
    assert "it is the reward once more" in said
    with pytest.raises(SystemExit):
        cli.main(["train", "--pairs", pairs, "--output-dir", run, "--loss-type", "nosuch.py:hinge"])
    assert "there is no file nosuch.py" in capsys.readouterr().err


def test_it_takes_part_in_a_comparison(written, tmp_path, monkeypatch):
    seen = []

    def run(config, folder, fresh, fast):
        seen.append(config)
        return {"wall_time_s": 1.0}

    monkeypatch.setattr("tpo_lib.runs.compare.run", run)
    monkeypatch.setattr("tpo_lib.runs.report.summary_table", lambda summary: "table")
    cli.main(["run", "--quick", "--runs", str(tmp_path), "--objectives", "dpo", written(OBJECTIVE) + ":hinge"])
    assert [config.loss_type for config in seen[0].objectives] == ["dpo", "mine.py:hinge"]


SCALE = 1.0  # what `written_dpo` names


def log_ratio(side):
    return (side.logps - side.ref_logps).sum(-1) * SCALE


def written_dpo(chosen, rejected, beta):
    won, lost = beta * log_ratio(chosen), beta * log_ratio(rejected)
    return LossOutput(-torch.nn.functional.logsigmoid(won - lost), won.detach(), lost.detach())


def swapped(chosen, rejected, beta):
    return written_dpo(rejected, chosen, beta)


def by_loss(loss, *, loop=fit, **more):
    """Three updates with a loss that is handed over."""
    settings = {"batch_size": 4, "epochs": 2, "max_steps": 3, "lr": 1e-2, "warmup_steps": 0, "device": "cpu"}
    config = TrainConfig(loss_type="dpo", **settings, **more)
    resume = {"resume": True} if (Path(more.get("output_dir", "none")) / "checkpoints").exists() else {}
    return loop(config, tiny.llama(), tiny.llama(), tiny.pairs(8), loss=loss, progress=False, **resume)


@pytest.mark.parametrize("loop", [train.fit, fit], ids=["the loop", "the fast path"])
def test_a_loss_that_is_handed_over_is_the_one_that_trains(loop):
    library, mine, other = ([*by_loss(loss, loop=loop).policy.parameters()] for loss in (None, written_dpo, swapped))
    for a, b, c in zip(library, mine, other, strict=True):
        assert torch.allclose(a, b, atol=1e-5)  # the same mathematics in other words
        assert not torch.allclose(a, c, atol=1e-3)


def test_a_run_records_the_loss_and_goes_on_with_it_alone(tmp_path, monkeypatch):
    folder = str(tmp_path / "run")
    by_loss(written_dpo, output_dir=folder)
    recorded = read_run(folder).start["objective"]
    assert recorded == own.described(written_dpo)
    assert recorded["name"] == "written_dpo"
    assert by_loss(written_dpo, output_dir=folder).steps == 3
    for loss, words in ((swapped, "swapped"), (None, "the library's dpo")):
        with pytest.raises(RuntimeError, match=rf"objective was written_dpo \(sha256 \w+\), is {words} \(sha256"):
            by_loss(loss, output_dir=folder)
    with pytest.raises(ValueError, match=r"trained with a loss given in Python, written_dpo \(sha256"):
        own.check_unchanged("dpo", recorded)
    monkeypatch.setitem(globals(), "SCALE", 2.0)  # a number that a function named by it names
    assert own.described(written_dpo) != recorded
    by_loss(None, output_dir=str(tmp_path / "plain"))
    with pytest.raises(RuntimeError, match=r"objective was the library's dpo .*, is written_dpo"):
        by_loss(written_dpo, output_dir=str(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda chosen, rejected, beta: chosen.logps.sum(-1), "<lambda> returned a Tensor, not a LossOutput"),
        (
            lambda chosen, rejected, beta: LossOutput(chosen.logps.sum(), torch.zeros(2), torch.zeros(2)),
            r"gave loss as shape \(\) for 2 pairs",
        ),
        (
            lambda chosen, rejected, beta: LossOutput(
                (chosen.kl * chosen.logps).sum(-1), torch.zeros(2), torch.zeros(2)
            ),
            "<lambda> reads kl, which is None here: dpo has logps, ref_logps; choose another loss_type",
        ),
        (
            lambda chosen, rejected, *, delta=1.0: None,
            r"cannot be called as \(chosen, rejected, beta=0\.1\), got an unexpected keyword argument 'beta': it is given the",
        ),
    ],
)
def test_what_is_no_loss_is_refused_before_the_first_update(loss, message):
    with pytest.raises(ValueError, match=message):
        by_loss(loss)


def test_a_loss_without_a_source_trains_in_memory_and_in_no_folder(tmp_path):
    loss = functools.partial(written_dpo)
    assert by_loss(loss).steps == 3
    with pytest.raises(ValueError, match=r"records its loss by its source, and partial has none: write it with def"):
        by_loss(loss, output_dir=str(tmp_path / "run"))


def test_a_loss_that_is_not_finite_stops_before_the_update():
    def falls(chosen, rejected, beta):
        output = written_dpo(chosen, rejected, beta)
        far = chosen.logps.sum(-1) < -10  # true of these pairs, and not of the trial's three tokens
        return replace(output, loss=torch.where(far, torch.nan, output.loss))

    with pytest.raises(train.NonFiniteLoss, match=r"step 1: non-finite loss in rows \["):
        by_loss(falls)
