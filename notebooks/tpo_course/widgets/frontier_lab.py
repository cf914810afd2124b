"""All objectives on the exact frontier of one small world: where they end, on which way, and what they say about tokens.

The numbers are `tpo_course.frontier`'s. What is stored there shows at once, what has a closed form as well; the rest is trained
in a thread, and the slider that moved last is the one that is answered.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from html import escape

import ipywidgets as w
import numpy as np
from PIL import Image
from torch import Tensor

from tpo_course.frontier import NAMES, WORLD, Bench, Run, Setting, needed
from tpo_course.frontier_grid import grid, optima
from tpo_course.frontier_presets import PRESETS
from tpo_course.widgets import frontier_pictures as pictures
from tpo_course.widgets.frontier_controls import controls, read, settings, unread
from tpo_course.widgets.latest import Latest
from tpo_course.widgets.parts import STATUS, bundle, button, png, room, row, swiped, table
from tpo_course.world import TokenWorld
from tpo_course.world_plots import pareto, token_names
from tpo_lib.runs.plots import style_of

STANDING = "All settings are where the lab begins, or where you moved them."


@dataclass
class State:
    """What is shown."""

    setting: Setting
    runs: dict[str, Run] = field(default_factory=dict)  # those that are there already
    optima: dict[str, tuple[float, float]] = field(default_factory=dict)


class FrontierLab:
    """Sliders for beta, alpha, guide and data; the exact front, a token tree and the credit of every token follow.

    From a cell: set `controls[name].value`, then `wait()`.

    Args:
        objectives: some of `frontier.NAMES`.
        world: to live in; None is that of the stored grid, V = T = 3, two prompts, seed 0.
        start: fields of `frontier.Setting` to begin with.

    Attributes:
        controls: {name: control}: the fields of Setting, "show" (whose tree and credit), "prompt", "truth" and "preset".
        pin_button, unpin_button: keep the state shown, in grey; let it go.
        state: the State shown; pinned: the State that is kept, or None.
        front, tree, credit, text, says: the HTML widgets; alt: the picture of the front in words.

    Raises:
        ValueError: an objective is not one of NAMES, or a setting is out of range.
        TypeError: Setting has no such field.

    Example:
        >>> lab = frontier_lab(objectives=("dpo", "tdpo1"), beta=0.5)  # stored: nothing trains
        >>> lab.wait()
        >>> [round(kl, 2) for kl in (lab.state.runs["dpo"].end[0], lab.state.optima["dpo"][0])]
        [0.9, 0.9]
    """

    def __init__(self, objectives: Sequence[str] = NAMES[:4], *, world: TokenWorld | None = None, **start) -> None:
        if unknown := [name for name in objectives if name not in NAMES]:
            raise ValueError(
                f"objectives: {unknown[0]!r} is not one of {', '.join(NAMES)}; SimPO's β is of another scale"
            )
        if not objectives:
            raise ValueError(f"objectives is empty; name some of {', '.join(NAMES)}")
        self.objectives, self.bench = tuple(objectives), Bench(world or TokenWorld(**WORLD))
        self._known, self._rests = (dict(grid()), optima()) if world is None else ({}, {})
        self._rows = sorted(((kl, earned, beta) for beta, kl, earned in self.bench.front))
        self.pinned: State | None = None
        self._error: Exception | None = None
        self._held = False
        self._latest = Latest(self._train, self._trained, self._failed)
        self._build(Setting(**start))
        self._ask()
        if len(self.state.runs) == len(
            self.objectives
        ):  # all stored; torch's optimizers take a second to load, so do it now
            self._latest.ask((self.objectives[:1], self.setting))

    # Layout.

    def _build(self, start: Setting) -> None:
        self.controls = controls(self.objectives, self.bench.world.num_prompts, start)
        self.pin_button = button("Pin", self._pin, icon="thumb-tack")
        self.unpin_button = button("Unpin", self._unpin, disabled=True)
        columns = (
            ("preset", "beta", "alpha", "show"),
            ("guide_beta", "guide_updates", "run_beta", "prompt"),
            ("pairs", "noise", "truth"),
        )
        read_by_none = unread(self.objectives)
        boxes = [w.VBox([self.controls[name] for name in some if name not in read_by_none]) for some in columns]
        boxes[2].children += (w.HBox([self.pin_button, self.unpin_button]),)
        self.says, self.front, self.tree, self.credit, self.text = room(44), room(444), room(440), room(304), room(260)
        self.says.layout.max_width, self.text.layout.width = "912px", "512px"
        left = w.VBox([self.front, self.text], layout=w.Layout(width="516px"))
        right = w.VBox([self.tree, self.credit], layout=w.Layout(width="388px"))
        self.box = w.VBox([row(*boxes), self.says, row(left, right)])
        self.says.value = STANDING
        for name, control in self.controls.items():
            control.observe(lambda change, name=name: self._moved(name), "value")

    def _repr_mimebundle_(self, **_) -> dict:
        with self._latest.lock:
            return bundle(self.box, self.alt, image=self._still())

    # What the controls do.

    @property
    def setting(self) -> Setting:
        """What the controls say."""
        return read(self.controls)

    def wait(self) -> None:
        """Until all is trained and drawn; raises what training raised."""
        self._latest.wait()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _moved(self, name: str) -> None:
        if self._held:
            return
        with self._latest.lock:
            if name == "preset":
                self._follow(self.controls["preset"].value)
            elif name in (part.name for part in fields(Setting)):
                self._held, self.controls["preset"].value, self._held = True, "", False
                self.says.value = STANDING
            if name in ("show", "prompt", "truth"):
                self._draw()
            else:
                self._ask()

    def _follow(self, preset: str) -> None:
        """Every control as the preset has it."""
        if not preset:
            return
        chosen = PRESETS[preset]
        values = {part.name: getattr(chosen.setting, part.name) or 0 for part in fields(Setting)} | {
            "show": chosen.show
        }
        self._held = True
        for name, value in values.items():
            self.controls[name].value = value
        self._held = False
        self.says.value = f"{STATUS}<b>{escape(preset)}.</b> {escape(chosen.words)}</div>"

    def _ask(self) -> None:
        """Show what is known, and train the rest."""
        setting = self.setting
        guided = setting.guide_beta is not None
        self.controls["guide_updates"].disabled = self.controls["run_beta"].disabled = not guided
        keys = {name: needed(name, setting) for name in self.objectives}
        optima = {name: self.bench.optimum(name, setting) or self._rests.get(key) for name, key in keys.items()}
        runs = {name: self._known[key] for name, key in keys.items() if key in self._known}
        self.state = State(setting, runs, {name: at for name, at in optima.items() if at is not None})
        self._error = None
        missing = [name for name in self.objectives if name not in runs]
        if missing:
            self._latest.ask((missing, setting))
        else:
            self._latest.drop()
        self._draw()

    def _train(self, request: tuple[list[str], Setting], stale) -> tuple[Setting, dict[str, Run]]:
        names, setting = request
        return setting, self.bench.train_all(names, setting, stale)

    def _trained(self, answer: tuple[Setting, Mapping[str, Run]]) -> None:
        setting, runs = answer
        self._known |= {needed(name, setting): run for name, run in runs.items()}
        self.state.runs |= runs
        self._draw()

    def _failed(self, error: Exception) -> None:
        self._error = error
        self.text.value = f'<div role="alert" style="color:#A00000">{escape(f"{type(error).__name__}: {error}")}</div>'

    def _pin(self) -> None:
        with self._latest.lock:
            self.pinned, self.unpin_button.disabled = self.state, False
            self._draw()

    def _unpin(self) -> None:
        with self._latest.lock:
            self.pinned, self.unpin_button.disabled = None, True
            self._draw()

    # What is shown.

    def below(self, run: Run) -> float:
        """How far a run ends below the front, units of reward; straight between the front's points."""
        kls, returns, _ = zip(*self._rows, strict=True)
        return float(np.interp(run.end[0], kls, returns)) - run.end[1]

    def _draw(self) -> None:
        state, pinned, world = self.state, self.pinned, self.bench.world
        show, prompt = self.controls["show"].value, self.controls["prompt"].value
        runs = {name: state.runs[name] for name in self.objectives if name in state.runs}
        before = {} if pinned is None or pinned is state else pinned.runs
        self.alt = self._alt(runs)
        front = [(beta, kl, earned) for kl, earned, beta in self._rows]
        self.front.value = swiped(pictures.frontier(front, state.setting.beta, runs, state.optima, before, self.alt))
        missing = [style_of(name).label for name in self.objectives if name not in runs]
        self.text.value = f"{STATUS}{self._words(runs, before, missing)}</div>"
        if show not in runs:
            return  # what was there stays until this is trained
        label, old = style_of(show).label, before.get(show)
        logps = world.ref_logps + runs[show].logratio
        grey = None if old is None else world.ref_logps + old.logratio
        likely = ", ".join(
            f"{name} {p:.2f}" for name, p in zip(token_names(world), logps[prompt].exp().tolist(), strict=True)
        )
        words = f"Token tree of {label} below prompt x{prompt}. First token: {likely}."
        title = f"{label}, prompt x{prompt}: probability of every token"
        look = {"prompt": prompt, "colour": style_of(show).colour, "title": title, "alt": words}
        self.tree.value = swiped(pictures.tree(world, logps.log_softmax(-1), pinned=grey, **look))
        self._draw_credit(show, old)

    def _draw_credit(self, show: str, old: Run | None) -> None:
        state, label = self.state, style_of(show).label
        truth, found = self._truth(), state.setting.beta * state.runs[show].logratio
        grey = None if old is None else self.pinned.setting.beta * old.logratio
        r = pictures.agreement(truth, found)
        said = "no correlation: one side is constant" if r is None else f"correlation {r:.2f}"
        words = f"true credit {self.controls['truth'].value}, units of reward ({said})", f"{label}: β log π/π_ref"
        alt = f"Implicit reward of {label} against the true credit of every token: {said}."
        names = token_names(self.bench.world)
        look = {"name": show, "tokens": names, "pinned": grey, "words": words, "alt": alt}
        self.credit.value = swiped(pictures.credit(truth, found, **look))

    def _truth(self) -> Tensor:
        world = self.bench.world
        return world.reward if self.controls["truth"].value == "R" else world.soft_optimum(self.state.setting.beta)[0].a

    def _alt(self, runs: Mapping[str, Run]) -> str:
        said = "; ".join(
            f"{style_of(name).label} ends at KL {run.end[0]:.2f} nats, reward {run.end[1]:.2f}, "
            f"{abs(self.below(run)):.2f} below it"
            for name, run in runs.items()
        )
        where = settings(self.state.setting, self.objectives)
        return f"Expected reward against KL, the exact front and the ways of training. {where}. {said}."

    def _words(self, runs: Mapping[str, Run], before: Mapping[str, Run], missing: Sequence[str]) -> str:
        heads = ["", "KL, nats", "reward", "below the front", "loss", "optimum"]
        lines = []
        for name, run in runs.items():
            best, old = self.state.optima.get(name), before.get(name)
            moved = [f" ({new - was:+.2f})" for new, was in zip(run.end, old.end, strict=True)] if old else ["", ""]
            ends = [f"{value:.2f}{change}" for value, change in zip(run.end, moved, strict=True)]
            lines.append([style_of(name).label, *ends, f"{abs(self.below(run)):.2f}", f"{run.loss:.3f}"])
            lines[-1].append("-" if best is None else f"{best[0]:.2f}, {best[1]:.2f}")
        notes = [
            f"{style_of(name).label}: {run.floor:.0%} of the tokens on the floor"
            for name, run in runs.items()
            if run.floor is not None
        ]
        notes += [f"training {', '.join(missing)} …"] if missing else []
        notes += (
            [f"in brackets: what is added to the pinned one, {settings(self.pinned.setting, self.objectives)}"]
            if before
            else []
        )
        rows = table(heads, lines, ". ".join(notes)).replace("<td>", '<td style="white-space:nowrap">')
        return f"<b>{settings(self.state.setting, self.objectives)}</b>{rows}"

    def _still(self) -> bytes:
        """The front as PNG, for where there is no kernel."""
        ends = {
            name: (self.bench.world.ref_logps + run.logratio).log_softmax(-1) for name, run in self.state.runs.items()
        }
        figure = pareto(self.bench.world, [0.1, 0.3, 0.5, 1, 3], ends)
        for name, run in self.state.runs.items():
            style = style_of(name)
            figure.axes[0].plot(
                run.kl, run.returns, linestyle=style.linestyle, color=style.colour, linewidth=2, zorder=4
            )
        few, buffer = (
            Image.open(io.BytesIO(png(figure, 72))).quantize(32),
            io.BytesIO(),
        )  # so that a notebook stays small
        few.save(buffer, "png", optimize=True)
        return buffer.getvalue()


frontier_lab = FrontierLab  # as the chapters call it
