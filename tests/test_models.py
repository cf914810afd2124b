"""Loading, freezing, and logits at response positions only."""

from __future__ import annotations

import functools
import math
import shutil
from contextlib import nullcontext

import pytest
import tiny
import torch

from tpo_lib import models, rewards, stats
from tpo_lib.config import TrainConfig
from tpo_lib.data import EncodedPair, collate
from tpo_lib.evaluation import evaluate, pair_stats, sequence_kl
from tpo_lib.fast import FastPath
from tpo_lib.files import store
from tpo_lib.files.load import POCKET, load_model, load_tokenizer
from tpo_lib.files.store import CheckpointError
from tpo_lib.runs.run import fit
from tpo_lib.sampling import Completion

BUILDS = [tiny.llama, tiny.gpt2, tiny.gemma2, tiny.cohere, tiny.granite, tiny.gptj]


@pytest.mark.parametrize("build", BUILDS)
def test_logits_at_response_positions_are_the_models_own(build):
    model = build()
    reader = models.ResponseReader(model)
    assert reader.understood  # capped (Gemma 2), scaled (Cohere, Granite) and biased (GPT-J) logits too
    batch = collate(tiny.pairs(5), 0)
    mask = stats.response_mask(batch.labels)
    full = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1][mask]
    read = reader(batch)
    assert read.states.shape[1] == model.config.hidden_size
    torch.testing.assert_close(read.logits(), full)


def test_a_head_that_is_not_understood_is_left_to_the_model():
    model = tiny.llama()
    plain = models.ResponseReader(model)
    batch = collate(tiny.pairs(5), 0)
    model.register_forward_hook(lambda _, __, output: {"logits": 2 * output.logits})  # something no config tells
    reader = models.ResponseReader(model)
    assert plain.understood
    assert not reader.understood
    read = reader(batch)
    assert read.head is None
    torch.testing.assert_close(read.logits(), 2 * plain(batch).logits())


@pytest.mark.parametrize("bad", [-math.inf, math.nan])
def test_a_head_is_understood_by_its_finite_logits(bad):
    model = tiny.gptj()
    with torch.no_grad():
        model.lm_head.bias[7] = bad
    assert models.ResponseReader(model).understood
    model.register_forward_hook(lambda _, __, output: {"logits": 2 * output.logits})
    assert not models.ResponseReader(model).understood


def test_a_reader_registers_every_weight_once():
    model = tiny.llama()
    reader = models.ResponseReader(model)
    assert len(list(reader.parameters())) == len(list(model.parameters()))
    batch = collate(tiny.pairs(3), 0)
    reader(batch).logits().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_load_model_from_a_folder(build, tmp_path):
    folder = tiny.checkpoint_folder(tmp_path, build)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    assert not model.training
    assert model.dtype == torch.float32
    assert models.fingerprint(model) == models.fingerprint(load_model(folder))
    assert tokenizer("good")["input_ids"][0] == 0  # BOS leads every text


def test_a_head_of_its_own_is_trained_and_saved_beside_the_embedding(tmp_path):
    build = functools.partial(tiny.family, "llama", tie_word_embeddings=False)
    policy = load_model(tiny.checkpoint_folder(tmp_path / "start", build))
    reference = models.frozen_copy(policy)
    train_on(tiny.pairs(2), policy, reference, max_steps=1, output_dir=str(tmp_path / "run"))
    again = load_model(tmp_path / "run")
    assert again.config.tie_word_embeddings is False
    assert models.fingerprint(again) == models.fingerprint(policy)
    assert models.fingerprint(reference) == models.fingerprint(load_model(tmp_path / "start"))
    embedding, head = (getattr(again, f"get_{side}_embeddings")().weight for side in ("input", "output"))
    assert not torch.equal(embedding, head)
    for after, before in ((embedding, reference.model.embed_tokens), (head, reference.lm_head)):
        assert not torch.equal(after, before.weight)  # gradients reached both


def test_fingerprint_sees_every_weight():
    model = tiny.llama()
    before = models.fingerprint(model)
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    assert models.fingerprint(model) != before


