"""What an exercise is made of: a card, hints, and a checker that knows the common mistakes.

A checker calls the learner's function and the right one on the same cases and compares values and gradients. Where they
differ it looks whether the answer is one of the known mistakes, and names it. Tasks that ask for something else than a function
(a choice, an order, an explanation; a prediction, a break) are in `kinds` and `predicting`; `words` says how they are written.

>>> mean = Mistake("You averaged over the tokens; it is their sum.", lambda logps: logps.mean(-1), "mean")
>>> card = {"title": "From tokens to a response", "what": "Return the sum.", "why": "Every loss starts here."}
>>> exercise = Exercise(
...     "logp", **card, difficulty=1, minutes=3, hints=("Log-probabilities add.",), mistakes=(mean,),
...     right=lambda logps: logps.sum(-1), cases=lambda: (Case(logps=torch.tensor([[-1.0, -3.0]])),),
... )
>>> exercise(lambda logps: None).status, exercise(lambda logps: logps.sum(-1)).status
('not attempted', 'correct')
>>> exercise(lambda logps: logps.mean(-1))
wrong: You averaged over the tokens; it is their sum.
"""

import ast
import dataclasses
import functools
import html
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tpo_course import cards, checking, progress
from tpo_course.checking import Unlike, observe
from tpo_course.sealed import SOLUTIONS
from tpo_lib.losses import OBJECTIVES
from tpo_lib.types import LossOutput, TokenStats


class Case:
    """One set of arguments; tensors among them (also inside dataclasses) that require a gradient have it compared.

    Args:
        words: what is special about this case, for the message ("a response of one token"); "" if nothing is.
        arguments: by name, as the learner's function takes them.
    """

    def __init__(self, words: str = "", /, **arguments: Any) -> None:
        self.words, self.arguments = words, arguments


