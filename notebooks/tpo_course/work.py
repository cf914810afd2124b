"""Your working copy of the chapters, `work/`: made from `notebooks/` once, and brought up to date after every pull.

python -m tpo_course.work                # = make lab, without opening it
python -m tpo_course.work --new 04       # the course's newest chapter 4; yours is kept in work/before/

Work there, and pulling never conflicts: git does not see the folder. A chapter in which no cell was changed follows the course;
one that you changed stays yours until you ask for the new one. Whatever is replaced and is not as the course gave it, be it
only run, is moved to `before/` first. `.course.json` in the folder says what was given.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tpo_course.notebooks import FOLDER, ROOT
from tpo_lib.cli import call
from tpo_lib.files.store import content_key, write_file
from tpo_lib.parser import Parser

WORK = ROOT / "work"
RECORD, BEFORE = ".course.json", "before"


@dataclass
class Told:
    """What became of the files, by name."""

    new: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)  # changed by the learner, and by the course
    moved: dict[str, Path] = field(default_factory=dict)  # name: where what the learner had is now


def bring(folder: Path = WORK, *, renew: Sequence[str] = (), source: Path = FOLDER) -> Told:
    """Make the working copy, or bring it up to date; `renew` holds beginnings of names to replace in any case.

    Raises:
        ValueError: there are no chapters, none begins with a name of `renew`, the record is not ours, or the folder is the
            course itself; nothing has been changed.
    """
    names = [path.name for path in sorted(source.glob("*.ipynb"))] + [path.name for path in sorted(source.glob("*.md"))]
    if not names:
        raise ValueError(f"{source} holds no chapters: work in a checkout of the repository")
    if folder.resolve() == source.resolve():
        raise ValueError(f"{folder} holds the course itself; name another folder for the working copy")
    if unknown := [each for each in renew if not any(name.startswith(each) for name in names)]:
        raise ValueError(f"no chapter is called {' or '.join(unknown)}; there are {', '.join(names)}")
    given, told = _read_record(folder / RECORD), Told()
    for name in names:
        there, now = folder / name, (source / name).read_bytes()
        mine = there.read_bytes() if there.exists() else None
        if (
            mine is not None
            and mine != now
            and not name.startswith(tuple(renew))
            and _is_theirs(mine, now, given.get(name))
        ):
            if name not in given or given[name]["cells"] != _cells(now):
                told.kept.append(name)
            continue
        if mine != now:
            if mine is not None and _digest(mine) != given.get(name, {}).get("file"):
                told.moved[name] = _aside(there)
            (told.new if mine is None else told.updated).append(name)
            write_file(there, now)
        given[name] = {"file": _digest(now), "cells": _cells(now)}
    write_file(folder / RECORD, json.dumps({"version": 1, "given": given}, indent=1) + "\n")
    return told


def _is_theirs(mine: bytes, now: bytes, given: dict[str, str] | None) -> bool:
    """Was a cell changed since the file was given? One that was only run is not theirs if the course has other cells by now."""
    if given is None or _digest(mine) == given["file"]:
        return given is None
    return _cells(mine) != given["cells"] or _cells(mine) == _cells(now)


def _read_record(path: Path) -> dict[str, dict[str, str]]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] == 1:
            return content["given"]
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(
        f"{path} is no record of this version: move it away; every chapter that differs then counts as yours"
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _cells(content: bytes) -> str:
    """The key of what is written in a notebook's cells, whatever came out of them; of any other file that of its bytes."""
    try:
        cells = json.loads(content)["cells"]
        return content_key([[c["cell_type"], "".join(c["source"]), c.get("attachments", {})] for c in cells])
    except (ValueError, TypeError, KeyError):
        return _digest(content)


def _aside(path: Path) -> Path:
    """Move a learner's file into `before/`, under a name that is free."""
    room = path.parent / BEFORE
    room.mkdir(exist_ok=True)
    numbered = (room / f"{path.stem}-{number}{path.suffix}" for number in range(1, 10**6))
    return path.rename(next(place for place in numbered if not place.exists()))


def say(told: Told, folder: Path) -> str:
    """What was done, one line each."""
    lines = [f"{folder}: {len(told.new)} files made"] if told.new else []
    for name in told.updated:
        moved = f"; what you had is now {told.moved[name]}" if name in told.moved else ""
        lines.append(f"{folder / name}: the course's newest{moved}")
    for name in told.kept:
        wanted = f"python -m tpo_course.work --new {name.partition('_')[0]}"
        lines.append(
            f"{folder / name}: yours is kept; the course has a newer one: {wanted} brings it, yours moves to {BEFORE}/"
        )
    return "\n".join(lines) or f"{folder}: up to date"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = Parser(prog="python -m tpo_course.work", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=str(WORK), help="where you work")
    parser.add_argument("--new", nargs="+", default=[], metavar="NAME", help="chapters to replace by the course's")
    parser.set_defaults(function=_bring)
    call(parser, arguments)


def _bring(options) -> None:
    folder = Path(options.folder)
    print(say(bring(folder, renew=options.new), folder))


if __name__ == "__main__":
    main()
