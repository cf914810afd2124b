"""Data in, matplotlib Figure out, made without pyplot so that nothing is left open: the pictures of the comparison.
`curves` is {label: [point, ...]} with point = {"step": int, "pairs_seen": int, metric: {"mean", "low", "high", "n"}, ...}; the
first point of every label is the start model at step 0. A label is an objective, or one with a setting: "tdpo2 β.05 α.5". Of
several seeds (`seeds.merged`) a metric has "seeds", the mean of each, and bands reach from the lowest to the highest.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from tpo_lib.losses import OBJECTIVES
from tpo_lib.rewards import in_unit_interval

if TYPE_CHECKING:  # pairing brings datasets; whoever draws a slider's picture needs it not
    from tpo_lib.pairing import PairReport

FONT = 11  # points; the smallest text is 10
GRID = {"color": "#DDDDDD", "linewidth": 0.8}


class Style(NamedTuple):
    """How one objective looks, in every picture of the course."""

    label: str
    colour: str
    marker: str
    linestyle: str | tuple


OTHERS = {  # what is drawn beside the objectives
    "start": Style("start", "#000000", "*", (0, (1, 1))),
    "ref": Style("reference", "#000000", "*", (0, (1, 1))),  # the same model
    "ppo": Style("PPO", "#56B4E9", "X", (0, (8, 2))),
    "rloo": Style("RLOO", "#661100", "H", (0, (6, 1, 1, 1, 1, 1))),
    "best of n": Style("best of n", "#777777", ".", (0, (2, 3))),
}
# For objectives whose record has no look: Tol's dark colours, and markers that nobody else has.
OWN_COLOURS = ("#332288", "#882255", "#117733", "#999933", "#663333", "#AA3377", "#225555")
OWN_MARKERS = ("p", "h", "<", "8", "d")
SETTING_MARKERS = ("o", "s", "^", "D", "v", "P", ">", "X", "<", "p", "h", "d", "8", "*")  # in the order of the settings
MANY = 7  # curves that can be named beside their ends, and whose every update can be shown

AXIS = {  # metric -> axis label with its unit
    "reward": "mean reward (0 to 1)",
    "judge": "mean score of the judge (0 to 1)",
    "second_judge": "mean score of the second judge (0 to 1)",
    "kl": "sequence KL(policy ‖ reference), nats",
    "entropy": "entropy, nats per token",
    "rare": "tokens with a reference probability below 1e-4 (share)",
    "ref_perplexity": "perplexity of the samples under the reference",
    "distinct_2": "distinct-2 (share of bigrams)",
    "distinct_2_within": "distinct-2 within a prompt (share of bigrams)",
    "repetition": "repeated bigrams within a sample (share)",
    "length": "length, tokens",
    "seqkl_chosen": "SeqKL(reference ‖ policy), nats",
    "seqkl_rejected": "SeqKL(reference ‖ policy), nats",
    "seqkl_margin": "rejected minus chosen, nats",
    "accuracy_logratio": "pairs whose chosen log-ratio is larger (share)",
    "accuracy_mean": "pairs whose chosen log-ratio per token is larger (share)",
}
LOGGED = {  # names of metrics.jsonl -> axis label
    "loss": "loss, nats",
    "rewards/margins": "own reward margin, nats",
    "rewards/accuracies": "own accuracy (share)",
    "kl/chosen": "SeqKL(reference ‖ policy), nats",
    "kl/rejected": "SeqKL(reference ‖ policy), nats",
    "lr": "learning rate",
    "grad_norm": "gradient norm before clipping",
}


def style_of(name: str, among: Iterable[str] = ()) -> Style:
    """As its record says; without a look by its place among those that have none, any other name by its letters.

    A setting of an objective ("tdpo2 β.05 α.5", "dpo, 50 pairs") looks like the objective; beside `among`, the labels of a
    picture, it has a shade of its colour, darker the later it stands, and the marker of the setting, which is of none without
    a setting.
    """
    if name in OTHERS:
        return OTHERS[name]
    objective, setting = parted(name)
    if setting and objective in OBJECTIVES:
        return _setting(style_of(objective), name, setting, list(among))
    entry = OBJECTIVES.get(name)
    label = (entry and entry.label) or name
    if entry and entry.look:
        return Style(label, *entry.look)
    own = [other for other, entry in OBJECTIVES.items() if not entry.look]
    number = own.index(name) if name in own else crc32(name.encode())
    colour, marker = OWN_COLOURS[number % len(OWN_COLOURS)], OWN_MARKERS[number % len(OWN_MARKERS)]
    return Style(label, colour, marker, (0, (2 + number % 5, 2, 1, 2)))


def parted(name: str) -> tuple[str, str]:
    """What stands before the first blank or comma of a label, and the rest from there: the objective and its setting.

    Example:
        >>> parted("tdpo2 α0.5"), parted("dpo, 50 pairs"), parted("dpo")
        (('tdpo2', ' α0.5'), ('dpo', ', 50 pairs'), ('dpo', ''))
    """
    objective = re.split("[ ,]", name, maxsplit=1)[0]
    return objective, name.removeprefix(objective)


def _setting(whole: Style, name: str, setting: str, among: Sequence[str]) -> Style:
    """An objective's look in the shade of one of its settings."""
    style = whole._replace(label=f"{whole.label}{setting}")
    parts = [parted(other) for other in among]
    own = [rest for objective, rest in parts if rest and objective == parted(name)[0]]
    if setting not in own:
        return style
    every = list(dict.fromkeys(rest for _, rest in parts if rest))
    colour, place = np.array(to_rgb(whole.colour)), own.index(setting) / max(1, len(own) - 1)  # 0 to 1
    light = float(colour @ (0.2126, 0.7152, 0.0722))
    white = max(0.0, min(0.4, (0.72 - light) / (1 - light)))  # a lighter one would be lost on white
    palest, darkest = colour + white * (1 - colour), 0.5 * colour
    if len(own) > 1:
        colour = palest + place * (darkest - palest)
    plain = {style_of(other).marker for other, rest in parts if not rest}
    free = [marker for marker in SETTING_MARKERS if marker not in plain] or SETTING_MARKERS
    return style._replace(colour=to_hex(colour), marker=free[every.index(setting) % len(free)])


