"""What the command line's flags share: errors of one line, numbers judged as they are read, and help from the records."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

from tpo_lib.config import PRESETS, TrainConfig, kind_of, known_hyperparameters, override, run_settings
from tpo_lib.losses import OBJECTIVES

TYPES = {"int": int, "float": float}
MANY = 10**7  # no count of ours is larger; a slip of the keyboard is


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line (the usage of sixty flags would hide them) and whose help shows defaults."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**{"formatter_class": _Defaults, "allow_abbrev": False} | kwargs)

    def error(self, message: str) -> None:
        """Leave with status 2."""
        self.exit(2, f"{self.prog}: {message} (--help lists what there is)\n")


class _Defaults(argparse.HelpFormatter):
    def _get_help_string(self, action):
        silent = any(action.default is none for none in (None, False, (), argparse.SUPPRESS))
        return action.help if silent or "(default" in action.help else f"{action.help} (default: %(default)s)"


def number(kind: type, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf) -> Callable:
    """A type for `add_argument`: an int or a float, finite and in range."""

    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no {'whole ' if kind is int else ''}number") from None
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        bounds = (
            (value > above, "greater than", above),
            (value >= least, "at least", least),
            (value <= most, "at most", most),
        )
        for fits, words, bound in bounds:
            if not fits:
                raise argparse.ArgumentTypeError(f"{text} must be {words} {bound}")
        return value

    return read


COUNT = number(int, least=1, most=MANY)
SEVERAL = number(int, least=2, most=MANY)
GAP = number(float, least=0)
TEMPERATURE = number(float, least=0.01)  # below, logits overflow
SEED = number(int, least=0, most=run_settings()["seed"].metadata["most"])


def hyperparameters() -> dict[str, str]:
    """{hyperparameter of any objective: words for its help, objectives that say the same together}."""
    found: dict[str, dict[str, list[str]]] = {}
    for objective, entry in OBJECTIVES.items():
        for name, h in entry.hyperparameters.items():
            default = "" if h.default is None else f", default {h.default}"
            found.setdefault(name, {}).setdefault(f"{h.words}{default}", []).append(objective)
    return {name: "; ".join(f"{', '.join(who)}: {say}" for say, who in words.items()) for name, words in found.items()}


def add_config(parser: argparse.ArgumentParser) -> None:
    """One flag for every setting of a run and every hyperparameter; the preset's value is the default."""
    group = parser.add_argument_group("training run")
    for name, words in hyperparameters().items():
        choices = known_hyperparameters()[name].choices
        kind = {"choices": choices} if choices else {"type": number(float), "metavar": "X"}
        group.add_argument(_flag(name), help=words.replace("%", "%%"), **kind)
    for name, setting in run_settings().items():
        if name == "cache_dir":  # one flag for every cache, among those of sampling
            continue
        kind, words = kind_of(setting), setting.metadata["words"]
        more: dict = {"type": number(TYPES[kind]) if kind in TYPES else str, "metavar": "X"}
        if kind == "bool":
            more = {"action": argparse.BooleanOptionalAction}
        elif "choices" in setting.metadata:
            more = {"choices": tuple(setting.metadata["choices"])}
        group.add_argument(_flag(name), help=f"{words} {_default(name)}".strip().replace("%", "%%"), **more)


def read_config(options: argparse.Namespace) -> TrainConfig:
    """The training run that the flags of `add_config` ask for, on the preset's.

    Raises:
        ValueError: a value is out of range, or its flag has no effect with this objective.
    """
    known = hyperparameters()
    config = override(
        PRESETS[options.preset].train, **{name: vars(options)[name] for name in {**known, **run_settings()}}
    )
    taken = OBJECTIVES[config.loss_type].hyperparameters
    for name in known:
        if getattr(options, name) is not None and name not in taken:
            has = ", ".join(map(_flag, taken)) or "none of these"
            raise ValueError(
                f"{_flag(name)} has no effect with {config.loss_type}, which takes {has}; leave it out or choose another "
                "--loss-type"
            )
    return config


def check_room(flag: str, path: str | Path, *, folder: bool = False, suffixes: tuple[str, ...] = ()) -> None:
    """Raise OSError or ValueError, naming flag and path, where a file (or folder) cannot be written later on."""
    path = Path(path)
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"{flag} {path} must end in {' or '.join(suffixes)}")
    if not folder and path.is_dir():
        raise IsADirectoryError(f"{flag} {path} is a folder; name a file in it")
    there = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if (folder or there != path) and not there.is_dir():
        raise NotADirectoryError(f"{flag} {path} cannot be made: {there} is not a folder")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{flag} {path} cannot be written: no permission in {there}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _default(name: str) -> str:
    """The presets' values of a field; nothing where they set none."""
    values = {preset: getattr(PRESETS[preset].train, name) for preset in PRESETS}
    if set(values.values()) == {None}:
        return ""
    if len(set(values.values())) == 1:
        return f"(default: {next(iter(values.values()))})"
    return f"(default: {', '.join(f'{preset} {value}' for preset, value in values.items())})"
