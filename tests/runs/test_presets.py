"""Presets: what each comes to, where its values come from, and that single fields of a comparison can be changed."""

import re
from dataclasses import replace

import pytest

from tpo_lib import losses
from tpo_lib.fast.memory import SHAPES, ModelShape, step_memory
from tpo_lib.runs import presets
from tpo_lib.runs.presets import PRESETS
from tpo_lib.runs.settings import schedule
from tpo_lib.runs.stage import pocket_stage_config

IMDB_PAPERS = ("gpt2-imdb", "gpt2-large-imdb", "imdb-ready-pairs", "pythia-2.8b-hh")


def test_every_preset_says_what_it_is_what_it_needs_and_where_it_comes_from():
    said = presets.table()
    for name, preset in PRESETS.items():
        assert f"{name}: {preset.words}" in said
        assert preset.needs in said
        assert preset.source
        for quick in (False, True):
            config = presets.comparison(name, quick=quick)
            assert [run.loss_type for run in config.objectives] == [n for n, o in losses.OBJECTIVES.items() if o.paired]
            per_update = config.objectives[0].batch_size * config.objectives[0].accumulation
            assert config.stage.max_pairs >= 2 * per_update, name


def test_the_pocket_comparison_is_the_stage_of_the_notebooks():
    assert presets.comparison(quick=True).stage == pocket_stage_config(quick=True)
    assert presets.comparison(seed=3).stage == pocket_stage_config(seed=3)
    full = presets.comparison()
    steps = schedule(full.stage.max_pairs // full.objectives[0].batch_size, full.evaluations)
    assert len(steps) >= 9
    assert sum(step <= 6 for step in steps) >= 4  # after six updates the fastest objective has moved by 7 nats
    tdpo2 = next(run for run in full.objectives if run.loss_type == "tdpo2")
    assert tdpo2.hyperparameters() == {"beta": 0.1, "alpha": 0.2}


SMOLLM2_360M = ModelShape("llama", 32, 960, 2560, 320, 49152)
PYTHIA = ModelShape("gpt2", 32, 2560, 10240, 2560, 50304)
LLAMA_3B = ModelShape("llama", 28, 3072, 8192, 1024, 128256)
GEMMA_2B = ModelShape("llama", 26, 2304, 9216, 1024, 256000)
LARGE = {  # what a preset that was never run takes: its shape, the tokens of its longest pair where they are fewer, and processes
    "smollm2-360m": (SMOLLM2_360M, 56, 1),
    "gpt2-imdb": (SHAPES["GPT-2 small"], 56, 1),
    "gpt2-large-imdb": (SHAPES["GPT-2 large"], 56, 1),
    "imdb-ready-pairs": (SHAPES["GPT-2 large"], 256, 1),
    "llama-3.2-1b-lora": (SHAPES["Llama-3.2-1B"], 1024, 1),
    "pythia-2.8b-hh": (PYTHIA, 512, 1),
    "llama3-8b-uf-pairrm": (SHAPES["Llama-3.1-8B"], 2048, 8),
    "llama3-8b-uf-armorm": (SHAPES["Llama-3.1-8B"], 2048, 8),
    "llama3.2-3b-uf-armorm": (LLAMA_3B, 2048, 1),
    "gemma2-2b-uf-armorm": (GEMMA_2B, 2048, 1),
}


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("pocket", "smollm2-135m")])
def test_what_a_preset_needs_is_what_an_update_takes(name):
    """By the memory model, with a twentieth to spare; two frozen models, since its comparison trains TGDPO."""
    (shape, length, shards), needs = LARGE[name], PRESETS[name].needs
    train = next(run for run in presets.comparison(name).objectives if run.loss_type == "tgdpo")
    assert train.batch_size * train.accumulation * shards in (32, 64, 128)
    how = {
        "length": length,
        "pairs": train.batch_size,
        "objective": "tgdpo",
        "optimizer": train.optimizer,
        "scored": 0.85,
    }
    how |= {"lora_rank": train.lora_rank, "precision": "fp16" if "T4" in needs else "bf16", "shards": shards}
    offers = re.findall(r"(\d+) GB( with --checkpointing)?", needs.replace("T4", "15 GB"))
    assert offers
    for size, again in offers:
        takes = step_memory(shape, checkpointing=bool(again), **how).total
        assert takes < 0.95 * int(size) * 10**9, f"{size} GB{again}: {takes / 1e9:.1f}"


@pytest.mark.parametrize("name", IMDB_PAPERS)
def test_the_papers_settings_are_theirs(name):
    runs = {run.loss_type: run for run in presets.comparison(name).objectives}
    assert runs["tdpo2"].hyperparameters() == {"beta": 0.1, "alpha": 0.5}
    for run in runs.values():
        assert (run.optimizer, run.lr, run.warmup_steps, run.clip) == ("rmsprop", 5e-6, 150, 10.0)
        assert run.batch_size * run.accumulation == 64


def test_reviews_bring_fine_tuning_and_prompts():
    alone, with_reviews = presets.comparison("smollm2-135m"), presets.comparison("smollm2-135m", imdb="reviews")
    assert (alone.stage.prompts, alone.stage.sft) == ("pocket", None)
    assert (with_reviews.stage.prompts, with_reviews.stage.imdb) == ("imdb", "reviews")
    assert with_reviews.stage.sft.epochs <= 2


def test_single_fields_are_changed():
    config = presets.comparison("smollm2-135m", imdb="reviews")
    settings = ["train.lr=1e-5", "stage.min_gap=0.3", "sft.reviews=100", "stage.judge=null", "train.beta=0.5"]
    found = presets.changed(config, settings)
    assert {run.lr for run in found.objectives} == {1e-5}
    assert {run.beta for run in found.objectives} == {0.5}
    assert (found.stage.min_gap, found.stage.sft.reviews, found.stage.judge) == (0.3, 100, None)
    assert presets.changed(found, ["stage.judge=some/name"]).stage == replace(found.stage, judge="some/name")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("lr=1", "PART.NAME=VALUE"),
        ("stage.lr=1", "stage has model, reward"),
        ("train.leanring_rate=1", "no setting"),
        ("train.lr=fast", "lr='fast' must be a number"),
        ("train.lr", "PART.NAME=VALUE"),
        ("sft.reviews=5", "there is no fine-tuning"),
    ],
)
def test_a_field_that_is_not_there_is_named(setting, words):
    with pytest.raises(ValueError, match=words):
        presets.changed(presets.comparison(), [setting])


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("pythia-2.8b-hh", {"imdb": "reviews"}, "--imdb has no effect with pythia-2.8b-hh"),
        ("pythia-2.8b-hh", {"prompts": "imdb"}, "--prompts has no effect"),
        ("pocket", {"imdb": "reviews"}, "add --prompts imdb"),
    ],
)
def test_what_nothing_would_read_is_refused(name, given, words):
    with pytest.raises(ValueError, match=words):
        presets.comparison(name, **given)


def test_the_pocket_model_takes_real_beginnings_where_they_are_asked_for():
    stage = presets.comparison(imdb="reviews", prompts="imdb").stage
    assert (stage.prompts, stage.imdb, stage.sft) == ("imdb", "reviews", None)
