"""The machinery of the exercises: what a checker says of right, wrong, broken and missing answers."""

from __future__ import annotations

import pytest
import torch

from tpo_course import exercise
from tpo_course.exercise import Case, Chapter, Exercise, Mistake, Option, Question, Quiz, as_html


def _cases() -> tuple[Case, ...]:
    return (
        Case(x=torch.tensor([1.0, 2.0], requires_grad=True)),
        Case("a single entry", x=torch.tensor([3.0], requires_grad=True)),
    )


def _square(x):
    return x**2


EXERCISE = Exercise(
    name="square",
    title="Squares",
    what="w",
    why="y",
    difficulty=2,
    minutes=5,
    hints=("first", "second"),
    right=_square,
    cases=_cases,
    mistakes=(
        Mistake("doubled", lambda x: 2 * x),
        Mistake("detached", lambda x: x * x.detach()),
    ),
)


def test_right_answer():
    assert EXERCISE(lambda x: x * x).status == "correct"
    assert "gradients" in EXERCISE(lambda x: x * x).message


@pytest.mark.parametrize("stub", [lambda x: None, lambda x: ..., None, ...])
def test_stub_is_not_attempted_and_gets_the_first_hint(stub):
    verdict = EXERCISE(stub)
    assert verdict.status == "not attempted"
    assert "first" in verdict.message
    assert "second" not in verdict.message


def test_known_mistakes_are_named():
    assert repr(EXERCISE(lambda x: x + x)) == "wrong: doubled"
    assert repr(EXERCISE(lambda x: x.detach() * x)) == "wrong: detached"  # the values alone are right


def test_unknown_gradient():
    verdict = EXERCISE(lambda x: (x**2).detach())
    assert verdict.status == "wrong"
    assert "gradient" in verdict.message


def test_unknown_value_says_what_was_expected():
    verdict = EXERCISE(lambda x: x**2 + (x == 3))
    assert verdict.status == "wrong"
    assert "Expected 9, got 10" in verdict.message
    assert "a single entry" in verdict.message
    assert "got nan" in EXERCISE(lambda x: x * float("nan")).message


def test_wrong_shape_wrong_count_and_errors_are_verdicts():
    assert "shape ()" in EXERCISE(lambda x: (x**2).sum()).message
    assert "2 numbers" in EXERCISE(lambda x: (x, x)).message
    assert "0 numbers" in EXERCISE(lambda x: "text").message
    verdict = EXERCISE(lambda y: y)
    assert verdict.status == "wrong"
    assert "TypeError" in verdict.message
    assert "&lt;b&gt;" in EXERCISE(lambda x: {}["<b>"]).message


def test_a_value_instead_of_a_function():
    exercise = Exercise("v", "t", "w", "y", 1, 1, ("h",), right=0.5, mistakes=(Mistake("the other way", 2.0),))
    assert exercise(0.5).status == "correct"
    assert exercise(2).message == "the other way"
    assert exercise(None).status == "not attempted"


def test_card_unfolds_hints_one_inside_the_other(monkeypatch, tmp_path):
    (tmp_path / "here.py").write_text("def square(x):\n    return x**2\n\n\ndef other():\n    pass\n")
    monkeypatch.setattr(exercise, "SOLUTIONS", tmp_path)
    card = Exercise(
        "square", "T", "w", "y", 2, 5, ("first", "second"), right=_square, cases=_cases, solution="here"
    )._repr_html_()
    order = [card.index(text) for text in ("Hint 1 of 2", "first", "Hint 2 of 2", "second", "Solution", "x**2")]
    assert order == sorted(order)
    assert card.count("<details") == card.count("</details>") == 3
    assert card.endswith("</details></details></details></div>")
    assert "other" not in card
    assert "●●○○○" in card
    with pytest.raises(KeyError, match="nothing"):
        exercise.solution_source(tmp_path / "here.py", "nothing")


def test_card_without_the_notebooks(monkeypatch, tmp_path):
    monkeypatch.setattr(exercise, "SOLUTIONS", tmp_path)
    card = Exercise("s", "T", "w", "y", 2, 5, ("h",), right=1, solution="gone")._repr_html_()
    assert "notebooks/solutions/gone.py" in card