def normal(seed: int, dtype: torch.dtype = torch.float64) -> Callable[..., Tensor]:
    """A source of standard normal tensors, by shape, for cases."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)


def marks(*rows: str) -> Tensor:
    """(N, T) bool mask for cases, one string a row: "x" is True."""
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def loss_of(objective: Callable[..., LossOutput]) -> Callable[..., Tensor]:
    """An objective of the library as an answer: its losses alone, (B,)."""
    return lambda chosen, rejected, **given: objective(chosen, rejected, **given).loss


def narrow(stats: TokenStats) -> TokenStats:
    """The same in float32, as in training; leaves with a gradient stay leaves."""

    return stats.map(lambda t: t.detach().float().requires_grad_(t.requires_grad) if t.is_floating_point() else t)


@dataclass(frozen=True)
class Uses:
    """A wrong answer told by what it uses, not by what it computes: names that must not occur in the learner's code."""

    names: tuple[str, ...]
    wrong: Callable[..., Any]  # an answer that does


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that learners give: what to tell them, and a function that makes the same mistake."""

    message: str
    wrong: Any  # a function, a value where no function is asked for, Uses, or a tuple of them: ways to make it
    name: str = ""

    @property
    def ways(self) -> tuple:
        """Answers that make it."""
        ways = self.wrong if isinstance(self.wrong, tuple) else (self.wrong,)
        return tuple(way.wrong if isinstance(way, Uses) else way for way in ways)


@dataclass(frozen=True)
class Verdict:
    """What a checker says (HTML); shown in a notebook when it is the last expression of a cell."""

    status: Literal["correct", "wrong", "not attempted", "predicted", "answered", "assessed"]
    message: str
    mistakes: tuple[str, ...] = ()  # the names of those that were recognised

    def __repr__(self) -> str:
        return f"{self.status}: {cards.plain(self.message)}"

    def _repr_html_(self) -> str:
        return cards.verdict(self.status, self.message)


@dataclass(frozen=True)
class Task:
    """What every task shows and keeps; a kind of task says what its card holds, and how an answer is judged.

    Raises:
        ValueError: the difficulty is out of range.
    """

    kind: ClassVar[str]
    label: ClassVar[str]  # of the kind, on the card

    name: str  # as in the notebook: `check.NAME`
    title: str
    what: str
    why: str
    difficulty: int  # 1 to 5
    minutes: int  # that it takes someone who has read the chapter
    hints: tuple[str, ...]
    chapter: str = field(
        default="", kw_only=True
    )  # its module in `exercises/`, and in `notebooks/solutions/`, without ".py"

    def __post_init__(self) -> None:
        if not 1 <= self.difficulty <= 5:
            raise ValueError(f"exercise {self.name}: the difficulty must be 1 to 5, got {self.difficulty}")

    @property
    def key(self) -> str:
        """What `progress` calls it."""
        return f"{self.chapter}.{self.name}"

    def __call__(self, answer: Any = ..., **more: Any) -> Verdict:
        """Judge an answer, say what is wrong with it, and write down that it was tried."""
        verdict = self.judge(answer, **more)
        if verdict.status != "not attempted":
            progress.record(
                self.key, kind=self.kind, status=verdict.status, mistakes=verdict.mistakes, **self._kept(answer)
            )
        return verdict

    def judge(self, answer: Any) -> Verdict:
        """The verdict, without writing anything down."""
        raise NotImplementedError

    def _kept(self, answer: Any) -> dict[str, Any]:
        return {"answer": str(answer)}

    def __repr__(self) -> str:
        about = f"{self.label}: {self.title} (difficulty {self.difficulty} of 5, {cards.minutes(self.minutes)})"
        return cards.plain("\n".join([about, self.what, f"Why: {self.why}", *self._plain_body()]))

    def _repr_html_(self) -> str:
        folded = self._below()
        for number in range(len(self.hints), 0, -1):
            folded = cards.fold(f"Hint {number} of {len(self.hints)}", f"<p>{self.hints[number - 1]}</p>{folded}")
        return (
            f'<div style="{cards.BOX}"><b>{self.label}: {self.title}</b> &nbsp; {cards.dots(self.difficulty)}, '
            f"{cards.minutes(self.minutes)}<p><b>What.</b> {self.what}</p>{self._body()}"
            f"<p><b>Why.</b> {self.why}</p>{folded}</div>"
        )

    def _body(self) -> str:
        return ""

    def _plain_body(self) -> list[str]:
        return []

    def _below(self) -> str:
        """What is folded below the last hint."""
        return ""


@dataclass(frozen=True, repr=False)
class Exercise(Task):
    """A function to write. Texts may hold inline HTML and LaTeX between dollars.

    Raises:
        ValueError: there is no hint or the difficulty is out of range.
    """

    kind: ClassVar[str] = "function"
    label: ClassVar[str] = "Exercise"

    right: Any  # the right answer: a function, or a value where no function is asked for
    cases: Callable[[], tuple[Case, ...]] = lambda: (Case(),)  # fresh arguments for every call
    mistakes: tuple[Mistake, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hints:
            raise ValueError(f"exercise {self.name}: needs a hint")

    def judge(self, answer: Any) -> Verdict:
        """Check an answer (a function, or a value) and say what is wrong with it."""
        if checking.is_stub(answer):
            return Verdict("not attempted", f"Hint: {self.hints[0]}")
        given = []
        expected = [observe(self.right, case.arguments) for case in self.cases()]
        for case, want in zip(self.cases(), expected, strict=True):
            problem = self._run(answer, case, want, given)
            if problem is not None:
                return self._blame_the_helper(answer) or Verdict("wrong", problem)
        return self._judge_values(answer, given, expected)

    def _run(self, answer: Any, case: Case, want: checking.Observation, given: list) -> str | None:
        """Append what the answer does with a case; a sentence if it cannot be compared."""
        try:
            seen = checking.as_asked(observe(answer, case.arguments), want)
        except Unlike as error:
            return f"Your function cannot be called as it is asked for. {html.escape(str(error))}."
        except Exception as error:  # the learner's code may raise anything; the verdict repeats it
            said = f"{type(error).__name__}: {html.escape(str(error))}"
            return f"Your code raised {said}{checking.where(error, answer)}{_at(case)}"
        if seen.raw is None or seen.raw is Ellipsis:
            return f"Your function returns nothing: its <code>return</code> is missing{_at(case)}"
        given.append(seen)
        problem = checking.unlike(seen, want)
        return None if problem is None else f"{problem}{_at(case)}"

    def _blame_the_helper(self, answer: Any) -> Verdict | None:
        found = checking.open_helpers(answer)
        if not found:
            return None
        names = " and ".join(f"<code>{name}</code>" for name in found)
        are = "are" if len(found) > 1 else "is"
        said = f"It calls {names}, which {are} still to be written. Do that first; then this can be checked."
        return Verdict("not attempted", said)

    def _judge_values(self, answer: Any, given: list, expected: list) -> Verdict:
        for mistake in self.mistakes:
            used = mistake.wrong.names if isinstance(mistake.wrong, Uses) else ()
            if used and not checking.names_in(answer).isdisjoint(used):
                return Verdict("wrong", mistake.message, (mistake.name,))
        agree = checking.agree
        differing = [i for i, (got, want) in enumerate(zip(given, expected, strict=True)) if not agree(got, want)]
        if not differing:
            gradients = " and gradients" if any(seen.gradients for seen in expected) else ""
            cases = "the only case" if len(given) == 1 else f"all {len(given)} cases"
            return Verdict("correct", f"{self.title}: values{gradients} agree in {cases}.")
        for mistake in self.mistakes:
            for way in () if isinstance(mistake.wrong, Uses) else mistake.ways:
                if all(map(agree, given, (observe(way, case.arguments) for case in self.cases()))):
                    return Verdict("wrong", mistake.message, (mistake.name,))
        if not callable(self.right):
            return Verdict("wrong", f"It is not {html.escape(str(answer))}.")  # and not what it is
        first = differing[0]
        return Verdict("wrong", f"{checking.difference(given[first], expected[first])}{_at(self.cases()[first])}")

    def _kept(self, answer: Any) -> dict[str, Any]:
        return {}  # no code is written down

    def apply(self, answer: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """What the answer gives if its checker says correct, else None, and says so: cells survive half-done work."""
        if not self._ready(answer, "it is not used here"):
            return None
        return answer(*arguments, **named)

    def used(self, answer: Any) -> Any:
        """What a cell goes on with: the answer if its checker says correct, else the course's own; says which of the two.

        Example:
            >>> half = Exercise("half", "Half", "w", "y", 1, 1, ("Divide.",), lambda x: x / 2, lambda: (Case(x=torch.ones(1)),))
            >>> half.used(...)(3.0)
            half is not attempted: the course's own is used. Solve it and run this cell again
            1.5
            >>> mine = lambda x: 0.5 * x
            >>> half.used(mine) is mine
            half is correct: yours is used
            True
        """
        return answer if self._ready(answer, "the course's own is used", "yours is used") else self.right

    def _ready(self, answer: Any, else_: str, then: str = "") -> bool:
        """Whether the answer is right; prints what happens if not, and if so where there is something to say."""
        status = self.judge(answer).status
        if status != "correct":
            print(f"{self.name} is {status}: {else_}. Solve it and run this cell again")
        elif then:
            print(f"{self.name} is correct: {then}")
        return status == "correct"

    def trains(self, answer: Callable[..., Tensor], objective: str) -> Callable[..., LossOutput] | None:
        """What `tpo_lib.fit` takes as its loss: the answer if it is right, else None, the library's own; says which of the two.

        The answer gives the (B,) losses of an exercise; the rewards that are logged beside them are the library's.
        """
        if not self._ready(answer, f"tpo_lib.losses.{objective} trains instead", "the loss that trains is yours"):
            return None
        names = [name for name in self.cases()[0].arguments if name not in ("chosen", "rejected")]

        @functools.wraps(answer, updated=())  # a run's record names the answer
        def loss(chosen: TokenStats, rejected: TokenStats, **given: Any) -> LossOutput:
            library = OBJECTIVES[objective].fn(chosen, rejected, **given)
            asked = {"chosen": chosen, "rejected": rejected} | {name: given[name] for name in names}
            return dataclasses.replace(library, loss=checking.call(answer, asked))

        return loss

    def _below(self) -> str:
        if not self.chapter or SOLUTIONS is None:
            return ""
        file = SOLUTIONS / f"{self.chapter}.py"
        if not file.is_file():  # installed without the notebooks
            return f"<p>Solution: <code>notebooks/solutions/{self.chapter}.py</code> in the repository.</p>"
        return cards.fold("Solution", f"<pre>{html.escape(solution_source(file, self.name))}</pre>")


def solution_source(file: Path, name: str) -> str:
    """The source of the function (or value) `name` in a solution file.

    Raises:
        KeyError: the file defines no such name.
    """
    text = file.read_text()
    for node in ast.parse(text).body:
        targets = [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        if getattr(node, "name", None) == name or name in targets:
            return ast.get_source_segment(text, node)
    raise KeyError(f"{file} defines no {name}")


def _at(case: Case) -> str:
    return f", in the case of {case.words}." if case.words else "."
