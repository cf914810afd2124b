"""What all studies say together: their index, and one table of every claim, for studies/README.md and README.md."""

from __future__ import annotations

import os
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tpo_lib.losses import OBJECTIVES
from tpo_lib.studies import analysis, page, study
from tpo_lib.studies.spec import Study

FRONTIER, KINDS = "frontier", ("area", "equal_area")  # the study that ranks the objectives, and by what
PLAIN = re.compile(rf"({'|'.join(OBJECTIVES)})( α[\d.]+)?")  # the label of an objective as it is
PAPERS = ("DPO", "TDPO", "TGDPO")  # how the sources of their claims begin
MARKS = "<!-- claims: written by `python -m tpo_lib study` -->", "<!-- end of claims -->"
WAIT = "<!-- what has not run: written by the same command -->", "<!-- end of what has not run -->"
INDEX = """# Studies

Every claim of the two papers that this bench can decide, over several seeds; where objectives are ranked, with settings
chosen on other prompts.
[The plan](PLAN.md) says what was to count, and was written first. `python -m tpo_lib study NAME` makes a study again, `--all` all
of them; what was run is kept in runs/studies, and an interrupted study goes on where it was.

This page is written by that command. A verdict with a star has a caveat, which stands in its row of the claims."""


def index(folder: Path) -> str:
    """What studies/README.md says: every study's question, verdicts, page and picture, and the table of all claims."""
    done, rows = {plan.name: result for plan, result in finished(folder)}, []
    for plan in plans(folder):
        if plan.name not in done:
            rows.append([plan.title, plan.question, "not run yet, or changed since"])
            continue
        rows_of = page.claim_rows(plan, done[plan.name])
        verdicts = Counter(re.sub(r" \(.*\)$", "\\*", words) for *_, words in rows_of)
        said = "; ".join(f"{words} ({count})" for words, count in verdicts.items())
        rows.append([f"[{plan.title}](results/{plan.name}.md)", plan.question, said or "-"])
    parts = [INDEX, waiting(folder), page.table(["study", "question", "verdicts"], rows), "## Claims", claims(folder)]
    parts += ["## Pictures", *pictures(folder)]
    return "\n\n".join(part for part in parts if part) + "\n"


def pictures(folder: Path) -> list[str]:
    """Of every study that has a result its title and the first picture of its page."""
    found = []
    for plan, _ in finished(folder):
        at = f"results/{plan.name}.md"
        drawn = page.PICTURE.search((folder / at).read_text(encoding="utf-8"))
        if drawn:
            found.append(f"[{plan.title}]({at}): {plan.question}\n\n![{drawn[1]}](results/{drawn[2]})")
    return found


def waiting(folder: Path) -> str:
    """A sentence on the studies of the plan that have no result; "" where all have one."""
    known, done = plans(folder), {plan.name for plan, _ in finished(folder)}
    missing = [plan.title for plan in known if plan.name not in done]
    which = f"({'; '.join(missing)}): their claims have no row."
    return f"Of the plan's {len(known)} studies {len(missing)} have no result yet {which}" if missing else ""


def plans(folder: Path) -> list[Study]:
    """All studies, in the order of the plan."""
    return sorted(map(Study.read, folder.glob("*.toml")), key=lambda plan: (plan.number, plan.name))


def finished(folder: Path) -> list[tuple[Study, dict]]:
    """The studies that have a result of what their files ask."""
    there = [plan for plan in plans(folder) if (folder / "results" / f"{plan.name}.json").is_file()]
    found = [(plan, study.read(folder, plan.name)) for plan in there]
    return [(plan, result) for plan, result in found if result["digest"] == plan.digest]


