"""What the loss lab draws of one objective: its loss, its margin, what can be reached, and what it does to every token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tpo_course.coefficients import PairCoefficients, coefficients, least_kl, loss_at, margin_terms, spread
from tpo_course.widgets.parts import BEHIND, LAB_DPI, frame
from tpo_lib.losses import F_FLOOR, OBJECTIVES
from tpo_lib.runs.plots import FONT, style_of

# The pair: its words, and the share of the guide's strongest reward that each of them gets.
CHOSEN = {"warm": 0.8, "and": 0.0, "funny": 1.0, "but": -0.1, "too": -0.4, "long": -0.8}
REJECTED = {"a": 0.0, "dull": -1.0, "plot": -0.4, "with": 0.1, "good": 0.9, "songs": 0.5}
REF_LOGP = -3.0  # log pi_ref of every token, nats: a probability of 5%
GUIDE_BETA = 0.1
LIMIT = 40.0  # nats: how far the sliders of the pair go
GREY = "#555555"
PINNED = "#777777"
# Where the tokens stand: a gap between the two responses.
PLACES = [*range(len(CHOSEN)), *(len(CHOSEN) + 0.8 + i for i in range(len(REJECTED)))]


@dataclass(frozen=True)
class State:
    """One objective on the pair, as the controls have it."""

    objective: str
    value: Mapping  # of the controls, by name
    hyper: Mapping
    found: PairCoefficients
    terms: Mapping[str, float]

    @property
    def label(self) -> str:
        return style_of(self.objective).label

    @property
    def loss(self) -> float:
        return self.found.output.loss.item()

    @property
    def margin(self) -> float:
        return self.found.margin.item()

    @cached_property
    def slope(self) -> float:
        """d loss / d margin: its size weighs the whole gradient of the pair."""
        return loss_at(self.objective, self.found.margin, **self.hyper)[1].item()

    @property
    def held(self) -> bool:
        """Whether the rejected KL carries gradient and the chosen one does not."""
        return (
            self.found.chosen.kl is not None and bool(self.found.rejected.kl.any()) and not self.found.chosen.kl.any()
        )

    def tokens(self, field: str) -> list[float] | None:
        """A field of `TokenCoefficients` over the chosen tokens, then the rejected ones; None where there is none."""
        sides = [getattr(side, field) for side in (self.found.chosen, self.found.rejected)]
        return None if sides[0] is None else torch.cat([side[0] for side in sides]).tolist()


def state(objective: str, value: Mapping) -> State:
    """The numbers of one objective at the controls' values."""
    hyper = OBJECTIVES[objective].settings({**value, "guide_beta": GUIDE_BETA, "floor": F_FLOOR})
    pair = [_response(words, side, value) for words, side in ((CHOSEN, "chosen"), (REJECTED, "rejected"))]
    terms = {name: t.item() for name, t in margin_terms(objective, *pair, **hyper).items()}
    return State(objective, dict(value), hyper, coefficients(objective, *pair, **hyper), terms)


def _response(words: Mapping[str, float], side: str, value: Mapping):
    r_hat = value["guide"] * torch.tensor(list(words.values()), dtype=torch.float64)  # (T,)
    totals = value[f"{side}_logratio"], value[f"{side}_kl"]
    return spread(*totals, r_hat, guide_beta=GUIDE_BETA, ref_logp=REF_LOGP)


def out_of_reach(value: Mapping, *, kl: bool) -> dict[str, str]:
    """{side: why no policy has these numbers}, for the sides where it is so; with `kl` the SeqKL counts too."""
    found = {}
    for side, words in (("chosen", CHOSEN), ("rejected", REJECTED)):
        x, given = value[f"{side}_logratio"], value[f"{side}_kl"]
        least, most = least_kl(x, len(words), ref_logp=REF_LOGP).item(), -REF_LOGP * len(words)
        if x >= most:
            found[side] = f"log-ratio {x:+.1f} ({side}): at {most:.0f} nats every token has probability 1"
        elif kl and given < least:
            found[side] = f"SeqKL {given:.1f} ({side}): at log-ratio {x:+.1f} it is at least {least:.2f} nats"
    return found


