"""Fixtures of the browser tests: one JupyterLab and one Chromium for all of them; see harness.py for what they offer."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Sequence

import pytest

from browser.chapters import NOTEBOOKS
from browser.harness import Lab, NotebookPage, browse, find_chromium, open_notebook, serve


@pytest.fixture(scope="package")
def browser():
    for missing, needed in (
        (importlib.util.find_spec("playwright") is None, "playwright: pip install playwright"),
        (find_chromium() is None, "a Chromium: apt-get install chromium"),
    ):
        if missing:
            (pytest.fail if "TPO_REQUIRE_BROWSER" in os.environ else pytest.skip)(f"the browser tests need {needed}")
    with browse() as chromium:
        yield chromium


@pytest.fixture(scope="package")
def lab(browser, tmp_path_factory) -> Iterator[Lab]:
    root = tmp_path_factory.mktemp("course") / "notebooks"
    shutil.copytree(NOTEBOOKS, root)
    with serve(root, tmp_path_factory.mktemp("jupyter")) as running:
        yield running


@pytest.fixture
def notebook(browser, lab) -> Iterator[Callable[..., NotebookPage]]:
    pages = []

    def show(name: str, cells: Sequence[str] | None = None, **size: int) -> NotebookPage:
        if cells is not None:
            lab.write(name, cells)
        pages.append(open_notebook(browser, lab, name, **size))
        return pages[-1]

    yield show
    for page in pages:
        page.close()
