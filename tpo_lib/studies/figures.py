"""The pictures of a study, each with a text that says what it shows to who does not see it.

`methods` is {label: its runs, one a seed}: records, see `endpoints`, or what a study's result keeps of them, whose points have
means, {"step", metric: mean}. A label is an objective, or one with a setting ("tdpo2 α.5"), as in `plots`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tpo_lib.runs import plots
from tpo_lib.studies.conditions import by_condition
from tpo_lib.studies.endpoints import Run, best_of_n_kl
from tpo_lib.studies.words import axis, versus

SCORES = ("reward", "judge", "second_judge")
SEQKL = ("seqkl_chosen", "seqkl_rejected", "seqkl_margin")
BEST = "best of n"
GRID = 80  # KLs at which a mean curve is read, besides its evaluations
GREY = "#E2E2E2"

Methods = Mapping[str, Sequence[Run]]


def mean_curve(runs: Sequence[Run], y: str) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """A metric against the KL, averaged over seeds at equal KL, as far as every seed comes.

    Returns:
        (G,) nats; (S, G) of every seed, straight between its evaluations in sqrt(KL); and which of the G lie at an evaluation's
        mean KL.
    """
    kls, ys = ([_means(run, metric) for run in runs] for metric in ("kl", y))
    first, far = max(kl[0] for kl in kls), min(kl.max() for kl in kls)
    first = max(first, 0.0)  # a KL of 0 may be a rounding below it
    places = [kl for kl in np.mean([kl[: min(map(len, kls))] for kl in kls], 0) if first <= kl <= far]
    grid = np.unique([*np.clip(np.linspace(first**0.5, far**0.5, GRID) ** 2, first, far), *places])
    each = [[plots.at_level(kl, values, k, root=True) for k in grid] for kl, values in zip(kls, ys, strict=True)]
    return grid, np.array(each), np.searchsorted(grid, places).tolist()


def frontier(
    methods: Methods, scores: Sequence[str] = SCORES, best_of_n: Sequence[Mapping] = (), *, seeds: bool = False
) -> Figure:
    """What a nat buys, a panel a score: the mean over seeds at equal KL, in a band from the lowest to the highest seed.

    A curve ends where one of its seeds does, so that none is a mean of fewer seeds.

    Args:
        scores: metrics that are drawn where every run has them.
        best_of_n: [{"n", score: mean}, ...], of the start: what no training, but n samples buy, at log n - (n - 1) / n nats.
        seeds: draw every seed in the place of the band, thin and to its own end.
    """
    scores = present(methods, scores)
    fig, axes = plots.panels(len(scores), width=max(9.0 if seeds else 6.5, 4.6 * len(scores)), height=4.9)
    for ax, score in zip(axes, scores, strict=True):
        most, ends = 0.0, []
        for name, runs in methods.items():
            style, (kl, each, marks) = plots.style_of(name, methods), mean_curve(runs, score)
            paths = [(_means(run, "kl"), _means(run, score)) for run in runs] if seeds else []
            for path in paths:
                ax.plot(*plots.bent(*path), color=style.colour, linewidth=0.9, alpha=0.45)
            if not seeds:
                ax.fill_between(kl, each.min(0), each.max(0), color=style.colour, alpha=0.15, linewidth=0)
            plots.curve(ax, kl, each.mean(0), style, every=marks)
            most = max(most, kl[-1], *(path[0].max() for path in paths))
            ends.append({"low": each.min(), "high": each.max()})
        reference = [(best_of_n_kl(row["n"]), row[score]) for row in best_of_n if score in row]
        if reference:
            plots.curve(ax, *plots.bent(*zip(*reference, strict=True)), plots.style_of(BEST), every=plots.STEPS)
            most = max(most, reference[-1][0])
        plots.root_axis(ax, most, across=25.0)
        ax.set_xlabel(ax.get_xlabel().replace(", ", ",\n"))  # of three panels each is narrow
        ax.set_ylabel(plots.label(score, [{score: end} for end in ends]))
    plots.legend(fig, [*methods, *[BEST] * bool(best_of_n)])
    return fig


def frontier_alt(methods: Methods, scores: Sequence[str] = SCORES) -> str:
    """What `frontier` shows: every score at the largest round KL that all methods reach."""
    said, scores = [], present(methods, scores)
    curves = {name: {score: mean_curve(runs, score) for score in scores} for name, runs in methods.items()}
    far = min(found[scores[0]][0][-1] for found in curves.values())
    level = max([tick for tick in plots.ROOT_TICKS if tick <= far], default=far)
    for score in scores:
        places = {
            name: np.interp(level**0.5, found[score][0] ** 0.5, found[score][1].mean(0))
            for name, found in curves.items()
        }
        order = sorted(places, key=places.get, reverse=True)
        said.append(
            f"{score.replace('_', ' ')}: " + ", ".join(f"{plots.style_of(m).label} {places[m]:.3f}" for m in order)
        )
    seeds = sorted({len(runs) for runs in methods.values()})
    return (
        f"Mean scores against the KL to the reference in nats on a root scale, over {_span(seeds)} seeds with bands from the "
        f"lowest to the highest. At {level:g} nats, {'; '.join(said)}."
    )


def differences(panels: Mapping[str, Sequence[Mapping]]) -> Figure:
    """A forest plot: {what differs, with its unit: rows of `tables.paired`}, a panel each, the same family in all.

    Points are mean differences a - b with their 95% intervals, filled where Holm's p is below .05. The grey band is what the
    design would miss more often than once in five times: a point inside it that is not filled does not say "no difference".
    A row without figures is left empty and says that a level was not reached.
    """
    rows = next(iter(panels.values()))
    pairs = [(row["a"], row["b"]) for row in rows]
    if any([(row["a"], row["b"]) for row in each] != pairs for each in panels.values()):
        raise ValueError(
            "the panels of a forest plot share their rows: need the same pairs (a, b) in one order in each"
        )
    names = [versus(*pair, "−") for pair in pairs]
    methods = [name for pair in pairs for name in pair]
    if by_condition(methods):  # which the names say: one look an objective
        methods = [name.partition(", ")[0] for name in methods]
    looks = [plots.style_of(name, methods) for name in methods[::2]]
    left = max(2.2, 0.092 * max(map(len, names)))  # inches
    fig, axes = plots.panels(len(panels), width=left + 3.8 * len(panels), height=1.6 + 0.42 * len(rows))
    for ax, (words, each) in zip(axes, panels.items(), strict=True):
        ax.axvline(0, color="#555555", linewidth=1)
        ax.use_sticky_edges = False  # else a band would end at the frame
        for y, (row, look) in enumerate(zip(each, looks, strict=True)):
            _interval(ax, y, row, look)
        ax.set(xlabel=words, ylim=(len(each) - 0.4, -0.6), yticks=range(len(each)))
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.set_yticklabels(names if ax is axes[0] else [])
        ax.grid(axis="y", visible=False)
    note = "filled: Holm p < .05; grey: smaller than what is detected in 80 of 100 such studies"
    fig.supxlabel(note, fontsize=plots.FONT - 1)
    return fig


def _interval(ax: Axes, y: int, row: Mapping, style: plots.Style) -> None:
    """A row of a forest plot."""
    if row["mean"] is None:
        centred = {"ha": "center", "va": "center", "fontsize": 10}
        ax.text(0.5, y, "level not reached", transform=ax.get_yaxis_transform(), **centred)
        return
    ax.barh(y, 2 * row["detectable"], left=-row["detectable"], height=0.8, color=GREY, zorder=0)
    face = style.colour if row["holm"] < 0.05 else "white"
    look = {"color": style.colour, "marker": style.marker, "markerfacecolor": face, "markersize": 8}
    ax.plot([row["low"], row["high"]], [y, y], color=style.colour, linewidth=2, zorder=2)
    ax.plot([row["mean"]], [y], linewidth=2, zorder=3, **look)


def differences_alt(panels: Mapping[str, Sequence[Mapping]]) -> str:
    """What `differences` shows, row by row."""
    said = []
    for words, rows in panels.items():
        said.append(f"{words}: " + "; ".join(_sentence(row) for row in rows))
    return f"Paired differences with 95% intervals: {'; '.join(panels)}. {'. '.join(said)}."


def seqkl(methods: Methods) -> Figure:
    """SeqKL(reference ‖ policy) of held-out chosen and rejected responses over training, and the margin: TDPO's panels b to d."""
    return plots.seqkl({name: points(runs, SEQKL) for name, runs in methods.items()})