def label(metric: str, points: Iterable[Mapping], words: str | None = None) -> str:
    """A metric's axis label (or `words`); a reward of another scale loses its "(0 to 1)".

    Example:
        >>> label("reward", [{"reward": {"mean": 3.0, "low": 2.0, "high": 4.0}}])
        'mean reward'
    """
    inside = in_unit_interval(p[metric][end] for p in points if metric in p for end in ("low", "high"))
    words = words or AXIS[metric]
    return words if inside else words.removesuffix(" (0 to 1)")


def score_gaps(report: PairReport) -> Figure:
    """The histogram of how far the scores of chosen and rejected are apart."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    edges = report.gap_edges
    axes.bar(edges[:-1], report.gap_counts, width=np.diff(edges), align="edge", edgecolor="white")
    words = f"score gap, chosen - rejected (reward units{', 0 to 1' if report.bounded else ''})"
    title = f"{report.kept:,} pairs kept, {sum(report.dropped.values()):,} dropped"
    axes.set(xlim=(edges[0], edges[-1]), xlabel=words, ylabel="pairs (count)", title=title)
    return figure


def frontier(curves: Mapping[str, Sequence[Mapping]], y: str = "reward") -> Figure:
    """What a nat buys: reward (or another metric `y`) against KL(policy ‖ reference), one curve a label, as `at_level` reads it.

    The axis of the KL is its root, in which these curves are straight between points, and which shows the first nats, where most
    is decided.

    Bars are 95% intervals, bands reach from the lowest to the highest seed. Up and to the left is better: more reward at less
    distance from the reference.
    """
    fig, (ax,) = panels(1, width=8.0, height=5.2)
    _trajectories(ax, curves, "kl", y)
    root_axis(ax, max(mean(p, "kl") for p in itertools.chain(*curves.values())))
    ax.set_ylabel(label(y, itertools.chain(*curves.values())))
    _star(ax, next(iter(curves.values()))[0], "kl", y, named=True)
    ends = {name: (mean(points[-1], "kl"), mean(points[-1], y)) for name, points in curves.items()}
    if len(ends) <= MANY and min(x for x, _ in ends.values()) > 0.4 * max(x for x, _ in ends.values()):
        _label_ends(ax, ends)
    else:  # a line from a curve that ends far left would cross the others
        legend(fig, curves)
    return fig


def root_axis(ax: Axes, most: float, *, across: float = 60.0) -> None:
    """Make the x axis one of the KL, up to `most` nats, and of its root, with ticks down to 1 / across of the largest."""
    # a KL of 0 may be a rounding below it
    ax.set_xscale("function", functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: x * np.abs(x)))
    shown = [tick for tick in (0, *ROOT_TICKS) if tick <= 1.05 * most]
    ax.set_xticks([tick for tick in shown if tick == 0 or tick >= shown[-1] / across], minor=False)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel(f"{AXIS['kl']} (root scale)")


def run_points(
    runs: Mapping[str, tuple[str, Mapping]],
    start: Mapping,
    y: str = "reward",
    *,
    behind: Sequence[Mapping] = (),
    coloured: str | None = None,
) -> Figure:
    """Runs {name: (objective, point)} and the start's point on the plane of the frontier, with both 95% intervals.

    Args:
        behind: runs of a sweep to show faintly behind them, on an axis of the KL's root: they reach far.
        coloured: the objective whose runs among these have their colour; the others are grey.
    """
    fig, (ax,) = panels(1, width=7.0, height=4.2)
    _faint(ax, behind, y, coloured)
    for name, (objective, point) in runs.items():
        _with_bars(ax, objective, point, y, markersize=9, markeredgecolor="white")
        at = mean(point, "kl"), mean(point, y)
        ax.annotate(name, at, xytext=(8, 6), textcoords="offset points", fontsize=FONT - 1)
    _star(ax, start, "kl", y, named=True)
    points = [start, *(point for _, point in runs.values()), *(run["metrics"] for run in behind)]
    ax.set(xlabel=AXIS["kl"], ylabel=label(y, points))
    ax.margins(0.12)
    if behind:
        root_axis(ax, max(mean(point, "kl") for point in points))
        whose = f", {style_of(coloured).label}'s in colour" if coloured else ""
        ax.set_title(f"faint: {len(behind)} stored runs{whose}", fontsize=FONT - 1)
    return fig


def highlight(others: Sequence[Mapping], chosen: Mapping, start: Mapping, y: str = "reward") -> Figure:
    """One run of a sweep on the plane of the frontier, large and with its intervals, the others faint."""
    fig, (ax,) = panels(1, width=7.0, height=4.2)
    _faint(ax, others, y)
    _with_bars(ax, chosen["objective"], chosen["metrics"], y, markersize=12, markeredgecolor="black", zorder=6)
    _star(ax, start, "kl", y)
    ax.set(xlabel=AXIS["kl"], ylabel=label(y, [start, *(run["metrics"] for run in (chosen, *others))]))
    drawn = {run["objective"] for run in (chosen, *others)}
    order = [name for name in OBJECTIVES if name in drawn] + sorted(drawn - set(OBJECTIVES))  # whichever run is chosen
    legend(fig, dict.fromkeys(order, ()), start=True)
    return fig


def _faint(ax: Axes, runs: Iterable[Mapping], y: str, coloured: str | None = None) -> None:
    """Runs of a sweep without their intervals; with `coloured` all other objectives are grey."""
    for run in runs:
        style, mine = style_of(run["objective"]), run["objective"] == coloured
        kind = {"marker": style.marker, "markersize": 6, "linestyle": "none", "alpha": 0.7 if mine else 0.35}
        kind["color"] = style.colour if mine or coloured is None else "#999999"
        ax.plot(mean(run["metrics"], "kl"), mean(run["metrics"], y), **kind)


def _with_bars(ax: Axes, objective: str, point: Mapping, y: str, **look) -> None:
    """A run's point over its KL, with the intervals of both."""
    style = style_of(objective)
    bars = [[[v["mean"] - v["low"]], [v["high"] - v["mean"]]] for v in (point["kl"], point[y])]
    at = mean(point, "kl"), mean(point, y)
    ax.errorbar(*at, xerr=bars[0], yerr=bars[1], fmt=style.marker, color=style.colour, **look)


