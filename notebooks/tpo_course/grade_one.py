"""Judges one notebook in a process of its own, for `grade`: what a learner wrote runs here and nowhere else.

python -m tpo_course.grade_one NOTEBOOK SKIP MEMORY [PROGRESS]

Writes one JSON object a line to what was standard output, and lets nothing else of the notebook write there: first the tasks
with their points, then of every task {"begins": key} and its verdict. SKIP is how many tasks an earlier process has judged,
MEMORY a limit in GiB, PROGRESS the record of answers that were given in widgets.
"""

import ast
import html
import json
import linecache
import os
import pkgutil
import socket
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from tpo_course import checking, handed_in, progress
from tpo_course.cards import plain
from tpo_course.exercise import Task, Verdict
from tpo_course.handed_in import ANSWER, Answer, HandedIn, Unreadable
from tpo_course.kinds import Lettered
from tpo_course.quiz import Quiz

GIB = 2**30
LONGEST = 600  # characters of a message


def tasks_of(chapter: str) -> dict[str, Task | Quiz]:
    """The tasks of a chapter by name, and its quiz.

    Raises:
        Unreadable: the course has no such chapter.
    """
    try:
        module = pkgutil.resolve_name(f"tpo_course.exercises.{chapter}")
    except (ImportError, AttributeError):
        raise Unreadable(f"imports the exercises {chapter!r}, which this course has not: of another version?") from None
    return {**module.chapter.tasks, "quiz": module.quiz}


def points_of(task: Task | Quiz) -> int:
    """What a right answer earns: the difficulty of a task, one for every question of a quiz, 0 where only a reader can tell."""
    if isinstance(task, Quiz):
        return len(task.questions)
    return 0 if task.kind == "open_ended" else task.difficulty


def judge(book: HandedIn, name: str, chapter: str, task: Task | Quiz, kept: dict[str, dict]) -> dict[str, Any]:
    """The verdict on the answer in the notebook, else on the one that was given in a widget and is in the record `kept`."""
    answer, written = book.answer(name, chapter), ""
    if answer.broken:
        found = Verdict("wrong", html.escape(answer.broken))
    else:
        arguments, named, problem = _arguments(book, answer, name)
        if problem is None and not arguments and (said := kept.get(f"{chapter}.{name}", {}).get("answer")):
            arguments = (said.split() if isinstance(task, Lettered) and task.many else said,)
        written = "" if callable(next(iter(arguments), None)) else str(next(iter(arguments), ""))
        found = Verdict("wrong", problem) if problem else _judged(task, arguments, named)
    earned = points_of(task) * (
        found.status == "correct" or (found.status == "wrong" and getattr(task, "kind", "") == "predict")
    )
    if isinstance(task, Quiz) and found.status == "wrong":
        earned = points_of(task) - len(found.mistakes)
    return {
        "status": found.status,
        "points": earned,
        "mistakes": list(found.mistakes),
        "message": plain(found.message)[:LONGEST],
        "answer": written if getattr(task, "kind", "") == "open_ended" else written[:LONGEST],
    }


def _judged(task: Task | Quiz, arguments: tuple, named: dict) -> Verdict:
    try:
        return task.judge(*(arguments or (...,)), **named)
    except BaseException as error:  # a learner's code may raise anything, SystemExit too; the next task is still judged
        return Verdict("wrong", f"The checker was called as it cannot be: {_said(error)}")


def _arguments(book: HandedIn, answer: Answer, name: str) -> tuple[tuple, dict, str | None]:
    """What the checker is to be called with, positional and named; or a sentence on what keeps the answer from being run."""
    if not answer.cell:
        return (), {}, None
    last = handed_in.call_of(answer) if answer.call else None
    wanted = handed_in.uses(last) if last else {name}
    space: dict[str, Any] = {"__name__": "__main__"}
    try:
        for statement in book.needed(wanted, answer.place + (last is None)):
            _execute(statement.tree, statement.cell, space)
        if last is None:
            return (space[name],), {}, None
        _execute(last, answer.cell, space)
        return *space[ANSWER], None
    except BaseException as error:  # the same
        return (), {}, f"Cell {_cell(error.__traceback__) or answer.cell} raised {_said(error)}"


def _execute(tree: ast.stmt, cell: int, space: dict) -> None:
    exec(compile(ast.Module([tree], []), f"<cell {cell}>", "exec"), space)


def _cell(trace: TracebackType | None) -> str:
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace)]
    return next((name[6:-1] for name in reversed(files) if name.startswith("<cell ")), "")


def _said(error: BaseException) -> str:
    text = f"{type(error).__name__}: {html.escape(str(error)[:LONGEST])}"
    return text + checking.where(error, None)


# ---- the process


def _limit(memory: float) -> None:
    """No network, `memory` GiB above what this process has now, files of at most a GiB."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("there is no network while a notebook is graded")

    socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
    try:
        import resource
    except ImportError:  # time is limited, memory is not
        return
    resource.setrlimit(resource.RLIMIT_FSIZE, (GIB, GIB))
    pages = Path("/proc/self/statm")
    if pages.exists():
        most = int(pages.read_text().split()[0]) * resource.getpagesize() + int(memory * GIB)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    """The process: see the top of this file."""
    path, skip, memory, *record = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silent, stream)

    def tell(**what: Any) -> None:
        print(json.dumps(what), file=out, flush=True)

    try:
        book = handed_in.read(Path(path))
        every = [(c, name, task) for c in dict.fromkeys(book.checkers.values()) for name, task in tasks_of(c).items()]
        kept = progress.read(record[0]) if record else {}
    except (Unreadable, ValueError) as error:
        return tell(reason=str(error))
    tell(
        tasks=[
            {"task": f"{c}.{name}", "kind": getattr(task, "kind", "quiz"), "of": points_of(task)}
            for c, name, task in every
        ]
    )
    for number, source in enumerate(book.cells, 1):
        linecache.cache[f"<cell {number}>"] = (len(source), None, source.splitlines(True), f"<cell {number}>")
    _limit(float(memory))
    for chapter, name, task in every[int(skip) :]:
        tell(begins=f"{chapter}.{name}")
        tell(**judge(book, name, chapter, task, kept))


if __name__ == "__main__":
    main()
