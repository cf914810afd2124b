"""TDPO and TGDPO as TRL's trainers train them: the same runs as DPOTrainer's where the losses are equal, and as `fit`'s."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path

import pytest
import tiny
import torch
from apart import together
from datasets import Dataset
from same_run import METRICS, THEIRS, by_fit, by_trl, check_equal, models, sentences
from torch.utils._python_dispatch import TorchDispatchMode

trl = pytest.importorskip("trl", minversion="1.8")

from tpo_lib.fast import tiles  # noqa: E402
from tpo_lib.models import frozen_copy  # noqa: E402
from tpo_lib.trl import TDPOConfig, TDPOTrainer, TGDPOConfig, TGDPOTrainer, reading  # noqa: E402

TOKENIZER = tiny.tokenizer_of("byte")
KL = ("kl/chosen", "kl/rejected", "kl/margin")
OF_TRL = (*METRICS, "entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy", "num_tokens")  # all it logs


def made(folder, loss: str = "tdpo2", *, policy=None, reference=None, rows=None, held_out=None, **settings):
    """A trainer of tiny models; "dpo" is TRL's own."""
    more = {name: settings.pop(name) for name in ("guide", "peft_config") if name in settings}
    settings = {"output_dir": str(folder)} | THEIRS | settings
    if loss == "dpo":
        trainer, config = trl.DPOTrainer, trl.DPOConfig(**settings)
    elif loss == "tgdpo":
        trainer, config = TGDPOTrainer, TGDPOConfig(**{"guide_beta": 0.1} | settings)
    else:
        trainer, config = TDPOTrainer, TDPOConfig(loss_type=loss, **settings)
    default = models("llama")
    policy, reference = policy or default[0], reference or (None if policy else default[1])
    tables = {"train_dataset": Dataset.from_list(rows or sentences())}
    tables |= {"eval_dataset": Dataset.from_list(held_out)} if held_out else {}
    return trainer(policy, reference, config, processing_class=TOKENIZER, **tables, **more)


def trained(trainer, **how) -> list[dict]:
    """The rows of its log, one an update."""
    trainer.train(**how)
    return [row for row in trainer.state.log_history if "grad_norm" in row]


def gap(one: list[dict], other: list[dict], names=OF_TRL) -> float:
    """The largest difference of what both logged."""
    assert len(one) == len(other) > 0
    return max(
        abs(a[name] - b[name]) for a, b in zip(one, other, strict=True) for name in ("loss", "grad_norm", *names)
    )


def logits(trainer) -> torch.Tensor:
    with torch.no_grad():
        return trainer.model.eval()(torch.arange(3, 43)[None]).logits


# ---- the same numbers


@pytest.mark.parametrize(("loss", "family"), [("tdpo2", "llama"), ("tdpo2", "gemma2"), ("tgdpo", "gpt2")])
def test_alpha_0_is_dpo_step_by_step(loss, family, tmp_path):
    """Loss, gradient norm, learning rate, every metric that TRL logs, and the trained logits; Gemma 2's are capped."""
    rows, settings = sentences(), THEIRS | {"output_dir": str(tmp_path)}
    theirs, other = by_trl(trl.DPOTrainer, trl.DPOConfig(**settings), family, rows, TOKENIZER, with_reference=True)
    if loss == "tgdpo":
        trainer, config = TGDPOTrainer, TGDPOConfig(**settings, alpha=0.0, guide_beta=0.1)
        more = {"guide": getattr(tiny, family)(2, vocab=320)}
    else:
        trainer, config, more = TDPOTrainer, TDPOConfig(**settings, alpha=0.0), {}
    ours, policy = by_trl(trainer, config, family, rows, TOKENIZER, with_reference=True, **more)
    check_equal([row | {"lr": row["learning_rate"]} for row in ours], theirs, (policy, other), metrics=OF_TRL)
    assert theirs[0].keys() <= ours[0].keys()
    assert all(row[name] for row in ours for name in (*OF_TRL[6:9], *KL))


