"""The report of a comparison: a table for the terminal, report.md with its pictures, and report.html in one file.

Its words and their order are in templates/report.j2, once for both; text from outside is escaped in both.
    summary  {"objectives": {label: {metric: {"mean", "low", "high", "n"}}}, "start": {metric: {...}}, "config": {...},
              "seed": int, "versions": {...}, "wall_time_s": float,
              "data": compare._data                                               # may be missing, as what follows
              "differences": {metric: entries of seeds.paired_over_seeds}}        # may be missing
    curves   {label: [{"step", "pairs_seen", metric: {...}, "by_prompt": {metric: [...]}}, ...]}, the start model first; where
             differences are missing they are made from by_seed or by_prompt, which may be missing too
    samples  {label: [{"prompt", "before", "after", "before_reward", "after_reward", "before_judge", "after_judge"}]}
    tokens   {label: heatmap.token_map}
A label is an objective, or one with a setting ("tdpo2 β.05 α.5"); of several seeds, metrics and points are as `seeds.merged`
makes them.
"""

from __future__ import annotations

import base64
import html
import itertools
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tpo_lib.files import store
from tpo_lib.runs import heatmap, plots, verdicts
from tpo_lib.runs.overoptimised import JUDGES, sentences
from tpo_lib.runs.seeds import paired_over_seeds, table_of

