"""What the loss lab shows of all objectives side by side: a table a column each, and above it where they stand."""

from __future__ import annotations

import io
from collections.abc import Mapping
from html import escape

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from tpo_course.coefficients import loss_at
from tpo_course.widgets.loss_picture import CHOSEN, PINNED, REJECTED, State, map_of_reach, place, signed
from tpo_course.widgets.parts import LAB_DPI, frame, swiped, with_a_margin
from tpo_lib.losses import F_FLOOR, OBJECTIVES
from tpo_lib.runs import heatmap
from tpo_lib.runs.plots import FONT, style_of

NUMBERS = (("loss, nats", "loss"), ("margin, nats", "margin"), ("d loss / d margin", "slope"))
REACH, TOP = 6.0, 6.2  # nats of margin and of loss that the curve shows


def canvas() -> Figure:
    """The map of what can be reached and the curve that all but IPO share, drawn once; what moves is painted on it."""
    figure = Figure(figsize=(9.4, 2.9), dpi=LAB_DPI, facecolor="white")  # inches
    reach, loss = (figure.add_axes(box) for box in ((0.078, 0.19, 0.3, 0.7), (0.47, 0.19, 0.515, 0.7)))
    for ax in (reach, loss):
        frame(ax)
    map_of_reach(reach)
    margins = torch.linspace(-REACH, REACH, 121, dtype=torch.float64)
    curve, _ = loss_at("dpo", margins, beta=1.0)
    loss.plot(margins.tolist(), curve.tolist(), color="black", linewidth=1.2)
    for style in (style_of(name) for _, name in with_a_margin() if name != "ipo"):
        loss.plot([], [], style.marker, ms=9, color=style.colour, label=style.label)  # for the legend
    loss.legend(loc="upper right", frameon=False, fontsize=FONT - 1)
    loss.set(xlim=(-REACH, REACH), ylim=(-0.2, TOP))
    loss.set_xlabel("margin (SimPO: less its γₘ), nats", fontsize=FONT - 1)
    loss.set_ylabel("loss, nats", fontsize=FONT - 1)
    loss.set_title("one curve for all but IPO, whose loss is a square", fontsize=FONT, y=1.0)
    figure.canvas = FigureCanvasAgg(figure)
    figure.canvas.draw()
    return figure


def paint(figure: Figure, states: Mapping[str, State], pinned: Mapping[str, State]) -> bytes:
    """The picture as PNG. What stands is not drawn again: its text alone would take half of a tenth of a second."""
    agg, (reach, loss) = figure.canvas, figure.axes
    standing = agg.copy_from_bbox(figure.bbox)
    before = [len(ax.lines) for ax in figure.axes]
    for shown, colour in ((pinned, PINNED), (states, "black")):
        if shown:
            place(reach, next(iter(shown.values())).value, kl=True, colour=colour)
        for name, each in shown.items():
            if name != "ipo":
                style, x = style_of(name), each.margin - each.hyper.get("gamma", 0.0)
                at = max(-REACH, min(REACH, x)), min(each.loss, TOP)  # beyond, at the edge
                look = {"color": style.colour} if shown is states else {"mfc": "white", "mec": PINNED}
                loss.plot(*at, style.marker, ms=9, clip_on=False, **look)
    for ax, kept in zip(figure.axes, before, strict=True):
        for line in list(ax.lines)[kept:]:
            ax.draw_artist(line)
            line.remove()
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(agg.buffer_rgba())).save(buffer, "png", compress_level=1)
    agg.restore_region(standing)
    return buffer.getvalue()


def page(states: Mapping[str, State], pinned: Mapping[str, State], reach: str) -> str:
    """The table as HTML: numbers, then the coefficient of every token; what was pinned in grey below."""
    rows = [_row("", [_head(each) for each in states.values()], "th")]
    for words, field in NUMBERS:
        cells = [_number(getattr(s, field), getattr(pinned[n], field) if pinned else None) for n, s in states.items()]
        rows.append(_row(words, cells))
    for i, word in enumerate([*CHOSEN, *REJECTED]):
        if i in (0, len(CHOSEN)):
            side = ("chosen", "rejected")[i > 0]
            rows.append(_row(f"<b>{side}</b>: d loss / d log π", [""] * len(states)))
        rows.append(_row(word, [_token(each, pinned.get(name), i) for name, each in states.items()]))
    note = (
        "Below 0 (orange, dashed): training raises it; above 0 (blue, solid): it lowers it; full colour is a column's largest. "
        "KL: the coefficient on the token's KL. f: TGDPO's weight, coloured from 1. "
        f"One β for all; SimPO's multiplies a mean. {escape(reach)}"
    )
    table = f'<table style="border-spacing:5px 1px;font-size:12px;line-height:1.35;text-align:right">{"".join(rows)}</table>'
    return f"{swiped(table)}<small>{note}</small>"


def words(states: Mapping[str, State], pinned: Mapping[str, State]) -> str:
    """The same in sentences, without what is said of single tokens."""
    said = []
    for name, each in states.items():
        since = f" ({signed(each.loss - pinned[name].loss, 3)} since the pinned state)" if pinned else ""
        said.append(
            f"{each.label} loss {each.loss:.4g}{since}, margin {signed(each.margin, 3)}, slope {each.slope:.3g}"
        )
    return f"{'; '.join(said)}."


def _row(head: str, cells: list[str], kind: str = "td") -> str:
    inside = "".join(f'<{kind} style="white-space:nowrap;vertical-align:top">{cell}</{kind}>' for cell in cells)
    return f'<tr><th style="text-align:left;font-weight:normal;white-space:nowrap">{head}</th>{inside}</tr>'


def _head(each: State) -> str:
    known = OBJECTIVES[each.objective].hyperparameters
    used = [f"{known[n].symbol} {v:.3g}" for n, v in each.hyper.items() if n in each.value and not isinstance(v, str)]
    line = f"border-bottom:3px solid {style_of(each.objective).colour}"
    return f'<span style="{line}">{each.label}</span><br><small>{", ".join(used)}</small>'


def _number(value: float, before: float | None) -> str:
    was = "" if before is None else f'<br><small style="color:{PINNED}">was {before:.3g}, {value - before:+.2g}</small>'
    return f"{value:.4g}{was}"


def _token(each: State, pinned: State | None, i: int) -> str:
    values = each.tokens("logps")
    parts = [heatmap.span(signed(values[i], 4), values[i], max(map(abs, values)), "")]
    kl, weights = each.tokens("kl"), each.tokens("weights")
    if kl is not None:
        held = each.held and i < len(CHOSEN)
        parts.append(f"<small>KL {'held' if held else signed(kl[i], 4)}</small>")
    if weights is not None:
        floor = "▼" if weights[i] <= F_FLOOR else ""
        f = heatmap.span(f"f {weights[i]:.2f}{floor}", weights[i] - 1, max(abs(f - 1) for f in weights), "")
        parts.append(f"<small>{f}</small>")
    parts += [""] * (pinned is not None and len(parts) == 1)
    if pinned is not None:
        parts.append(f'<small style="color:{PINNED}">was {signed(pinned.tokens("logps")[i], 4)}</small>')
    return " ".join(parts[:2]) + "".join(f"<br>{part}" for part in parts[2:])