def seqkl(curves: Mapping[str, Sequence[Mapping]]) -> Figure:
    """Where the forward KL goes in training: SeqKL(reference ‖ policy) of chosen and rejected responses, and the margin."""
    fig, axes = panels(3, width=12.5, height=4.4)
    titles = {"seqkl_chosen": "chosen responses", "seqkl_rejected": "rejected responses", "seqkl_margin": "margin"}
    for ax, (metric, title) in zip(axes, titles.items(), strict=True):
        over_training(ax, curves, metric)
        ax.set(title=title, ylabel=AXIS[metric])
    lows, highs = zip(axes[0].get_ylim(), axes[1].get_ylim(), strict=True)
    for ax in axes[:2]:
        ax.set_ylim(min(lows), max(highs))  # one scale for the two sides of a pair
    axes[2].axhline(0, color="#555555", linewidth=0.8)
    legend(fig, curves)
    return fig


def diversity(curves: Mapping[str, Sequence[Mapping]]) -> Figure:
    """What the reward costs in variety: entropy, distinct-2 and length against reward, so that one reads at equal reward."""
    fig, axes = panels(3, width=12.5, height=4.4)
    for ax, metric in zip(axes, ("entropy", "distinct_2", "length"), strict=True):
        _trajectories(ax, curves, "reward", metric)
        ax.set(xlabel=label("reward", itertools.chain(*curves.values())), ylabel=AXIS[metric])
    legend(fig, curves, start=True)
    return fig


