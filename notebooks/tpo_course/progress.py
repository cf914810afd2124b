"""What a learner did: one record a task, kept in memory and in a small file beside the notebooks.

The file is `.progress.json` in the folder a notebook runs in, UTF-8, one JSON object:

    {"version": 1, "tasks": {"dpo.dpo_loss": {...}, "token_mdp.potential": {...}}}

A task's key is "chapter.name": the chapter as its module in `tpo_course/exercises/` is called, the name as in the notebook
(`check.dpo_loss`). Of each task it holds, always all of these:

    kind      "function", "predict", "choose", "order", "complete", "break_it", "name_the_bug" or "open_ended"
    status    "correct", "wrong", "predicted" (recorded, the truth not seen yet), "answered" (open-ended, before its points)
              or "assessed" (open-ended, with points). "correct" stays, whatever is tried after it.
    tries     int >= 1: how often an answer was checked. A stub ("not attempted") is no try and makes no record.
    mistakes  list of the names of the misconceptions that were recognised (`### mistake: NAME` in exercises/CHAPTER.md, or the
              NAME of a wrong option), every name once, in the order of their first time
    answer    the last answer as text, for every kind but "function" (""); of an open-ended task what was written
    points    points given to oneself (open-ended, else null), and
    of        the most there are
    first, last  when the first and the last try were made: seconds since 1970, UTC, whole

Readers ignore fields that they do not know; a change that would break them raises `version`. Nothing else is written down: no
name, no machine, no code. Nothing is written outside a notebook (tests, scripts), nor where the folder cannot be written to; the
environment variable TPO_PROGRESS names another file, and "off" keeps all in memory.

>>> record("dpo.dpo_loss", kind="function", status="wrong", mistakes=("swapped",))
>>> record("dpo.dpo_loss", kind="function", status="correct")
>>> done = tasks()["dpo.dpo_loss"]
>>> done["status"], done["tries"], done["mistakes"]
('correct', 2, ['swapped'])
>>> forget()
"""

import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from tpo_lib.files.store import write_file

VERSION = 1
NAME = ".progress.json"
KINDS = ("function", "predict", "choose", "order", "complete", "break_it", "name_the_bug", "open_ended")
STATUSES = ("correct", "wrong", "predicted", "answered", "assessed")

_memory: dict[str, dict] = {}


def file() -> Path | None:
    """Where the record is kept; None if in memory alone."""
    told = os.environ.get("TPO_PROGRESS")
    if told:
        return None if told == "off" else Path(told)
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if not hasattr(shell, "kernel"):  # a script, a test, a terminal: nobody works through a notebook
        return None
    return Path.cwd() / NAME


def read(path: str | Path) -> dict[str, dict]:
    """The tasks of a progress file by key; {} if there is none.

    Raises:
        ValueError: the file is not one of ours, or of a later version; names the file and the fix.
    """
    path = Path(path)
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, found = content["version"], content["tasks"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no record of progress ({error!r}): move it away to start a new one") from error
    if version != VERSION:
        raise ValueError(f"{path} is of version {version}, this is {VERSION}: update the course, or move the file away")
    return found


def tasks() -> dict[str, dict]:
    """All that is known of this learner, by key: what the file holds, and what this session did."""
    path = file()
    return (read(path) if path else {}) | _memory


def record(
    key: str,
    *,
    kind: str,
    status: str,
    mistakes: Iterable[str] = (),
    answer: str = "",
    points: int | None = None,
    of: int | None = None,
    again: bool = True,
) -> None:
    """Add one try to what is known of a task; `again=False` changes the last try (its truth was seen, its points were given).

    Raises:
        ValueError: there is no such kind or status.
    """
    if kind not in KINDS or status not in STATUSES:
        raise ValueError(f"{key}: kind {kind!r} and status {status!r}; there are {KINDS} and {STATUSES}")
    path, now = file(), int(time.time())
    try:
        kept = read(path) if path else {}
    except ValueError as error:  # the learner's work comes first: say it once a try, and go on in memory
        print(error)
        path, kept = None, {}
    old = kept.get(key) or _memory.get(key) or {"tries": 0, "mistakes": [], "first": now, "status": status}
    _memory[key] = {
        "kind": kind,
        "status": "correct" if old["status"] == "correct" else status,
        "tries": old["tries"] + (again or not old["tries"]),
        "mistakes": [*old["mistakes"], *(name for name in dict.fromkeys(mistakes) if name not in old["mistakes"])],
        "answer": answer,
        "points": points,
        "of": of,
        "first": old["first"],
        "last": now,
    }
    if path is not None and os.access(path.parent, os.W_OK):
        everything = {"version": VERSION, "tasks": kept | {key: _memory[key]}}
        write_file(path, json.dumps(everything, indent=1, ensure_ascii=False) + "\n")


def forget(path: str | Path | None = None) -> None:
    """Forget this session, and delete the file if one is named."""
    _memory.clear()
    if path is not None:
        Path(path).unlink(missing_ok=True)
