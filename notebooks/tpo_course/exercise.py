"""What an exercise is made of: a card, hints, a checker that knows the common mistakes, and a quiz.

A checker calls the learner's function and the right one on the same cases and compares values and gradients. Where they
differ it looks whether the answer is one of the known mistakes, and names it.

To add an exercise, write its functions into a chapter's `exercises/NAME.py` and its words into the `NAME.md` beside it; the
names must be the same on both sides. The module says `loss = chapter.exercise("loss", right, cases, swapped=..., no_beta=...)`
with one wrong function a mistake; the words are Markdown with inline HTML, and LaTeX between dollars:

    ## loss                               the name of the function that the learner writes
    **Its title** (difficulty 2 of 5, about 6 minutes)
    ### what                              the task, and then "### why"
    ### hint 1                            as many as you like, from a nudge to almost the answer
    ### mistake: swapped                  what is said of the wrong answer "swapped"
    ## quiz                               of the chapter, in "### question 1" and so on; every option explains itself:
    - [x] the right one                   "- [ ]" for the others; below it, indented by two spaces, why

>>> mean = Mistake("You averaged over the tokens; it is their sum.", lambda logps: logps.mean(-1))
>>> card = {"title": "From tokens to a response", "what": "Return the sum.", "why": "Every loss starts here."}
>>> exercise = Exercise(
...     "logp", **card, difficulty=1, minutes=3, hints=("Log-probabilities add.",), mistakes=(mean,),
...     right=lambda logps: logps.sum(-1), cases=lambda: (Case(logps=torch.tensor([[-1.0, -3.0]])),),
... )
>>> exercise(lambda logps: None).status, exercise(lambda logps: logps.sum(-1)).status
('not attempted', 'correct')
>>> print(exercise(lambda logps: logps.mean(-1)).message)
You averaged over the tokens; it is their sum.
"""

import ast
import dataclasses
import functools
import html
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tpo_lib.losses import OBJECTIVES
from tpo_lib.types import LossOutput, TokenStats

HERE = Path(__file__).parent
SOLUTIONS = next(p for p in (HERE.parent / "solutions", HERE / "solutions") if p.is_dir())  # a checkout; installed
RTOL, ATOL = 1e-5, 1e-8


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
class Mistake:
    """A wrong answer that learners give: what to tell them, and a function that makes the same mistake."""

    message: str
    wrong: Callable[..., Any]


@dataclass(frozen=True)
class Verdict:
    """What a checker says; shown in a notebook when it is the last expression of a cell."""

    status: Literal["correct", "wrong", "not attempted"]
    message: str

    def __repr__(self) -> str:
        return f"{self.status}: {self.message}"

    def _repr_html_(self) -> str:
        looks = {"correct": ("✓", "#007a55"), "wrong": ("✗", "#b03a00"), "not attempted": ("○", "#555555")}
        sign, colour = looks[self.status]
        return (
            f'<div style="border-left:4px solid {colour};padding:.4em .8em"><b style="color:{colour}">'
            f"{sign} {self.status}</b><br>{self.message}</div>"
        )


