"""`doctor LOG --objective`: the bugs of chapter 7 that lie in a loss are named, what is right passes."""

from __future__ import annotations

import json

import pytest
from test_doctor import status, write

from tpo_lib import losses
from tpo_lib.losses import OBJECTIVES

HEAD = """
import torch.nn.functional as F
from tpo_lib import losses
from tpo_lib.types import LossOutput

def pairwise(chosen, rejected):
    return LossOutput(-F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach())

def ratio(s):
    return s.logps - s.ref_logps
"""
BUGS = {  # number of BUGS: what it is meant to be, the function, what is said and where it is read about
    1: (
        "dpo",
        "def f(w, l, *, beta=0.1): return pairwise(*(beta * ratio(s).sum(-1) / s.mask.sum(-1) for s in (w, l)))",
        "a mean over the tokens stands for the sum (",
        "Run C",
    ),
    7: (
        "tdpo2",
        "def f(w, l, *, beta=0.1, alpha=0.5): return pairwise(*(beta * (ratio(s) + alpha * s.kl).sum(-1) for s in (w, l)))",
        "the gradient in KL of the chosen response -0.02864 for 0",
        "Run F",
    ),
    8: (
        "dpo",
        "def f(w, l, *, beta=0.1): return losses.dpo(w, l, beta=1 / beta)",
        "beta divides where it multiplies",
        "Run B",
    ),
    10: (
        "tdpo1",
        "def f(w, l, *, beta=0.1): return losses.tdpo1(l, w, beta=beta)",
        "chosen and rejected have changed places",
        "Run H",
    ),
    11: (
        "tgdpo",
        "def f(w, l, *, beta=0.1, guide_beta=1.0): return losses.tgdpo(w, l, beta=beta, alpha=0.5, guide_beta=beta)",
        "guide_beta is the run's own beta",
        "Run G",
    ),
    None: (
        "dpo",
        "def f(w, l, *, beta=0.1): return losses.dpo(w, l, beta=1.1 * beta)",
        "the gradient in log π of",
        "2. Loud bugs",
    ),
}


def asked(tmp_path, capsys, meant: str, source: str) -> tuple[int, dict]:
    """Status and finding of the command."""
    (tmp_path / "mine.py").write_text(HEAD + source)
    log = write(tmp_path / "log.jsonl")
    capsys.readouterr()
    code = status(log, "--loss-type", meant, "--objective", f"{tmp_path}/mine.py:f", "--json")
    (found,) = [each for each in json.loads(capsys.readouterr().out)["findings"] if each["rule"] == "objective"]
    return code, found


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_a_loss_is_named(tmp_path, capsys, bug):
    meant, source, said, section = BUGS[bug]
    code, found = asked(tmp_path, capsys, meant, source)
    assert (code, found["severity"]) == (1, "wrong")
    assert said in found["evidence"]
    assert found["chapter"] == f"07_break_it.ipynb: {section}"


@pytest.mark.parametrize("meant", OBJECTIVES)
def test_a_loss_that_is_right_passes(tmp_path, capsys, meant):
    entry = OBJECTIVES[meant]  # of a loss of one's own all keywords are numbers
    keywords = {name: h.default or 0.7 for name, h in entry.hyperparameters.items() if not isinstance(h.default, str)}
    given = ", ".join(f"{name}={value}" for name, value in keywords.items())
    passed = ", ".join(f"{name}={name}" for name in keywords)
    head = f"def f(w, l{', *, ' if keywords else ''}{given})"
    code, found = asked(tmp_path, capsys, meant, f"{head}: return losses.{entry.fn.__name__}(w, l, {passed})")
    assert (code, found["severity"]) == (0, "normal"), found
    assert entry.fn is getattr(losses, entry.fn.__name__)
    assert "loss, rewards and gradients agree" in found["evidence"]


def test_what_it_is_meant_to_be_has_to_be_said(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(HEAD + BUGS[1][1])
    assert status(write(tmp_path / "log.jsonl"), "--objective", f"{tmp_path}/mine.py:f") == 2
    assert "say with --loss-type which of sft, " in capsys.readouterr().err
