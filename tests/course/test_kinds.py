"""The kinds of task that ask for no function: what they accept, name, show and write down."""

from __future__ import annotations

import pytest

from tpo_course import progress
from tpo_course.words import Chapter
from tpo_course.world import TokenWorld

CARD = """**A title** (difficulty 4 of 5, about 6 minutes)

### what

What?

### why

Why.

### hint 1

A nudge.
"""
WORDS = f"""# Words

## grows

{CARD}
### choice: +

It grows.

Beta divides the reward.

### choice: -

It falls.

You mixed up *beta* and the reward.

### truth

Because of `Z`.

## half

{CARD}
### truth

Half of them.

### mistake: forgot

You forgot beta.

## why_z

{CARD}
### choice: sum

Z is a sum.

True, and no reason.

### choice: cancels

It cancels.

Both share the prompt.

### choice: one

It is 1.

It is not.

## two_of

{CARD}
### choice: a1

A.

Not A.

### choice: b1

B.

B is.

### choice: c1

C.

C is.

## seen

{CARD}
### code

```python
loss = -F.logsigmoid(beta * (a < b))

return loss
```

### choice: bug_1

It divides.

### choice: bug_8

Beta is right.

## steps

{CARD}
### choice: first

$a$

It comes first.

### choice: second

$b$

### choice: third

$c$

### mistake: too_soon

You cannot start with the end.

## form

{CARD}
### formula

$r = [1] \\log [2]$

### choice: beta

$\\beta$

Beta stands in front.

### choice: ratio

$\\pi/\\pi_{{ref}}$

### choice: policy

$\\pi$

### mistake: no_reference

The reference is missing.

## z

{CARD}
### choice: seven

7 added to both

It cancels.

### choice: no_beta

beta left out

The margin is another one.

## explain

{CARD}
### rubric

- (2) says that Z cancels
- (1) says `why`

### sample

It cancels since both share x.
"""


def _world() -> TokenWorld:
    return TokenWorld(3, 2, seed=0)


CHANGES = {
    "seven": ("u[w.pairs.chosen] - u[w.pairs.rejected]", "(u[w.pairs.chosen] + 7) - (u[w.pairs.rejected] + 7)"),
    "no_beta": ("h.beta * tools", "tools"),
}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setenv("TPO_PROGRESS", "off")
    progress.forget()
    yield
    progress.forget()


@pytest.fixture
def chapter(tmp_path) -> Chapter:
    (tmp_path / "words.md").write_text(WORDS, encoding="utf-8")
    made = Chapter(str(tmp_path / "words.py"))
    made.predict("grows", "+")
    made.predict("half", 0.5, forgot=1.0)
    made.choose("why_z", "cancels")
    made.choose("two_of", "b1", "c1")
    made.name_the_bug("seen", "bug_1")
    made.order("steps", "first", "second", "third", too_soon=("third", "first"))
    made.complete("form", "beta", "ratio", no_reference=("beta", "policy"))
    made.break_it("z", "dpo.z_cancels", _world, CHANGES, beta=0.5)
    made.open_ended("explain")
    return made


def _known(name: str) -> dict:
    return progress.tasks()[f"words.{name}"]


def test_every_kind_has_a_card_in_both_forms_and_is_open_without_an_answer(chapter):
    for name, task in chapter.tasks.items():
        assert task().status == task(...).status == task(None).status == "not attempted", name
        page, text = task._repr_html_(), repr(task)
        assert "●●●●○" in page
        assert "A nudge." in page
        assert "difficulty 4 of 5" in text
        assert "<" not in text.replace("a < b", "")
        assert page.count("<details") == page.count("</details>")
        shown = task._repr_mimebundle_()
        assert shown["text/html"] == page
        assert "VBox" not in shown["text/plain"]
    assert progress.tasks() == {}


def test_predict_before_and_after(chapter):
    task = chapter.tasks["grows"]
    for answer in ("-", "b", ["-"]):
        verdict = task(answer)
        assert (verdict.status, "It falls" in verdict.message, "It grows" in verdict.message) == (
            "predicted",
            True,
            False,
        )
    assert (_known("grows")["status"], _known("grows")["tries"], _known("grows")["answer"]) == ("predicted", 3, "-")
    verdict = task.reveal(0.3)
    assert verdict.status == "wrong"
    assert verdict.message.startswith("You predicted It falls; it is It grows. Because of <code>Z</code>.")
    assert "mixed up" in verdict.message
    assert (_known("grows")["status"], _known("grows")["tries"], _known("grows")["mistakes"]) == ("wrong", 3, ["-"])
    task("+")
    assert task.reveal(0.3).status == "correct"
    with pytest.raises(ValueError, match=r"words.grows: the cell found -0.3, the exercise says '\+'"):
        task.reveal(-0.3)


def test_nothing_predicted_shows_the_truth_folded(chapter):
    verdict = chapter.tasks["grows"].reveal(2)
    assert verdict.status == "not attempted"
    assert "<details" in verdict.message.split("It grows")[0]
    assert progress.tasks() == {}


def test_predict_a_number(chapter):
    task = chapter.tasks["half"]
    assert task.judge(0.55).status == "correct"
    assert task.judge(1.1).mistakes == ("forgot",)
    assert (task.judge(7).status, task.judge(7).mistakes) == ("wrong", ())
    assert task("much").status == "not attempted"
    task("0.4")
    assert task.reveal(0.52).message.startswith("You predicted 0.4; it is 0.5. Half of them.")
    with pytest.raises(ValueError, match=r"found 0.7, the exercise says 0.5"):
        task.reveal(0.7)