@dataclass(frozen=True)
class Exercise:
    """A task with everything around it. Texts may hold inline HTML and LaTeX between dollars.

    Raises:
        ValueError: there is no hint or the difficulty is out of range.
    """

    name: str  # of the function to write, the same in the notebook and in `notebooks/solutions/`
    title: str
    what: str
    why: str
    difficulty: int  # 1 to 5
    minutes: int  # that it takes someone who has read the chapter
    hints: tuple[str, ...]  # at least one, from a nudge to almost the answer
    right: Any  # the right answer: a function, or a value where no function is asked for
    cases: Callable[[], tuple[Case, ...]] = lambda: (Case(),)  # fresh arguments for every call
    mistakes: tuple[Mistake, ...] = ()
    solution: str = ""  # module below `notebooks/solutions/`, without ".py"

    def __post_init__(self) -> None:
        if not self.hints or not 1 <= self.difficulty <= 5:
            raise ValueError(f"exercise {self.name}: needs a hint and a difficulty of 1 to 5, got {self.difficulty}")

    def __call__(self, answer: Any) -> Verdict:
        """Check an answer (a function, or a value) and say what is wrong with it."""
        expected = [_observe(self.right, case) for case in self.cases()]
        given = []
        for case, want in zip(self.cases(), expected, strict=True):
            try:
                given.append(_observe(answer, case))
            except Exception as error:  # the learner's code may raise anything; the verdict repeats it
                said = f"{type(error).__name__}: {html.escape(str(error))}"
                return Verdict("wrong", f"Your code raised {said}{_at(case)}")
            if given[-1] is None:
                return Verdict("not attempted", f"Hint: {self.hints[0]}")
            if (problem := _unlike(given[-1], want)) is not None:
                return Verdict("wrong", f"{problem}{_at(case)}")
        differing = [i for i, (got, want) in enumerate(zip(given, expected, strict=True)) if not _agree(got, want)]
        if not differing:
            gradients = " and gradients" if any(seen.gradients for seen in expected) else ""
            cases = "the only case" if len(given) == 1 else f"all {len(given)} cases"
            return Verdict("correct", f"{self.title}: values{gradients} agree in {cases}.")
        for mistake in self.mistakes:
            if all(map(_agree, given, (_observe(mistake.wrong, case) for case in self.cases()))):
                return Verdict("wrong", mistake.message)
        first = differing[0]
        return Verdict("wrong", f"{_difference(given[first], expected[first])}{_at(self.cases()[first])}")

    def trains(self, answer: Callable[..., Tensor], objective: str) -> Callable[..., LossOutput] | None:
        """What `tpo_lib.fit` takes as its loss: the answer if it is right, else None, the library's own; says which of the two.

        The answer gives the (B,) losses of an exercise; the rewards that are logged beside them are the library's.
        """
        status = self(answer).status
        if status != "correct":
            print(
                f"{self.name} is {status}: tpo_lib.losses.{objective} trains instead. Solve it and run this cell again"
            )
            return None
        print(f"{self.name} is correct: the loss that trains is yours")
        names = self.cases()[0].arguments.keys() - {"chosen", "rejected"}

        @functools.wraps(answer, updated=())  # a run's record names the answer
        def loss(chosen: TokenStats, rejected: TokenStats, **given: Any) -> LossOutput:
            library = OBJECTIVES[objective].fn(chosen, rejected, **given)
            own = answer(chosen=chosen, rejected=rejected, **{name: given[name] for name in names})
            return dataclasses.replace(library, loss=own)

        return loss

    def __repr__(self) -> str:
        return f"Exercise({self.name!r})"

    def _repr_html_(self) -> str:
        dots = "●" * self.difficulty + "○" * (5 - self.difficulty)
        folded = f"<p>{self.hints[-1]}</p>" + self._solution()
        for number in range(len(self.hints), 0, -1):
            text = f"<p>{self.hints[number - 1]}</p>" if number < len(self.hints) else ""
            folded = _fold(f"Hint {number} of {len(self.hints)}", text + folded)
        return (
            '<div style="border:1px solid #8a8a8a;border-radius:6px;padding:.6em 1em;max-width:60em">'
            f"<b>Exercise: {self.title}</b> &nbsp; <span title='difficulty {self.difficulty} of 5'>{dots}</span> "
            f"difficulty {self.difficulty} of 5, about {self.minutes} minutes"
            f"<p><b>What.</b> {self.what}</p><p><b>Why.</b> {self.why}</p>{folded}</div>"
        )

    def _solution(self) -> str:
        if not self.solution:
            return ""
        file = SOLUTIONS / f"{self.solution}.py"
        if not file.is_file():  # installed without the notebooks
            return f"<p>Solution: <code>notebooks/solutions/{self.solution}.py</code> in the repository.</p>"
        return _fold("Solution", f"<pre>{html.escape(solution_source(file, self.name))}</pre>")


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
        return f"Quiz of {len(self.questions)} questions"

    def _repr_html_(self) -> str:
        parts = []
        for number, question in enumerate(self.questions, 1):
            parts.append(f"<p><b>{number}. {question.text}</b></p>")
            for option in question.options:
                verdict = "Right" if option.right else "Not quite"
                parts.append(_fold(option.text, f"<p><b>{verdict}.</b> {option.why}</p>"))
        return f'<div style="max-width:60em">{"".join(parts)}</div>'


