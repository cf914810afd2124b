"""The rules: each on a log made for it, all of them on runs that were made once, and their words beside the course's."""

from __future__ import annotations

import math
import re
from pathlib import Path

import logged
import make_doctor_logs
import nbformat
import numpy as np
import pytest

from tpo_lib.tools.doctor.logs import guess, log_of
from tpo_lib.tools.doctor.rules import RULES, SEVERITIES, examine

ROOT = Path(__file__).parents[2]
STEPS = 30


def healthy(**changes) -> tuple[list[dict], dict]:
    """A run of DPO as it should be: both rewards fall, the margin grows; five evaluations. `changes` are columns or settings."""
    draw = np.random.default_rng(0)
    t = np.arange(STEPS) / (STEPS - 1)
    train = {"step": np.arange(1, STEPS + 1), "grad_norm": 2 - t, "learning_rate": np.full(STEPS, 1e-6)}
    noise = draw.normal(size=(3, STEPS)) * 0.01 * (t > 0)
    train |= _numbers(t, noise, -80 + draw.normal(size=STEPS))
    held = {"step": np.array([0, 10, 20, 25, 30])}
    held |= {
        f"eval_{name}": v for name, v in _numbers(held["step"] / 30 * 0.9, np.zeros((3, 5)), np.full(5, -80.0)).items()
    }
    settings = {"loss_type": "dpo", "beta": 0.1}
    for name, value in changes.items():
        name = name.replace("__", "/")
        if name in ("loss_type", "beta", "gamma", "guide_beta", "trained_beta"):
            settings[name] = value
        else:
            part = held if name.startswith("eval_") else train
            given = np.asarray(value(part) if callable(value) else value, dtype=float)
            part[name] = np.broadcast_to(given, part["step"].shape)
    rows = [
        dict(zip(part, map(float, row), strict=True))
        for part in (train, held)
        for row in zip(*part.values(), strict=True)
    ]
    return rows, {name: value for name, value in settings.items() if value is not None}


def _numbers(t, noise, base) -> dict:
    chosen, rejected = -0.4 * t + noise[0], -1.2 * t + noise[1]
    found = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
    found["rewards/accuracies"] = np.where(t > 0, 0.5 + 0.3 * t, 0.0)
    found["loss"] = np.logaddexp(0.0, rejected - chosen) + 0.05 * t + abs(noise[2])
    return found | {"logps/chosen": base + chosen / 0.1, "logps/rejected": base - 4 + rejected / 0.1}


def found(**changes) -> dict[str, str]:
    """{rule: severity} of a healthy run with these changes."""
    rows, settings = healthy(**changes)
    return {finding.rule: finding.severity for finding in examine(log_of(rows, **settings))[0]}


def spike(part, size=1.0, at=20):
    return part["loss"] + size * (np.arange(STEPS) == at)


def late(low, high):
    """A column that goes from one value to another, by thirds."""
    return np.repeat([low, (low + high) / 2, high], 10)


def fall(first, last):
    """The same of the five evaluations, in a straight line."""
    return np.linspace(first, last, 5)


