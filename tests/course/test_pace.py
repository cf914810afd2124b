"""How long chapters take: the rule by hand, and what chapters and README say beside what it gives."""

from __future__ import annotations

import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tpo_course import notebooks, pace
from tpo_course.exercises import dpo

README = pace.README.read_text(encoding="utf-8")
COURSE = [pytest.param(path, id=path.stem) for path in notebooks.course()]
LENGTH = r"(?:(\d+) h)? ?(?:(\d+) min)?"


def minutes(words: str) -> int:
    hours, rest = re.fullmatch(LENGTH, words).groups(default="0")
    return 60 * int(hours) + int(rest)


def near(stated: str, reckoned: float) -> bool:
    """Chapters are edited cell by cell: what they say may lag behind a little, until the command is run again."""
    return abs(minutes(stated) - reckoned) <= max(10, 0.15 * reckoned)


def test_the_rule_by_hand():
    text = "# Head\n\n" + "word " * 298 + "\n\n$$a = b$$\n\n$c$ [link](somewhere.md)"  # 2 + 298 + 1 words and a formula
    assert pace.prose(text) == pytest.approx((301 + pace.FORMULA) / 150 + 0.5)
    printed = new_output("stream", text="one\ntwo\n")
    picture = new_output("display_data", data={"image/png": "x", "text/plain": "y"})
    widget = new_output("display_data", data={pace.WIDGET_VIEW: {}, "image/png": "x"})
    cell = new_code_cell("a = 1\n\n# why\nb = 2", outputs=[printed, picture, widget])
    assert pace.code(cell) == pytest.approx(4 * 3 / 60 + 0.75 + 3)
    assert pace.code(new_code_cell("a = 1", metadata={"tags": ["setup"]})) == 0


def test_an_exercise_counts_once_and_the_quiz_by_its_questions():
    cells = [
        "from tpo_course.exercises import dpo as check",
        "check.dpo_loss",
        "check.dpo_loss(dpo_loss)",
        "check.quiz",
    ]
    book = new_notebook(cells=[new_code_cell(source) for source in cells])
    words = (pace.FOLDER / "tpo_course/exercises/dpo.md").read_text(encoding="utf-8")
    own = int(re.search(r"^## dpo_loss\n.*?about (\d+) minutes", words, re.DOTALL | re.MULTILINE)[1])
    line = pace.LINE
    assert pace.of_cells(book) == pytest.approx(
        [line, own + pace.CARD + line, line, words.count("### question") + line]
    )


def test_the_controls_of_a_card_are_no_widget_to_play_with():
    shown = new_output("display_data", data={pace.WIDGET_VIEW: {}})
    book = new_notebook(cells=[new_code_cell("from tpo_course.exercises import dpo as check")])
    book.cells += [new_code_cell(source, outputs=[shown]) for source in ("check.first_loss", "widgets.loss_lab()")]
    _, card, widget = pace.of_cells(book)
    assert card == pytest.approx(dpo.first_loss.minutes + pace.VERDICT + pace.LINE)
    assert widget == pytest.approx(pace.WIDGET + pace.LINE)


def test_what_is_answered_without_code_takes_its_own_minutes_and_a_look_at_the_verdict():
    book = new_notebook(cells=[new_code_cell("from tpo_course.exercises import dpo as check")])
    by_kind = {task.kind: task for task in dpo.chapter.tasks.values()}
    assert {"function", "predict", "order", "complete", "break_it", "name_the_bug", "open_ended"} <= set(by_kind)
    for kind, task in by_kind.items():
        more = pace.CARD if kind == "function" else pace.VERDICT
        assert pace.exercises(book)[task.name] == task.minutes + more, kind


def test_optional_cells_are_no_part_of_the_core():
    book = new_notebook(cells=[new_markdown_cell("word " * 150), new_markdown_cell("## More\n\n" + "word " * 148)])
    book.cells[1].metadata["tags"] = ["optional"]
    assert pace.of(book) == pace.Pace(pytest.approx(1.0), pytest.approx(2.0))
    assert (
        pace.in_words(pace.Pace(61, 118)) == "**Time** about 1 h for the core, 2 h with everything, exercises included;"
    )
    assert pace.in_words(pace.Pace(61, 62)) == "**Time** about 1 h, exercises included;"


