"""Tasks that ask for something else than a function: a choice, an order, a formula, an explanation.

Those that ask before something is run are in `predicting`.

Choices carry letters. An answer is a letter or a name ("b", "sign_lost"); where several are asked for, the letters in a row
("cab"), or a list. What is wrong is told by the words of the wrong choice, whose name is recorded like a mistake's.

>>> yes, no = Choice("sum", "their sum", "Logarithms add."), Choice("mean", "their mean", "Lengths would not count.")
>>> task = Choose("logp", "A response", "What are they?", "w", 1, 1, (), (yes, no), frozenset({"sum"}))
>>> task("a").status, task("mean").mistakes
('correct', ('mean',))
>>> task("z")
not attempted: There is no choice 'z'. Answer with one of a, b.
"""

import html
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tpo_course import cards, progress
from tpo_course.exercise import Task, Verdict


@dataclass(frozen=True)
class Choice:
    """Something that can be chosen; `why` is what is said once it was (HTML both)."""

    name: str
    text: str
    why: str = ""


class NoChoice(ValueError):
    """An answer that names no choice; the message says which there are."""


@dataclass(frozen=True, repr=False)
class Lettered(Task):
    """A task with lettered choices."""

    choices: tuple[Choice, ...]
    many: ClassVar[bool] = False  # whether an answer holds several

    @property
    def shown(self) -> tuple[Choice, ...]:
        """The choices in the order of their letters."""
        return self.choices

    def named(self, name: str) -> Choice:
        """The choice of that name."""
        return next(choice for choice in self.choices if choice.name == name)

    def letter(self, name: str) -> str:
        """Its letter on the card."""
        return cards.letters(len(self.shown))[[choice.name for choice in self.shown].index(name)]

    def picked(self, answer: Any) -> tuple[str, ...]:
        """The names that an answer stands for.

        Raises:
            NoChoice: it holds something else.
        """
        names = [choice.name for choice in self.shown]
        letters = dict(zip(cards.letters(len(names)), names, strict=True))
        parts = [answer] if isinstance(answer, str) and answer in names else answer
        found = []
        for part in parts if isinstance(parts, str | list | tuple | set | frozenset) else [parts]:
            part = str(part).strip()
            if part in ("", ","):
                continue
            name = part if part in names else letters.get(part.lower())
            if name is None:
                asked = "letters" if self.many else "one"
                raise NoChoice(f"There is no choice {part!r}. Answer with {asked} of {', '.join(letters)}.")
            found.append(name)
        return tuple(found)

    def judge(self, answer: Any = ...) -> Verdict:
        """The verdict, without writing anything down."""
        if answer is None or answer is Ellipsis:
            return Verdict("not attempted", self._ask())
        try:
            return self._judge(self.picked(answer))
        except NoChoice as error:
            return Verdict("not attempted", html.escape(str(error), quote=False))

    def _judge(self, names: tuple[str, ...]) -> Verdict:
        raise NotImplementedError

    def _ask(self) -> str:
        hint = f"Hint: {self.hints[0]}" if self.hints else "Answer with a letter."
        return hint

    def _kept(self, answer: Any) -> dict[str, Any]:
        return {"answer": " ".join(self.picked(answer))}

    def _body(self) -> str:
        left, right = "vertical-align:top;padding-right:.6em", "text-align:left"
        rows = "".join(
            f'<tr><td style="{left}"><b>{letter}</b></td><td style="{right}">{choice.text}</td></tr>'
            for letter, choice in zip(cards.letters(len(self.shown)), self.shown, strict=True)
        )
        return f"{self._above()}<table>{rows}</table>"

    def _above(self) -> str:
        return ""

    def _plain_body(self) -> list[str]:
        return [f"{letter}) {c.text}" for letter, c in zip(cards.letters(len(self.shown)), self.shown, strict=True)]

    def _below(self) -> str:
        return cards.answer("Answer", self._answer())

    def _answer(self) -> str:
        raise NotImplementedError

    def _repr_mimebundle_(self, **_: Any) -> dict:
        from tpo_course.widgets import answering  # a checker alone needs no widgets

        return answering.show(self)


# ---- choose, name the bug


