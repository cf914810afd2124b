"""The report of a comparison: a table for the terminal, report.md with its pictures, and report.html in one file.

A report is a list of blocks (heading, paragraph, list, table, picture, samples), composed once and written twice, as
Markdown and as HTML. All text that comes from outside (prompts, samples, settings) is escaped in both.

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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tpo_lib.files import store
from tpo_lib.intervals import paired_differences
from tpo_lib.runs import plots

SHOWN = 6  # samples an objective
COLUMNS = {  # metric -> heading with its unit, digits after the point
    "reward": ("reward", 2),
    "judge": ("judge", 2),
    "kl": ("KL, nats", 1),
    "entropy": ("entropy, nats/token", 2),
    "distinct_2": ("distinct-2", 3),
    "repetition": ("repetition", 3),
    "length": ("length, tokens", 1),
    "accuracy": ("pair accuracy", 2),
    "seqkl_chosen": ("SeqKL chosen, nats", 1),
    "seqkl_rejected": ("SeqKL rejected, nats", 1),
    "seqkl_margin": ("SeqKL margin, nats", 1),
}
CAPTIONS = {
    "frontier": "Reward against distance from the start model: at equal KL, the higher curve buys more reward with a nat.",
    "frontier_judge": "The same against the independent judge, which no objective has seen: where the reward rises and the "
    "judge does not, the reward is being exploited.",
    "seqkl": "Where the forward KL goes in training: the margin is the term that TDPO adds to DPO's, and a chosen side that "
    "stays low is what TDPO2's stop-gradient is for.",
    "diversity": "What the reward costs: at equal reward, the higher curve keeps more variety (left, middle); the right "
    "panel shows whether reward is bought with length.",
    "training": "Loss, margin and accuracy of each run under its own objective: their scales differ, so compare shapes "
    "and not heights.",
}


@dataclass(frozen=True)
class Heading:
    """A section's title."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of plain sentences."""

    items: list[str]


@dataclass(frozen=True)
class Table:
    """Plain cells; the first column names the row."""

    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG in the report's folder, with a caption that says what to read off it."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Samples:
    """Continuations of one objective before and after training."""

    title: str
    rows: Sequence[Mapping]


def summary_table(summary: Mapping, *, width: int = 100) -> str:
    """The results as aligned plain text, objectives down, metrics across, in as many blocks as the width asks for.

    Example:
        >>> print(summary_table({"objectives": {"dpo": {"reward": {"mean": 0.8, "low": 0.78, "high": 0.82, "n": 9}}}}))
              reward
        DPO   0.80 [0.78, 0.82]
    """
    table = _results(summary)
    columns = list(zip(table.header, *table.rows, strict=True))
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
    """Draw the pictures and write report.md and a self-contained report.html into an existing folder.

    Args:
        folder: gets frontier.png, frontier_judge.png, seqkl.png, diversity.png, training.png (those there is data for),
            report.md (relative links) and report.html (pictures inside, no other file or address needed).
        summary, curves, samples: see the module's docstring.
        training: {objective: rows of metrics.jsonl}, if its picture is wanted.
    """
    folder = Path(folder)
    pictures = []
    for name, figure in _figures(curves, training).items():
        store.write_file(folder / f"{name}.png", partial(figure.savefig, dpi=150))
        pictures.append(Picture(folder / f"{name}.png", CAPTIONS[name]))
    names = ", ".join(_label(name) for name in summary["objectives"])
    blocks = _compose(_with_differences(summary, curves), curves, samples, pictures)
    store.write_file(folder / "report.md", to_markdown(f"{names}: a comparison", blocks))
    store.write_file(folder / "report.html", to_html(f"{names}: a comparison", blocks))


def findings(summary: Mapping, metric: str = "reward") -> list[str]:
    """Sentences on which objectives `metric` tells apart: by paired differences, else by whether intervals overlap."""
    told, not_told = [], []
    differences = summary.get("differences", {}).get(metric)
    digits = COLUMNS[metric][1] + 1
    for entry in differences or []:
        sign = 1 if entry["mean"] >= 0 else -1
        above, below = (entry["a"], entry["b"])[::sign]
        low, high = sorted((sign * entry["low"], sign * entry["high"]))
        size = f"{abs(entry['mean']):.{digits}f} [{low:z.{digits}f}, {high:z.{digits}f}]"
        if low > 0:
            told.append(f"{_label(above)} lies above {_label(below)} by {size}.")
        else:
            not_told.append(f"{_label(above)} and {_label(below)} (difference {size})")
    if differences is None:
        results = {name: row[metric] for name, row in summary["objectives"].items() if metric in row}
        for a, b in itertools.combinations(sorted(results, key=lambda name: -results[name]["mean"]), 2):
            if results[a]["low"] > results[b]["high"]:
                told.append(f"{_label(a)} lies above {_label(b)}: their intervals do not overlap.")
            else:
                not_told.append(f"{_label(a)} and {_label(b)}")
    if not_told:
        told.append(f"Not told apart by this evaluation, which does not make them equal: {'; '.join(not_told)}.")
    return told