TEMPLATES = Path(__file__).parent / "templates"
SHOWN = 6  # samples an objective
COLUMNS = {  # metric -> heading with its unit, digits after the point
    "reward": ("reward", 2),
    "judge": ("judge", 2),
    "second_judge": ("second judge", 2),
    "kl": ("KL, nats", 1),
    "entropy": ("entropy, nats/token", 2),
    "rare": ("rare tokens, share", 3),
    "ref_perplexity": ("perplexity under the reference", 1),
    "distinct_2": ("distinct-2", 3),
    "distinct_2_within": ("distinct-2 within a prompt", 3),
    "repetition": ("repetition", 3),
    "length": ("length, tokens", 1),
    "accuracy_logratio": ("pair accuracy", 2),
    "accuracy_mean": ("pair accuracy per token", 2),
    "seqkl_chosen": ("SeqKL chosen, nats", 1),
    "seqkl_rejected": ("SeqKL rejected, nats", 1),
    "seqkl_margin": ("SeqKL margin, nats", 1),
    "own_accuracy": ("own accuracy (training diagnostic)", 2),
}
COMPARED = ("reward", *JUDGES, "accuracy_logratio")  # what is compared setting by setting
APART = (*COMPARED, "kl", "entropy")  # what seeds and prompts do to it is shown apart
MANY = 15  # comparisons that are told one by one
NOT_AFTER = "*"  # marks what is told apart by its own interval, and not by Holm's correction
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
    folder: Path,
    summary: Mapping,
    curves: Mapping,
    samples: Mapping,
    training: Mapping | None = None,
    tokens: Mapping | None = None,
) -> None:
    """Write report.md, its pictures, and report.html, which needs no other file, into an existing folder.

    Args:
        summary, curves, samples, tokens: see the module's docstring.
        training: {label: rows of metrics.jsonl, or a list of them a seed}, if its picture is wanted.
    """
    folder = Path(folder)
    pictures = [_saved(folder, name, figure) for name, figure in _figures(curves, training).items()]
    words = _content(_with_differences(summary, curves), curves, samples) | {"pictures": pictures, "tokens": None}
    tokens = {label: maps for label, maps in (tokens or {}).items() if maps}
    if tokens:
        drawn = [_saved(folder, f"tokens_{name}", heatmap.picture(tokens, name)) for name in heatmap.QUANTITIES]
        words["tokens"] = {"pictures": drawn, "page": heatmap.page(tokens)}
    for name, escape in (("report.md", _md), ("report.html", html.escape)):

        def escaped(value, escape=escape):
            return value if isinstance(value, Markup) else Markup(escape(str(value)))  # a macro's words have been

        templates = Environment(
            loader=FileSystemLoader(TEMPLATES), autoescape=True, finalize=escaped, undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        store.write_file(folder / name, templates.get_template(f"{name}.j2").render(words))


def _saved(folder: Path, name: str, figure: Figure) -> dict:
    path = folder / f"{name}.png"
    store.write_file(path, partial(figure.savefig, dpi=150))
    return {"name": name, "file": path.name, "data": base64.b64encode(path.read_bytes()).decode()}


def _content(summary: Mapping, curves: Mapping, samples: Mapping) -> dict:
    """What the templates name, pictures excepted."""
    objectives = [_label(name) for name in summary["objectives"]]
    known = set.intersection(*(set(point) for points in curves.values() for point in points))
    units = {metric["n"] for row in summary["objectives"].values() for metric in row.values()}
    minutes, rest = divmod(round(summary["wall_time_s"]), 60)
    plain = list(dict.fromkeys(_label(name.partition(" ")[0]) for name in summary["objectives"]))
    plain = plain if len(plain) < len(objectives) else objectives
    seeds = max(
        (len(metric.get("seeds", [1])) for row in summary["objectives"].values() for metric in row.values()), default=1
    )
    return {
        "title": f"{', '.join(plain)}: a comparison",
        "objectives": objectives,
        "plain": plain,
        "several": seeds if seeds > 1 else 0,
        "seeds": ", ".join(map(str, summary["config"].get("seeds") or [summary["seed"]])),
        "spread": _spread(summary),
        "known": known,
        "summary": summary,
        "duration": f"{minutes} min {rest} s" if minutes else f"{rest} s",
        "units": " or ".join(map(str, sorted(units))),
        "results": _results(summary),
        "equal": [(title, *found) for x, y, title in EQUAL if {x, y} <= known and (found := _equal(curves, x, y))],
        "found": {COLUMNS[metric][0]: findings(summary, metric) for metric in COMPARED},
        "frontier": verdicts.frontier(summary["config"]),
        "studies": verdicts.of(summary["config"].get("model"), [name.split()[0] for name in summary["objectives"]]),
        "study_columns": verdicts.COLUMNS,
        "optimised": {COLUMNS[judge][0]: sentences(curves, judge, seed=summary["seed"]) for judge in JUDGES},
        "samples": {_label(name): [row | _scores(row) for row in rows[:SHOWN]] for name, rows in samples.items()},
        "shown": SHOWN,
        "count": max(map(len, samples.values()), default=0),
        "settings": _settings(summary),
        "costs": _costs(summary.get("costs", {})),
    }


def findings(summary: Mapping, metric: str = "reward") -> list[str]:
    """Sentences on which settings `metric` tells apart: by paired differences, else by whether intervals overlap.

    Up to `MANY` comparisons are told one by one, more of them setting by setting.
    """
    differences, digits = summary.get("differences", {}).get(metric), COLUMNS[metric][1] + 1
    beside = partial(verdicts.beside, summary.get("config", {}), metric)
    told, not_told = [], []  # (above, below, by how much), (a, b, the difference)
    for entry in differences or []:
        sign = 1 if entry["mean"] >= 0 else -1
        low, high = sorted((sign * entry["low"], sign * entry["high"]))
        size = f"{abs(entry['mean']):.{digits}f} [{low:z.{digits}f}, {high:z.{digits}f}]"
        pair = [entry[side] for side in "ab"][::sign]
        mark = NOT_AFTER if entry.get("holm", 0.0) >= 0.05 else ""
        more = beside(*pair, told=low > 0) if len(differences) <= MANY else ""
        words = f" by {size}{mark}{more}" if low > 0 else f" (difference {size}{more})"
        (told if low > 0 else not_told).append((*map(_label, pair), words))
    if differences is None:
        results = {name: row[metric] for name, row in summary["objectives"].items() if metric in row}
        for a, b in itertools.combinations(sorted(results, key=lambda name: -results[name]["mean"]), 2):
            apart = results[a]["low"] > results[b]["high"]
            (told if apart else not_told).append(
                (_label(a), _label(b), ": their intervals do not overlap" if apart else "")
            )
    if len(told) + len(not_told) <= MANY:
        sentences = [f"{above} lies above {below}{size}." for above, below, size in told]
        pairs = [f"{a} and {b}{doubt}" for a, b, doubt in not_told]
    else:
        sentences = [f"{above} lies above {', '.join(below)}." for above, below in _by_first(told)]
        pairs = [f"{a} and {' or '.join(b)}" for a, b in _by_first([(a, b, "") for a, b, _ in not_told])]
    if pairs:
        sentences.append(f"Not told apart by this evaluation, which does not make them equal: {'; '.join(pairs)}.")
    if differences and "holm" in differences[0]:
        count, kept = len(differences), sum(NOT_AFTER not in size for *_, size in told)
        left = f" ({NOT_AFTER}: not after it)" if kept < len(told) else ""
        sentences.append(
            f"Of {count} comparisons {len(told)} are told apart one at a time, {kept} after Holm's correction for all {count} at "
            f"once, which keeps the chance of a single wrong one below 5%{left}."
        )
    return sentences


def _by_first(triples: Sequence[tuple[str, str, str]]) -> list[tuple[str, list[str]]]:
    """(a, b, words) grouped by a: a and all its "b words"."""
    groups: dict[str, list[str]] = {}
    for a, b, words in triples:
        groups.setdefault(a, []).append(f"{b}{words}")
    return list(groups.items())


def at_equal(curves: Mapping, x: str, y: str) -> tuple[list[float], dict[str, list[float | None]]]:
    """Read y off every curve at equal levels of x, where it first reaches the level: see `plots.at_level`.

    Returns:
        Up to five round levels that at least two objectives reach (1, 2, 5, 10, ... of a KL, which is dense where it is
        small), and objective -> one y a level (None: it never gets there).
    """
    reach = sorted((max(plots.mean(p, x) for p in points) for points in curves.values()), reverse=True)
    start = max(plots.mean(points[0], x) for points in curves.values())
    top = reach[min(1, len(reach) - 1)]
    root = x == "kl"
    round_ones = plots.ROOT_TICKS if root else MaxNLocator(5).tick_values(start, top) if top > start else ()
    levels = [float(v) for v in round_ones if start < v <= top][-5:]
    xs, ys = ({name: [plots.mean(p, metric) for p in points] for name, points in curves.items()} for metric in (x, y))
    return levels, {name: [plots.at_level(xs[name], ys[name], v, root=root) for v in levels] for name in curves}


def _with_differences(summary: Mapping, curves: Mapping) -> dict:
    """The summary, with paired differences of the final evaluations where these kept one number a prompt and seed."""
    made = {}
    for metric in COMPARED:
        tables = {name: table_of(points[-1], metric) for name, points in curves.items()}
        if all(tables.values()):
            made[metric] = paired_over_seeds(tables, seed=summary["seed"])
    return {**summary, "differences": made | summary.get("differences", {})}


def _spread(summary: Mapping) -> list[tuple]:
    """(title, header, rows) a metric: what seeds do to it beside what the prompts leave open; [] with one seed."""
    tables = []
    for metric in APART:
        rows = {name: row[metric] for name, row in summary["objectives"].items() if "seeds" in row.get(metric, {})}
        heading, digits = COLUMNS[metric][0], COLUMNS[metric][1] + 1
        body = [
            [
                _label(name), f"{m['mean']:z.{digits}f}", f"[{m['low']:z.{digits}f}, {m['high']:z.{digits}f}]",
                f"{m['seed_sd']:.{digits}f}", f"{m['evaluation']:.{digits}f}",
                ", ".join(f"{seed:z.{digits}f}" for seed in m["seeds"]),
            ]
            for name, m in rows.items()
        ]  # fmt: skip
        header = ["", "mean", "95% interval", "SD over seeds", "half-width from prompts alone", "mean of each seed"]
        tables += [(heading, header, body)] if body else []
    return tables


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
    height = "reward" if "reward" in known else "accuracy_logratio"
    figures = {"frontier": plots.frontier(curves, height)}
    for judge in (judge for judge in JUDGES if judge in known):
        figures[f"frontier_{judge}"] = plots.frontier(curves, judge)
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
