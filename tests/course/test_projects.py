"""The project briefs: commands that the command line takes, scripts that compile, and every brief with all of its parts."""

from __future__ import annotations

import ast
import re
import shlex
import textwrap

import pytest

from tpo_course.pace import README
from tpo_lib.cli import build_parser

PAGE = (README.parent / "docs" / "projects.md").read_text(encoding="utf-8")
PROJECTS = re.findall(r"^## (\d\. [^\n]+)\n(.*?)(?=^## )", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^    python -m tpo_lib ([^\n]+)", PAGE.replace("\\\n", " "), re.MULTILINE)
SCRIPTS = re.findall(r"<<'PY'\n(.*?)^    PY$", PAGE, re.MULTILINE | re.DOTALL)


def test_there_are_eight():
    assert [name[0] for name, _ in PROJECTS] == list("12345678")
    assert len(COMMANDS) >= 12
    assert len(SCRIPTS) == 3


@pytest.mark.parametrize(("name", "text"), PROJECTS, ids=[name for name, _ in PROJECTS])
def test_a_brief_has_its_parts(name, text):
    for part in ("*Question.*", "    python ", "*New*", "*Pitfalls*", "*Rubric*"):
        assert part in text, f"{name}: {part}"
    assert re.search(r"\*You should see\*|\*Known\*", text), name
    assert re.search(r"minute|hour|Seconds", text), name


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_takes_it(command, tmp_path, monkeypatch):
    words = shlex.split(re.sub(r"  #.*", "", command).replace("mine.py:capped", "ipo"))
    assert build_parser(words[0]).parse_args(words).function
    with pytest.raises(SystemExit):
        build_parser(words[0]).parse_args([*words, "--no-such-flag"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_compiles(script):
    ast.parse(textwrap.dedent(script))


def test_its_objective_is_one(tmp_path):
    from tpo_lib import losses
    from tpo_lib.runs.own import load_objective

    own = next(script for script in SCRIPTS if "LossOutput" in script)
    (tmp_path / "mine.py").write_text(textwrap.dedent(own), encoding="utf-8")
    name = load_objective(f"{tmp_path / 'mine.py'}:capped")
    assert set(losses.OBJECTIVES.pop(name).hyperparameters) == {"beta", "cap"}