# ---- the words of a chapter


def read_words(file: Path) -> dict[str, dict[str, str]]:
    """{"## " heading: {"### " heading: the text below it}} of a Markdown file; "" is what comes before the first "### ".

    Raises:
        ValueError: a heading comes twice, or nothing stands below it.
    """

    def parts(text: str, level: str, place: str) -> dict[str, str]:
        found = {}
        before, *rest = re.split(rf"^{level} ", text, flags=re.MULTILINE)
        for part in rest:
            heading, _, body = (words.strip() for words in part.partition("\n"))
            if heading in found or not body:
                problem = "comes twice: rename one" if heading in found else "has no words: write them below it"
                raise ValueError(f'{place}: "{level} {heading}" {problem}')
            found[heading] = body
        return found if level == "##" else {"": before.strip()} | found

    sections = parts(file.read_text(encoding="utf-8"), "##", file.name)
    return {name: parts(text, "###", f'{file.name}, "## {name}"') for name, text in sections.items()}


def as_html(text: str) -> str:
    """Inline Markdown, `code` and *emphasis*, as HTML in one line; HTML and LaTeX between dollars stay as they are.

    >>> as_html("Return `a < b`, *not* $a^* < b^*$.")
    'Return <code>a &lt; b</code>, <i>not</i> $a^* < b^*$.'
    """

    def span(match: re.Match[str]) -> str:
        code, latex, emphasis = match.groups()
        if latex:
            return latex
        return f"<code>{html.escape(code, quote=False)}</code>" if code else f"<i>{emphasis}</i>"

    return re.sub(r"`([^`]+)`|(\$[^$]+\$)|(?<!\w)\*([^*\s][^*]*)\*(?!\w)", span, " ".join(text.split()))


class Chapter:
    """The exercises of a module (its `__file__`), whose words stand in the Markdown beside it; the form: top of this file."""

    def __init__(self, module: str) -> None:
        self.file = Path(module).with_suffix(".md")
        self.words = read_words(self.file)

    def exercise(
        self, name: str, right: Any, cases: Callable[[], tuple[Case, ...]] = lambda: (Case(),), /, **mistakes: Any
    ) -> Exercise:
        """Join functions and words; `mistakes` are wrong answers by name.

        Raises:
            ValueError: a name stands on one side alone, or the words have another form; names file, heading and fix.
        """
        words = self._section(name)
        hints = [f"hint {i + 1}" for i in range(max(1, sum(heading.startswith("hint ") for heading in words)))]
        self._same_names(name, words, ["", "what", "why", *hints, *(f"mistake: {mistake}" for mistake in mistakes)])
        card = re.fullmatch(r"\*\*(.+)\*\* \(difficulty ([1-5]) of 5, about (\d+) minutes\)", words[""])
        if card is None:
            raise self._error(name, f'says "{words[""]}"; write "**Title** (difficulty 2 of 5, about 6 minutes)"')
        text = {heading: as_html(words[heading]) for heading in words}
        known = tuple(Mistake(text[f"mistake: {mistake}"], wrong) for mistake, wrong in mistakes.items())
        about = (as_html(card[1]), text["what"], text["why"], int(card[2]), int(card[3]))
        return Exercise(name, *about, tuple(text[hint] for hint in hints), right, cases, known, self.file.stem)

    def quiz(self) -> Quiz:
        """The chapter's quiz.

        Raises:
            ValueError: a question has not one right option, or an option no explanation.
        """
        words = {heading: text for heading, text in self._section("quiz").items() if heading}
        self._same_names("quiz", words, [f"question {i + 1}" for i in range(len(words))])
        questions = []
        for heading, text in words.items():
            asked, *marked = re.split(r"^- \[([ x])\] ", text, flags=re.MULTILINE)
            options = []
            for mark, body in zip(marked[::2], marked[1::2], strict=True):
                option, _, why = (as_html(part) for part in body.partition("\n\n"))
                if not why:
                    problem = f'"### {heading}": "{option}" is not explained; indent why by two, below it'
                    raise self._error("quiz", problem)
                options.append(Option(option, mark == "x", why))
            if sum(option.right for option in options) != 1:
                raise self._error("quiz", f'"### {heading}" needs exactly one right option, marked "- [x]"')
            questions.append(Question(as_html(asked), tuple(options)))
        return Quiz(tuple(questions))

    def _section(self, name: str) -> dict[str, str]:
        if name not in self.words:
            raise ValueError(f'{self.file.name} has no "## {name}": write its words there')
        return self.words[name]

    def _same_names(self, name: str, found: Collection[str], asked: Collection[str]) -> None:
        without = ", ".join(f'"### {heading}"' for heading in asked if heading not in found)
        unasked = ", ".join(f'"### {heading}"' for heading in found if heading not in asked)
        problem = " and ".join(["lacks " + without] * bool(without) + ["alone has " + unasked] * bool(unasked))
        if problem:
            raise self._error(name, f"{problem}; make its headings and the names in {self.file.stem}.py the same")

    def _error(self, name: str, problem: str) -> ValueError:
        return ValueError(f'{self.file.name}, "## {name}" {problem}')


