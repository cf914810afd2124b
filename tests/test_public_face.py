"""What people import and read first: the names of `tpo_lib`, their page, the version, one address."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tpo_lib
from tpo_course import notebooks

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
    assert f'"v{version}"' in notebooks.set_up()


@pytest.mark.parametrize("page", notebooks.PAGES)
def test_one_address_everywhere(page, tmp_path, monkeypatch):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert set(re.findall(r"github\.com/([\w-]+/[\w-]+)", text)) == {notebooks.REPO_SLUG}
    copy = tmp_path / page
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


def test_the_readme_example_runs(monkeypatch):
    monkeypatch.setattr(tpo_lib.losses, "OBJECTIVES", dict(tpo_lib.OBJECTIVES))
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    made = {}
    exec(code, made)
    mask = torch.ones(1, 2, dtype=torch.bool)
    sides = [tpo_lib.TokenStats(torch.tensor([[-1.0, value]]), None, mask) for value in (-1.0, -1.5)]
    output = made["hinge"](*sides, **tpo_lib.losses.OBJECTIVES["hinge"].settings({}))
    assert output.loss.tolist() == [0.5]  # 1 - (-2 + 2.5)
    assert made["score"](["!!", ""]) == [2, 0]
