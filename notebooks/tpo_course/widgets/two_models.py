"""Two models at one price: a line moves along the KL, and the table says what every objective has bought there."""

from collections.abc import Mapping

import ipywidgets as w

from tpo_course.two_models import LABELS, frontiers, reward_at
from tpo_course.widgets.parts import LAB_DPI, Lab, look, table
from tpo_lib.runs import plots

METRICS = {"reward": "reward", "judge": "judge", "entropy": "entropy"}
LEVELS = tuple(round(0.01 * 1.1**i, 4) for i in range(57))  # nats a token, .01 to 2


class TwoModels(Lab):
    """What every objective has bought at one KL a token, on every stored model.

    Args:
        stored: as `tpo_data.smollm2.load` gives it.

    Attributes:
        controls: {"level", "metric"}: nats a token, and what was bought.
        found: {model: {objective: value, or None where its run never came so far}}.
        text: the HTML widget with the table; alt: it as plain text.
    """

    def __init__(self, stored: Mapping[str, Mapping]) -> None:
        self.stored, wide = stored, look("150px", "520px")
        names = [f"{level:.3g}" for level in LEVELS]
        level = w.SelectionSlider(
            options=list(zip(names, LEVELS, strict=True)), value=LEVELS[24], continuous_update=False,
            description="nats a token", **wide,
        )  # fmt: skip
        metric = w.Dropdown(options=list(METRICS.items()), description="what it buys", **wide)
        figure = frontiers(stored)
        figure.set_dpi(LAB_DPI)
        super().__init__({"level": level, "metric": metric}, (("level", "metric"),), figure, text=230)

    def _follow(self, moved: w.Widget) -> None:
        """No control brings another with it."""

    def _draw(self) -> None:
        level, metric = self.controls["level"].value, self.controls["metric"].value
        self.figure = frontiers(self.stored, metric=metric, level=level)
        self.found = {
            name: {objective: reward_at(points, level, metric) for objective, points in model["curves"].items()}
            for name, model in self.stored.items()
        }
        heads = [f"at {level:.3g} nats a token", *(LABELS.get(name, name) for name in self.found)]
        objectives = next(iter(self.found.values()))
        cells = {name: [_cell(found.get(name)) for found in self.found.values()] for name in objectives}
        body = [[plots.style_of(name).label, *values] for name, values in cells.items()]
        said = "; ".join(f"{row[0]} {' and '.join(row[1:])}" for row in body)
        note = "Between two evaluations straight in the root of the KL; - : the run never came so far, and nobody measured there."
        self._show(f"{heads[0]}, {' and '.join(heads[1:])}: {said}.", table(heads, body, note))


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


two_models = TwoModels  # as the chapter calls it
