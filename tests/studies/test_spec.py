"""Studies as their files have them: the runs they ask for, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpo_lib.config import TrainConfig
from tpo_lib.ppo import PPOConfig
from tpo_lib.studies import execute, study
from tpo_lib.studies.spec import Study

ROOT = Path(__file__).parents[2]
SMALL = """
number = 1
title = "T"
question = "Q?"
primary = "area reward"
[train]
max_steps = 4
batch_size = 8
[tune]
at = [2, 4]
samples = 1
[report]
seeds = [1, 2]
at = [1, 2, 4]
samples = 2
[[method]]
name = "dpo"
loss_type = "dpo"
grid = { beta = [0.1, 1.0], lr = [1e-4] }
[[method]]
name = "tgdpo"
loss_type = "tgdpo"
guide_beta = 0.1
grid = { alpha = [0.5, 1.0], beta = [0.1, 0.2] }
each = "alpha"
[[method]]
name = "short"
like = "tgdpo"
max_steps = 2
guide = { max_steps = 2 }
[[method]]
name = "simpo"
loss_type = "simpo"
grid = { beta = [2.0, 4.0] }
ratio = { gamma = [0.25, "beta"] }
"""


CLAIM = """
[[hypothesis]]
claim = "TGDPO above DPO"
paper = ".9"
pairs = [["tgdpo", "dpo"]]
"""
AFTER = """
by_the_clock = ["small", "other"]
[[claim]]
study = "other"
claim = "not of this one"
words = "x"
[[claim]]
study = "small"
claim = "TGDPO above DPO"
"""


@pytest.fixture
def written(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "small.toml"
        path.write_text(text)
        return path

    return write


def test_every_setting_of_the_grids_is_tuned_once_on_validation_prompts(written):
    plan = Study.read(written(SMALL))
    tuning = plan.tuning()
    assert [method.name for method, *_ in tuning] == ["dpo"] * 2 + ["tgdpo"] * 4 + ["simpo"] * 2
    for _, setting, spec in tuning:
        assert spec["evaluate"] == {"on": "validation", "at": [2, 4], "samples": 1, "seed": 0}
        assert spec["data"] == {"seed": 0}
        assert setting.items() <= spec["train"].items()
        TrainConfig(**spec["train"])
    assert [setting["gamma"] for method, setting, _ in tuning if method.name == "simpo"] == [0.5, 1.0]
    guides = {spec["guide"]["beta"] for _, setting, spec in tuning if setting["loss_type"] == "tgdpo"}
    assert guides == {0.1}  # read with the beta it is trained with, whatever the run's
    assert not any("guide" in spec for method, _, spec in tuning if method.name != "tgdpo")


def test_the_best_setting_of_a_method_and_of_each_alpha_is_reported(written):
    plan = Study.read(written(SMALL))
    grid = [(method.name, setting, area) for area, (method, setting, _) in zip(range(8), plan.tuning(), strict=True)]
    chosen, best = study.choose(plan, grid, Path("nowhere"))
    assert list(chosen) == ["dpo", "tgdpo α0.5", "tgdpo α1", "short", "simpo"]
    assert best == {"dpo": "dpo", "tgdpo": "tgdpo α1", "short": "short", "simpo": "simpo"}
    assert chosen["tgdpo α0.5"][1]["beta"] == 0.2
    assert chosen["short"][1] == chosen["tgdpo α1"][1] | {"max_steps": 2}
    reporting = plan.reporting(chosen)
    assert [(label, seed) for label, seed, _ in reporting][:4] == [
        ("dpo", 1),
        ("dpo", 2),
        ("tgdpo α0.5", 1),
        ("tgdpo α0.5", 2),
    ]
    by_label = {label: spec for label, seed, spec in reporting if seed == 2}
    assert by_label["short"]["evaluate"]["at"] == [1, 2]
    assert by_label["short"]["guide"]["max_steps"] == 2
    assert by_label["dpo"]["data"] == {"seed": 2}
    assert by_label["dpo"]["train"]["seed"] == 2
    assert by_label["dpo"]["evaluate"] == {"on": "test", "at": [1, 2, 4], "samples": 2, "seed": 2}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('name = "short"', 'name = "dpo"', "there are two methods 'dpo'"),
        (
            'like = "tgdpo"',
            'like = "tgdp"',
            "is like 'tgdp', which is no method here; there are dpo, tgdpo, short, simpo",
        ),
        ('loss_type = "simpo"', 'loss_type = "simp"', "'simpo' has loss_type 'simp'; choose one of sft, dpo"),
        ("at = [1, 2, 4]", "at = [1, 2]", r"\[report\] at = \[1, 2\] must rise to max_steps = 4"),
        ("[tune]\nat = [2, 4]\nsamples = 1\n", "", "'dpo' has a grid and there is no \\[tune\\]"),
        ('title = "T"', 'title = "T"\nseeds = 3', "is no study: .*seeds"),
        ('title = "T"', "title =", "is no study: Invalid value"),
    ],
)
def test_what_is_no_study_is_refused_with_its_place(written, before, after, said):
    assert before in SMALL
    with pytest.raises(ValueError, match=f"small.toml.*{said}"):
        Study.read(written(SMALL.replace(before, after)))


def test_a_study_that_is_not_there_names_those_that_are(written):
    path = written(SMALL)
    with pytest.raises(FileNotFoundError, match=r"other\.toml: there is no such study; there are small"):
        Study.read(path.with_name("other.toml"))


STUDIES = sorted((ROOT / "studies").glob("*.toml"))


@pytest.mark.parametrize("path", STUDIES, ids=[path.stem for path in STUDIES])
def test_the_studies_of_the_repository_ask_for_runs_that_can_be_made(path, monkeypatch):
    monkeypatch.chdir(ROOT)  # objectives of one's own are named from there
    plan = Study.read(path)
    results = ROOT / "studies" / "results"
    for other in {method.tuned.partition(": ")[0] for method in plan.methods if method.tuned}:
        if not (results / f"{other}.json").is_file():
            pytest.skip(f"it takes its settings from {other}, which has no result yet")
    grid = [(method.name, setting, 0.5) for method, setting, _ in plan.tuning()]
    chosen, best = study.choose(plan, grid, results)
    names = {*chosen, *best}
    for *_, spec in [*plan.tuning(), *plan.reporting(chosen)]:
        if "online" in spec:
            PPOConfig(**spec["online"])
        else:
            execute.config_of(spec["train"])
        if "guide" in spec:
            execute.config_of(spec["guide"])
    keys = [key for key, *_ in study.keys(plan)]
    assert plan.primary in keys
    for claim in plan.hypotheses:
        assert claim.get("endpoint", plan.primary) in keys, claim
        for a, b in claim["pairs"]:
            assert a in names, claim
            assert b in names or float(b) >= 0, claim


def test_what_was_said_afterwards_is_no_part_of_what_was_asked(written, tmp_path):
    before = Study.read(written(SMALL + CLAIM))
    (tmp_path / "claims").mkdir()
    place = tmp_path / "claims" / "after.toml"
    place.write_text(AFTER + 'words = "TGDPO is higher"\npaper = ".8"\n')
    later = Study.read(written(SMALL + CLAIM))
    assert later.digest == before.digest
    assert later.hypotheses == before.hypotheses == before.claims
    (claim,) = later.claims
    assert (claim["claim"], claim["paper"], claim["pairs"]) == ("TGDPO is higher", ".8", [["tgdpo", "dpo"]])
    assert later.after["by_the_clock"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (AFTER.replace("TGDPO above", "TGDPO over") + 'words = "x"', "words of 'TGDPO over DPO'"),
        (AFTER + "matters = 0.1", "matters of 'TGDPO above DPO'"),  # it would decide
    ],
)
def test_afterwards_nothing_is_said_of_no_claim_and_nothing_decided(written, tmp_path, text, said):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "after.toml").write_text(text)
    with pytest.raises(ValueError, match=f"claims/after.toml has {said}; name one of its claims"):
        Study.read(written(SMALL + CLAIM))
