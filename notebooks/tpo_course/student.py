"""A copy of the course for a class, without the answers: python -m tpo_course.student OUT (make student OUT=folder).

Out of the copy are the solutions, the tests, every folded answer and stored output that shows one, and what stands in a cell that
a learner is to fill. Checkers and hints work; their files are packed (`sealed`), so that no answer is met by chance. The library
and the derivations are what they are: a loss of `tpo_lib/losses.py` is the answer to the exercise that asks for it.

With --nbgrader the chapters lie in OUT/source/CHAPTER/, their cells marked as nbgrader wants them (schema 3): `nbgrader
generate_assignment CHAPTER` makes the release, and a test cell after every exercise is worth its difficulty; nbgrader_config.py
lets cells train.
"""

import ast
import html
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from tpo_course import cards, sealed
from tpo_course.exercise import Task
from tpo_course.grade_one import points_of, tasks_of
from tpo_course.notebooks import ROOT, course
from tpo_course.quiz import Quiz
from tpo_lib.cli import call
from tpo_lib.parser import Parser, check_room

PARTS = ("tpo_lib", "notebooks", "data", "docs", "studies", "configs")
SHEETS = ("pyproject.toml", "constraints.txt", "environment.yml", "LICENSE", "CITATION.cff", ".gitignore")
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "solutions", "teach.md", "common_errors.*")
YOURS = "# Your turn.\n"
README = """\
# Token-level preference optimization: the course

    make lab      # sets up what it needs (Python 3.11 or newer) and opens JupyterLab on your working copy, work/

Read the chapters in order; each has exercises whose checkers name your mistake. Hints unfold one at a time. Your teacher has
the solutions. Hand in the notebooks from `work/`, and `work/.progress.json`, which holds the answers that you gave by button.

Without make: `python3 -m venv .venv`, `.venv/bin/pip install -e . jupyterlab -c constraints.txt`, `.venv/bin/python -m
tpo_course.work`, `.venv/bin/jupyter lab --notebook-dir=work`.
"""
NBGRADER = """\
c = get_config()
c.CourseDirectory.course_id = "tpo"
c.ExecutePreprocessor.timeout = 900  # seconds a cell: some train for two minutes, and longer on a full machine
c.ExecutePreprocessor.iopub_timeout = 120
"""
MAKEFILE = """\
PYTHON ?= python3

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -e . jupyterlab -c constraints.txt
	@touch $@

.PHONY: lab
lab: .venv/.installed  ## JupyterLab on your working copy
	.venv/bin/python -m tpo_course.work
	.venv/bin/jupyter lab --ip=127.0.0.1 --notebook-dir=work
"""


def make(out: Path, *, nbgrader: bool = False) -> None:
    """Write the copy into a new folder.

    Raises:
        FileExistsError: there is something in `out`.
        ValueError: this is no checkout with its solutions.
    """
    if not course() or sealed.SOLUTIONS is None:
        raise ValueError(f"{ROOT} is no checkout of the course with its solutions: make the copy from one")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not empty; name a new folder")
    for part in PARTS:
        shutil.copytree(ROOT / part, out / part, ignore=_left_out)
    for name in SHEETS:
        shutil.copy(ROOT / name, out / name)
    (out / "README.md").write_text(README, encoding="utf-8")
    (out / "Makefile").write_text(MAKEFILE, encoding="utf-8")
    project = (out / "pyproject.toml").read_text(encoding="utf-8").splitlines(keepends=True)
    lines = [
        re.sub(r' "tpo_course\.solutions",', "", line) for line in project if '"tpo_course.solutions" =' not in line
    ]
    (out / "pyproject.toml").write_text("".join(lines), encoding="utf-8")
    for file in (out / "notebooks/tpo_course/exercises").iterdir():
        text = file.read_text(encoding="utf-8")
        if file.name != "__init__.py":
            packed = sealed.seal(text)
            file.write_text(sealed.MODULE.format(packed) if file.suffix == ".py" else packed, encoding="utf-8")
    if nbgrader:
        (out / "nbgrader_config.py").write_text(NBGRADER, encoding="utf-8")
    for path in sorted((out / "notebooks").glob("*.ipynb")):
        book = json.loads(path.read_text(encoding="utf-8"))
        withhold(book)
        if nbgrader:
            mark(book)
            folder = out / "source" / path.stem
            folder.mkdir(parents=True)
            path.unlink()
            path = folder / path.name
        path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _left_out(folder: str, names: list[str]) -> set[str]:
    written = {"runs"} if Path(folder) == ROOT / "notebooks" else set()  # there alone: tpo_lib/runs is a package
    return LEFT_OUT(folder, names) | written


