"""The report of a comparison: a table for the terminal, report.md with its pictures, and report.html in one file.

Its words and their order are in templates/report.j2, once for both; text from outside is escaped in both.
    summary  {"objectives": {objective: {metric: {"mean", "low", "high", "n"}}}, "start": {metric: {...}}, "config": {...},
              "seed": int, "versions": {...}, "wall_time_s": float,
              "differences": {metric: entries of intervals.paired_differences}}        # may be missing
    curves   {objective: [{"step", "pairs_seen", metric: {...}, "by_prompt": {metric: [...]}}, ...]}, the start model first;
             where differences are missing they are made from by_prompt, which may be missing too
    samples  {objective: [{"prompt", "before", "after", "before_reward", "after_reward", "before_judge", "after_judge"}]}
"""

from __future__ import annotations

import base64
import html
import itertools
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tpo_lib.files import store
from tpo_lib.intervals import paired_differences
from tpo_lib.runs import plots

TEMPLATES = Path(__file__).parent / "templates"
SHOWN = 6  # samples an objective
COLUMNS = {  # metric -> heading with its unit, digits after the point
    "reward": ("reward", 2),
    "judge": ("judge", 2),
    "kl": ("KL, nats", 1),
    "entropy": ("entropy, nats/token", 2),
    "distinct_2": ("distinct-2", 3),
    "repetition": ("repetition", 3),
    "length": ("length, tokens", 1),
    "accuracy": ("pair accuracy, own reward", 2),
    "accuracy_logratio": ("pair accuracy, log-ratio", 2),
    "accuracy_mean": ("pair accuracy, log-ratio per token", 2),
    "seqkl_chosen": ("SeqKL chosen, nats", 1),
    "seqkl_rejected": ("SeqKL rejected, nats", 1),
    "seqkl_margin": ("SeqKL margin, nats", 1),
}
EQUAL = (("kl", "reward", "Reward at equal KL"), ("reward", "entropy", "Entropy at equal reward"))
Table = tuple[list[str], list[list[str]]]  # header and rows of plain cells; the first column names the row


def summary_table(summary: Mapping, *, width: int = 100) -> str:
    """The results as aligned plain text, objectives down, metrics across, in as many blocks as the width asks for.

    Example:
        >>> print(summary_table({"objectives": {"dpo": {"reward": {"mean": 0.8, "low": 0.78, "high": 0.82, "n": 9}}}}))
              reward
        DPO   0.80 [0.78, 0.82]
    """
    header, rows = _results(summary)
    columns = list(zip(header, *rows, strict=True))
    names, *metrics = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    blocks: list[list[list[str]]] = [[]]
    for column in metrics:
        if blocks[-1] and sum(len(c[0]) + 3 for c in [names, *blocks[-1], column]) > width:
            blocks.append([])
        blocks[-1].append(column)
    lines = [["   ".join(row).rstrip() for row in zip(names, *block, strict=True)] for block in blocks]
    return "\n\n".join("\n".join(block) for block in lines)