@pytest.mark.parametrize("loss", ["tdpo1", "tdpo2", "tgdpo"])
def test_it_is_the_run_that_fit_makes(loss, tmp_path):
    settings = {"alpha": 2.0, "guide_beta": 0.3, "floor": 0.5} if loss == "tgdpo" else {}
    guide = tiny.llama(2, vocab=320) if loss == "tgdpo" else None
    settings |= {"loss_type": loss}
    ours, rows, policy = by_fit("llama", sentences(), TOKENIZER, guide=guide, schedule="linear", **settings)
    config = (TGDPOConfig if guide else TDPOConfig)(str(tmp_path), **settings, **THEIRS)
    more = {"guide": copy.deepcopy(guide)} if guide else {}
    trainer = TGDPOTrainer if guide else TDPOTrainer
    theirs, other = by_trl(trainer, config, "llama", rows, TOKENIZER, with_reference=True, **more)
    metrics = METRICS + KL + (("guidance/floor_share",) if guide else ())
    check_equal(ours, theirs, (policy, other), metrics=metrics)
    assert not guide or 0 < theirs[0]["guidance/floor_share"] < 1


def test_a_forbidden_token_adds_nothing_to_the_entropy():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    lse = logits.logsumexp(-1, keepdim=True)
    entropy, _, likeliest = reading._numbers(logits - lse, lse, torch.tensor([[2]]))
    assert (entropy.item(), likeliest.item()) == (pytest.approx(math.log(2)), 0)


