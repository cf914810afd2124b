"""The site as it is built: every formula typeset, every picture in words, every link leading somewhere, nothing fetched."""

from __future__ import annotations

import html
import json
import re

import pytest

from tpo_course.notebooks import ROOT, course
from tpo_course.site.build import build
from tpo_course.site.links import Reader, broken
from tpo_course.site.living import LABS
from tpo_course.site.markup import Text, mathml
from tpo_course.site.source import REPOSITORY, Addresses, Page, pages, relative

PAGES = pages()
HERE = Page("docs/commands.md", "docs/commands.html", "", "Commands")
CODE = re.compile(
    r"```.*?```|^    [^\n]*$|`[^`]*`|<(pre|code|script|style)\b.*?</\1>|</?[a-zA-Z][\w-]*(\s[^>]*)?/?>|\\\$",
    re.S | re.M,
)


def text() -> Text:
    return Text(HERE, Addresses(PAGES))


def read(site, page: Page) -> str:
    return (site.out / page.target).read_text(encoding="utf-8")


def written(page: Page) -> list[str]:
    """All that a page is made from in which a formula may stand."""
    if not page.source.endswith(".ipynb"):
        return [page.path.read_text(encoding="utf-8")]
    found = []
    for cell in json.loads(page.path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            found.append("".join(cell["source"]))
        for output in cell.get("outputs", []):
            kinds = output.get("data", {})
            found += ["".join(kinds[kind]) for kind in ("text/html", "text/markdown") if kind in kinds][:1]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.source)
def test_every_formula_is_typeset(site, page):
    """Counted another way than they are found: half the dollars outside code, two of them being one."""
    dollars = sum(len(re.findall(r"\$\$?", CODE.sub(" ", part))) for part in written(page))
    shown = read(site, page)
    assert dollars % 2 == 0
    body = shown.split('<nav class="contents"')[0]  # where headings stand once more
    assert body.count("<math") == site.formulas[page.source] == dollars // 2
    assert "merror" not in shown
    left = CODE.sub(" ", shown)
    assert "$" not in left, left[left.index("$") - 80 :][:160]


def test_there_are_formulas(site):
    assert sum(site.formulas.values()) > 1000


def test_every_picture_is_in_words(site):
    assert not site.undescribed, "say what is in them in tpo_course/site/alt.toml"
    for page in PAGES:
        for picture in re.findall(r"<img\b[^>]*>", read(site, page)):
            words = re.search(r'alt="([^"]*)"', picture)
            assert words, picture[:200]
            assert len(words[1]) >= 10, picture[:200]


@pytest.mark.parametrize("path", course(), ids=lambda path: path.stem)
def test_a_chapter_shows_what_the_notebook_does(site, path):
    page = next(page for page in PAGES if page.path == path)
    shown, cells = read(site, page), json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert shown.count('<div class="cell">') == sum(cell["cell_type"] == "code" for cell in cells)
    folded = sum(part.count("<details") for part in written(page))
    assert shown.count("<details") == folded + 1 + 2  # the set-up cell, and the two menus
    assert "<details open" not in shown.split("<main", 1)[1].split("</main>", 1)[0]
    for repr_ in ("VBox(", "HBox(", "Figure size", "PIL.Image"):
        assert repr_ not in re.sub(r'<pre class="code".*?</pre>', "", shown, flags=re.S), repr_
    images = sum(
        "image/png" in o.get("data", {}) and "text/html" not in o["data"] for c in cells for o in c.get("outputs", [])
    )
    assert len(re.findall("<figure[^>]*><img", shown)) == images


def test_the_living_widgets_are_linked_where_they_stand(site):
    chapters = "".join(read(site, page) for page in PAGES if page.room == "Chapters")
    for lab in LABS[:2]:
        assert f'href="../{lab.target}"' in re.sub(r'<nav class="menu.*?</nav>', "", chapters, flags=re.S), lab.name


