"""Every number that prose takes from a study is what the study's result gives; said.toml has a row a passage."""

import json
import math
import re
import tomllib
from functools import cache
from pathlib import Path
from statistics import stdev

import numpy as np
import pytest

from tpo_lib.runs import seeds
from tpo_lib.studies import analysis, figures, page, study, tables
from tpo_lib.studies.spec import Study

ROOT = Path(__file__).parents[2]
STUDIES, BOOKS = ROOT / "studies", sorted((ROOT / "notebooks").glob("*.ipynb"))
SAID = tomllib.loads((Path(__file__).parent / "said.toml").read_text(encoding="utf-8"))["said"]
MARKED = re.compile(r"\{([^{}]+)\}")  # a number in a row's words, with its interval where it has one
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d*\.\d+|\d+)|[a-z]+")
INTERVAL = re.compile(r"\[[-+]?[\d,]*\.?\d+, [-+]?[\d,]*\.?\d+\]")
WORDS = {"three": 3, "five": 5, "six": 6, "eight": 8, "eighth": 8, "ninth": 9, "ten": 10, "fifteen": 15}
WORDS |= {"third": 3, "fifth": 5}


@cache
def stored(name: str) -> tuple[Study, dict]:
    return Study.read(STUDIES / f"{name}.toml"), study.read(STUDIES, name)


@cache
def compared(name: str) -> dict[str, list[dict]]:
    """{endpoint: its comparisons}, those that decide a claim before all others."""
    return analysis.secondary(*stored(name)) | analysis.comparisons(*stored(name))


@cache
def summaries(name: str, key: str) -> dict[str, dict]:
    return analysis.summaries(stored(name)[1], key)


@cache
def text(name: str) -> str:
    """What a file says to a reader, white space as one space: of a notebook its Markdown cells."""
    said = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".ipynb"):
        cells = (each for each in json.loads(said)["cells"] if each["cell_type"] == "markdown")
        said = "\n\n".join("".join(each["source"]) for each in cells)
    return " ".join(said.split())


def readings(name: str, by: str | None) -> dict:
    """What the expressions of a row may call: readings of one study, of the endpoint `by` where they name no other."""
    plan, result = stored(name)

    def figure(row):
        return [row["mean"], row["low"], row["high"]]

    def mean(label, key=by):
        return figure(summaries(name, key)[label])

    def pair(a, b, key=by):
        both = {each: analysis.table(result, each, key) for each in (a, b)}
        return tables.paired(both, [(a, b)], seed=analysis.SEED)[0]

    def gap(a, b, key=by):
        return figure(pair(a, b, key))

    def detectable(a, b, key=by):
        return pair(a, b, key)["detectable"]

    def rows(key=by):
        """The comparisons of an endpoint, with their corrected p."""
        return compared(name)[key]

    def p(a, b, key=by, of="holm"):
        return next(row[of] for row in rows(key) if {row["a"], row["b"]} == {a, b})

    def seeds(label, key=by):
        """A mean a seed."""
        return analysis.table(result, label, key).mean(1).tolist()

    def ends(label, metric):
        """A number a seed, at its last evaluation."""
        return [run["points"][-1][metric] for run in result["runs"][label]]

    def start(label, metric):
        """A number a seed, before training."""
        return [run["points"][0][metric] for run in result["runs"][label]]

    def at(nats, label, metric):
        """The mean over seeds at a KL, straight in sqrt(KL)."""
        kl, curves, _ = figures.mean_curve(page.methods(result)[label], metric)
        return float(np.interp(nats**0.5, kl**0.5, curves.mean(0)))

    def areas(method, **setting):
        """Of the settings that were tried, those with this one."""
        return [area for each, tried, area in result["grid"] if each == method and setting.items() <= tried.items()]

    def labels(*begin):
        return [label for label in result["runs"] if label.startswith(begin)]

    return locals()


def up(x: float) -> float:
    """Rounded up to thousandths: a bound."""
    return math.ceil(1000 * x) / 1000


PLAIN = {each.__name__: each for each in (abs, len, math.log, max, min, sorted, stdev, sum, up)}  # beside `readings`


def stands(written: str, value: float) -> bool:
    """Whether a number is written as it rounds: to the digits that it has, or, from 100 on, to its last that is no 0."""
    if written in WORDS:
        return round(value) == WORDS[written]
    plain = written.replace(",", "")
    digits = len(plain.partition(".")[2])
    if not digits and len(plain) > 2:
        digits = len(plain.rstrip("0")) - len(plain)
    return round(value, digits) == float(plain)


@pytest.mark.parametrize("row", SAID, ids=lambda row: f"{Path(row['file']).stem}: {row['words'][:40]}")
def test_prose_says_what_a_result_gives(row):
    assert text(row["file"]).count(MARKED.sub(r"\1", row["words"])) == 1, "these words stand there once"
    marked = [NUMBER.findall(each) for each in MARKED.findall(row["words"])]
    known = {"__builtins__": PLAIN} | readings(row["study"], row.get("by"))
    for written, how in zip(marked, row["is"], strict=True):
        found = eval(how, known)
        values = found[: len(written)] if isinstance(found, list) else [found]
        wrong = [pair for pair in zip(written, values, strict=True) if not stands(*pair)]
        assert wrong == [], how


@pytest.mark.parametrize(
    "name",
    ["README.md", "docs/findings.md", "studies/claims/after.toml", *(f"notebooks/{path.name}" for path in BOOKS)],
)
def test_no_number_of_a_study_is_left_out(name):
    """Every interval in words or a caveat has its row, and of README "In short" and the findings every number of two decimals."""
    left = text(name)
    for words in [row["words"] for row in SAID if row["file"] == name]:
        left = left.replace(MARKED.sub(r"\1", words), MARKED.sub("", words))
    if name == "README.md":
        left = re.search("In short(.*?)<details>", left)[1]
    if name in ("README.md", "docs/findings.md"):
        assert re.findall(r"(?<![\d.])\.\d{2,}(?! of a reward)", left) == []
    assert INTERVAL.findall(left) == []


def test_p_over_a_whole_study_corrects_for_all_that_decides():
    plan, _ = stored("convergence")
    found = compared("convergence")
    rows = [row for key in analysis.read_first(plan) for row in found[key]]
    assert len(rows) > max(len(found[key]) for key in analysis.read_first(plan))
    assert [row["whole"] for row in rows] == seeds.holm([row["p"] for row in rows])
    assert all(row["whole"] >= row["holm"] for row in rows)
    assert all("whole" not in row for key in ("second_judge drop", "kl end") if key in found for row in found[key])
