"""Every setting is checked, none is rewritten."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

from tpo_lib.config import PRESETS, TrainConfig, override
from tpo_lib.losses import OBJECTIVES


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("loss_type", "tpo", "loss_type='tpo' is unknown; choose one of sft, dpo"),
        ("shaping", "cubic", "choose one of linear, exp"),
        ("optimizer", "sgd", "adamw, rmsprop"),
        ("schedule", "step", "cosine, linear, constant"),
        ("precision", "fp8", "bf16"),
        ("report_to", "wandb", "tensorboard"),
        ("beta", 0.0, r"beta=0\.0 must be greater than 0"),
        ("beta", float("nan"), "beta=nan must be greater than 0"),
        ("lr", -1.0, "lr"),
        ("guide_beta", 0.0, "guide_beta"),
        ("max_steps", 0, "max_steps"),
        ("floor", 0.0, "floor"),
        ("batch_size", 0, "batch_size"),
        ("max_length", 1, "max_length=1 must be greater than 1"),
        ("alpha", -0.1, r"alpha=-0\.1 must be at least 0"),
        ("gamma", -1.0, "gamma"),
        ("warmup_steps", -1, "warmup_steps"),
    ],
)
def test_bad_values_are_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{name: value})


def test_decay_without_effect_is_refused():
    with pytest.raises(ValueError, match=r"weight_decay=0\.1 has no effect with rmsprop"):
        TrainConfig(optimizer="rmsprop", weight_decay=0.1)


def test_values_are_kept_as_given():
    config = TrainConfig(beta=7, lr=1, alpha=0)
    assert (config.beta, config.lr, config.alpha) == (7, 1, 0)
    assert override(config, beta=None, alpha=0.3) == TrainConfig(beta=7, lr=1, alpha=0.3)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_hyperparameters_are_what_the_objective_takes(name):
    config = TrainConfig(loss_type=name, guide_beta=0.1)
    keywords = [p for p in inspect.signature(OBJECTIVES[name].fn).parameters.values() if p.kind == p.KEYWORD_ONLY]
    assert list(config.hyperparameters()) == [p.name for p in keywords]


def test_every_field_is_documented():
    for field in fields(TrainConfig):
        assert field.name in TrainConfig.__doc__, field.name


def test_presets_say_where_their_values_come_from():
    assert set(PRESETS) == {"pocket", "gpt2-imdb", "gpt2-large-imdb"}
    paper = PRESETS["gpt2-large-imdb"].train
    assert (paper.beta, paper.alpha, paper.optimizer, paper.lr, paper.warmup_steps) == (0.1, 0.5, "rmsprop", 5e-6, 150)
    assert paper.batch_size * paper.accumulation == PRESETS["gpt2-imdb"].train.batch_size * 4 == 64
    assert all(preset.source for preset in PRESETS.values())
