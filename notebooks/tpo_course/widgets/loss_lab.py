"""The loss lab: one preference pair under your hand, and what every objective makes of it.

The widget sets sliders and draws; every number comes from `tpo_course.coefficients`, which runs the objectives of
`tpo_lib.losses` on a small TokenStats and differentiates them by autograd.
"""

from collections.abc import Mapping
from html import escape

import ipywidgets as w
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tpo_course.coefficients import PairCoefficients, coefficients, loss_at, margin_terms, spread
from tpo_course.widgets.parts import BEHIND, LAB_DPI, Lab, frame, knob, look, movable, with_a_margin
from tpo_lib.losses import F_FLOOR, OBJECTIVES, floor_share
from tpo_lib.runs.plots import FONT, style_of
from tpo_lib.types import TokenStats

# The pair: its words, and the share of the guide's strongest reward that each of them gets.
CHOSEN = {"warm": 0.8, "and": 0.0, "funny": 1.0, "but": -0.1, "too": -0.4, "long": -0.8}
REJECTED = {"a": 0.0, "dull": -1.0, "plot": -0.4, "with": 0.1, "good": 0.9, "songs": 0.5}
GUIDE_BETA = 0.1
PAIR = ("chosen_logratio", "rejected_logratio", "chosen_kl", "rejected_kl")
SITUATIONS = {  # what the four sliders of PAIR are set to, nats
    "start: policy = reference": (0.0, 0.0, 0.0, 0.0),
    "half-way through training": (4.0, -6.0, 2.0, 3.0),
    "both log-ratios go down": (-5.0, -16.0, 5.0, 11.0),
    "learned: a wide margin": (15.0, -30.0, 9.0, 18.0),
    "wrong way round": (-8.0, 8.0, 4.0, 4.0),
}
BY_HAND = "set by hand"
GREY = "#555555"


class LossLab(Lab):
    """One preference pair, sliders for how far the policy has moved on it, and what an objective makes of that.

    Shows the loss at the pair's margin, what the margin is made of, the coefficient on every token's log pi and KL (TDPO2's
    stop-gradient included) and TGDPO's weights f with their floor. The log-ratios and KLs are spread evenly over the tokens.

    Attributes:
        controls: {name: control}: objective, the objectives' hyperparameters, guide, situation, and those of PAIR.
        result, terms: the PairCoefficients and the `margin_terms` that are shown.
        figure: the matplotlib Figure, redrawn in place; picture: the HTML widget that shows it.
        text: the HTML widget that says all numbers; alt: the same as plain text.

    Example:
        >>> lab = loss_lab()
        >>> lab.controls["objective"].value = "tdpo2"
        >>> lab.controls["rejected_kl"].value = 3.0
        >>> round(lab.result.margin.item(), 4)  # beta 0.1, alpha 0.5, DPO's part 0: -0.1 * 0.5 * 3
        -0.15
    """

    def __init__(self) -> None:
        controls, pair = _controls(), ("situation", *PAIR)
        super().__init__(controls, ([name for name in controls if name not in pair], pair), _canvas(), text=210)

    def _follow(self, moved: w.Widget) -> None:
        if moved is self.controls["situation"] and moved.value != BY_HAND:
            self._set(dict(zip(PAIR, SITUATIONS[moved.value], strict=True)))
        elif any(moved is self.controls[name] for name in PAIR):
            self._set({"situation": BY_HAND})

    def _draw(self) -> None:
        value = {name: control.value for name, control in self.controls.items()}
        objective = OBJECTIVES[value["objective"]]
        read = {"objective", "situation", *PAIR[:2], *objective.hyperparameters}
        read |= {*PAIR[2:]} if "kl" in objective.needs else set()
        read |= {"guide"} if "guide_logps" in objective.needs else set()
        for name, control in self.controls.items():
            control.disabled = name not in read
        hyper = objective.settings({**value, "guide_beta": GUIDE_BETA, "floor": F_FLOOR})
        pair = [_response(words, side, value) for words, side in ((CHOSEN, "chosen"), (REJECTED, "rejected"))]
        self.result = coefficients(value["objective"], *pair, **hyper)
        self.terms = {name: t.item() for name, t in margin_terms(value["objective"], *pair, **hyper).items()}
        lines = _sentences(value, hyper, read, self.result, self.terms)
        _paint(self.figure.axes, value["objective"], hyper, self.result, self.terms)
        self._show(" ".join(lines), "<br>".join(map(escape, lines)))