def training(rows: Mapping[str, Sequence]) -> Figure:
    """Loss, reward margin and accuracy over the updates of one or several runs: {label: rows of metrics.jsonl}.

    The thin line is every logged row, the thick one its moving mean over an eighth of the run. Of {label: [rows of every seed]}
    it is the mean of the moving means, in a band from the lowest to the highest.
    """
    fig, axes = panels(3, width=12.5, height=4.4)
    for ax, name in zip(axes, ("loss", "rewards/margins", "rewards/accuracies"), strict=True):
        for label, runs in rows.items():
            style, seeds = style_of(label, rows), [runs] if not runs or isinstance(runs[0], Mapping) else runs
            _over_updates(ax, seeds, name, style, raw=len(rows) <= MANY and len(seeds) == 1)
        ax.set(xlabel="update", ylabel=LOGGED[name])
    legend(fig, rows)
    return fig


def _over_updates(ax: Axes, runs: Sequence[Sequence[Mapping]], name: str, style: Style, *, raw: bool) -> None:
    """One logged metric of the seeds of one setting, at the steps that all of them have."""
    found = [{row["step"]: row[name] for row in run if row.get(name) is not None} for run in runs]
    steps = np.array([step for step in found[0] if all(step in seed for seed in found)], dtype=float)
    if not len(steps):
        return
    eighth = max(1, len(steps) // 8) if name != "lr" else 1  # which has no noise
    values = np.array([[seed[step] for step in steps] for seed in found], dtype=float)  # (S, n)
    smooth = np.array([_moving_mean(row, eighth) for row in values])
    if raw:
        ax.plot(steps, values[0], color=style.colour, linewidth=0.8, alpha=0.3)
    elif len(runs) > 1:
        ax.fill_between(steps, smooth.min(0), smooth.max(0), color=style.colour, alpha=0.15, linewidth=0)
    curve(ax, steps, smooth.mean(0), style, every=eighth)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def run(objective: str, rows: Sequence[Mapping]) -> Figure:
    """One run from its rows of metrics.jsonl: what was logged of the names in LOGGED, held-out pairs (eval_*) beside training."""
    known = {name for name in LOGGED if any(row.get(name) is not None for row in rows)} or {"loss"}
    shown = [list(names) for _, names in itertools.groupby(filter(known.__contains__, LOGGED), LOGGED.get)]
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    fig, axes = panels(columns, width=max(6.0, 4.2 * columns), height=0.6 + 3.4 * lines, count=len(shown))
    style = style_of(objective)._replace(
        label="training (thin: as logged, thick: moving mean)", marker="None", linestyle="-"
    )
    held_out = Style("held-out pairs", dark(style.colour), "D", (0, (3, 1)))
    for ax, names in zip(axes, shown, strict=True):
        ax.set(xlabel="update", ylabel=LOGGED[names[0]])
        for name in names:
            _over_updates(ax, [rows], name, style, raw=True)
            points = [(row["step"], row[f"eval_{name}"]) for row in rows if row.get(f"eval_{name}") is not None]
            if points:
                curve(ax, *zip(*points, strict=True), held_out)
            if len(names) > 1 and ax.lines:  # two sides of a pair on one scale
                end = ax.lines[-1].get_xydata()[-1]
                ax.annotate(
                    name.partition("/")[2], end, (-4, 6), textcoords="offset points", fontsize=FONT - 1, ha="right"
                )
    drawn = [style, held_out][: 1 + any(name.startswith("eval_") for row in rows for name in row)]
    handles = [Line2D([], [], linewidth=2, markersize=7, **_line(each)) for each in drawn]
    fig.suptitle(style_of(objective).label, fontsize=FONT)
    fig.legend(handles=handles, ncols=2, loc="outside lower center", frameon=False, fontsize=FONT, handlelength=3.5)
    return fig


def panels(columns: int, *, width: float, height: float, count: int | None = None) -> tuple[Figure, list[Axes]]:
    """An empty figure in the course's style; width and height in inches.

    Args:
        columns: panels side by side.
        count: panels in all, where there are more than one row of them.
    """
    count = columns if count is None else count
    fig = Figure(figsize=(width, height), dpi=110, layout="constrained", facecolor="white")
    fig.get_layout_engine().set(wspace=0.06)
    axes = [fig.add_subplot(math.ceil(count / columns), columns, 1 + i) for i in range(count)]
    for ax in axes:
        ax.grid(**GRID)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=FONT - 1)
        for text in (ax.xaxis.label, ax.yaxis.label, ax.title):
            text.set_fontsize(FONT)
    return fig, axes


