"""The forms that Colab makes of `#@param`: each can be read, holds a value that it offers, and is used further down."""

from __future__ import annotations

import ast
import json
import re

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from tpo_course import notebooks
from tpo_course.derivations import DERIVATIONS
from tpo_course.exercises import break_it
from tpo_course.widgets.memory_lab import PRECISIONS, SHAPES
from tpo_course.widgets.microscope import QUANTITIES
from tpo_course.widgets.parts import with_a_margin
from tpo_course.widgets.two_models import METRICS
from tpo_lib.files.store import read_json
from tpo_lib.runs.sweep import RUNS

COURSE = [pytest.param(path, id=path.stem) for path in notebooks.course()]
FIELD = re.compile(r"(\w+) = (\S.*?)  #@param (\[.*?\])? ?(\{.*\})?")  # NAME = VALUE  #@param [CHOICES] {SETTINGS}
KINDS = {"boolean": bool, "string": str, "integer": int, "number": (int, float)}


def cells(path) -> list[str]:
    """The sources of a notebook's code cells."""
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def read(line: str) -> tuple[str, object, list | None, dict]:
    """Name, value, choices or None, and settings of a form's line."""
    found = FIELD.fullmatch(line)
    assert found, f"not NAME = VALUE  #@param [CHOICES] {{SETTINGS}}: {line}"
    name, value, choices, settings = found.groups()
    settings = json.loads(re.sub(r"(\w+):", r'"\1":', settings or "{}"))
    choices = json.loads(choices) if choices else None
    if choices and settings.get("type") == "raw":
        choices = [ast.literal_eval(one) if isinstance(one, str) else one for one in choices]
    return name, ast.literal_eval(value), choices, settings


def check(line: str, below: str) -> None:
    """Raise AssertionError unless the form offers the line's value, and the name stands in the code below."""
    name, value, choices, settings = read(line)
    kind = settings.get("type")
    if choices:
        assert value in choices, line
        assert kind == "raw" or (not settings and all(isinstance(one, str) for one in choices)), line
    elif kind == "slider":
        low, high, step = (settings.pop(key) for key in ("min", "max", "step"))
        assert low <= value <= high, line
        for at in (value, high):
            steps = (at - low) / step
            assert abs(steps - round(steps)) < 1e-9, f"{at} is not on the grid: {line}"
        assert len(settings) == 1, line
    else:
        assert type(value) is bool or kind != "boolean", line
        assert isinstance(value, KINDS[kind]), line
    used = re.compile(rf"\b{name}\b(?! = )")  # not where it is set once more
    assert any(used.search(each.partition("#")[0]) for each in below.splitlines()), f"{name} is not used"


@pytest.mark.parametrize("path", COURSE)
def test_every_form_of_a_chapter_offers_its_value_and_is_used(path):
    sources, names = cells(path), []
    for at, source in enumerate(sources):
        lines = source.splitlines()
        for row, line in enumerate(lines):
            if "@param" in line:
                check(line, "\n".join([*lines[row + 1 :], *sources[at + 1 :]]))
                names.append(read(line)[0])
    tier = ["TIER"] * any(reads(source, "PRESET") for source in sources)
    assert names[: len(tier) + 1] == [*tier, "KEEP_ON_DRIVE"]
    assert names.count("TIER") == len(tier)
    assert ("TIER" in path.read_text()) == bool(tier)  # nor do its words speak of one


def reads(source: str, name: str) -> bool:
    """Whether a cell's code reads a variable; in its words, strings or the names of others it does not count."""
    nodes = ast.walk(ast.parse(TransformerManager().transform_cell(source)))
    return any(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load) for n in nodes)


def test_what_counts_as_reading():
    assert reads('!git clone $x\nprint(f"{PRESET}")', "PRESET")
    assert not reads('PRESET = tiers.choose(TIER)  # PRESET\nprint("PRESET", PRESETS)', "PRESET")


@pytest.mark.parametrize(
    "line",
    [
        'a = 0.35  #@param {type: "slider", min: 0, max: 1, step: 0.1}',
        'a = 2  #@param {type: "slider", min: 0, max: 1, step: 0.1}',
        'a = 0.3  #@param {type: "slider", min: 0, max: 1, step: 0.3}',
        'a = "c"  #@param ["a", "b"]',
        'a = 1  #@param ["1", "2"] {type: "raw"} or so',
        'a = 3  #@param ["None", 1, 2] {type: "raw"}',
        "a = 1  #@param [1, 2]",
        'a = 1  #@param {type: "boolean"}',
        'a = 1  #@param {type: "string"}',
        'a = b  #@param {type: "number"}',
        '    a = 1  #@param {type: "number"}',
        'a = 1  #@param {type: "knob"}',
    ],
)
def test_a_wrong_form_is_noticed(line):
    with pytest.raises((AssertionError, ValueError, KeyError)):
        check(line, "print(a)")


def test_a_form_that_moves_nothing_is_noticed():
    line = 'a = None  #@param ["None", 1, 2] {type: "raw"}'
    check(line, "print(a)")
    for below in ("print(b)", "print(b)  # a", "a = 2", "print(ab)"):
        with pytest.raises(AssertionError, match="a is not used"):
            check(line, below)


def test_what_the_forms_offer_is_what_the_code_takes():
    objectives, runs = [name for _, name in with_a_margin()], read_json(RUNS, "")["runs"]
    expected = {
        ("00", "objective"): list(dict.fromkeys(run["objective"] for run in runs)),
        ("00", "beta"): sorted({run["beta"] for run in runs}),
        ("00", "alpha"): sorted({run["alpha"] for run in runs}),
        ("04", "objective"): objectives,
        ("05b", "quantity"): list(QUANTITIES),
        ("06", "objective"): objectives,
        ("06b", "bought"): list(METRICS),
        ("07", "run_shown"): list(break_it.CASES),
        ("07", "dial_shown"): list(break_it.DIALS),
        ("08", "lab_model"): list(SHAPES),
        ("08", "dtype"): list(PRECISIONS),
        ("03", "step"): len(DERIVATIONS["token_mdp"].steps),
    }
    lines = [(path, line) for path in notebooks.course() for cell in cells(path) for line in cell.splitlines()]
    fields = [(path.stem.partition("_")[0], *read(line)) for path, line in lines if "@param" in line]
    offered = {(chapter, name): choices or settings.get("max") for chapter, name, _, choices, settings in fields}
    assert {key: offered.get(key) for key in expected} == expected
