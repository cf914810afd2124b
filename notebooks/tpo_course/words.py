"""The words of a chapter's tasks: Markdown beside its module, joined by name.

To add a task, write its functions into a chapter's `exercises/NAME.py` and its words into the `NAME.md` beside it; the names must
be the same on both sides. The words are Markdown with inline HTML, and LaTeX between dollars. All kinds begin alike:

    ## loss                               the name of the task: of the function that the learner writes, `check.loss`
    **Its title** (difficulty 2 of 5, about 6 minutes)
    ### what                              the task, and then "### why"
    ### hint 1                            as many as you like, from a nudge to a strong one; never the answer itself

What follows depends on the kind, and on what the module says:

    loss = chapter.exercise("loss", right, cases, swapped=..., no_beta=...)    a wrong function a mistake, or several in a tuple
    ### mistake: swapped                  what is said of the wrong answer "swapped"

    ends = chapter.predict("ends", "+")   or a number: chapter.predict("ends", 0.4, within=0.25, forgot_beta=0.8)
    ### choice: +                         its text; below an empty line, why it is not so (no choices where a number is asked)
    ### truth                             one sentence: why it is as it is
    ### mistake: forgot_beta              of a number that people think of

    shift = chapter.choose("shift", "cancels")               several right ones: chapter.choose("shift", "a", "b")
    ### choice: cancels                   its text; below an empty line, why it is right, or wrong

    seen = chapter.name_the_bug("seen", "mean_for_sum", picture=png)
    ### code, or ### alt                  fenced lines, or a description of the picture (then `picture` gives the PNG)
    ### choice: bug_1                     why; a bug of chapter 7 (`bugs.BUGS`) brings its text along, others write it as above

    steps = chapter.order("steps", "first", "second", "third", too_soon=("third", "first"))
    ### choice: first                     a step; below an empty line, why it stands there (may be left out)
    ### mistake: too_soon                 of a step that comes before another

    form = chapter.complete("form", "beta", "ref", no_reference=("beta", None))
    ### formula                           with blanks [1], [2], ...; the module gives their pieces, in this order
    ### choice: beta                      a piece; below an empty line, why it is wrong where it does not belong
    ### mistake: no_reference             of wrong pieces in the blanks, None for any

    z = chapter.break_it("z", "dpo.z_cancels", world, {"no_beta": ("h.beta * ", "")}, beta=0.5)
    ### choice: no_beta                   the change in words; below an empty line, why the equation notices it, or why not

    why = chapter.open_ended("why")
    ### rubric                            "- (2) for what" a line
    ### sample                            an answer that gets all points

    ## quiz                               of the chapter, in "### question 1" and so on; every option explains itself:
    - [x] the right one                   "- [ ]" for the others; below it, indented by two spaces, why
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from tpo_course.cards import as_html, letters
from tpo_course.exercise import Case, Exercise, Mistake, Task, Verdict
from tpo_course.kinds import Choice, Choose, Complete, NameTheBug, OpenEnded, Order
from tpo_course.predicting import BreakIt, Predict
from tpo_course.quiz import Option, Question, Quiz
from tpo_course.sealed import unseal
from tpo_course.world import TokenWorld


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

    sections = parts(unseal(file.read_text(encoding="utf-8")), "##", file.name)
    return {name: parts(text, "###", f'{file.name}, "## {name}"') for name, text in sections.items()}


class Chapter:
    """The tasks of a module (its `__file__`), whose words stand in the Markdown beside it; the form: top of this file."""

    def __init__(self, module: str) -> None:
        self.file = Path(module).with_suffix(".md")
        self.words = read_words(self.file)
        self.tasks: dict[str, Task] = {}

    def answer(self, name: str, *answer: Any, **more: Any) -> Verdict:
        """`check.NAME(answer)` by name: a module exports it as `predict`.

        Raises:
            KeyError: there is no such task; names those there are.
        """
        if name not in self.tasks:
            raise KeyError(f"{self.file.stem} has no task {name!r}; it has {', '.join(self.tasks)}")
        return self.tasks[name](*answer, **more)

    # ---- the kinds of task

    def exercise(
        self, name: str, right: Any, cases: Callable[[], tuple[Case, ...]] = lambda: (Case(),), /, **mistakes: Any
    ) -> Exercise:
        """A function to write (or a value to give); `mistakes` are wrong answers by name.

        Raises:
            ValueError: a name stands on one side alone, or the words have another form; names file, heading and fix.
        """
        about, text = self._about(name, mistakes, least=1)
        known = tuple(Mistake(text[f"mistake: {mistake}"], wrong, mistake) for mistake, wrong in mistakes.items())
        return self._keep(Exercise(*about, right, cases, known, chapter=self.file.stem))

    def predict(self, name: str, truth: str | float, /, *, within: float = 0.25, **mistakes: float) -> Predict:
        """A prediction: `truth` is the name of a choice, or a number, right within a share of it."""
        about, text = self._about(name, mistakes, "truth", choices=isinstance(truth, str))
        wrong = {mistake: (value, text[f"mistake: {mistake}"]) for mistake, value in mistakes.items()}
        choices = self._choices(name, [truth]) if isinstance(truth, str) else ()
        given = (choices, truth, text["truth"], within, wrong)
        return self._keep(Predict(*about, *given, chapter=self.file.stem))

    def choose(self, name: str, /, *right: str) -> Choose:
        """The right one of several statements, or all that are right."""
        about, _ = self._about(name, {}, choices=True)
        return self._keep(Choose(*about, self._choices(name, right), frozenset(right), chapter=self.file.stem))

    def name_the_bug(self, name: str, right: str, /, picture: Callable[[], bytes] | None = None) -> NameTheBug:
        """Code, or a picture (a function that gives a PNG), with a bug in it."""
        about, text = self._about(name, {}, "alt" if picture else "code", choices=True)
        code = "" if picture else re.sub(r"^```.*\n?", "", self.words[name]["code"], flags=re.MULTILINE).rstrip()
        given = (self._choices(name, [right]), frozenset([right]), code, picture, text.get("alt", ""))
        return self._keep(NameTheBug(*about, *given, chapter=self.file.stem))

    def order(self, name: str, /, *right: str, **mistakes: tuple[str, str]) -> Order:
        """Steps in their order; a mistake is (the step that came too early, before which)."""
        about, text = self._about(name, mistakes, choices=True)
        found = {choice.name: choice for choice in self._choices(name, right, all_of_them=True)}
        early = {mistake: (pair, text[f"mistake: {mistake}"]) for mistake, pair in mistakes.items()}
        return self._keep(Order(*about, tuple(found[step] for step in right), early, chapter=self.file.stem))

    def complete(self, name: str, /, *right: str, **mistakes: tuple[str | None, ...]) -> Complete:
        """A formula with blanks, and the pieces that fill them; a mistake is wrong pieces, None for any."""
        about, text = self._about(name, mistakes, "formula", choices=True)
        blanks = [f"[{i + 1}]" for i in range(len(right))]
        if [blank for blank in re.findall(r"\[\d+\]", text["formula"]) if blank in blanks] != blanks:
            raise self._error(name, f'"### formula" needs the blanks {" ".join(blanks)} once each, in this order')
        wrong = {mistake: (pieces, text[f"mistake: {mistake}"]) for mistake, pieces in mistakes.items()}
        given = (self._choices(name, right), text["formula"], right, wrong)
        return self._keep(Complete(*about, *given, chapter=self.file.stem))

    def break_it(
        self,
        name: str,
        step: str,
        world: Callable[[], TokenWorld],
        changes: Mapping[str, tuple[str, str]],
        /,
        **hyper: float,
    ) -> BreakIt:
        """Changes to a derivation's step (a piece of its source, what stands there instead): which leave it standing?"""
        about, _ = self._about(name, {}, choices=True)
        choices = self._choices(name, changes, all_of_them=True)
        return self._keep(BreakIt(*about, choices, step, changes, world, hyper, chapter=self.file.stem))

    def open_ended(self, name: str, /) -> OpenEnded:
        """A question with a rubric."""
        about, text = self._about(name, {}, "rubric", "sample")
        lines = re.split(r"^- ", self.words[name]["rubric"], flags=re.MULTILINE)[1:]
        rubric = [re.fullmatch(r"\((\d)\) (.+)", line.strip(), re.DOTALL) for line in lines]
        if not rubric or None in rubric:
            raise self._error(name, '"### rubric" needs lines "- (2) for what", points first')
        points = tuple((int(line[1]), as_html(line[2])) for line in rubric)
        return self._keep(OpenEnded(*about, points, text["sample"], chapter=self.file.stem))

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
        return Quiz(tuple(questions), self.file.stem)

    # ---- reading

    def _keep(self, task: Any) -> Any:
        self.tasks[task.name] = task
        return task

    def _about(
        self, name: str, mistakes: Collection[str], *more: str, choices: bool = False, least: int = 0
    ) -> tuple[tuple, dict[str, str]]:
        """The fields of Task, and all words as HTML; `more` are headings of this kind, `least` hints are needed."""
        words = self._section(name)
        number = max(least, sum(heading.startswith("hint ") for heading in words))
        hints = [f"hint {i + 1}" for i in range(number)]
        asked = ["", "what", "why", *hints, *more, *(f"mistake: {mistake}" for mistake in mistakes)]
        asked += [heading for heading in words if choices and heading.startswith("choice: ")]
        self._same_names(name, words, asked)
        card = re.fullmatch(r"\*\*(.+)\*\* \(difficulty ([1-5]) of 5, about (\d+) minutes?\)", words[""])
        if card is None:
            raise self._error(name, f'says "{words[""]}"; write "**Title** (difficulty 2 of 5, about 6 minutes)"')
        text = {heading: as_html(words[heading]) for heading in words}
        hinted = tuple(text[hint] for hint in hints)
        return (name, as_html(card[1]), text["what"], text["why"], int(card[2]), int(card[3]), hinted), text

    def _choices(self, name: str, known: Collection[str], *, all_of_them: bool = False) -> tuple[Choice, ...]:
        """The choices of a task in the order of the words; the module must not name others (nor, maybe, fewer)."""
        found = []
        for heading, body in self.words[name].items():
            if heading.startswith("choice: "):
                key = heading.removeprefix("choice: ")
                text, _, why = body.partition("\n\n")
                bug = _bug(key)
                found.append(Choice(key, bug or as_html(text), as_html(body if bug else why)))
        names = [choice.name for choice in found]
        if set(known) - set(names) or (all_of_them and set(names) - set(known)) or len(names) < 2:
            raise self._error(
                name, f"has the choices {names}, {self.file.stem}.py names {list(known)}; make them the same"
            )
        several = len(names) if len(known) > 1 else 1  # letters that an answer may hold
        for each in names:
            if set(each) <= set(letters(len(names))) and len(set(each)) == len(each) <= several:
                raise self._error(
                    name, f"has a choice {each!r}, which reads like letters of its card; name it otherwise"
                )
        return tuple(found)

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


def _bug(key: str) -> str:
    """The text of chapter 7's bug "bug_N", "" of another key."""
    from tpo_course.bugs import BUGS  # which imports half of the library

    number = key.removeprefix("bug_")
    return BUGS.get(int(number), "") if key.startswith("bug_") and number.isdigit() else ""