def test_pickled_weights_are_refused(tmp_path):
    folder = tiny.checkpoint_folder(tmp_path)
    torch.save(load_model(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        OSError, match=r"could not be loaded: it has no model.safetensors but pytorch_model.bin, pickled"
    ):
        load_model(folder)


def test_missing_names_point_to_the_pocket_preset():
    for kind, load in (("model", load_model), ("tokenizer", load_tokenizer)):
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


def test_a_mac_computes_on_its_cpu_unless_told_otherwise(monkeypatch):
    """Nothing was tried on MPS, which has no float64."""
    here = torch.backends.mps.is_available()
    monkeypatch.setattr(torch.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for cuda, found in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert models.choose_device().type == found
    with nullcontext() if here else pytest.raises(ValueError, match=r"device 'mps' is not here; choose cpu or cuda"):
        models.choose_device("mps")


def test_precision_is_chosen_from_the_device(monkeypatch):
    assert models.choose_precision(torch.device("cpu")) == "no"
    assert models.choose_precision(torch.device("cpu"), "bf16") == "bf16"
    for speedup, found in ((2.0, "bf16"), (1.1, "no")):
        monkeypatch.setattr(models, "_cpu_speedup", lambda speedup=speedup: speedup)
        assert models.choose_precision(torch.device("cpu"), "auto") == found
        assert models.choose_precision(torch.device("cpu")) == "no"
    with pytest.raises(ValueError, match="fp16 needs a CUDA device, this run is on cpu"):
        models.choose_precision(torch.device("cpu"), "fp16")


def test_final_model_of_a_run_is_found_in_its_folder(tmp_path):
    tiny.checkpoint_folder(tmp_path / "final")
    assert models.fingerprint(load_model(tmp_path)) == models.fingerprint(load_model(tmp_path / "final"))


@pytest.mark.parametrize("build", BUILDS)
def test_padding_is_not_read_on_a_cpu(build):
    model, batch = build(), collate(tiny.pairs(9), 0)
    read, reader = [], models.ResponseReader(model)
    model.base_model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].shape), with_kwargs=True
    )
    states = reader(batch).states
    rows, longest = batch.input_ids.shape
    assert sum(shape[0] for shape in read) == rows
    assert sum(shape.numel() for shape in read) < 0.8 * rows * longest
    full = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]  # (N, T, d)
    torch.testing.assert_close(states, full[:, :-1][stats.response_mask(batch.labels)])


# ---- ids and positions


def train_on(pairs: list[EncodedPair], policy, reference=None, eval_pairs=None, fast=None, **settings):
    config = TrainConfig(loss_type="dpo", beta=0.1, batch_size=2, device="cpu", **settings)
    reference = reference or models.frozen_copy(policy)
    return fit(config, policy, reference, pairs, eval_pairs=eval_pairs, progress=False, fast=fast or FastPath())


@pytest.mark.parametrize("pad", [-1, 63, 64, 2**40])
@pytest.mark.parametrize("build", [*BUILDS, tiny.opt])
def test_any_id_may_pad(build, pad):
    model, pairs = build(), tiny.pairs(5)
    read = []
    for token in (0, pad):
        batch = collate(pairs, token)
        read.append(models.ResponseReader(model)(batch).logits())
    assert torch.equal(*read)


def two(prompt=(0, 5), chosen=(7, 8), rejected=(9,)) -> list[EncodedPair]:
    """Two sound pairs and, in row 7, this one."""
    return [*tiny.pairs(2), EncodedPair(7, list(prompt), list(chosen), list(rejected))]


OUTSIDE = [
    (two(prompt=(0, 64)), r"row 7 \(chosen\), column 1 holds token id 64, but the policy has the ids 0 to 63"),
    (two(rejected=(9, 100)), r"row 7 \(rejected\), column 3 holds token id 100, but the policy has the ids 0 to 63"),
    (two(chosen=(-1, 3)), r"row 7 \(chosen\), column 2 holds token id -1, but the policy"),
    (two(prompt=[1] * 100, chosen=[2] * 29), r"row 7 \(chosen\) has 129 tokens, but the policy has 128 positions"),
]


