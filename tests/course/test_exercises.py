"""Every exercise of the course: its solution passes, its stub is not attempted, its wrong answers are named."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pkgutil
import re

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from tpo_course import exercises
from tpo_course.exercise import SOLUTIONS, Exercise, Quiz

NOTEBOOKS = SOLUTIONS.parent
MODULES = {
    info.name: importlib.import_module(f"tpo_course.exercises.{info.name}")
    for info in pkgutil.iter_modules(exercises.__path__)
}
EXERCISES = [
    pytest.param(module, exercise, id=f"{name}.{exercise.name}")
    for name, module in MODULES.items()
    for exercise in vars(module).values()
    if isinstance(exercise, Exercise)
]


def _notebook(module) -> list[dict]:
    (path,) = NOTEBOOKS.glob(f"0*_{module.chapter.file.stem}.ipynb")
    return json.loads(path.read_text())["cells"]


def _solution(exercise: Exercise):
    spec = importlib.util.spec_from_file_location(exercise.solution, SOLUTIONS / f"{exercise.solution}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, exercise.name)


def test_there_are_exercises_for_every_module():
    for name, module in MODULES.items():
        count = sum(isinstance(value, Exercise) for value in vars(module).values())
        assert count >= 3, f"{name} has {count} exercises"
        assert sum(isinstance(value, Quiz) for value in vars(module).values()) == 1, name


@pytest.mark.parametrize("name", MODULES)
def test_words_and_functions_have_the_same_names(name):
    """Hints, messages and questions are compared when the module is imported."""
    exercises = [key for key, value in vars(MODULES[name]).items() if isinstance(value, Exercise)]
    assert list(MODULES[name].chapter.words) == [*exercises, "quiz"]


@pytest.mark.parametrize("name", MODULES)
def test_words_are_rendered(name):
    """No Markdown is left over in what a learner reads, and no HTML tag is left open."""
    shown = [v for v in vars(MODULES[name]).values() if isinstance(v, Exercise | Quiz)]
    pages = [page for v in shown for page in (v._repr_html_(), *(m.message for m in getattr(v, "mistakes", ())))]
    for page in pages:
        assert not re.search(r"`|^#|- \[[ x]\]|\*\*\w|\w\*\*$", page, re.MULTILINE), page
        for tag in ("code", "i", "b", "sub", "sup", "p", "details"):
            assert len(re.findall(rf"<{tag}\b", page)) == page.count(f"</{tag}>"), f"<{tag}> in {page}"


@pytest.mark.parametrize(("module", "exercise"), EXERCISES)
def test_the_solution_passes(module, exercise):
    assert getattr(module, exercise.name) is exercise
    assert exercise(_solution(exercise)).status == "correct"


@pytest.mark.parametrize(("module", "exercise"), EXERCISES)
def test_every_mistake_gets_its_own_message(module, exercise):
    assert len({mistake.message for mistake in exercise.mistakes}) == len(exercise.mistakes) >= 4
    for mistake in exercise.mistakes:
        verdict = exercise(mistake.wrong)
        assert (verdict.status, verdict.message) == ("wrong", mistake.message)


@pytest.mark.parametrize(("module", "exercise"), EXERCISES)
def test_the_notebook_shows_card_stub_and_check(module, exercise):
    """The cell tagged `exercise:NAME` holds the stub; a card and a call of the checker stand around it."""
    cells = _notebook(module)
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert any(source.strip() == f"check.{exercise.name}" for source in code), "no card"
    assert any(f"check.{exercise.name}(" in source for source in code), "no call of the checker"
    stubs = [c for c in cells if f"exercise:{exercise.name}" in c["metadata"].get("tags", [])]
    assert len(stubs) == 1, f"{module.__name__}: one cell of its notebook must carry the tag exercise:{exercise.name}"
    namespace: dict = {}
    exec(TransformerManager().transform_cell("".join(stubs[0]["source"])), namespace)
    assert exercise(namespace[exercise.name]).status == "not attempted"


@pytest.mark.parametrize("name", MODULES)
def test_the_notebook_ends_with_its_quiz(name):
    module = MODULES[name]
    quiz = next(key for key, value in vars(module).items() if isinstance(value, Quiz))
    assert any("".join(cell["source"]).strip() == f"check.{quiz}" for cell in _notebook(module))