def mean(point: Mapping, metric: str) -> float:
    """The mean of one metric of one point of a curve."""
    return point[metric]["mean"]


def at_level(xs: Sequence[float], ys: Sequence[float], level: float, *, root: bool) -> float | None:
    """y where a curve first comes to the level of x, straight between its points in x or in its root; None where it never does.

    The root is for a KL: it grows with the square of what a policy changes, so that a reward is linear in its root near the
    reference (Gao et al. 2022, arXiv 2210.10760, d = sqrt(KL)), and a straight line in nats lies below the curve.

    Example:
        >>> at_level([0.0, 4.0], [0.5, 0.9], 1.0, root=True)  # half of the way in sqrt(KL)
        0.7
    """
    if root:
        xs, level = np.sqrt(np.maximum(xs, 0.0)), np.sqrt(level)  # a KL of 0 may be a rounding below it
    for i, (low, high) in enumerate(itertools.pairwise(xs)):
        if low <= level <= high:
            return float(np.interp(level, [low, high], ys[i : i + 2]))
    return None


ROOT_TICKS = [m * 10.0**k for k in range(-3, 5) for m in (1, 2, 5)]  # of a KL: round levels, dense where it is small
STEPS = 20  # drawn between two points of a curve


def bent(xs: Sequence[float], ys: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """A curve over the KL as `at_level` reads it: every STEPS-th of its points is one of (xs, ys)."""
    along = np.linspace(0, len(xs) - 1, STEPS * (len(xs) - 1) + 1)
    roots, values = (np.interp(along, range(len(xs)), each) for each in (np.sqrt(np.maximum(xs, 0.0)), ys))
    return roots**2, values


def _trajectories(ax: Axes, curves: Mapping[str, Sequence[Mapping]], x: str, y: str) -> None:
    """One curve a label through its points (x, y), with vertical bars (or the band of its seeds), and a star at the start."""
    for name, points in curves.items():
        style = style_of(name, curves)
        xs, ys = [mean(p, x) for p in points], [mean(p, y) for p in points]
        lows, highs = _bounds(points, y)
        if has_seeds(points):
            ax.fill_between(xs, lows, highs, color=style.colour, alpha=0.15, linewidth=0)
        else:
            bars = np.maximum(0.0, [np.subtract(ys, lows), np.subtract(highs, ys)])
            ax.errorbar(xs, ys, yerr=bars, fmt="none", ecolor=style.colour, elinewidth=1.2, alpha=0.35, zorder=2)
        curve(ax, *bent(xs, ys), style, every=STEPS) if x == "kl" else curve(ax, xs, ys, style)
    _star(ax, next(iter(curves.values()))[0], x, y)


def has_seeds(points: Sequence[Mapping]) -> bool:
    """Whether several seeds stand behind a curve."""
    return any("seeds" in metric for metric in points[-1].values() if isinstance(metric, Mapping))


def _bounds(points: Sequence[Mapping], metric: str) -> tuple[list[float], list[float]]:
    """What is drawn around a curve: the 95% interval of one run, the lowest and highest mean of several seeds."""
    if not has_seeds(points):
        return [p[metric]["low"] for p in points], [p[metric]["high"] for p in points]
    seeds = [p[metric].get("seeds", [mean(p, metric)]) for p in points]  # the start is the same for all
    return [min(each) for each in seeds], [max(each) for each in seeds]


_STAR = {"color": "#000000", "marker": "*", "linestyle": "none", "markersize": 13, "label": "start"}


def _star(ax: Axes, start: Mapping, x: str, y: str, *, named: bool = False) -> None:
    at = mean(start, x), mean(start, y)
    ax.plot(*at, zorder=5, **_STAR)
    if named:
        ax.annotate("start", at, xytext=(9, -13), textcoords="offset points", fontsize=FONT)


def over_training(ax: Axes, curves: Mapping[str, Sequence[Mapping]], metric: str) -> None:
    """One curve a label over the pairs seen (or the updates), with the band of its interval or of its seeds."""
    x = "pairs_seen" if all("pairs_seen" in p for points in curves.values() for p in points) else "step"
    for name, points in curves.items():
        style, xs = style_of(name, curves), [p[x] for p in points]
        ax.fill_between(xs, *_bounds(points, metric), color=style.colour, alpha=0.15, linewidth=0)
        curve(ax, xs, [mean(p, metric) for p in points], style)
    ax.set_xlabel("training pairs seen" if x == "pairs_seen" else "updates")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def curve(ax: Axes, xs: Sequence[float], ys: Sequence[float], style: Style, every: int | list[int] = 1) -> None:
    """A line in the style of its objective, with a marker at every so many of its points, or at those listed."""
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.7}
    ax.plot(xs, ys, linewidth=2.0, markersize=8, markevery=every, zorder=3, **_line(style), **edge)