# The picture.


def canvas() -> Figure:
    """The empty panels: loss, terms, reach, coefficients, weights. Built once; a move redraws what is in them."""
    figure = Figure(figsize=(9.4, 7.2), dpi=LAB_DPI, facecolor="white")  # inches: 789 x 604 pixels
    top, height = 0.672, 0.285
    boxes = [(0.078, top, 0.2, height), (0.437, top, 0.25, height), (0.775, top, 0.21, height)]
    boxes += [(0.078, 0.33, 0.907, 0.235), (0.078, 0.055, 0.907, 0.175)]
    axes = [figure.add_axes(box) for box in boxes]
    for ax in axes:
        frame(ax)
        # Fixed places: searching for free ones takes a fifth of a redraw.
        ax.yaxis.set_label_coords(-0.2 if ax in axes[:3] else -0.062, 0.5)
        ax.xaxis.set_label_coords(0.5, -0.13)
    loss, terms, reach, tokens, weights = axes
    loss.set_xlabel("margin, nats", fontsize=FONT - 1)
    loss.set_ylabel("loss, nats", fontsize=FONT - 1)
    # IPO's is a square
    loss.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1000 else f"{value / 1000:g}k")
    loss.xaxis.set_major_locator(MaxNLocator(5))
    terms.set_xlabel("nats", fontsize=FONT - 1)
    terms.set_title("what the margin is made of", fontsize=FONT, y=1.0)
    terms.set(ylim=(4.6, -0.6), yticks=range(5))
    terms.xaxis.set_major_locator(MaxNLocator(4))
    map_of_reach(reach)
    tokens.set_title("coefficient of every token", fontsize=FONT, y=1.0, loc="left")
    tokens.set_ylabel("d loss / d ·", fontsize=FONT - 1)
    tokens.yaxis.set_major_locator(MaxNLocator(5))
    tokens.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    tokens.set_xticks(PLACES, [*CHOSEN, *REJECTED])
    weights.set_ylabel("weight f", fontsize=FONT - 1)
    middles = [PLACES[len(CHOSEN) // 2] - 0.5, PLACES[len(CHOSEN) + len(REJECTED) // 2] - 0.5]
    weights.set_xticks(middles, ["chosen response", "rejected response"])
    weights.tick_params(axis="x", length=0)
    for ax in (tokens, weights):
        ax.set_xlim(-0.7, PLACES[-1] + 0.7)
        ax.grid(visible=False, axis="x")
    return figure


def map_of_reach(ax: Axes) -> None:
    """What a response's log-ratio and SeqKL can be together; what no policy has is hatched. Roots: the bound shows."""
    most, tokens = -REF_LOGP * len(CHOSEN), len(CHOSEN)
    x = torch.linspace(-LIMIT, most, 101, dtype=torch.float64)
    least = least_kl(x, tokens, ref_logp=REF_LOGP).clamp(max=LIMIT)
    ax.set_yscale("function", functions=(lambda y: y.clip(0) ** 0.5, lambda y: y**2))
    shade = {"facecolor": "#E8E8E8", "edgecolor": "#777777", "hatch": "xx", "linewidth": 1.2}
    ax.fill_between([*x.tolist(), LIMIT], [*least.tolist(), LIMIT], **shade)
    ax.set(xlim=(-LIMIT, LIMIT), ylim=(0, LIMIT), xticks=(-40, 0, 40), yticks=(0, 1, 5, 20, 40))
    ax.set_xlabel("log-ratio of a response, nats", fontsize=FONT - 1)
    ax.set_ylabel("its SeqKL, nats", fontsize=FONT - 1)
    ax.set_title("hatched: no policy", fontsize=FONT, y=1.0)


def place(ax: Axes, value: Mapping, *, kl: bool, colour: str = "black") -> None:
    """The two responses on the map: w filled, l hollow, a cross over what cannot be; a line where any SeqKL will do."""
    wrong = out_of_reach(value, kl=kl)
    for side, face, line in (("chosen", colour, "-"), ("rejected", "white", "--")):
        x, y = value[f"{side}_logratio"], value[f"{side}_kl"]
        if not kl:
            ax.axvline(x, color=colour, linewidth=1.2, linestyle=line)
            y = LIMIT / 2 if side == "chosen" else LIMIT / 4
        ax.plot(x, y, "o", ms=9, mfc=face, mec=colour, clip_on=False, zorder=4)
        if side in wrong:
            ax.plot(x, y, "x", ms=14, mew=2.5, color=colour, clip_on=False, zorder=5)


def paint(axes: list[Axes], now: State, pinned: State | None) -> None:
    for ax in axes:
        for artist in [*ax.lines, *ax.patches, *ax.texts]:
            artist.remove()
        ax.containers.clear()
    _loss_panel(axes[0], now, pinned)
    _terms_panel(axes[1], now, pinned)
    for shown, colour in ((pinned, PINNED), (now, "black")):
        if shown is not None:
            place(axes[2], shown.value, kl="kl" in OBJECTIVES[shown.objective].needs, colour=colour)
    _token_panel(axes[3], now, pinned)
    _weight_panel(axes[4], now)
    for ax in axes[3:]:
        ax.axvline(len(CHOSEN) - 0.1, color="black", linewidth=0.8, linestyle=":")


def _loss_panel(ax: Axes, now: State, pinned: State | None) -> None:
    style, margin, loss, slope = style_of(now.objective), now.margin, now.loss, now.slope
    reach = max(4.0, 1.25 * abs(margin))
    margins = torch.linspace(-reach, reach, 121, dtype=torch.float64)
    curve, _ = loss_at(now.objective, margins, **now.hyper)
    step = 0.35 * reach
    ax.plot(margins.tolist(), curve.tolist(), color="black", linewidth=1.5, label="loss")
    ends = [margin - step, margin + step], [loss - slope * step, loss + slope * step]
    ax.plot(*ends, color=style.colour, linewidth=1.5, linestyle="--", label="slope")
    if pinned is not None:
        look = {"ms": 11, "mfc": "white", "mec": PINNED, "mew": 2, "ls": "none"}
        ax.plot([pinned.margin], [pinned.loss], style_of(pinned.objective).marker, label="pinned", **look)
    ax.plot([margin], [loss], marker=style.marker, markersize=11, color=style.colour, label="this pair")
    top = curve.max().item()
    ax.set(xlim=(-reach, reach), ylim=(-0.08 * top, 1.04 * top))
    ax.set_title(f"{style.label}: loss {loss:.3g} nats, slope {slope:.3g}", fontsize=FONT, y=1.0)


def _terms_panel(ax: Axes, now: State, pinned: State | None) -> None:
    """Bars for what the margin is made of; the margin itself at the bottom."""
    style, score = (
        style_of(now.objective),
        "log-ratio" if "ref_logps" in OBJECTIVES[now.objective].needs else "mean log π",
    )
    bars = [*now.terms.values(), now.margin]
    notes = [signed(value, 3) for value in bars]
    if now.found.chosen.kl is None:
        notes[2:4] = ["not read", "not read"]
    elif now.held:
        notes[2] += " (held)"  # short: it stands inside the panel
    filled, hatched = {"color": style.colour}, {"color": "white", "edgecolor": style.colour, "hatch": "////"}
    before = [] if pinned is None else [*pinned.terms.values(), pinned.margin]
    reach = max(1.0, *map(abs, bars), *map(abs, before))
    for row, (value, note) in enumerate(zip(bars, notes, strict=True)):
        ax.barh(row, value, 0.62, **(filled, filled, hatched, hatched, {"color": "black"})[row])
        side = 1 if value < 0 else -1  # the note stands on the free side
        ends = {"ha": "left" if value < 0 else "right", "va": "center"}
        ax.text(0.03 * side * reach, row, note, **ends, fontsize=FONT - 1, bbox=BEHIND)
    if before:
        ax.plot(before, range(5), "|", color=PINNED, ms=18, mew=3, label="pinned")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_xlim(-1.5 * reach, 1.5 * reach)
    ax.set_yticklabels([f"chosen {score}", f"rejected {score}", "chosen KL", "rejected KL", "margin"])


def _token_panel(ax: Axes, now: State, pinned: State | None) -> None:
    colour, logps, kl = style_of(now.objective).colour, now.tokens("logps"), now.tokens("kl")
    reach = max(map(abs, logps))
    if kl is None:
        handles = [ax.bar(PLACES, logps, 0.7, color=colour, label="on log π")]
    else:
        reach = max(reach, *map(abs, kl))
        right = [x + 0.2 for x in PLACES]
        handles = [
            ax.bar([x - 0.2 for x in PLACES], logps, 0.38, color=colour, label="on log π"),
            ax.bar(right, kl, 0.38, color="white", edgecolor=colour, hatch="////", label="on KL"),
        ]
        if now.held:
            crosses = {"marker": "x", "markersize": 7, "markeredgewidth": 1.5, "color": "black", "linestyle": "none"}
            stopped = right[: len(CHOSEN)]
            handles += ax.plot(stopped, [0.0] * len(stopped), label="on KL: 0, stop-gradient", **crosses)
    if pinned is not None:
        before = pinned.tokens("logps")
        reach = max(reach, *map(abs, before))
        handles += ax.plot(PLACES, before, "_", color=PINNED, ms=26, mew=3, label="pinned")
    ax.axhline(0, color="black", linewidth=0.8)
    reach = reach or 1.0  # a margin so wide that nothing pushes any more
    ax.set_ylim(-1.5 * reach, 1.5 * reach)
    corner = {"transform": ax.transAxes, "fontsize": FONT - 1, "color": GREY}
    ax.text(0.005, 0.97, "above 0: training lowers it", va="top", ha="left", **corner)
    ax.text(0.995, 0.03, "below 0: training raises it", va="bottom", ha="right", **corner)
    where = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.99), "ncols": 4, "frameon": False, "borderaxespad": 0.1}
    ax.legend(handles=handles, fontsize=FONT - 1, **where)


