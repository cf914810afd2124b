"""The card of a task with controls below it: letters to choose, or a line to write, and what the checker says."""

from typing import TYPE_CHECKING

import ipywidgets as w

from tpo_course.cards import letters
from tpo_course.widgets import parts

if TYPE_CHECKING:
    from tpo_course.kinds import Lettered, OpenEnded


def show(task: "Lettered | OpenEnded") -> dict:
    """What a cell shows: the widget, and without a kernel the card alone."""
    box = _written(task) if task.kind == "open_ended" else _lettered(task)
    return parts.bundle(box, repr(task), page=task._repr_html_())


def _card(task) -> w.HTMLMath:
    return w.HTMLMath(task._repr_html_())


def _said() -> w.HTMLMath:
    return w.HTMLMath(layout=w.Layout(min_height="60px", max_width="900px"))


def _lettered(task: "Lettered") -> w.VBox:
    said = _said()
    if task.choices and not task.many and len(getattr(task, "right", "x")) == 1:
        field = w.ToggleButtons(options=list(letters(len(task.shown))), value=None, **parts.look("0px", "auto"))
        field.style.button_width = "3em"
    else:
        place = "letters, such as cab" if task.choices else "a number"
        field = w.Text(placeholder=place, layout=w.Layout(width="14em"))

    def check() -> None:
        said.value = task(... if field.value is None else field.value)._repr_html_()

    words = "Write it down" if task.kind == "predict" else "Check"
    return w.VBox([_card(task), parts.row(field, parts.button(words, check)), said])


def _written(task: "OpenEnded") -> w.VBox:
    said = _said()
    text = w.Textarea(placeholder="Your answer", layout=w.Layout(width="900px", max_width="100%", height="120px"))
    given = [
        w.BoundedIntText(
            min=0, max=most, value=0, description=f"line {number}, of {most}", **parts.look("90px", "160px")
        )
        for number, (most, _) in enumerate(task.rubric, 1)
    ]
    assess = parts.row(*given, parts.button("Give points", lambda: show_verdict([field.value for field in given])))
    assess.layout.display = "none"

    def show_verdict(points: list[int] | None = None) -> None:
        verdict = task(text.value, points)
        said.value = verdict._repr_html_()
        assess.layout.display = "none" if verdict.status == "not attempted" else ""

    return w.VBox([_card(task), text, parts.button("Write it down", show_verdict), said, assess])
