"""The instructor's guide says what is so: chapters, sections, commands, minutes; and the list of errors is the checkers'."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re

import pytest

from tpo_course import notebooks
from tpo_lib import cli

DOCS = notebooks.ROOT / "docs"
GUIDE = (DOCS / "teach.md").read_text(encoding="utf-8")
CHAPTERS = {path.stem.partition("_")[0]: path for path in notebooks.course()}
CORE = re.compile(r"\*\*Time\*\* about (?:(\d+) h)?\s*(?:(\d+) min)?")


def _prose(path) -> str:
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def _rows(heading: str) -> list[list[str]]:
    table = GUIDE.split(f"### {heading}\n")[1].split("\n#")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_list_of_errors_is_what_the_checkers_know():
    spec = importlib.util.spec_from_file_location("common_errors", DOCS / "common_errors.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page() == module.PAGE.read_text(encoding="utf-8"), "write it again: python docs/common_errors.py"
    assert module.page().count("\n- ") > 350


@pytest.mark.parametrize("heading", ["Eight weeks", "Four weeks"])
def test_a_plan_has_every_chapter_once_and_its_hours(heading):
    planned = [row[1].split(", ") for row in _rows(heading)]
    assert [name for names in planned for name in names] == list(CHAPTERS)
    for names, row in zip(planned, _rows(heading), strict=True):
        found = [CORE.search(_prose(CHAPTERS[name])).groups(default="0") for name in names]
        hours = sum(int(h) + int(m) / 60 for h, m in found)
        assert hours / 1.15 <= float(row[2]) <= hours * 1.15, f"{names}: {hours:.1f} hours"


def test_the_workshop_lasts_ninety_minutes_in_sections_that_exist():
    rows = _rows("A workshop of 90 minutes")
    times = [tuple(map(int, row[0].split("-"))) for row in rows]
    assert [start for start, _ in times] == [0, *(end for _, end in times[:-1])]
    assert times[-1][1] == 90
    for _, place, what in rows:
        chapter, section = re.fullmatch(r"(\w+), section (\d+)", place).groups()
        text = _prose(CHAPTERS[chapter])
        assert re.search(rf"^## {section}\. ", text, re.MULTILINE), place
        for name in re.findall(r"write `(\w+)`", what):  # the exercise stands in that section
            cells = json.loads(CHAPTERS[chapter].read_text())["cells"]
            sources = ["".join(cell["source"]) for cell in cells]
            at = next(i for i, cell in enumerate(cells) if f"exercise:{name}" in cell["metadata"].get("tags", []))
            heads = [h for source in sources[:at] for h in re.findall(r"^## (\d+)\.", source, re.MULTILINE)]
            assert heads[-1] == section, f"{name} stands in section {heads[-1]}"


def test_every_chapter_has_a_question():
    assert re.findall(r"^- \*\*(\w+)\*\* ", GUIDE, re.MULTILINE) == list(CHAPTERS)


def test_commands_and_flags_exist():
    makefile = (notebooks.ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", GUIDE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for module in re.findall(r"python -m (tpo_course\.\w+)", GUIDE):
        assert callable(importlib.import_module(module).main)
    known = cli.build_parser("grade").commands["grade"]._option_string_actions
    flags = set(re.findall(r"`(--\w+)", GUIDE.split("## Grade")[1].split("\n## ")[0]))
    assert {"--seconds", "--memory", "--records", "--jobs"} <= flags <= set(known)
    defaults: dict[str, argparse.Action] = {name: known[name].default for name in ("--seconds", "--memory")}
    assert defaults == {"--seconds": 60.0, "--memory": 4.0}
    assert "60 seconds a task" in GUIDE
    assert "4 GiB" in GUIDE