def test_accumulated_batches_are_one_batch(tmp_path):
    whole = made(tmp_path)
    parts = made(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert gap(trained(whole), trained(parts), METRICS + KL) < 1e-5
    assert (logits(whole) - logits(parts)).abs().max() < 1e-5


def test_bf16_is_the_run_that_fit_makes_in_bf16(tmp_path):
    settings = {"schedule": "linear", "precision": "bf16", "loss_type": "tdpo2"}
    ours, rows, _ = by_fit("llama", sentences(), TOKENIZER, **settings)
    plain = trained(made(tmp_path, rows=rows))
    rows = trained(made(tmp_path, rows=rows, bf16=True))
    assert gap(ours, rows, METRICS + KL) < 2e-3  # TRL's log rounds to 1e-4
    assert gap(plain, rows, METRICS + KL) > 1e-2  # it is another precision


def test_layers_are_computed_again_and_say_the_same(tmp_path):
    """TRL checkpoints by default; the frozen models and an evaluation keep nothing, so only the policy is read twice."""
    logs, calls = [], []
    for on in (True, False):
        trainer = made(tmp_path, gradient_checkpointing=on)
        trainer.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        logs.append(trained(trainer))
        calls.append(0)
    again, once = (len(list(run)) for is_call, run in itertools.groupby(calls) if is_call)
    assert again == 2 * once
    assert gap(*logs, METRICS + KL) < 1e-5


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gave back."""

    numel = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        for x in torch.utils._pytree.tree_leaves(out):
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("variant", ["tdpo2", "tgdpo", "bf16", "lora"])
def test_no_tensor_of_all_positions_and_all_logits_is_made(variant, tmp_path, monkeypatch):
    """Not even of the response positions: a tile of 24 rows is the largest thing in a step."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 24 * 320 * 4)
    more = {"per_device_train_batch_size": 8, "max_steps": 1, "bf16": variant == "bf16"}
    more |= {"guide": tiny.llama(2, vocab=320), "loss": "tgdpo"} if variant == "tgdpo" else {}
    more |= {"peft_config": lora(), "policy": tiny.llama(0, vocab=320)} if variant == "lora" else {}
    trainer = made(tmp_path, **more)
    batch = next(iter(trainer.get_train_dataloader()))
    with Largest() as seen:
        trainer.train()
    assert seen.numel <= 24 * 320 < int(batch["completion_mask"].sum()) * 320 / 4
    assert seen.numel >= 12 * 320  # and it sees tiles
    with Largest() as seen:
        trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert seen.numel == batch["input_ids"].numel() * 320  # what it would have seen


# ---- what TRL does


def test_it_evaluates_saves_and_goes_on(tmp_path):
    """Resumed from the second of five updates it makes the other three, as it would have, and evaluates in between."""
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"per_device_eval_batch_size": 3, "held_out": sentences(6)}
    whole = made(tmp_path, **settings)
    rows = trained(whole)
    again = made(tmp_path, **settings)
    resumed = trained(again, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert gap(rows, resumed, METRICS + KL) < 1e-5
    assert torch.equal(logits(whole), logits(again))
    assert "Token-level Direct Preference Optimization" in (tmp_path / "README.md").read_text()
    found = whole.evaluate()
    assert {f"eval_{name}" for name in ("loss", *OF_TRL, *KL)} <= found.keys()
    assert found["eval_loss"] == pytest.approx(again.evaluate()["eval_loss"])
    assert {2, 4} <= {row["step"] for row in whole.state.log_history if "eval_kl/margin" in row}
    loss, said = whole.predict(whole.eval_dataset), found["eval_loss"]
    assert loss.metrics["test_loss"] == pytest.approx(said, rel=1e-5)
    assert loss.predictions.shape[0] == 12


PROMPT, ANSWERS = "which film?", (" the good one", " a bad one, really")
FORMS = {
    "a prompt": {"prompt": PROMPT, "chosen": ANSWERS[0], "rejected": ANSWERS[1]},
    "no prompt": {"chosen": PROMPT + ANSWERS[0], "rejected": PROMPT + ANSWERS[1]},
    "messages": {
        "prompt": [{"role": "user", "content": PROMPT}],
        "chosen": [{"role": "assistant", "content": ANSWERS[0]}],
        "rejected": [{"role": "assistant", "content": ANSWERS[1]}],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_is_read_as_dpo_reads_it(form, tmp_path, monkeypatch):
    turn = "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>\n{% endfor %}"
    monkeypatch.setattr(TOKENIZER, "chat_template", turn + "{% if add_generation_prompt %}assistant:{% endif %}")
    rows = [FORMS[form]] * 4
    found = [
        made(tmp_path, loss, rows=rows, held_out=rows, **more).evaluate()
        for loss, more in (("dpo", {}), ("tdpo2", {"alpha": 0.0}))
    ]
    for name in ("loss", *OF_TRL):
        assert found[0][f"eval_{name}"] == pytest.approx(found[1][f"eval_{name}"], abs=1e-5), name


def test_without_a_reference_it_is_what_the_policy_was_loaded_from(tmp_path, monkeypatch):
    tiny.llama(0, vocab=320).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    table = Dataset.from_list(sentences())
    trainer = TDPOTrainer(str(tmp_path / "model"), args=TDPOConfig(str(tmp_path), **THEIRS), train_dataset=table)
    rows = trained(trainer)
    assert all(rows[0][name] == pytest.approx(0, abs=1e-5) for name in (*KL, "rewards/margins"))
    assert rows[-1]["kl/chosen"] > 1e-4
    monkeypatch.setattr(TDPOConfig, "_validate_args", lambda self: None)  # the default of bf16 on a CPU
    monkeypatch.chdir(tmp_path)  # it makes its output_dir here
    default = TDPOTrainer(trainer.model, trainer.ref_model, train_dataset=table, processing_class=TOKENIZER).args
    assert (default.loss_type, default.alpha, default.output_dir) == (["tdpo2"], 0.5, "model-TDPO")


def test_a_reference_that_follows_the_policy_is_read_as_it_is_now(tmp_path):
    rows = trained(made(tmp_path, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0))
    assert rows[0]["kl/chosen"] > 1e-2
    assert all(abs(row[name]) < 1e-5 for row in rows[1:] for name in (*KL, "rewards/margins"))


# ---- adapters


def lora(targets=("q_proj", "v_proj"), **settings):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM", **settings)


def adapted(seeds: dict[str, int]):
    """A body with an adapter of each name, all different, the first one active."""
    peft = pytest.importorskip("peft")
    model = None
    for name, seed in seeds.items():
        if model is None:
            model = peft.get_peft_model(tiny.llama(0, vocab=320), lora(), adapter_name=name)
        else:
            model.add_adapter(name, lora())
        draw = torch.Generator().manual_seed(seed)
        for key, weight in model.named_parameters():
            if f".{name}." in key:
                weight.data = torch.randn(weight.shape, generator=draw) * 0.3
    return model


def alone(model, name: str):
    """One of its adapters as a plain model."""
    duplicate = copy.deepcopy(model)
    duplicate.set_adapter(name)
    return frozen_copy(duplicate.merge_and_unload())


@pytest.mark.parametrize("whole", [None, ["lm_head"]], ids=["low rank", "and a whole head"])
def test_a_new_adapter_has_the_body_as_reference(whole, tmp_path):
    """Step by step as DPOTrainer at alpha 0; and the body is not trained. A head that peft wraps is read by its logits."""
    runs, body = [], tiny.family("llama", vocab=320, tie_word_embeddings=False)
    for loss, more in (("dpo", {}), ("tdpo2", {"alpha": 0.0})):
        adapter = lora(lora_dropout=0.1, modules_to_save=whole)
        trainer = made(tmp_path, loss, policy=copy.deepcopy(body), peft_config=adapter, **more)
        runs.append((trained(trainer), logits(trainer)))
    (theirs, one), (ours, other) = runs
    assert gap(ours, theirs) < 1e-5
    assert (one - other).abs().max() < 1e-5
    assert abs(ours[0]["kl/chosen"]) < 1e-6 < 1e-5 < ours[-1]["kl/chosen"]
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer), body(torch.arange(3, 43)[None]).logits)


def test_policy_reference_and_guide_are_adapters_on_one_body(tmp_path):
    """The same run as with three models."""
    body = adapted({"default": 1, "guide": 2})
    apart = {"reference": alone(body, "default"), "guide": alone(body, "guide")}
    policy = copy.deepcopy(body)
    settings = {"alpha": 1.0, "max_grad_norm": 100.0}
    one = made(tmp_path, "tgdpo", policy=body, guide="guide", **settings)
    three = made(tmp_path, "tgdpo", policy=policy, **apart, **settings)
    assert one.ref_model is None
    rows = trained(one)
    # merged weights are rounded: whether a first margin of 0 lies above 0
    assert gap(rows[1:], trained(three)[1:], (*OF_TRL, *KL, "guidance/floor_share")) < 1e-4
    assert abs(rows[0]["kl/chosen"]) < 1e-6
    assert rows[-1]["rewards/margins"] != 0
    for name, before in policy.named_parameters():  # trained by `three`, whose guide is another model
        assert ".default." in name or torch.equal(before, body.get_parameter(name)), name


@pytest.mark.parametrize("given", ["a model", "a folder", "an adapter's folder"])
def test_a_guide_is_a_model_or_a_name(given, tmp_path):
    body = adapted({"default": 2})
    folder = tmp_path / "guide"
    if given == "an adapter's folder":
        tiny.llama(0, vocab=320).save_pretrained(tmp_path / "base")
        body.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        body.save_pretrained(folder, save_embedding_layers=False)
    guide = alone(body, "default")
    if given == "a folder":
        guide.save_pretrained(folder)
    expected = trained(made(tmp_path, "tgdpo", guide=copy.deepcopy(guide), max_steps=1))
    how = {"guide": guide} if given == "a model" else {}
    settings = {} if how else {"guide": str(folder)}
    config = TGDPOConfig(str(tmp_path), guide_beta=0.1, max_steps=1, **settings, **THEIRS)
    policy, reference = models("llama")
    tables = {"train_dataset": Dataset.from_list(sentences()), "processing_class": TOKENIZER}
    found = trained(TGDPOTrainer(policy, reference, config, **tables, **how))
    assert gap(found, expected, (*OF_TRL, "guidance/floor_share")) < 1e-5
    assert abs(found[0]["rewards/margins"] - trained(made(tmp_path, "dpo", max_steps=1))[0]["rewards/margins"]) > 1e-4


# ---- several processes, and none that listen


def numbers_of(trainer) -> list[list[float]]:
    return [[row[name] for name in ("loss", "grad_norm", "num_tokens", *KL)] for row in trained(trainer)]


def in_one_of_two(rank: int, folder: Path) -> None:
    found = numbers_of(made(folder / f"{rank}", per_device_train_batch_size=2))
    (folder / f"{rank}.json").write_text(json.dumps(found))


def test_two_processes_train_as_one(tmp_path):
    """TRL logs in the first of them."""
    for status, _, told in together(in_one_of_two, tmp_path):
        assert status == 0, told[-3000:]
    found, expected = json.loads((tmp_path / "0.json").read_text()), numbers_of(made(tmp_path))
    assert torch.tensor(found).allclose(torch.tensor(expected), atol=1e-4)


def test_nothing_is_sent(tmp_path, monkeypatch):
    """TRL's own trainer reports each construction to the hub, unless the environment forbids it."""
    sent = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(trl.trainer.base_trainer, "send_telemetry", lambda **said: sent.append(said))
    made(tmp_path, "dpo")
    assert len(sent) == 1
    made(tmp_path)
    made(tmp_path, "tgdpo", guide=tiny.llama(2, vocab=320))
    assert len(sent) == 1
