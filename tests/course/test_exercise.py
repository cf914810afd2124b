"""The machinery of the exercises: what a checker says of right, wrong, broken and missing answers."""

from __future__ import annotations

import re

import pytest
import torch

from tpo_course import exercise, progress
from tpo_course.cards import as_html, fold, plain
from tpo_course.exercise import Case, Exercise, Mistake, Uses, Verdict
from tpo_course.quiz import Option, Question, Quiz
from tpo_course.words import Chapter


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
        Mistake("doubled", lambda x: 2 * x, "double"),
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
    assert "is a tuple; a torch tensor is asked for" in EXERCISE(lambda x: (x, x)).message
    assert "is a list; a torch tensor is asked for" in EXERCISE(lambda x: [*x.tolist(), 0.0]).message
    assert "is a str; a torch tensor is asked for" in EXERCISE(lambda x: "text").message
    verdict = EXERCISE(lambda x: 1 / 0)
    assert verdict.status == "wrong"
    assert "ZeroDivisionError" in verdict.message
    assert "&lt;b&gt;" in EXERCISE(lambda x: {}["<b>"]).message


def _empty(x):
    """Only a docstring."""


def _passes(x):
    pass


def _not_yet(x):
    raise NotImplementedError("later")


@pytest.mark.parametrize("stub", [_empty, _passes, _not_yet])
def test_all_ways_to_leave_a_function_open(stub):
    assert EXERCISE(stub).status == "not attempted"


def _forgot(x):
    y = x**2  # noqa: F841


def _wrote_and_left_the_dots(x):
    x**2
    ...


def _returns_nothing(x):
    print(x)


@pytest.mark.parametrize("answer", [_forgot, _wrote_and_left_the_dots, _returns_nothing])
def test_a_forgotten_return_is_said(answer, capsys):
    verdict = EXERCISE(answer)
    assert verdict.status == "wrong"
    assert "<code>return</code> is missing" in verdict.message


def test_parameters_by_position_where_their_names_are_others():
    assert EXERCISE(lambda y: y**2).status == "correct"
    assert EXERCISE(torch.square).status == "correct"  # a built-in function tells no names
    two = Exercise("v", "t", "w", "y", 1, 1, ("h",), right=lambda a, b: a - b, cases=lambda: (Case(a=3.0, b=1.0),))
    assert two(lambda x, y: x - y).status == "correct"
    assert two(lambda b, a: a - b).status == "correct"  # all names are right: by name
    for answer in (lambda b, x: x - b, lambda a: a, lambda a, b, c: a):
        verdict = two(answer)
        assert verdict.status == "wrong"
        assert "is called with (a, b)" in verdict.message


def _divides(x):
    y = x**2
    return y / "2"  # a string


def test_an_error_names_line_and_code_of_the_learner():
    for answer in (_divides, lambda x: _divides(x)):
        message = EXERCISE(answer).message
        assert "TypeError" in message
        assert re.search(r"in line \d+ \(_divides\): <code>return y / \"2\"  # a string</code>", message), message


def _uses_the_open_one(x):
    return _passes(x) + x**2


def test_an_open_helper_is_named_and_not_blamed_on_its_user():
    verdict = EXERCISE(_uses_the_open_one)
    assert verdict.status == "not attempted"
    assert "<code>_passes</code>, which is still to be written" in verdict.message
    assert EXERCISE(lambda x: _uses_the_open_one(x)).status == "not attempted"


def test_numpy_counts_unless_a_gradient_is_asked_for():
    plain_case = Exercise("v", "t", "w", "y", 1, 1, ("h",), right=_square, cases=lambda: (Case(x=torch.ones(2)),))
    assert plain_case(lambda x: x.numpy() ** 2).status == "correct"
    assert "NumPy carries no gradient" in EXERCISE(lambda x: x.detach().numpy() ** 2).message


def test_a_boolean_is_no_number():
    asks = Exercise("v", "t", "w", "y", 1, 1, ("h",), right=lambda x: x > 0, cases=lambda: (Case(x=torch.ones(2)),))
    assert asks(lambda x: x > 0).status == "correct"
    assert "True and False are asked for" in asks(lambda x: (x > 0).float()).message


