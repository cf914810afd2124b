"""A comparison in a file, YAML or TOML: written by every one, so that it repeats, and read by `compare --config`.

    stage: {model: gpt2, pairs: pairs.jsonl}          # fields of StageConfig; only the model must be there
    train: {lr: 1.0e-5, beta: [0.05, 0.1]}            # settings and hyperparameters of all objectives
    objectives: [dpo, {loss_type: tdpo2, alpha: 0.5}, my.py:ipo]
    seeds: [0, 1, 2]
    evaluations: 5

Several values of a hyperparameter are a grid over the objectives that take it. What stands at an objective counts before what
stands under train. An objective FILE.py:NAME is executed.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, fields, replace
from pathlib import Path
from typing import Any

import yaml

import tpo_lib
from tpo_lib.config import TrainConfig, check_setting, kind_of, known_hyperparameters, run_settings
from tpo_lib.files import folders
from tpo_lib.files.own_code import is_own, title
from tpo_lib.losses import OBJECTIVES
from tpo_lib.runs import own, runs
from tpo_lib.runs.prompts import SOURCES
from tpo_lib.runs.settings import CompareConfig, labels
from tpo_lib.runs.sft import SftConfig
from tpo_lib.runs.stage import OWN, StageConfig

PARTS = {"stage": dict, "train": dict, "objectives": list, "seeds": list, "evaluations": int}
LEAST = {"evaluations": 1, "max_new_tokens": 1, "max_length": 2, "sampled_together": 1, "max_pairs": 1}
LEAST |= {"samples_per_prompt": 2, "held_out_samples": 2, "held_out_prompts": 1, "max_held_out_pairs": 1}
LEAST |= {"evaluation_samples": 1}
OF_A_RUN = {"loss_type", "output_dir", "eval_every", "save_every"}  # settings that a comparison decides itself
EVALUATIONS = 5


def read(path: str | Path) -> dict:
    """A file's content by parts, all of which may be missing; OSError or ValueError, which name the place, where it is none."""
    path = Path(path)
    if path.suffix not in (".yaml", ".yml", ".toml"):
        raise ValueError(f"--config {path} must end in .yaml or .toml")
    try:
        text = path.read_text("utf-8")
        content = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (yaml.YAMLError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings; it has {', '.join(PARTS)}, each with what is in it")
    _known(str(path), content, PARTS)
    for name, kind in PARTS.items():
        if name in content and (not isinstance(content[name], kind) or isinstance(content[name], bool)):
            words = {dict: "names with values", list: "a list", int: "a whole number"}[kind]
            raise ValueError(f"{path}: {name}={content[name]!r} must be {words}")
    return content


def own_objectives(content: Mapping) -> list[str]:
    """The objectives FILE.py:NAME that a file's content names."""
    return [name for name in map(_named, content.get("objectives", ())) if isinstance(name, str) and is_own(name)]


def built(content: Mapping, place: str, base: TrainConfig) -> CompareConfig:
    """The comparison of a file's content.

    Args:
        place: what errors call it.
        base: settings of a run where the content says nothing.

    Raises:
        ValueError: a key is unknown or a value is none it may have; place, key, value and what is known are named.
    """
    common = _typed(f"{place}: train", content.get("train", {}), run_settings(), known_hyperparameters())
    seeds = tuple(content.get("seeds", ()))
    for seed in seeds:
        _checked(f"{place}: seeds", "seed", seed, run_settings()["seed"])
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{place}: seeds {' '.join(map(str, seeds))} name one twice; leave it out")
    evaluations = content.get("evaluations", EVALUATIONS)
    if evaluations < 1:
        raise ValueError(f"{place}: evaluations={evaluations} must be at least 1")
    entries = content.get("objectives") or []
    if not entries:
        known = ", ".join(name for name, entry in OBJECTIVES.items() if entry.paired)
        raise ValueError(f"{place}: objectives are missing; name some of {known}, or FILE.py:NAME of your own")
    settings = [each for entry in entries for each in _settings(place, entry, common, base)]
    taken = {name for each in settings for name in OBJECTIVES[each.loss_type].hyperparameters}
    if idle := sorted(name for name in common if name in known_hyperparameters() and name not in taken):
        who = ", ".join(dict.fromkeys(each.loss_type for each in settings))
        raise ValueError(f"{place}: {idle[0]}={common[idle[0]]!r} has no effect, none of {who} takes it; leave it out")
    if len(seeds) == 1:
        settings, seeds = [replace(each, seed=seeds[0]) for each in settings], ()
    labels(settings)  # no two are the same
    stage = _stage(place, content.get("stage", {}), settings[0])
    return CompareConfig(stage, tuple(settings), evaluations, seeds)


def written(config: CompareConfig) -> str:
    """A comparison as YAML: `built(read(...))` of it is the same, wherever it is read on this machine."""
    all_settings = [each.to_dict() for each in config.objectives]
    common = {name: all_settings[0][name] for name in run_settings() if name not in OF_A_RUN}
    common = {name: value for name, value in common.items() if all(each[name] == value for each in all_settings)}
    entries = []
    for each, mine in zip(config.objectives, all_settings, strict=True):
        apart = {k: mine[k] for k in run_settings() if k not in common and k not in OF_A_RUN}
        spec = own.FILES.get(each.loss_type, each.loss_type)
        entries.append({"loss_type": spec} | each.hyperparameters() | apart)
    own_seed = common.pop("seed", None)  # None: they differ, and each says its own
    seeds = list(config.seeds) or [own_seed]
    stage = {name: _absolute(name, value) for name, value in asdict(config.stage).items()}
    content = {"stage": stage, "train": common, "objectives": entries}
    content |= {"seeds": seeds} if seeds != [None] else {}
    head = (
        f"# tpo_lib {tpo_lib.__version__}; python -m tpo_lib compare --config THIS_FILE --output-dir DIR repeats it\n"
    )
    return head + yaml.safe_dump(content | {"evaluations": config.evaluations}, sort_keys=False, allow_unicode=True)


def recorded(known: Mapping) -> CompareConfig | None:
    """A comparison by its `dataclasses.asdict`; fields that it lacks have their defaults. None of another version's."""
    try:
        stage = dict(known["stage"])
        stage["sft"] = stage.get("sft") and SftConfig(**stage["sft"])
        settings = tuple(TrainConfig(**each) for each in known["objectives"])
        return CompareConfig(StageConfig(**stage), settings, known["evaluations"], tuple(known.get("seeds", ())))
    except (TypeError, ValueError, KeyError):
        return None


def _settings(place: str, entry: Any, common: Mapping, base: TrainConfig) -> Iterator[TrainConfig]:
    """The settings of one entry under objectives: all combinations of the values of its hyperparameters."""
    name = _named(entry)
    if not isinstance(name, str):
        raise ValueError(f"{place}: objectives has {entry!r}; write a name, or {{loss_type: NAME, beta: 0.1}}")
    if is_own(name) and title(name) not in OBJECTIVES:
        own.load_objective(name)
    name = title(name)
    known = [each for each, record in OBJECTIVES.items() if record.paired]
    if name not in known:
        raise ValueError(
            f"{place}: objectives names {name!r}; choose from {', '.join(known)}, or FILE.py:NAME of your own"
        )
    taken = OBJECTIVES[name].hyperparameters
    given = {key: value for key, value in entry.items() if key != "loss_type"} if isinstance(entry, Mapping) else {}
    given = _typed(f"{place}: {name}", given, run_settings(), taken)
    given = {key: value for key, value in common.items() if key in taken or key in run_settings()} | given
    for values in itertools.product(*(value if isinstance(value, list) else [value] for value in given.values())):
        chosen = dict(zip(given, values, strict=True))
        try:
            made = runs.override(base, loss_type=name, hyper={})
            made = replace(
                made, **{key: value for key, value in chosen.items() if value is not None or key in run_settings()}
            )
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        guided = "guide_logps" in OBJECTIVES[name].needs and made.hyperparameters().get("guide_beta", 0) is None
        made = replace(made, guide_beta=runs.guide_settings(made).beta) if guided else made
        yield replace(made, hyper=made.hyperparameters())  # defaults too: what is recorded says it all


def _stage(place: str, given: Mapping, first: TrainConfig) -> StageConfig:
    known = {each.name: each for each in fields(StageConfig)}
    _known(f"{place}: stage", given, known)
    if not given.get("model"):
        raise ValueError(f"{place}: stage has no model; name one (--model)")
    stage = dict(given)
    if stage.get("sft") is not None:
        if not isinstance(stage["sft"], Mapping):
            raise ValueError(f"{place}: stage.sft={stage['sft']!r} must be names with values")
        sft = {each.name: each for each in fields(SftConfig)}
        _known(f"{place}: stage.sft", stage["sft"], sft)
        sft = {name: _checked(f"{place}: stage.sft", name, value, sft[name]) for name, value in stage["sft"].items()}
        try:
            stage["sft"] = SftConfig(**sft)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{place}: stage.sft: {error}") from error
    stage |= {
        name: _checked(f"{place}: stage", name, value, known[name]) for name, value in stage.items() if name != "sft"
    }
    stage = {name: _absolute(name, value) for name, value in stage.items()}  # it is the same from any folder
    same = {"max_length": first.max_length, "precision": first.precision, "device": first.device}
    stage = StageConfig(**OWN | same | stage)
    if idle := [name for name in ("split", "eval_pairs", "eval_split") if getattr(stage, name) and not stage.pairs]:
        raise ValueError(f"{place}: {idle[0]}={getattr(stage, idle[0])!r} has no effect without pairs; leave it out")
    if stage.imdb and stage.prompts != "imdb" and not stage.sft:
        raise ValueError(f"{place}: imdb={stage.imdb!r} has no effect without prompts imdb; leave it out")
    if not stage.pairs and not stage.train_prompts:
        raise ValueError(f"{place}: stage.train_prompts=0 must be at least 1, where pairs are sampled")
    if stage.pairs is None and stage.reward is None:
        fix = "a reward says which completion is chosen; name one (--reward), or pairs that are there (--pairs)"
        raise ValueError(f"{place}: reward is missing: without pairs they are sampled from the model, and {fix}")
    return stage


def _typed(place: str, given: Mapping, settings: Mapping[str, Field], taken: Mapping) -> dict:
    """Settings and hyperparameters, of which the latter may have several values, with their types checked."""
    known = [name for name in settings if name not in OF_A_RUN | {"hyper"}]
    _known(place, given, [*known, *taken])
    made = {}
    for name, value in given.items():
        if name in settings:
            made[name] = _checked(place, name, value, settings[name])
            continue
        several = value if isinstance(value, list) else [value]
        numbers = [_number(each) if not taken[name].choices else each for each in several if each is not None]
        for each in numbers:
            try:
                taken[name].check(name, each)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
        if len(set(numbers)) < len(numbers) or not several:
            raise ValueError(f"{place}: {name}={value!r} names a value twice, or none; leave it out")
        made[name] = numbers if isinstance(value, list) else next(iter(numbers), None)
    return made


def _checked(place: str, name: str, value: Any, field: Field) -> Any:
    """A value of a dataclass's field, where it has that type and range."""
    kind = kind_of(field)
    value = _number(value) if kind == "float" else value
    good = {"int": int, "float": int | float, "str": str, "bool": bool}[kind]
    missing = value is None and field.type.endswith("| None")
    if not missing and (not isinstance(value, good) or (isinstance(value, bool) and kind != "bool")):
        words = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false"}[kind]
        raise ValueError(f"{place}.{name}={value!r} must be {words}")
    try:
        if "words" in field.metadata:
            check_setting(field, value)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if kind in ("int", "float") and value is not None and not value >= LEAST.get(name, 0):
        raise ValueError(f"{place}.{name}={value!r} must be at least {LEAST.get(name, 0)}")
    return value


def _number(value: Any) -> Any:
    """YAML takes 1e-5, without a point, for a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _known(place: str, given: Mapping, known) -> None:
    if unknown := [name for name in given if name not in known]:
        raise ValueError(
            f"{place} has {unknown[0]!r} ({given[unknown[0]]!r}), which is not known; it takes {', '.join(known)}"
        )


def title_of(entry: Any) -> Any:
    """What the objective of an entry is called in records."""
    return title(name) if isinstance(name := _named(entry), str) else name


def _named(entry: Any) -> Any:
    return entry.get("loss_type") if isinstance(entry, Mapping) else entry


def _absolute(name: str, value: Any) -> Any:
    """Names of files and folders with their whole path, so that they are found from elsewhere too."""
    named = ("model", "reward", "judge", "second_judge", "prompts", "imdb", "pairs", "eval_pairs")
    if name not in named or value is None or (name == "prompts" and value in SOURCES):
        return value
    path, colon, function = value.rpartition(":") if is_own(value) else (value, "", "")
    there = folders.is_path(path) or Path(path).exists()
    return f"{Path(path).resolve()}{colon}{function}" if there else value