def test_by_name(chapter):
    assert chapter.answer("grows", "+").status == "predicted"
    with pytest.raises(KeyError, match="no task 'shrinks'; it has grows, half"):
        chapter.answer("shrinks", "+")


def test_choose(chapter):
    task = chapter.tasks["why_z"]
    assert task("b").status == task("cancels").status == "correct"
    verdict = task("one")
    assert (verdict.status, verdict.mistakes, verdict.message) == ("wrong", ("one",), "<b>c</b>: It is not.")
    assert "no choice 'd'" in task("d").message
    assert task("ab").status == task("").status == "not attempted"
    assert (_known("why_z")["status"], _known("why_z")["mistakes"]) == ("correct", ["one"])


def test_choose_all_that_are_right(chapter):
    task = chapter.tasks["two_of"]
    assert task("bc").status == task(["c1", "b"]).status == task("c, b").status == "correct"
    assert "1 more" in task("b").message
    assert task("abc").mistakes == ("a1",)


def test_name_the_bug(chapter):
    task = chapter.tasks["seen"]
    assert "<pre>loss = -F.logsigmoid(beta * (a &lt; b))\n\nreturn loss</pre>" in task._repr_html_()
    assert "(a < b))\n\nreturn loss" in repr(task)
    assert "mean for sum" in task._repr_html_()
    assert task("bug_1").status == "correct"
    assert task("bug_8").message == "<b>b</b>: Beta is right."


def test_order(chapter):
    task = chapter.tasks["steps"]
    right = "".join(task.letter(name) for name in ("first", "second", "third"))
    assert right != "abc"
    assert task(right).status == "correct"
    assert task(["first", "second", "third"]).status == "correct"
    assert task(["third", "second", "first"]).mistakes == ("too_soon",)
    assert "The first is right" in task(["first", "third", "second"]).message
    assert task("aab").status == task("ab").status == "not attempted"


def test_complete(chapter):
    task = chapter.tasks["form"]
    assert task("ab").status == "correct"
    assert task("ac").mistakes == ("no_reference",)
    assert "Blank [1] is not" in task("bb").message
    assert "2 blanks" in task("a").message


def test_break_it(chapter):
    task = chapter.tasks["z"]
    found = task.residuals()
    assert found[""] < 1e-9 > found["seven"]
    assert found["no_beta"] > 0.01
    assert task("a").status == "correct"
    assert f"{found['no_beta']:.1g}" in task("a").message
    assert task("ab").mistakes == ("no_beta",)
    assert task("").mistakes == ("seven",)
    assert "It cancels." in task("").message


def test_open_ended(chapter):
    task = chapter.tasks["explain"]
    verdict = task("Both share x.")
    assert verdict.status == "answered"
    assert "2 points: says that Z cancels" in verdict.message
    assert _known("explain")["answer"] == "Both share x."
    verdict = task("Both share x.", points=[2, 0])
    assert verdict.message.startswith("2 of 3 points. Look again at: says <code>why</code>")
    done = _known("explain")
    assert (done["status"], done["tries"], done["points"], done["of"]) == ("assessed", 1, 2, 3)
    with pytest.raises(ValueError, match=r"points=\[3, 0\]; the rubric has 2 lines of at most \[2, 1\] points"):
        task("Both share x.", points=[3, 0])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda c: c.choose("why_z", "other"), "words.py names .'other'.; make them the same"),
        (lambda c: c.order("steps", "first", "second", too_soon=("second", "first")), "make them the same"),
        (
            lambda c: c.complete("form", "beta", "ratio", "policy", no_reference=()),
            r"needs the blanks \[1\] \[2\] \[3\]",
        ),
        (lambda c: c.predict("half", 0.5), 'alone has "### mistake: forgot"'),
        (lambda c: c.break_it("z", "dpo.z_cancels", _world, {}), "make them the same"),
        (lambda c: c.open_ended("grows"), 'lacks "### rubric", "### sample"'),
    ],
)
def test_words_that_do_not_fit_are_refused(chapter, make, said):
    with pytest.raises(ValueError, match=said):
        make(chapter)


def test_a_name_that_reads_like_letters_is_refused(tmp_path):
    """The answer "b" would be taken for the choice of that name, whatever letter it has on the card."""
    (tmp_path / "words.md").write_text(WORDS.replace("### choice: sum", "### choice: b"), encoding="utf-8")
    with pytest.raises(ValueError, match="'b', which reads like letters of its card; name it otherwise"):
        Chapter(str(tmp_path / "words.py")).choose("why_z", "cancels")


def test_a_rubric_needs_points(tmp_path):
    (tmp_path / "words.md").write_text(WORDS.replace("- (2) says", "- says"), encoding="utf-8")
    with pytest.raises(ValueError, match="points first"):
        Chapter(str(tmp_path / "words.py")).open_ended("explain")


def test_the_widgets_answer(chapter):
    def controls(name):
        from tpo_course.widgets import answering

        task = chapter.tasks[name]
        return (answering._written if task.kind == "open_ended" else answering._lettered)(task).children

    _, row, said = controls("why_z")
    field, button = row.children
    assert field.options == ("a", "b", "c")
    button.click()
    assert "not attempted" in said.value
    field.value = "b"
    button.click()
    assert "correct" in said.value
    _, row, said = controls("steps")
    row.children[0].value = "ab"
    row.children[1].click()
    assert "every letter once" in said.value
    _, text, button, said, assess = controls("explain")
    button.click()
    assert ("not attempted" in said.value, assess.layout.display) == (True, "none")
    text.value = "Both share x."
    button.click()
    assert ("answered" in said.value, assess.layout.display) == (True, "")
    assess.children[0].value = 2
    assess.children[-1].click()
    assert "2 of 3 points" in said.value