def _controls() -> dict[str, w.Widget]:
    wide = look("150px", "395px")
    objectives = with_a_margin()

    def slider(description: str, low: float, high: float, step: float, value: float = 0.0) -> w.FloatSlider:
        more = {"readout_format": ".1f", "continuous_update": False}
        return w.FloatSlider(value=value, min=low, max=high, step=step, description=description, **more, **wide)

    def hyperparameter(name: str, readers: list[str]) -> w.Widget:
        record = OBJECTIVES[readers[0]].hyperparameters[name]
        whose = "" if len(readers) == len(objectives) else f" ({', '.join(style_of(n).label for n in readers)})"
        format = {} if record.choices else {"readout_format": ".3f" if record.above == 0 else ".2f"}
        return knob(record, record.symbol + whose, steps=20, **format, **wide)

    return {
        "objective": w.Dropdown(options=objectives, value="dpo", description="objective", **wide),
        **{name: hyperparameter(name, readers) for name, readers in movable().items()},
        "guide": slider("guide's largest r̂ (nats)", 0.0, 4.0, 0.1, value=1.0),
        "situation": w.Dropdown(options=[*SITUATIONS, BY_HAND], description="situation", **wide),
        "chosen_logratio": slider("log-ratio chosen (nats)", -40.0, 40.0, 0.5),
        "rejected_logratio": slider("log-ratio rejected", -40.0, 40.0, 0.5),
        "chosen_kl": slider("SeqKL chosen (nats)", 0.0, 40.0, 0.5),
        "rejected_kl": slider("SeqKL rejected", 0.0, 40.0, 0.5),
    }


def _response(words: Mapping[str, float], side: str, value: Mapping) -> TokenStats:
    r_hat = value["guide"] * torch.tensor(list(words.values()), dtype=torch.float64)  # (T,)
    return spread(value[f"{side}_logratio"], value[f"{side}_kl"], r_hat, guide_beta=GUIDE_BETA)


def _sentences(value: Mapping, hyper: Mapping, read: set, found: PairCoefficients, terms: Mapping) -> list[str]:
    """Everything the picture shows, as lines of text."""
    label, records = style_of(value["objective"]).label, OBJECTIVES[value["objective"]].hyperparameters
    said = {n: v if isinstance(v, str) else f"{v:.3g}" for n, v in hyper.items() if n in value}
    settings = ", ".join(f"{records[n].symbol} = {v}" for n, v in said.items())
    state = f"Log-ratio {value['chosen_logratio']:+.1f} (chosen), {value['rejected_logratio']:+.1f} (rejected) nats"
    if "chosen_kl" in read:
        state += f"; SeqKL {value['chosen_kl']:.1f} (chosen), {value['rejected_kl']:.1f} (rejected) nats"
    if "guide" in read:
        state += f"; largest r̂ {value['guide']:.1f} nats"
    _, slope = loss_at(value["objective"], found.margin, **hyper)
    lines = [
        f"{label}, {settings}. {state}.",
        f"Margin {_signed(found.margin.item(), 3)} nats, loss {found.output.loss.item():.4g} nats, "
        f"slope of the loss {slope.item():.3g}.",
        f"Coefficients on log π: chosen {_range(found.chosen.logps)}, rejected {_range(found.rejected.logps)}. "
        "Training raises what has a negative one.",
        _kl_sentence(label, found, terms),
    ]
    if found.chosen.weights is None:
        return [*lines, f"Weights f: {label} has none; all tokens of a response share one coefficient."]
    f_w, f_l = found.chosen.weights, found.rejected.weights  # (1, T) each
    low, count = (n.item() for n in floor_share(found.output, torch.ones_like(torch.cat([f_w, f_l]), dtype=torch.bool)))
    share = f"{low} of {count} tokens ({low / count:.0%}) on the floor {F_FLOOR}"
    return [*lines, f"Weights f: chosen {_range(f_w, '')}, rejected {_range(f_l, '')}; {share}."]


def _kl_sentence(label: str, found: PairCoefficients, terms: Mapping) -> str:
    if found.chosen.kl is None:
        return f"KL: {label} reads none."
    parts = []
    for side, tokens in (("chosen", found.chosen), ("rejected", found.rejected)):
        pull = f"coefficient {_range(tokens.kl)}" if tokens.kl.any() else "coefficient 0, no gradient"
        parts.append(f"{side} {_signed(terms[f'{side} kl'], 3)} in the margin, {pull}")
    held = " The stop-gradient holds the chosen KL: it counts, but nothing pushes it." if _held(found) else ""
    return f"KL: {'; '.join(parts)}.{held}"


def _held(found: PairCoefficients) -> bool:
    """Whether the rejected KL carries gradient and the chosen one does not."""
    return found.chosen.kl is not None and bool(found.rejected.kl.any()) and not found.chosen.kl.any()