@pytest.mark.parametrize(("pairs", "message"), OUTSIDE)
@pytest.mark.parametrize("build", [tiny.gpt2, tiny.opt, tiny.llama])
def test_pairs_that_do_not_fit_are_refused_before_training(build, pairs, message):
    with pytest.raises(ValueError, match=message):
        train_on(pairs, build())
    with pytest.raises(ValueError, match=message):
        train_on(tiny.pairs(2), build(), eval_pairs=pairs)


@pytest.mark.parametrize("build", [tiny.gpt2, tiny.opt, tiny.llama])
def test_every_position_may_be_used(build):
    train_on(two(prompt=[1] * 100, chosen=[2] * 28), build())


def test_readers_name_the_sequence():
    long, wrong = (collate(two(**given), 0) for given in ({"prompt": [1] * 127}, {"prompt": (64,)}))
    reader = models.ResponseReader(tiny.gpt2())
    with pytest.raises(ValueError, match="sequence 0 has 129 tokens, but the model has 128 positions"):
        reader(long)
    with pytest.raises(ValueError, match="sequence 2, column 0 holds token id 64, but the model has the ids 0 to 63"):
        reader(wrong)
    with pytest.raises(ValueError, match="sequence 2, column 0 holds token id 64"):
        pair_stats(tiny.gpt2(), tiny.gpt2(seed=1), two(prompt=(64,)), 0)


def test_longrope_ends_where_a_batch_would_turn_its_positions_otherwise():
    assert models.most_tokens(tiny.phi3().config) == 64
    train_on(two(prompt=[1] * 60, chosen=[2] * 4), tiny.phi3())
    with pytest.raises(ValueError, match=r"row 7 \(chosen\) has 65 tokens, but the policy has 64 positions"):
        train_on(two(prompt=[1] * 61, chosen=[2] * 4), tiny.phi3())


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("vocab", [60, 72])
def test_another_vocabulary_is_refused_with_a_sentence(vocab, cached, tmp_path):
    other = tiny.gpt2(vocab=vocab)
    settings = {"fast": FastPath(cache_dir=str(tmp_path))} if cached else {}
    with pytest.raises(
        ValueError, match=f"the reference has a vocabulary of {vocab}, the policy of 64; there is no KL"
    ):
        train_on(tiny.pairs(2), tiny.gpt2(), other, **settings)
    config = TrainConfig(loss_type="tgdpo", guide_beta=0.1, beta=0.1, batch_size=2, device="cpu")
    with pytest.raises(ValueError, match=f"the guide has a vocabulary of {vocab}, the policy of 64"):
        fit(config, tiny.gpt2(), tiny.gpt2(), tiny.pairs(2), guide=other, progress=False, **settings)
    with pytest.raises(ValueError, match=f"the reference has a vocabulary of {vocab}, the policy of 64"):
        evaluate(tiny.gpt2(), other, None, ["a"], None)


def test_a_reference_with_fewer_positions_is_named():
    short = tiny.gpt2()
    short.config.n_positions = 30
    with pytest.raises(ValueError, match=r"row 7 \(chosen\) has 31 tokens, but the reference has 30 positions"):
        train_on(two(prompt=[1] * 25, chosen=[2] * 6), tiny.gpt2(), short)


def test_evaluation_names_what_forbidden_tokens_make_infinite(tmp_path):
    pairs = [EncodedPair(3, [0, 1], [2, 3], [4, 5])]
    policy, forbids = tiny.gptj(vocab=300), tiny.gptj(vocab=300)
    tokenizer = tiny.tokenizer(tmp_path)
    with torch.no_grad():
        forbids.lm_head.bias[5] = -math.inf
    with pytest.raises(ValueError, match=r"row 3 \(rejected\), column 3: the reference's .* forbids this token"):
        pair_stats(policy, forbids, pairs, 0)
    with pytest.raises(ValueError, match=r"row 3 \(chosen\), column 2: KL\(reference \|\| policy\) is inf"):
        pair_stats(forbids, policy, [EncodedPair(3, [0, 1], [2, 3], [4, 6])], 0)
    drawn = [Completion("", (7, 8), None)]
    both = [sequence_kl(a, b, tokenizer, ["x"], drawn).kl for a, b in ((forbids, forbids), (forbids, policy))]
    assert both[0] == 0
    assert both[1] > 0  # what the policy forbids adds nothing
    with pytest.raises(ValueError, match=r"sample 0 has KL\(policy \|\| reference\) = inf .*the reference forbids"):
        sequence_kl(policy, forbids, tokenizer, ["x"], drawn)


