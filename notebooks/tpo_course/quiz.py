"""A chapter's quiz: every option unfolds its explanation; `check.quiz("bacad")` takes a letter a question.

>>> quiz = Quiz((Question("1 + 1?", (Option("2", True, "Count."), Option("3", False, "One too many."))),))
>>> quiz("a").status, quiz("b").mistakes, quiz("").status
('correct', ('question 1: b',), 'not attempted')
"""

from dataclasses import dataclass

from tpo_course import progress
from tpo_course.cards import fold, letters, plain
from tpo_course.exercise import Verdict
from tpo_course.sealed import SOLUTIONS


@dataclass(frozen=True)
class Option:
    """A possible answer, whether it is right, and why (shown when it is chosen)."""

    text: str
    right: bool
    why: str


@dataclass(frozen=True)
class Question:
    """A question with its options; exactly one is right.

    Raises:
        ValueError: none or several are right.
    """

    text: str
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        if sum(option.right for option in self.options) != 1:
            raise ValueError(f"question {self.text!r}: exactly one option must be right")


@dataclass(frozen=True)
class Quiz:
    """Questions whose options unfold their explanation; works without a kernel and by keyboard."""

    questions: tuple[Question, ...]
    chapter: str = ""

    def __call__(self, answers: str = "") -> Verdict:
        """Judge the letters of all questions, in their order, and write them down; "-" leaves one out."""
        found = self.judge(answers)
        if found.status != "not attempted":
            how = {"status": found.status, "mistakes": found.mistakes, "answer": answers}
            progress.record(f"{self.chapter}.quiz", kind="choose", **how)
        return found

    def judge(self, answers: str = "") -> Verdict:
        """The verdict, without writing anything down."""
        given = "".join(str(answers).lower().split()) if answers is not ... else ""
        known = [letters(len(question.options)) + "-" for question in self.questions]
        if len(given) != len(known) or any(letter not in each for letter, each in zip(given, known, strict=True)):
            return Verdict("not attempted", f"Answer with {len(known)} letters, one a question; - leaves one out.")
        wrong, said = [], []
        for number, (letter, question) in enumerate(zip(given, self.questions, strict=True), 1):
            option = question.options[letters(26).index(letter)] if letter != "-" else None
            if option is None or not option.right:
                wrong.append(f"question {number}: {letter}")
                said.append(f"<b>{number}{letter}.</b> {option.why if option else 'Left out.'}")
        right = f"{len(known) - len(wrong)} of {len(known)} right. "
        return Verdict("wrong" if wrong else "correct", right + "<br>".join(said), tuple(wrong))

    def __repr__(self) -> str:
        asked = (f"{number}. {plain(question.text)}" for number, question in enumerate(self.questions, 1))
        return "\n".join([f"Quiz of {len(self.questions)} questions", *asked])

    def _repr_html_(self) -> str:
        parts = []
        for number, question in enumerate(self.questions, 1):
            parts.append(f"<p><b>{number}. {question.text}</b></p>")
            for letter, option in zip(letters(len(question.options)), question.options, strict=True):
                verdict = "Right" if option.right else "Not quite"
                why = fold(f"{letter}) {option.text}", f"<p><b>{verdict}.</b> {option.why}</p>")
                parts.append(why if SOLUTIONS else f"<p>{letter}) {option.text}</p>")
        return f'<div style="max-width:60em">{"".join(parts)}</div>'
