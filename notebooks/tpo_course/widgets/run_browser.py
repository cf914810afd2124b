"""Finished runs over alpha and beta to slide through: nothing trains, every figure was measured."""

from __future__ import annotations

import html
from pathlib import Path

import ipywidgets as w

from tpo_course.widgets.parts import PANELS, WIDE, bundle, interval, one_line, png, still
from tpo_lib.files.store import read_json
from tpo_lib.runs import plots
from tpo_lib.runs.sweep import RUNS

SHOWN = 3
PLANE = [(0.13, 0.275, 0.845, 0.7)]  # as PANELS, of the plane of the frontier


def run_browser(path: str | Path = RUNS) -> RunBrowser:
    """Browse the runs of a sweep.

    Args:
        path: as `tpo_lib.runs.sweep.sweep` writes it.

    Raises:
        OSError: there is no such file.
        checkpoint.CheckpointError: it is damaged.
    """
    return RunBrowser(read_json(path, "make it anew with `python -m tpo_lib sweep`"))


class RunBrowser:
    """What `run_browser` returns.

    Attributes:
        objective, beta, alpha: the controls; beta and alpha step through the values that were run.
        points, curve: PNG images; facts, samples: HTML.
        run: the run shown, a dictionary of the sweep's file.
    """

    def __init__(self, content: dict) -> None:
        self.content = content
        wide = {"style": {"description_width": "80px"}, "layout": w.Layout(width="420px")}
        names = list(dict.fromkeys(run["objective"] for run in content["runs"]))
        self.objective = w.Dropdown(
            options=[(plots.style_of(name).label, name) for name in names], description="objective", **wide
        )
        self.beta = w.SelectionSlider(options=[0.0], description="beta", continuous_update=False, **wide)
        self.alpha = w.SelectionSlider(options=[0.0], description="alpha", continuous_update=False, **wide)
        self.points = w.Image(format="png", layout=w.Layout(width="560px", min_height="336px"))
        self.curve = w.Image(format="png", layout=w.Layout(width="912px", min_height="320px"))
        self.facts = w.HTML(layout=w.Layout(min_height="48px"))
        self.samples = w.HTML(layout=w.Layout(min_height="290px"))
        self.box = w.VBox([self.objective, self.beta, self.alpha, self.facts, self.points, self.curve, self.samples])
        self._busy = False
        self.objective.observe(lambda _: self._options(), "value")
        self.beta.observe(lambda _: self._alphas(), "value")
        self.alpha.observe(lambda _: self._draw(), "value")
        self._options()

    def _repr_mimebundle_(self, **_) -> dict:
        return bundle(self.box, "Run this cell to slide through the runs.", image=self.points.value)

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
        points = png(still(plots.highlight(others, self.run, start), PLANE))
        curve = png(still(plots.training({name: self.run["training"]}), PANELS, WIDE))
        # All at once: a reader who looks at the text and then at the pictures sees the same run.
        self.facts.value = f'<div style="line-height:1.5;max-width:912px">{facts}</div>'
        self.points.value, self.curve.value = points, curve
        pairs = zip(self.content["start"]["samples"], self.run["samples"], strict=True)
        self.samples.value = (
            '<div style="max-width:60em;line-height:1.5">'
            + "".join(
                f"<p><b>{html.escape(a['prompt'])}</b> …<br>start ({a['reward']:.2f}): {one_line(a['text'])}<br>"
                f"{label} ({b['reward']:.2f}): {one_line(b['text'])}</p>"
                for a, b in list(pairs)[:SHOWN]
            )
            + "</div>"
        )
