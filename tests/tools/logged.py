"""The runs of fixtures/doctor_logs.json.gz as logs, the way three kinds of users have them, and what the rules say of them.

python tests/tools/logged.py writes the tables of docs/doctor.md anew.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tpo_course.bugs import BUGS, RECIPES
from tpo_lib.files.load import POCKET
from tpo_lib.tools.doctor.logs import Log, log_of
from tpo_lib.tools.doctor.rules import RULES, SEVERITIES, examine

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests" / "fixtures" / "doctor_logs.json.gz"
VIEWS = {
    "ours": "all that our loop logs, with the run's settings",
    "trl": "TRL's defaults with evaluations: no kl/*, no first update by itself, no settings",
    "bare": "training rows alone, without settings",
}
HEALTHY = ("sft", "dpo", "tdpo1", "tdpo2", "tgdpo", "simpo", "ipo")
OTHERS = ("unknown", "B outside", "rate too high", "rate too low", "labels random", "labels swapped")
OTHERS += ("held-out labels swapped", "overfit", "floor")
WORDS = {"unknown": "reference overwritten every four updates", "B outside": "beta outside the sigmoid"}
INSTEAD = {  # of the bugs that a log alone cannot show, or not in every form
    "C": "the run's own beta (--beta); `--objective`, of the loss itself",
    "D": "`--model --ref --pairs`: log-rewards",
    "E": "`--model --pairs`: log-logps",
    "F": "`--objective`, of the loss itself; chosen-kl where a run is long",
    "G": "guide-beta, in the folder of a run of ours; `--objective`, of the loss itself",
    "I": "`--model --pairs`: log-logps names it",
    "J": "`--model --ref --pairs`: log-logps names it, or log-rewards",
    "K": "not-finite, once it has struck",
    "labels swapped": "`--model --ref --pairs`, of pairs whose labels are right",
}


@cache
def runs() -> list[dict]:
    """Every run of the file."""
    return json.loads(gzip.decompress(FILE.read_bytes()))["runs"]


def rows_of(run: dict, view: str = "ours") -> list[dict]:
    """The rows of a run, as they would lie in its file."""
    rows = []
    for part in ("train", "eval") if view != "bare" else ("train",):
        names = [name for name in run[part] if view == "ours" or not ("kl/" in name or "guidance/" in name)]
        columns = [run[part][name] for name in names]
        rows += [dict(zip(names, map(float, values), strict=True)) for values in zip(*columns, strict=True)]
    # trainers average over the rows since the last one: the first update alone is an option there, as is an evaluation before
    return [row for row in rows if view == "ours" or row["step"] > 1]


def as_log(run: dict, view: str = "ours") -> Log:
    """A run as `doctor` would read it."""
    settings = run["settings"] if view == "ours" else {}
    return log_of(rows_of(run, view), f"{run['kind']} {run['seed']} {run['model']}", **settings)


def bundled() -> list[Log]:
    """The recorded runs of chapter 0, with what they were trained with."""
    made = json.loads((POCKET.parent / "runs.json").read_text())["runs"]
    names = ("objective", "beta", "alpha")
    named = [" ".join(str(run[name]) for name in names) for run in made]
    told = [{"loss_type": run["objective"], "beta": run["beta"], "alpha": run["alpha"]} for run in made]
    return [log_of(run["training"], name, **known) for run, name, known in zip(made, named, told, strict=True)]


def said(kinds: Sequence[str], view: str, half: int) -> tuple[int, list[set[tuple[str, str]]]]:
    """Of the runs whose seed is odd (half 1) or even (0): {(rule, severity)} of each, without what is normal."""
    mine = [run for run in runs() if run["kind"] in kinds and run["seed"] % 2 == half]
    found = [examine(as_log(run, view))[0] for run in mine]
    return len(mine), [{(f.rule, f.severity) for f in each if f.severity != "normal"} for each in found]


def _row(words: str, kind: str) -> str:
    cells, named = [], {}
    for view in VIEWS:
        count, found = said((kind,), view, 1)
        wrong = sum(any(severity == "wrong" for _, severity in each) for each in found)
        look = sum(bool(each) for each in found) - wrong
        cells.append(f"{wrong} + {look} of {count}")
        for rule in {rule for each in found for rule, _ in each}:
            named[rule] = max(named.get(rule, 0), sum(rule in dict(each) for each in found) / count)
    rules = ", ".join(sorted((rule for rule in named if named[rule] >= 0.5), key=lambda rule: (-named[rule], rule)))
    return f"| {words} | {' | '.join(cells)} | {rules or '-'} | {INSTEAD.get(kind, '')} |\n"


def rates() -> str:
    """The table of hits and false alarms on the half of the runs that the rules were not developed on."""
    head = "| runs | ours | TRL | bare | rules that speak in half of them or more | what finds it instead |\n"
    table = head + "|---|---|---|---|---|---|\n"
    table += "".join(_row(f"healthy {kind}", kind) for kind in HEALTHY)
    bugs = sorted((recipe.bug, case) for case, recipe in RECIPES.items() if len(case) == 1)
    table += "".join(_row(f"bug {bug}, {BUGS[bug]} (run {case})", case) for bug, case in bugs)
    return table + "".join(_row(WORDS.get(kind, kind), kind) for kind in OTHERS)


def rules() -> str:
    """The table of rules, the worst first."""
    table = "| rule | severity | what it says | why | try |\n|---|---|---|---|---|\n"
    for rule in sorted(RULES, key=lambda rule: SEVERITIES.index(rule.severity)):
        chapter = f"[{rule.chapter.replace('.ipynb', '')}](../notebooks/{rule.chapter.partition(':')[0]})"
        table += f"| `{rule.name}` | {rule.severity} | {rule.title} | {rule.why} {chapter} | {rule.advice} |\n"
    return table


def main() -> None:
    page = ROOT / "docs" / "doctor.md"
    text = page.read_text(encoding="utf-8")
    for name, table in (("rates", rates()), ("rules", rules())):
        marks = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        text = re.sub(f"{marks[0]}.*?{marks[1]}", lambda _, t=table, m=marks: m[0] + t + m[1], text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
