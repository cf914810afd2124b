"""Which files of the repository become pages, where they lie in the site, and in which order they are read."""

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from tpo_course.notebooks import REPO_SLUG, ROOT, course

REPOSITORY = f"https://github.com/{REPO_SLUG}"
OUTSIDE = ("http://", "https://", "mailto:")


@dataclass(frozen=True)
class Page:
    """A page: where it comes from and where it goes, both from the root, and where in the menu it stands."""

    source: str  # "notebooks/02_dpo.ipynb"
    target: str  # "notebooks/02_dpo.html"
    room: str  # the heading in the menu it stands below; "" for none
    name: str  # in the menu

    @property
    def path(self) -> Path:
        """The file it is made from."""
        return ROOT / self.source


# (room, patterns): a file belongs to the first that names it
ROOMS = (
    ("", ("README.md",)),
    ("Beside the chapters", ("notebooks/notation.md", "notebooks/equation_map.md", "notebooks/*.md")),
    ("Studies", ("studies/README.md", "studies/PLAN.md", "studies/results/*.md")),
    ("Documents", ("docs/commands.md", "docs/**/*.md", "data/pocket/README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
)


def pages() -> list[Page]:
    """Every page that is made from a file, chapters first after the home page."""
    found, seen = [], set()
    for room, patterns in ROOMS:
        for path in (path for pattern in patterns for path in sorted(ROOT.glob(pattern))):
            if path not in seen:
                seen.add(path)
                found.append(_page(path, room))
        if not room:
            found += [_page(path, "Chapters") for path in course()]
    return found


def _page(path: Path, room: str) -> Page:
    source = PurePosixPath(path.relative_to(ROOT).as_posix())
    target = source.with_name("index.html") if source.name == "README.md" else source.with_suffix(".html")
    return Page(str(source), str(target), room, "Home" if str(source) == "README.md" else _name(source))


def _name(source: PurePosixPath) -> str:
    """What the menu calls it: a chapter by number and name, a document by its title."""
    if source.suffix == ".ipynb":
        return source.stem.replace("_", " ")
    title = re.search(r"^# (.+)$", (ROOT / source).read_text(encoding="utf-8"), re.M)
    return re.sub(r"[`*]", "", title[1]) if title else source.stem


class Addresses:
    """Where a link of a page leads in the site; keeps what is needed and what leaves the machine.

    Attributes:
        files: files of the repository that pages show, to be copied to the same place.
        outside: {address: sources of the pages that name it}.
    """

    def __init__(self, known: list[Page]) -> None:
        self.targets = {page.source: page.target for page in known}
        self.files: set[str] = set()
        self.outside: dict[str, set[str]] = {}

    def link(self, page: Page, address: str) -> str:
        """The address for `<a href>`: a page of the site, a place in the page, or a file in the repository.

        Raises:
            ValueError: it names a file that is not there.
        """
        if address.startswith("#"):
            return address
        if not address.startswith(OUTSIDE):
            place, mark = self._inside(page, address), urlsplit(address).fragment
            if place in self.targets:
                return relative(page.target, self.targets[place]) + (f"#{mark}" if mark else "")
            address = f"{REPOSITORY}/{'tree' if (ROOT / place).is_dir() else 'blob'}/main/{place}"
        self.outside.setdefault(address, set()).add(page.source)
        return address

    def picture(self, page: Page, address: str) -> str | None:
        """The address for `<img src>`, None for a picture elsewhere: no page asks another machine for anything.

        Raises:
            ValueError: it names a file that is not there.
        """
        if address.startswith((*OUTSIDE, "//")):
            return None
        if not address.startswith("data:"):
            self.files.add(self._inside(page, address))
        return address

    def _inside(self, page: Page, address: str) -> str:
        path = os.path.normpath(os.path.join(os.path.dirname(page.source), urlsplit(address).path))
        if path.startswith("..") or not (ROOT / path).exists():
            raise ValueError(f"{page.source} links to {address}, which is not there: mend the link")
        return path


def relative(start: str, target: str) -> str:
    """The way from one page of the site to another."""
    return os.path.relpath(target, os.path.dirname(start) or ".")
