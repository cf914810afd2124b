"""What these trainers refuse, each by one sentence with value and fix; and what they check of TRL before anything runs."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch
from datasets import Dataset
from same_run import THEIRS, models, sentences
from transformers import HfArgumentParser

PAGE = Path(__file__).parents[2] / "docs" / "trl.md"


def imported_anew(monkeypatch, trl: ModuleType | None):
    """`tpo_lib.trl` where `import trl` finds this."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "trl" or name.startswith("tpo_lib.trl")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", trl)
    importlib.import_module("tpo_lib.trl")


def test_without_trl_the_import_names_the_extra(monkeypatch):
    with pytest.raises(ImportError, match=r'^tpo_lib\.trl needs TRL: pip install "tpo-lib\[trl\]"$'):
        imported_anew(monkeypatch, None)


def test_a_trl_without_what_is_imported_from_it_is_named(monkeypatch):
    other = ModuleType("trl")
    other.DPOConfig = object
    with pytest.raises(
        ImportError, match=r"needs of TRL \(cannot import name 'DPOTrainer'.*; it is known to work with trl .*1\.16"
    ):
        imported_anew(monkeypatch, other)


trl = pytest.importorskip("trl", minversion="1.8")

from tpo_lib.trl import TDPOConfig, TDPOTrainer, TGDPOConfig, TGDPOTrainer, config, hooks  # noqa: E402

TABLE, TOKENIZER = Dataset.from_list(sentences(4)), tiny.tokenizer_of("byte")


# ---- hooks


class Moved(trl.DPOTrainer):
    """What TRL might become."""

    def _compute_loss(self, model, inputs, num_items_in_batch=None):
        raise NotImplementedError


class Renamed:
    """The collator, too."""

    def __init__(self, pad_token_id):
        self.collator = trl.trainer.dpo_trainer.DataCollatorForPreference(pad_token_id)

    def __call__(self, examples):
        batch = self.collator(examples)
        return {"tokens" if name == "input_ids" else name: value for name, value in batch.items()}


class Reordered(Renamed):
    """A pair's two sequences beside each other."""

    def __call__(self, examples):
        return {name: value.flip(0) for name, value in self.collator(examples).items()}


class Stateless(trl.DPOTrainer):
    def __init__(self):
        self._metrics = None


@pytest.mark.parametrize(
    ("moved", "named"),
    [
        ({"trainer": Moved}, r"DPOTrainer\._compute_loss\(self, model, inputs, return_outputs\)"),
        ({"trainer": type("Bare", (), {"__init__": lambda self: None})}, r"DPOTrainer\._compute_loss"),
        ({"trainer": Stateless}, r"DPOTrainer\._total_train_tokens"),
        ({"collator": Renamed}, "batches of input_ids, attention_mask, completion_mask"),
        ({"collator": Reordered}, "batches of .* the chosen sequences first"),
    ],
    ids=["hook", "no hook", "state", "inputs", "order"],
)
def test_where_trl_has_moved_that_is_said_first(moved, named):
    with pytest.raises(
        ImportError, match=rf"needs {named}.*, which trl [\d.]+ does not have; .* trl .*1\.16.*pip install"
    ):
        hooks.check_hooks(**moved)
    hooks.check_hooks()


# ---- settings

VALUES = {
    "loss_weights": [1.0],
    "ld_alpha": 0.5,
    "f_divergence_type": "js_divergence",
    "f_alpha_divergence_coef": 0.0,
    "label_smoothing": 0.1,
    "label_smoothing_factor": 0.1,
    "use_weighting": True,
    "discopop_tau": 0.1,
    "precompute_ref_log_probs": True,
    "precompute_ref_batch_size": 4,
    "padding_free": True,
    "use_liger_kernel": True,
    "torch_compile": True,
    "parallelism_config": object(),
    "fsdp": "full_shard",
    "deepspeed": {"zero_optimization": {"stage": 3}},
}


@pytest.mark.parametrize("name", VALUES)
def test_an_option_that_could_only_be_disregarded_is_refused(name, tmp_path, monkeypatch):
    """Before transformers looks at it, which for some needs other packages."""
    monkeypatch.setattr(trl.DPOConfig, "__post_init__", lambda self: None)
    default = next(each.default for each in dataclasses.fields(trl.DPOConfig) if each.name == name)
    sentence = rf"^{name}={re.escape(repr(VALUES[name]))}: {re.escape(config.REFUSED[name])}; leave it {default!r}$"
    for kind in (TDPOConfig, TGDPOConfig):
        with pytest.raises(ValueError, match=sentence):
            kind(str(tmp_path), **{name: VALUES[name]})
    assert f"`{name}`" in PAGE.read_text(encoding="utf-8")


