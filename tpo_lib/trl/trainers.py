"""TDPOTrainer and TGDPOTrainer: DPOTrainer with another loss. Data, reference, loop, checkpoints and logs are TRL's.

One batch: the frozen models are read, then the policy; the loss is computed within the policy's forward, tile by tile
(fast/fused.py), so that no tensor of all positions and all logits is ever made.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from tpo_lib.fast import pair_loss
from tpo_lib.files.load import load_model, same_weights
from tpo_lib.files.spans import COLUMNS
from tpo_lib.losses import OBJECTIVES
from tpo_lib.models import check_pairs
from tpo_lib.runs.run import GUIDE_IS_REFERENCE
from tpo_lib.stats import NotFinite
from tpo_lib.train import NonFiniteLoss, Sums, batch_metrics
from tpo_lib.trl.config import SHARDED, TDPOConfig, TGDPOConfig
from tpo_lib.trl.hooks import INPUTS, DPOTrainer, use_adapter
from tpo_lib.trl.reading import Look, teach
from tpo_lib.types import IGNORE, Reading


class _TokenLevelTrainer(DPOTrainer):
    _config: type  # of its settings

    def __init__(self, model, ref_model=None, args=None, *rest, **named) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = self._config(f"{Path(name).name or 'model'}-{self._name}")
        if not isinstance(args, self._config):
            raise TypeError(f"args is a {type(args).__name__}: {type(self).__name__} takes a {self._config.__name__}")
        super().__init__(model, ref_model, args, *rest, **named)
        self._refuse()
        self._objective = partial(OBJECTIVES[args.loss_type[0]].fn, **args.hyperparameters())
        teach(self.model)
        if self.ref_model is not None:
            check_pairs(self.ref_model, (), name="reference", policy=self.model)
            teach(self.ref_model)
            self._frozen = {"ref": partial(self._read, self.ref_model)}
        else:  # the policy's own body, as it was when TRL put adapters on it, or took them over
            adapter = "ref" if "ref" in self.model.peft_config else None
            self._frozen = {"ref": partial(self._read_adapter, adapter)}

    def _refuse(self) -> None:
        """Raise ValueError where model or launch are such that a batch could not be read."""
        if self._is_vlm:
            raise ValueError(
                "processing_class is a processor: models that read images cannot be read; give a tokenizer"
            )
        if self.aux_loss_enabled:
            given = f"router_aux_loss_coef={self.router_aux_loss_coef!r}"
            raise ValueError(
                f"{given}: the loss has no term for a router of experts; set it to 0.0 to train without that term"
            )
        held_out = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        tables = {"train_dataset": self.train_dataset} | {
            f"eval_dataset {name}".strip(): x for name, x in held_out.items()
        }
        for what, table in tables.items():
            if idle := [name for name in COLUMNS if name in (getattr(table, "column_names", None) or ())]:
                raise ValueError(
                    f"{what} has {', '.join(idle)}, which these trainers do not read (python -m tpo_lib train does); leave "
                    "them out with remove_columns"
                )
        if (
            len(set((getattr(self.model, "hf_device_map", None) or {}).values())) > 1
        ):  # TRL's own way with a model's name
            raise ValueError(
                "the model lies on several GPUs, where it cannot be read; launch with accelerate launch, a whole copy on each, "
                "or set CUDA_VISIBLE_DEVICES=0"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(f"{'FSDP' if self.is_fsdp_enabled else 'DeepSpeed'}: {SHARDED}")

    def _send_telemetry(self) -> None:
        """Nothing: TRL's trainers report each construction to the hub."""

    def _read(self, model, batch: dict[str, Tensor]) -> Reading:
        return model(**batch, then=lambda reading, labels: reading)

    def _read_adapter(self, adapter: str | None, batch: dict[str, Tensor]) -> Reading:
        """Of the policy's body with another adapter than the trained one, or, for None, with none."""
        with use_adapter(self.accelerator.unwrap_model(self.model), adapter):
            return self._read(self.model, batch)

    def _compute_loss(self, model, inputs, return_outputs):
        if unknown := inputs.keys() - {*INPUTS}:
            raise ValueError(
                f"the batch has {', '.join(sorted(unknown))}, which nothing reads; leave it out in the collator"
            )
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE)  # (N, T)
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with self.accelerator.autocast():
            with torch.no_grad():
                said = {name: read(batch | {"labels": labels}) for name, read in self._frozen.items()}
            loss, sums = model(**batch, labels=labels, then=partial(self._score, said))
        self._keep(sums, inputs["attention_mask"])
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**batch)

    def _score(self, said: dict[str, Reading], policy: Reading, labels: Tensor) -> tuple[Tensor, dict]:
        """The mean loss of B pairs and the metrics as {name: (sum, count)}."""
        look = Look(policy, labels)
        try:
            output, tokens = pair_loss(
                self._objective, policy, labels, said["ref"], guide=said.get("guide"), with_kl=True, look=look
            )
        except NotFinite as error:
            place = error.at(torch.arange(len(labels) // 2))
            raise NonFiniteLoss(f"step {self.state.global_step + 1}: no finite loss in {place}") from error
        return output.loss.mean(), batch_metrics(self.args, output, tokens) | look.sums()

    def _keep(self, sums: dict[str, tuple], attention_mask: Tensor) -> None:
        """Hand the metrics of a batch, over all processes, to TRL's log."""
        kept, batch = self._metrics["train" if self.model.training else "eval"], Sums()
        batch.add({name: value for name, value in sums.items() if name != "loss"})  # which the Trainer logs
        for name, mean in batch.means(self.accelerator).items():
            kept[name].append(mean)
        if self.model.training:
            self._total_train_tokens += int(self.accelerator.reduce(attention_mask.sum(), "sum"))
        kept["num_tokens"] = [self._total_train_tokens]


class TDPOTrainer(_TokenLevelTrainer):
    """DPOTrainer for TDPO1 and TDPO2: takes what DPOTrainer takes, with a `TDPOConfig` as `args`.

    Raises:
        ValueError: the reference has another vocabulary than the policy, or the model is of a kind that cannot be read.
    """

    _config, _name, _tag_names = TDPOConfig, "TDPO", ["trl", "tdpo"]
    _paper: ClassVar = {"title": "Token-level Direct Preference Optimization", "id": "2404.11999"}


class TGDPOTrainer(_TokenLevelTrainer):
    """DPOTrainer for TGDPO: takes what DPOTrainer takes, with a `TGDPOConfig` as `args`, and a guide.

    Args:
        guide: a model that DPO has trained from the reference: itself, its folder or hub name (also an adapter's), or the name of
            an adapter on the policy. It is frozen, and not saved.

    Raises:
        ValueError: there is no guide, or none that differs from policy and reference; or as TDPOTrainer.
        OSError: the guide cannot be loaded.
    """

    _config, _name, _tag_names = TGDPOConfig, "TGDPO", ["trl", "tgdpo"]
    _paper: ClassVar = {
        "title": "TGDPO: Harnessing Token-Level Reward Guidance for Enhancing Direct Preference Optimization",
        "id": "2506.14574",
    }

    def __init__(self, model, ref_model=None, args=None, *rest, guide=None, **named) -> None:
        super().__init__(model, ref_model, args, *rest, **named)
        given = [each for each in (guide, self.args.guide) if each is not None]
        if len(given) != 1:
            how = "twice" if given else "nowhere"
            raise ValueError(f"the guide is given {how}: pass guide= to {type(self).__name__} or to its config, once")
        self._frozen["guide"] = self._guide(given[0])

    def _guide(self, guide):
        """What reads the guide."""
        adapters = getattr(self.model, "peft_config", {})
        if isinstance(guide, str) and guide in adapters:
            if guide in (self.model.active_adapter, "ref"):
                raise ValueError(
                    f"guide={guide!r} is the adapter of the policy or its reference; name another of {[*adapters]}"
                )
            return partial(self._read_adapter, guide)
        if isinstance(guide, str | Path):
            guide = load_model(guide, dtype=self.model.dtype)
        if not isinstance(guide, torch.nn.Module):
            raise TypeError(
                f"guide is a {type(guide).__name__}; give a model, a folder, a hub name or an adapter's name"
            )
        if guide in (self.model, self.ref_model) or (adapters and guide is self.model.get_base_model()):
            raise ValueError("the guide is the policy or the reference itself; give the model that DPO has trained")
        check_pairs(guide, (), name="guide", policy=self.model)
        if self.ref_model is not None and same_weights(guide, self.ref_model):
            raise ValueError(GUIDE_IS_REFERENCE)
        guide = self.accelerator.prepare_model(guide.requires_grad_(False).eval(), evaluation_mode=True)
        teach(guide)
        return partial(self._read, guide)