def write_report(
    folder: Path, summary: Mapping, curves: Mapping, samples: Mapping, training: Mapping | None = None
) -> None:
    """Write report.md, its pictures, and report.html, which needs no other file, into an existing folder.

    Args:
        summary, curves, samples: see the module's docstring.
        training: {objective: rows of metrics.jsonl}, if its picture is wanted.
    """
    folder, pictures = Path(folder), []
    for name, figure in _figures(curves, training).items():
        path = folder / f"{name}.png"
        store.write_file(path, partial(figure.savefig, dpi=150))
        data = base64.b64encode(path.read_bytes()).decode()
        pictures.append({"name": name, "file": path.name, "data": data})
    words = _content(_with_differences(summary, curves), curves, samples) | {"pictures": pictures}
    for name, escape in (("report.md", _md), ("report.html", html.escape)):

        def escaped(value, escape=escape):
            return value if isinstance(value, Markup) else Markup(escape(str(value)))  # a macro's words have been

        templates = Environment(
            loader=FileSystemLoader(TEMPLATES), autoescape=True, finalize=escaped, undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        store.write_file(folder / name, templates.get_template(f"{name}.j2").render(words))


def _content(summary: Mapping, curves: Mapping, samples: Mapping) -> dict:
    """What the templates name, pictures excepted."""
    objectives = [_label(name) for name in summary["objectives"]]
    known = set.intersection(*(set(point) for points in curves.values() for point in points))
    units = {metric["n"] for row in summary["objectives"].values() for metric in row.values()}
    minutes, rest = divmod(round(summary["wall_time_s"]), 60)
    return {
        "title": f"{', '.join(objectives)}: a comparison",
        "objectives": objectives,
        "summary": summary,
        "duration": f"{minutes} min {rest} s" if minutes else f"{rest} s",
        "units": " or ".join(map(str, sorted(units))),
        "results": _results(summary),
        "equal": [(title, *found) for x, y, title in EQUAL if {x, y} <= known and (found := _equal(curves, x, y))],
        "found": {COLUMNS[metric][0]: findings(summary, metric) for metric in ("reward", "judge")},
        "samples": {_label(name): [row | _scores(row) for row in rows[:SHOWN]] for name, rows in samples.items()},
        "shown": SHOWN,
        "count": max(map(len, samples.values()), default=0),
        "settings": _settings(summary),
        "costs": _costs(summary.get("costs", {})),
    }


def findings(summary: Mapping, metric: str = "reward") -> list[str]:
    """Sentences on which objectives `metric` tells apart: by paired differences, else by whether intervals overlap."""
    told, not_told = [], []

    def tell(above: str, below: str, apart: bool, size: str, doubt: str = "") -> None:
        words = (
            f"{_label(above)} lies above {_label(below)}{size}."
            if apart
            else f"{_label(above)} and {_label(below)}{doubt}"
        )
        (told if apart else not_told).append(words)

    differences = summary.get("differences", {}).get(metric)
    digits = COLUMNS[metric][1] + 1
    for entry in differences or []:
        sign = 1 if entry["mean"] >= 0 else -1
        low, high = sorted((sign * entry["low"], sign * entry["high"]))
        size = f"{abs(entry['mean']):.{digits}f} [{low:z.{digits}f}, {high:z.{digits}f}]"
        tell(*(entry["a"], entry["b"])[::sign], low > 0, f" by {size}", f" (difference {size})")
    if differences is None:
        results = {name: row[metric] for name, row in summary["objectives"].items() if metric in row}
        for a, b in itertools.combinations(sorted(results, key=lambda name: -results[name]["mean"]), 2):
            tell(a, b, results[a]["low"] > results[b]["high"], ": their intervals do not overlap")
    if not_told:
        told.append(f"Not told apart by this evaluation, which does not make them equal: {'; '.join(not_told)}.")
    return told


def at_equal(curves: Mapping, x: str, y: str) -> tuple[list[float], dict[str, list[float | None]]]:
    """Read y off every curve at equal levels of x, by linear interpolation where the curve first reaches the level.

    Returns:
        Up to five round levels that at least two objectives reach, and objective -> one y a level (None: it never gets there).
    """
    reach = sorted((max(plots.mean(p, x) for p in points) for points in curves.values()), reverse=True)
    start = max(plots.mean(points[0], x) for points in curves.values())
    top = reach[min(1, len(reach) - 1)]
    levels = [float(v) for v in MaxNLocator(5).tick_values(start, top) if start < v <= top] if top > start else []
    return levels, {name: [_first_crossing(points, x, y, level) for level in levels] for name, points in curves.items()}


def _with_differences(summary: Mapping, curves: Mapping) -> dict:
    """The summary, with paired differences of the final evaluations where these kept one number a prompt."""
    final, made = {name: points[-1].get("by_prompt", {}) for name, points in curves.items()}, {}
    for metric in set.intersection(*map(set, final.values())) & {"reward", "judge"}:
        values = {name: by_prompt[metric] for name, by_prompt in final.items()}
        made[metric] = paired_differences(values, seed=summary["seed"])
    return {**summary, "differences": made | summary.get("differences", {})}


def _settings(summary: Mapping) -> list[Table]:
    """Every setting and version: one table for what all objectives share, one for where they differ."""
    config = dict(summary["config"])
    each = [dict(run) for run in config.pop("objectives", [])]
    names = dict.fromkeys(name for run in each for name in run)
    differing = [name for name in names if any(run.get(name) != each[0].get(name) for run in each)]
    config |= {name: each[0][name] for name in names if name not in differing}
    config |= {f"version of {name}": version for name, version in summary["versions"].items()}
    shared = ["setting", "value"], [[name, str(value)] for name, value in config.items() if value is not None]
    differing.sort(key=lambda name: name != "loss_type")  # it names the row
    rows = [["-" if run.get(name) is None else str(run[name]) for name in differing] for run in each]
    return [shared, (differing, rows)] if differing else [shared]


def _figures(curves: Mapping, training: Mapping | None) -> dict[str, Figure]:
    """The pictures there is data for."""
    known = set.intersection(*(set(point) for points in curves.values() for point in points))
    figures = {"frontier": plots.frontier(curves, "reward" if "reward" in known else "accuracy")}
    if "judge" in known:
        figures["frontier_judge"] = plots.frontier(curves, "judge")
    if "seqkl_margin" in known:
        figures["seqkl"] = plots.seqkl(curves)
    if "reward" in known:
        figures["diversity"] = plots.diversity(curves)
    if training:
        figures["training"] = plots.training(training)
    return figures


def _results(summary: Mapping) -> Table:
    rows = ({"start": summary["start"]} if "start" in summary else {}) | dict(summary["objectives"])
    metrics = [metric for metric in COLUMNS if any(metric in row for row in rows.values())]
    body = [[_label(name), *(_cell(row.get(metric), metric) for metric in metrics)] for name, row in rows.items()]
    return ["", *(COLUMNS[metric][0] for metric in metrics)], body


def _costs(costs: Mapping) -> Table | None:
    """Seconds, tokens a second and peak memory of every part of a comparison."""
    rows = []
    for name, cost in costs.items():
        speed = f"{cost['tokens'] / cost['seconds']:,.0f}" if cost.get("tokens") else "-"
        peak = f"{cost['peak_gb']:.1f}" if "peak_gb" in cost else "-"
        rows.append([_label(name), f"{cost['seconds']:,.0f}", speed, peak])
    return (["", "seconds", "tokens/s", "peak memory, GB"], rows) if rows else None


def _equal(curves: Mapping, x: str, y: str) -> Table | None:
    levels, rows = at_equal(curves, x, y)
    if not levels:
        return None
    digits = COLUMNS[y][1]
    body = [[_label(name), *("-" if v is None else f"{v:.{digits}f}" for v in row)] for name, row in rows.items()]
    return [COLUMNS[x][0], *(f"{level:g}" for level in levels)], body


def _first_crossing(points: Sequence[Mapping], x: str, y: str, level: float) -> float | None:
    for a, b in itertools.pairwise(points):
        low, high = plots.mean(a, x), plots.mean(b, x)
        if low < level <= high:
            return float(np.interp(level, [low, high], [plots.mean(a, y), plots.mean(b, y)]))
    return None


def _cell(metric: Mapping | None, name: str) -> str:
    if metric is None:
        return "-"
    digits = COLUMNS[name][1]
    mean, low, high = (f"{metric[key]:z.{digits}f}" for key in ("mean", "low", "high"))  # z: no "-0.0"
    return f"{mean} [{low}, {high}]"


def _label(name: str) -> str:
    return plots.style_of(name).label


def _scores(row: Mapping) -> dict[str, str]:
    kinds = ("reward", "judge")
    return {
        f"{when}_scores": ", ".join(
            f"{kind} {row[key]:.2f}" for kind in kinds if row.get(key := f"{when}_{kind}") is not None
        )
        for when in ("before", "after")
    }


def _md(text: str) -> str:
    """Text in which Markdown and HTML find nothing to interpret, on one line."""
    text = re.sub(r"([\\`*_|~#]|\](?=[(\[:]))", r"\\\1", " ".join(str(text).split()))
    return html.escape(text, quote=False)
