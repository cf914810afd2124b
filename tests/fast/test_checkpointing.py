"""Activations made anew in backward: the same gradients, fewer tensors kept, dropout off, and nothing left behind."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import tiny
import torch

from tpo_lib.config import TrainConfig
from tpo_lib.data import collate
from tpo_lib.fast import FastPath
from tpo_lib.fast.checkpointing import recomputing
from tpo_lib.files import adapters
from tpo_lib.models import ResponseReader, frozen_copy
from tpo_lib.runs.run import fit

BATCH = collate(tiny.pairs(4, seed=5), 0)
CONFIG = TrainConfig(lr=1e-2, batch_size=4, warmup_steps=1, log_every=1, device="cpu", guide_beta=0.1, epochs=3)


def backward(model, *, anew: bool) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that autograd keeps until backward, weights aside, and the gradients."""
    weights, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def keep(x):
        if x.untyped_storage()._cdata not in weights:
            kept[x.untyped_storage()._cdata] = x  # alive, so that its address is not given away
        return x

    reader = ResponseReader(model)
    model.zero_grad()
    with recomputing(model) if anew else nullcontext():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = reader(BATCH).logits().pow(2).mean()
        held = sum(x.untyped_storage().nbytes() for x in kept.values())
        loss.backward()
    return held, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [*tiny.FAMILIES, *tiny.ODD])
def test_a_layer_is_computed_again_and_its_gradients_are_the_same(name):
    model = tiny.family(name)
    (plain, expected), (less, found) = (backward(model, anew=anew) for anew in (False, True))
    assert less < 0.25 * plain
    assert found.keys() == expected.keys()
    for each, gradient in expected.items():
        torch.testing.assert_close(found[each], gradient, rtol=1e-5, atol=1e-6)
    assert backward(model, anew=False)[0] == plain  # nothing is left behind


def test_dropout_stays_off_and_the_mode_is_not_touched():
    model = tiny.family("opt", dropout=0.5, attention_dropout=0.5)  # its layers call dropout themselves
    (_, expected), (_, found) = (backward(model, anew=anew) for anew in (False, True))
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_a_run_is_the_same_to_rounding(name, rank, fused, share_prefix):
    def rows(**fast) -> list[dict]:
        calls.clear()
        start = frozen_copy(tiny.family(name))
        policy = adapters.add_lora(adapters.twin(start), rank, seed=1) if rank else tiny.family(name)
        given = {"guide": tiny.family(name, 2), "progress": False}
        for layer in policy.modules():
            if type(layer).__name__.endswith(("Block", "DecoderLayer")):
                count(layer)
        how = FastPath(fused=fused, share_prefix=share_prefix, **fast)
        config = replace(CONFIG, loss_type="tgdpo", lora_rank=rank)
        return fit(config, policy, start, tiny.pairs(4, seed=5), fast=how, **given).metrics

    calls: list[str] = []

    def count(layer) -> None:
        attention = next(module for child, module in layer.named_children() if "attn" in child)
        attention.register_forward_pre_hook(lambda *_: calls.append("read") if torch.is_grad_enabled() else None)

    plain, once = rows(), len(calls)
    anew, twice = rows(checkpointing=True), len(calls)
    assert twice == 2 * once  # it did happen: every layer was read again in backward
    for row, expected in zip(anew, plain, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_model_without_marked_layers_is_named():
    with pytest.raises(ValueError, match="checkpointing: Linear has no layers made for it; train without"):
        recomputing(torch.nn.Linear(2, 2)).__enter__()