def _weight_panel(ax: Axes, now: State) -> None:
    """Bars of f: filled where it is 1 or more, hollow where it is less, which is what DPO has everywhere."""
    ax.axhline(1, color=GREY, linewidth=1, linestyle="--")
    weights = now.tokens("weights")
    if weights is None:
        title, top = f"{now.label} has no token weights, as if f = 1 everywhere (f is TGDPO's)", 0.0
    else:
        floor, top = now.hyper["floor"], max(weights)
        low = [x for x, f in zip(PLACES, weights, strict=True) if f <= floor]
        colour = style_of(now.objective).colour
        drawn = ax.bar(PLACES, weights, 0.7, color=colour, edgecolor=colour, label="f")
        for bar, f in zip(drawn, weights, strict=True):
            bar.set(facecolor=colour if f >= 1 else "white", hatch="" if f >= 1 else "////")
        ax.axhline(floor, color="black", linewidth=1.5, linestyle=":")
        look = {"linestyle": "none", "marker": "v", "color": "black", "markersize": 9, "clip_on": False}
        ax.plot(low, [floor] * len(low), label="on the floor", **look)
        title = f"TGDPO's weight f: {len(low)} of {len(weights)} tokens on the floor {floor} (▼)"
    ax.set_ylim(0, max(2.1, 1.15 * top))
    ax.set_title(title, fontsize=FONT, y=1.0, loc="left")


def signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # + 0.0: no "-0.000"