def withhold(book: dict) -> None:
    """Take the answers out of a chapter: from cells to fill, from folds, from stored outputs."""
    for cell in book["cells"]:
        tags, source = cell["metadata"].get("tags", []), "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cell["source"] = cards.FOLDED.sub("", source).splitlines(keepends=True)
            continue
        names = [tag.removeprefix("exercise:") for tag in tags if tag.startswith("exercise:")]
        if "solution" in tags:
            cell |= {"source": [YOURS], "outputs": []}
        elif names:
            cell |= {"source": stub(source, names).splitlines(keepends=True), "outputs": []}
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "text/html" in data:
                page, card = "".join(data["text/html"]), _card(book, source)
                shown = card or cards.FOLDED.sub("", page)
                data["text/html"] = shown.splitlines(keepends=True)
                if not card and shown != page:  # a card's plain text holds nothing that is folded
                    data["text/plain"] = cards.plain(shown).splitlines(keepends=True)


def _card(book: dict, source: str) -> str:
    """What a cell `check.NAME` shows now, without its answers; "" of another cell."""
    name = re.fullmatch(r"check\.(\w+)", source.strip())
    task = _tasks(book).get(name[1]) if name else None
    if isinstance(task, Quiz):
        return f"<pre>{html.escape(repr(task), quote=False)}</pre>"
    return cards.FOLDED.sub("", task._repr_html_()) if task else ""


def _tasks(book: dict) -> dict[str, Task | Quiz]:
    code = "\n".join("".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code")
    found = re.search(r"from tpo_course\.exercises import (\w+) as check", code)
    return tasks_of(found[1]) if found else {}


def stub(source: str, names: Sequence[str]) -> str:
    """A cell's source in which the functions and values of these names have no answer; what is none already stays as it is.

    >>> print(stub("import torch\\n\\ndef f(x):  # (B,)\\n    return x + 1", ["f"]))
    import torch
    <BLANKLINE>
    def f(x):  # (B,)
        ...
    """
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if body and not all(_empty(each) for each in body):
                lines[body[0].lineno - 1 : node.end_lineno] = [" " * body[0].col_offset + "..."]
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in names:
            empty = isinstance(node.value, ast.Constant) and node.value.value in (None, ...)
            if not empty:
                lines[node.lineno - 1 : node.end_lineno] = [f"{node.targets[0].id} = ..."]
    return "\n".join(lines)


def _empty(node: ast.stmt) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(node, ast.Pass | ast.Raise) or (isinstance(value, ast.Constant) and value.value is ...)


# ---- nbgrader


def mark(book: dict) -> None:
    """Give every exercise's cell nbgrader's marks, and a test cell below it that is worth the exercise's difficulty."""
    cells = []
    for cell in book["cells"]:
        cells.append(cell)
        for tag in cell["metadata"].get("tags", []):
            name = tag.removeprefix("exercise:")
            if name != tag:
                task = _tasks(book)[name]
                cell["metadata"]["nbgrader"] = _marks(name, solution=True)
                cell["source"] = _between(cell["source"], name)
                asserted = f'verdict = check.{name}.judge({name})\nassert verdict.status == "correct", verdict\n'
                marks = _marks(f"{name}-test", grade=True, locked=True, points=points_of(task))
                made = {
                    "cell_type": "code",
                    "execution_count": None,
                    "id": f"{name[:50]}-test".replace("_", "-"),
                    "outputs": [],
                }
                cells.append({**made, "metadata": {"nbgrader": marks}, "source": asserted.splitlines(keepends=True)})
    book["cells"] = cells


def _between(source: list[str], name: str) -> list[str]:
    """nbgrader's marks around what is to be written: the lines below a function's head, or the whole of a value."""
    tree = ast.parse("".join(source)).body
    node = next(n for n in tree if name in (getattr(n, "name", ""), getattr(getattr(n, "targets", [n])[0], "id", "")))
    lines = "".join(source).splitlines()
    first = node.body[-1] if isinstance(node, ast.FunctionDef) else node
    space = " " * first.col_offset
    lines[first.lineno - 1 : node.end_lineno] = [
        f"{space}### BEGIN SOLUTION", *lines[first.lineno - 1 : node.end_lineno], f"{space}### END SOLUTION"
    ]  # fmt: skip
    return "\n".join(lines).splitlines(keepends=True)


def _marks(name: str, *, grade: bool = False, solution: bool = False, locked: bool = False, points: int = 0) -> dict:
    marks = {
        "grade": grade,
        "grade_id": name,
        "locked": locked,
        "schema_version": 3,
        "solution": solution,
        "task": False,
    }
    return marks | ({"points": points} if grade else {})


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = Parser(prog="python -m tpo_course.student", description=__doc__.splitlines()[0])
    parser.add_argument("out", metavar="OUT", help="a new folder")
    parser.add_argument("--nbgrader", action="store_true", help="mark the chapters for nbgrader, in OUT/source/")
    parser.set_defaults(function=_make)
    call(parser, arguments)


def _make(options) -> None:
    check_room("OUT", options.out, folder=True)
    make(Path(options.out), nbgrader=options.nbgrader)
    print(f"{options.out}: the course without its answers" + (", its chapters in source/" if options.nbgrader else ""))


if __name__ == "__main__":
    main()
