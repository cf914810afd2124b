"""The arithmetic of memory against the models of transformers, against what autograd keeps, and against measured processes."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

from tpo_course import ladder
from tpo_lib.fast import memory, scale
from tpo_lib.fast.checkpointing import recomputing
from tpo_lib.fast.memory import SHAPES, ModelShape, from_config, step_memory
from tpo_lib.files import adapters
from tpo_lib.files.load import POCKET
from tpo_lib.losses import OBJECTIVES

ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
CONFIGS = {
    "pocket": transformers.AutoConfig.from_pretrained(str(POCKET)),
    "GPT-2 small": transformers.GPT2Config(),
    "GPT-2 large": transformers.GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "Llama-3.2-1B": transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, tie_word_embeddings=True, **LLAMA
    ),
    "Llama-3.1-8B": transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, tie_word_embeddings=False, **LLAMA
    ),
}
GIVEN = {"length": 64, "pairs": 4, "objective": "tdpo2"}


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_model(name):
    assert from_config(CONFIGS[name]) == SHAPES[name]
    with torch.device("meta"):  # shapes without memory
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name])
    assert model.num_parameters() == SHAPES[name].parameters
    assert SHAPES[name].matrices == sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2) - (
        0 if SHAPES[name].tied else SHAPES[name].head  # the embedding is no matrix that is multiplied
    ) - SHAPES[name].positions * SHAPES[name].hidden  # fmt: skip


def test_other_architectures_are_named():
    with pytest.raises(ValueError, match="'gptj' model is not known"):
        from_config(transformers.GPTJConfig())


def saved_bytes(model, length: int, precision: str, around=nullcontext) -> int:
    """What autograd keeps of a padded batch of 2 sequences, without the weights and their 16-bit copies."""
    weights = {x.untyped_storage()._cdata for x in [*model.parameters(), *model.buffers()]}
    shapes = {tuple(p.shape) for p in model.parameters()}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        copy = x.dtype == torch.bfloat16 and x.ndim == 2 and {tuple(x.shape), tuple(x.T.shape)} & shapes
        if storage._cdata not in weights and not copy:
            kept[storage._cdata] = (storage.nbytes(), x)  # x: alive, so that its address is not given away
        return x

    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, -3:] = 0
    saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    body = model.get_base_model().base_model if hasattr(model, "peft_config") else model.base_model
    with around(), saving, torch.autocast("cpu", torch.bfloat16, enabled=precision != "no"):
        states = body(input_ids=mask, attention_mask=mask, use_cache=False)[0]
    assert states.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [0, 24])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    "config",
    [
        transformers.GPT2Config(vocab_size=50, n_positions=33, n_embd=192, n_layer=3, n_head=3, **ENDS),
        transformers.GPT2Config(vocab_size=50, n_positions=33, n_embd=128, n_inner=200, n_layer=5, n_head=2, **ENDS),
        transformers.GPT2Config(vocab_size=50, n_positions=161, n_embd=32, n_layer=3, n_head=1, **ENDS),
        transformers.LlamaConfig(
            vocab_size=50, hidden_size=192, intermediate_size=304, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, **ENDS,
        ),
    ],
    ids=["gpt2", "narrow MLP", "mask as large as the states", "llama"],
)  # fmt: skip
def test_activations_are_what_autograd_keeps(config, precision, rank, checkpointing):
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model = adapters.add_lora(model, rank, seed=0) if rank else model
    around = partial(recomputing, model) if checkpointing else nullcontext
    length = (
        config.max_position_embeddings if config.model_type == "gpt2" else 33
    )  # twice that: no weight has so many rows
    expected = 2 * length * memory.activation_bytes(from_config(config), length, precision, rank, checkpointing)
    rel = 0.2 if checkpointing else 0.06  # of what little is left, GPT-2's last norm has half of what is said
    assert saved_bytes(model, length, precision, around) == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("name", ["pocket", "GPT-2 small", "Llama-3.2-1B"])
def test_adapters_have_as_many_numbers(name):
    with torch.device("meta"):
        model = adapters.add_lora(transformers.AutoModelForCausalLM.from_config(CONFIGS[name]), 8, seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert SHAPES[name].adapters(8) == trained
    parts = step_memory(SHAPES[name], lora_rank=8, **GIVEN).parts
    assert (parts["gradients"], parts["optimizer"]) == (4 * trained, 8 * trained)
    assert parts["weights"] == 4 * (SHAPES[name].parameters + trained)
    assert (parts["frozen models"], parts["head's gradient"]) == (0, 0)
    assert (
        step_memory(SHAPES[name], lora_rank=8, **GIVEN | {"objective": "tgdpo"}).parts["frozen models"] == 4 * trained
    )


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_tensors_of_the_textbook_step(objective, precision):
    scene = ladder.gpt2_scene(objective, vocab=997, pairs=3, length=33, layers=1, hidden=32)
    with ladder.LiveVocabulary(997) as live, torch.autocast("cpu", torch.bfloat16, enabled=precision != "no"):
        ladder.textbook(scene).loss.mean().backward()
    predicted = memory.textbook_tensors(objective) * 6 * 33 * 997 * 4
    assert 31 / 33 * predicted <= max(live.timeline) <= predicted  # most of them have T - 1 positions


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_tiles_of_the_fused_step(objective, precision):
    vocab, rows = 9973, 400
    scene = ladder.gpt2_scene(objective, vocab=vocab, pairs=12, length=48, layers=1, hidden=32, ragged=False)
    with ladder.LiveVocabulary(vocab) as live, torch.autocast("cpu", torch.bfloat16, enabled=precision != "no"):
        ladder.tiles_once(scene, rows * vocab * 4).loss.mean().backward()
    shape = ModelShape("gpt2", 1, 32, 128, 32, vocab, positions=48)
    settings = {"length": 48, "pairs": 12, "objective": objective, "precision": precision, "scored": 40 / 48}
    predicted = step_memory(shape, tile_bytes=rows * vocab * 4, **settings).parts["vocabulary"]
    # Scratch comes on top: blocks of a MiB. SFT's gradient has chosen rows alone, so its 16-bit copy is half of what is said.
    assert (0.8 if objective == "sft" else 0.95) * predicted <= max(live.timeline) <= predicted + 2 * 2**20
    assert predicted < 0.5 * 3 * 24 * 48 * vocab * 4


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere what was freed may still count")
def test_predicted_is_what_a_process_takes():
    """Resident memory on the CPU, to 12%: libraries, alignment and a layer's scratch space are not in the arithmetic."""
    scene = {"vocab": 8192, "pairs": 4, "length": 64, "layers": 2, "hidden": 128, "ragged": False}
    cases = [("textbook", "tdpo2"), ("textbook", "dpo"), ("tiles, made once", "tdpo2")]
    tile = 4 << 20
    found = ladder.peak_bytes(
        [
            {"step": step, "scene": {**scene, "objective": objective}}
            | ({"tile_bytes": tile} if "once" in step else {})
            for step, objective in cases
        ]
    )
    shape = ModelShape("gpt2", 2, 128, 512, 128, 8192, positions=64)
    for (step, objective), measured in zip(cases, found, strict=True):
        given = {"length": 64, "pairs": 4, "objective": objective, "scored": 56 / 64, "tile_bytes": tile}
        predicted = step_memory(shape, fused=step != "textbook", **given)
        assert measured == pytest.approx(predicted.total, rel=0.12), (step, objective, predicted.parts)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere what was freed may still count")
