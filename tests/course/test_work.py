"""The learner's working copy: follows the course, never takes anything from a learner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tpo_course import notebooks, work


def _chapter(path: Path, *sources: str, output: str = "") -> None:
    path.parent.mkdir(exist_ok=True)
    cells = [nbformat.v4.new_code_cell(source, id=f"c{i}") for i, source in enumerate(sources)]
    if output:
        cells[0].outputs = [nbformat.v4.new_output("stream", text=output)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


@pytest.fixture
def folders(tmp_path):
    source, mine = tmp_path / "course", tmp_path / "work"
    _chapter(source / "01_a.ipynb", "x = 1", "def f():\n    ...")
    _chapter(source / "02_b.ipynb", "y = 1")
    (source / "notation.md").write_text("# Notation\n")
    assert work.bring(mine, source=source).new == ["01_a.ipynb", "02_b.ipynb", "notation.md"]
    return source, mine


def _everything(folder: Path) -> set[bytes]:
    return {path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != work.RECORD}


def test_what_was_not_touched_follows_the_course(folders):
    source, mine = folders
    _chapter(source / "01_a.ipynb", "x = 2", "def f():\n    ...")
    told = work.bring(mine, source=source)
    assert (told.updated, told.kept, told.moved) == (["01_a.ipynb"], [], {})
    assert (mine / "01_a.ipynb").read_bytes() == (source / "01_a.ipynb").read_bytes()
    assert not (mine / work.BEFORE).exists()
    assert work.say(work.bring(mine, source=source), mine) == f"{mine}: up to date"


def test_what_was_changed_stays_and_is_named_until_it_is_asked_for(folders):
    source, mine = folders
    _chapter(mine / "01_a.ipynb", "x = 1", "def f():\n    return 3")
    answer = (mine / "01_a.ipynb").read_bytes()
    assert work.bring(mine, source=source) == work.Told()  # the course has nothing newer: no word
    _chapter(source / "01_a.ipynb", "x = 2", "def f():\n    ...")
    for _ in range(2):
        told = work.bring(mine, source=source)
        assert told == work.Told(kept=["01_a.ipynb"])
        assert (mine / "01_a.ipynb").read_bytes() == answer
    assert "01_a.ipynb: yours is kept" in work.say(told, mine)
    assert "python -m tpo_course.work --new 01 " in work.say(told, mine)
    told = work.bring(mine, renew=["01"], source=source)
    assert told.moved == {"01_a.ipynb": mine / "before/01_a-1.ipynb"}
    assert (mine / "before/01_a-1.ipynb").read_bytes() == answer
    assert (mine / "01_a.ipynb").read_bytes() == (source / "01_a.ipynb").read_bytes()


def test_what_was_only_run_follows_the_course_and_the_run_is_kept(folders):
    source, mine = folders
    _chapter(mine / "02_b.ipynb", "y = 1", output="what I saw")
    assert work.bring(mine, source=source) == work.Told()
    _chapter(source / "02_b.ipynb", "y = 1", output="what the author saw")  # no other cells: nothing to bring
    assert work.bring(mine, source=source) == work.Told()
    _chapter(source / "02_b.ipynb", "y = 2")
    told = work.bring(mine, source=source)
    assert told.updated == ["02_b.ipynb"]
    assert b"what I saw" in told.moved["02_b.ipynb"].read_bytes()


def test_a_name_that_the_course_takes_later_stays_the_learners(folders):
    source, mine = folders
    _chapter(mine / "03_c.ipynb", "mine")
    (mine / "notes.txt").write_text("mine")
    _chapter(source / "03_c.ipynb", "theirs")
    assert work.bring(mine, source=source).kept == ["03_c.ipynb"]
    assert b"mine" in (mine / "03_c.ipynb").read_bytes()


def test_nothing_is_lost_whatever_happens(folders):
    """Twenty pulls, each with another mix of edits, runs, deletions, wishes and lost records: every text ever saved is there."""
    import random

    source, mine = folders
    draw, written = random.Random(0), set()
    for turn in range(20):
        for name in ("01_a.ipynb", "02_b.ipynb"):
            if draw.random() < 0.5:
                _chapter(source / name, f"course {turn}")
            what = draw.choice(["edit", "run", "leave", "broken"])
            if what == "edit":
                _chapter(mine / name, f"mine {turn}", output=draw.choice(["", "seen"]))
            elif what == "broken":
                (mine / name).write_text(f"no notebook {turn}")
            elif what == "run":
                book = nbformat.from_dict(json.loads((source / name).read_text()))
                book.cells[0].outputs = [nbformat.v4.new_output("stream", text=f"run {turn}")]
                nbformat.write(book, mine / name)
            if what != "leave":
                written.add((mine / name).read_bytes())
        if draw.random() < 0.2:
            (mine / work.RECORD).unlink(missing_ok=True)
        before = _everything(mine)
        work.bring(mine, renew=draw.choice([[], ["01"], ["0"]]), source=source)
        lost = before - _everything(mine)
        assert not [each for each in lost if each in written]
        written &= before  # what the learner wrote over


@pytest.mark.parametrize(
    ("renew", "record", "said"),
    [
        (["99"], None, "no chapter is called 99; there are 01_a"),
        ([], "{}", "is no record of this version: move it away"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(folders, renew, record, said):
    source, mine = folders
    if record:
        (mine / work.RECORD).write_text(record)
    before = _everything(mine)
    _chapter(source / "02_b.ipynb", "y = 2")
    with pytest.raises(ValueError, match=said):
        work.bring(mine, renew=renew, source=source)
    assert _everything(mine) == before
    with pytest.raises(ValueError, match="holds the course itself"):
        work.bring(source, source=source)
    with pytest.raises(ValueError, match="holds no chapters"):
        work.bring(mine, source=mine / "nowhere")


def test_a_chapter_runs_in_the_working_copy(tmp_path):
    """From the command line, with the real chapters; imports and links lead where they lead in the course."""
    from nbclient import NotebookClient

    subprocess.run([sys.executable, "-m", "tpo_course.work", str(tmp_path / "work")], check=True, cwd=tmp_path)
    assert {path.name for path in notebooks.course()} <= set(os.listdir(tmp_path / "work"))
    book = nbformat.read(tmp_path / "work/01_preferences.ipynb", as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"][:2]  # set-up and imports
    book.cells = [
        *code,
        nbformat.v4.new_code_cell("print(check.win_probability(lambda reward_w, reward_l: None).status)"),
    ]
    NotebookClient(book, timeout=120, resources={"metadata": {"path": str(tmp_path / "work")}}).execute()
    assert book.cells[-1].outputs[-1].text == "not attempted\n"
