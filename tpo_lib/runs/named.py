"""What a name on the command line stands for: a preset's models, the reward that fits one, what a run's record leads to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from tpo_lib.config import TrainConfig
from tpo_lib.files import adapters, folders
from tpo_lib.files.load import load_config, load_model, load_tokenizer
from tpo_lib.files.own_code import is_own
from tpo_lib.files.tokens import vocabulary_name
from tpo_lib.losses import OBJECTIVES
from tpo_lib.runs import runs
from tpo_lib.runs.presets import PRESETS
from tpo_lib.runs.processes import load_device
from tpo_lib.runs.run import ADAPTER, RunRecord, origin, read_run


def check_names(options) -> None:
    """Refuse what names nothing, or nothing that can be loaded, before anything is loaded or sampled."""
    scorers = ("reward", "judge", "second_judge")
    for kind in ("model", "policy", "ref", "guide", *scorers):
        name = getattr(options, kind, None)
        if name and not (kind in scorers and is_own(name)):
            folders.find("reference" if kind == "ref" else kind, name)
    for kind in ("pairs", "eval_pairs"):
        name = getattr(options, kind, None)
        if name and folders.is_path(name) and not Path(name).exists():
            raise folders.no_such_path("--" + kind.replace("_", "-"), name)


def model_name(options) -> str:
    """--model, or the preset's."""
    return options.model or PRESETS[options.preset].model


def reward_name(options, model: str) -> str:
    """The reward to score with: the preset's own scores what comes of the preset's model, and nothing else unasked."""
    preset = PRESETS[options.preset]
    usual, made_for = preset.stage.reward, preset.model
    if not options.reward and (usual is None or not _same(_start(model), made_for)):
        unfit = f"{usual} was made for {made_for} and may say nothing about {model}" if usual else "the preset has none"
        raise ValueError(f"--reward is missing: {unfit}; name one (any text classifier), or that one if it is meant")
    return options.reward or usual


def judge_name(options, model: str) -> str | None:
    """--judge, or the preset's where the model is the preset's too."""
    preset = PRESETS[options.preset]
    return options.judge or (preset.stage.judge if _same(_start(model), preset.model) else None)


def _start(model: str) -> str:
    """What a run's model was trained from; any other model itself."""
    record = read_run(model)
    return (record and record.model and record.model["name"]) or model


def _same(a: str, b: str) -> bool:
    return a == b or Path(a).resolve() == Path(b).resolve()


def policy(config, name: str) -> tuple:
    """What is trained, and a function that gives its reference: the start is loaded once more, or adapters leave it as it is."""
    device = load_device(config)
    start = load_model(name, device=device)
    if config.lora_rank:
        return runs.new_policy(config, start.requires_grad_(False)), lambda: start
    return start, frozen(name, device)


def check_adapters(config, name: str) -> None:
    """Refuse a rank or targets that the start model does not take, before it is loaded."""
    if config.lora_rank:
        from transformers import AutoModelForCausalLM

        settings = load_config(name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
        adapters.check(config.lora_rank, config.lora_targets, model)


def frozen(name: str | Path, device) -> Callable:
    """A function that loads a reference or guide; `fit` calls it when it needs the model, and may let it go."""
    return lambda: load_model(name, device=device).requires_grad_(False)


def guide(config, name: str | Path, reference: Callable) -> Callable:
    """A function that loads the guide, on the reference's tensors where policy and guide are adapters of it."""
    if config.lora_rank:
        return lambda: runs.load_guide(name, reference())
    return frozen(name, load_device(config))


def guided(config: TrainConfig, guide: str | None) -> TrainConfig:
    """The settings with the beta that --guide was trained with, by its record."""
    if not guide or "guide_beta" in config.hyper:
        return config
    try:
        record = read_run(guide)
    except ValueError as error:
        raise ValueError(f"{error}: pass --guide-beta") from error
    # only of a run against a reference is log pi_guide - log pi_ref a reward
    if record and "ref_logps" not in OBJECTIVES[record.config.loss_type].needs:
        raise ValueError(
            f"the guide {record.folder} is a run of {record.config.loss_type}, which reads no reference, so that it holds no "
            "token rewards: guide with a run of dpo, or say with --guide-beta how its log-ratio is to be read"
        )
    beta = record and record.config.hyperparameters().get("beta")
    if beta is None:
        raise ValueError(f"the guide {guide} does not say which beta it was trained with; pass it as --guide-beta")
    return replace(config, guide_beta=beta)


def reference(options, record: RunRecord | None) -> tuple[str, str]:
    """The reference of an evaluation and, in words, who said so: --model, the run's record, or else the preset."""
    known = record and record.reference
    if options.model:
        differs = f"; the run was started from {known['name'] or 'a model in memory'}" if known else ""
        return options.model, f"--model{differs}"
    if not known:
        return model_name(options), "the preset's: there is no record of what the model was started from"
    name, run = known["name"], f"the run in {record.folder}"
    if not name:
        raise ValueError(f"{run} was started from a model in memory: name its reference with --model FOLDER")
    if folders.is_path(name) and not Path(name).exists():
        fix = "put it back, or name the reference with --model"
        raise FileNotFoundError(f"{name}, which {run} was started from, is not there any more: {fix}")
    return name, "what the run was started from"


def check_reference(options, record: RunRecord | None, model, tokenizer) -> None:
    """Refuse a reference that has changed since the run, and a policy of another vocabulary."""
    # of the base of adapters that no reference was read beside, the record has a digest of another kind
    known = record and (record.start.get("reference") or record.start.get("start model"))
    if known and not options.model and origin(model)["sha256"] != known["sha256"]:
        changed = (
            f"{known['name']} is not what the run in {record.folder} was started from: its weights have changed since"
        )
        raise ValueError(f"{changed}; name the reference with --model")
    with suppress(OSError):  # a policy without a tokenizer of its own has the reference's
        if vocabulary_name(load_tokenizer(options.policy)) != vocabulary_name(tokenizer):
            other = f"{options.policy} has another vocabulary than the reference {tokenizer.name_or_path}"
            raise ValueError(f"{other}: there is no KL between them; name the model it was trained from with --model")


def recorded_guide(record: RunRecord, reference):
    """The guide of a run, or None where its record does not lead to the same model any more."""
    known = record.start.get("guide") or {"name": None}
    with suppress(OSError, ValueError):  # as adapters it fits the reference that it was trained from alone
        place = known["name"] and Path(known["name"])
        guide = place and (
            adapters.beside(reference, place) if place.name == ADAPTER else load_model(place, device=reference.device)
        )
        return guide if guide and origin(guide)["sha256"] == known["sha256"] else None
