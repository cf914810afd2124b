"""Whether every link inside a built site leads somewhere: to a file that is there and a name that is in it."""

import os
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tpo_course.site.source import OUTSIDE


class Reader(HTMLParser):
    """What a page names and what it needs.

    Attributes:
        names: every id; links: what `<a>` leads to; needs: what the browser fetches to show the page.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.links: list[str] = []
        self.needs: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        """Called for every tag."""
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.names.append(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif "href" in given or "src" in given:
            self.needs.append(given.get("src") or given["href"])


def broken(out: Path) -> list[str]:
    """Of every page of a built site: what leads nowhere, what is fetched from elsewhere, names that are given twice."""

    @cache
    def read(path: Path) -> Reader:
        return Reader(path.read_text(encoding="utf-8"))

    found = []
    for path in sorted(out.rglob("*.html")):
        page, here = read(path), path.relative_to(out)
        found += [
            f"{here}: fetches {address} from elsewhere"
            for address in page.needs
            if address.startswith((*OUTSIDE, "//"))
        ]
        found += [
            f"{here}: the name {name} is given twice" for name in {n for n in page.names if page.names.count(n) > 1}
        ]
        for address in page.links + page.needs:
            if address.startswith((*OUTSIDE, "//", "data:")):
                continue
            parts = urlsplit(address)
            place = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            if not place.is_relative_to(out) or not place.is_file():
                found.append(f"{here}: {address} is not there")
            elif parts.fragment and place.suffix == ".html" and unquote(parts.fragment) not in read(place).names:
                found.append(f"{here}: {address} names a place that is not there")
    return found
