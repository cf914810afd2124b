"""The memory lab: what an update takes, part by part, the textbook step beside the fused one, before anything runs.

The widget sets controls and draws; every number comes from `tpo_lib.fast.memory`.
"""

from collections.abc import Mapping
from dataclasses import replace
from html import escape

import ipywidgets as w
from matplotlib.figure import Figure

from tpo_course.widgets.parts import BEHIND, LAB_DPI, Lab, frame, look
from tpo_lib.fast.memory import GPUS, SHAPES, StepMemory, step_memory
from tpo_lib.losses import OBJECTIVES
from tpo_lib.runs.plots import FONT, style_of

# part -> (colour, hatch): Okabe and Ito's palette, told apart in greyscale by the hatch
LOOKS = {
    "weights": ("#0072B2", ""),
    "16-bit copies": ("#0072B2", "...."),
    "gradients": ("#56B4E9", ""),
    "optimizer": ("#56B4E9", "////"),
    "frozen models": ("#BBBBBB", ""),
    "activations": ("#009E73", "\\\\\\\\"),
    "hidden states": ("#009E73", "oo"),
    "head's gradient": ("#E69F00", "xx"),
    "vocabulary": ("#D55E00", ""),
}
STEPS = {"textbook": False, "fused": True}  # name -> step_memory's `fused`
SHOWN = {"both steps": ("textbook", "fused"), "textbook alone": ("textbook",), "fused alone": ("fused",)}
PRECISIONS = {"float32": "no", "bf16 (autocast)": "bf16", "fp16 (autocast)": "fp16"}
OPTIMIZERS = {"adamw": "AdamW", "rmsprop": "RMSprop"}
GPU_TILE = 1 << 30  # the largest tile that tiles.choose_tile_bytes takes on a GPU


class MemoryLab(Lab):
    """Controls for model, vocabulary, length, batch, objective, precision and caches; the bytes they come to.

    Attributes:
        controls: {name: control}, those of COLUMNS.
        found: {"textbook" or "fused": StepMemory} of what is shown.
        figure: the matplotlib Figure, redrawn in place; picture: the HTML widget that shows it.
        text: the HTML widget with the table; alt: the picture as plain text.

    Example:
        >>> lab = memory_lab()
        >>> lab.controls["model"].value = "GPT-2 small"
        >>> lab.controls["vocab"].value  # a model brings its vocabulary
        50257
        >>> lab.found["textbook"].total > lab.found["fused"].total
        True
    """

    def __init__(self) -> None:
        figure = Figure(figsize=(9.4, 3.9), dpi=LAB_DPI, facecolor="white")  # inches
        figure.add_axes((0.09, 0.15, 0.66, 0.79))
        super().__init__(_controls(), COLUMNS, figure, text=330)

    def _follow(self, moved: w.Widget) -> None:
        if moved is self.controls["model"]:
            self._set({"vocab": SHAPES[moved.value].vocab})

    def _draw(self) -> None:
        value = {name: control.value for name, control in self.controls.items()}
        self.found = {name: _memory(value, STEPS[name]) for name in SHOWN[value["step"]]}
        said = _settings(value)
        totals = "; ".join(f"{name} {_gb(memory.total)}" for name, memory in self.found.items())
        _paint(self.figure.axes[0], self.found)
        self._show(f"{said} Together: {totals}.", escape(said) + _table(self.found))


COLUMNS = (("model", "vocab", "length", "pairs", "scored"), ("objective", "precision", "optimizer", "cached", "step"))


def _controls() -> dict[str, w.Widget]:
    wide, powers, first = look("150px", "395px"), [2**i for i in range(13)], "Llama-3.2-1B"
    sizes = {"min": 256, "max": 1 << 20, "step": 1024}
    shares = {"min": 0.1, "max": 1.0, "step": 0.1, "readout_format": ".1f"}
    objectives = [(style_of(name).label, name) for name in OBJECTIVES]
    optimizers = [(label, name) for name, label in OPTIMIZERS.items()]
    return {
        "model": w.Dropdown(options=list(SHAPES), value=first, description="model", **wide),
        "vocab": w.BoundedIntText(SHAPES[first].vocab, description="vocabulary V", **sizes, **wide),
        "length": w.SelectionSlider(options=powers[5:], value=512, description="length T (tokens)", **wide),
        "pairs": w.SelectionSlider(options=powers[:9], value=16, description="pairs B", **wide),
        "scored": w.FloatSlider(0.6, description="share of response", **shares, **wide),
        "objective": w.Dropdown(options=objectives, value="tdpo2", description="objective", **wide),
        "precision": w.Dropdown(options=list(PRECISIONS), description="dtype", **wide),
        "optimizer": w.Dropdown(options=optimizers, description="optimizer", **wide),
        "cached": w.Dropdown(options=[("no", False), ("yes", True)], description="caches", **wide),
        "step": w.Dropdown(options=list(SHOWN), description="show", **wide),
    }


