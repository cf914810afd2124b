"""A derivation to walk through: one equation at a time, what changed in it, and the number that shows it holds.

No mathematics lives here: equations, words and residuals are those of `tpo_course.derivations`.
"""

import html
import inspect
import math
import pkgutil
import re
import sys
from pathlib import Path
from time import perf_counter

import ipywidgets as w
from IPython.display import Markdown, display

from tpo_course import source_path
from tpo_course.derivations import TOLERANCE, Derivation, Hyper, Step
from tpo_course.widgets.parts import button, look, on, row
from tpo_course.world import TokenWorld

COLOUR = "#D55E00"  # of the changed term; its frame says the same without colour
NEXT_CLAIM = r", \quad "  # in an equation, what separates two claims: here each gets a line
SLOW_PAIRS = 10_000  # from here on a residual may take longer than a glance
AT_ONCE = 0.1  # seconds; what is answered sooner follows a slider while it is dragged
HELP = (
    "Keyboard: Tab moves from control to control, Enter or Space presses a button, "
    "the arrow keys move a slider. Space opens the list, the arrow keys and Enter choose in it."
)


class StepThrough:
    """A widget that walks through a derivation and checks every step in a world you can change, and a static table of them.

    Set the controls' values, or call a button's `click()`, to drive it from a cell.

    Args:
        derivation: a value of `tpo_course.derivations.DERIVATIONS`.
        world: the world to start in; None is V = 3, T = 3, two prompts, seed 0. The sliders keep its other settings.
        hyper: start values of `derivations.Hyper`: beta and alpha have sliders, guide_beta and margin stay as given.

    beta and alpha follow the drag where the step's last residual took less than AT_ONCE, else they wait for the release;
    V and T always wait: each makes a new world.

    Attributes:
        previous_button, next_button, jump: the step, a number from 0 in `jump.value`.
        v, t, beta, alpha, another: sliders of the world's V and T and of the hyperparameters; the button for the next seed.
        measure_button: takes the step's further measurements (up to some seconds).
        equation: an Output widget that holds the equation; `latex` is its source.
        words, facts, verdict, world_text, measured: HTML widgets with everything that is said, as text.
        world: the TokenWorld of the residuals, None while the one asked for is too large.
        table: the static table, Markdown.

    Raises:
        TypeError: `derivation` is not a Derivation, or Hyper has no such field.
        ValueError: a hyperparameter is out of range.

    Example:
        >>> from tpo_course.derivations import DERIVATIONS
        >>> walk = step_through(DERIVATIONS["dpo"], beta=0.1)
        >>> walk.jump.value = 2
        >>> "Step 3 of 12: residual" in walk.verdict.value
        True
    """

    def __init__(self, derivation: Derivation, world: TokenWorld | None = None, **hyper: float) -> None:
        if not isinstance(derivation, Derivation):
            raise TypeError(f'derivation is {derivation!r}: pass a Derivation, for instance DERIVATIONS["dpo"]')
        self.derivation, self.hyper, self.latex = derivation, Hyper(**hyper), ""
        self._template = TokenWorld(3, 3, seed=0, num_prompts=2) if world is None else world
        self.seed = self._template.seed
        self._build_controls(self._template, self.hyper)
        self._rebuild()
        self._move()
        residuals = [self._residual_text(step) for step in derivation.steps]
        self.table = static_table(derivation, residuals, self._settings())

    # Layout.

    def _build_controls(self, world: TokenWorld, hyper: Hyper) -> None:
        narrow, wide = w.Layout(width="120px"), w.Layout(width="150px")
        self.previous_button = button("Previous", lambda: self._go(-1), icon="arrow-left", layout=narrow)
        self.next_button = button("Next", lambda: self._go(+1), icon="arrow-right", layout=narrow)
        self.another = button("Another world", self._another, icon="refresh", layout=wide)
        self.measure_button = button("Measure", self._measure, icon="flask", layout=narrow)
        steps = [(f"{index + 1}. {step.title}", index) for index, step in enumerate(self.derivation.steps)]
        self.jump = w.Dropdown(options=steps, description="Step", **look("40px", "440px"))
        self.v = _slider(w.IntSlider, "V", world.vocab_size, 2, max(5, world.vocab_size), step=1)
        self.t = _slider(w.IntSlider, "T", world.horizon, min(2, world.horizon), max(4, world.horizon), step=1)
        low, high = min(0.05, hyper.beta), max(5.0, hyper.beta)
        self.beta = _slider(w.FloatLogSlider, "beta", hyper.beta, math.log10(low), math.log10(high), step=0.1)
        self.alpha = _slider(w.FloatSlider, "alpha", hyper.alpha, 0.0, max(2.0, hyper.alpha), step=0.1)
        rows = max(step.latex.count(NEXT_CLAIM) + 1 for step in self.derivation.steps)
        frame = {"border": "1px solid #999999", "padding": "4px 8px", "margin": "6px 0", "overflow": "auto"}
        self.equation = w.Output(layout=w.Layout(min_height=f"{50 + 45 * rows}px", **frame))  # the page does not jump
        self.words = w.HTML(layout=w.Layout(width="54%", min_height="150px"))
        self.facts = w.HTML(layout=w.Layout(width="44%", min_height="150px", margin="0 0 0 2%"))
        self.verdict = w.HTML()
        self.world_text = w.HTML(layout=w.Layout(flex="1 1 0%", margin="4px 0 0 10px"))
        self.measured = w.HTML(layout=w.Layout(flex="1 1 0%", min_height="28px", margin="4px 0 0 10px"))
        title = _set(f"<b>{_text(self.derivation.title)}</b><br>{_text(self.derivation.question)}")
        numbers = w.HBox([self.measure_button, self.measured], layout=w.Layout(align_items="flex-start"))
        step = (
            w.HBox([self.previous_button, self.next_button, self.jump]),
            self.equation,
            w.HBox([self.words, self.facts]),
        )
        world = row(self.v, self.t, self.beta, self.alpha), w.HBox([self.another, self.world_text])
        self.box = _Box(
            [w.HTML(title), *step, self.verdict, *world, numbers, w.HTML(f"<small>{HELP}</small>")],
            layout=w.Layout(width="100%", max_width="1000px"),
        )
        on([self.jump], self._move)
        on([self.v, self.t], self._rebuild)
        on([self.beta, self.alpha], self._check)

    def _ipython_display_(self) -> None:
        display(self.box)
        display(Markdown(self.table))

    # What the controls do.

    @property
    def step(self) -> Step:
        """The step shown."""
        return self.derivation.steps[self.jump.value]

    def _go(self, by: int) -> None:
        self.jump.value = min(max(self.jump.value + by, 0), len(self.derivation.steps) - 1)

    def _another(self) -> None:
        self.seed += 1
        self._rebuild()

    def _rebuild(self) -> None:
        """A world of the sliders' size; the one place where a size can be refused."""
        try:
            self.world = self._template.changed(vocab_size=self.v.value, horizon=self.t.value, seed=self.seed)
            _ = self.world.pairs  # every loss needs them: a world that cannot list its pairs is refused here, not later
            self._refusal = ""
        except ValueError as error:
            self.world, self._refusal = None, str(error)
        self._check()

    def _move(self) -> None:
        step, here, steps = self.step, self.jump.value, self.derivation.steps
        self.previous_button.disabled, self.next_button.disabled = here == 0, here == len(steps) - 1
        self.latex = typeset(step)
        # As an output, not as HTMLMath: that one is typeset in JupyterLab only, this one in VS Code and Colab too.
        source = f"$$\n{self.latex}\n$$"
        bundle = {"text/latex": source, "text/plain": step.latex}
        self.equation.outputs = ({"output_type": "display_data", "data": bundle, "metadata": {}},)
        self.words.value = _set(f"<b>{here + 1}. {_text(step.title)}.</b> {_text(step.words)}")
        self.facts.value = self._facts(step, here)
        self._check()

    def _check(self) -> None:
        """The residual of the step in the current world, and what the sliders say."""
        place = f"Step {self.jump.value + 1} of {len(self.derivation.steps)}"
        if self.world is not None and len(self.world.pairs.prob) > SLOW_PAIRS:
            self.verdict.value = f"<b>{place}: computing ...</b>"
        began = perf_counter()
        residual = self._residual_text(self.step)
        self.beta.continuous_update = self.alpha.continuous_update = perf_counter() - began < AT_ONCE
        self.verdict.value = f"<b>{place}: {_text(residual)}</b>"
        self.world_text.value = _set(_text(self._settings()))
        more = self.step.numbers is not None or self.step.symbolic is not None
        self.measure_button.disabled = not more or not self._runs(self.step)
        self.measured.value = "" if more else "This step has no further numbers."

    def _measure(self) -> None:
        self.measured.value = "measuring ..."
        lines = [f"{name} = {value:.4g}" for name, value in self.step.measure(self.world, **self._hyper()).items()]
        if self.step.symbolic is not None:
            lines.append(f"symbolically (sympy), the two sides differ by {self.step.symbolic()}")
        self.measured.value = _set("<br>".join(map(_text, lines)))

    # What they say.

    def _hyper(self) -> dict[str, float]:
        return {**vars(self.hyper), "beta": self.beta.value, "alpha": self.alpha.value}

    def _runs(self, step: Step) -> bool:
        return self.world is not None and (self.world.gamma == 1 or not step.gamma_one)

    def _residual_text(self, step: Step) -> str:
        if self.world is None:
            return f"not run: {self._refusal}"
        if not self._runs(step):
            return f"not run: it holds at gamma = 1, this world has gamma = {self.world.gamma:g}"
        residual = step.residual(self.world, **self._hyper())
        kind = "residual" if step.relation == "=" else "violation"
        how = ", by definition" if step.by_definition else ""
        return f"{kind} {residual:.1e}: {'holds' if residual <= TOLERANCE else 'does NOT hold'}{how}"

    def _settings(self) -> str:
        """The world and the hyperparameters, in one line."""
        knobs = ", ".join(f"{name} = {value:.3g}" for name, value in self._hyper().items())
        if self.world is None:
            return f"World {self.seed}: V = {self.v.value}, T = {self.t.value} is too large; {knobs}"
        world = self.world
        prompts = "1 prompt" if world.num_prompts == 1 else f"{world.num_prompts} prompts"
        size = f"{prompts}, {world.num_states} states, {len(world.pairs.prob):,} pairs"
        discount = "" if world.gamma == 1 else f", gamma = {world.gamma:g}"
        return f"World {self.seed}: V = {world.vocab_size}, T = {world.horizon}{discount}, {size}; {knobs}"

    def _facts(self, step: Step, here: int) -> str:
        earlier = self.derivation.steps[:here]
        before = [f"({n}) {_text(past.assumption)}" for n, past in enumerate(earlier, 1) if past.assumption]
        new = _text(step.assumption) or "none"
        code = "no function of its own"
        if step.implements:
            code = f"<code>{step.implements}</code><br><code>{code_location(step.implements)}</code>"
        return (
            f"<div style='line-height:1.4'><b>New assumption:</b> {new}<br>"
            f"<b>Assumed before, by step:</b> {' '.join(before) or 'nothing'}<br>"
            f"<b>Source:</b> {_text(step.source)}<br><b>Implemented by:</b> {code}</div>"
        )


