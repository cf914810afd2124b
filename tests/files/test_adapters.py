"""PEFT adapters as start, reference, guide and reward: merged into their base, and saved so that they load again."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import sys

import pytest
import tiny
import torch

from tpo_lib import cli, models
from tpo_lib.files import adapters
from tpo_lib.files.load import load_model, load_tokenizer
from tpo_lib.runs import named, run, runs
from tpo_lib.runs.run import origin, read_run

peft = pytest.importorskip("peft", reason="extra peft is not installed")


LORA = peft.LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM")
DORA = peft.LoraConfig(r=2, use_dora=True, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
IA3 = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")


def adapted(folder, base, *, seed=3, config=LORA, prepare=lambda model: model):
    """Save an adapter of `base` with random weights, and a tokenizer; returns it unmerged, in eval mode."""
    model = peft.get_peft_model(prepare(load_model(base)), copy.deepcopy(config)).eval()
    torch.manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(str(folder))
    return model


@pytest.fixture
def files(tmp_path):
    base = tiny.checkpoint_folder(tmp_path / "base")
    rows = [{"prompt": f"a {w}", "chosen": f"good {w}", "rejected": f"bad {w}"} for w in ("film", "plot", "cast") * 2]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapted(tmp_path / "sft", base)
    return tmp_path


def train(files, *more, model="sft", out="out"):
    fixed = ["--batch-size", "2", "--log-every", "1", "--device", "cpu", "--output-dir", str(files / out)]
    cli.main(["train", "--model", str(files / model), "--pairs", str(files / "pairs.jsonl"), *fixed, *more])
    return [json.loads(line) for line in (files / out / "metrics.jsonl").read_text().splitlines()]


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(20)[None]).logits


@pytest.mark.parametrize(
    ("build", "config"),
    [(tiny.llama, LORA), (tiny.llama, DORA), (tiny.llama, IA3), (tiny.gpt2, LORA), (tiny.gemma2, LORA)],
)
def test_an_adapter_loads_as_its_base_with_it_merged(build, config, tmp_path):
    base = tiny.checkpoint_folder(tmp_path / "base", build)
    unmerged = adapted(tmp_path / "sft", base, config=config)
    model = load_model(tmp_path / "sft")
    torch.testing.assert_close(logits(model), logits(unmerged), rtol=1e-4, atol=1e-4)
    assert (logits(model) - logits(load_model(base))).abs().max() > 0.1
    assert type(model) is type(load_model(base))
    assert all(p.requires_grad for p in model.parameters())
    assert len(load_tokenizer(tmp_path / "sft")) == 300  # its base's


@pytest.mark.parametrize("more", [(), ("--lora-rank", "2")])
def test_training_starts_from_the_adapter_that_was_named(files, more):
    first = train(files, *more)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["kl/chosen"] == first["kl/rejected"] == 0
    assert first["grad_norm"] > 0
    start = load_model(files / "sft")
    record = read_run(files / "out")
    assert record.model["name"] == str(files / "sft")  # not the adapter's base
    assert record.reference == origin(start)  # which `evaluate` measures against
    shutil.rmtree(files / "sft")  # what was saved needs neither adapter nor base
    (files / "base").rename(files / "elsewhere")
    trained = dict(load_model(files / "out").named_parameters())
    assert 0 < max((trained[name] - weight).abs().max() for name, weight in start.named_parameters()) < 1e-3


def test_an_adapter_on_an_adapter_finds_its_way(files):
    """A checkpoint of such a run names the adapter it was started from as its base."""
    train(files, "--lora-rank", "2", "--save-every", "1")
    last = max((files / "out" / "checkpoints").iterdir())
    assert (last / "adapter_config.json").is_file()
    torch.testing.assert_close(logits(load_model(last)), logits(load_model(files / "out")))


def test_the_same_command_twice_gives_the_same_bits(files):
    def weights(out, *more):
        torch.rand(len(out))  # the generator is elsewhere each time
        train(files, "--lora-rank", "2", *more, out=out)
        return models.fingerprint(load_model(files / out))

    assert weights("a") == weights("bb") != weights("ccc", "--seed", "1")


def test_a_run_on_adapters_resumes_bit_for_bit(files):
    train(files, "--lora-rank", "2", "--save-every", "1", "--keep", "9")
    whole = models.fingerprint(load_model(files / "out"))
    for late in sorted((files / "out" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(late)
    shutil.rmtree(files / "out" / "final")
    train(files, "--lora-rank", "2", "--save-every", "1", "--keep", "9", "--resume")
    assert models.fingerprint(load_model(files / "out")) == whole


def test_a_guide_is_made_like_the_policy(files):
    rows = train(files, "--lora-rank", "2", "--loss-type", "tgdpo")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    last = max((files / "out" / "guide" / "checkpoints").iterdir())
    assert (last / "adapter_model.safetensors").is_file()
    start, guide = load_model(files / "sft"), load_model(files / "out" / "guide")
    changed = {
        name for (name, a), b in zip(start.named_parameters(), guide.parameters(), strict=True) if (a != b).any()
    }
    assert changed
    assert not any("norm" in name or "embed" in name for name in changed)  # adapters leave those alone


def test_weights_are_saved_whole_and_the_policy_stays_as_it_is(files):
    policy = adapters.add_lora(load_model(files / "base"), 2, seed=0)
    before = models.fingerprint(policy)
    plain = adapters.whole(policy)
    assert models.fingerprint(policy) == before
    policy.peft_config["default"].base_model_name_or_path = "elsewhere"
    assert models.fingerprint(policy) == before
    policy.peft_config["default"].lora_alpha = 1
    assert models.fingerprint(policy) != before
    assert not hasattr(plain, "peft_config")
    assert adapters.whole(plain) is plain


def test_a_policy_whose_adapters_cannot_be_merged_is_saved_as_it_is(files, capsys):
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    policy = peft.get_peft_model(load_model(files / "base"), config)
    assert adapters.whole(policy) is policy
    assert "saved as an adapter: merging its adapter into the weights changes its logits" in capsys.readouterr().err


def test_a_policy_with_a_prompt_of_its_own_is_refused(files):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="PeftModelForCausalLM gives logits at 6 positions for 4 tokens"):
        models.ResponseReader(peft.get_peft_model(load_model(files / "base"), config))


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_base_is_found_beside_its_adapter_or_named_when_it_is_missing(files, monkeypatch):
    monkeypatch.chdir(files)  # a base may lie beside the working folder too
    expected = models.fingerprint(load_model(files / "sft"))
    edit(files / "sft" / "adapter_config.json", base_model_name_or_path="../base")
    assert models.fingerprint(load_model(files / "sft")) == expected
    (files / "base").rename(files / "away")
    with pytest.raises(
        OSError, match=r"sft' could not be loaded: its base model '../base' is not there; .*name where it is"
    ):
        load_model(files / "sft")
    edit(files / "sft" / "adapter_config.json", base_model_name_or_path="nobody/nothing")
    for load in (load_model, load_tokenizer):
        with pytest.raises(OSError, match=r"sft' could not be loaded: (model|tokenizer) 'nobody/nothing' could not be"):
            load(files / "sft")
    edit(files / "sft" / "adapter_config.json", revision="v2")
    with pytest.raises(OSError, match="its base is revision v2 of nobody/nothing; download that"):
        load_model(files / "sft")
    edit(files / "sft" / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(OSError, match=r"adapter_config.json names no base model"):
        load_model(files / "sft")
    edit(files / "sft" / "adapter_config.json", base_model_name_or_path="same")
    for place in (files, files / "sft"):
        shutil.copytree(files / "away", place / "same")
    with pytest.raises(OSError, match=r"its base model may be .*same or .*same; write one of them into"):
        load_model("sft")


def test_adapters_that_bring_modules_and_embeddings_of_their_own(tmp_path):
    base = tiny.checkpoint_folder(tmp_path / "base")  # its embeddings are tied

    def grow(model):
        model.resize_token_embeddings(310)
        return model

    unmerged = adapted(tmp_path / "grown", base, prepare=grow)
    model = load_model(tmp_path / "grown")
    assert model.config.vocab_size == 310
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    torch.testing.assert_close(logits(model), logits(unmerged), rtol=1e-4, atol=1e-4)

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    unmerged = adapted(tmp_path / "untied", base, config=config)
    model = load_model(tmp_path / "untied")
    assert model.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(model), logits(unmerged), rtol=1e-4, atol=1e-4)
    model.save_pretrained(str(tmp_path / "again"))
    torch.testing.assert_close(logits(load_model(tmp_path / "again")), logits(model))


def test_a_reward_may_be_an_adapter(tmp_path):
    from tpo_lib.rewards import load_reward

    base = tiny.checkpoint_folder(tmp_path / "base")
    from transformers import AutoModelForSequenceClassification

    body = AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=1)
    model = peft.get_peft_model(body, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")).eval()
    model.save_pretrained(str(tmp_path / "reward"))
    reward = load_reward(tmp_path / "reward")
    assert reward.model.config.num_labels == 1
    ids = reward.tokenizer("a good film", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(reward.model(input_ids=ids).logits, expected)
    with pytest.raises(OSError, match=r"does not fit its base: it has \['.*score.*'\], which the base lacks"):
        load_model(tmp_path / "reward")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            "PROMPT_TUNING.*cannot be merged",
        ),
        (
            lambda: peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"),
            "merging its adapter into the weights changes its logits",  # the embeddings are tied to that head
        ),
        (
            lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM"),
            "cannot be merged into weights .Impossible to merge",
        ),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(tmp_path, config, message):
    base = tiny.checkpoint_folder(tmp_path / "base")
    adapted(tmp_path / "other", base, config=config())
    with pytest.raises(OSError, match=f"other' could not be loaded: .*{message}"):
        load_model(tmp_path / "other")


def test_a_merge_is_judged_by_the_logits_of_tokens_that_are_not_forbidden():
    def forbid(_, __, output):
        output.logits[..., 7] = -math.inf

    model = tiny.llama()  # tied: what is merged into its head changes its embeddings
    model.register_forward_hook(forbid)
    policy = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    with pytest.raises(ValueError, match="merging its adapter into the weights changes its logits"):
        adapters.merged(policy)


def test_damaged_or_foreign_adapters_are_refused(files):
    place, weights = files / "sft" / "adapter_config.json", files / "sft" / "adapter_model.safetensors"
    good, whole = place.read_text(), weights.read_bytes()
    for change, message in (
        ({"r": 10**9}, "has r = 1000000000, its weights are smaller"),
        ({"newer_field": 3}, r"Unexpected keyword arguments \['newer_field'\]"),
        ({"target_modules": ["q_proj"]}, r"does not fit its base: it has .*which the base lacks"),
    ):
        edit(place, **change)
        with pytest.raises(OSError, match=message):
            load_model(files / "sft")
        place.write_text(good)
    shutil.copy(files / "base" / "model.safetensors", files / "sft")
    with pytest.raises(OSError, match="holds a whole model and an adapter, which may or may not be merged"):
        load_model(files / "sft")
    (files / "sft" / "model.safetensors").unlink()
    weights.write_bytes(whole[:-8])
    with pytest.raises(OSError, match=r"adapter_model.safetensors was truncated or altered"):
        load_model(files / "sft")
    weights.unlink()
    torch.save({}, weights.with_suffix(".bin"))
    with pytest.raises(OSError, match=r"no adapter_model.safetensors but adapter_model.bin, pickled"):
        load_model(files / "sft")


def test_rank_above_the_width_is_refused_before_anything_is_loaded(files, capsys, monkeypatch):
    monkeypatch.setattr("tpo_lib.files.load._load", lambda *_: pytest.fail("a model was loaded"))
    for model in ("base", "sft"):
        with pytest.raises(SystemExit):
            train(files, "--lora-rank", "17", model=model)
        assert capsys.readouterr().err.startswith("ValueError: --lora-rank 17 is above the model's width of 16")


def test_what_scales_the_adapters_and_which_layers_have_them(files):
    policy = adapters.add_lora(load_model(files / "base"), 2, seed=0, alpha=3, targets="q_proj, mlp.down_proj")
    settings = policy.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.target_modules) == (2, 3, {"q_proj", "mlp.down_proj"})
    adapted = {name.split(".")[-4] for name, p in policy.named_parameters() if p.requires_grad}
    assert adapted == {"q_proj", "down_proj"}
    train(files, "--lora-rank", "2", "--lora-alpha", "1", "--lora-targets", "v_proj", model="base")
    written = json.loads((files / "out" / "final" / "adapter" / "adapter_config.json").read_text())
    assert (written["lora_alpha"], written["target_modules"]) == (1, ["v_proj"])
    usual = adapters.add_lora(load_model(files / "base"), 2, seed=0)
    assert usual.peft_config["default"].lora_alpha == 4
    assert sum(p.requires_grad for p in usual.parameters()) == 7 * 2  # q, k, v, o, gate, up, down


@pytest.mark.parametrize("targets", ["q_proj,qproj", "proj", ""])
def test_targets_that_name_no_layer_are_refused_before_anything_is_loaded(files, capsys, monkeypatch, targets):
    with pytest.raises(ValueError, match=r"names no layer of LlamaForCausalLM; it has embed_tokens, q_proj, k_proj,"):
        adapters.add_lora(tiny.llama(), 2, seed=0, targets=targets)
    if targets:
        monkeypatch.setattr("tpo_lib.files.load._load", lambda *_: pytest.fail("a model was loaded"))
        with pytest.raises(SystemExit):
            train(files, "--lora-rank", "2", "--lora-targets", targets)
        assert "ValueError: --lora-targets: " in capsys.readouterr().err


def test_a_merge_makes_a_whole_model_of_an_adapter(files, capsys):
    train(files, "--lora-rank", "2")
    last = max((files / "out" / "checkpoints").iterdir())
    for adapter in (last, files / "out" / "final" / "adapter"):
        cli.main(["merge", str(adapter), "--output", str(files / "whole")])
        assert models.fingerprint(load_model(files / "whole")) == models.fingerprint(load_model(files / "out"))
    assert len(load_tokenizer(files / "whole")) == 300
    cli.main(["merge", str(last), "--output", str(files / "whole")])
    assert read_run(files / "whole").start == read_run(files / "out").start
    (files / "base").rename(files / "moved")
    cli.main(["merge", str(files / "sft"), "--model", str(files / "moved"), "--output", str(files / "sft-whole")])
    assert len(load_tokenizer(files / "sft-whole")) == 300
    capsys.readouterr()
    for adapter, output, message in (
        (files / "out", "again", "final is a whole model: there is nothing to merge"),
        (files / "sft", "again", "its base model .* is not there"),
        (files / "nothing", "again", "does not exist"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["merge", str(adapter), "--output", str(files / output)])
        assert re.search(message, capsys.readouterr().err)
    with pytest.raises(SystemExit):
        cli.main(["merge", str(files / "out/final/adapter"), "--model", str(files / "moved"), "--output", str(files)])
    assert "FileExistsError" in capsys.readouterr().err


def storages(*those) -> int:
    """Bytes of the weights and buffers of models together, each counted once."""
    held = {
        x.untyped_storage()._cdata: x.untyped_storage().nbytes() for m in those for x in (*m.parameters(), *m.buffers())
    }
    return sum(held.values())


def test_twins_are_one_body_of_two_minds(files):
    start = load_model(files / "base").requires_grad_(False)
    before, alone = logits(start), models.fingerprint(start)
    policy, other = (adapters.add_lora(adapters.twin(start), 2, seed=seed) for seed in (0, 1))
    added = sum(p.numel() for m in (policy, other) for p in m.parameters() if p.requires_grad)
    assert storages(start, policy, other) == storages(start) + 4 * added
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.normal_()
    assert torch.equal(logits(start), before)
    assert torch.equal(logits(other), before)
    assert (logits(policy) - before).abs().max() > 0.1
    assert models.fingerprint(start) == alone
    adapters.whole(policy)
    assert models.fingerprint(start) == alone


@pytest.mark.parametrize(
    "fast", [(), ("--no-fused",), ("--checkpointing",), ("--share-prefix",), ("--cache-dir", "cache")]
)
def test_one_body_trains_as_three_do(files, monkeypatch, fast):
    """Policy, reference and guide on the same tensors, against three models that were loaded and merged one by one."""
    fast = [str(files / word) if word == "cache" else word for word in fast]
    lora, held = ["--lora-rank", "2", "--lr", "1e-2", "--epochs", "2", *fast], []

    def rows(objective: str, out: str):
        return train(files, "--loss-type", objective, *lora, out=out)

    real = run.Run.note
    monkeypatch.setattr(run.Run, "note", lambda self, name, model: (held.append(model), real(self, name, model))[1])
    one = {objective: rows(objective, f"{objective}-one") for objective in ("dpo", "tdpo2", "tgdpo")}
    reference, guide = held[-2:]
    assert hasattr(guide, "peft_config")
    assert storages(reference, guide) < 1.5 * storages(reference)
    three_bodies(monkeypatch)
    for objective, found in one.items():
        for row, expected in zip(found, rows(objective, f"{objective}-three"), strict=True):
            assert row == pytest.approx(expected, rel=2e-4, abs=2e-6)
        start, other = (read_run(files / f"{objective}-{bodies}").start for bodies in ("one", "three"))
        assert start.pop("guide", 0) != other.pop("guide", 1)  # one as adapters, one merged
        assert start == other
        assert start["reference"] == origin(load_model(files / "sft"))


def three_bodies(monkeypatch) -> None:
    def policy(config, name):
        return adapters.add_lora(load_model(name), config.lora_rank, seed=config.seed), named.frozen(name, "cpu")

    monkeypatch.setattr(named, "policy", policy)
    monkeypatch.setattr(named, "guide", lambda config, name, reference: named.frozen(name, "cpu"))


def test_a_guide_on_other_tensors_is_loaded_whole(files):
    """Its adapters were trained on another start: on this one they would say something else."""
    train(files, "--lora-rank", "2", out="guide")
    start = load_model(files / "sft").requires_grad_(False)
    assert hasattr(runs.load_guide(files / "guide", start), "peft_config")
    other = load_model(files / "base").requires_grad_(False)
    guide = runs.load_guide(files / "guide", other)
    assert not hasattr(guide, "peft_config")
    assert not any(p.requires_grad for p in guide.parameters())
    torch.testing.assert_close(logits(guide), logits(load_model(files / "guide")))
    shutil.rmtree(files / "guide" / "final" / "adapter")  # a run of an older version has none
    (files / "guide" / "final" / "MANIFEST.json").unlink()
    assert not hasattr(runs.load_guide(files / "guide", start), "peft_config")


def test_an_evaluation_finds_the_guide_that_was_adapters(files):
    train(files, "--lora-rank", "2", "--loss-type", "tgdpo")
    record, reference = read_run(files / "out"), load_model(files / "sft")
    guide = named.recorded_guide(record, reference)
    assert origin(guide) == record.start["guide"]
    assert named.recorded_guide(record, load_model(files / "base")) is None


def test_without_peft_an_adapter_is_refused_with_the_way_to_get_it(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'the adapter .*sft needs peft: pip install "tpo-lib\[peft\]"'):
        load_model(files / "sft")
    with pytest.raises(ImportError, match=r"--lora-rank 2 needs peft"):
        adapters.add_lora(tiny.llama(), 2, seed=0)
