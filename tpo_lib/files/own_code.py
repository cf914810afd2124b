"""Code of your own: what FILE.py:NAME on the command line stands for.

The file is executed as it stands. Nothing else ever is: a checkpoint, a table or a model that names such a file does not load it.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


def is_own(name: str | None) -> bool:
    """Whether a name on the command line is one of FILE.py:NAME."""
    return name is not None and name.rpartition(":")[0].endswith(".py")


def title(name: str) -> str:
    """FILE.py:NAME without folders: what it is called in records, wherever its file lies."""
    return Path(name).name if is_own(name) else name


def load(spec: str) -> tuple[object, str]:
    """What the file holds by that name, and the file's SHA-256; OSError or ValueError where it fails or holds none."""
    path, name = Path(spec.rpartition(":")[0]), spec.rpartition(":")[2]
    if not path.is_file():
        raise FileNotFoundError(f"{spec}: there is no file {path}")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    module = ModuleType(f"own_{path.stem}_{digest[:12]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses look for it
    try:
        exec(compile(content, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} fails when it is executed: {_told(error, path)}") from error
    if name not in vars(module):
        there = ", ".join(key for key in vars(module) if not key.startswith("_"))
        raise ValueError(f"{path} has no {name!r}; it has {there or 'nothing'}")
    return vars(module)[name], digest


def guarded(spec: str, fn: Callable) -> Callable:
    """The function; what it raises becomes a ValueError that names it and its line."""

    @functools.wraps(fn, updated=())
    def call(*args, **kwargs):
        try:
            return fn(*args, **kwargs)
        except Exception as error:
            raise ValueError(f"{spec} raised {_told(error, Path(spec.rpartition(':')[0]))}") from error

    return call


def _told(error: BaseException, path: Path) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    lines += [error.lineno] if isinstance(error, SyntaxError) else []
    return f"{type(error).__name__}{f' in line {lines[-1]}' if lines else ''}: {error}"