class _Box(w.VBox):
    def __repr__(self) -> str:  # shown where there is no kernel
        return "Run this cell to walk through the steps; without a kernel, unfold the table below."


def typeset(step: Step) -> str:
    r"""The equation as LaTeX for MathJax and KaTeX, one claim a line, the changed term coloured and framed.

    `{\color{c}{...}}` is read alike by all of them: as a switch, and as a command of two arguments.
    """
    framed = rf"\,{{\color{{{COLOUR}}}{{\boxed{{{step.changed}}}}}}}\,"
    latex = step.latex.replace(step.changed, framed) if step.changed else step.latex
    rows = latex.split(NEXT_CLAIM)
    return latex if len(rows) == 1 else r"\begin{gathered} " + r", \\[6pt] ".join(rows) + r" \end{gathered}"


def code_location(name: str) -> str:
    """The file and line that define a dotted name, for instance tpo_lib/losses.py:57.

    Raises:
        AttributeError or ImportError: there is no such name.
    """
    target = inspect.unwrap(pkgutil.resolve_name(name))
    if inspect.isroutine(target) or inspect.isclass(target):
        module, line = target.__module__, inspect.getsourcelines(target)[1]
    else:  # a table: the line that assigns it
        module, _, table = name.rpartition(".")
        lines = Path(sys.modules[module].__file__).read_text(encoding="utf-8").splitlines()
        line = next(number for number, text in enumerate(lines, 1) if re.match(rf"{table}\b.*=", text))
    return f"{source_path(module)}:{line}"


