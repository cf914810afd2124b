"""What a derivation is made of: steps that show an equation and can be run, and the table that runs them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from torch import Tensor

from tpo_course.world import TokenWorld

TOLERANCE = 1e-9  # float64, a few hundred operations deep


@dataclass(frozen=True)
class Hyper:
    """The knobs a step may read; every one has a value so that any step runs in any world.

    Raises:
        ValueError: a value is out of range.
    """

    beta: float = 0.5  # strength of the pull towards pi_ref, > 0
    alpha: float = 0.5  # TDPO2's weight of the KL terms or TGDPO's strength of guidance, >= 0
    guide_beta: float = 1.0  # the beta of the DPO model that guides TGDPO, > 0
    margin: float = 0.5  # SimPO's target margin gamma_m (gamma in its paper and in `losses.simpo`), >= 0

    def __post_init__(self) -> None:
        if self.beta <= 0 or self.guide_beta <= 0 or self.alpha < 0 or self.margin < 0:
            raise ValueError(f"{self}: beta and guide_beta must be above 0, alpha and margin at least 0")


@dataclass(frozen=True)
class Step:
    """One displayed equation, and the two sides of it as numbers."""

    sides: Callable[
        [TokenWorld, Hyper], tuple[Tensor, Tensor]
    ]  # left and right, of one shape, each computed its own way
    relation: str = "="  # or "<="
    gamma_one: bool = False  # whether it holds only without discount
    by_definition: bool = False  # whether the right side is the left one rearranged, true of any numbers put in
    implements: str | None = None  # the function of the library or the course that computes it, as a dotted name
    symbolic: Callable[[], object] | None = None  # -> sympy expression that must be exactly 0
    numbers: Callable[[TokenWorld, Hyper], dict[str, float]] | None = None  # that say how large a gap is, by name
    # The words beside the code come from the derivation's Markdown (`read`).
    title: str = ""
    latex: str = ""  # the equation, for MathJax or KaTeX, without dollars
    words: str = ""  # what it says and why it follows, to the reader
    changed: str = ""  # the part of `latex` that is new in this step, for highlighting
    source: str = ""  # where it is published
    assumption: str = ""  # the one that enters here, if one does

    @property
    def key(self) -> str:
        """A short name, unique within the derivation."""
        return self.sides.__name__

    def residual(self, world: TokenWorld, **hyper: float) -> float:
        """Largest absolute gap between the two sides; for an inequality the largest violation.

        Raises:
            ValueError: the step needs gamma = 1 and the world discounts, or a hyperparameter is out of range.
        """
        self._check(world)
        left, right = self.sides(world, Hyper(**hyper))
        if left.shape != right.shape:
            raise ValueError(f"step {self.key}: sides of shape {tuple(left.shape)} and {tuple(right.shape)}")
        gap = left - right
        return float((gap.abs() if self.relation == "=" else gap.clamp_min(0)).max())

    def measure(self, world: TokenWorld, **hyper: float) -> dict[str, float]:
        """Named numbers beside the residual (the size of a gap, the value at several betas); empty if there are none."""
        self._check(world)
        return {} if self.numbers is None else self.numbers(world, Hyper(**hyper))

    def _check(self, world: TokenWorld) -> None:
        if self.gamma_one and world.gamma != 1:
            said = f"step {self.key} holds at gamma = 1 only, this world has {world.gamma}"
            raise ValueError(f"{said}; use world.with_gamma(1.0)")


@dataclass(frozen=True)
class Derivation:
    """A chain of steps that answers one question; its words come from Markdown, as the steps' do."""

    name: str
    title: str
    question: str
    assumptions: tuple[str, ...]
    source: str
    steps: tuple[Step, ...]

    def step(self, key: str) -> Step:
        """The step of that key.

        Raises:
            KeyError: there is none; the message lists those there are.
        """
        found = {step.key: step for step in self.steps}
        if key not in found:
            raise KeyError(f"{self.name} has no step {key!r}; it has {', '.join(found)}")
        return found[key]


TAILS = {"New: ": "changed", "Source: ": "source", "Assumes: ": "assumption"}  # how a paragraph of a step begins


def read(path: Path) -> tuple[dict, dict[str, dict[str, str]]]:
    """A derivation's Markdown: the fields of Derivation but its steps, and {key of a step: its words}.

    A step is `## key: title`, the equation between $$, what it says, and the paragraphs of TAILS.
    """
    head, *sections = path.read_text(encoding="utf-8").strip().split("\n\n## ")
    title, question, source, assumptions = head.split("\n\n")
    found = {}
    for section in sections:
        heading, equation, words, *tails = section.split("\n\n")
        key, _, name = heading.partition(": ")
        found[key] = {"title": name, "latex": equation.strip("$\n"), "words": words}
        for tail in tails:
            kind = next(kind for kind in TAILS if tail.startswith(kind))
            found[key][TAILS[kind]] = tail.removeprefix(kind).strip("$")
    about = {"title": title.removeprefix("# "), "question": question, "source": source.removeprefix("Source: ")}
    return {**about, "assumptions": tuple(line.removeprefix("- ") for line in assumptions.split("\n"))}, found


def join(module: ModuleType) -> Derivation:
    """The steps of derivations/NAME.py with the words of derivations/NAME.md beside it."""
    path = Path(module.__file__).with_suffix(".md")
    about, texts = read(path)
    return Derivation(path.stem, steps=tuple(replace(step, **texts[step.key]) for step in module.STEPS), **about)


@dataclass(frozen=True)
class Check:
    """A step's result."""

    step: Step
    residual: float  # the worst one over the worlds
    worlds: int  # how many it ran in: steps that need gamma = 1 pass over the others
    symbolic: bool | None  # whether the symbolic check gave exactly 0, None if the step has none
    measured: dict[str, float]  # the step's numbers in the first of those worlds

    @property
    def holds(self) -> bool:
        return self.worlds > 0 and self.residual <= TOLERANCE and self.symbolic is not False


def verify(
    derivation: Derivation, worlds: Iterable[TokenWorld], *, numbers: bool = True, **hyper: float
) -> list[Check]:
    """Run every step in every world that meets its assumptions; one Check per step.

    Args:
        numbers: also take the steps' measurements, in the first world (some train policies: about a second each).
        hyper: fields of Hyper.
    """
    worlds = list(worlds)
    checks = []
    for step in derivation.steps:
        usable = [world for world in worlds if world.gamma == 1 or not step.gamma_one]
        residuals = [step.residual(world, **hyper) for world in usable]
        symbolic = None if step.symbolic is None else step.symbolic() == 0
        measured = step.measure(usable[0], **hyper) if numbers and usable else {}
        checks.append(Check(step, max(residuals, default=float("nan")), len(usable), symbolic, measured))
    return checks


def table(derivation: Derivation, checks: list[Check]) -> str:
    """The checks as plain text, one line a step, its measured numbers below it."""
    lines = [f"{derivation.title}  [{derivation.name}]", derivation.question, ""]
    for number, check in enumerate(checks, 1):
        verdict = "ok  " if check.holds else "FAIL"
        exact = " symbolic" if check.symbolic else ""
        kind = "residual" if check.step.relation == "=" else "violation"
        how = ", by definition" if check.step.by_definition else ""
        found = f"{kind} {check.residual:.1e} in {check.worlds} worlds{exact}{how}"
        lines.append(f"{verdict} {number:2d}. {check.step.title}: {found}")
        lines += [f"         {name} = {value:.4g}" for name, value in check.measured.items()]
    return "\n".join(lines)