CASES = [  # rule, its severity, what makes it speak
    ("not-finite", "wrong", {"loss": lambda part: np.where(part["step"] > 20, math.nan, part["loss"])}),
    ("not-finite", "wrong", {"eval_rewards__chosen": math.inf}),
    ("not-finite", "look", {"grad_norm": lambda part: np.where(part["step"] == 3, math.inf, 1.0)}),
    ("nothing-scored", "wrong", {"logps__chosen": 0, "logps__rejected": 0}),
    ("no-gradient", "wrong", {"grad_norm": 0}),
    ("reference-moves", "wrong", {"rewards__chosen": 0, "rewards__rejected": 0, "loss": 0.6931}),
    ("reference-moves", "wrong", {"eval_rewards__chosen": [0, -0.1, 0, 0, 0], "eval_rewards__rejected": [0, -0.2, 0, 0, 0]}),
    ("start-not-zero", "wrong", {"rewards__chosen": lambda part: part["rewards/chosen"] + 0.1}),
    ("start-not-zero", "look", {"rewards__chosen": lambda part: part["rewards/chosen"] + 0.02}),
    ("first-loss", "wrong", {"loss": lambda part: 0.1 * part["loss"]}),
    ("first-loss", "look", {"loss": lambda part: 4 * part["loss"], "loss_type": None}),
    ("first-loss", "wrong", {"loss_type": "ipo"}),
    ("loss-not-of-margins", "wrong", {"loss": lambda part: np.where(part["step"] > 5, 0.1, part["loss"])}),
    ("loss-not-of-margins", "wrong", {"loss": late(1.0, 0.3), "loss_type": "simpo", "gamma": 1}),
    ("swapped-sides", "wrong", {"eval_logps__chosen": fall(-80, -92), "eval_logps__rejected": fall(-84, -87.6)}),
    ("other-beta", "wrong", {"beta": 1.5}),
    ("other-beta", "wrong", {"beta": 0.01}),
    ("other-beta", "wrong", {"eval_rewards__chosen": [0.0, 0.3, -0.2, 0.4, 0.0]}),
    ("other-beta", "look", {"eval_logps__rejected": fall(-84, -600), "beta": None}),
    ("below-half", "wrong", {"rewards__accuracies": late(0.4, 0.2), "rewards__chosen": late(-1, -2)}),
    (
        "below-half", "wrong",
        {"eval_rewards__accuracies": 0.3, "eval_rewards__chosen": fall(0, -1.4), "eval_logps__chosen": fall(-80, -94)},
    ),
    ("loss-grows", "wrong", {"loss": lambda part: late(0.7, 0.9) + 0.001 * part["step"]}),
    ("loss-grows", "wrong", {"loss": lambda part: late(2.0, 2.6) + 0.001 * part["step"], "loss_type": "sft"}),
    ("rate-too-high", "wrong", {"loss": lambda part: spike(part, 4.0)}),
    ("rate-too-high", "wrong", {"eval_kl__chosen": [0, 30, 28, 20, 20], "eval_kl__rejected": [0, 30, 28, 20, 20]}),
    ("floor", "wrong", {"guidance__floor_share": 0.2, "loss_type": "tgdpo"}),
    ("floor", "look", {"guidance__floor_share": 0.05, "loss_type": "tgdpo"}),
    ("guide-beta", "wrong", {"loss_type": "tgdpo", "guide_beta": 0.1, "trained_beta": 1.0}),
    ("gradients", "look", {"grad_norm": late(1, 20)}),
    ("gradients", "look", {"grad_norm": late(1, 0.001)}),
    ("stuck", "look", {"loss": 0.6925, "rewards__chosen": 1e-4, "rewards__rejected": -1e-4}),
    ("chosen-kl", "look", {"kl__chosen": late(1, 5), "kl__rejected": late(1, 3), "loss_type": "tdpo2"}),
    ("margins-alone", "look", {"rewards__accuracies": 0.51}),
    ("not-held-out", "look", {"rewards__accuracies": late(0.6, 0.95), "eval_rewards__accuracies": 0.5}),
    ("not-held-out", "look", {"eval_loss": [0.69, 0.65, 0.66, 0.7, 0.72]}),
    (
        "kl-drift", "look",
        {"eval_rewards__chosen": [0, -0.3, -0.7, -1.5, -2.5], "eval_rewards__rejected": [0, -0.6, -1.2, -1.9, -2.8]},
    ),
    ("kl-drift", "look", {"kl__chosen": late(10, 80), "kl__rejected": late(10, 80)}),
    ("too-good", "look", {"loss": late(0.5, 0.001), "rewards__accuracies": late(0.6, 1.0)}),
    ("lengths-grow", "look", {"completions__mean_length": late(50, 90)}),
    ("both-fall", "normal", {}),
    ("no-reference", "normal", {"loss_type": "simpo"}),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "severity", "changes"), CASES, ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)])
def test_a_rule_speaks_where_it_should(rule, severity, changes):
    assert found(**changes)[rule] == severity


def test_every_rule_is_made_to_speak_and_a_healthy_run_is_silent():
    assert {case[0] for case in CASES} == {rule.name for rule in RULES}
    assert found() == {"both-fall": "normal"}
    assert found(loss_type=None, beta=None) == {"both-fall": "normal"}


def test_what_could_not_be_checked_says_what_to_log():
    rows, _ = healthy()
    few = [{"step": row["step"], "loss": row["loss"], "rewards/chosen": row["rewards/chosen"]} for row in rows[5:STEPS]]
    findings, unseen = examine(log_of(few, loss_type="dpo"))
    titles = {rule.title: rule.name for rule in RULES}
    missing = {titles[title]: what for title, what in unseen.items()}
    assert missing["start-not-zero"] == "rewards/rejected"
    assert missing["other-beta"].startswith("at least three evaluations on held-out pairs with rewards/* and logps/*")
    assert "held-out" in missing["not-held-out"]
    assert not findings
    rows, _ = healthy()
    _, unseen = examine(log_of([row for row in rows if row["step"] > 1], loss_type="dpo"))
    missing = {titles[title]: what for title, what in unseen.items()}
    assert "logging_first_step" in missing["first-loss"]
    assert missing["other-beta"] == "beta: add --beta (by these numbers it is 0.1)"


def test_a_loss_at_log_2_says_what_it_is_where_nothing_else_is_logged():
    """An SFT loss would not begin there; and it stays, which needs no reward to be seen."""
    log = log_of([{"step": step, "loss": 0.6931} for step in range(1, 40)])
    assert log.guessed
    assert log.loss_type == "dpo"
    findings, unseen = examine(log)
    assert [(finding.rule, finding.evidence) for finding in findings] == [("stuck", "loss 0.6931 in the last third")]
    assert any("rewards/chosen" in what for what in unseen.values())
    assert log_of([{"step": step, "loss": 3.2 - 0.01 * step} for step in range(1, 40)]).loss_type == "sft"


