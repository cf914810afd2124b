"""The page of a study, from its file and its result alone: question, verdicts, tables, pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tpo_lib.files import store
from tpo_lib.runs.plots import style_of
from tpo_lib.studies import across, analysis, conditions, figures, study
from tpo_lib.studies.spec import Study
from tpo_lib.studies.words import heading, versus

HOW = """Differences are paired by seed and prompt, with 95% intervals over both. *Holds*, and *the reverse does*, take a p below
.05 after Holm's correction over all comparisons of the study with that endpoint, and of rewards a judge that agrees. Where the
same correction over all that decide a claim of the study would not leave p below .05, that p stands beside. Intervals
are of one comparison, without that correction: one may exclude 0 where p is not below .05. *No gain that matters*: the whole
interval lies below the smallest gain that the plan calls one (.01 of a reward); a loss may be larger. *Not decided* is neither.
A claim that two do the same, to within a margin, holds where the whole interval lies inside the margin; no correction, no judge
and no p has a part in that. *No worse*: not so, but the interval lies above the margin's lower end. p is of a difference from 0.
It stands where it is not below .05, and with it what is detectable: the smallest true difference that one comparison, before the
correction, would tell from 0 in 8 of 10 repetitions."""
ACROSS = """Across the settings that were tried, by the area on validation prompts, one seed: exploratory. Intervals are over
settings, as if others might have been tried, and the two of a comparison are drawn independently."""
COST = """Sampled tokens of a run on pairs are all completions that its pairs were chosen from, at the start's mean length,
whenever it comes to the reward; its seconds are those of its updates alone: what sampling the pairs took is not known. Online
runs sample as they train, and both hold that. Seconds are the processor's, of the one thread that made a run."""
ELSEWHERE = """The same methods by the other endpoints, each a family of its own; no claim is decided by them. A pair is left out
where some seed never reaches the level."""
PICTURE = re.compile(r"^!\[(.*)\]\((.*)\)$", re.MULTILINE)  # (words, file) of a page's pictures
CLAIMS = ("claim", "claimed by", "there", "here: difference [95%]", "verdict")
DIGITS = {  # of the first that an endpoint's key begins with
    "kl per token": 3,
    "kl": 1,
    "entropy": 3,
    "ref_perplexity": 0,
    "updates": 0,
    "sampled tokens": 0,
    "seconds": 1,
    "seqkl_chosen": 1,
    "seqkl_rejected": 1,
    "seqkl_margin": 1,
}


def page(plan: Study, result: Mapping, pictures: Sequence[tuple[str, str]] = ()) -> str:
    """Markdown; `pictures` are (file, what it shows in words)."""
    compared = analysis.comparisons(plan, result)
    parts = [f"# {plan.title}: {plan.question}", _made(plan, result)]
    parts += [f"![{words}]({file})\n\n*{words.split('. ')[0]}.*" for file, words in pictures]
    if pictures and (more := plan.after.get("caption")):
        parts.insert(3, more)
    if plan.hypotheses:
        parts += ["## Claims", table(CLAIMS, claim_rows(plan, result)), HOW]
    parts += ["## Figures", endpoints_table(plan, result)]
    if any(each["kind"] in ("tokens_to", "seconds_to") for each in plan.endpoints):
        parts.append(COST)
    if compared:
        parts += ["## Comparisons", comparisons_table(compared)]
        if others := analysis.secondary(plan, result):
            parts += ["## Elsewhere", ELSEWHERE, comparisons_table(others)]
    if result["grid"]:
        parts += ["## Settings", settings_table(result), ACROSS, grid_table(plan, result)]
    return "\n\n".join(parts) + "\n"


