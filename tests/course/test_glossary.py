"""The glossary: exact form, words where it says they first appear, names that exist, and links from the chapters."""

from __future__ import annotations

import pkgutil
import re

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook

from tpo_course import glossary, notebooks
from tpo_course.world import TokenWorld

PAGE = glossary.PAGE.read_text(encoding="utf-8")
ENTRIES = glossary.entries()
COURSE = {path.name: nbformat.read(path, as_version=4) for path in notebooks.course()}
ROOMS = [
    "tpo_lib.",
    "tpo_lib.types.",
    "tpo_lib.runs.",
    "tpo_lib.ppo.",
    "tpo_course.",
    "tpo_course.world.",
    "tpo_course.derivations.",
    "torch.",
    "torch.nn.",
]
NO_NAMES = {
    "logits",
    "rewards/margins",
    "guide_beta",
    "floor_share",
    "data/pocket",
    "stage.judge",
    "stage.held_out_pairs",
}  # arguments, metrics, files


def resolves(name: str) -> bool:
    """Whether some room has it: a module, a function, an attribute, or a field of a dataclass."""
    name = re.sub(r"\(.*", "", name)
    owner, _, field = name.rpartition(".")
    for room in ROOMS:
        try:
            return bool(pkgutil.resolve_name(room + name) or True)
        except (AttributeError, ImportError):
            pass
        try:
            there = pkgutil.resolve_name(room + owner) if owner else None
        except (AttributeError, ImportError):
            continue
        if field in getattr(there, "__dataclass_fields__", {}) or (
            there is TokenWorld and hasattr(TokenWorld(2, 1, seed=0), field)
        ):
            return True
    return False


def test_it_is_read_whole_and_in_order():
    headings = re.findall(r"^#### (.+)$", PAGE, re.MULTILINE)
    assert [entry.word for entry in ENTRIES] == headings
    assert headings == sorted(headings, key=str.lower)
    assert 60 <= len(ENTRIES) <= 95
    assert len({entry.anchor for entry in ENTRIES}) == len(ENTRIES)
    assert set(headings) >= glossary.COMMON


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.anchor)
def test_an_entry_is_one_or_two_sentences_and_its_names_exist(entry):
    assert entry.sentences.endswith(".")
    assert len(re.findall(r"[.?](?= [A-Z]|$)", entry.sentences)) <= 2
    for name in set(re.findall(r"`([^`]+)`", entry.details)) - NO_NAMES:
        assert resolves(name), name


def test_a_name_that_does_not_exist_is_seen():
    assert not resolves("losses.tpo")
    assert not resolves("TokenStats.logit")


def first(entry: glossary.Entry) -> str | None:
    """The first chapter whose running text, or a link of it, has the word."""
    return next(
        (
            name
            for name, book in COURSE.items()
            if entry.anchor in glossary.links(book) or glossary.appears(book, entry)
        ),
        None,
    )


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.anchor)
def test_it_names_the_chapter_where_the_word_first_appears(entry):
    assert entry.file == first(entry)
    assert entry.chapter == glossary.number(entry.file)


@pytest.mark.parametrize("name", COURSE)
def test_links_stand_where_markdown_is_read(name):
    words = "\n\n".join(cell["source"] for cell in COURSE[name]["cells"] if cell["cell_type"] == "markdown")
    for block in re.findall(r"^<(?:details|div|p|table)\b[^\n]*(?:\n[^\n]+)*", words, re.MULTILINE):
        assert "](" not in block, "inside HTML, until an empty line, Markdown stays as it is written"


@pytest.mark.parametrize("name", COURSE)
def test_links_lead_to_entries(name):
    assert glossary.links(COURSE[name]) <= {entry.anchor for entry in ENTRIES}


@pytest.mark.parametrize("name", COURSE)
def test_first_appearances_lead_to_the_glossary(name):
    lacking = [
        (cell, words, f"glossary.md#{entry.anchor}")
        for cell, entry, words in glossary.lacking(COURSE[name], glossary.number(name))
    ]
    assert not lacking, f"python -m tpo_course.glossary {name}"


def test_a_link_is_written_at_the_first_place_that_is_text():
    words = "# The guide\n\n`guide` and $guide$ and [the guide](x.md)\n\n| guide |\n\nOne **guide**, two Guides, a guide-line."
    book = new_notebook(cells=[new_markdown_cell("the guide of the opening"), new_markdown_cell(words, id="a")])
    [(cell, entry, found)] = [each for each in glossary.lacking(book, "3") if each[1].word == "guide"]
    assert (cell, found) == ("a", "guide")
    assert glossary.link(book, "3") >= 1
    assert book.cells[1].source == words.replace("**guide**", "**[guide](glossary.md#guide)**")
    assert not [each for each in glossary.lacking(book, "3") if each[1].word == "guide"]
    later = new_notebook(cells=[new_markdown_cell("the guide of the opening"), new_markdown_cell("a guide", id="a")])
    assert entry.word in glossary.COMMON
    assert not glossary.lacking(later, "9")


def test_capitals_count_where_a_form_has_them():
    by_word = {entry.word: entry for entry in ENTRIES}
    assert by_word["KL divergence"].pattern.search("a KL of 2")
    assert not by_word["KL divergence"].pattern.search("kl_token")
    assert by_word["soft maximum"].pattern.search("Soft maximum")
    assert not by_word["state"].pattern.search("understated")
