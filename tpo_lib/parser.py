"""Reading arguments: errors of one line, numbers judged as they are read, and whether there is room for what will be written."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

MANY = 10**7  # no count of ours is larger; a slip of the keyboard is


def flag(name: str) -> str:
    """The flag of an option: --max-tokens of max_tokens."""
    return "--" + name.replace("_", "-")


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


def number(kind: type, *, least: float = -math.inf, most: float = math.inf) -> Callable:
    """A type for `add_argument`: an int or a float, finite and in range."""

    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no {'whole ' if kind is int else ''}number") from None
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if not least <= value <= most:
            bound = f"at least {least}" if value < least else f"at most {most}"
            raise argparse.ArgumentTypeError(f"{text} must be {bound}")
        return value

    return read


COUNT = number(int, least=1, most=MANY)
SEVERAL = number(int, least=2, most=MANY)
GAP = number(float, least=0)
TEMPERATURE = number(float, least=0.01)  # below, logits overflow


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
