"""Fixtures of the browser tests: one JupyterLab and one Chromium for all of them; see harness.py for what they offer."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Sequence

import pytest

from browser.chapters import NOTEBOOKS, cells
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


STEPS = """
from tpo_course.derivations import DERIVATIONS
widgets.step_through(DERIVATIONS["dpo"])
"""
BROKEN = """
import ipywidgets
button = ipywidgets.Button(description="Break")
button.on_click(lambda _: 1 / 0)
display(button)
"""


@pytest.fixture(scope="package")
def shelf(browser, lab) -> Iterator[NotebookPage]:
    """One notebook of widgets that train nothing: in cells 1 and 2 the loss labs of chapters 4 and 5, on TDPO1 and TGDPO; in
    cell 3 the memory lab; in cell 4 the steps of DPO; in cell 5 a button whose callback fails."""
    labs = [*cells("04_tdpo", "lab = widgets.loss_lab()"), *cells("05_tgdpo", "lab = widgets.loss_lab()")]
    labs += cells("08_scale", "widgets.memory_lab()")
    lab.write("shelf.ipynb", ["from tpo_course import widgets", *labs, STEPS, BROKEN])
    # A cell that does not fit into the window is scrolled by JupyterLab once the focus is in it, and its picture with it.
    page = open_notebook(browser, lab, "shelf.ipynb", height=1500)
    page.run_all()
    yield page
    page.close()


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
