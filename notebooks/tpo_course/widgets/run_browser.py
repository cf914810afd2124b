"""Finished runs over alpha and beta to slide through: nothing trains, every figure was measured."""

from pathlib import Path

import ipywidgets as w
from matplotlib.axes import Axes

from tpo_course.widgets.parts import (
    BEHIND,
    bundle,
    image,
    interval,
    look,
    on,
    page,
    png,
    room,
    samples,
    sideways,
    still,
    training,
)
from tpo_lib.files.store import read_json
from tpo_lib.runs import plots
from tpo_lib.runs.plots import FONT

SHOWN = 3
PLANE = [(0.13, 0.275, 0.845, 0.7)]  # as PANELS, of the plane of the frontier
LANES = (("beta", "alpha", "β", "--"), ("alpha", "beta", "α", ":"))  # slider, the other one, its sign, its lines


class RunBrowser:
    """Browse the runs of a sweep.

    Args:
        path: as `tpo_lib.runs.sweep.sweep` writes it; None is the one that comes with the course.

    From a cell: `show(objective, beta, alpha)`.

    Attributes:
        objective, beta, alpha: the controls; beta and alpha step through the values that were run.
        points, curve: PNG images; facts, samples: HTML.
        run: the run shown, a dictionary of the sweep's file.

    Raises:
        OSError: there is no such file.
        store.CheckpointError: it is damaged.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        from tpo_lib.runs.sweep import RUNS  # brings what trains and evaluates, which other widgets need not

        self.content = read_json(path or RUNS, "make it anew with `python -m tpo_lib sweep`")
        wide = look("80px", "420px")
        names = list(dict.fromkeys(run["objective"] for run in self.content["runs"]))
        labels = [(plots.style_of(name).label, name) for name in names]
        self.objective = w.Dropdown(options=labels, description="objective", **wide)
        self.beta = w.SelectionSlider(options=[0.1], description="beta", continuous_update=False, **wide)
        self.alpha = w.SelectionSlider(options=[0.0], description="alpha", continuous_update=False, **wide)
        self.points, self.curve = image(560, 336), image(912, 320)
        self.facts, self.samples = room(48), room(290)
        pictures = sideways(self.points), sideways(self.curve)
        self.box = w.VBox([self.objective, self.beta, self.alpha, self.facts, *pictures, self.samples])
        self._busy = False
        on([self.objective], self._options)
        on([self.beta], self._alphas)
        on([self.alpha], self._draw)
        self._options()

    def _repr_mimebundle_(self, **_) -> dict:
        return bundle(self.box, "Run this cell to slide through the runs.", image=self.points.value)

    def show(self, objective: str, beta: float, alpha: float = 0.0) -> None:
        """Show the objective's run whose beta comes nearest, and of those whose alpha does: not every value was run.

        Raises:
            ValueError: there is no run of this objective.
        """
        if objective not in (names := [name for _, name in self.objective.options]):
            raise ValueError(f"objective is {objective!r}; there are runs of {', '.join(names)}")
        self.objective.value = objective
        self.beta.value = min(self.beta.options, key=lambda value: abs(value - beta))
        self.alpha.value = min(self.alpha.options, key=lambda value: abs(value - alpha))

    def _options(self) -> None:
        self._mine = [run for run in self.content["runs"] if run["objective"] == self.objective.value]
        self._offer(self.beta, {run["beta"] for run in self._mine})
        self._alphas()

    def _alphas(self) -> None:
        if self._busy:
            return
        # A sweep that has not ended yet holds fewer alphas for its last beta.
        self._offer(self.alpha, {run["alpha"] for run in self._mine if run["beta"] == self.beta.value})
        self.alpha.disabled = len(self.alpha.options) == 1
        self._draw()

    def _offer(self, control: w.SelectionSlider, values: set[float]) -> None:
        """Let a control step through values, without drawing; the one it is at stays if it can."""
        before, options = control.value, sorted(values)
        self._busy = True
        control.options = options
        control.value = before if before in values else options[len(options) // 2]
        self._busy = False

    def _draw(self) -> None:
        if self._busy:
            return
        wanted = (self.beta.value, self.alpha.value)
        self.run = next(run for run in self._mine if (run["beta"], run["alpha"]) == wanted)
        name, start = self.objective.value, self.content["start"]["metrics"]
        label, metrics = plots.style_of(name).label, self.run["metrics"]
        said = f"{label}, beta {wanted[0]:g}" + ("" if self.alpha.disabled else f", alpha {wanted[1]:g}")
        facts = (
            f"<b>{said}</b>: reward {interval(metrics['reward'])} from {interval(start['reward'])}, "
            f"KL(policy ‖ reference) {interval(metrics['kl'])} nats, "
            f"SeqKL chosen {metrics['seqkl_chosen']['mean']:.1f}, rejected {metrics['seqkl_rejected']['mean']:.1f} nats, "
            f"entropy {metrics['entropy']['mean']:.2f} nats a token ({start['entropy']['mean']:.2f} at the start)."
        )
        others = [run for run in self.content["runs"] if run is not self.run]
        plane = plots.highlight(others, self.run, start)
        self._name(plane.axes[0])
        points = png(still(plane, PLANE))
        curve = training({name: self.run["training"]})
        # All at once: a reader who looks at the text and then at the pictures sees the same run.
        self.facts.value = page(facts)
        self.points.value, self.curve.value = points, curve
        before, after = self.content["start"]["samples"], self.run["samples"]
        self.samples.value = samples(label, before[:SHOWN], after[:SHOWN])

    def _name(self, ax: Axes) -> None:
        """Say which runs of the objective a slider leads to: below, a lane a slider with their values, a line to each run."""
        step = (ax.get_xlim()[1] - ax.get_xlim()[0]) / 14  # the width of a value
        for (name, fixed, symbol, line), height in zip(LANES, (0.3, 0.1), strict=True):
            along = sorted(
                (r for r in self._mine if r[fixed] == self.run[fixed]), key=lambda r: plots.mean(r["metrics"], "kl")
            )
            if len(along) < 2:
                continue
            place = max(3 * step, min(plots.mean(r["metrics"], "kl") for r in along) + step)
            across = ax.get_xaxis_transform()  # x as the data, y a share of the height
            ax.text(place - step, height, f"{symbol} =", transform=across, va="center", ha="center", fontsize=FONT - 1)
            for r in along:
                at = plots.mean(r["metrics"], "kl"), plots.mean(r["metrics"], "reward")
                ax.annotate(
                    f"{r[name]:g}", at, (place, height), textcoords=across, va="center", ha="center", fontsize=FONT - 1,
                    fontweight="bold" if r is self.run else "normal", bbox=BEHIND,
                    arrowprops={"arrowstyle": "-", "linestyle": line, "color": "#777777", "linewidth": 0.8, "shrinkB": 3},
                )  # fmt: skip
                place += step


run_browser = RunBrowser  # as the chapters call it
