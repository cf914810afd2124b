"""Every row of the tables of claims stands where it says."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from tpo_lib.files import store
from tpo_lib.runs.verdicts import VERDICTS
from tpo_lib.studies import claims

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "studies"
EXACT = tomllib.loads((STUDIES / "claims" / "exact.toml").read_text(encoding="utf-8"))["claim"]


@pytest.mark.parametrize("claim", EXACT, ids=[each["claim"] for each in EXACT])
def test_what_is_decided_exactly_is_printed_by_its_chapter(claim):
    chapters = [claim[key] for key in ("chapter", "also") if key in claim]
    books = [json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")) for name in chapters]
    outputs = [output for book in books for cell in book["cells"] for output in cell.get("outputs", ())]
    printed = "".join("".join(output.get("text", ())) for output in outputs)
    assert [figure for figure in claim["shown"] if figure not in printed] == []
    said = re.findall(r"\d+\.\d+", claim["here"])
    assert [number for number in said if number not in "".join(claim["shown"])] == []


@pytest.mark.parametrize("name", ["README.md", "studies/README.md"])
def test_the_readmes_say_what_the_results_say(name):
    there = (ROOT / name).read_text(encoding="utf-8")
    assert there == (claims.index(STUDIES) if name.startswith("studies") else claims.show(there, STUDIES))
    first, _, rest = there.partition(claims.MARKS[0])
    assert "| verdict |" in (rest or first)
    for link in re.findall(r"\]\(((?!http)[^)#]+\.(?:md|ipynb|png))", there):
        assert (ROOT / name).parent.joinpath(link).exists(), link


def test_the_readme_of_the_repository_has_the_papers_claims_alone():
    rows = claims.claims(STUDIES, ROOT, of=claims.PAPERS).splitlines()[2:]
    every = claims.claims(STUDIES, ROOT).splitlines()[2:]
    assert 0 < len(rows) <= len(every)
    assert set(rows) <= set(every)
    assert all(row.split(" | ")[1].startswith(claims.PAPERS) for row in rows)


def test_reports_of_runs_say_what_the_results_say():
    assert store.read_json(VERDICTS, "") == json.loads(json.dumps(claims.verdicts(STUDIES)))
