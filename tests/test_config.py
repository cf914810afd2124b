"""Every setting is checked, none is rewritten."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import replace

import pytest

from tpo_lib.config import TrainConfig, run_settings
from tpo_lib.losses import OBJECTIVES, Hyperparameter, Objective
from tpo_lib.runs.runs import override


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("loss_type", "tpo", "loss_type='tpo' is unknown; choose one of sft, dpo"),
        ("shaping", "cubic", "choose one of linear, exp"),
        ("optimizer", "sgd", "adamw, rmsprop"),
        ("schedule", "step", "cosine, linear, constant"),
        ("precision", "fp8", "bf16"),
        ("report_to", "mlflow", "tensorboard, wandb, trackio"),
        ("beta", 0.0, r"beta=0\.0 must be greater than 0"),
        ("beta", float("nan"), "beta=nan must be a number"),
        ("lr", -1.0, "lr"),
        ("guide_beta", 0.0, "guide_beta"),
        ("max_steps", 0, "max_steps"),
        ("floor", 0.0, "floor"),
        ("batch_size", 0, "batch_size"),
        ("max_length", 1, "max_length=1 must be greater than 1"),
        ("alpha", -0.1, r"alpha=-0\.1 must be at least 0"),
        ("gamma", -1.0, "gamma"),
        ("warmup_steps", -1, "warmup_steps"),
        ("lr", float("inf"), "lr=inf must be finite"),
        ("lr", float("nan"), "lr=nan must be a number"),
        ("lr", -0.0, r"lr=-0\.0 must be greater than 0"),
        ("alpha", float("inf"), "alpha=inf must be finite in float32"),
        ("beta", "0.1", "beta='0.1' must be a number"),
        ("lr", 1e300, r"lr=1e\+300 must be at most 3\.4"),
        ("warmup_steps", 2**31, "must be at most 2147483647"),
        ("batch_size", 2.5, r"batch_size=2\.5 must be a number \(int\)"),
        ("batch_size", True, "batch_size=True must be a number"),
        ("epochs", None, "epochs=None must be a number"),
        ("max_tokens", 3, "max_tokens=3 must be greater than 3"),
        ("seed", -1, "seed=-1 must be at least 0"),
        ("seed", 2**32, "seed=4294967296 must be at most 4294967295"),
        ("tau", 1.0, r"tau=1\.0 is no setting, and no objective takes it; they take .*beta"),
        ("hyper", {"tau": 1.0}, r"tau=1\.0 is no setting"),
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


def test_defaults_belong_to_the_objective():
    """SimPO's authors' code has beta 2 and gamma a quarter of it; the papers with a reference have beta 0.1."""
    simpo = TrainConfig(loss_type="simpo")
    assert simpo.hyperparameters() == {"beta": 2.0, "gamma": 0.5}
    assert replace(TrainConfig(), loss_type="simpo") == simpo
    assert override(TrainConfig(beta=0.1), loss_type="simpo").hyperparameters() == simpo.hyperparameters()
    assert TrainConfig(loss_type="simpo", beta=0.1).hyperparameters()["beta"] == 0.1
    assert TrainConfig().hyperparameters() == {"beta": 0.1}
    assert simpo.to_dict()["beta"] == simpo.beta == 2.0
    assert "alpha" not in simpo.to_dict()
    with pytest.raises(AttributeError, match="a training run of simpo has no 'alpha'"):
        simpo.alpha  # noqa: B018
    assert TrainConfig(**simpo.to_dict()).to_dict() == simpo.to_dict()


def test_what_is_hardly_meant_is_said():
    assert TrainConfig(beta=0.5, warmup_steps=10).remarks(10) == []
    config = TrainConfig(loss_type="simpo", beta=0.1, alpha=0.3, lr=1e-3, warmup_steps=40)
    assert [remark.split(":")[0] for remark in config.remarks(4)] == [
        "beta=0.1 is unusual with simpo",
        "alpha=0.3 has no effect with simpo",
        "the warm-up of 40 updates is longer than the run of 4",
    ]
    assert "only rises, to 0.0001 of 0.001" in config.remarks(4)[-1]


def test_an_objective_of_ones_own_has_a_place_for_its_hyperparameter(monkeypatch):
    tau = Hyperparameter(0.7, "τ", "temperature", above=0)
    monkeypatch.setitem(OBJECTIVES, "mine", Objective(OBJECTIVES["dpo"].fn, ("ref_logps",), {"beta": tau, "tau": tau}))
    assert TrainConfig(loss_type="mine").hyperparameters() == {"beta": 0.7, "tau": 0.7}
    config = TrainConfig(loss_type="mine", tau=2.0)
    assert config.hyperparameters() == {"beta": 0.7, "tau": 2.0}
    assert config.to_dict()["tau"] == config.tau == 2.0
    assert hash(config) == hash(replace(config, hyper={}))
    with pytest.raises(ValueError, match=r"tau=-1\.0 must be greater than 0"):
        TrainConfig(loss_type="mine", tau=-1.0)


def test_every_field_is_documented():
    for name, field in run_settings().items():
        assert len(field.metadata["words"]) > 10, name


def test_a_run_is_copied_pickled_and_compared_like_any_record():
    config = TrainConfig(loss_type="tdpo2", alpha=0.3, lr=1e-3)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config != replace(config, alpha=0.4)
    assert replace(config, lr=1.0).hyper == {"alpha": 0.3}