def test_links(site):
    assert broken(site.out) == []
    inside = read(site, next(page for page in PAGES if page.source == "notebooks/04_tdpo.ipynb"))
    assert 'href="equation_map.html' in inside
    map_ = read(site, next(page for page in PAGES if page.source == "notebooks/equation_map.md"))
    assert f'href="{REPOSITORY}/blob/main/tpo_lib/losses.py"' in map_
    assert "https://arxiv.org/abs/2404.11999" in site.outside
    for path in site.out.rglob("*.html"):
        assert not [a for a in Reader(path.read_text(encoding="utf-8")).links if a.startswith(("/", "file:"))]
        assert str(ROOT) not in path.read_text(encoding="utf-8")


def test_what_leads_nowhere_is_found(tmp_path):
    (tmp_path / "b.html").write_text('<p id="there">')
    (tmp_path / "a.html").write_text(
        '<a href="b.html#there"></a><a href="b.html#gone"></a><a href="c.html"></a><a href="../d.html"></a>'
        '<i id="x"></i><i id="x"></i><img src="https://example.org/x.png"><a href="https://example.org">'
    )
    assert broken(tmp_path) == [
        "a.html: fetches https://example.org/x.png from elsewhere",
        "a.html: the name x is given twice",
        "a.html: b.html#gone names a place that is not there",
        "a.html: c.html is not there",
        "a.html: ../d.html is not there",
    ]


def test_a_link_to_nothing_is_refused_by_name():
    with pytest.raises(ValueError, match=r"docs/commands.md links to gone.md, which is not there"):
        text().markdown("[x](gone.md)")


def test_addresses():
    shown = text().markdown(
        "[a](../README.md#two-commands) [b](../tpo_lib/losses.py) [c](../configs) ![d](https://e.org/f.svg)"
    )
    assert 'href="../index.html#two-commands"' in shown
    assert f'href="{REPOSITORY}/blob/main/tpo_lib/losses.py"' in shown
    assert f'href="{REPOSITORY}/tree/main/configs"' in shown
    assert "<img" not in shown  # nothing is fetched from elsewhere: its words stand there
    assert "d</p>" in shown
    assert relative("labs/loss.html", "index.html") == "../index.html"


def test_formulas_and_code_are_told_apart():
    reader = text()
    shown = reader.markdown(
        "`$HOME` and $a_1$, 5 \\$, $y^{<t}$\n\n| a |\n|---|\n| $p(y|x)$ |\n\n```sh\necho $A $B\n```\n\n$$\nx\n$$"
    )
    assert reader.formulas == shown.count("<math") == 4
    assert 'display="block"' in shown
    assert "<code>$HOME</code>" in shown
    assert "echo" in shown
    assert shown.count("<td") == 1  # the bar inside a formula parts no cell
    folded = text().html("<p>$a &lt; b$ <code>$c$</code></p><pre>$d$</pre>")
    assert folded.count("<math") == 1
    assert "<code>$c$</code>" in folded


def test_a_formula_that_cannot_be_typeset_is_named():
    with pytest.raises(ValueError, match=re.escape(r"the formula $\nosuch{x}$ cannot be typeset")):
        mathml(r"\nosuch{x}", block=False)


def test_anchors_are_those_of_the_repositorys_pages():
    reader = text()
    reader.markdown("# A\n\n## What's *new* in `x_y`?\n\n## A\n")
    assert [anchor for _, anchor, _ in reader.headings] == ["a", "whats-new-in-x_y", "a-1"]


def test_a_folder_that_is_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something that is not a site"):
        build(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.name)
def test_a_lab_carries_its_numbers(site, lab):
    shown = (site.out / lab.target).read_text(encoding="utf-8")
    kept = re.search(r'<script type="application/json" id="data">(.*?)</script>', shown, re.S)[1]
    assert json.loads(kept) == json.loads(json.dumps(lab.data()))
    assert html.escape(lab.title) in shown
