"""Cells of the course's notebooks, so that a test drives the widgets as the chapters build them."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def cells(chapter: str, *parts: str) -> list[str]:
    """The sources of code cells of a chapter.

    Args:
        chapter: a notebook's name without ".ipynb".
        parts: for every cell wanted, a piece of it that is in no other code cell.

    Raises:
        LookupError: a piece is in no cell, or in several.
    """
    found = []
    for part in parts:
        holding = [source for source in _code(chapter) if part in source]
        if len(holding) != 1:
            raise LookupError(f"{part!r} is in {len(holding)} code cells of {chapter}.ipynb: name a piece of one cell")
        found += holding
    return found


def imports(chapter: str) -> str:
    """The chapter's first cell of imports."""
    return cells(chapter, "%matplotlib inline")[0]


def folded(chapter: str) -> list[str]:
    """The cells that show what unfolds: the cards of the exercises, and last the quiz."""
    return [source for source in _code(chapter) if re.fullmatch(r"check\.\w+", source.strip())]


def _code(chapter: str) -> list[str]:
    document = nbformat.read(NOTEBOOKS / f"{chapter}.ipynb", as_version=4)
    return [cell.source for cell in document.cells if cell.cell_type == "code"]