def _by_autograd(x):
    return torch.autograd.grad((x**2).sum(), x)[0]


def test_what_must_not_be_used_is_seen_though_the_values_are_right():
    byhand = Mistake("by hand, please", Uses(("autograd", "backward"), _by_autograd), "autograd")
    ones = lambda: (Case(x=torch.ones(2, requires_grad=True)),)  # noqa: E731
    asks = Exercise("v", "t", "w", "y", 1, 1, ("h",), lambda x: (2 * x).detach(), ones, (byhand,))
    for answer in (_by_autograd, lambda x: _by_autograd(x)):  # directly, and in a helper
        assert (asks(answer).message, asks(answer).mistakes) == ("by hand, please", ("autograd",))
    assert asks(lambda x: 2 * x.detach()).status == "correct"


def test_plain_text_holds_no_html():
    exercise = Exercise("v", "<i>T</i>", "a &lt; <code>b</code>", "y<sub>t</sub>", 1, 1, ("h",), right=0.5)
    assert repr(exercise) == "Exercise: T (difficulty 1 of 5, about 1 minute)\na < `b`\nWhy: y_t"
    assert repr(EXERCISE(lambda x: {}["<b>"])).startswith("wrong: Your code raised KeyError: '<b>', in line")
    assert plain("<p>a</p><p>b</p>") == "a\nb"


def test_plain_text_is_separated_and_keeps_folded_what_is_an_answer():
    answer, rubric = (
        fold("The truth", "<p>7. Seven.</p>"),
        fold("Rubric", "<ul><li>1 point: a</li><li>2 points: b</li></ul>"),
    )
    assert repr(Verdict("not attempted", f"Nothing was predicted. {answer}")) == "not attempted: Nothing was predicted."
    assert plain(f"Now: {rubric}{answer}Then.") == "Now:\nRubric:\n- 1 point: a\n- 2 points: b\nThen."
    table = "<table><tr><th>change</th><th>residual</th></tr><tr><td>as it is</td><td>1e-16</td></tr></table>"
    assert plain(f"You knew.{table}") == "You knew.\nchange  residual\nas it is  1e-16"
    assert plain("<div><p>a</p> <p>b<br> c</p></div>") == "a\nb\nc"
    assert plain("<pre>a\n\nb</pre>c") == "a\n\nb\nc"


def test_an_answer_is_applied_once_it_is_right(capsys):
    assert EXERCISE.apply(_passes, torch.ones(1)) is None
    assert "square is not attempted: it is not used here" in capsys.readouterr().out
    assert EXERCISE.apply(_uses_the_open_one, torch.ones(1)) is None
    assert "square is not attempted" in capsys.readouterr().out
    assert EXERCISE.apply(_square, torch.full((1,), 3.0)) == 9


def test_tries_and_misconceptions_are_written_down():
    progress.forget()
    for answer in (_passes, lambda x: x + x, _square, lambda x: 1 / 0):
        EXERCISE(answer)
    EXERCISE.judge(lambda x: x)  # asking is no try
    task = progress.tasks()[".square"]
    assert (task["kind"], task["status"], task["tries"], task["mistakes"]) == ("function", "correct", 3, ["double"])
    progress.forget()


def test_a_value_instead_of_a_function():
    exercise = Exercise("v", "t", "w", "y", 1, 1, ("h",), right=0.5, mistakes=(Mistake("the other way", 2.0),))
    assert exercise(0.5).status == "correct"
    assert exercise(2).message == "the other way"
    assert exercise(None).status == "not attempted"


def test_card_unfolds_hints_one_inside_the_other(monkeypatch, tmp_path):
    (tmp_path / "here.py").write_text("def square(x):\n    return x**2\n\n\ndef other():\n    pass\n")
    monkeypatch.setattr(exercise, "SOLUTIONS", tmp_path)
    card = Exercise(
        "square", "T", "w", "y", 2, 5, ("first", "second"), right=_square, cases=_cases, chapter="here"
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
    card = Exercise("s", "T", "w", "y", 2, 5, ("h",), right=1, chapter="gone")._repr_html_()
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
    assert (exercise.name, exercise.title, exercise.chapter) == ("square", "Squares of <code>x</code>", "squares")
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