def test_bad_exercises_and_questions_are_refused():
    with pytest.raises(ValueError, match="difficulty"):
        Exercise("s", "T", "w", "y", 6, 5, ("h",), right=1)
    with pytest.raises(ValueError, match="exactly one"):
        Question("?", (Option("a", True, ""), Option("b", True, "")))


def test_quiz_explains_every_option():
    page = Quiz((Question("Q?", (Option("a", True, "because"), Option("b", False, "since"))),))._repr_html_()
    assert "<b>Right.</b> because" in page
    assert "<b>Not quite.</b> since" in page


WORDS = """\
# What stands above the first exercise is for the teacher

## square

**Squares of `x`** (difficulty 2 of 5, about 5 minutes)

### what

Return x * x,
*not* 2 * x.

### why

y

### hint 1

first

### hint 2

second

### mistake: doubled

You doubled `x < 2`.

## quiz

### question 1

Which
one?

- [ ] this
  option

  Not it.

- [x] that

  Because.
"""


def _chapter(tmp_path, old: str = "", new: str = "") -> Chapter:
    assert old in WORDS
    (tmp_path / "squares.md").write_text(WORDS.replace(old, new), encoding="utf-8")
    return Chapter(str(tmp_path / "squares.py"))


def test_chapter_joins_words_and_functions(tmp_path):
    chapter = _chapter(tmp_path)
    exercise = chapter.exercise("square", _square, _cases, doubled=lambda x: 2 * x)
    assert (exercise.name, exercise.title, exercise.solution) == ("square", "Squares of <code>x</code>", "squares")
    assert (exercise.difficulty, exercise.minutes, exercise.hints) == (2, 5, ("first", "second"))
    assert (exercise.what, exercise.why) == ("Return x * x, <i>not</i> 2 * x.", "y")
    assert exercise(lambda x: x + x).message == "You doubled <code>x &lt; 2</code>."
    assert chapter.quiz().questions == (
        Question("Which one?", (Option("this option", False, "Not it."), Option("that", True, "Because."))),
    )


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("## square\n", "## cube\n", 'squares.md has no "## square"'),
        ("### hint 2", "### hint 3", 'lacks "### hint 2" and alone has "### hint 3"'),
        ("### hint", "### tip", 'lacks "### hint 1" and alone has "### tip 1", "### tip 2"'),
        ("### why\n\ny", "### why", 'squares.md, "## square": "### why" has no words'),
        ("doubled\n", "halved\n", 'lacks "### mistake: doubled" and alone has "### mistake: halved"; .*squares.py'),
        ("### hint 2", "### hint 1", 'squares.md, "## square": "### hint 1" comes twice'),
        ("## quiz", "## square", 'squares.md: "## square" comes twice'),
        ("difficulty 2", "difficulty 6", r'squares.md, "## square" says "\*\*Squares .* write "\*\*Title'),
        ("  Because.", "", '"### question 1": "that" is not explained'),
        ("[x]", "[ ]", '"### question 1" needs exactly one right option'),
        ("question 1", "question 2", 'lacks "### question 1" and alone has "### question 2"'),
    ],
)
def test_words_that_do_not_fit_are_refused_with_file_heading_and_fix(tmp_path, old, new, said):
    with pytest.raises(ValueError, match=said):  # noqa: PT012  (which of the three refuses is not the question)
        chapter = _chapter(tmp_path, old, new)
        chapter.exercise("square", _square, _cases, doubled=lambda x: 2 * x)
        chapter.quiz()


def test_markdown_of_a_line():
    assert as_html("π*(y|x), b ** 2 and *both*: `a*b*c`") == "π*(y|x), b ** 2 and <i>both</i>: <code>a*b*c</code>"
    assert as_html("$a^*$ *or* $b^*$, e<sup>x</sup> &lt; 1") == "$a^*$ <i>or</i> $b^*$, e<sup>x</sup> &lt; 1"
