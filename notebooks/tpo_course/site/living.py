"""The widgets that need no kernel: pages with a little JavaScript over numbers that are stored or cheap to compute.

Every lab is a page `labs/NAME.html`: its numbers as JSON inside it, `static/lab.js` (controls and pictures, shared) and
`static/NAME.js`. The JavaScript computes what the Python does; a test compares the two.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tpo_course import frontier_grid
from tpo_course.frontier import Setting, needed
from tpo_course.frontier_presets import PRESETS
from tpo_course.widgets.loss_lab import SITUATIONS, loss_lab
from tpo_course.widgets.loss_picture import CHOSEN, REF_LOGP, REJECTED
from tpo_lib.losses import F_FLOOR, OBJECTIVES
from tpo_lib.runs.plots import style_of

CURVES = ("loss", "rewards/margins", "rewards/accuracies")  # of a run's training that the run browser draws


@dataclass(frozen=True)
class Lab:
    """A page with a widget on it."""

    name: str  # of the page and of its JavaScript
    widget: str  # the function of `tpo_course.widgets` that it stands for
    title: str
    words: str  # what it is for, one or two sentences of HTML
    data: Callable[[], Mapping]  # what its JavaScript reads

    @property
    def target(self) -> str:
        """Where it lies in the site."""
        return f"labs/{self.name}.html"


def look(names: list[str]) -> dict:
    """{objective: its label, colour and marker}, as in every figure of the course."""
    styles = {name: style_of(name) for name in names}
    return {name: {"label": s.label, "colour": s.colour, "marker": s.marker} for name, s in styles.items()}


def runs() -> dict:
    """The sweep that comes with the course; of its training what is drawn."""
    from tpo_lib.runs.sweep import RUNS  # brings what trains

    content = json.loads(RUNS.read_text(encoding="utf-8"))
    keep = ("objective", "beta", "alpha", "metrics", "samples")
    rows = [
        {key: run[key] for key in keep} | {"training": [[row[name] for name in CURVES] for row in run["training"]]}
        for run in content["runs"]
    ]
    start = {key: content["start"][key] for key in ("metrics", "samples")}
    return {"start": start, "runs": rows, "look": look(list(dict.fromkeys(run["objective"] for run in rows)))}


def pair() -> dict:
    """The loss lab: its pair, its controls with their ranges, and what every objective reads."""
    lab = loss_lab()
    names = [value for _, value in lab.controls["objective"].options]
    reads = {
        name: {
            "needs": OBJECTIVES[name].needs,
            "hyper": {n: record.symbol for n, record in OBJECTIVES[name].hyperparameters.items()},
            "words": OBJECTIVES[name].words,
        }
        for name in names
    }
    return {
        "chosen": CHOSEN,
        "rejected": REJECTED,
        "situations": SITUATIONS,
        "ref_logp": REF_LOGP,
        "floor": F_FLOOR,
        "controls": {name: control(made) for name, made in lab.controls.items()},
        "objectives": reads,
        "look": look(names),
    }


def control(made) -> dict:
    """An ipywidgets control as the page makes it: choices, or a range with its step, on a logarithmic scale if `log`."""
    kept = {"label": made.description, "value": made.value}
    if hasattr(made, "options"):
        options = [each if isinstance(each, tuple) else (each, each) for each in made.options]
        return kept | {"options": options}
    return kept | {"min": made.min, "max": made.max, "step": made.step, "log": hasattr(made, "base")}


def exact() -> dict:
    """The grid of the frontier lab and its presets: what they have off the grid stands behind the `stops` of the axes."""
    grid = json.loads(frontier_grid.GRID.read_text(encoding="utf-8"))
    axes, presets = grid["axes"], {}
    more = {needed(run["objective"], Setting(**run["setting"])): run for run in grid["presets"]}
    stops = {axis: len(values) for axis, values in axes.items()}
    for title, preset in PRESETS.items():
        values = frontier_grid.on_axes(preset.setting)
        for axis, value in values.items():
            axes[axis] += [value] * (value not in axes[axis])
        at = {axis: axes[axis].index(value) for axis, value in values.items()}
        presets[title] = {"at": at, "show": preset.show, "words": preset.words}
        for name, reads in grid["reads"].items():
            if run := more.get(needed(name, preset.setting)):
                key = ",".join(str(at[axis]) for axis in reads)
                grid["runs"][name][key] = run
                grid["optima"].get(name, {}).update({key: run["optimum"]} if "optimum" in run else {})
    return grid | {"look": look(list(grid["reads"])), "presets": presets, "stops": stops}


LABS = (
    Lab(
        "runs",
        "run_browser",
        "Run browser",
        "Finished runs of the small model, over objective, beta and alpha: nothing trains here, every figure was measured. "
        "What does a larger beta buy, and what does it cost?",
        runs,
    ),
    Lab(
        "loss",
        "loss_lab",
        "Loss lab",
        "One preference pair under your hand: say how far the policy has moved on it, and see what every objective makes of "
        "that, one at a time or all side by side. Which tokens does training raise, which does it lower, and how hard?",
        pair,
    ),
    Lab(
        "frontier",
        "frontier_lab",
        "Frontier lab",
        "A world small enough to be solved exactly. Every objective was trained to the end in it, over beta, alpha, guide and "
        "data; no policy lies above the front. Who ends on it, who short of it, who below?",
        exact,
    ),
)
