"""The figures of `make gpu`: bars of step times, and the frontier of every replication."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tpo_lib.runs.plots import AXIS, FONT, mean, panels, style_of

LEGEND = {"loc": "outside lower center", "ncols": 7, "frameon": False, "fontsize": FONT}
BARS = {  # contestant -> label, colour, hatch: they stay apart in greyscale
    "textbook": ("textbook", "#999999", ""),
    "trl": ("TRL", "#56B4E9", "//"),
    "liger": ("Liger", "#E69F00", ".."),
    "fused": ("ours", "#0072B2", ""),
    "cached": ("ours, cached", "#003F66", "xx"),
    "bodies": ("bodies alone", "#FFFFFF", ""),
}


def steps(bench: Sequence[Mapping], ceilings: Mapping) -> Figure:
    """Milliseconds of a step, a panel a shape, groups of bars an objective; a black line at the computed floor."""
    sections = [row for row in bench if row["kind"] == "steps"]
    names = list(dict.fromkeys(row["name"] for row in sections))
    fig, axes = panels(len(names), width=4.6 * len(names), height=4.6)
    for ax, name in zip(axes, names, strict=True):
        own = [row for row in sections if row["name"] == name]
        for place, row in enumerate(own):
            _group(ax, place, row, ceilings)
        ax.set_xticks(range(len(own)), [style_of(row["objective"]).label for row in own])
        ax.set_title(f"{name} ({own[0]['pairs']} pairs, T = {own[0]['shape']['length']})", fontsize=FONT)
        ax.grid(visible=False, axis="x")
    axes[0].set_ylabel("a training step, milliseconds (median)", fontsize=FONT)
    square = {"marker": "s", "linestyle": "none", "markersize": 11, "markeredgecolor": "black"}
    handles = [Line2D([], [], color=colour, label=label, **square) for label, colour, _ in BARS.values()]
    handles.append(Line2D([], [], color="black", linewidth=2, label="computed floor"))
    fig.legend(handles=handles, **LEGEND)
    return fig


def _group(ax, place: int, row: Mapping, ceilings: Mapping) -> None:
    there = [label for label in BARS if label in row["median_s"]]
    width = 0.8 / len(there)
    for number, label in enumerate(there):
        _, colour, hatch = BARS[label]
        values = [1e3 * s for s in row["seconds"][label]]
        height, x = 1e3 * row["median_s"][label], place - 0.4 + (number + 0.5) * width
        ax.bar(x, height, width, color=colour, hatch=hatch, edgecolor="black", linewidth=0.7)
        ax.plot([x, x], [min(values), max(values)], color="black", linewidth=1)
    floor = 1e3 * row["flops"]["uncached"] / ceilings["product_flops"]
    ax.hlines(floor, place - 0.42, place + 0.42, color="black", linewidth=2)


def frontier(rows: Sequence[Mapping]) -> Figure:
    """Reward, judge and entropy against KL: one curve a run; the second replication's are thin and hollow."""
    fig, axes = panels(3, width=15.0, height=4.8)
    seeds = sorted({row["seed"] for row in rows})
    for ax, metric in zip(axes, ("reward", "judge", "entropy"), strict=True):
        for seed in seeds:
            start = next(row for row in rows if row["seed"] == seed and row["kind"] == "start")
            for row in rows:
                if row["seed"] == seed and row["kind"] == "run":
                    _curve(ax, [start, *row["points"]], row["objective"], metric, thin=seed != seeds[0])
            ax.plot(mean(start, "kl"), mean(start, metric), "*", color="black", markersize=12, zorder=5)
        ax.set_xlabel(AXIS["kl"], fontsize=FONT)
        ax.set_ylabel(AXIS[metric], fontsize=FONT)
    names = dict.fromkeys(row["objective"] for row in rows if row["kind"] == "run")
    handles = [
        Line2D([], [], color=s.colour, marker=s.marker, linestyle=s.linestyle, label=s.label, linewidth=2, markersize=7)
        for s in map(style_of, names)
    ]
    if len(seeds) > 1:
        kind = {"color": "#555555", "marker": "o", "markerfacecolor": "white", "linewidth": 1}
        handles.append(Line2D([], [], label=f"replication {seeds[1]}: thin, hollow", **kind))
    handles.append(Line2D([], [], color="black", marker="*", linestyle="none", markersize=12, label="start"))
    fig.legend(handles=handles, handlelength=3.5, **LEGEND)
    return fig


def _curve(ax, points: Sequence[Mapping], objective: str, metric: str, *, thin: bool) -> None:
    style, after = style_of(objective), points[1:]
    bars = [
        [max(0.0, sign * (p[metric][end] - mean(p, metric))) for p in after] for end, sign in (("low", -1), ("high", 1))
    ]
    kind = {"fmt": "none", "ecolor": style.colour, "elinewidth": 1, "alpha": 0.35}
    ax.errorbar([mean(p, "kl") for p in after], [mean(p, metric) for p in after], yerr=bars, **kind)
    look = {"linewidth": 1, "markersize": 6, "markerfacecolor": "white", "markeredgecolor": style.colour}
    if not thin:
        look = {"linewidth": 2, "markersize": 8, "markerfacecolor": style.colour, "markeredgecolor": "white"}
    look |= {"color": style.colour, "linestyle": style.linestyle, "marker": style.marker, "markevery": slice(1, None)}
    ax.plot([mean(p, "kl") for p in points], [mean(p, metric) for p in points], **look)