def _memory(value: Mapping, fused: bool) -> StepMemory:
    shape = replace(SHAPES[value["model"]], vocab=value["vocab"])
    given = {name: value[name] for name in ("length", "pairs", "objective", "cached", "scored", "optimizer")}
    precision = PRECISIONS[value["precision"]]
    return step_memory(shape, precision=precision, fused=fused, tile_bytes=GPU_TILE, **given)


def _settings(value: Mapping) -> str:
    optimizer, caches = OPTIMIZERS[value["optimizer"]], "with caches" if value["cached"] else "without caches"
    return (
        f"{value['model']}, V = {value['vocab']:,}, T = {value['length']}, B = {value['pairs']}, {value['scored']:.0%} of the "
        f"positions scored; {style_of(value['objective']).label}, {value['precision']}, {optimizer}, {caches}."
    )


def _gb(size: float) -> str:
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if size >= u / 100), (1e3, "kB"))
    return f"{size / unit:,.2f} {name}"


def _table(found: Mapping[str, StepMemory]) -> str:
    """Bytes of every part, the sum, the cache, and which GPUs hold it."""
    cell = "padding:0 1.2em 0 0;text-align:"

    def row(name: str, texts: list[str], tag: str = "td") -> str:
        cells = "".join(f'<{tag} style="{cell}right">{text}</{tag}>' for text in texts)
        return f'<tr><th scope="row" style="{cell}left;font-weight:normal">{escape(name)}</th>{cells}</tr>'

    rows = [row("", list(found), "th")]
    for part in LOOKS:
        sizes = [memory.parts.get(part, 0) for memory in found.values()]
        if any(sizes):
            rows.append(row(part, [_gb(size) if size else "none" for size in sizes]))
    rows.append(row("together", [f"<b>{_gb(memory.total)}</b>" for memory in found.values()]))
    for gpu in GPUS:
        rows.append(row(f"fits into {gpu}", ["yes" if memory.fits()[gpu] else "no" for memory in found.values()]))
    disk = next(iter(found.values())).disk
    rows += [row("on disk, each pair", [_gb(disk)] * len(found))] if disk else []
    return f"<table>{''.join(rows)}</table>"


def _paint(ax, found: Mapping[str, StepMemory]) -> None:
    """A stacked bar a step, from left to right, and the sizes of GPUs where they lie within reach."""
    ax.clear()
    drawn = set()
    for place, memory in enumerate(found.values()):
        left = 0.0
        for part, size in memory.parts.items():
            colour, hatch = LOOKS[part]
            kind = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.6}
            label = None if part in drawn or not size else part
            drawn |= {part} if size else set()
            ax.barh(place, size / 1e9, 0.62, left=left, label=label, **kind)
            left += size / 1e9
        ax.text(left, place - 0.42, f"{_gb(memory.total)} ", ha="right", va="center", fontsize=FONT - 1, bbox=BEHIND)
    reach = 1.08 * max(memory.total for memory in found.values()) / 1e9
    for number, (name, size) in enumerate(GPUS.items()):
        if size / 1e9 <= reach:
            ax.axvline(size / 1e9, color="black", linewidth=1.2, linestyle="--")
            row = len(found) - 0.5 + 0.2 * (number % 2)  # neighbours on two rows: their names may be close
            ax.text(size / 1e9 + 0.008 * reach, row, name, fontsize=FONT - 1, va="center", bbox=BEHIND)
    ax.set(xlim=(0, reach), ylim=(len(found) - 0.15, -0.6), yticks=range(len(found)))
    ax.set_yticklabels(list(found), fontsize=FONT)
    ax.set_xlabel("memory, GB (10⁹ bytes)", fontsize=FONT)
    frame(ax)
    ax.grid(visible=False, axis="y")
    handles, names = ax.get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda i: list(LOOKS).index(names[i]))
    where = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.02), "frameon": False, "fontsize": FONT - 1}
    ax.legend([handles[i] for i in order], [names[i] for i in order], **where)


memory_lab = MemoryLab  # as the chapters call it