def _line(style: Style) -> dict:
    return {"color": style.colour, "linestyle": style.linestyle, "marker": style.marker, "label": style.label}


def _moving_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over a window centred on every value, cut at the ends: (n,) -> (n,)."""
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _label_ends(ax: Axes, ends: Mapping[str, tuple[float, float]]) -> None:
    """Name every curve in the right margin, at the height of its end where there is room, with a line that leads there."""
    low, high = ax.get_ylim()
    gap = (high - low) * 0.065  # a line of text
    heights: dict[str, float] = {}
    for name in sorted(ends, key=lambda name: ends[name][1]):
        heights[name] = max([ends[name][1], *(height + gap for height in heights.values())])
    over = max(0.0, max(heights.values()) - high)
    right = ax.get_xlim()[1]
    for name, height in heights.items():
        style = style_of(name, ends)
        ax.annotate(
            style.label, xy=ends[name], xytext=(right, height - over), xycoords="data", textcoords="data",
            fontsize=FONT, fontweight="bold", color=dark(style.colour), va="center", ha="left", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": style.colour, "linewidth": 0.8, "linestyle": ":", "shrinkB": 5},
        )  # fmt: skip


def dark(colour: str) -> tuple[float, ...]:
    """The same hue, dark enough to be read as text on white."""
    return tuple(0.7 * part for part in to_rgb(colour))


def legend(fig: Figure, curves: Mapping[str, Sequence], *, start: bool = False) -> None:
    """One legend below all panels, for which the figure grows: it covers no data."""
    handles = [Line2D([], [], linewidth=2, markersize=7, **_line(style_of(name, curves))) for name in curves]
    star = [Line2D([], [], **_STAR)] * start
    inches = max(1.5, 0.95 + 0.092 * max(len(handle.get_label()) for handle in handles))  # of an entry
    groups = Counter(parted(name)[0] for name in curves)
    if len(groups) < len(curves) and len(set(groups.values())) == 1:  # a column an objective
        columns, lines = len(groups), len(curves) // len(groups)
        blank = Line2D([], [], linestyle="none", label=" ")
        heads = [star, *[[blank] * start] * (columns - 1)]
        handles = [each for i, head in enumerate(heads) for each in (*head, *handles[i * lines : (i + 1) * lines])]
        fig.set_figwidth(max(fig.get_figwidth(), columns * inches))
    else:
        handles, columns = handles + star, min(len(handles) + start, int(fig.get_figwidth() / inches))
    fig.set_figheight(fig.get_figheight() + 0.24 * max(0, math.ceil(len(handles) / columns) - 2))
    kind = {"loc": "outside lower center", "frameon": False, "fontsize": FONT, "handlelength": 3.5}
    fig.legend(handles=handles, ncols=columns, **kind)
