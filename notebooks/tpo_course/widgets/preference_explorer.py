"""Preference pairs to leaf through: scores, gaps, and what training makes of small gaps and of large ones."""

from __future__ import annotations

import html
from dataclasses import replace

import ipywidgets as w
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tpo_course.widgets.parts import bundle, interval, one_line, png
from tpo_lib.config import PRESETS
from tpo_lib.runs.lab import Laboratory
from tpo_lib.runs.plots import GRID
from tpo_lib.runs.stage import Stage

UPDATES = 4


def preference_explorer(stage: Stage) -> PreferenceExplorer:
    """Explore a stage's pairs; build the stage with `min_gap=0`, so that small gaps are there.

    Args:
        stage: as from `pocket_stage(min_gap=0.0, max_pairs=10_000)`.
    """
    return PreferenceExplorer(stage)


class PreferenceExplorer:
    """What `preference_explorer` returns.

    Attributes:
        smallest: hide pairs whose scores differ by less; number: the pair shown; search: words in prompt or responses.
        train_button: train DPO on the pairs below, then on those above the smallest gap, and compare.
        histogram (PNG), count, page, result: what is shown (HTML).
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        table = stage.table
        chosen, rejected = np.array(table["chosen_score"]), np.array(table["rejected_score"])
        self._gaps, unit = chosen - rejected, bool(rejected.min() >= 0 and chosen.max() <= 1)  # chosen is the larger
        self._widest, self._unit = (1.0, " (0 to 1)") if unit else (float(self._gaps.max()), "")
        wide = {"style": {"description_width": "90px"}, "layout": w.Layout(width="420px"), "continuous_update": False}
        self.smallest = w.FloatSlider(
            0.2 * self._widest,
            min=0,
            max=0.9 * self._widest,
            step=0.05 * self._widest,
            description="smallest gap",
            **wide,
        )
        self.search = w.Text(placeholder="a word of prompt or responses", description="search", **wide)
        self.number = w.IntSlider(0, min=0, max=0, description="pair", **wide)
        self.train_button = w.Button(description="Train on both sides of the gap", layout=w.Layout(width="260px"))
        self.histogram = w.Image(format="png", layout=w.Layout(width="620px", min_height="239px"))
        self.count = w.HTML(layout=w.Layout(min_height="28px"))
        self.result = w.HTML(layout=w.Layout(min_height="110px"))
        self.page = w.HTML(layout=w.Layout(min_height="200px"))
        self.box = w.VBox(
            [
                w.HBox([self.smallest, self.search], layout=w.Layout(flex_flow="row wrap")),
                self.histogram,
                self.count,
                self.number,
                self.page,
                self.train_button,
                self.result,
            ]
        )
        self.smallest.observe(lambda _: self._filter(), "value")
        self.search.observe(lambda _: self._filter(), "value")
        self.number.observe(lambda _: self._show(), "value")
        self.train_button.on_click(lambda _: self._train())
        self._filter()

    def _repr_mimebundle_(self, **_) -> dict:
        return bundle(self.box, "Run this cell to leaf through the pairs.", image=self.histogram.value)

    def _filter(self) -> None:
        word, table = self.search.value.strip().lower(), self.stage.table
        texts = zip(table["prompt"], table["chosen"], table["rejected"], strict=True)
        found = [word in " ".join(row).lower() for row in texts]
        self._kept = np.flatnonzero((self._gaps >= self.smallest.value) & np.array(found))
        share = len(self._kept) / len(table)
        said = f", with {html.escape(repr(word))} in them" if word else ""
        self.histogram.value = self._draw()
        self.number.value, self.number.max = 0, max(0, len(self._kept) - 1)
        self._show()
        self.count.value = (
            f"{len(self._kept):,} of {len(table):,} pairs ({share:.0%}) differ by at least {self.smallest.value:.2f}{said}; "
            f"median gap of all: {np.median(self._gaps):.2f}."
        )

    def _draw(self) -> bytes:
        figure = Figure(figsize=(7, 2.7), layout="constrained")
        axes = figure.subplots()
        axes.grid(**GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.hist(self._gaps, bins=np.linspace(0, self._widest, 41), color="#56B4E9", edgecolor="black", linewidth=0.5)
        axes.axvline(self.smallest.value, color="black", ls="--", label=f"smallest gap {self.smallest.value:.2f}")
        axes.set(xlabel=f"score of chosen minus score of rejected{self._unit}", ylabel="pairs", xlim=(0, self._widest))
        axes.legend(frameon=False)
        return png(figure)

    def _show(self) -> None:
        if not len(self._kept):
            self.page.value = "No pair is left: lower the smallest gap or search for another word."
            return
        row = self.stage.table[int(self._kept[self.number.value])]
        parts = [
            f"<p style='margin:0'>Pair {self.number.value} of 0 to {self.number.max}: "
            f"gap {row['chosen_score'] - row['rejected_score']:.3f}</p>"
        ]
        parts += [f"<p><b>prompt</b> {html.escape(row['prompt'])} …</p>"]
        for side in ("chosen", "rejected"):
            text = one_line(row[side])
            parts.append(f"<p><b>{side}</b>, score {row[f'{side}_score']:.3f}<br>{text}</p>")
        self.page.value = f'<div style="max-width:60em;line-height:1.5">{"".join(parts)}</div>'

    def _train(self) -> None:
        self.train_button.disabled = True
        try:
            self._compare()
        except Exception as error:  # a callback's error is not shown in the page by itself
            self.result.value = f"<b>It failed: {html.escape(f'{type(error).__name__}: {error}')}</b>"
            raise
        finally:
            self.train_button.disabled = False

    def _compare(self) -> None:
        below = np.flatnonzero(self._gaps < self.smallest.value)
        above = np.flatnonzero(self._gaps >= self.smallest.value)
        count = min(len(below), len(above))
        least = PRESETS["pocket"].train.batch_size
        if count < least:
            self.result.value = (
                f"{len(below)} pairs lie below and {len(above)} above {self.smallest.value:.2f}: at least {least} are needed "
                "on either side. Move the smallest gap."
            )
            return
        self.result.value = "Evaluating the start ..."
        lab, rows = Laboratory(self.stage), {int(pair.row): pair for pair in self.stage.pairs}
        lines = []
        for words, side in (("below", below), ("at or above", above)):
            self.result.value = f"Training on {count} pairs {words} the gap ..."
            pairs = [rows[int(i)] for i in side[:count] if int(i) in rows]
            lab.stage = replace(self.stage, pairs=pairs)
            run = lab.train(lab.config("dpo", beta=0.1, alpha=0.0, lr=3e-4, updates=UPDATES), words)
            found = {name: run.evaluation.metrics[name] for name in ("reward", "kl")}
            lines.append(
                f"<tr><td>{words} {self.smallest.value:.2f}</td><td>{len(pairs)}</td>"
                + "".join(f"<td>{interval(m.as_dict())}</td>" for m in found.values())
                + "</tr>"
            )
        start = lab.start.metrics["reward"]
        self.result.value = (
            '<table style="border-spacing:12px 2px;text-align:left;line-height:1.5"><tr><th>trained on gaps</th><th>pairs</th>'
            f"<th>reward{self._unit}</th><th>KL(policy ‖ ref), nats</th></tr>"
            + "".join(lines)
            + f"</table><small>DPO, {UPDATES} updates each; start {start.mean:.2f} [{start.low:.2f}, {start.high:.2f}].</small>"
        )