@dataclass(frozen=True, repr=False)
class Choose(Lettered):
    """The right one of several statements, or all right ones."""

    kind: ClassVar[str] = "choose"
    label: ClassVar[str] = "Choose"

    right: frozenset[str]

    def _judge(self, names: tuple[str, ...]) -> Verdict:
        if not names or (len(self.right) == 1 and len(set(names)) != 1):
            return Verdict("not attempted", "Answer with one letter." if len(self.right) == 1 else self._ask())
        wrong = [name for name in dict.fromkeys(names) if name not in self.right]
        if wrong:
            said = " ".join(f"<b>{self.letter(name)}</b>: {self.named(name).why}" for name in wrong)
            return Verdict("wrong", said, tuple(wrong))
        if missing := self.right - set(names):
            return Verdict("wrong", f"What you chose is right, but {len(missing)} more must be chosen.")
        return Verdict("correct", " ".join(self.named(name).why for name in dict.fromkeys(names)))

    def _answer(self) -> str:
        said = (
            f"<p><b>{self.letter(c.name)}: {'right' if c.name in self.right else 'not quite'}.</b> {c.why}</p>"
            for c in self.shown
        )
        return "".join(said)


@dataclass(frozen=True, repr=False)
class NameTheBug(Choose):
    """A few lines of code, or a picture, with one bug in it; the choices are bugs."""

    kind: ClassVar[str] = "name_the_bug"
    label: ClassVar[str] = "Name the bug"

    code: str = ""
    picture: Callable[[], bytes] | None = None  # a PNG
    alt: str = ""

    def _above(self) -> str:
        shown = f"<pre>{html.escape(self.code, quote=False)}</pre>" if self.code else ""
        return shown + (cards.image(self.picture(), self.alt) if self.picture else "")

    def _plain_body(self) -> list[str]:
        shown = [html.escape(text, quote=False) for text in (self.code, self.alt) if text]
        return [*shown, *super()._plain_body()]


# ---- order, complete


@dataclass(frozen=True, repr=False)
class Order(Lettered):
    """Steps to bring into their order: `choices` are in the right one, the letters go by another."""

    kind: ClassVar[str] = "order"
    label: ClassVar[str] = "Put in order"
    many: ClassVar[bool] = True

    early: Mapping[
        str, tuple[tuple[str, str], str]
    ]  # mistake: ((the step that comes too early, before which), message)

    @property
    def shown(self) -> tuple[Choice, ...]:
        """Shuffled by their names, the same for everybody, and never in the right order."""
        mixed = sorted(self.choices, key=lambda choice: zlib.crc32(choice.name.encode()))
        return tuple(mixed if tuple(mixed) != self.choices else mixed[1:] + mixed[:1])

    def _judge(self, names: tuple[str, ...]) -> Verdict:
        right = [choice.name for choice in self.choices]
        if sorted(names) != sorted(right):
            return Verdict("not attempted", f"Use every letter once: {len(right)} of them.")
        if list(names) == right:
            return Verdict(
                "correct", " ".join(c.why for c in self.choices if c.why) or "In this order each step follows."
            )
        for mistake, ((first, then), message) in self.early.items():
            if names.index(first) < names.index(then):
                return Verdict("wrong", message, (mistake,))
        good = next(i for i, (name, want) in enumerate(zip(names, right, strict=True)) if name != want)
        start = ("None of them stands where it should yet", "The first is right", f"The first {good} are right")[
            min(good, 2)
        ]
        return Verdict("wrong", f"{start}; {self.letter(names[good])} does not follow yet.")

    def _answer(self) -> str:
        whys = "".join(f"<p><b>{self.letter(c.name)}.</b> {c.text} {c.why}</p>" for c in self.choices)
        return f"<p>{''.join(self.letter(c.name) for c in self.choices)}</p>{whys}"


