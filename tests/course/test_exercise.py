"""The machinery of the exercises: what a checker says of right, wrong, broken and missing answers."""

from __future__ import annotations

import pytest
import torch

from tpo_course import exercise
from tpo_course.exercise import Case, Exercise, Mistake, Option, Question, Quiz


def _cases() -> tuple[Case, ...]:
    return (
        Case({"x": torch.tensor([1.0, 2.0], requires_grad=True)}),
        Case({"x": torch.tensor([3.0], requires_grad=True)}, "a single entry"),
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
