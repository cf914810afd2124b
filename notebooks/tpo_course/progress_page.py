"""How far you are: chapters, tasks done, tries, mistakes met, what is left, in one page.

python -m tpo_course.progress_page [--record work/.progress.json] [--output progress.html]

In a notebook: `from tpo_course.progress_page import progress`, then `progress()`. It reads the record that `progress` keeps
beside the notebooks and nothing else; minutes are those that the cards give.
"""

import html
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tpo_course import progress as records
from tpo_course.exercise import Task
from tpo_course.notebooks import course
from tpo_course.work import WORK
from tpo_lib.cli import call
from tpo_lib.files.store import write_file
from tpo_lib.parser import Parser

DONE = ("correct", "assessed")
SAID = {
    "correct": "✓ done",
    "assessed": "✓ done",
    "wrong": "✗ not yet",
    "predicted": "● predicted",
    "answered": "● written",
}
STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#1a1a1a;background:#fff}"
    "table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.2em .8em;border-bottom:1px solid #999}"
    "caption{text-align:left;font-weight:bold;padding:.6em 0}"
)


@dataclass(frozen=True)
class Chapter:
    """A chapter's tasks and what the record says of them, task by task; {} of one that was not tried."""

    name: str  # of the notebook, without ".ipynb"
    tasks: dict[str, Task]
    found: dict[str, dict]

    @property
    def done(self) -> list[Task]:
        """The tasks that are done; a prediction is, once it was made."""
        return [
            t
            for n, t in self.tasks.items()
            if (s := self.found[n].get("status")) in DONE or (s and t.kind == "predict")
        ]

    @property
    def left(self) -> list[Task]:
        """The others."""
        return [task for task in self.tasks.values() if task not in self.done]


@dataclass(frozen=True)
class Page:
    """The page; shown in a notebook when it is the last expression of a cell."""

    chapters: list[Chapter]

    def __repr__(self) -> str:
        lines = [f"{c.name}: {len(c.done)} of {len(c.tasks)} done, {_minutes(c.left)} left" for c in self.chapters]
        return "\n".join([_overall(self.chapters), *lines])

    def _repr_html_(self) -> str:
        return f"<section><p>{_overall(self.chapters)}</p>{_table(self.chapters)}{''.join(map(_detail, self.chapters))}</section>"

    def html(self) -> str:
        """A whole HTML page, without scripts and without a network."""
        head = f'<meta charset="utf-8"><title>Your progress</title><style>{STYLE}</style>'
        body = f"<body><h1>Your progress</h1>{self._repr_html_()}</body>"
        return f'<!doctype html>\n<html lang="en"><head>{head}</head>{body}</html>\n'


def progress(record: str | Path | None = None) -> Page:
    """How far you are; of another record than this notebook's if one is named.

    Raises:
        ValueError: the file is no record of ours.
    """
    kept, chapters = records.read(record) if record else records.tasks(), []
    for name, module in _modules().items():
        tasks = pkgutil.resolve_name(f"tpo_course.exercises.{module}").chapter.tasks
        chapters.append(Chapter(name, tasks, {each: kept.get(task.key, {}) for each, task in tasks.items()}))
    return Page(chapters)


def _modules() -> dict[str, str]:
    """{notebook: its module of exercises}, in the course's order; of an installed course without notebooks the modules alone."""
    from tpo_course import exercises

    there = {info.name for info in pkgutil.iter_modules(exercises.__path__)}
    found = {path.stem: path.stem.partition("_")[2] for path in course()} or {name: name for name in sorted(there)}
    return {name: module for name, module in found.items() if module in there}


def _minutes(tasks: Sequence[Task]) -> str:
    return f"{sum(task.minutes for task in tasks)} minutes"


def _overall(chapters: list[Chapter]) -> str:
    done, left = ([task for c in chapters for task in part(c)] for part in (lambda c: c.done, lambda c: c.left))
    return f"{len(done)} of {len(done) + len(left)} tasks done; those left take about {_minutes(left)}."


def _table(chapters: list[Chapter]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{c.name}</th><td><progress value="{len(c.done)}" max="{len(c.tasks)}" aria-label="{c.name}">'
        f"</progress> {len(c.done)} of {len(c.tasks)}</td><td>{_tries(c)}</td><td>{_minutes(c.left)}</td></tr>"
        for c in chapters
    )
    head = "".join(f'<th scope="col">{word}</th>' for word in ("chapter", "done", "tries", "left"))
    return f"<table><caption>Chapters</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _tries(chapter: Chapter) -> int:
    return sum(one.get("tries", 0) for one in chapter.found.values())


def _detail(chapter: Chapter) -> str:
    rows = "".join(
        f'<tr><th scope="row">{task.title}</th><td>{SAID.get(chapter.found[name].get("status"), "○ to do")}</td>'
        f"<td>{chapter.found[name].get('tries', 0)}</td><td>{_met(chapter.found[name])}</td><td>{task.minutes}</td></tr>"
        for name, task in chapter.tasks.items()
    )
    words = ("task", "where you are", "tries", "mistakes met", "minutes")
    head = "".join(f'<th scope="col">{word}</th>' for word in words)
    table = f"<table><caption>{chapter.name}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<details><summary>{chapter.name}, task by task</summary>{table}</details>"


def _met(found: dict) -> str:
    return html.escape(", ".join(name.replace("_", " ") for name in found.get("mistakes", ())))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = Parser(prog="python -m tpo_course.progress_page", description=__doc__.splitlines()[0])
    parser.add_argument("--record", default=str(WORK / records.NAME), metavar="FILE", help="what was written down")
    parser.add_argument("--output", default="progress.html", metavar="FILE", help="page to write")
    parser.set_defaults(function=_write)
    call(parser, arguments)


def _write(options) -> None:
    if not Path(options.record).is_file():
        raise FileNotFoundError(
            f"--record {options.record} is not there: it is made when a checker is called in a notebook"
        )
    page = progress(options.record)
    write_file(options.output, page.html())
    print(f"{page!r}\n{options.output}")


if __name__ == "__main__":
    main()