def static_table(derivation: Derivation, residuals: list[str], settings: str) -> str:
    """All steps as a folded Markdown table: what a reader without a kernel sees.

    Markdown, not HTML: its formulas are typeset wherever notebooks are shown. In a table cell | ends the cell.
    """
    summary = f"All {len(derivation.steps)} steps with their residuals (works without a kernel)"
    lines = ["<details>", f"<summary>{summary}</summary>", "", _escape(settings), ""]
    lines += ["| step | residual | equation, what it says, where it comes from |", "|---:|:---|:---|"]
    for number, (step, residual) in enumerate(zip(derivation.steps, residuals, strict=True), 1):
        latex = step.latex.replace(r"\|", r"\Vert ").replace("|", r"\vert ").replace("<", r"\lt ").replace(">", r"\gt ")
        equation = "<br>".join(rf"$\displaystyle {row}$" for row in latex.replace(NEXT_CLAIM, ",\n").split("\n"))
        assumes = f"<br>*Assumes:* {_escape(step.assumption)}" if step.assumption else ""
        code = f"; `{code_location(step.implements)}`" if step.implements else ""
        origin = f"*Source:* {_escape(step.source)}{code}"
        says = f"**{_escape(step.title)}**<br>{equation}<br>{_escape(step.words)}{assumes}<br>{origin}"
        lines.append(f"| {number} | {_escape(residual)} | {says} |")
    return "\n".join([*lines, "", "</details>", ""])


def _slider(kind: type, name: str, value: float, low: float, high: float, *, step: float):
    place = {"style": {"description_width": "44px"}, "layout": w.Layout(width="23.5%", min_width="180px")}
    return kind(value=value, min=low, max=high, step=step, description=name, continuous_update=False, **place)


def _set(words: str) -> str:
    return f"<div style='line-height:1.5'>{words}</div>"


def _text(text: str) -> str:
    return html.escape(text, quote=False)


def _escape(text: str) -> str:
    r"""Plain text for a Markdown table cell: \ before every character that would mean something."""
    return re.sub(r"([\\`*_\[\]<>|$~#])", r"\\\1", text)


step_through = StepThrough  # as the chapters call it
