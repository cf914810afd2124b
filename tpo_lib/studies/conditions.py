"""Methods that differ in a condition beside their objective, "dpo, 50 pairs": their picture, and what it shows in words.

`read` is {what is read: {name: its summary}}, see `analysis.summaries`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tpo_lib.runs import plots


def by_condition(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """{condition: {objective: name}} of methods that are named so, "dpo, 50 pairs"; nothing where one is not.

    Example:
        >>> by_condition(["dpo, 50 pairs", "dpo, 200 pairs"]), by_condition(["dpo", "tdpo2 α0.5, 1.3 M"])
        ({'50 pairs': {'dpo': 'dpo, 50 pairs'}, '200 pairs': {'dpo': 'dpo, 200 pairs'}}, {})
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        objective, _, condition = name.partition(", ")
        found.setdefault(condition, {})[objective] = name
    return {} if "" in found else found


def figure(read: Mapping[str, Mapping[str, Mapping]]) -> Figure:
    """{what is read: {name: its summary}}, a panel each: a row a condition, in it every objective with its 95% interval.

    Dotted: the first objective's mean in the first condition. The names are those of `by_condition`.
    """
    rows = by_condition(next(iter(read.values())))
    objectives = list(dict.fromkeys(each for row in rows.values() for each in row))
    step, left = 0.7 / len(objectives), max(1.6, 0.085 * max(map(len, rows)))  # of a row; inches
    fig, axes = plots.panels(len(read), width=left + 3.9 * len(read), height=1.5 + 0.22 * len(rows) * len(objectives))
    for ax, (words, found) in zip(axes, read.items(), strict=True):
        if (first := next(iter(found.values()))["mean"]) is not None:
            ax.axvline(first, color="#555555", linewidth=1, linestyle=":")
        for y, row in enumerate(rows.values()):
            for objective, name in row.items():
                if found[name]["mean"] is None:
                    continue  # some seed does not come to the level
                style = plots.style_of(objective, objectives)
                at = y + step * (objectives.index(objective) - (len(objectives) - 1) / 2)
                ax.plot([found[name]["low"], found[name]["high"]], [at, at], color=style.colour, linewidth=2)
                ax.plot([found[name]["mean"]], [at], color=style.colour, marker=style.marker, markersize=7)
        ax.set(xlabel=words, ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)))
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.set_yticklabels(rows if ax is axes[0] else [])
    plots.legend(fig, dict.fromkeys(objectives, ()))
    return fig


def alt(read: Mapping[str, Mapping[str, Mapping]]) -> str:
    """What `figure` shows: every mean."""

    def mean(name: str, metric: Mapping) -> str:
        return f"{name} {'does not come there' if metric['mean'] is None else format(metric['mean'], '.3f')}"

    said = []
    for words, found in read.items():
        rows = by_condition(found).items()
        each = [
            f"{condition}: " + ", ".join(mean(plots.style_of(one).label, found[name]) for one, name in row.items())
            for condition, row in rows
        ]
        said.append(f"{words}: {'; '.join(each)}")
    return f"Means with 95% intervals over seeds and prompts, by condition and objective. {'. '.join(said)}."
