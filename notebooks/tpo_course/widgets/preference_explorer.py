"""Preference pairs to leaf through: scores, gaps, and what training makes of small gaps and of large ones."""

from __future__ import annotations

import html
from dataclasses import replace
from typing import TYPE_CHECKING

import ipywidgets as w
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tpo_course.widgets import parts
from tpo_course.widgets.parts import bundle, button, frame, image, interval, look, on, one_line, room, row, sideways

if TYPE_CHECKING:
    from tpo_lib.runs.stage import Stage

UPDATES = 4


class PreferenceExplorer:
    """Explore a stage's pairs.

    Args:
        stage: as from `pocket_stage(min_gap=0.0, max_pairs=10_000)`: with min_gap = 0 small gaps are there.

    Attributes:
        smallest: hide pairs whose scores differ by less; number: the pair shown; search: words in prompt or responses.
        train_button: train DPO on the pairs below, then on those above the smallest gap, and compare.
        histogram (PNG), count, page, result: what is shown (HTML).
    """

    def __init__(self, stage: Stage) -> None:
        from tpo_lib.rewards import in_unit_interval  # brings what loads models

        self.stage = stage
        table = stage.table
        chosen, rejected = np.array(table["chosen_score"]), np.array(table["rejected_score"])
        self._gaps, unit = chosen - rejected, in_unit_interval((rejected.min(), chosen.max()))  # chosen is the larger
        self._widest, self._unit = (1.0, " (0 to 1)") if unit else (float(self._gaps.max()), "")
        wide, widest = look("90px", "420px") | {"continuous_update": False}, self._widest
        gaps = {"min": 0, "max": 0.9 * widest, "step": 0.05 * widest, "description": "smallest gap"}
        self.smallest = w.FloatSlider(0.2 * widest, **gaps, **wide)
        self.search = w.Text(placeholder="a word of prompt or responses", description="search", **wide)
        self.number = w.IntSlider(0, min=0, max=0, description="pair", **look("90px", "420px"))
        where = w.Layout(width="260px")
        self.train_button = button("Train on both sides of the gap", self._train, layout=where)
        self.histogram, self.count, self.result, self.page = image(620, 239), room(28), room(110), room(200)
        top = row(self.smallest, self.search), sideways(self.histogram), self.count
        self.box = w.VBox([*top, self.number, self.page, self.train_button, self.result])
        on([self.smallest, self.search], self._filter)
        on([self.number], self._show)
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
        frame(axes)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.hist(self._gaps, bins=np.linspace(0, self._widest, 41), color="#56B4E9", edgecolor="black", linewidth=0.5)
        axes.axvline(self.smallest.value, color="black", ls="--", label=f"smallest gap {self.smallest.value:.2f}")
        axes.set(xlabel=f"score of chosen minus score of rejected{self._unit}", ylabel="pairs", xlim=(0, self._widest))
        axes.legend(frameon=False)
        return parts.png(figure)

    def _show(self) -> None:
        if not len(self._kept):
            self.page.value = "No pair is left: lower the smallest gap or search for another word."
            return
        pair = self.stage.table[int(self._kept[self.number.value])]
        gap = pair["chosen_score"] - pair["rejected_score"]
        lines = [f"<p style='margin:0'>Pair {self.number.value} of 0 to {self.number.max}: gap {gap:.3f}</p>"]
        lines += [f"<p><b>prompt</b> {html.escape(pair['prompt'])} …</p>"]
        for side in ("chosen", "rejected"):
            lines.append(f"<p><b>{side}</b>, score {pair[f'{side}_score']:.3f}<br>{one_line(pair[side])}</p>")
        self.page.value = parts.page("".join(lines), "60em")

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
        from tpo_lib import PRESETS
        from tpo_lib.runs.lab import Laboratory  # brings what trains and evaluates, which leafing through needs not

        large = self._gaps >= self.smallest.value
        below, above = np.flatnonzero(~large), np.flatnonzero(large)
        count, least = min(len(below), len(above)), PRESETS["pocket"].train.batch_size
        if count < least:
            said = f"{len(below)} pairs lie below and {len(above)} above {self.smallest.value:.2f}"
            self.result.value = f"{said}: at least {least} are needed on either side. Move the smallest gap."
            return
        self.result.value = "Evaluating the start ..."
        lab, rows = Laboratory(self.stage), {int(pair.row): pair for pair in self.stage.pairs}
        lines = []
        for words, side in (("below", below), ("at or above", above)):
            self.result.value = f"Training on {count} pairs {words} the gap ..."
            pairs = [rows[int(i)] for i in side[:count] if int(i) in rows]
            lab.stage = replace(self.stage, pairs=pairs)
            run = lab.train(lab.config("dpo", beta=0.1, alpha=0.0, lr=3e-4, updates=UPDATES), words)
            found = [interval(run.evaluation.metrics[name].as_dict()) for name in ("reward", "kl")]
            lines.append([f"{words} {self.smallest.value:.2f}", str(len(pairs)), *found])
        heads = ["trained on gaps", "pairs", f"reward{self._unit}", "KL(policy ‖ ref), nats"]
        start = interval(lab.start.metrics["reward"].as_dict())
        self.result.value = parts.table(heads, lines, f"DPO, {UPDATES} updates each; start {start}.")


preference_explorer = PreferenceExplorer  # as the chapters call it