def _fold(summary: str, body: str) -> str:
    return f'<details style="margin:.2em 0 .2em 1em"><summary>{summary}</summary>{body}</details>'


@dataclass(frozen=True)
class _Observation:
    values: list[Tensor]
    gradients: list[Tensor]


def _observe(answer: Any, case: Case) -> _Observation | None:
    """Values that the answer gives, and the gradients of their sum at the case's tensors that require one; None of a stub."""
    leaves = [t for t in _tensors(case.arguments) if t.requires_grad]
    result = answer(**case.arguments) if callable(answer) else answer
    if result is None or result is Ellipsis:
        return None
    values = _tensors(result)
    total = sum((v.sum() for v in values if v.is_floating_point() and v.requires_grad), torch.zeros(()))
    gradients = [torch.zeros_like(t) for t in leaves]
    if leaves and total.requires_grad:
        gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return _Observation([v.detach() for v in values], list(gradients))


def _tensors(value: Any) -> list:
    """Tensors and numbers in a value: a number, a tensor, or a nest of dataclasses, mappings and sequences of them."""
    if isinstance(value, Tensor | bool | int | float):
        return [value if isinstance(value, Tensor) else torch.tensor(value)]
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, list | tuple) else []


def _unlike(got: _Observation, want: _Observation) -> str | None:
    """A sentence if the answer's results cannot be compared with the right ones."""
    if len(got.values) != len(want.values):
        return f"Your answer holds {len(got.values)} numbers or tensors; {len(want.values)} are asked for"
    for g, w in zip(got.values, want.values, strict=True):
        if g.shape != w.shape:
            return f"Your answer has shape {tuple(g.shape)}; {tuple(w.shape)} is asked for"
    return None


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.allclose(x.double(), y.double(), rtol=RTOL, atol=ATOL, equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


def _agree(got: _Observation, want: _Observation) -> bool:
    return _same(got.values, want.values) and _same(got.gradients, want.gradients)


def _difference(got: _Observation, want: _Observation) -> str:
    if _same(got.values, want.values):
        return "Your values are right, but not their gradient: look at what is detached and what is not"
    g, w = next((g, w) for g, w in zip(got.values, want.values, strict=True) if not _same([g], [w]))
    place = int((g.double() - w.double()).abs().nan_to_num(torch.inf).argmax())
    want, got = (float(t.flatten()[place]) for t in (w, g))
    return f"Expected {want:.6g}, got {got:.6g} (entry {place} of {g.numel()})"


def _at(case: Case) -> str:
    return f", in the case of {case.words}." if case.words else "."
