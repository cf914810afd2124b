"""The samples that come with the bundled model: the chapters' pairs without sampling, and those the model writes today."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tpo_lib import pairing
from tpo_lib.runs import drawn, prompts
from tpo_lib.runs.stage import build_stage, pocket_stage, pocket_stage_config
from tpo_lib.sampling import generate

CONFIG = pocket_stage_config(quick=True)


@pytest.fixture
def silent(monkeypatch, tmp_path):
    """An empty cache, and a model that must not write."""

    def fails(*_, **__):
        raise AssertionError("sampled")

    monkeypatch.setenv("TPO_CACHE", str(tmp_path))
    monkeypatch.setattr(pairing, "generate", fails)
    monkeypatch.setattr(prompts, "sample_ids", fails)


@pytest.mark.parametrize(
    ("changes", "pairs", "held_out", "their_prompts"), [({}, 224, 48, 28), (drawn.OF_CHAPTER_9, 80, 24, 14)]
)
def test_the_chapters_have_their_pairs_without_sampling(silent, changes, pairs, held_out, their_prompts):
    stage = pocket_stage(**changes)
    assert (len(stage.pairs), len(stage.held_out_pairs)) == (pairs, held_out)
    assert len({tuple(pair.prompt_ids) for pair in stage.held_out_pairs}) == their_prompts
    assert len(stage.held_out_prompts) == stage.config.held_out_prompts


def test_another_stage_draws_its_own(silent):
    for other in (
        {"seed": 1},
        {"train_prompts": 127},
        {"model": "elsewhere"},
        {"prompts": "imdb"},
        {"sft": "any"},
    ):
        assert drawn.prompts(replace(CONFIG, **other)) is None, other
    with pytest.raises(AssertionError, match="sampled"):
        pocket_stage(max_new_tokens=39)


def test_the_samples_are_what_the_model_writes_up_to_rounding(tmp_path):
    config = replace(CONFIG, **drawn.OF_CHAPTER_9)
    stage = build_stage(config, cache_dir=tmp_path)
    texts = stage.held_out_prompts
    settings = {"samples_per_prompt": config.held_out_samples, "max_new_tokens": config.max_new_tokens}
    now = generate(stage.start, stage.tokenizer, texts, seed=config.seed + 3, **settings)
    kept = next(
        rows
        for path in tmp_path.glob("drawn-*/samples-*/samples.json")
        if len(rows := json.loads(path.read_text())) == len(texts)
    )
    same = [
        list(a.token_ids) == b["token_ids"] for x, y in zip(now, kept, strict=True) for a, b in zip(x, y, strict=True)
    ]
    assert sum(same) >= 0.9 * len(same)


def test_what_is_written_is_read(monkeypatch, tmp_path):
    small = {"train_prompts": 6, "held_out_prompts": 4, "max_new_tokens": 8, "min_gap": 0.0}
    monkeypatch.setattr(drawn, "FILE", tmp_path / "drawn.zip")
    monkeypatch.setattr(drawn, "STAGES", (small,))
    drawn.write(tmp_path / "cache")
    before = drawn.FILE.read_bytes()
    drawn.write(tmp_path / "cache")
    assert drawn.FILE.read_bytes() == before
    first = build_stage(replace(CONFIG, **small), cache_dir=tmp_path / "cache")
    monkeypatch.setattr(pairing, "generate", None)
    again = build_stage(replace(CONFIG, **small), cache_dir=tmp_path / "other")
    assert again.held_out_prompts == first.held_out_prompts
    assert list(again.pairs) == list(first.pairs)
