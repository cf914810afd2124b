"""Every row of the tables of claims stands where it says."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest

from tpo_lib.files import store
from tpo_lib.runs.verdicts import VERDICTS
from tpo_lib.studies import claims, page, study
from tpo_lib.studies.spec import Study

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "studies"
MEASURED = tomllib.loads((STUDIES / "claims" / "measured.toml").read_text(encoding="utf-8"))["claim"]
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


@pytest.mark.parametrize("claim", MEASURED, ids=[each["claim"] for each in MEASURED])
def test_what_other_figures_decide_stands_where_it_says(claim):
    files = [ROOT / claim[key].partition("#")[0] for key in ("where", "also") if key in claim]
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    assert [figure for figure in claim["shown"] if figure not in text] == []
    said = re.findall(r"(?<![\d.])\d+\.\d+", claim["here"])
    assert [number for number in said if number not in "".join(claim["shown"])] == []


def test_dpo_spreads_as_little_as_tgdpo_at_the_same_settings():
    grid = [(name, setting, area) for name, setting, area in study.read(STUDIES, "frontier")["grid"]]
    of = {name: [each for each in grid if each[0] == name] for name in ("dpo", "tgdpo")}
    tried = {(setting["beta"], setting["lr"]) for _, setting, _ in of["tgdpo"]}
    same = [area for _, setting, area in of["dpo"] if (setting["beta"], setting["lr"]) in tried]
    theirs = [area for *_, area in of["tgdpo"]]
    assert (len(same), len(theirs)) == (4, 16)
    said = f"(.{1000 * (max(same) - min(same)):03.0f} against .{1000 * (max(theirs) - min(theirs)):03.0f})"
    assert any(said in claim["here"] for claim in MEASURED)


def test_every_caveat_is_printed_at_the_verdict_that_it_was_written_for():
    every = claims.claims(STUDIES)
    caveats = [claim for plan, _ in claims.finished(STUDIES) for claim in plan.claims if "verdict" in claim]
    assert len(caveats) > 5
    assert [each for each in caveats if f"{each['verdict']} ({each['caveat']})" not in every] == []


def test_what_has_not_run_is_said(tmp_path):
    shutil.copytree(STUDIES, tmp_path / "studies", ignore=shutil.ignore_patterns("*.md", "*.png", "*.py"))
    place, known = tmp_path / "studies", len(claims.plans(STUDIES))
    there = claims.waiting(place)
    missing = known - len(claims.finished(place))
    assert there.startswith(f"Of the plan's {known} studies {missing} have no result yet (") if missing else there == ""
    (place / "results" / "guides.json").unlink()
    assert f" {missing + 1} have no result yet (" in claims.waiting(place)
    assert "Guides" in claims.waiting(place)
    for path in place.glob("*.toml"):
        if not (place / "results" / f"{path.stem}.json").is_file():
            path.unlink()
    assert claims.waiting(place) == ""


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


def test_what_reports_say_of_pairs_stands_on_the_page_of_the_frontier():
    found = claims.verdicts(STUDIES)["frontier"]
    page_of = (STUDIES / "results" / "frontier.md").read_text(encoding="utf-8")
    low, high = found["between"]["equal_area"]
    headings = {"area": "area {}", "equal_area": f"{{}} over {low:g} to {high:g} nats"}
    assert {tuple(sorted((row["a"].split()[0], row["b"].split()[0]))) for row in found["pairs"]} == {
        ("dpo", "tdpo1"), ("dpo", "tdpo2"), ("tdpo1", "tdpo2"), ("dpo", "tgdpo"), ("simpo", "tgdpo"), ("dpo", "simpo"),
    }  # fmt: skip
    for row in found["pairs"]:
        heading = headings[row["kind"]].format(row["metric"].replace("_", " "))
        figures = f"{row['mean']:+z.4f} [{row['low']:+z.4f}, {row['high']:+z.4f}]"
        line = f"| {heading} | {page.label(row['a'])} - {page.label(row['b'])} | {figures} | "
        assert line in page_of
        p = page_of.partition(line)[2].partition(" |")[0]
        assert row["told"] == (p == "< .001" or float(p) < 0.05)


def test_reports_of_the_bundled_model_say_nothing_of_another(tmp_path):
    shutil.copytree(STUDIES / "claims", tmp_path / "claims")
    (tmp_path / "results").mkdir()
    text = (STUDIES / "frontier.toml").read_text(encoding="utf-8")
    (tmp_path / "frontier.toml").write_text(
        text.replace('preset = "pocket"', 'preset = "smollm2-135m"'), encoding="utf-8"
    )
    result = study.read(STUDIES, "frontier") | {"digest": Study.read(tmp_path / "frontier.toml").digest}
    study.write(tmp_path / "results" / "frontier.json", result)
    assert len(claims.finished(tmp_path)) == 1
    assert claims.verdicts(tmp_path) == {"claims": [], "frontier": None}


def test_a_claim_that_could_be_tested_and_was_not_is_not_called_untestable():
    (row,) = [
        row for row in claims.claims(STUDIES).splitlines() if row.startswith("| Dense token rewards make PPO better")
    ]
    assert row.endswith("| not tested |")
