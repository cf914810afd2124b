"""What several widgets are made of: controls, rows, pictures, tables, and what a cell shows."""

import base64
import io
import math
from collections.abc import Iterable, Mapping
from html import escape

import ipywidgets as w
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tpo_lib.losses import OBJECTIVES, Hyperparameter
from tpo_lib.runs import plots
from tpo_lib.runs.plots import FONT, GRID

# For `plots.training`: 912 x 320 pixels at the 80 dots per inch of `png`, which fits a notebook 1100 pixels wide;
# of every panel left, bottom, width and height, shares of the figure.
WIDE = (11.4, 4.0)  # inches
PANELS = [(0.085 + 0.325 * i, 0.235, 0.24, 0.725) for i in range(3)]
LABELS = (0.62, 0.3)  # inches from a panel to the near edges of the labels of its y and x axis
BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # of a note in a picture: no line runs through it
LAB_DPI = 84
WITHIN = "calc(100% - 4px)"  # of the page: controls and rooms have a margin of 2 px
LONG = 100  # pixels of a description that leaves a slider no room on a phone
BESIDE = 236  # pixels that slider and readout take beside it at least
LEGIBLE = 620  # pixels of a picture's width below which its words cannot be read
STATUS = '<div role="status" style="line-height:1.5">'


# Controls.


def look(label: str, width: str) -> dict:
    """Style and layout of a control whose description takes `label`; on a narrow page a long one stands above it."""
    layout = {"width": width, "max_width": WITHIN}
    if int(label[:-2]) >= LONG and int(width[:-2]) - int(label[:-2]) >= BESIDE:
        layout |= {"flex_flow": "row wrap", "height": "auto", "min_height": "28px"}
    return {"style": {"description_width": label}, "layout": w.Layout(**layout)}


def knob(record: Hyperparameter, description: str, *, steps: int, **given) -> w.Widget:
    """The control of a hyperparameter, its range made from its record; `steps` a decade, or as fine where it may be 0."""
    start = 0.1 if record.default is None else record.default
    if record.choices:
        return w.Dropdown(options=list(record.choices), value=start, description=description, **given)
    given |= {"description": description, "continuous_update": False}
    if record.above == 0:
        given = {"readout_format": ".2g"} | given
        low, high = math.log10(min(0.01, start / 10)), math.log10(max(10, 10 * start))
        return w.FloatLogSlider(value=start, min=low, max=high, step=1 / steps, **given)
    most = 4 * (start or 0.5)
    return w.FloatSlider(value=start, min=0.0, max=most, step=most / (2 * steps), **given)


def with_a_margin() -> list[tuple[str, str]]:
    """(label, name) of every objective but those that read one side alone, as a Dropdown takes them."""
    return [(plots.style_of(name).label, name) for name, entry in OBJECTIVES.items() if entry.paired]


def movable() -> dict[str, list[str]]:
    """{hyperparameter: the objectives with a margin that take it}; what has no default, and TGDPO's floor, stay as they are."""
    found: dict[str, list[str]] = {}
    for _, objective in with_a_margin():
        for name, record in OBJECTIVES[objective].hyperparameters.items():
            if record.default is not None and name != "floor":
                found.setdefault(name, []).append(objective)
    return found


def row(*children: w.Widget) -> w.HBox:
    """Side by side, below each other where the page is narrow."""
    for child in children:
        child.layout.max_width = WITHIN
    return w.HBox(children, layout=w.Layout(flex_flow="row wrap"))


def on(controls: Iterable[w.Widget], do) -> None:
    """Call `do()` whenever one of the controls has moved."""
    for control in controls:
        control.observe(lambda _: do(), "value")


def button(words: str, do, **given) -> w.Button:
    """A button that calls `do()`."""
    made = w.Button(description=words, **given)
    made.on_click(lambda _: do())
    return made


def room(pixels: int) -> w.HTML:
    """HTML that is at least so high: the page does not jump when its text comes."""
    return w.HTML(layout=w.Layout(min_height=f"{pixels}px", max_width=WITHIN))


def swiped(content: str) -> str:
    """HTML that is never wider than the page: what does not fit moves sideways under the finger."""
    return f'<div style="width:0;min-width:100%;overflow-x:auto">{content}</div>'


# Pictures.


def frame(ax: Axes) -> None:
    """The course's grid and axes, as `plots.panels` draws them."""
    ax.grid(**GRID)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=FONT - 1)


def png(figure: Figure, dpi: int = 80, **how) -> bytes:
    """A figure as PNG, small enough to be redrawn while a slider moves."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, **how)
    return buffer.getvalue()


def image(width: int, height: int) -> w.Image:
    """Room for a PNG, in pixels: the page does not jump when it comes, and a narrow one shows it smaller, in `sideways`."""
    narrow = {"max_width": "100%", "min_width": f"{min(width, LEGIBLE)}px", "flex": "0 1 auto"}
    narrow |= {"object_fit": "contain", "object_position": "left top"}
    return w.Image(format="png", layout=w.Layout(width=f"{width}px", min_height=f"{height}px", **narrow))


def sideways(picture: w.Image) -> w.Box:
    """A picture in a frame of its own, under which it moves sideways where the page is too narrow to read it."""
    return w.Box([picture], layout=w.Layout(max_width=WITHIN, overflow="auto hidden"))


def still(figure: Figure, boxes: list[tuple], size: tuple[float, float] | None = None) -> Figure:
    """The figure, `size` inches large, with its panels and the labels of their axes at fixed places.

    They stay where they are when the numbers change, and looking for free places, more than half of the time of drawing,
    falls away. `boxes` are (left, bottom, width, height) of every panel, shares of the figure.
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


