"""The tier of a chapter's set-up cell: taken where the runtime carries it, else one sentence and the pocket model."""

from __future__ import annotations

import re

import pytest

from tpo_course import notebooks, tiers
from tpo_lib.files import smollm2
from tpo_lib.files.load import POCKET
from tpo_lib.runs import presets


def test_every_tier_is_a_preset_and_stands_in_the_set_up_cell(capsys, monkeypatch):
    monkeypatch.setattr(tiers, "gpu_gigabytes", lambda: 80.0)
    monkeypatch.setattr(tiers, "_precision", lambda: "bf16")
    assert [tiers.choose(tier) for tier in tiers.TIERS] == ["pocket", "smollm2-135m", "gpt2-imdb"]
    assert {preset for preset, _ in tiers.TIERS.values()} <= set(presets.PRESETS)
    capsys.readouterr()
    lines = notebooks.set_up(tier=True).splitlines()
    assert len(lines) <= 15
    drive = 'KEEP_ON_DRIVE = False  #@param {type: "boolean"}'
    assert [line for line in lines if "#@param" in line] == [
        'TIER = "pocket (CPU)"  #@param ["pocket (CPU)", "smollm2-135m (GPU)", "gpt2-imdb (GPU)"]',
        drive,
    ]
    plain = notebooks.set_up(tier=False)
    assert [line for line in plain.splitlines() if "#@param" in line] == [drive]
    assert not re.search("tier|PRESET", plain, re.IGNORECASE)
    assert [line for line in plain.splitlines()[1:] if line not in lines] == [notebooks.PLAIN["device"].strip()]


@pytest.mark.parametrize(
    ("tier", "gigabytes", "said"),
    [
        ("pocket (CPU)", 0.0, ""),
        ("pocket (CPU)", 4.0, ""),
        ("pocket (CPU)", 15.8, "has 16 GB (fp16): TIER = 'gpt2-imdb (GPU)' would run here, too."),
        ("pocket (CPU)", 8.0, "has 8 GB (fp16): TIER = 'smollm2-135m (GPU)' would run here, too."),
        ("gpt2-imdb (GPU)", 80.0, ""),
    ],
)
def test_the_largest_tier_that_the_machine_carries_is_offered(tier, gigabytes, said, capsys, monkeypatch):
    monkeypatch.setattr(tiers, "gpu_gigabytes", lambda: gigabytes)
    monkeypatch.setattr(tiers, "_precision", lambda: "fp16")
    assert tiers.choose(tier) == tiers.TIERS[tier][0]
    assert capsys.readouterr().out.strip().endswith(said)


@pytest.mark.parametrize(("gigabytes", "found"), [(0.0, "there is none"), (8.0, "there is one of 8 GB")])
def test_what_the_runtime_cannot_carry_falls_back_with_one_sentence(gigabytes, found, capsys, monkeypatch):
    monkeypatch.setattr(tiers, "gpu_gigabytes", lambda: gigabytes)
    assert tiers.choose("gpt2-imdb (GPU)") == "pocket"
    said = capsys.readouterr().out
    assert said.startswith("TIER gpt2-imdb (GPU) needs a GPU of 14 GB and ")
    assert found in said
    assert len(said.splitlines()) == 1


def test_an_unknown_tier_is_refused():
    with pytest.raises(ValueError, match=r"TIER 'gpt2' is none; choose one of pocket \(CPU\)"):
        tiers.choose("gpt2")


def test_the_pocket_tier_is_the_small_comparison_of_make_run():
    assert tiers.comparison("pocket") == presets.comparison(quick=True)


def test_a_tier_without_a_judge_gets_the_bundled_one():
    assert presets.PRESETS["gpt2-imdb"].stage.judge is None
    assert tiers.comparison("gpt2-imdb").stage.judge == str(POCKET / "judge")


def test_the_stage_is_built_from_that_comparison(monkeypatch):
    from tpo_lib.runs import stage

    monkeypatch.setattr(stage, "build_stage", lambda config, cache_dir: (config, cache_dir.name))
    assert tiers.stage("smollm2-135m") == (tiers.comparison("smollm2-135m").stage, "pairs")


def test_live_cells_run_the_real_model_where_gpu_and_weights_are_at_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "name", lambda: str(tmp_path))
    for gigabytes, preset in ((0.0, "pocket"), (4.0, "pocket"), (15.0, "smollm2-135m")):
        monkeypatch.setattr(tiers, "gpu_gigabytes", lambda gigabytes=gigabytes: gigabytes)
        assert tiers.live("pocket") == preset
    assert tiers.live("gpt2-imdb") == "gpt2-imdb"
    monkeypatch.setattr(smollm2, "name", lambda: smollm2.HUB)
    assert tiers.live("pocket") == "pocket"