def pictures(plan: Study, result: Mapping, folder: Path) -> list[tuple[str, str]]:
    """Draw what a study has to show beside its page; returns (file, what it shows in words) of each."""
    runs, drawn = methods(result), []

    def keep(name: str, figure, words: str) -> None:
        file = f"{plan.name}_{name}.png"
        store.write_file(folder / file, lambda path: figure.savefig(path, dpi=110))
        drawn.append((file, words))

    usual = ["conditions" if conditions.by_condition(runs) else "frontier"]
    for name in plan.report.get("pictures", usual):
        if name == "conditions":
            first = {plan.primary, *analysis.read_first(plan)}  # and the reward where all of them come
            wanted = [
                key
                for key, *how in study.keys(plan)
                if key in first or (how[0] == "equal_area" and how[1][0] == "reward")
            ]
            read = {heading(key): analysis.summaries(result, key) for key in wanted}
            keep(name, conditions.figure(read), conditions.alt(read))
        elif name == "frontier":
            for part, each in frontiers(plan, result, runs).items():
                best_of_n = result.get("best_of_n", ()) if part == name else ()
                keep(part, figures.frontier(each, best_of_n=best_of_n), figures.frontier_alt(each))
        elif name == "seqkl":
            keep(name, figures.seqkl(runs), figures.over_training_alt(runs))
        elif name == "growth":
            keep(name, figures.growth(runs), figures.growth_alt(runs))
        else:
            metrics = name.split()
            keep("_".join(metrics), figures.over_training(runs, metrics), figures.over_training_alt(runs, metrics))
    compared, families = analysis.comparisons(plan, result), {}
    for key in (each for each in compared if each in analysis.read_first(plan)):
        if all(row["mean"] is None for row in compared[key]):
            continue
        pairs = tuple((row["a"], row["b"]) for row in compared[key])
        families.setdefault(pairs, {})[f"{heading(key)}, difference"] = compared[key]
    for i, panels in enumerate(families.values(), start=1):
        keep(f"differences_{i}", figures.differences(panels), figures.differences_alt(panels))
    return drawn


def frontiers(plan: Study, result: Mapping, runs: Mapping) -> dict[str, dict]:
    """The methods of every picture of frontiers: each at its best, and of one that is reported for several values all of them."""
    families = {method.name: method.each for method in plan.methods if method.each}
    of = {label: result["chosen"][label][0] for label in runs}
    best = {result["best"].get(of[label], label) for label in runs}
    found = {"frontier": {label: each for label, each in runs.items() if label in best}}
    for name, each in families.items():
        found[f"frontier_{name}_{each}"] = {label: runs[label] for label in runs if of[label] == name}
    return found


def methods(result: Mapping) -> dict[str, list[dict]]:
    """{label: runs} as `figures` takes them: of every point the means alone."""
    return {
        label: [
            {
                "points": [
                    {"step": point["step"], "by_prompt": {k: [v] for k, v in point.items() if k != "step"}}
                    for point in run["points"]
                ]
            }
            for run in several
        ]
        for label, several in result["runs"].items()
    }


def claim_rows(plan: Study, result: Mapping) -> list[list[str]]:
    """A row a claim: who makes it, the paper's number, ours with interval, the verdict.

    Beside what decides it stands, where the claim names such pairs, what they give where all methods come (`equal_area`; without
    that, by the endpoint that decides); and a caveat, at the verdict that it was written for: *holds*, where it says no other.
    """
    compared, others, rows = analysis.comparisons(plan, result), analysis.secondary(plan, result), []
    even = next((key for key, kind, _ in study.keys(plan) if kind == "equal_area"), None)
    for claim in plan.claims:
        words, found = analysis.verdict(plan, result, claim, compared)
        ours = "; ".join(difference(row, analysis.read(plan, result, claim)[0]) for row in found)
        wanted, by = [tuple(pair) for pair in claim.get("beside", ())], even or analysis.read(plan, result, claim)[0]
        if beside := [difference(row, by) for row in others.get(by, ()) if (row["a"], row["b"]) in wanted]:
            ours += f". {f'At equal KL ({heading(even)})' if even else 'Beside it'}: {'; '.join(beside)}"
        words += f" ({claim['caveat']})" if "caveat" in claim and words == claim.get("verdict", analysis.HOLDS) else ""
        rows.append([claim["claim"], claim.get("source", "ours"), claim.get("paper", "-"), ours, words])
    return rows


def difference(row: Mapping, key: str) -> str:
    """A paired difference in words, with its interval; where it is not told from 0, its p and what would have been told."""
    names = versus(row["a"], row["b"])
    if row["mean"] is None:
        return f"{names}: one does not come there"
    digits = _digits(key)
    said = f"{names} {row['mean']:+z.{digits}f} [{row['low']:+z.{digits}f}, {row['high']:+z.{digits}f}]"
    if row["holm"] < analysis.LEVEL:
        return (
            said
            if row.get("whole", 0) < analysis.LEVEL
            else f"{said} (over all of the study p {p_words(row['whole'])})"
        )
    return f"{said} (p {p_words(row['holm'])}, detectable {row['detectable']:.{digits}f})"


def p_words(p: float) -> str:
    """A p-value to three digits."""
    return "< .001" if p < 0.001 else f"{p:.3f}"


def label(name: str) -> str:
    """How a method is called in texts."""
    return style_of(name).label