def training(curves: Mapping, updates: int | None = None) -> bytes:
    """`plots.training` as PNG, its panels in their places; with `updates` the axes reach to the end of the run at once."""
    figure = still(plots.training(curves), PANELS, WIDE)
    named = figure.legends[0].legend_handles
    figure.legends[0].remove()  # a column an objective: of several runs of one it would cover the axis
    kind = {
        "loc": "lower center",
        "bbox_to_anchor": (0.5, -0.02),
        "frameon": False,
        "fontsize": FONT - 1,
        "handlelength": 3.5,
    }
    figure.legend(handles=named, ncols=min(3, len(named)), **kind)
    for ax in figure.axes if updates else ():
        ax.set_xlim(0, updates + 0.5)  # nothing moves but the curve
    return png(figure)


# Text.


def page(content: str, width: str = "912px") -> str:
    """HTML set like a page of text."""
    return f'<div style="line-height:1.5;max-width:{width}">{content}</div>'


def interval(metric: Mapping) -> str:
    """A mean and its interval: "0.54 [0.50, 0.58]"."""
    return f"{metric['mean']:.2f} [{metric['low']:.2f}, {metric['high']:.2f}]"


def one_line(text: str) -> str:
    """A text escaped, its white space folded."""
    return escape(" ".join(text.split()))


def table(heads: Iterable[str], rows: Iterable[Iterable[str]], note: str) -> str:
    """A table of HTML cells with a note below it."""
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for cells in rows)
    style = "border-spacing:12px 2px;text-align:left;line-height:1.5"
    whole = f'<table style="{style}"><tr>{head}</tr>{body}</table>'
    return f"{swiped(whole)}<small>{note}</small>"


def samples(name: str, before: Iterable[Mapping], after: Iterable[Mapping]) -> str:
    """What the start and a run write after the same prompts: {"prompt", "text", "reward"} each."""
    parts = [
        f"<p><b>{escape(a['prompt'])}</b> …<br>start ({a['reward']:.2f}): {one_line(a['text'])}<br>"
        f"{escape(name)} ({b['reward']:.2f}): {one_line(b['text'])}</p>"
        for a, b in zip(before, after, strict=True)
    ]
    return page("".join(parts), "60em")


# What a cell shows.


def bundle(box: w.Widget, text: str, *, image: bytes = b"", page: str = "") -> dict:
    """The widget, and where there is no kernel a picture (PNG) or a page (HTML), else one line of text."""
    view = {"version_major": 2, "version_minor": 0, "model_id": box.model_id}
    shown = {"application/vnd.jupyter.widget-view+json": view, "text/plain": text}
    if image:
        shown["image/png"] = base64.b64encode(image).decode()
    if page:
        shown["text/html"] = page
    return shown


class Shown:
    """Widgets that a cell has made itself, with what stands in their place where there is no kernel.

    Args:
        box: what a kernel shows.
        text: its present state in one line.
        image, page: a picture (PNG, or a Figure) or HTML of the same state; one of them has to be given.

    Raises:
        ValueError: neither picture nor page.
    """

    def __init__(self, box: w.Widget, text: str, *, image: bytes | Figure = b"", page: str = "") -> None:
        image = png(image) if isinstance(image, Figure) else image
        if not image and not page:
            raise ValueError("shown: give image= or page=: without a kernel a reader would see one line of text")
        self.box, self._rest = box, {"text": text, "image": image, "page": page}

    def _repr_mimebundle_(self, **_) -> dict:
        return bundle(self.box, **self._rest)


class Lab:
    """Two columns of controls, a picture below them, and its numbers as text. Set `controls[name].value` from a cell.

    A lab of its own draws into `figure` in `_draw` and ends with `_show`; `_follow` sets controls that go with the one moved.
    """

    def __init__(self, controls: dict[str, w.Widget], columns: Iterable, figure: Figure, text: int) -> None:
        self.controls, self.figure = controls, figure
        self.picture, self.text = room(round(figure.get_figheight() * LAB_DPI) + 8), room(text)
        self.text.layout.max_width = "800px"
        side_by_side = row(*(w.VBox([controls[name] for name in names]) for names in columns))
        self.box = w.VBox([side_by_side, self.picture, self.text])
        self._held = False  # several controls are being set at once
        for control in controls.values():
            control.observe(self._moved, "value")
        self._draw()

    def _repr_mimebundle_(self, **_) -> dict:
        return bundle(self.box, self.alt, image=self._png)

    def _moved(self, change: Mapping) -> None:
        if not self._held:
            self._follow(change["owner"])
            self._draw()

    def _set(self, values: Mapping) -> None:
        self._held = True
        for name, value in values.items():
            self.controls[name].value = value
        self._held = False

    def _show(self, alt: str, text: str, picture: bytes = b"") -> None:
        self.alt, self._png = alt, picture or png(self.figure, LAB_DPI, pil_kwargs={"compress_level": 1})
        source = base64.b64encode(self._png).decode()
        self.text.value = f"{STATUS}{text}</div>"
        alt = escape(alt, quote=True)
        style = f"max-width:100%;min-width:{LEGIBLE}px"
        shown = f'<img src="data:image/png;base64,{source}" alt="{alt}" style="{style}">'
        self.picture.value = swiped(shown)
