"""The bits of HTML and PNG that several widgets need."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping

from matplotlib.figure import Figure


def png(figure: Figure) -> bytes:
    """A figure as PNG, small enough to be redrawn while a slider moves."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


def interval(metric: Mapping) -> str:
    """A mean and its interval: "0.54 [0.50, 0.58]"."""
    return f"{metric['mean']:.2f} [{metric['low']:.2f}, {metric['high']:.2f}]"


def one_line(text: str) -> str:
    """A text escaped, its white space folded."""
    return html.escape(" ".join(text.split()))