@pytest.mark.parametrize("kind", ["tdpo2", "H"])
def test_the_stored_runs_can_be_made_again(kind):
    (stored,) = (run for run in logged.runs() if (run["kind"], run["seed"], run["model"]) == (kind, 0, "small"))
    made = make_doctor_logs.compact(*make_doctor_logs.rows_of(kind, 0, "small"), kind, 0, "small")
    assert made["settings"] == stored["settings"]
    for part in ("train", "eval"):
        assert made[part].keys() == stored[part].keys()
        for name, values in stored[part].items():
            assert made[part][name] == pytest.approx(values, rel=0.02, abs=0.02), name


@pytest.mark.parametrize("objective", logged.HEALTHY)
def test_the_objective_is_guessed_or_its_family_is(objective):
    family = {"tdpo1": "dpo", "tdpo2": "dpo", "tgdpo": "dpo"}
    mine = [run for run in logged.runs() if run["kind"] == objective]
    guessed = [guess(logged.as_log(run, "trl")) for run in mine]
    assert guessed.count(family.get(objective, objective)) >= 0.8 * len(mine) > 20


@pytest.mark.parametrize("objective", logged.HEALTHY)
def test_healthy_runs_pass(objective):
    mine = [run for run in logged.runs() if run["kind"] == objective]
    assert sum(run["model"] == "small" for run in mine) >= 30
    for run in mine:
        for view in logged.VIEWS:
            log = logged.as_log(run, view)
            assert not [finding for finding in examine(log)[0] if finding.severity == "wrong"], log.source


def test_the_bundled_runs_pass_but_for_two_of_a_beta_beyond_use():
    """Of the pocket model, over alpha and beta; the rules were not developed on them."""
    alarms = {log.source: f.rule for log in logged.bundled() for f in examine(log)[0] if f.severity == "wrong"}
    assert len(logged.bundled()) == 39
    # at these betas a wrong pair costs tens of nats: the loss has a spike of 3.28 and 5.44 at the sweep's one rate for all
    assert alarms == {"dpo 5.0 0.0": "rate-too-high", "dpo 10.0 0.0": "rate-too-high"}


# run of chapter 7 -> {view: the rule that names it, and in what share of the runs at least}. What finds the others stands in
# `logged.INSTEAD`: in a log nothing shows E, F, I and J (bugs 3, 7, 4, 2), K (9) before it strikes, and G (11) but in its folder.
SHOWN = {
    "A": {"ours": ("reference-moves", 1.0), "trl": ("reference-moves", 1.0), "bare": ("reference-moves", 1.0)},
    "B": {"ours": ("other-beta", 0.8), "trl": ("loss-grows", 0.8), "bare": ("loss-grows", 0.8)},
    "B outside": {
        "ours": ("first-loss", 1.0),
        "trl": ("loss-not-of-margins", 1.0),
        "bare": ("loss-not-of-margins", 1.0),
    },
    "C": {"ours": ("other-beta", 0.9), "trl": ("other-beta", 0.7)},
    "D": {"ours": ("start-not-zero", 1.0)},
    "H": {"ours": ("swapped-sides", 1.0), "trl": ("swapped-sides", 0.8)},
    "unknown": {"ours": ("reference-moves", 1.0), "trl": ("reference-moves", 1.0)},
    "rate too low": {"ours": ("stuck", 1.0), "trl": ("stuck", 1.0), "bare": ("stuck", 1.0)},
    "held-out labels swapped": {"ours": ("below-half", 1.0), "trl": ("below-half", 1.0)},
    "floor": {"ours": ("floor", 1.0)},
}


@pytest.mark.parametrize("case", SHOWN)
def test_a_bug_is_found_where_a_log_can_show_it(case):
    """On the runs that the rules were not developed on; what a log cannot show is in the table too, as a rate of 0."""
    for view, (rule, least) in SHOWN[case].items():
        mine = [run for run in logged.runs() if run["kind"] == case and run["seed"] % 2]
        hit = [rule in {finding.rule for finding in examine(logged.as_log(run, view))[0]} for run in mine]
        assert len(mine) >= (5 if case in logged.OTHERS else 15)
        assert sum(hit) / len(hit) >= least, (view, rule, sum(hit), len(hit))


def test_the_page_has_the_measured_rates_and_every_rule():
    page = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    for name, table in (("rates", logged.rates()), ("rules", logged.rules())):
        stored = re.search(f"<!-- {name} -->\n(.*?)<!-- end of {name} -->", page, re.DOTALL)[1]
        assert stored == table, f"write it anew: python tests/tools/logged.py ({name})"


def test_chapters_and_sections_are_there():
    sections: dict[str, set[str]] = {}
    for rule in RULES:
        chapter, _, section = rule.chapter.partition(": ")
        if chapter not in sections:
            cells = nbformat.read(ROOT / "notebooks" / chapter, as_version=4).cells
            texts = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
            sections[chapter] = set(re.findall(r"^#+ (.+)$", texts, re.MULTILINE))
        assert section in sections[chapter], rule.name
        assert rule.severity in SEVERITIES
