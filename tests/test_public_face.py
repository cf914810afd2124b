"""What people import and read first: the names of `tpo_lib`, their page, the version, one address."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import tpo_lib
from tpo_course import notebooks
from tpo_lib import cli

ROOT = Path(__file__).parents[1]


def _api():
    spec = importlib.util.spec_from_file_location("api", ROOT / "docs" / "api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_importing_it_imports_nothing_else():
    code = (
        "import sys, time; began = time.process_time(); import tpo_lib; "
        "print(time.process_time() - began, 'torch' in sys.modules, sum(n.startswith('tpo_lib') for n in sys.modules))"
    )
    seconds, torch, modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert float(seconds) < 0.5
    assert (torch, modules) == ("False", "1")


@pytest.mark.parametrize("name", tpo_lib.__all__)
def test_every_name_is_there_says_what_it_is_and_is_no_module(name):
    thing = getattr(tpo_lib, name)
    assert name in dir(tpo_lib)
    assert isinstance(thing, dict) or thing.__doc__
    # a module of the same name would take its place as soon as somebody imports it
    assert not (ROOT / "tpo_lib" / f"{name}.py").exists()


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(AttributeError, match=r"no attribute 'fitt'; it has .*fit"):
        tpo_lib.fitt  # noqa: B018


def test_the_page_is_complete_and_current():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert page == _api().page(), "write it anew: python docs/api.py"
    assert set(re.findall(r"^### `(\w+)", page, re.MULTILINE)) == set(tpo_lib.__all__)


def test_one_version_everywhere():
    version = tpo_lib.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## \[(.+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
    assert f'"v{version}"' in notebooks.set_up(tier=False)


@pytest.mark.parametrize("page", notebooks.PAGES)
def test_one_address_everywhere(page, tmp_path, monkeypatch):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert set(re.findall(r"github\.com/([\w-]+/[\w-]+)", text)) == {notebooks.REPO_SLUG}
    copy = tmp_path / Path(page).name
    copy.write_text(text, encoding="utf-8")
    monkeypatch.setattr(notebooks, "REPO_SLUG", "somebody/else")
    notebooks.set_address(copy)
    assert "somebody/else" in copy.read_text(encoding="utf-8")
    monkeypatch.undo()
    notebooks.set_address(copy)
    assert copy.read_text(encoding="utf-8") == text  # and nothing else is touched


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_are_there(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", re.sub("`[^`]*`", "", text)):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for path in re.findall(r"`((?:tpo_lib|notebooks|data|docs|tests|benchmarks)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


def test_the_readme_example_runs(tmp_path, monkeypatch):
    """The file as it stands there, by the command below it, made small."""
    monkeypatch.setitem(tpo_lib.OBJECTIVES, "my_file.py:hinge", tpo_lib.OBJECTIVES["dpo"])  # taken out afterwards
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n# my_file\.py\n(.*?)```", text, re.DOTALL)
    (line,) = re.findall(r"^    python -m tpo_lib (train .*my_file.*)$", text, re.MULTILINE)
    small = "--model model --num-prompts 4 --max-new-tokens 6 --batch-size 2 --max-steps 1 --device cpu"
    tiny.checkpoint_folder(tmp_path / "model")
    # no sample of an untrained model is sure to have an exclamation mark: count something that differs
    (tmp_path / "my_file.py").write_text(code.replace('"!"', '"e"'))
    cli.main([*line.split(), *small.split()])
    record = json.loads((tmp_path / "runs/hinge/final/training.json").read_text())
    assert (record["loss_type"], record["delta"]) == ("my_file.py:hinge", 2)


def test_windows_is_told_what_to_use_in_its_place():
    script = "import sys; sys.platform = 'win32'; import tpo_lib"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert said.stderr.splitlines()[-1].startswith(
        "ImportError: tpo_lib needs Linux or macOS: on Windows install WSL 2"
    )
