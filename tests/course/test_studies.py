"""What chapters say of the stored studies."""

import ast
import json
import re
from pathlib import Path

import pytest

from tpo_course import studies
from tpo_lib.studies import page

ROOT = Path(__file__).parents[2]


def tables_of_verdicts():
    """(chapter, arguments, stored output) of every table of verdicts in the chapters."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            asked = re.search(r"^studies\.verdicts\((.*)\)$", "".join(cell["source"]), re.MULTILINE)
            if cell["cell_type"] == "code" and asked:
                (shown,) = cell["outputs"]
                yield path.stem, ast.literal_eval(f"[{asked[1]}]"), "".join(shown["data"]["text/markdown"])


STORED = list(tables_of_verdicts())


@pytest.mark.parametrize(("chapter", "asked", "shown"), STORED, ids=[f"{each[0]} {each[1]}" for each in STORED])
def test_a_stored_table_of_verdicts_is_that_of_the_results(chapter, asked, shown, monkeypatch):
    """The rows are read from the study's page, which a test of its own writes anew."""
    said = (ROOT / "studies" / "results" / f"{asked[0]}.md").read_text(encoding="utf-8")
    rows = said.partition("## Claims")[2].partition("##")[0].strip().partition("\n\n")[0].splitlines()[2:]
    monkeypatch.setattr(page, "claim_rows", lambda *_: [row.strip("| ").split(" | ") for row in rows])
    assert studies.verdicts(*asked).data == shown


def test_a_chapter_shows_the_claims_that_it_names():
    every, some = studies.verdicts("frontier").data, studies.verdicts("frontier", "TDPO1").data
    assert every.splitlines()[0] == "| " + " | ".join(studies.COLUMNS) + " |"
    assert some.splitlines()[:2] == every.splitlines()[:2]
    assert len(every.splitlines()) - 2 == len(studies.load("frontier")[0].hypotheses)
    assert some.splitlines()[2:] == [line for line in every.splitlines()[2:] if "TDPO1" in line.split(" | ")[0]]
    assert page.table(studies.COLUMNS, []) in some


def test_a_word_that_no_claim_has_is_refused():
    with pytest.raises(ValueError, match="no claim of study 'frontier' says 'TPO3'; they are: TDPO2's frontier"):
        studies.verdicts("frontier", "TPO3")
    with pytest.raises(FileNotFoundError, match="there is no such study; there are"):
        studies.verdicts("frontiers")