def test_every_option_is_refused_or_known_to_be_honoured():
    """Those of DPOConfig alone; a new one has to be looked at."""
    assert VALUES.keys() == config.REFUSED.keys()
    here = {each.name for each in dataclasses.fields(trl.DPOConfig)}
    base = {each.name for each in dataclasses.fields(trl.trainer.base_config._BaseConfig)}
    honoured = re.search(r"honoured as they are: (.*)", PAGE.read_text(encoding="utf-8"))[1]
    assert here - base - config.REFUSED.keys() == set(re.findall(r"`(\w+)`", honoured)) | {
        "loss_type",
        "sync_ref_model",
    }


@pytest.mark.parametrize(
    ("kind", "settings", "sentence"),
    [
        (TDPOConfig, {"loss_type": "sigmoid"}, "loss_type='sigmoid': TDPOConfig takes tdpo2 or tdpo1, one of them"),
        (
            TDPOConfig,
            {"loss_type": ["tdpo1", "tdpo2"]},
            "loss_type=['tdpo1', 'tdpo2']: TDPOConfig takes tdpo2 or tdpo1",
        ),
        (TGDPOConfig, {"loss_type": "tdpo2", "guide_beta": 1.0}, "loss_type='tdpo2': TGDPOConfig takes tgdpo, one"),
        (TDPOConfig, {"loss_type": "tdpo1", "alpha": 0.5}, "alpha=0.5: tdpo1 has none; leave it None"),
        (TDPOConfig, {"alpha": -0.5}, "alpha=-0.5 must be at least 0"),
        (TDPOConfig, {"beta": 0.0}, "beta=0.0 must be greater than 0"),
        (TGDPOConfig, {}, "tgdpo needs guide_beta, the beta its guide was trained with"),
        (TGDPOConfig, {"guide_beta": 0.1, "floor": 0.0}, "floor=0.0 must be greater than 0"),
        (
            TGDPOConfig,
            {"guide_beta": 0.1, "shaping": "square"},
            "shaping='square' is unknown; choose one of linear, exp",
        ),
        (
            TGDPOConfig,
            {"guide_beta": 0.1, "sync_ref_model": True},
            "sync_ref_model=True: the guide's reward is measured",
        ),
    ],
)
def test_a_hyperparameter_is_checked_by_its_record(kind, settings, sentence, tmp_path):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        kind(str(tmp_path), **THEIRS | settings)


def test_defaults_are_those_of_the_records(tmp_path):
    one, other = TDPOConfig(str(tmp_path), **THEIRS), TGDPOConfig(str(tmp_path), guide_beta=0.2, **THEIRS)
    assert one.hyperparameters() == {"beta": 0.1, "alpha": 0.5} == {"beta": one.beta, "alpha": one.alpha}
    assert other.hyperparameters() == {"beta": 0.1, "alpha": 0.5, "guide_beta": 0.2, "shaping": "linear", "floor": 0.01}
    assert TDPOConfig(str(tmp_path), loss_type="tdpo1", **THEIRS).hyperparameters() == {"beta": 0.1}
    (parsed,) = HfArgumentParser(TDPOConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--loss_type", "tdpo1", "--use_cpu"]
    )
    assert parsed.loss_type == ["tdpo1"]


# ---- models


def tdpo(tmp_path, policy=None, reference=None, **more):
    trainer, kind = (TGDPOTrainer, TGDPOConfig) if "guide" in more else (TDPOTrainer, TDPOConfig)
    settings = {"guide_beta": 0.1} if "guide" in more else {}
    settings |= more.pop("settings", {})
    default = models("llama")
    more = {"train_dataset": TABLE, "processing_class": TOKENIZER} | more
    args = more.pop("args", None) or kind(str(tmp_path), **settings, **THEIRS)
    return trainer(policy or default[0], reference or default[1], args, **more)


def test_settings_of_another_trainer_are_refused(tmp_path):
    with pytest.raises(TypeError, match="args is a DPOConfig: TDPOTrainer takes a TDPOConfig"):
        tdpo(tmp_path, args=trl.DPOConfig(str(tmp_path), **THEIRS))


def test_columns_of_token_numbers_are_refused(tmp_path):
    table = TABLE.add_column("chosen_token_rewards", [[1.0]] * len(TABLE))
    for what, given in (
        ("train_dataset", {"train_dataset": table}),
        ("eval_dataset", {"eval_dataset": table}),
        ("eval_dataset films", {"eval_dataset": {"books": TABLE, "films": table}}),
    ):
        with pytest.raises(ValueError, match=f"^{what} has chosen_token_rewards, which these trainers do not read"):
            tdpo(tmp_path, **given)