def flip(path) -> None:
    """Flip the last bit of a file, as a worn disk does."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


LOADS = {
    "model": ("model.safetensors", lambda folder: load_model(folder)),
    "configuration": ("config.json", lambda folder: load_model(folder)),
    "tokenizer": ("tokenizer.json", lambda folder: load_tokenizer(folder)),
    "reward": ("reward.safetensors", lambda folder: rewards.load_reward(folder)),
    "judge": ("model.safetensors", lambda folder: rewards.load_reward(folder / "judge")),
    "second_judge": ("reward.safetensors", lambda folder: rewards.load_reward(folder / "second_judge")),
}


@pytest.mark.parametrize("kind", LOADS)
def test_a_flipped_bit_in_what_is_bundled_is_noticed(tmp_path, kind):
    name, load = LOADS[kind]
    folder = shutil.copytree(POCKET, tmp_path / "pocket")
    load(folder)
    place = f"pocket/{kind}" if kind.endswith("judge") else "pocket"
    flip(tmp_path / place / name)
    with pytest.raises(
        CheckpointError, match=rf"{place}: {name} was truncated or altered.*if the change is yours, remove"
    ):
        load(folder)
    for manifest in folder.rglob("MANIFEST.json"):
        manifest.unlink()
    if kind not in ("configuration", "tokenizer"):
        load(folder)  # unchecked, as the sentence says


def test_what_is_bundled_is_what_its_manifests_list():
    for folder in (POCKET, POCKET / "judge", POCKET / "second_judge"):
        store.prove(folder)


def test_a_file_is_hashed_once_for_each_content(tmp_path, monkeypatch):
    folder = shutil.copytree(POCKET, tmp_path / "pocket")
    real, hashed = store.sha256_file, []
    monkeypatch.setattr(store, "sha256_file", lambda path: (hashed.append(path.name), real(path))[1])
    for _ in range(2):
        load_model(folder)
        load_tokenizer(folder)
    assert len(hashed) == len(set(hashed)) + 7  # four names are in the judge's folder too, three in the second judge's
    assert "README.md" not in hashed


def test_a_manifest_of_another_kind_and_files_of_the_users_are_nothing_to_us(tmp_path):
    folder = tiny.checkpoint_folder(tmp_path / "other")
    (folder / "MANIFEST.json").write_text('{"files": ["model.safetensors"], "version": 2}')
    load_model(folder)
    store.write_atomically(tmp_path / "final", lambda to: tiny.llama(vocab=300).save_pretrained(to))
    tiny.tokenizer(tmp_path / "final")  # saved beside the weights by hand
    load_model(tmp_path / "final")
    load_tokenizer(tmp_path / "final")
    (tmp_path / "final" / "MANIFEST.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"final has no readable MANIFEST\.json"):
        load_model(tmp_path / "final")


@pytest.mark.parametrize("kind", ["folder", "dangling link", "missing"])
def test_a_reward_does_not_become_one_of_another_kind(tmp_path, kind):
    folder = shutil.copytree(POCKET, tmp_path / "pocket")
    path = folder / "reward.safetensors"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"reward\.safetensors is missing"):
        rewards.load_reward(folder)
    (folder / "MANIFEST.json").unlink()
    if kind != "missing":  # then nothing says that there was one
        with pytest.raises(OSError, match=r"reward\.safetensors is no file"):
            rewards.load_reward(folder)