def at_equal(curves: Mapping, x: str, y: str) -> tuple[list[float], dict[str, list[float | None]]]:
    """Read y off every curve at equal levels of x, by linear interpolation where the curve first reaches the level.

    Returns:
        Up to five round levels inside the range that at least two objectives reach, and objective -> one y a level
        (None where the objective never gets there).
    """
    reach = sorted((max(plots.mean(p, x) for p in points) for points in curves.values()), reverse=True)
    start = max(plots.mean(points[0], x) for points in curves.values())
    top = reach[min(1, len(reach) - 1)]
    levels = [float(v) for v in MaxNLocator(5).tick_values(start, top) if start < v <= top] if top > start else []
    return levels, {name: [_first_crossing(points, x, y, level) for level in levels] for name, points in curves.items()}


def to_markdown(title: str, blocks: Sequence) -> str:
    """Blocks -> Markdown with relative picture links."""
    lines = [f"# {_md(title)}", ""]
    for block in blocks:
        match block:
            case Heading(text):
                lines += [f"## {_md(text)}", ""]
            case Paragraph(text):
                lines += [_md(text), ""]
            case Bullets(items):
                lines += [*(f"- {_md(item)}" for item in items), ""]
            case Table(header, rows):
                lines += [_md_row(header), _md_row(["---"] * len(header), raw=True), *map(_md_row, rows), ""]
            case Picture(path, caption):
                lines += [f"![{_md(caption)}]({path.name})", "", f"*{_md(caption)}*", ""]
            case Samples(sample_title, rows):
                cells = [[r["prompt"], *(f"{_scores(r, w)}: {r[w]}" for w in ("before", "after"))] for r in rows]
                head = ["prompt", "before training", f"after {sample_title}"]
                lines += [_md_row(head), "|---|---|---|", *map(_md_row, cells), ""]
    return "\n".join(lines)