def test_another_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the reference has a vocabulary of 400, the policy of 320"):
        tdpo(tmp_path, reference=tiny.llama(1, vocab=400))
    with pytest.raises(ValueError, match="the guide has a vocabulary of 400, the policy of 320"):
        tdpo(tmp_path, guide=tiny.llama(1, vocab=400))


def test_a_guide_that_is_none_is_refused(tmp_path):
    policy, reference = models("llama")
    with pytest.raises(
        ValueError, match="the guide is given nowhere: pass guide= to TGDPOTrainer or to its config, once"
    ):
        tdpo(tmp_path, guide=None)
    with pytest.raises(ValueError, match="the guide is given twice"):
        tdpo(tmp_path, guide=tiny.llama(2, vocab=320), settings={"guide": "somewhere"})
    for guide in (policy, reference):
        with pytest.raises(
            ValueError, match="the guide is the policy or the reference itself; give the model that DPO"
        ):
            tdpo(tmp_path, policy, reference, guide=guide)
    with pytest.raises(ValueError, match="the guide has the reference's weights, so that every reward of it is 0"):
        tdpo(tmp_path, guide=models("llama")[1])
    with pytest.raises(TypeError, match="guide is a int; give a model, a folder, a hub name or an adapter's name"):
        tdpo(tmp_path, guide=3)
    with pytest.raises(OSError, match="nowhere"):
        tdpo(tmp_path, guide=str(tmp_path / "nowhere"))


def test_adapters_that_cannot_serve_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    policy = peft.get_peft_model(tiny.llama(0, vocab=320), peft.LoraConfig(**settings))
    for name in ("default", "ref"):
        args = TGDPOConfig(str(tmp_path), guide_beta=0.1, guide=name, **THEIRS)
        with pytest.raises(
            ValueError, match=f"guide='{name}' is the adapter of the policy or its reference; name another"
        ):
            TGDPOTrainer(policy, None, args, train_dataset=TABLE, processing_class=TOKENIZER)
        policy.delete_adapter("ref")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="prompt and prefix tuning put tokens before a sequence"):
        tdpo(tmp_path, peft_config=config)


def test_a_mixture_of_experts_is_trained_without_the_term_of_its_router(tmp_path):
    policy, reference = (tiny.family("mixtral", seed, vocab=320) for seed in (0, 1))
    policy.config.router_aux_loss_coef = 0.1
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.1: .*; set it to 0\.0 to train without that term"):
        tdpo(tmp_path, policy, reference)
    trainer = tdpo(tmp_path, policy, reference, settings={"router_aux_loss_coef": 0.0})
    trainer.train()
    assert trainer.state.log_history[0]["kl/chosen"] > 0


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("_is_vlm", "processing_class is a processor: models that read images cannot be read; give a tokenizer"),
        ("is_fsdp_enabled", "FSDP: weights cut over processes cannot be read; DDP .* can be used"),
        ("is_deepspeed_enabled", "DeepSpeed: weights cut over processes cannot be read; DDP .* can be used"),
        (
            "model.hf_device_map",
            "the model lies on several GPUs, where it cannot be read; launch with accelerate launch",
        ),
    ],
)
def test_what_the_launcher_or_a_processor_brings_is_refused(name, sentence, tmp_path, monkeypatch):
    """TRL sets these when it makes a trainer; here they are set after it."""
    made = trl.DPOTrainer.__init__

    def brought(trainer) -> None:
        if name.startswith("model."):
            trainer.model.hf_device_map = {"model.layers.0": 0, "lm_head": 1}
        else:
            setattr(trainer, name, True)

    monkeypatch.setattr(
        trl.DPOTrainer,
        "__init__",
        lambda self, *given, **named: (made(self, *given, **named), brought(self))[0],
    )
    with pytest.raises(ValueError, match=f"^{sentence}"):
        tdpo(tmp_path)


def test_what_nothing_reads_is_refused(tmp_path):
    def collate(examples):
        batch = trl.trainer.dpo_trainer.DataCollatorForPreference(0)(examples)
        return batch | {"position_ids": torch.zeros_like(batch["input_ids"])}

    with pytest.raises(ValueError, match="the batch has position_ids, which nothing reads"):
        tdpo(tmp_path, data_collator=collate).train()


def test_a_loss_that_is_not_finite_names_its_place(tmp_path):
    trainer = tdpo(tmp_path)
    trainer.ref_model.model.norm.weight.data[:] = float("nan")
    with pytest.raises(
        FloatingPointError, match=r"step 1: no finite loss in row 0 \(chosen\), column \d+: the reference's log-prob"
    ):
        trainer.train()
