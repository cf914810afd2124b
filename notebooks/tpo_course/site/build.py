"""Build the site: every page, the labs and what they show, in one folder that works from anywhere, even from file://."""

import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

import tpo_lib
from tpo_course.notebooks import ROOT
from tpo_course.site.chapter import Chapter
from tpo_course.site.links import broken
from tpo_course.site.living import LABS
from tpo_course.site.markup import Text
from tpo_course.site.source import REPOSITORY, Addresses, Page, pages, relative
from tpo_lib.cli import call
from tpo_lib.parser import Parser

STATIC = Path(__file__).with_name("static")
MARKER = ".tpo-site"  # in a folder that was built: it may be replaced


@dataclass(frozen=True)
class Site:
    """What was built."""

    out: Path
    formulas: Mapping[str, int]  # {source: how many}
    undescribed: Mapping[str, list[str]]  # {source: ids of the cells with a picture that nobody put in words}
    outside: Mapping[str, set[str]]  # {address elsewhere: sources that name it}; not fetched


def build(out: Path) -> Site:
    """Write the whole site into `out`, which is emptied before if a site was built there.

    Raises:
        ValueError: `out` holds something else; a link leads nowhere; a formula cannot be typeset.
    """
    _empty(out)
    known = pages()
    addresses, labs = Addresses(known), [Page("", lab.target, "Labs", lab.title) for lab in LABS]
    menu, site = known[:1] + labs + known[1:], Site(out, {}, {}, addresses.outside)
    render = _renderer(menu)
    for page in known:
        text = Text(page, addresses)
        try:
            body = (
                _chapter(page, text, site)
                if page.source.endswith(".ipynb")
                else text.markdown(page.path.read_text("utf-8"))
            )
        except ValueError as error:
            raise ValueError(f"{page.source}: {error}") from error
        site.formulas[page.source] = text.formulas
        _write(out / page.target, render("page.html.j2", page, body=body, headings=_contents(text)))
    for page, lab in zip(labs, LABS, strict=True):
        data = json.dumps(lab.data(), separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
        _write(out / page.target, render("lab.html.j2", page, lab=lab, data=data, headings=[]))
    for name in addresses.files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, out / name)
    shutil.copytree(STATIC, out / "static")
    if found := broken(out):
        raise ValueError("links that lead nowhere:\n" + "\n".join(found))
    return site


def _empty(out: Path) -> None:
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise ValueError(
            f"{out} holds something that is not a site: name an empty folder, or one that a site was built in"
        )
    shutil.rmtree(out, ignore_errors=True)
    _write(out / MARKER, "python -m tpo_course.site may replace this folder\n")
    _write(out / ".nojekyll", "")  # GitHub Pages takes the files as they are


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _chapter(page: Page, text: Text, site: Site) -> str:
    chapter = Chapter(page, text)
    for path, data in chapter.pictures.items():
        (site.out / path).parent.mkdir(parents=True, exist_ok=True)
        (site.out / path).write_bytes(data)
    if chapter.undescribed:
        site.undescribed[page.source] = chapter.undescribed
    return chapter.body


def _contents(text: Text) -> list[tuple[int, str, str]]:
    """Headings of the second and third level; in HTML without links."""
    without = [(level, anchor, re.sub(r"</?a\b[^>]*>", "", words)) for level, anchor, words in text.headings]
    return [each for each in without if each[0] in (2, 3)]


def _renderer(menu: list[Page]):
    """render(template, page, **what) -> HTML."""
    templates = Environment(
        loader=PackageLoader("tpo_course.site"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    reading = [page for page in menu if page.source.endswith(".ipynb")]
    rooms = {room: [page for page in menu if page.room == room] for room in dict.fromkeys(page.room for page in menu)}

    def render(template: str, page: Page, **what) -> str:
        at = reading.index(page) if page in reading else None
        before = reading[at - 1] if at else None
        after = reading[at + 1] if at is not None and at + 1 < len(reading) else None
        given = {"rooms": rooms, "page": page, "before": before, "after": after, "version": tpo_lib.__version__}
        given |= {"to": lambda target: relative(page.target, target), "repository": REPOSITORY} | what
        return templates.get_template(template).render(given)

    return render


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = Parser(prog="python -m tpo_course.site", description=__doc__.splitlines()[0])
    parser.add_argument(
        "out", type=Path, nargs="?", default=ROOT / "site", help="folder to build it in (default: site/)"
    )
    parser.set_defaults(function=_build)
    call(parser, arguments)


def _build(options) -> None:
    began = time.time()
    site = build(options.out)
    print("\n".join(f"outside: {address}" for address in sorted(site.outside) if not address.startswith(REPOSITORY)))
    for source, ids in site.undescribed.items():
        print(f"{source}: pictures without words in cells {', '.join(ids)}: add them to tpo_course/site/alt.toml")
    count = sum(site.formulas.values())
    print(
        f"{len(site.formulas) + len(LABS)} pages, {count} formulas, {time.time() - began:.0f} s: {site.out / 'index.html'}"
    )
