"""Finished runs over alpha and beta to slide through: nothing trains, every figure was measured."""

from __future__ import annotations

import html
import json
from pathlib import Path

import ipywidgets as w
from IPython.display import display

from tpo_lib import plots
from tpo_lib.sweep import RUNS
from tpo_lib.widgets.parts import interval, one_line, png

SHOWN = 3


def run_browser(path: str | Path = RUNS) -> RunBrowser:
    """Browse the runs of a sweep.

    Args:
        path: as `tpo_lib.sweep.sweep` writes it.

    Raises:
        OSError: there is no such file.
    """
    return RunBrowser(json.loads(Path(path).read_text(encoding="utf-8")))


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
        self.points = w.Image(format="png", layout=w.Layout(width="560px", min_height="330px"))
        self.curve = w.Image(format="png", layout=w.Layout(width="900px", min_height="300px"))
        self.facts, self.samples = w.HTML(), w.HTML(layout=w.Layout(min_height="150px"))
        self.box = w.VBox([self.objective, self.beta, self.alpha, self.facts, self.points, self.curve, self.samples])
        self._busy = False
        self.objective.observe(lambda _: self._options(), "value")
        for control in (self.beta, self.alpha):
            control.observe(lambda _: self._draw(), "value")
        self._options()

    def _ipython_display_(self) -> None:
        display(self.box)

    def _options(self) -> None:
        self._busy = True
        self._mine = [run for run in self.content["runs"] if run["objective"] == self.objective.value]
        for control, key in ((self.beta, "beta"), (self.alpha, "alpha")):
            before, values = control.value, sorted({run[key] for run in self._mine})
            control.options = values
            control.value = before if before in values else values[len(values) // 2]
        self.alpha.disabled = len(self.alpha.options) == 1
        self._busy = False
        self._draw()

    def _draw(self) -> None:
        if self._busy:
            return
        wanted = (self.beta.value, self.alpha.value)
        self.run = next(run for run in self._mine if (run["beta"], run["alpha"]) == wanted)
        name, start = self.objective.value, self.content["start"]["metrics"]
        label, metrics = plots.style_of(name).label, self.run["metrics"]
        said = f"{label}, beta {wanted[0]:g}" + ("" if self.alpha.disabled else f", alpha {wanted[1]:g}")
        self.facts.value = (
            f"<b>{said}</b>: reward {interval(metrics['reward'])} from {interval(start['reward'])}, "
            f"KL(policy ‖ reference) {interval(metrics['kl'])} nats, "
            f"SeqKL chosen {metrics['seqkl_chosen']['mean']:.1f}, rejected {metrics['seqkl_rejected']['mean']:.1f} nats, "
            f"entropy {metrics['entropy']['mean']:.2f} nats a token ({start['entropy']['mean']:.2f} at the start)."
        )
        others = [run for run in self.content["runs"] if run is not self.run]
        self.points.value = png(plots.highlight(others, self.run, start))
        self.curve.value = png(plots.training({name: self.run["training"]}))
        pairs = zip(self.content["start"]["samples"], self.run["samples"], strict=True)
        self.samples.value = (
            '<div style="max-width:60em">'
            + "".join(
                f"<p><b>{html.escape(a['prompt'])}</b> …<br>start ({a['reward']:.2f}): {one_line(a['text'])}<br>"
                f"{label} ({b['reward']:.2f}): {one_line(b['text'])}</p>"
                for a, b in list(pairs)[:SHOWN]
            )
            + "</div>"
        )
