"""Every exercise of the course: its solution passes, its stub is not attempted, its wrong answers are named."""

from __future__ import annotations

import ast
import functools
import html
import importlib
import importlib.util
import json
import pkgutil
import re

import pytest
import tiny
import torch
from IPython.core.inputtransformer2 import TransformerManager

from tpo_course import exercises
from tpo_course.exercise import SOLUTIONS, Exercise, solution_source
from tpo_course.quiz import Quiz
from tpo_lib import TrainConfig, fit
from tpo_lib.losses import OBJECTIVES

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
    spec = importlib.util.spec_from_file_location(exercise.chapter, SOLUTIONS / f"{exercise.chapter}.py")
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


OPERATIONS = ast.Call | ast.BinOp | ast.UnaryOp | ast.Compare | ast.Subscript


@pytest.mark.parametrize(("module", "exercise"), EXERCISES)
def test_no_hint_is_the_answer(module, exercise):
    """Code in a hint is a name or a call: no expression of three operations, and none of two that the solution holds."""
    solution = re.sub(r"\s", "", solution_source(SOLUTIONS / f"{exercise.chapter}.py", exercise.name))
    for hint in exercise.hints:
        for span in re.findall(r"<code>(.*?)</code>", hint):
            code = html.unescape(span)
            try:
                count = sum(isinstance(node, OPERATIONS) for node in ast.walk(ast.parse(code)))
            except SyntaxError:  # a piece such as ".detach()"
                count = code.count("(")
            most = 1 if re.sub(r"\s", "", code) in solution else 2
            assert count <= most, f"{exercise.key}: {code}"


@pytest.mark.parametrize(("module", "exercise"), EXERCISES)
def test_every_mistake_gets_its_own_message(module, exercise):
    assert len({mistake.message for mistake in exercise.mistakes}) == len(exercise.mistakes) >= 4
    for mistake in exercise.mistakes:
        for way in mistake.ways:
            verdict = exercise.judge(way)
            assert (verdict.status, verdict.message, verdict.mistakes) == ("wrong", mistake.message, (mistake.name,))


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


LOSSES = [each for each in EXERCISES if each.values[1].name.removesuffix("_loss") in OBJECTIVES]


@pytest.mark.parametrize(("module", "exercise"), LOSSES)
def test_a_learners_loss_is_what_trains_once_it_is_right(module, exercise, capsys):
    name, solution, calls = exercise.name.removesuffix("_loss"), _solution(exercise), []
    assert exercise.trains(lambda **given: None, name) is None
    assert f"not attempted: tpo_lib.losses.{name} trains instead" in capsys.readouterr().out

    @functools.wraps(solution)  # takes what the exercise gives, and not all hyperparameters
    def mine(**given):
        calls.append(given)
        return solution(**given)

    loss = exercise.trains(mine, name)
    assert "the loss that trains is yours" in capsys.readouterr().out
    guided = {"guide_beta": 0.1} if name == "tgdpo" else {}
    config = TrainConfig(loss_type=name, batch_size=4, max_steps=2, lr=1e-2, warmup_steps=0, device="cpu", **guided)
    guide = tiny.llama(seed=1) if guided else None
    calls.clear()
    ours, yours = (
        fit(config, tiny.llama(), tiny.llama(), tiny.pairs(8), guide=guide, loss=one, progress=False).policy
        for one in (None, loss)
    )
    assert len(calls) >= 2  # updates
    for a, b in zip(ours.parameters(), yours.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_chapters_train_every_loss_that_is_written_in_them():
    for module, exercise in (each.values for each in LOSSES):
        code = ["".join(cell["source"]) for cell in _notebook(module) if cell["cell_type"] == "code"]
        (taken,) = [source for source in code if f"check.{exercise.name}.trains({exercise.name}" in source]
        assert any("fit(" in source for source in code[code.index(taken) :])
