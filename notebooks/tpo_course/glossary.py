"""The words of the field as the course uses them: `notebooks/glossary.md`, read; and their links in the chapters.

    python -m tpo_course.glossary 03 09      # links the first appearance of every word of the glossary in those chapters

An entry is a heading of the fourth level (its anchor is the word in small letters, with hyphens), one or two sentences, and a
line of its own: the chapter where the word first appears; symbol and name in the code; source; after "also" its other forms.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tpo_lib.cli import call
from tpo_lib.files import store
from tpo_lib.parser import Parser

FOLDER = Path(__file__).parents[1]
PAGE = FOLDER / "glossary.md"
ENTRY = re.compile(r"^#### ([^\n]+)\n\n([^\n]+)\n\n\[Chapter (\w+)\]\((\w+\.ipynb)\)([^\n]*)$", re.MULTILINE)
# What is left alone: a displayed formula, code, a formula, a link, a tag, a heading, a row of a table.
ELSEWHERE = re.compile(
    r"\$\$.*?\$\$|```.*?```|`[^`\n]*`|\$[^$]+\$|!?\[[^\]]*\]\([^)]*\)|<summary>.*?</summary>|<[^>\n]*>"
    r"|^#[^\n]*$|^\|[^\n]*$|^ {4}[^\n]*$",
    re.MULTILINE | re.DOTALL,
)
# So frequent that a link in every chapter would hide the others.
COMMON = frozenset(
    re.findall(
        r"[^/]+",
        "policy/prompt/response/reward/reference/state/objective/interval/return/preference/DPO/chosen response/"
        "rejected response/nat/margin/KL divergence/held out/pocket model/TDPO1/TDPO2/TGDPO/guide/credit/stage",
    )
)


@dataclass(frozen=True)
class Entry:
    """A word of the glossary: its forms begin with the word itself; `details` are symbol, code and source as they stand."""

    word: str
    sentences: str
    chapter: str
    file: str
    details: str
    forms: tuple[str, ...]

    @property
    def anchor(self) -> str:
        """The fragment that leads to its heading.

        >>> Entry("Gibbs distribution", "", "2", "02_dpo.ipynb", "", ()).anchor
        'gibbs-distribution'
        """
        return re.sub(r"[^\w -]", "", self.word.lower()).replace(" ", "-")

    @property
    def pattern(self) -> re.Pattern:
        """Where one of its forms stands as a word; capitals count where the form has one."""
        longest_first = sorted(self.forms, key=len, reverse=True)
        forms = "|".join(re.escape(f) if f != f.lower() else f"(?i:{re.escape(f)})" for f in longest_first)
        return re.compile(rf"(?<![\w-])(?:{forms})(?![\w-])")


def entries(page: str | None = None) -> list[Entry]:
    """The glossary, in its order."""
    found = []
    for word, sentences, chapter, file, details in ENTRY.findall(
        PAGE.read_text(encoding="utf-8") if page is None else page
    ):
        details, _, also = details.strip("; ").partition("also ")
        found.append(
            Entry(word, sentences, chapter, file, details.strip("; "), (word, *filter(None, also.split(", "))))
        )
    return found


def number(name: str) -> str:
    """What a chapter is called in the glossary, from its file's name.

    >>> number("06b_real_model.ipynb"), number("10_your_own_data.ipynb")
    ('6b', '10')
    """
    return name.split("_")[0].removeprefix("0") or "0"


def bare(source: str) -> str:
    """A text cell in which all that is no running text is blanked out, place by place."""
    return ELSEWHERE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), source)


def running(notebook) -> Iterator[tuple[dict, str]]:
    """(cell, its running text) of the text cells of a chapter after its opening."""
    for cell in notebook["cells"][1:]:
        if cell["cell_type"] == "markdown":
            yield cell, bare(cell["source"])


def appears(notebook, entry: Entry) -> tuple[dict, re.Match] | None:
    """The first place in a chapter's running text where a word stands, and its cell."""
    return next(((cell, found) for cell, text in running(notebook) if (found := entry.pattern.search(text))), None)


def links(notebook) -> set[str]:
    """The words of the glossary, as anchors, that a chapter leads to."""
    words = "\n".join(cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    return set(re.findall(r"\]\(glossary\.md#([\w-]+)\)", words))


def lacking(notebook, chapter: str) -> list[tuple[str, Entry, str]]:
    """(id of the cell, entry, the words) of every first appearance in a chapter that should lead to the glossary and does not.

    A word leads there once in every chapter from its first one on; one of the `COMMON` in its first chapter alone.
    """
    there, found = links(notebook), []
    for entry in entries():
        if entry.anchor in there or (entry.word in COMMON and entry.chapter != chapter):
            continue
        if place := appears(notebook, entry):
            found.append((place[0]["id"], entry, place[1][0]))
    return found


def link(notebook, chapter: str) -> int:
    """Let every first appearance lead to the glossary; how many did not before."""
    done = 0
    for _, entry, _ in lacking(notebook, chapter):
        if place := appears(notebook, entry):  # None where a longer word around it has become a link
            cell, found = place
            cell["source"] = (
                f"{cell['source'][: found.start()]}[{found[0]}](glossary.md#{entry.anchor}){cell['source'][found.end() :]}"
            )
            done += 1
    return done


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = Parser(prog="python -m tpo_course.glossary", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", help="file names of chapters, or beginnings of them")
    parser.add_argument(
        "--list", action="store_true", help="say which links are lacking (cell, word, link), and write nothing"
    )
    parser.set_defaults(function=_link_all)
    call(parser, arguments)


def _link_all(options) -> None:
    import nbformat

    there = sorted(FOLDER.glob("*.ipynb"))
    if unknown := [name for name in options.names if not any(path.name.startswith(name) for path in there)]:
        raise ValueError(f"no notebook is called {unknown[0]}; there are {', '.join(path.name for path in there)}")
    for path in there:
        if not path.name.startswith(tuple(options.names)):
            continue
        notebook, chapter = nbformat.read(path, as_version=4), number(path.name)
        for cell, entry, words in lacking(notebook, chapter):
            print(f"{path.name}  {cell}  {words}  glossary.md#{entry.anchor}")
        if not options.list and link(notebook, chapter):
            store.write_file(path, lambda to, notebook=notebook: nbformat.write(notebook, to))


if __name__ == "__main__":
    main()
