"""Tasks that ask before something is run: what a cell will find, and which changes an equation notices."""

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from tpo_course import cards, progress
from tpo_course.derivations.breaks import changed, find
from tpo_course.derivations.steps import TOLERANCE
from tpo_course.exercise import Verdict
from tpo_course.kinds import Lettered
from tpo_course.world import TokenWorld

# ---- break it


@dataclass(frozen=True, repr=False)
class BreakIt(Lettered):
    """An equation and changes to it. Which of them leave it standing? The residuals answer."""

    kind: ClassVar[str] = "break_it"
    label: ClassVar[str] = "Break it"
    many: ClassVar[bool] = True

    step: str  # "derivation.step"
    changes: Mapping[
        str, tuple[str, str]
    ]  # choice: (piece of the source of the step's sides, what stands there instead)
    world: Callable[[], TokenWorld]
    hyper: Mapping[str, float]

    def residuals(self) -> dict[str, float]:
        """{"": of the step as it is, choice: with that change}."""
        return dict(_residuals(self))

    def _judge(self, names: tuple[str, ...]) -> Verdict:
        standing = {name for name, value in self.residuals().items() if name and value <= TOLERANCE}
        wrong = [c.name for c in self.choices if (c.name in standing) != (c.name in names)]
        status = "wrong" if wrong else "correct"
        said = " ".join(f"<b>{self.letter(name)}</b>: {self.named(name).why}" for name in wrong)
        said = said or "You knew which changes the equation notices."
        return Verdict(status, said + self._table(), tuple(wrong))

    def _ask(self) -> str:
        return 'Answer with the letters of the changes that leave it standing, "" if none does. ' + super()._ask()

    def _above(self) -> str:
        step = find(self.step)
        return f"<p>$${step.latex}$$</p><p>In an exact world its residual is {self.residuals()['']:.0e}. Changes:</p>"

    def _plain_body(self) -> list[str]:
        return [f"$${find(self.step).latex}$$ residual {self.residuals()['']:.0e}", *super()._plain_body()]

    def _table(self) -> str:
        found = self.residuals()
        rows = [("as it is", found[""])] + [(f"{self.letter(c.name)}) {c.text}", found[c.name]) for c in self.shown]
        body = "".join(f"<tr><td style='text-align:left'>{text}</td><td>{value:.1g}</td></tr>" for text, value in rows)
        return f"<table><tr><th>change</th><th>residual</th></tr>{body}</table>"

    def _answer(self) -> str:
        return self._table() + "".join(f"<p><b>{self.letter(c.name)}.</b> {c.why}</p>" for c in self.shown)


@cache
def _residuals_of(step: str, changes: tuple, world: Callable[[], TokenWorld], hyper: tuple) -> dict[str, float]:
    whole, where = find(step), world()
    each = {"": whole} | {name: changed(whole, *pieces) for name, pieces in changes}
    return {name: one.residual(where, **dict(hyper)) for name, one in each.items()}


def _residuals(task: BreakIt) -> dict[str, float]:
    return _residuals_of(task.step, tuple(task.changes.items()), task.world, tuple(task.hyper.items()))


# ---- predict


@dataclass(frozen=True, repr=False)
class Predict(Lettered):
    """Something asked before a cell runs. The prediction is written down, and `reveal` shows it beside the truth.

    The truth is the name of a choice, or a number (then there are no choices, and `wrong` holds numbers people think of).
    """

    kind: ClassVar[str] = "predict"
    label: ClassVar[str] = "Predict"

    truth: str | float
    sentence: str  # why it is so (HTML)
    within: float = 0.25  # a number is right within this share of the truth
    wrong: Mapping[str, tuple[float, str]] = None  # mistake: (number, message)

    @property
    def _number(self) -> bool:
        return not isinstance(self.truth, str)

    def __call__(self, answer: Any = ..., **more: Any) -> Verdict:
        """Write a prediction down; the truth comes with `reveal`."""
        found = self.judge(answer)
        if found.status == "not attempted":
            return found
        progress.record(self.key, kind=self.kind, status="predicted", **self._kept(answer))
        return Verdict("predicted", f"You say {self._said(answer)}. It is written down; now run the next cell.")

    def reveal(self, value: Any = None) -> Verdict:
        """Prediction and truth, after the cell has run; folded if nothing was predicted.

        Args:
            value: what the cell found, a number or the name of a choice: it must be the truth.

        Raises:
            ValueError: it is not, so the words of this task no longer fit the chapter.
        """
        self._compare(value)
        said = progress.tasks().get(self.key, {}).get("answer", "")
        truth = f"{self._said(self.truth)}. {self.sentence}"
        if not said:
            return Verdict("not attempted", "Nothing was predicted. " + cards.answer("The truth", f"<p>{truth}</p>"))
        found = self.judge(said)
        progress.record(
            self.key, kind=self.kind, status=found.status, mistakes=found.mistakes, answer=said, again=False
        )
        return Verdict(found.status, f"You predicted {self._said(said)}; it is {truth} {found.message}", found.mistakes)

    def judge(self, answer: Any = ...) -> Verdict:
        """The verdict on a prediction, without writing anything down."""
        if not self._number or answer is None or answer is Ellipsis:
            return super().judge(answer)
        try:
            number = float(answer)
        except (TypeError, ValueError):
            return Verdict("not attempted", f"{html.escape(repr(answer))} is no number.")
        for name, (value, message) in (self.wrong or {}).items():
            if self._near(number, value) and not self._near(number, self.truth):
                return Verdict("wrong", message, (name,))
        return Verdict("correct" if self._near(number, self.truth) else "wrong", "")

    def _judge(self, names: tuple[str, ...]) -> Verdict:
        if len(names) != 1:
            return Verdict("not attempted", "Answer with one of them.")
        if names[0] == self.truth:
            return Verdict("correct", "")
        return Verdict("wrong", self.named(names[0]).why, names)

    def _near(self, number: float, value: float) -> bool:
        return abs(number - value) <= self.within * abs(value) + 1e-12

    def _said(self, answer: Any) -> str:
        if self._number:
            number = float(answer)
            return f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"
        return self.named(self.picked(answer)[0]).text.rstrip(".")

    def _compare(self, value: Any) -> None:
        if value is None:
            return
        signed = {choice.name for choice in self.choices} <= {"+", "-", "0"} and not isinstance(value, str)
        found = ("0" if value == 0 else "+" if value > 0 else "-") if signed and not self._number else value
        if found != self.truth and not (self._number and self._near(float(found), self.truth)):
            raise ValueError(
                f"{self.key}: the cell found {value!r}, the exercise says {self.truth!r}; mend one of them"
            )

    def _ask(self) -> str:
        return "Predict before you run the next cell: " + ("a number." if self._number else "a letter.")

    def _kept(self, answer: Any) -> dict[str, Any]:
        return {"answer": f"{float(answer):g}"} if self._number else super()._kept(answer)

    def _body(self) -> str:
        return "" if self._number else super()._body()

    def _answer(self) -> str:
        return f"<p>{self._said(self.truth)}. {self.sentence}</p>"

    def _below(self) -> str:
        return cards.answer("The truth", self._answer())
