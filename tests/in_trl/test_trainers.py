"""TDPO and TGDPO as TRL's trainers train them: the same runs as DPOTrainer's where the losses are equal, and as `fit`'s."""

from __future__ import annotations

import copy
import json
import math

import pytest
import tiny
import torch
from datasets import Dataset
from same_run import BATCH, METRICS, STEPS, THEIRS, by_fit, by_trl, check_equal, models, sentences

trl = pytest.importorskip("trl", minversion="1.16")

from tpo_lib.models import frozen_copy  # noqa: E402
from tpo_lib.trl import TDPOConfig, TDPOTrainer, TGDPOConfig, TGDPOTrainer  # noqa: E402

TOKENIZER = tiny.tokenizer_of("byte")
TRLS = (*METRICS, "entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy", "num_tokens")  # all it logs
KL = ("kl/chosen", "kl/rejected", "kl/margin")


def trainer_of(tmp_path, loss: str = "tdpo2", *, policy=None, reference=None, rows=None, guide=None, **settings):
    """A trainer of tiny models."""
    settings = {"output_dir": str(tmp_path)} | THEIRS | settings
    given = {"train_dataset": Dataset.from_list(rows or sentences()), "processing_class": TOKENIZER}
    given |= {"eval_dataset": Dataset.from_list(sentences(6))}
    default = models("llama")
    policy, reference = policy or default[0], reference or (None if policy else default[1])
    if loss == "tgdpo":
        config = TGDPOConfig(**{"guide_beta": 0.1} | settings)
        return TGDPOTrainer(policy, reference, config, guide=guide or tiny.llama(2, vocab=320), **given)
    return TDPOTrainer(policy, reference, TDPOConfig(loss_type=loss, **settings), **given)


def losses_of(trainer) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("loss", ["tdpo2", "tgdpo"])
def test_alpha_0_is_dpo_step_by_step(loss, family, tmp_path):
    """Loss, gradient norm, every metric that TRL logs, and the trained logits; Gemma 2's are capped."""
    rows, like = sentences(), THEIRS | {"gradient_accumulation_steps": 1, "beta": 0.1}
    settings = {"output_dir": str(tmp_path / "theirs"), **like}
    theirs, other = by_trl(trl.DPOTrainer, trl.DPOConfig(**settings), family, rows, TOKENIZER, with_reference=True)
    settings |= {"output_dir": str(tmp_path / "ours"), "alpha": 0.0}
    if loss == "tgdpo":
        trainer, config = TGDPOTrainer, TGDPOConfig(**settings, guide_beta=0.1)
        more = {"guide": getattr(tiny, family)(2, vocab=320)}
    else:
        trainer, config, more = TDPOTrainer, TDPOConfig(**settings), {}
    ours, policy = by_trl(trainer, config, family, rows, TOKENIZER, with_reference=True, **more)
    check_equal([row | {"lr": row["learning_rate"]} for row in ours], theirs, (policy, other), metrics=TRLS)
    assert theirs[0].keys() <= ours[0].keys()


@pytest.mark.parametrize("loss", ["tdpo1", "tdpo2", "tgdpo"])
def test_it_is_the_run_that_fit_makes(loss, tmp_path):
    settings = {"alpha": 2.0, "guide_beta": 0.3, "floor": 0.5} if loss == "tgdpo" else {}
    guide = tiny.llama(2, vocab=320) if loss == "tgdpo" else None
    ours, rows, policy = by_fit("llama", sentences(), TOKENIZER, guide=guide, loss_type=loss, schedule="linear", **settings)
    config = (TGDPOConfig if guide else TDPOConfig)(str(tmp_path), loss_type=loss, **settings, **THEIRS)
    more = {"guide": copy.deepcopy(guide)} if guide else {}
    trainer = TGDPOTrainer if guide else TDPOTrainer
    theirs, other = by_trl(trainer, config, "llama", rows, TOKENIZER, with_reference=True, **more)
    metrics = METRICS + KL + (("guidance/floor_share",) if guide else ())
    check_equal(ours, theirs, (policy, other), metrics=metrics)
    assert not guide or 0 < theirs[0]["guidance/floor_share"] < 1
