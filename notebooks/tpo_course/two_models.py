"""Two models under one experiment: their frontiers in one picture, and findings asked of both (chapter 6b)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tpo_lib.intervals import bootstrap
from tpo_lib.runs import plots

LABELS = {"pocket": "pocket, 3 M parameters", "smollm2-135m": "SmolLM2, 135 M parameters"}
TICKS = (0, 0.05, 0.1, 0.2, 0.5, 1, 2)  # nats a token
START = "start"
# finding -> (metric, which, is larger than which)
FINDINGS = {
    "TDPO2 stays nearer to the start than DPO": ("kl", "dpo", "tdpo2"),
    "TGDPO travels further than DPO": ("kl", "tgdpo", "dpo"),
    "TDPO1 travels further than DPO": ("kl", "tdpo1", "dpo"),
    "SimPO, without a reference, travels further than TGDPO": ("kl", "simpo", "tgdpo"),
    "IPO comes to rest before TDPO2": ("kl", "tdpo2", "ipo"),
    "TDPO1 gains more reward than DPO": ("reward", "tdpo1", "dpo"),
    "DPO gains more reward than TDPO2": ("reward", "dpo", "tdpo2"),
}


def kl_per_token(point: Mapping) -> float:
    """Sequence KL(policy ‖ reference) over the tokens of the samples, nats a token."""
    return plots.mean(point, "kl") / plots.mean(point, "length")


def reward_at(points: Sequence[Mapping], level: float, metric: str = "reward") -> float | None:
    """The metric where a run first comes to `level` nats a token, see `plots.at_level`; None where it never did."""
    kl, values = [kl_per_token(point) for point in points], [plots.mean(point, metric) for point in points]
    return plots.at_level(kl, values, level, root=True)


def frontiers(stored: Mapping[str, Mapping], *, metric: str = "reward", level: float | None = None) -> Figure:
    """What a nat a token buys, one panel a model, on one pair of axes; a dotted line at `level`."""
    fig, axes = plots.panels(len(stored), width=9.6, height=4.2)
    points = [point for model in stored.values() for points in model["curves"].values() for point in points]
    for ax, (name, model) in zip(axes, stored.items(), strict=True):
        for objective, curve in model["curves"].items():
            _curve(ax, curve, plots.style_of(objective), metric)
        start = next(iter(model["curves"].values()))[0]
        ax.plot(0, plots.mean(start, metric), "*k", markersize=13, zorder=5)
        if level is not None:
            ax.axvline(level, color="black", linestyle=":", linewidth=1.2)
        ax.set_xscale("symlog", linthresh=0.05, linscale=0.5)
        ax.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        ax.set(title=LABELS.get(name, name), xlabel="KL(policy ‖ reference), nats a token", xlim=(-0.004, 2.5))
    ends = [point[metric][end] for point in points for end in ("low", "high")]
    pad = 0.05 * (max(ends) - min(ends))
    for ax in axes:
        ax.set_ylim(min(ends) - pad, max(ends) + pad)
    axes[0].set_ylabel(plots.label(metric, points))
    handles = [_handle(plots.style_of(name)) for name in next(iter(stored.values()))["curves"]]
    handles += [Line2D([], [], color="black", marker="*", linestyle="none", markersize=11, label="start")]
    fig.legend(handles=handles, ncols=7, loc="outside lower center", frameon=False, fontsize=plots.FONT - 1)
    return fig


def _curve(ax, points: Sequence[Mapping], style: plots.Style, metric: str) -> None:
    xs, ys = [kl_per_token(point) for point in points], [plots.mean(point, metric) for point in points]
    bars = [[abs(point[metric][end] - y) for point, y in zip(points, ys, strict=True)] for end in ("low", "high")]
    ax.errorbar(xs, ys, yerr=bars, fmt="none", ecolor=style.colour, elinewidth=1.2, alpha=0.35, zorder=2)
    ax.plot(*plots.bent(xs, ys), linewidth=2, zorder=3, color=style.colour, linestyle=style.linestyle)
    ax.plot(xs[1:], ys[1:], style.marker, color=style.colour, markersize=7, markeredgecolor="white", zorder=4)


def _handle(style: plots.Style) -> Line2D:
    return Line2D(
        [],
        [],
        linewidth=2,
        markersize=7,
        label=style.label,
        marker=style.marker,
        color=style.colour,
        linestyle=style.linestyle,
    )


def difference(model: Mapping, metric: str, above: str, below: str, *, seed: int = 0) -> dict:
    """{"mean", "low", "high", "n"} of one objective's last evaluation minus another's, prompt by prompt; "start" is one, too."""
    first, second = (np.asarray(_by_prompt(model, name)[metric]) for name in (above, below))
    return bootstrap(first - second, seed=seed).as_dict()


def _by_prompt(model: Mapping, name: str) -> Mapping:
    curves = model["curves"]
    return next(iter(curves.values()))[0]["by_prompt"] if name == START else curves[name][-1]["by_prompt"]


def answers(model: Mapping) -> dict[str, str]:
    """Every finding and what the model's runs say of it: yes, no (the opposite is clear), or not told apart."""
    said = {}
    for finding, (metric, above, below) in FINDINGS.items():
        found = difference(model, metric, above, below)
        clear = found["low"] > 0 or found["high"] < 0
        said[finding] = ("yes" if found["mean"] > 0 else "no") if clear else "not told apart"
    return said


def rows(stored: Mapping[str, Mapping], part: str, names: Sequence[str]) -> str:
    """Settings of a part ("stage", "train", "sft"), a model a column, as aligned text."""
    values = [[str((model[part] or {}).get(name, "-")) for model in stored.values()] for name in names]
    return "\n".join(
        f"{name:24s}" + "".join(f"{value:>16s}" for value in row) for name, row in zip(names, values, strict=True)
    )


def summary(model: Mapping) -> dict:
    """A stored model's results as `report.summary_table` takes them."""

    def metrics(point: Mapping) -> dict:
        return {name: value for name, value in point.items() if isinstance(value, Mapping) and "mean" in value}

    ends = {name: metrics(points[-1]) for name, points in model["curves"].items()}
    return {"objectives": ends, "start": metrics(next(iter(model["curves"].values()))[0])}