def _range(values: torch.Tensor, sign: str = "+") -> str:
    low, high = (f"{end.item() + 0.0:{sign}.3g}" for end in (values.min(), values.max()))  # + 0.0: no "-0"
    return f"{low} on every token" if low == high else f"{low} to {high}"


def _signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # + 0.0: no "-0.000"


# The picture.


def _canvas() -> Figure:
    """The empty panels: loss, terms of the margin, coefficients, weights. Built once; a move redraws what is in them."""
    figure = Figure(figsize=(9.4, 7.2), dpi=LAB_DPI, facecolor="white")  # inches: 789 x 604 pixels
    place = {"left": 0.095, "right": 0.985, "top": 0.955, "bottom": 0.055, "hspace": 0.42, "wspace": 0.42}
    grid = figure.add_gridspec(3, 2, height_ratios=(2.3, 2.0, 1.3), **place)
    axes = [figure.add_subplot(part) for part in (grid[0, 0], grid[0, 1], grid[1, :], grid[2, :])]
    for ax in axes:
        frame(ax)
        # Fixed places: searching for free ones takes a fifth of a redraw.
        ax.yaxis.set_label_coords(-0.13 if ax in axes[:1] else -0.075, 0.5)
        ax.xaxis.set_label_coords(0.5, -0.15)
    loss, terms, tokens, weights = axes
    loss.set_xlabel("margin, nats", fontsize=FONT - 1)
    loss.set_ylabel("loss, nats", fontsize=FONT - 1)
    # IPO's is a square
    loss.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1000 else f"{value / 1000:g}k")
    terms.set_xlabel("nats", fontsize=FONT - 1)
    terms.set_title("what the margin is made of", fontsize=FONT, y=1.0)
    terms.set(ylim=(4.6, -0.6), yticks=range(5))
    tokens.set_title("coefficient of every token", fontsize=FONT, y=1.0, loc="left")
    tokens.set_ylabel("d loss / d ·", fontsize=FONT - 1)
    tokens.yaxis.set_major_locator(MaxNLocator(5))
    tokens.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    tokens.set_xticks(_PLACES, [*CHOSEN, *REJECTED])
    weights.set_ylabel("weight f", fontsize=FONT - 1)
    middles = [_PLACES[len(CHOSEN) // 2] - 0.5, _PLACES[len(CHOSEN) + len(REJECTED) // 2] - 0.5]
    weights.set_xticks(middles, ["chosen response", "rejected response"])
    weights.tick_params(axis="x", length=0)
    for ax in (tokens, weights):
        ax.set_xlim(-0.7, _PLACES[-1] + 0.7)
        ax.grid(visible=False, axis="x")
    return figure


# Where the tokens stand: a gap between the two responses.
_PLACES = [*range(len(CHOSEN)), *(len(CHOSEN) + 0.8 + i for i in range(len(REJECTED)))]


def _paint(axes: list[Axes], objective: str, hyper: Mapping, found: PairCoefficients, terms: Mapping) -> None:
    for ax in axes:
        for artist in [*ax.lines, *ax.patches, *ax.texts]:
            artist.remove()
        ax.containers.clear()
    _loss_panel(axes[0], objective, hyper, found)
    _terms_panel(axes[1], objective, found, terms)
    _token_panel(axes[2], objective, found)
    _weight_panel(axes[3], objective, hyper, found)
    for ax in axes[2:]:
        ax.axvline(len(CHOSEN) - 0.1, color="black", linewidth=0.8, linestyle=":")


def _loss_panel(ax: Axes, objective: str, hyper: Mapping, found: PairCoefficients) -> None:
    style, margin, loss = style_of(objective), found.margin.item(), found.output.loss.item()
    reach = max(4.0, 1.25 * abs(margin))
    margins = torch.linspace(-reach, reach, 121, dtype=torch.float64)
    curve, _ = loss_at(objective, margins, **hyper)
    slope = loss_at(objective, found.margin, **hyper)[1].item()
    step = 0.35 * reach
    ax.plot(margins.tolist(), curve.tolist(), color="black", linewidth=1.5, label="loss")
    ends = [margin - step, margin + step], [loss - slope * step, loss + slope * step]
    ax.plot(*ends, color=style.colour, linewidth=1.5, linestyle="--", label="slope")
    ax.plot([margin], [loss], marker=style.marker, markersize=11, color=style.colour, label="this pair")
    top = curve.max().item()
    ax.set(xlim=(-reach, reach), ylim=(-0.08 * top, 1.04 * top))
    ax.set_title(f"{style.label}: loss {loss:.3g} nats, slope {slope:.3g}", fontsize=FONT, y=1.0)


def _terms_panel(ax: Axes, objective: str, found: PairCoefficients, terms: Mapping) -> None:
    """Bars for what the margin is made of; the margin itself at the bottom."""
    style, score = style_of(objective), "log-ratio" if "ref_logps" in OBJECTIVES[objective].needs else "mean log π"
    bars = [*terms.values(), found.margin.item()]
    notes = [_signed(value, 3) for value in bars]
    if found.chosen.kl is None:
        notes[2:4] = ["not read", "not read"]
    elif _held(found):
        notes[2] += " (held)"  # short: it stands inside the panel
    filled, hatched = {"color": style.colour}, {"color": "white", "edgecolor": style.colour, "hatch": "////"}
    reach = max(1.0, *map(abs, bars))
    for row, (value, note) in enumerate(zip(bars, notes, strict=True)):
        ax.barh(row, value, 0.62, **(filled, filled, hatched, hatched, {"color": "black"})[row])
        side = 1 if value < 0 else -1  # the note stands on the free side
        ends = {"ha": "left" if value < 0 else "right", "va": "center"}
        ax.text(0.03 * side * reach, row, note, **ends, fontsize=FONT - 1, bbox=BEHIND)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_xlim(-1.5 * reach, 1.5 * reach)
    ax.set_yticklabels([f"chosen {score}", f"rejected {score}", "chosen KL", "rejected KL", "margin"])


def _token_panel(ax: Axes, objective: str, found: PairCoefficients) -> None:
    colour = style_of(objective).colour
    logps = torch.cat([found.chosen.logps[0], found.rejected.logps[0]]).tolist()
    reach = max(map(abs, logps))
    if found.chosen.kl is None:
        handles = [ax.bar(_PLACES, logps, 0.7, color=colour, label="on log π")]
    else:
        kl = torch.cat([found.chosen.kl[0], found.rejected.kl[0]]).tolist()
        reach = max(reach, *map(abs, kl))
        right = [x + 0.2 for x in _PLACES]
        handles = [
            ax.bar([x - 0.2 for x in _PLACES], logps, 0.38, color=colour, label="on log π"),
            ax.bar(right, kl, 0.38, color="white", edgecolor=colour, hatch="////", label="on KL"),
        ]
        if _held(found):
            crosses = {"marker": "x", "markersize": 7, "markeredgewidth": 1.5, "color": "black", "linestyle": "none"}
            stopped = right[: len(CHOSEN)]
            handles += ax.plot(stopped, [0.0] * len(stopped), label="on KL: 0, stop-gradient", **crosses)
    ax.axhline(0, color="black", linewidth=0.8)
    reach = reach or 1.0  # a margin so wide that nothing pushes any more
    ax.set_ylim(-1.5 * reach, 1.5 * reach)
    corner = {"transform": ax.transAxes, "fontsize": FONT - 1, "color": GREY}
    ax.text(0.005, 0.97, "above 0: training lowers it", va="top", ha="left", **corner)
    ax.text(0.995, 0.03, "below 0: training raises it", va="bottom", ha="right", **corner)
    where = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.99), "ncols": 3, "frameon": False, "borderaxespad": 0.1}
    ax.legend(handles=handles, fontsize=FONT - 1, **where)


def _weight_panel(ax: Axes, objective: str, hyper: Mapping, found: PairCoefficients) -> None:
    ax.axhline(1, color=GREY, linewidth=1, linestyle="--")
    if found.chosen.weights is None:
        title, top = f"{style_of(objective).label} has no token weights, as if f = 1 everywhere (f is TGDPO's)", 0.0
    else:
        weights = torch.cat([found.chosen.weights[0], found.rejected.weights[0]]).tolist()
        floor, top = hyper["floor"], max(weights)
        low = [x for x, f in zip(_PLACES, weights, strict=True) if f <= floor]
        ax.bar(_PLACES, weights, 0.7, color=style_of(objective).colour, label="f")
        ax.axhline(floor, color="black", linewidth=1.5, linestyle=":")
        look = {"linestyle": "none", "marker": "v", "color": "black", "markersize": 9, "clip_on": False}
        ax.plot(low, [floor] * len(low), label="on the floor", **look)
        title = f"TGDPO's weight f: {len(low)} of {len(weights)} tokens on the floor {floor} (▼)"
    ax.set_ylim(0, max(2.1, 1.15 * top))
    ax.set_title(title, fontsize=FONT, y=1.0, loc="left")


loss_lab = LossLab  # as the chapters call it