OPENING = """**Time** about a while; the cells run in about 2 seconds.

**The course**: [0 a](0_a.ipynb) · **1 b (you are here)**
What each symbol means: [notation](notation.md)."""
TABLE = """| chapter | what you do there |
|---|---|
| [00 a](notebooks/00_a.ipynb) | x |
| [01 b](notebooks/01_b.ipynb) | y |

Together about 0
"""


def opened(*cells) -> nbformat.NotebookNode:
    return new_notebook(cells=[new_markdown_cell(OPENING), *cells])


def test_an_opening_is_written_once_and_the_same_again():
    book = opened(
        new_markdown_cell("## Two\n\nwords", metadata={"tags": ["optional"]}),
        new_markdown_cell("## Three"),
    )
    pace.write_opening(book, "01_b.ipynb", TABLE)
    said = book.cells[0].source
    assert "**Time** about 5 min, exercises included; the cells run" in said
    assert "**The course**: [0 a](00_a.ipynb) → **1 b (you are here)**\n" in said
    assert said.endswith("What each word means: [glossary](glossary.md).")
    assert book.cells[1].source == "## Two\n\n*Optional, about 5 min.*\n\nwords"
    once = nbformat.writes(book)
    pace.write_opening(book, "01_b.ipynb", TABLE)
    assert nbformat.writes(book) == once
    book.cells[1].metadata["tags"] = []
    pace.write_opening(book, "01_b.ipynb", TABLE)
    assert book.cells[1].source == "## Two\n\nwords"


def test_readme_is_written_once_and_the_same_again():
    paces = {"00_a.ipynb": pace.Pace(30, 60), "01_b.ipynb": pace.Pace(90, 120)}
    once = pace.with_times(TABLE, paces)
    assert "| chapter | core | everything | what you do there |\n|---|---|---|---|\n" in once
    assert "| [01 b](notebooks/01_b.ipynb) | 1 h 30 min | 2 h | y |" in once
    assert "Together about 2 hours for the core and 3 with everything" in once
    assert pace.with_times(once, paces) == once
    assert pace.chapters(once) == pace.chapters(TABLE) == {"00_a.ipynb": "0 a", "01_b.ipynb": "1 b"}


def test_what_cannot_be_written_is_named():
    with pytest.raises(ValueError, match=r"notebooks/02_c\.ipynb has no row in README"):
        pace.write_opening(opened(), "02_c.ipynb", TABLE)
    book = opened(new_markdown_cell("words", id="here", metadata={"tags": ["optional"]}))
    with pytest.raises(ValueError, match=r"cell 'here' .* begins with no heading"):
        pace.write_opening(book, "01_b.ipynb", TABLE)


@pytest.mark.parametrize("path", COURSE)
def test_a_chapter_says_the_times_that_the_rule_gives(path):
    book = nbformat.read(path, as_version=4)
    opening = book.cells[0].source
    found = re.search(
        rf"\*\*Time\*\* about (?:({LENGTH}) for the core, )?({LENGTH})(?: with everything)?, exercises included;",
        opening,
    )
    assert found, "python -m tpo_course.pace"
    core, everything = found[1] or found[4], found[4]
    reckoned = pace.of(book)
    assert near(core, reckoned.core), f"{reckoned}: python -m tpo_course.pace"
    assert near(everything, reckoned.everything), f"{reckoned}: python -m tpo_course.pace"


@pytest.mark.parametrize("path", COURSE)
def test_readme_says_them_too(path):
    row = re.search(rf"^\| \[[^\]]+\]\(notebooks/{path.name}\) \| ([^|]*) \| ([^|]*) \|", README, re.MULTILINE)
    reckoned = pace.of(nbformat.read(path, as_version=4))
    assert row, "python -m tpo_course.pace"
    assert near(row[1], reckoned.core), f"{reckoned}: python -m tpo_course.pace"
    assert near(row[2], reckoned.everything), f"{reckoned}: python -m tpo_course.pace"


@pytest.mark.parametrize("path", COURSE)
def test_the_map_leads_to_every_chapter(path):
    assert pace.course_map(pace.chapters(README), path.name) in nbformat.read(path, as_version=4).cells[0].source


@pytest.mark.parametrize("path", COURSE)
def test_what_is_optional_says_so_at_its_heading(path):
    cells = nbformat.read(path, as_version=4).cells
    for before, cell in zip([None, *cells], cells, strict=False):
        begins = pace.optional(cell) and not (before and pace.optional(before) and not cell.source.startswith("#"))
        assert bool(re.match(r"#+ [^\n]+\n\n\*Optional, about [^*]+\*", cell.source)) == begins, cell.id