def claims(folder: Path, at: Path | None = None, *, of: Sequence[str] = ("",)) -> str:
    """One table of all claims: those that studies decide, exact ones, those of other figures, those that nobody tested here.

    Args:
        folder: of the studies.
        at: of the document that has the table; None is `folder` itself.
        of: how the sources begin whose claims are wanted; "" is every one.
    """

    def link(words: str, path: Path) -> str:
        return f"[{words}]({Path(os.path.relpath(path, at or folder)).as_posix()})"

    rows = [
        [*row[:-1], link(row[-1], folder / "results" / f"{plan.name}.md")]
        for plan, result in finished(folder)
        for row in page.claim_rows(plan, result)
    ]
    for each in _told(folder, "exact"):
        where = link(each["verdict"], folder.parent / "notebooks" / f"{each['chapter']}.ipynb")
        rows.append([each["claim"], each["source"], "-", f"exact world: {each['here']}", where])
    for each in _told(folder, "measured"):
        where = link(each["verdict"], folder.parent / each["where"])
        rows.append([each["claim"], each["source"], each.get("paper", "-"), each["here"], where])
    for each in _told(folder, "untestable"):
        said = each.get("verdict", "cannot be tested here")
        rows.append([each["claim"], each["source"], each.get("paper", "-"), each["why"], said])
    return page.table(page.CLAIMS, [row for row in rows if row[1].startswith(tuple(of))])


def verdicts(folder: Path) -> dict:
    """What the studies of the bundled model say, for a run's report.

    Returns:
        claims: [{"claim", "objectives", "here", "verdict", "study"}] of the papers' claims; frontier: see `_frontier`, None where
        that study has no result.
    """
    said, frontier = [], None
    for plan, result in finished(folder):
        if plan.data["preset"] != "pocket":
            continue
        frontier = _frontier(plan, result) if plan.name == FRONTIER else frontier
        for claim, (words, source, _, here, verdict) in zip(
            plan.hypotheses, page.claim_rows(plan, result), strict=True
        ):
            names = {side.split()[0] for pair in claim["pairs"] for side in pair if side.split()[0] in OBJECTIVES}
            row = {"claim": words, "objectives": sorted(names), "here": here, "verdict": verdict, "study": plan.title}
            said += [row] if source.startswith(PAPERS) else []
    return {"claims": said, "frontier": frontier}


def _frontier(plan: Study, result: Mapping) -> dict:
    """What ranks the objectives: {"number", "seeds", "chosen": {objective: label}, "between": {kind: nats}, "pairs"}.

    A pair is {"a", "b", "metric", "kind" of KINDS, "told": by p after Holm's correction, "mean", "low", "high"} of a - b, two
    objectives as they are.
    """
    kinds = {key: (kind, given[0]) for key, kind, given in study.keys(plan) if kind in KINDS}
    of = {label: found[1] for label in result["runs"] if (found := PLAIN.fullmatch(label))}
    found = [
        (kinds[key], row)
        for compared in (analysis.comparisons(plan, result), analysis.secondary(plan, result))
        for key in (each for each in kinds if each in compared)
        for row in compared[key]
        if {row["a"], row["b"]} <= of.keys() and of[row["a"]] != of[row["b"]] and row["mean"] is not None
    ]
    pairs = [
        {"a": row["a"], "b": row["b"], "metric": metric, "kind": kind, "told": row["holm"] < analysis.LEVEL}
        | {name: round(row[name], 9) for name in ("mean", "low", "high")}
        for (kind, metric), row in found
    ]
    between = {each["kind"]: each["between"] for each in plan.endpoints if each["kind"] in KINDS}
    seeds = len(plan.report["seeds"])
    return {"number": plan.number, "seeds": seeds, "chosen": result["best"], "between": between, "pairs": pairs}


def _told(folder: Path, name: str) -> list[dict]:
    return tomllib.loads((folder / "claims" / f"{name}.toml").read_text(encoding="utf-8"))["claim"]


def show(text: str, folder: Path) -> str:
    """The text of the repository's README with the papers' claims, and what has not run, between its marks."""
    for (first, last), said in ((MARKS, claims(folder, folder.parent, of=PAPERS)), (WAIT, waiting(folder))):
        between = f"{re.escape(first)}.*?{re.escape(last)}"
        text = re.sub(between, lambda _, new=f"{first}\n{said}\n{last}": new, text, flags=re.DOTALL)
    return text
