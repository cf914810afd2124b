"""A class of notebooks, handed in as learners hand them in: points, misconceptions by name, and no row is ever lost."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nbformat
import pytest

from tpo_course import grade, handed_in, notebooks, progress
from tpo_course.exercise import SOLUTIONS, solution_source
from tpo_course.exercises import preferences
from tpo_course.grade_one import points_of
from tpo_lib.cli import main

IMPORTS = [
    "import os",
    "import torch\nimport torch.nn.functional as F",
    "from tpo_course.exercises import preferences as check",
]
RIGHT = {name: solution_source(SOLUTIONS / "preferences.py", name) for name in ("win_probability", "preference_nll")}
RIGHT |= {name: solution_source(SOLUTIONS / "preferences.py", name) for name in ("nll_gradient", "preferred_pairs")}
QUIZ = "".join("abcdefgh"[[o.right for o in q.options].index(True)] for q in preferences.quiz.questions)


def _write(path: Path, *sources: str, language: str = "python") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (*IMPORTS, *sources)])
    book.metadata["kernelspec"] = {"name": "x", "display_name": "x", "language": language}
    nbformat.write(book, path)
    return path


@pytest.fixture(scope="module")
def class_of_nine(tmp_path_factory):
    """Rows by learner; every notebook is another way to hand in a chapter."""
    folder = tmp_path_factory.mktemp("class")
    checks = [f"check.{name}({name})" for name in RIGHT]
    _write(folder / "ada.ipynb", *RIGHT.values(), *checks, f'check.quiz("{QUIZ}")')
    late = "def sign(x):\n    return torch.sigmoid(x)"
    _write(
        folder / "bo.ipynb",
        "%matplotlib inline\n!exit 1",
        "raise RuntimeError('a cell that no answer needs')",
        "def win_probability(reward_w, reward_l):\n    return sign(reward_l - reward_w)",
        "check.win_probability(win_probability)",
        late,
        "def preference_nll(w, l):\n    return -F.logsigmoid(w - l).mean()",  # no call of the checker
        "def nll_gradient(weights, differences):\n    return (",
        'check.quiz("' + ("b" if QUIZ[0] == "a" else "a") + QUIZ[1:] + '")',
    )
    _write(
        folder / "cy.ipynb",
        "def win_probability(reward_w, reward_l):\n    while True:\n        pass",
        "def preference_nll(reward_w, reward_l):\n    os._exit(3)",
        "def nll_gradient(weights, differences):\n    raise SystemExit",
        "blob = torch.zeros(2**33)\ndef preferred_pairs(scores, min_gap):\n    return blob",
        *checks,
    )
    (folder / "di.ipynb").write_text('{"cells": [')
    _write(folder / "ed.ipynb", RIGHT["win_probability"], language="R")
    (folder / "fay.ipynb").write_text(json.dumps({"cells": [], "metadata": {}}))
    book = nbformat.read(notebooks.FOLDER / "01_preferences.ipynb", as_version=4)
    (folder / "gil").mkdir()
    nbformat.write(book, folder / "gil/01.ipynb")
    _write(folder / "hal.ipynb", "from tpo_course.exercises import nothing as more")
    paths = [*grade.find([str(folder)]), folder / "ivy.ipynb"]
    rows = {path.name.split(".")[0]: grade.grade(path, seconds=20, memory=2) for path in paths}
    return {"gil" if name == "01" else name: row for name, row in rows.items()}


def _tasks(row: dict) -> dict[str, dict]:
    return {task["task"].removeprefix("preferences."): task for task in row["tasks"]}


def test_right_answers_get_all_points(class_of_nine):
    found = _tasks(class_of_nine["ada"])
    for name, task in found.items():
        expected = "correct" if name in (*RIGHT, "quiz") else "not attempted"
        assert task["status"] == expected, task
    own = {**preferences.chapter.tasks, "quiz": preferences.quiz}
    assert class_of_nine["ada"]["points"] == sum(points_of(own[name]) for name in (*RIGHT, "quiz"))
    assert class_of_nine["ada"]["of"] == sum(map(points_of, own.values())) > 0


def test_a_mistake_has_its_name_and_what_is_broken_its_place(class_of_nine):
    found = _tasks(class_of_nine["bo"])
    assert found["win_probability"]["mistakes"] == ["gap_reversed"]  # with a helper that is written below it
    assert found["preference_nll"]["status"] == "correct"
    assert found["nll_gradient"]["message"].startswith("Python cannot read cell 10, line 2: ")
    assert found["preferred_pairs"]["status"] == "not attempted"
    assert found["quiz"]["points"] == len(QUIZ) - 1
    assert found["quiz"]["mistakes"][0].startswith("question 1: ")


def test_loop_crash_exit_and_hunger_cost_one_task_each(class_of_nine):
    found = _tasks(class_of_nine["cy"])
    assert class_of_nine["cy"]["reason"] == ""
    assert found["win_probability"]["message"] == "It took longer than 20 s: an endless loop?"
    assert "status 3" in found["preference_nll"]["message"]
    assert "SystemExit" in found["nll_gradient"]["message"]
    assert "Cell 7 raised RuntimeError" in found["preferred_pairs"]["message"]
    assert "blob = torch.zeros(2**33)" in found["preferred_pairs"]["message"]
    assert {task["status"] for name, task in found.items() if name in RIGHT} == {"wrong"}


@pytest.mark.parametrize(
    ("learner", "reason"),
    [
        ("di", "is no notebook"),
        ("ed", "runs in R, not in Python"),
        ("fay", "imports no checker"),
        ("hal", "'nothing', which this course has not"),
        ("ivy", "cannot be opened: No such file"),
    ],
)
def test_what_cannot_be_judged_is_a_row_with_a_reason(class_of_nine, learner, reason):
    row = class_of_nine[learner]
    assert reason in row["reason"]
    assert (row["points"], row["tasks"]) == (0, [])


def test_an_untouched_chapter_has_nothing_attempted(class_of_nine):
    assert {task["status"] for task in class_of_nine["gil"]["tasks"]} == {"not attempted"}


def test_over_the_class(class_of_nine):
    rows = list(class_of_nine.values())
    found = grade.summary(rows)
    assert (found["notebooks"], found["judged"]) == (9, 4)
    assert found["tasks"]["preferences.preference_nll"] == {"correct": 2, "wrong": 1, "not attempted": 1}
    assert found["mistakes"]["preferences.win_probability: gap_reversed"] == 1
    table = list(csv.DictReader(grade.table(rows).splitlines()))
    assert len(table) == 9
    by_name = {Path(row["notebook"]).stem: row for row in table}
    assert by_name["bo"]["preferences.win_probability"] == "0"
    assert "gap_reversed" in by_name["bo"]["mistakes"]
    assert "not in Python" in by_name["ed"]["reason"]
    assert by_name["ada"]["points"] == str(class_of_nine["ada"]["points"])
    said = grade.words(rows)
    assert "4 of 9 notebooks judged" in said
    assert "1 x preferences.win_probability: gap_reversed" in said


def test_the_command_writes_both_files_and_reads_answers_of_widgets(tmp_path, monkeypatch, capsys):
    handed = _write(tmp_path / "=jo/a.ipynb")
    record = handed.parent / progress.NAME
    monkeypatch.setenv("TPO_PROGRESS", str(record))
    progress.forget()
    preferences.quiz(QUIZ)
    progress.forget()
    files = tmp_path / "out.json", tmp_path / "out.csv"
    monkeypatch.chdir(tmp_path)
    main(["grade", "=jo", "--records", "--json", str(files[0]), "--csv", str(files[1])])
    assert f"=jo/a.ipynb  {len(QUIZ):3d} of" in capsys.readouterr().out
    content = json.loads(files[0].read_text())
    assert content["summary"]["tasks"]["preferences.quiz"] == {"correct": 1}
    assert next(csv.DictReader(files[1].read_text().splitlines()))["notebook"] == "'=jo/a.ipynb"  # no formula
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        main(["grade", "empty"])
    assert capsys.readouterr().err == "ValueError: empty: no notebooks in there\n"


def test_only_what_an_answer_needs_is_run(tmp_path):
    path = _write(
        tmp_path / "a.ipynb",
        "scale = 2\nlost = 1 / 0",
        "scale *= 3",
        "table = {}\ntable['k'] = scale",
        "class Box:\n    size = scale",
        "def f(x):\n    return g(x) + later",
        "def g(x):\n    return table['k'] + Box.size",
        "check.win_probability(f)",
        "later = 5",
        "later_still = 6",
    )
    book = handed_in.read(path)
    answer = book.answer("win_probability", "preferences")
    wanted = book.needed(handed_in.uses(handed_in.call_of(answer)), answer.place)
    space = {}
    for statement in wanted:
        exec(handed_in.ast.unparse(statement.tree), space)
    assert space["f"](0) == 6 + 6 + 5
    assert "lost" not in space
    assert "later_still" not in space
    assert "torch" not in space
