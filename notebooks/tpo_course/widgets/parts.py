"""The bits of HTML and PNG that several widgets need."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping

from ipywidgets import Widget
from matplotlib.figure import Figure

# For `plots.training`: 912 x 320 pixels at the 80 dots per inch of `png`, which fits a notebook 1100 pixels wide;
# of every panel left, bottom, width and height, shares of the figure.
WIDE = (11.4, 4.0)  # inches
PANELS = [(0.085 + 0.325 * i, 0.235, 0.24, 0.725) for i in range(3)]
LABELS = (0.62, 0.3)  # inches from a panel to the near edges of the labels of its y and x axis


def png(figure: Figure) -> bytes:
    """A figure as PNG, small enough to be redrawn while a slider moves."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


def still(figure: Figure, boxes: list[tuple], size: tuple[float, float] | None = None) -> Figure:
    """The figure with its panels and the labels of their axes at fixed places: they stay where they are when the numbers
    change, and looking for free places, which is more than half of the time of drawing, falls away.

    Args:
        boxes: (left, bottom, width, height) of every panel, shares of the figure.
        size: width and height, inches.
    """
    figure.set_layout_engine(None)  # not "none", which draws twice when it saves
    if size is not None:
        figure.set_size_inches(*size)
    inches, (to_left, below) = figure.get_size_inches(), LABELS
    for ax, box in zip(figure.axes, boxes, strict=True):
        ax.set_position(box)
        ax.yaxis.set_label_coords(-to_left / (box[2] * inches[0]), 0.5)
        ax.xaxis.set_label_coords(0.5, -below / (box[3] * inches[1]))
    return figure


def bundle(box: Widget, text: str, *, image: bytes = b"", page: str = "") -> dict:
    """What a cell shows: the widget, and where there is no kernel a picture (PNG) or a page (HTML), else one line of text."""
    view = {"version_major": 2, "version_minor": 0, "model_id": box.model_id}
    shown = {"application/vnd.jupyter.widget-view+json": view, "text/plain": text}
    if image:
        shown["image/png"] = base64.b64encode(image).decode()
    if page:
        shown["text/html"] = page
    return shown


def interval(metric: Mapping) -> str:
    """A mean and its interval: "0.54 [0.50, 0.58]"."""
    return f"{metric['mean']:.2f} [{metric['low']:.2f}, {metric['high']:.2f}]"


def one_line(text: str) -> str:
    """A text escaped, its white space folded."""
    return html.escape(" ".join(text.split()))
