"""Loading, freezing, and logits at response positions only."""

from __future__ import annotations

import pytest
import tiny
import torch

from tpo_lib import models, stats
from tpo_lib.data import collate

BUILDS = [tiny.llama, tiny.gpt2, tiny.gemma2, tiny.cohere, tiny.granite, tiny.gptj]


@pytest.mark.parametrize("build", BUILDS)
def test_logits_at_response_positions_are_the_models_own(build):
    model = build()
    reader = models.ResponseReader(model)
    assert reader.understood  # capped (Gemma 2), scaled (Cohere, Granite) and biased (GPT-J) logits too
    batch = collate(tiny.pairs(5), 0)
    mask = stats.response_mask(batch.labels)
    full = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1][mask]
    read = reader(batch.input_ids, batch.attention_mask, batch.labels)
    assert read.states.shape[1] == model.config.hidden_size
    torch.testing.assert_close(read.logits(), full)


def test_a_head_that_is_not_understood_is_left_to_the_model():
    model = tiny.llama()
    plain = models.ResponseReader(model)
    batch = collate(tiny.pairs(5), 0)
    inputs = (batch.input_ids, batch.attention_mask, batch.labels)
    model.register_forward_hook(lambda _, __, output: {"logits": 2 * output.logits})  # something no config tells
    reader = models.ResponseReader(model)
    assert plain.understood
    assert not reader.understood
    read = reader(*inputs)
    assert read.head is None
    torch.testing.assert_close(read.logits(), 2 * plain(*inputs).logits())


def test_a_reader_registers_every_weight_once():
    model = tiny.llama()
    reader = models.ResponseReader(model)
    assert len(list(reader.parameters())) == len(list(model.parameters()))
    batch = collate(tiny.pairs(3), 0)
    reader(batch.input_ids, batch.attention_mask, batch.labels).logits().sum().backward()
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
    with pytest.raises(
        OSError, match=r"could not be loaded: it has no model.safetensors but pytorch_model.bin, pickled"
    ):
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


@pytest.mark.parametrize("build", BUILDS)
def test_padding_is_not_read_on_a_cpu(build):
    model, batch = build(), collate(tiny.pairs(9), 0)
    read, reader = [], models.ResponseReader(model)
    model.base_model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].shape), with_kwargs=True
    )
    states = reader(batch.input_ids, batch.attention_mask, batch.labels).states
    rows, longest = batch.input_ids.shape
    assert sum(shape[0] for shape in read) == rows
    assert sum(shape.numel() for shape in read) < 0.8 * rows * longest
    full = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]  # (N, T, d)
    torch.testing.assert_close(states, full[:, :-1][stats.response_mask(batch.labels)])