def over_training(methods: Methods, metrics: Sequence[str]) -> Figure:
    """Metrics over the updates, a panel each: the mean over seeds in a band from the lowest to the highest seed."""
    curves = {name: points(runs, metrics) for name, runs in methods.items()}
    fig, axes = plots.panels(len(metrics), width=max(6.5, 4.4 * len(metrics)), height=4.6)
    for ax, metric in zip(axes, metrics, strict=True):
        plots.over_training(ax, curves, metric)
        every = [point for each in curves.values() for point in each]
        ax.set_ylabel(plots.label(metric, every, axis(metric)))
    plots.legend(fig, curves)
    return fig


GROWTH = ("seqkl_mean", "logratio_var")  # of `measures.growth`


def growth(methods: Methods) -> Figure:
    """Sums over the first t tokens of held-out responses at the end of training, against t, of what was trained on the longest.

    On both axes doubling is a step; dotted: in proportion to t. Bands reach from the lowest to the highest seed.
    """
    grown = _grown(methods)
    fig, axes = plots.panels(len(GROWTH), width=11.0, height=4.8)
    for ax, metric in zip(axes, GROWTH, strict=True):
        for name, (t, found) in grown.items():
            style = plots.style_of(name, grown)
            ax.fill_between(t, found[metric].min(0), found[metric].max(0), color=style.colour, alpha=0.15, linewidth=0)
            plots.curve(ax, t, found[metric].mean(0), style)
        t, first = next(iter(grown.values()))
        ax.plot(t, first[metric].mean(0)[0] * np.array(t) / t[0], color="#555555", linewidth=1, linestyle=":")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(t, [str(each) for each in t])
        ax.set(xlabel="first tokens of the response", ylabel=axis(metric))
    plots.legend(fig, grown)
    return fig


