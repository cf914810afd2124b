"""A chapter's quiz: every option unfolds its explanation."""

from dataclasses import dataclass

from tpo_course.cards import fold, plain


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

    def __repr__(self) -> str:
        asked = (f"{number}. {plain(question.text)}" for number, question in enumerate(self.questions, 1))
        return "\n".join([f"Quiz of {len(self.questions)} questions", *asked])

    def _repr_html_(self) -> str:
        parts = []
        for number, question in enumerate(self.questions, 1):
            parts.append(f"<p><b>{number}. {question.text}</b></p>")
            for option in question.options:
                verdict = "Right" if option.right else "Not quite"
                parts.append(fold(option.text, f"<p><b>{verdict}.</b> {option.why}</p>"))
        return f'<div style="max-width:60em">{"".join(parts)}</div>'
