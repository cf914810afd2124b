"""The flags of a training run: one for every setting and every hyperparameter, with the words and ranges of their records."""

from __future__ import annotations

import argparse
from dataclasses import Field, fields

from tpo_lib.config import TrainConfig, kind_of, known_hyperparameters, run_settings
from tpo_lib.fast import FastPath
from tpo_lib.files.own_code import title
from tpo_lib.losses import OBJECTIVES
from tpo_lib.parser import flag, number
from tpo_lib.runs import configs
from tpo_lib.runs.presets import PRESETS
from tpo_lib.runs.runs import check_taken, override
from tpo_lib.runs.settings import CompareConfig

TYPES = {"int": int, "float": float}
SEED = number(int, least=0, most=run_settings()["seed"].metadata["most"])
COMMON = [name for name in run_settings() if name not in configs.OF_A_RUN | {"seed"}]  # to all runs of a comparison
# flag of `compare` -> field of the stage
STAGE = {
    name: name for name in ("model", "pairs", "split", "eval_pairs", "eval_split", "prompts", "imdb", "reward", "judge")
}
STAGE |= {name: name for name in ("held_out_prompts", "samples_per_prompt", "max_new_tokens", "min_gap", "seed")}
STAGE |= {"num_prompts": "train_prompts", "second_judge": "second_judge"}


def hyperparameters() -> dict[str, str]:
    """{hyperparameter of any objective: words for its help, objectives that say the same together}."""
    found: dict[str, dict[str, list[str]]] = {}
    for objective, entry in OBJECTIVES.items():
        for name, h in entry.hyperparameters.items():
            default = "" if h.default is None else f", default {h.default}"
            found.setdefault(name, {}).setdefault(f"{h.words}{default}", []).append(objective)
    return {name: "; ".join(f"{', '.join(who)}: {say}" for say, who in words.items()) for name, words in found.items()}


def add_config(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """One flag for every setting of a run and every hyperparameter; the preset's value is the default.

    `several`: of the runs of a comparison, whose hyperparameters may have several values.
    """
    group = parser.add_argument_group("training run")
    add_hyperparameters(group, several=several)
    for name, setting in {**run_settings(), **fast_settings()}.items():
        if name == "cache_dir" or (several and name not in (*COMMON, *fast_settings())):
            continue  # one flag for every cache, among those of sampling
        _add_setting(group, name, setting)


def add_hyperparameters(group, *, several: bool = False) -> None:
    """One flag for every hyperparameter of any objective."""
    for name, words in hyperparameters().items():
        choices = known_hyperparameters()[name].choices
        kind = {"choices": choices} if choices else {"type": number(float), "metavar": "X"}
        group.add_argument(flag(name), help=words.replace("%", "%%"), **kind, **({"nargs": "+"} if several else {}))


def add_fast(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of FastPath but cache_dir: a comparison has its reference in memory, and logs its KL."""
    for name, setting in fast_settings().items():
        if name != "cache_dir":
            _add_setting(parser, name, setting)


def _add_setting(group, name: str, setting: Field) -> None:
    kind, words = kind_of(setting), setting.metadata["words"]
    more: dict = {"type": number(TYPES[kind]) if kind in TYPES else str, "metavar": "X"}
    if kind == "bool":
        more = {"action": argparse.BooleanOptionalAction}
    elif "choices" in setting.metadata:
        more = {"choices": tuple(setting.metadata["choices"]), "type": title if name == "loss_type" else str}
    group.add_argument(flag(name), help=f"{words} {_default(name)}".strip().replace("%", "%%"), **more)


def read_config(options: argparse.Namespace) -> TrainConfig:
    """The training run that the flags of `add_config` ask for, on the preset's.

    Raises:
        ValueError: a value is out of range, or its flag has no effect with this objective.
    """
    known = known_hyperparameters()
    given = {name: getattr(options, name) for name in {**known, **run_settings()}}
    config = override(PRESETS[options.preset].train, **given)
    check_taken(config.loss_type, [name for name in known if given[name] is not None])
    return config


def read_comparison(options: argparse.Namespace) -> CompareConfig:
    """The comparison that the flags of `compare` ask for; what they say counts before --config.

    Raises:
        ValueError: a value is out of range, a flag has no effect beside the others, or as `configs.read` and `configs.built`.
    """
    content = configs.read(options.config) if options.config else {}
    stage = {field: getattr(options, name) for name, field in STAGE.items()}
    stage |= {name: getattr(options, name) for name in ("max_length", "precision", "device")}  # of sampling, too
    content["stage"] = content.get("stage", {}) | _given(stage)
    if content["stage"].get("pairs"):
        sampling = [
            name for name in ("num_prompts", "samples_per_prompt", "min_gap") if getattr(options, name) is not None
        ]
        sampling += ["prompts"] if options.prompts == "model" else []
        if sampling:
            raise ValueError(
                f"{flag(sampling[0])} has no effect with pairs that are there: none are sampled; leave it out"
            )
    over = _given({name: getattr(options, name) for name in [*known_hyperparameters(), *COMMON]})
    content["train"] = content.get("train", {}) | over
    entries = content.get("objectives", [])
    if options.objectives:
        before = {name: [each for each in entries if configs.title_of(each) == name] for name in options.objectives}
        entries = [each for name in options.objectives for each in before[name] or [name]]
    changed = [
        {name: value for name, value in each.items() if name not in over} if isinstance(each, dict) else each
        for each in entries
    ]
    # settings that differed in what a flag says now are one
    content["objectives"] = [each for i, each in enumerate(changed) if each not in changed[:i] or each == entries[i]]
    content |= _given({"seeds": options.seeds, "evaluations": options.evaluations})
    if not (options.seeds or options.config) and options.seed is not None:
        content["seeds"] = [options.seed]
    return configs.built(content, options.config or "compare", PRESETS["pocket"].train)


def _given(values: dict) -> dict:
    return {name: value for name, value in values.items() if value is not None}


def read_fast(options: argparse.Namespace) -> FastPath:
    """How the run reads its models, by the flags of `add_config` or `add_fast`, and --cache-dir."""
    given = {name: getattr(options, name, None) for name in fast_settings()}
    return FastPath(**{name: value for name, value in given.items() if value is not None})


def fast_settings() -> dict[str, Field]:
    """The fields of FastPath, as `run_settings` has those of TrainConfig."""
    return {field.name: field for field in fields(FastPath)}


def _default(name: str) -> str:
    """The pocket preset's value of a field; `presets` tells those of the others."""
    if name in fast_settings():
        return f"(default: {fast_settings()[name].default})"
    value = getattr(PRESETS["pocket"].train, name)
    others = {getattr(preset.train, name) for preset in PRESETS.values()} - {value}
    known = [*([] if value is None else [f"default: {value}"]), *(["other presets: others"] if others else [])]
    return f"({'; '.join(known)})" if known else ""