def growth_alt(methods: Methods) -> str:
    """What `growth` shows: both at the shortest and at the longest."""
    said = []
    for metric in GROWTH:
        ends = [
            f"{plots.style_of(name).label} {found[metric].mean(0)[0]:.3g} to {found[metric].mean(0)[-1]:.3g}"
            for name, (_, found) in _grown(methods).items()
        ]
        said.append(f"{axis(metric)}: {', '.join(ends)}")
    t, _ = next(iter(_grown(methods).values()))
    return f"Means over seeds at the end of training, from the first {t[0]} to {t[-1]} tokens. {'; '.join(said)}."


def _grown(methods: Methods) -> dict[str, tuple[list[int], dict[str, np.ndarray]]]:
    """{label: (lengths, {metric: (S, lengths)})} of those methods whose responses are longest."""
    found = {}
    for name, runs in methods.items():
        last = runs[0]["points"][-1]
        names = [each.rpartition("_at_") for each in last.get("by_prompt", {}) | last]
        t = sorted({int(length) for metric, _, length in names if metric in GROWTH})
        each = {
            metric: np.array([[_means(run, f"{metric}_at_{i}")[-1] for i in t] for run in runs]) for metric in GROWTH
        }
        found[name] = t, each
    longest = max(t[-1] for t, _ in found.values())
    return {name: each for name, each in found.items() if each[0][-1] == longest}


def over_training_alt(methods: Methods, metrics: Sequence[str] = SEQKL) -> str:
    """What `over_training`, and with its metrics `seqkl`, shows: every metric at its largest and at the end."""
    said = []
    for metric in metrics:
        ends = []
        for name, runs in methods.items():
            each = points(runs, (metric,))
            top = max(each, key=lambda point: point[metric]["mean"])
            last, most = each[-1][metric]["mean"], top[metric]["mean"]
            ends.append(f"{plots.style_of(name).label} {last:.3g} (most {most:.3g}, after {top['step']})")
        said.append(f"{metric.replace('_', ' ')} at the end: " + ", ".join(ends))
    return "Means over seeds against updates of training. " + "; ".join(said) + "."


def points(runs: Sequence[Run], metrics: Sequence[str]) -> list[dict]:
    """The points of a method as `plots` takes them: means over seeds at the evaluations that all of them have."""
    steps = [[point["step"] for point in run["points"]] for run in runs]
    common = sorted(set.intersection(*map(set, steps)))
    found = [{"step": step} for step in common]
    for metric in metrics:
        means = [dict(zip(at, _means(run, metric).tolist(), strict=True)) for at, run in zip(steps, runs, strict=True)]
        for point in found:
            each = [mean[point["step"]] for mean in means]
            point[metric] = {"mean": float(np.mean(each)), "low": min(each), "high": max(each), "seeds": each}
    return found


def _means(run: Run, metric: str) -> np.ndarray:
    """(C,) means of a metric at the points of a run."""
    return np.array(
        [np.mean(point[metric] if metric in point else point["by_prompt"][metric]) for point in run["points"]]
    )


def present(methods: Methods, metrics: Sequence[str]) -> list[str]:
    """Those metrics that every run has."""
    points = [
        point.get("by_prompt", {}) | point for each in methods.values() for run in each for point in run["points"]
    ]
    found = [metric for metric in metrics if all(metric in point for point in points)]
    if not found:
        raise ValueError(f"none of {', '.join(metrics)} is in every run: nothing to draw")
    return found


def _sentence(row: Mapping) -> str:
    if row["mean"] is None:
        return f"{versus(row['a'], row['b'], 'and')} do not both reach the level"
    told = "told apart" if row["holm"] < 0.05 else f"not told apart, {row['detectable']:.3f} could be"
    return f"{versus(row['a'], row['b'], 'minus')} {row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}], {told}"


def _span(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
