"""What the command line's flags share: errors of one line, numbers judged as they are read, and help from docstrings."""

from __future__ import annotations

import argparse
import inspect
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

from tpo_lib.config import CHOICES, LARGEST, PRESETS, TrainConfig, field_kinds, override
from tpo_lib.losses import OBJECTIVES

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
SEED = number(int, least=0, most=LARGEST["seed"])


def attributes(cls: type) -> dict[str, str]:
    """{field: words} from the Attributes section of a class's docstring, on one line each; "a, b: words" goes to both."""
    section = inspect.cleandoc(cls.__doc__).partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(words.split()) for names, words in entries for name in names.split(", ")}


def hyperparameters() -> dict[str, str]:
    """{hyperparameter of any objective: words for its help, objectives that say the same together}."""
    found: dict[str, dict[str, list[str]]] = {}
    for objective, entry in OBJECTIVES.items():
        for name, h in entry.hyperparameters.items():
            default = "" if h.default is None else f", default {h.default}"
            found.setdefault(name, {}).setdefault(f"{h.words}{default}", []).append(objective)
    return {name: "; ".join(f"{', '.join(who)}: {say}" for say, who in words.items()) for name, words in found.items()}


def add_config(parser: argparse.ArgumentParser) -> None:
    """One flag for every field of TrainConfig and every hyperparameter; the preset's value is the default."""
    group = parser.add_argument_group("training run")
    for name, words in hyperparameters().items():
        choices = next((e.hyperparameters[name].choices for e in OBJECTIVES.values() if name in e.hyperparameters), ())
        kind = {"choices": choices} if choices else {"type": number(float), "metavar": "X"}
        group.add_argument(_flag(name), help=words.replace("%", "%%"), **kind)
    words = attributes(TrainConfig)
    for name, (kind, _) in field_kinds().items():
        if name in hyperparameters() or name == "cache_dir":  # one flag for every cache, among those of sampling
            continue
        more: dict = {"type": number(kind) if kind in (int, float) else kind, "metavar": "X"}
        if kind is bool:
            more = {"action": argparse.BooleanOptionalAction}
        elif name in CHOICES:
            more = {"choices": [choice for choice in CHOICES[name] if choice is not None]}
        group.add_argument(
            _flag(name), help=f"{words[name].rstrip('.')} {_default(name)}".strip().replace("%", "%%"), **more
        )


def read_config(options: argparse.Namespace) -> TrainConfig:
    """The training run that the flags of `add_config` ask for, on the preset's.

    Raises:
        ValueError: a value is out of range, or its flag has no effect with this objective.
    """
    known = hyperparameters()
    given = {name: getattr(options, name) for name in {**known, **field_kinds()} if getattr(options, name) is not None}
    extra = {name: given.pop(name) for name in known if name in given and name not in field_kinds()}
    config = override(PRESETS[options.preset].train, **given, extra=extra or None)
    taken = OBJECTIVES[config.loss_type].hyperparameters
    for name in known:
        if name in {**given, **extra} and name not in taken:
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