@dataclass(frozen=True, repr=False)
class Complete(Lettered):
    """A formula with numbered blanks, to be filled with the given pieces."""

    kind: ClassVar[str] = "complete"
    label: ClassVar[str] = "Complete the formula"
    many: ClassVar[bool] = True

    formula: str  # HTML; the blanks are "[1]", "[2]", ... in LaTeX
    right: tuple[str, ...]  # the piece of every blank
    wrong: Mapping[str, tuple[tuple[str | None, ...], str]]  # mistake: (pieces, None for any, and the message)

    def _judge(self, names: tuple[str, ...]) -> Verdict:
        if len(names) != len(self.right):
            return Verdict(
                "not attempted", f"There are {len(self.right)} blanks: answer with so many letters, in their order."
            )
        if names == self.right:
            return Verdict("correct", f"{self.title}: every blank is right.")
        for mistake, (pieces, message) in self.wrong.items():
            if all(piece in (None, name) for piece, name in zip(pieces, names, strict=True)):
                return Verdict("wrong", message, (mistake,))
        place = next(i for i, (name, want) in enumerate(zip(names, self.right, strict=True)) if name != want)
        return Verdict(
            "wrong", f"Blank [{place + 1}] is not {self.named(names[place]).text}. {self.named(names[place]).why}"
        )

    def _above(self) -> str:
        return f"<p>{self.formula}</p>"

    def _plain_body(self) -> list[str]:
        return [self.formula, *super()._plain_body()]

    def _answer(self) -> str:
        return (
            f"<p>{''.join(map(self.letter, self.right))}: {', '.join(self.named(name).text for name in self.right)}</p>"
        )


# ---- open-ended


@dataclass(frozen=True, repr=False)
class OpenEnded(Task):
    """A question to answer in words; a rubric says what the answer must hold, and the learner gives the points."""

    kind: ClassVar[str] = "open_ended"
    label: ClassVar[str] = "In your own words"

    rubric: tuple[tuple[int, str], ...]  # points, and for what (HTML)
    sample: str  # an answer that gets them all (HTML)

    @property
    def most(self) -> int:
        """All points."""
        return sum(points for points, _ in self.rubric)

    def judge(self, answer: Any = ..., points: Any = None) -> Verdict:
        """The verdict, without writing anything down.

        Raises:
            ValueError: the points do not fit the rubric; says how many there are.
        """
        if answer is None or answer is Ellipsis or not str(answer).strip():
            return Verdict("not attempted", "Write your answer as text, then compare it with the rubric.")
        if points is None:
            ask = f"Now give yourself points: <code>check.{self.name}(answer, points=[...])</code>"
            return Verdict(
                "answered", f"Written down. {ask}{self._rubric()}{cards.answer('A full answer', self.sample)}"
            )
        given = [int(p) for p in points]
        most = [p for p, _ in self.rubric]
        if len(given) != len(most) or any(not 0 <= p <= top for p, top in zip(given, most, strict=True)):
            raise ValueError(
                f"{self.name}: points={list(points)}; the rubric has {len(most)} lines of at most {most} points"
            )
        missed = [text for p, (top, text) in zip(given, self.rubric, strict=True) if p < top]
        more = " Look again at: " + "; ".join(missed) if missed else ""
        return Verdict(
            "assessed", f"{sum(given)} of {self.most} points.{more}{cards.answer('A full answer', self.sample)}"
        )

    def __call__(self, answer: Any = ..., points: Any = None) -> Verdict:
        """Write the answer down, and with `points` (one number a line of the rubric) what it is worth."""
        found = self.judge(answer, points)
        if found.status == "assessed":
            got = {"points": sum(map(int, points)), "of": self.most}
            again = progress.tasks().get(self.key, {}).get("answer") != str(answer)
            progress.record(self.key, kind=self.kind, status="assessed", answer=str(answer), again=again, **got)
        elif found.status == "answered":
            progress.record(self.key, kind=self.kind, status="answered", answer=str(answer), of=self.most)
        return found

    def _rubric(self) -> str:
        rows = "".join(f"<li>{points} point{'s' * (points > 1)}: {text}</li>" for points, text in self.rubric)
        return f"<ul>{rows}</ul>"

    def _below(self) -> str:
        return cards.fold("Rubric", self._rubric() + cards.answer("A full answer", f"<p>{self.sample}</p>"))

    def _plain_body(self) -> list[str]:
        return [f"{self.most} points by a rubric, which you unfold after you have written."]

    def _repr_mimebundle_(self, **_: Any) -> dict:
        from tpo_course.widgets import answering  # a checker alone needs no widgets

        return answering.show(self)
