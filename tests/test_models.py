"""Loading, freezing, and logits at response positions only."""

from __future__ import annotations

import pytest
import tiny
import torch

from tpo_lib import models, stats
from tpo_lib.data import collate


@pytest.mark.parametrize(("build", "packed"), [(tiny.llama, True), (tiny.gpt2, True), (tiny.gemma2, False)])
def test_response_logits_are_the_models_own(build, packed):
    model = build()
    scorer = models.ResponseLogits(model)
    assert scorer.packed is packed  # Gemma 2 caps its logits after the head, so the head alone would be wrong
    batch = collate(tiny.pairs(5), 0)
    mask = stats.response_mask(batch.labels)
    full = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1][mask]
    torch.testing.assert_close(scorer(batch.input_ids, batch.attention_mask, batch.labels), full)


def test_response_logits_register_every_weight_once():
    model = tiny.llama()
    scorer = models.ResponseLogits(model)
    assert len(list(scorer.parameters())) == len(list(model.parameters()))
    batch = collate(tiny.pairs(3), 0)
    scorer(batch.input_ids, batch.attention_mask, batch.labels).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_load_model_from_a_folder(build, tmp_path):
    folder = tiny.checkpoint_folder(tmp_path, build)
    model, tokenizer = models.load_model(folder), models.load_tokenizer(folder)
    assert not model.training
    assert model.dtype == torch.float32
    assert models.fingerprint(model) == models.fingerprint(models.load_model(folder))
    assert tokenizer("good")["input_ids"][0] == 0  # BOS leads every text


def test_fingerprint_sees_every_weight():
    model = tiny.llama()
    before = models.fingerprint(model)
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    assert models.fingerprint(model) != before


def test_pickled_weights_are_refused(tmp_path):
    folder = tiny.checkpoint_folder(tmp_path)
    torch.save(models.load_model(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"could not be loaded.*--preset pocket"):
        models.load_model(folder)


def test_missing_names_point_to_the_pocket_preset():
    for kind, load in (("model", models.load_model), ("tokenizer", models.load_tokenizer)):
        with pytest.raises(OSError, match=f"{kind} 'nobody/nothing' could not be loaded.*--preset pocket"):
            load("nobody/nothing")


def test_frozen_copy_is_a_copy():
    model = tiny.llama()
    copy = models.frozen_copy(model)
    assert not any(p.requires_grad for p in copy.parameters())
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert copy.model.norm.weight.abs().sum() > 0


def test_precision_is_chosen_from_the_device():
    assert models.choose_precision(torch.device("cpu")) == "no"
    assert models.choose_precision(torch.device("cpu"), "bf16") == "bf16"
    with pytest.raises(ValueError, match="fp16 needs a CUDA device, this run is on cpu"):
        models.choose_precision(torch.device("cpu"), "fp16")


def test_final_model_of_a_run_is_found_in_its_folder(tmp_path):
    tiny.checkpoint_folder(tmp_path / "final")
    assert models.fingerprint(models.load_model(tmp_path)) == models.fingerprint(models.load_model(tmp_path / "final"))