def to_html(title: str, blocks: Sequence) -> str:
    """Blocks -> one HTML page that needs no other file, reads on a phone and follows the reader's dark mode."""
    body = "\n".join(_html_block(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE_SHEET}</style>\n</head>\n<body>\n<main>\n<h1>{html.escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


STYLE_SHEET = """
:root { color-scheme: light dark; --text: #1f2328; --page: #ffffff; --soft: #f3f4f6; --line: #d0d4da; --dim: #59636e; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e8eb; --page: #14171a; --soft: #1e2328; --line: #3a4149; --dim: #a3acb5; }
}
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1.05rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.7rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
tbody th { position: sticky; left: 0; background: var(--page); }
figure { margin: 1.4rem 0; }
img { display: block; width: 100%; min-width: 36rem; height: auto; background: #ffffff; border-radius: 6px; }
figcaption, .prompt, .score { color: var(--dim); font-size: 0.9rem; }
.sample { border: 1px solid var(--line); border-radius: 6px; margin: 0.8rem 0; padding: 0.7rem; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 0.7rem; margin-top: 0.5rem; }
.sides > div { background: var(--soft); border-radius: 6px; padding: 0.6rem; overflow-wrap: anywhere; white-space: pre-wrap; }
"""


def _compose(summary: Mapping, curves: Mapping, samples: Mapping, pictures: Sequence[Picture]) -> list:
    """Everything the report says, in its order."""
    units = {metric["n"] for row in summary["objectives"].values() for metric in row.values()}
    blocks: list = [
        Paragraph(
            f"{len(summary['objectives'])} objectives, trained from the same start model, evaluated on the same held-out prompts "
            f"with the same random numbers. Seed {summary['seed']}, {_duration(summary['wall_time_s'])}."
        ),
        Heading("Results"),
        _results(summary),
        Paragraph(
            f"Mean [95% interval] over {' or '.join(map(str, sorted(units)))} held-out prompts or pairs. The intervals cover the "
            "evaluation alone: one training run each, so a second seed may differ by more than they say."
        ),
        *_overlap(summary["config"]),
    ]
    for block in pictures:
        blocks.append(block)
    blocks += [*_equal_tables(curves), Heading("What the evaluation tells apart")]
    for metric in ("reward", "judge"):
        sentences = findings(summary, metric)
        if sentences:
            blocks += [Paragraph(f"By {COLUMNS[metric][0]} at the end of training:"), Bullets(sentences)]
    pairs = len(summary["objectives"]) * (len(summary["objectives"]) - 1) // 2
    blocks.append(
        Paragraph(
            f"Each of the {pairs} comparisons uses a 95% interval, so about one in twenty would exclude 0 by chance if nothing "
            "differed. The runs end at different KL: for what an objective buys at equal KL, read the frontier."
        )
    )
    if samples:
        count = max(map(len, samples.values()))
        which = (
            f"The first {SHOWN} of {count} held-out prompts, not chosen." if count > SHOWN else "All held-out prompts."
        )
        blocks += [Heading("Samples before and after training"), Paragraph(which)]
        blocks += [Samples(_label(name), rows[:SHOWN]) for name, rows in samples.items()]
    return [*blocks, Heading("What was run"), *_settings(summary)]


def _overlap(config: Mapping) -> list[Paragraph]:
    if "held_out_prompts_seen" not in config:
        return []
    return [
        Paragraph(
            f"No held-out prompt is a training prompt; {config['held_out_prompts_seen']} of {config['held_out_prompts']} begin "
            "or continue one, since both are short and sampled from one model."
        )
    ]


def _with_differences(summary: Mapping, curves: Mapping) -> dict:
    """The summary, with paired differences of the final evaluations where these kept one number a prompt."""
    final = {name: points[-1].get("by_prompt", {}) for name, points in curves.items()}
    known = set.intersection(*map(set, final.values())) & {"reward", "judge"}
    made = {
        metric: paired_differences({name: values[metric] for name, values in final.items()}, seed=summary["seed"])
        for metric in known
    }
    return {**summary, "differences": made | summary.get("differences", {})}


def _settings(summary: Mapping) -> list:
    """Every setting and version: one table for what all objectives share, one for where they differ."""
    config = dict(summary["config"])
    each = [dict(run) for run in config.pop("objectives", [])]
    keys = dict.fromkeys(key for run in each for key in run)
    differing = [key for key in keys if any(run.get(key) != each[0].get(key) for run in each)]
    config |= {key: each[0][key] for key in keys if key not in differing}
    config |= {f"version of {name}": version for name, version in summary["versions"].items()}
    shared = Table(["setting", "value"], [[key, str(value)] for key, value in config.items() if value is not None])
    if not differing:
        return [shared]
    differing.sort(key=lambda key: key != "loss_type")  # it names the row
    return [
        shared,
        Table(differing, [["-" if run.get(key) is None else str(run[key]) for key in differing] for run in each]),
    ]


def _figures(curves: Mapping, training: Mapping | None) -> dict[str, Figure]:
    """The pictures there is data for."""
    known = set.intersection(*(set(point) for points in curves.values() for point in points))
    figures = {"frontier": plots.frontier(curves)}
    if "judge" in known:
        figures["frontier_judge"] = plots.frontier(curves, "judge")
    if "seqkl_margin" in known:
        figures["seqkl"] = plots.seqkl(curves)
    figures["diversity"] = plots.diversity(curves)
    if training:
        figures["training"] = plots.training(training)
    return figures


def _results(summary: Mapping) -> Table:
    rows = ({"start": summary["start"]} if "start" in summary else {}) | dict(summary["objectives"])
    metrics = [metric for metric in COLUMNS if any(metric in row for row in rows.values())]
    body = [[_label(name), *(_cell(row.get(metric), metric) for metric in metrics)] for name, row in rows.items()]
    return Table(["", *(COLUMNS[metric][0] for metric in metrics)], body)


def _equal_tables(curves: Mapping) -> list:
    blocks: list = []
    for x, y, title in (("kl", "reward", "Reward at equal KL"), ("reward", "entropy", "Entropy at equal reward")):
        levels, rows = at_equal(curves, x, y)
        if levels:
            digits = COLUMNS[y][1]
            body = [
                [_label(name), *("-" if v is None else f"{v:.{digits}f}" for v in row)] for name, row in rows.items()
            ]
            blocks += [Heading(title), Table([COLUMNS[x][0], *(f"{level:g}" for level in levels)], body)]
    if blocks:
        blocks.append(Paragraph("Read off the curves by linear interpolation; - where a run never gets there."))
    return blocks


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


def _scores(row: Mapping, side: str) -> str:
    judge = row.get(f"{side}_judge")
    return f"reward {row[f'{side}_reward']:.2f}" + ("" if judge is None else f", judge {judge:.2f}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _md(text: str) -> str:
    """Text in which Markdown and HTML find nothing to interpret, on one line."""
    text = re.sub(r"([\\`*_|~#]|\](?=[(\[:]))", r"\\\1", " ".join(str(text).split()))
    return html.escape(text, quote=False)


def _md_row(cells: Sequence[str], raw: bool = False) -> str:
    return "| " + " | ".join(cell if raw else _md(cell) for cell in cells) + " |"


def _html_block(block) -> str:
    escape = html.escape
    match block:
        case Heading(text):
            return f"<h2>{escape(text)}</h2>"
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
        case Table(header, rows):
            head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
            body = "".join(
                f'<tr><th scope="row">{escape(name)}</th>'
                + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
                + "</tr>"
                for name, *cells in rows
            )
            return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        case Picture(path, caption):
            data = base64.b64encode(path.read_bytes()).decode()
            image = f'<div class="scroll"><img alt="{escape(caption)}" src="data:image/png;base64,{data}"></div>'
            return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
        case Samples(title, rows):
            return f"<h3>{escape(title)}</h3>" + "".join(_html_sample(row) for row in rows)
    raise TypeError(f"no rendering for {block!r}")


def _html_sample(row: Mapping) -> str:
    sides = "".join(
        f'<div><span class="score">{side}, {html.escape(_scores(row, side))}</span>\n{html.escape(row[side].strip())}</div>'
        for side in ("before", "after")
    )
    prompt = f'<span class="prompt">prompt:</span> {html.escape(row["prompt"])}'
    return f'<div class="sample">{prompt}<div class="sides">{sides}</div></div>'