@pytest.mark.parametrize("objective", ["dpo", "tgdpo"])
def test_predicted_is_what_a_process_takes_with_adapters_and_checkpointing(objective):
    """To 12%, on a body of 8 layers; either alone, and both."""
    scene = {
        "objective": objective,
        "vocab": 1024,
        "pairs": 8,
        "length": 64,
        "layers": 8,
        "hidden": 192,
        "ragged": False,
    }
    how = [{}, {"lora_rank": 8}, {"checkpointing": True}, {"lora_rank": 8, "checkpointing": True}]
    cases = [
        {"step": "tiles, made once", "scene": scene | {"lora_rank": each.get("lora_rank", 0)}, "tile_bytes": 1 << 20}
        | {"checkpointing": "checkpointing" in each}
        for each in how
    ]
    shape = ModelShape("gpt2", 8, 192, 768, 192, 1024, positions=64)
    given = {"length": 64, "pairs": 8, "objective": objective, "scored": 56 / 64, "tile_bytes": 1 << 20}
    found, predicted = ladder.peak_bytes(cases), [step_memory(shape, **given, **each) for each in how]

    for measured, said, each in zip(found, predicted, how, strict=True):
        assert measured == pytest.approx(said.total, rel=0.12), (each, said.parts)


def test_a_process_that_fails_is_reported(monkeypatch, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no memory left >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(RuntimeError, match=r"measuring 1 steps failed:\nno memory left"):
        ladder.peak_bytes([{"step": "textbook", "scene": {}}])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_what_doubles_and_what_does_not(name, fused):
    def parts(**changed):
        return step_memory(SHAPES[name], fused=fused, **{**GIVEN, **changed}).parts

    once, twice = parts(), parts(pairs=8)
    assert twice["activations"] == 2 * once["activations"]
    assert (
        twice["vocabulary"] == (1 if fused and once["vocabulary"] >= 2 * memory.TILE_BYTES else 2) * once["vocabulary"]
    )
    for part in ("weights", "gradients", "optimizer", "frozen models"):
        assert twice[part] == once[part]
    assert once["gradients"] == once["weights"] == 4 * SHAPES[name].parameters
    assert once["optimizer"] == 2 * parts(optimizer="rmsprop")["optimizer"] == 2 * once["weights"]
    assert parts(precision="bf16")["vocabulary"] >= once["vocabulary"]  # the softmax is taken in float32
    assert parts(precision="bf16")["activations"] < 0.9 * once["activations"]
    assert parts(precision="bf16") == parts(precision="fp16")


def test_frozen_models_by_objective_and_cache():
    shape = SHAPES["GPT-2 small"]
    for objective, models, read, head in (
        ("sft", 0, 0, 0),
        ("dpo", 1, 4, 0),
        ("tdpo1", 1, 4 * 768, 1),  # the KL needs the reference's distribution: hidden states, and its head
        ("tdpo2", 1, 4 * 768, 1),
        ("tgdpo", 2, 8, 0),
        ("simpo", 0, 0, 0),
    ):
        plain = step_memory(shape, **{**GIVEN, "objective": objective})
        cached = step_memory(shape, cached=True, **{**GIVEN, "objective": objective})
        assert plain.parts["frozen models"] == models * plain.parts["weights"]
        assert cached.parts["frozen models"] == head * 4 * 50257 * 768
        assert memory.cache_bytes(shape, objective) == read
        assert plain.disk == 0
        assert cached.disk == 2 * 64 * read  # of a pair


def test_half_as_many_scored_positions():
    whole, half = (
        step_memory(SHAPES["GPT-2 small"], scored=share, tile_bytes=1 << 40, **GIVEN) for share in (1.0, 0.5)
    )
    for part in ("vocabulary", "hidden states"):
        assert 2 * half.parts[part] == whole.parts[part]
    assert half.parts["activations"] == whole.parts["activations"]
    assert whole.total == sum(whole.parts.values())


def test_a_tile_holds_at_least_a_pair():
    small = step_memory(SHAPES["GPT-2 small"], tile_bytes=1, **GIVEN).parts["vocabulary"]
    assert small == 2 * 2 * 64 * 50257 * 4


def test_shards_are_cut_and_what_is_whole_is_counted():
    shape, given = SHAPES["Llama-3.1-8B"], GIVEN | {"precision": "bf16"}
    one, eight = (step_memory(shape, shards=shards, **given) for shards in (1, 8))
    for part in ("weights", "gradients", "optimizer", "frozen models"):
        assert eight.parts[part] == -(-one.parts[part] // 8)
    layer = (shape.parameters - shape.root) // shape.layers
    assert layer == 218_112_000  # 4 attention matrices, 3 of the MLP, 2 norms
    assert (
        eight.parts["gathered"] == (2 * 2 + 2 + 4) * shape.root + (2 * 2 + 2 + 4) * layer
    )  # two models, and gradients
    assert (one.parts["16-bit copies"], eight.parts["16-bit copies"]) == (2 * shape.matrices, 0)
    adapters = step_memory(shape, shards=8, lora_rank=8, **given)
    assert adapters.parts["frozen models"] == shape.parameters // 2  # its own, for shards are not shared
    assert adapters.parts["gathered"] == eight.parts["gathered"] - (2 + 4) * shape.root  # whose gradient nobody needs


def test_the_page_on_scale_has_the_figures_of_the_model():
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    assert scale.table() in page


def test_a_pass_in_shards_is_arithmetic_and_messages():
    """Llama-3.1-8B by hand: 6 times its weights a token and twice more for layers computed again, as in every account of it."""
    shape, cluster = SHAPES["Llama-3.1-8B"], scale.Cluster(8, 80 * 10**9, 1.0, 1.0)
    found = scale.plan(shape, cluster, length=1024, pairs=4, objective="sft", scored=1.0)
    tokens = 2 * 4 * 1024
    assert found.compute == pytest.approx((8 * (shape.matrices - shape.head) + 6 * shape.head) * tokens, rel=0.04)
    assert found.traffic == round(7 / 8 * (2 * (2 * shape.parameters - shape.root) + 4 * shape.parameters))
    assert found.seconds == (max(found.compute, found.messages), found.compute + found.messages)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"objective": "ppo"}, "objective='ppo' is unknown; choose one of sft, dpo"),
        ({"precision": "float32"}, "precision='float32' is unknown; choose one of no, bf16, fp16"),
        ({"optimizer": "sgd"}, "optimizer='sgd' is unknown; choose one of adamw, rmsprop"),
        ({"pairs": 0}, "pairs=0"),
        ({"length": 1}, "length=1"),
        ({"scored": 1.5}, r"scored=1.5.*share in \(0, 1\]"),
    ],
)
def test_wrong_arguments_are_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        step_memory(SHAPES["pocket"], **{**GIVEN, **wrong})
