"""Write docs/common_errors.md from what the checkers know: python docs/common_errors.py"""

from __future__ import annotations

from pathlib import Path

from tpo_course import notebooks
from tpo_course.cards import plain
from tpo_course.exercise import Task
from tpo_course.grade_one import tasks_of

PAGE = Path(__file__).with_suffix(".md")
HEAD = """\
# The errors people make, task by task

What the course's checkers recognise, and what they say of it, by the names that `python -m tpo_lib grade` counts. Written by
`python docs/common_errors.py`; the words are those of `notebooks/tpo_course/exercises/`. They are half of the answers: no page
for a class before it has tried.
"""


def errors(task: Task) -> dict[str, str]:
    """{name: what is said of it} of the wrong answers that a task knows."""
    if task.kind == "function":
        return {mistake.name: mistake.message for mistake in task.mistakes}
    found = {choice.name: choice.why for choice in getattr(task, "choices", ()) if choice.why}
    right = getattr(task, "right", None) or {getattr(task, "truth", None)}
    found = {name: why for name, why in found.items() if task.kind not in ("order", "break_it") and name not in right}
    known = getattr(task, "wrong", None) or getattr(task, "early", None) or {}
    return found | {name: message for name, (_, message) in known.items()}


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD]
    for path in notebooks.course():
        tasks = {} if path.stem.startswith("00") else tasks_of(path.stem.partition("_")[2])
        listed = [_entry(task, known) for name, task in tasks.items() if name != "quiz" and (known := errors(task))]
        parts += [f"## [{path.stem}](../notebooks/{path.name})\n", *listed] if listed else []
    return "\n".join(parts)


def _entry(task: Task, known: dict[str, str]) -> str:
    lines = [f"- {name.replace('_', ' ')}: {' '.join(plain(said).split())}" for name, said in known.items()]
    return "\n".join([f"### {plain(task.title)} (`{task.name}`)\n", *lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