def endpoints_table(plan: Study, result: Mapping) -> str:
    """A row a method: every endpoint as mean [interval]; a dash where not every seed comes there."""
    every = [key for key, *_ in study.keys(plan)]
    found = {key: analysis.summaries(result, key) for key in every}
    rows = [[label(name), *(cell(found[key][name], key) for key in every)] for name in result["runs"]]
    return table(["", *map(heading, every)], rows)


def cell(metric: Mapping, key: str) -> str:
    """mean [low, high]."""
    digits = _digits(key)
    return (
        "-"
        if metric["mean"] is None
        else f"{metric['mean']:z.{digits}f} [{metric['low']:z.{digits}f}, {metric['high']:z.{digits}f}]"
    )


def comparisons_table(compared: Mapping[str, Sequence[Mapping]]) -> str:
    """A row a comparison: difference, corrected p, the smallest difference the design detects, the spread of the seeds."""
    rows = []
    for key, family in compared.items():
        for row in family:
            digits = _digits(key) + 1
            if row["mean"] is None:
                rows.append([heading(key), versus(row["a"], row["b"]), *["-"] * 6])
                continue
            interval = f"{row['mean']:+z.{digits}f} [{row['low']:+z.{digits}f}, {row['high']:+z.{digits}f}]"
            apart = [
                f"{value:.{digits}f}" if value is not None else "-"
                for value in (row["detectable"], row["seed_sd"], row["evaluation"])
            ]
            ps = [p_words(row[name]) if name in row else "-" for name in ("holm", "whole")]
            rows.append([heading(key), versus(row["a"], row["b"]), interval, *ps, *apart])
    return table(
        [
            "endpoint",
            "difference",
            "mean [95%]",
            "p (Holm)",
            "p (all that decide)",
            "detectable",
            "sd of seeds",
            "error of the evaluation (half its interval)",
        ],
        rows,
    )


def settings_table(result: Mapping) -> str:
    """What was chosen out of which grid, with its area on validation prompts."""
    rows, areas = [], {}
    for name, setting, area in result["grid"]:
        areas.setdefault(name, []).append((area, setting))
    for name, (method, setting) in result["chosen"].items():
        mine = [area for area, each in areas.get(method, ()) if each == setting]
        tried = len(areas.get(method, ()))
        rows.append([label(name), setting_words(setting), f"{mine[0]:.3f}" if mine else "-", str(tried or "-")])
    return table(["", "chosen setting", "area on validation prompts", "settings tried"], rows)


def grid_table(plan: Study, result: Mapping) -> str:
    """A row a method with a grid: how good its settings are, and how often one is above one of the first method's."""
    tried = {
        method.name: {"areas": [area for name, _, area in result["grid"] if name == method.name]}
        for method in plan.methods
    }
    tried = {name: scores for name, scores in tried.items() if len(scores["areas"]) > 1}
    first, rows = next(iter(tried)), []
    for name, scores in tried.items():
        mean = across.interquartile_mean(scores, seed=analysis.SEED)
        above = across.improvement(scores, tried[first], seed=analysis.SEED)
        said = "-" if name == first else f"{above.mean:.2f} [{above.low:.2f}, {above.high:.2f}]"
        rows.append(
            [label(name), *(f"{pick(scores['areas']):.3f}" for pick in (min, max)), cell(asdict(mean), "area"), said]
        )
    return table(["", "worst", "best", "interquartile mean [95%]", f"chance of being above {label(first)} [95%]"], rows)


def setting_words(setting: Mapping) -> str:
    """The numbers of a setting: "beta 0.1 lr 0.0003"."""
    numbers = {key: value for key, value in setting.items() if key != "loss_type" and not isinstance(value, str)}
    return " ".join(f"{key} {value:g}" for key, value in numbers.items())


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(each.replace("|", "\\|") for each in line) + " |" for line in lines)


def _digits(key: str) -> int:
    return next((digits for name, digits in DIGITS.items() if key.startswith(name)), 3)


def _made(plan: Study, result: Mapping) -> str:
    runs, hours = sum(map(len, result["runs"].values())), result["core_seconds"] / 3600
    grids = f", chosen from {len(result['grid'])} settings on validation prompts" if result["grid"] else ""
    whose = "by the clocks of the runs" if plan.after.get("by_the_clock") else "of a core"
    return (
        f"{runs} runs of {len(result['runs'])} methods over {len(plan.report['seeds'])} seeds{grids}; {hours:.1f} hours {whose}. "
        f"[The plan](../PLAN.md) says what was to count, and what was changed when. "
        f"`python -m tpo_lib study {plan.name}` makes them again."
    )
