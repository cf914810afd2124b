"""A notebook as HTML: its text, its code and what its cells put out when they ran."""

import base64
import html
import re
import struct
from collections.abc import Mapping
from pathlib import PurePosixPath

import nbformat

from tpo_course.site.alt import REPR, words
from tpo_course.site.living import LABS
from tpo_course.site.markup import Text, code
from tpo_course.site.source import Page, relative

CODE_COLOUR = re.compile(r"style=[\"'][^\"']*(?:background|color)")  # made for a white page
WIDE = 560  # pixels: on a phone a picture from here on moves sideways,
LEAST = 0.7  # at this share of its width, so that its labels stay readable


class Chapter:
    """One notebook. `body` is its HTML; `pictures` are to be written beside it: {path in the site: bytes}."""

    def __init__(self, page: Page, text: Text) -> None:
        self.page, self.text = page, text
        self.pictures: dict[str, bytes] = {}
        self.undescribed: list[str] = []  # ids of cells with a picture that nobody put in words
        self.body = "".join(self._cell(cell) for cell in nbformat.read(page.path, as_version=4).cells)

    def _cell(self, cell: Mapping) -> str:
        if cell.cell_type == "markdown":
            return self.text.markdown(cell.source)
        shown = code(cell.source, "python")
        if "setup" in cell.metadata.get("tags", []):
            shown = f"<details><summary>Set-up cell</summary>{shown}</details>"
        outputs = "".join(self._output(cell, output) for output in cell.outputs)
        return f'<div class="cell">{shown}{outputs}{self._alive(cell.source)}</div>\n'

    def _alive(self, source: str) -> str:
        """Where a widget of this cell works without a kernel."""
        found = [lab for lab in LABS if re.search(rf"\bwidgets\.{lab.widget}\(", source)]
        links = [f'<a href="{relative(self.page.target, lab.target)}">{lab.title}</a>' for lab in found]
        return f'<p class="alive">Works in this browser, without a kernel: {", ".join(links)}.</p>' if links else ""

    def _output(self, cell: Mapping, output: Mapping) -> str:
        if output.output_type == "stream":
            return self._plain(output.text)
        data = output.get("data", {})
        if "text/html" in data:
            paper = " paper" if CODE_COLOUR.search(data["text/html"]) else ""
            return f'<div class="out{paper}">{self.text.html(data["text/html"])}</div>'
        if "text/markdown" in data:
            return f'<div class="out">{self.text.markdown(data["text/markdown"])}</div>'
        if "image/png" in data:
            return self._picture(cell, output)
        if "application/vnd.jupyter.widget-view+json" in data and REPR.match(data.get("text/plain", "")):
            return '<p class="note">A widget stands here. It needs a kernel: open the chapter in JupyterLab or on Colab.</p>'
        return self._plain(data.get("text/plain", ""))

    def _plain(self, text: str) -> str:
        return f'<pre class="out" tabindex="0">{html.escape(text.rstrip())}</pre>' if text.strip() else ""

    def _picture(self, cell: Mapping, output: Mapping) -> str:
        data = base64.b64decode(output.data["image/png"])
        path = str(PurePosixPath(self.page.target).with_suffix("") / f"{len(self.pictures) + 1}.png")
        self.pictures[path] = data
        width, height = struct.unpack(">II", data[16:24])
        alt = html.escape(self._words(cell, output))
        picture = f'<img src="{relative(self.page.target, path)}" width="{width}" height="{height}" alt="{alt}">'
        if width < WIDE:
            return f"<figure>{picture}</figure>"
        return f'<figure class="moves" style="--least: {round(LEAST * width)}px" tabindex="0">{picture}</figure>'

    def _words(self, cell: Mapping, output: Mapping) -> str:
        """A picture in words: those stored beside it, else those kept for its cell, else the section it stands in."""
        stored = output.get("metadata", {}).get("image/png", {}).get("alt")
        if said := stored or words(self.page.path.stem, cell.id, output):
            return said
        self.undescribed.append(cell.id)
        section = re.sub(r"<[^>]+>", "", self.text.headings[-1][2]) if self.text.headings else self.page.name
        return f"Figure of the section “{section}”; the text beside it says what to see in it."
